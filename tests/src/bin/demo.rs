//! The main job: real programs from real OCI images, in every kind of sandbox that exists, and a
//! table of what ran and how long. Writes the same as JSON.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_tests::env;
use serde::{Deserialize, Serialize};

/// One run, as it stands in `target/demo.json`.
#[derive(Debug, Serialize)]
struct Row {
    sandbox: &'static str,
    via: &'static str,
    image: &'static str,
    command: String,
    exit_code: i32,
    stdout: String,
    boot_ms: f64,
    total_ms: f64,
    #[serde(skip)]
    ok: Result<(), String>,
}

/// What `vmmctl run --report` writes.
#[derive(Debug, Deserialize)]
struct RunReport {
    boot_ms: f64,
    total_ms: f64,
}

struct Job {
    image: &'static str,
    options: Vec<String>,
    command: Vec<&'static str>,
    exit_code: i32,
    /// What the output must hold.
    holds: &'static str,
}

fn main() -> Result<ExitCode> {
    let out: PathBuf = std::env::args()
        .nth(1)
        .context("usage: demo OUT.json")?
        .into();
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
        plain("busybox", &["uname", "-a"], 0, "-bulkhead"),
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
        rows.push(run(job, scratch.path())?);
    }
    // What the guest wrote must be on the host, not only in its own view.
    let note = fs::read_to_string(volume.join("note"));
    if note.as_deref().ok() != Some("written by the guest\n") {
        rows[4].ok = Err(format!("the host reads {note:?} from the volume"));
    }

    if let Some(dir) = out.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&out, serde_json::to_vec_pretty(&rows)?)?;
    print(&rows);
    println!("written to {}", out.display());
    Ok(if rows.iter().all(|row| row.ok.is_ok()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run(job: &Job, scratch: &Path) -> Result<Row> {
    let image = bulkhead_fixtures::find_image(job.image)?
        .with_context(|| format!("image {} is missing: run `just fixtures`", job.image))?;
    let report = scratch.join("report.json");
    let _ = fs::remove_file(&report);
    let start = Instant::now();
    let output = Command::new(env::vmmctl()?)
        .args(["run", "--rm", "--report"])
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
    let ok = if exit_code != job.exit_code {
        Err(format!(
            "exit code {exit_code}, not {}: {stderr}",
            job.exit_code
        ))
    } else if !stdout.contains(job.holds) {
        Err(format!(
            "the output lacks {:?}: {stdout}\n{stderr}",
            job.holds
        ))
    } else {
        Ok(())
    };
    Ok(Row {
        sandbox: "microvm",
        via: "vmmctl",
        image: job.image,
        command: job.command.join(" "),
        exit_code,
        stdout,
        boot_ms: times.as_ref().map_or(f64::NAN, |t| t.boot_ms),
        total_ms: times.map_or(wall_ms, |t| t.total_ms),
        ok,
    })
}

fn print(rows: &[Row]) {
    let short = |text: &str, width: usize| -> String {
        let line = text.lines().last().unwrap_or("");
        if line.chars().count() > width {
            line.chars().take(width - 1).chain(['…']).collect()
        } else {
            line.to_owned()
        }
    };
    println!(
        "\n{:<8} {:<40} {:<8} {:<44} {:>4} {:>8} {:>9}",
        "IMAGE", "COMMAND", "SANDBOX", "OUTPUT", "EXIT", "BOOT ms", "TOTAL ms"
    );
    for row in rows {
        println!(
            "{:<8} {:<40} {:<8} {:<44} {:>4} {:>8.0} {:>9.0}",
            row.image,
            short(&row.command, 40),
            row.sandbox,
            short(&row.stdout, 44),
            row.exit_code,
            row.boot_ms,
            row.total_ms
        );
    }
    for row in rows {
        if let Err(why) = &row.ok {
            println!("FAILED {} {}: {why}", row.image, short(&row.command, 40));
        }
    }
}
