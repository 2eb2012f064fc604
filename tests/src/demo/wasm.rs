//! The wasm rows of the demo: real programs by `vmmctl wasm run`, natively, with or without KVM.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_fixtures::wasm as fixtures;
use serde::Deserialize;

use super::Row;
use crate::env::{self, PATIENCE};
use crate::process::Guard;
use crate::wasm::wit;

#[derive(Debug, Deserialize)]
struct Report {
    boot_ms: f64,
    total_ms: f64,
}

/// Runs CPython with a file, an exit code, and a component that answers a request.
///
/// # Errors
/// A program cannot be had, or `vmmctl` is not built.
pub fn rows() -> Result<Vec<Row>> {
    let scratch = tempfile::tempdir()?;
    let volume = scratch.path().join("data");
    fs::create_dir(&volume)?;
    fs::write(
        volume.join("job.py"),
        "import sys\nopen('/data/note', 'w').write('written by wasm\\n')\n\
         print('python', sys.version.split()[0], 'wrote', open('/data/note').read().strip())\n",
    )?;
    let python = fixtures::python()?;
    let mount = format!("{}:/data", volume.display());
    let mut rows = vec![
        once(
            scratch.path(),
            "cpython",
            &["-v", &mount],
            &python,
            &["/data/job.py"],
            0,
            "python 3.12.0 wrote written by wasm",
        )?,
        once(
            scratch.path(),
            "cpython",
            &[],
            &python,
            &["-c", "print('leaving with 7'); raise SystemExit(7)"],
            7,
            "leaving with 7",
        )?,
        served(&fixtures::python_http(&wit()?)?)?,
    ];
    // What the program wrote must be on the host, not only in its own view.
    let note = fs::read_to_string(volume.join("note"));
    if note.as_deref().ok() != Some("written by wasm\n")
        && let Some(row) = rows.first_mut()
    {
        row.failure = Some(format!("the host reads {note:?} from the volume"));
    }
    Ok(rows)
}

fn once(
    scratch: &Path,
    image: &str,
    options: &[&str],
    program: &Path,
    args: &[&str],
    expected: i32,
    holds: &str,
) -> Result<Row> {
    let report = scratch.join("report.json");
    let output = Command::new(env::vmmctl()?)
        .args(["wasm", "run", "--report"])
        .arg(&report)
        .args(options)
        .arg(program)
        .arg("--")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .context("vmmctl")?;
    let stdout = String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned();
    let stderr = String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned();
    let exit_code = output.status.code().context("vmmctl was killed")?;
    let times: Report = serde_json::from_slice(&fs::read(&report).unwrap_or_default())
        .with_context(|| format!("no report: {stderr}"))?;
    let failure = if exit_code != expected {
        Some(format!("exit code {exit_code}, not {expected}: {stderr}"))
    } else if !stdout.contains(holds) {
        Some(format!("the output lacks {holds:?}: {stdout}\n{stderr}"))
    } else {
        None
    };
    Ok(Row {
        sandbox: "wasm".into(),
        via: "vmmctl".into(),
        image: image.into(),
        command: args.join(" "),
        exit_code,
        stdout,
        boot_ms: times.boot_ms,
        total_ms: times.total_ms,
        failure,
    })
}

/// Serves with a component and asks it once.
fn served(program: &Path) -> Result<Row> {
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let begin = Instant::now();
    let child = Command::new(env::vmmctl()?)
        .args(["wasm", "run", "--http", &address.to_string()])
        .arg(program)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("vmmctl")?;
    let mut server = Guard(child);
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(e) if begin.elapsed() > PATIENCE => bail!("the component does not serve: {e}"),
            Err(_) => {}
        }
        if let Some(status) = server.0.try_wait()? {
            bail!("the component ended: {status}");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let boot = begin.elapsed();
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /demo HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let stdout = answer
        .lines()
        .find(|line| line.starts_with("python answers"))
        .unwrap_or_default()
        .to_owned();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(server.0.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    let exit_code = server.0.wait()?.code().context("vmmctl was killed")?;
    let failure = match (stdout.as_str(), exit_code) {
        ("python answers /demo", 0) => None,
        _ => Some(format!("exit code {exit_code}, answer {answer:?}")),
    };
    Ok(Row {
        sandbox: "wasm".into(),
        via: "vmmctl".into(),
        image: "http".into(),
        command: "--http: GET /demo".into(),
        exit_code,
        stdout,
        boot_ms: boot.as_secs_f64() * 1e3,
        total_ms: begin.elapsed().as_secs_f64() * 1e3,
        failure,
    })
}
