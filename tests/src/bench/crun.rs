//! Starting a container with crun, for comparison.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_fixtures::wasm::{self as fixtures, Crun};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const ROUNDS: usize = 20;
const NO_PATH: Option<&str> = None;

/// Times in ms of `crun run` with a static program that prints a line; `None` where it cannot run.
///
/// Hosts with a hybrid of cgroup v1 and v2 are beyond crun, so it is shown version 2 and told to
/// use none: it makes no cgroup and is the faster for it.
///
/// # Errors
/// The container cannot be prepared.
pub fn starts(scratch: &Path) -> Result<Option<Vec<f64>>> {
    let crun = fixtures::crun()?;
    let bundle = scratch.join("bundle");
    let root = bundle.join("rootfs");
    fs::create_dir_all(&root)?;
    let init = root.join("hello");
    fs::write(&init, fixtures::static_hello_elf())?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let status = command(&crun)
        .arg("spec")
        .current_dir(&bundle)
        .status()
        .context("crun spec")?;
    if !status.success() {
        bail!("crun spec: {status}");
    }
    let path = bundle.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    spec["process"]["args"] = serde_json::json!(["/hello"]);
    spec["process"]["terminal"] = false.into();
    fs::write(&path, serde_json::to_vec(&spec)?)?;
    // A thread of its own: its mounts are nobody else's.
    let run = std::thread::spawn(move || -> Result<Vec<f64>> {
        only_cgroup_v2().context("a mount namespace")?;
        (0..ROUNDS).map(|n| once(&crun, &bundle, n)).collect()
    });
    match run.join() {
        Ok(Ok(times)) => Ok(Some(times)),
        Ok(Err(e)) => {
            eprintln!("crun cannot run here: {e:#}");
            Ok(None)
        }
        Err(_) => bail!("the thread for crun panicked"),
    }
}

fn command(crun: &Crun) -> Command {
    let mut command = Command::new(&crun.program);
    command.env("LD_LIBRARY_PATH", &crun.libraries);
    command
}

fn only_cgroup_v2() -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
    mount(
        NO_PATH,
        "/",
        NO_PATH,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        NO_PATH,
    )?;
    // Whatever is there is covered if it cannot be taken away.
    let _ = umount2("/sys/fs/cgroup", MntFlags::MNT_DETACH);
    mount(
        Some("none"),
        "/sys/fs/cgroup",
        Some("cgroup2"),
        MsFlags::empty(),
        NO_PATH,
    )?;
    Ok(())
}

fn once(crun: &Crun, bundle: &Path, number: usize) -> Result<f64> {
    let name = format!("bulkhead-bench-{}-{number}", std::process::id());
    let begin = Instant::now();
    let output = command(crun)
        .args(["--cgroup-manager=disabled", "run", &name])
        .current_dir(bundle)
        .stdin(Stdio::null())
        .output()?;
    let time = begin.elapsed().as_secs_f64() * 1e3;
    if !output.status.success() || output.stdout != b"hello\n" {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(time)
}
