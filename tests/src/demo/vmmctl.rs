//! Programs of OCI images in VMs, on Linux and on the app kernel, by `vmmctl run`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::Row;
use crate::env;

/// What `vmmctl run --report` writes.
#[derive(Debug, Deserialize)]
struct RunReport {
    boot_ms: f64,
    total_ms: f64,
}

/// Which kernel runs the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Linux.
    Linux,
    /// Ours.
    App,
}

struct Job {
    image: &'static str,
    options: Vec<String>,
    command: Vec<&'static str>,
    exit_code: i32,
    /// What the output must hold.
    holds: &'static str,
}

/// Runs them all.
///
/// # Errors
/// An image is missing, or `vmmctl` cannot be started.
pub fn rows(kernel: Kernel) -> Result<Vec<Row>> {
    let scratch = tempfile::tempdir()?;
    let volume = scratch.path().join("shared");
    fs::create_dir(&volume)?;

    let plain = |image, command: &[&'static str], exit_code, holds| Job {
        image,
        options: Vec::new(),
        command: command.to_vec(),
        exit_code,
        holds,
    };
    let mut jobs = vec![
        match kernel {
            Kernel::Linux => plain("busybox", &["uname", "-a"], 0, "-bulkhead"),
            Kernel::App => plain(
                "busybox",
                &[
                    "sh",
                    "-c",
                    "find /bin -name '*sh' | wc -l; seq 1000 | awk '{ s += $1 } END { print s }'",
                ],
                0,
                "500500",
            ),
        },
        plain(
            "python3",
            &["python3", "/app/job.py"],
            0,
            "job ok: 4 threads",
        ),
        Job {
            // The image's own entrypoint is the server.
            options: vec!["--entrypoint".into(), "sh".into()],
            ..plain(
                "redis",
                &[
                    "-c",
                    "redis-server --daemonize yes --save '' --logfile /tmp/redis.log >/dev/null; \
                 until redis-cli ping >/dev/null 2>&1; do :; done; \
                 redis-cli set demo works >/dev/null; redis-cli get demo; redis-cli shutdown nosave",
                ],
                0,
                "works",
            )
        },
        plain(
            "busybox",
            &["sh", "-c", "echo leaving with 7; exit 7"],
            7,
            "leaving with 7",
        ),
    ];
    jobs.push(Job {
        image: "busybox",
        options: vec!["--volume".into(), format!("{}:/shared", volume.display())],
        command: vec![
            "sh",
            "-c",
            "echo written by the guest > /shared/note && cat /shared/note",
        ],
        exit_code: 0,
        holds: "written by the guest",
    });
    if std::env::var_os("DEMO_NGINX").is_none_or(|v| v != "0") {
        jobs.push(plain(
            "nginx",
            &[
                "sh",
                "-c",
                "nginx -g 'daemon on;' && until wget -qO- http://127.0.0.1/health 2>/dev/null; do :; done",
            ],
            0,
            "",
        ));
    }

    let mut rows = Vec::new();
    for job in &jobs {
        eprintln!("running {} {}", job.image, job.command.join(" "));
        let mut row = run(kernel, job, scratch.path())?;
        if !job.options.is_empty() && job.options[0] == "--volume" {
            // What the guest wrote must be on the host, not only in its own view.
            let note = fs::read_to_string(volume.join("note"));
            if note.as_deref().ok() != Some("written by the guest\n") {
                row.failure = Some(format!("the host reads {note:?} from the volume"));
            }
        }
        rows.push(row);
    }
    Ok(rows)
}

fn run(kernel: Kernel, job: &Job, scratch: &Path) -> Result<Row> {
    let image = bulkhead_fixtures::find_image(job.image)?
        .with_context(|| format!("image {} is missing: run `just fixtures`", job.image))?;
    let report = scratch.join("report.json");
    let _ = fs::remove_file(&report);
    let start = Instant::now();
    let (sandbox, option) = match kernel {
        Kernel::Linux => ("microvm", "microvm"),
        Kernel::App => ("appkernel", "app"),
    };
    let output = Command::new(env::vmmctl()?)
        .args(["run", "--rm", "--sandbox", option, "--report"])
        .arg(&report)
        .args(&job.options)
        .arg(&image.oci_tar)
        .arg("--")
        .args(&job.command)
        .stdin(Stdio::null())
        .output()
        .context("vmmctl")?;
    let wall_ms = start.elapsed().as_secs_f64() * 1e3;
    let stdout = String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned();
    let stderr = String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned();
    let Some(exit_code) = output.status.code() else {
        bail!("vmmctl was killed: {}", output.status);
    };
    let times: Option<RunReport> = fs::read(&report)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    let failure = if exit_code != job.exit_code {
        Some(format!(
            "exit code {exit_code}, not {}: {stderr}",
            job.exit_code
        ))
    } else if !stdout.contains(job.holds) {
        Some(format!(
            "the output lacks {:?}: {stdout}\n{stderr}",
            job.holds
        ))
    } else {
        None
    };
    Ok(Row {
        sandbox: sandbox.into(),
        via: "vmmctl".into(),
        image: job.image.into(),
        command: job.command.join(" "),
        exit_code,
        stdout,
        boot_ms: times.as_ref().map_or(0.0, |t| t.boot_ms),
        total_ms: times.map_or(wall_ms, |t| t.total_ms),
        failure,
    })
}
