//! Pods of wasm programs that come and go: nothing of them may stay in the daemon.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::wasm::DOT;
use crate::wasm::daemon::{Daemon, connect, run as run_task};

/// Runs `count` tasks through a daemon, each in a pod of its own, and looks whether anything grows.
///
/// # Errors
/// A task goes wrong, or the daemon grows.
pub fn soak(count: usize) -> Result<()> {
    let daemon = Daemon::start()?;
    let image = daemon.image("dot", &wat::parse_str(DOT)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let one = |n: usize| -> Result<()> {
        let id = format!("p{n}");
        let address = daemon.pod(&id, "")?;
        let bundle = daemon.bundle(&id, &image, &["/app.wasm"], |_| ())?;
        let directory = bundle.create.bundle.clone();
        let (code, out, _) = runtime.block_on(async {
            let tasks = connect(&address).await?;
            run_task(&tasks, bundle).await
        })?;
        if code != 0 || out != "." {
            bail!("task {n} ended with {code}, output {out:?}");
        }
        daemon.remove(&id)?;
        fs::remove_dir_all(directory)?;
        Ok(())
    };
    // What is made once is made by the first few.
    for n in 0..count.min(200) {
        one(n)?;
    }
    let before = Traces::of(&daemon)?;
    for n in 0..count {
        one(count + n)?;
    }
    let begin = Instant::now();
    // Idle threads stay for two seconds.
    let after = loop {
        let after = Traces::of(&daemon)?;
        if after.threads <= before.threads || begin.elapsed() > Duration::from_secs(20) {
            break after;
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    println!("before: {before:?}\nafter {count} pods: {after:?}");
    if after.files > before.files + 2
        || after.threads > before.threads + 2
        || after.mounts > before.mounts
        || after.rss_kib > before.rss_kib + 4096 + count as u64 / 2
    {
        bail!("the daemon has grown");
    }
    println!("{count} pods came and went; nothing is left");
    Ok(())
}

/// What a process has.
#[derive(Debug)]
struct Traces {
    files: usize,
    threads: usize,
    mounts: usize,
    rss_kib: u64,
}

impl Traces {
    fn of(daemon: &Daemon) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{}", daemon.pid()));
        let count = |name: &str| -> Result<usize> { Ok(fs::read_dir(proc.join(name))?.count()) };
        let status = fs::read_to_string(proc.join("status"))?;
        let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        Ok(Self {
            files: count("fd")?,
            threads: count("task")?,
            mounts: fs::read_to_string(proc.join("mountinfo"))?.lines().count(),
            rss_kib: rss
                .and_then(|l| l.split_whitespace().next())
                .context("no VmRSS")?
                .parse()?,
        })
    }
}
