//! virtio-fs beside QEMU with virtiofsd: sequential read of a file, and `find` over 20,000 files,
//! in the same guest (kernel and initramfs) on the same shared directory.
//!
//! The guest itself takes the times; its caches are dropped before each round, the host's are
//! warm for both.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_fixtures::cpio::Cpio;

use super::boot::{Inputs, qemu_version};
use super::report::{Goal, Report};
use crate::process::{Guard, wait_for_marker};

const FILE_MIB: usize = 256;
const DIRECTORIES: usize = 200;
const FILES_PER_DIRECTORY: usize = 100;
const ROUNDS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(240);
/// How often a side that fails is run again.
const ATTEMPTS: usize = 2;

/// What the guest runs: one line of milliseconds for each round.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t virtiofs share /mnt || echo "NO-SHARE"
now() { awk '{ printf "%d", $1 * 1000 }' /proc/uptime; }
round=0
while [ $round -lt ROUNDS ]; do
    echo 3 > /proc/sys/vm/drop_caches
    a=$(now); dd if=/mnt/big of=/dev/null bs=1M 2>/dev/null
    b=$(now); count=$(find /mnt/tree -type f | wc -l)
    c=$(now)
    echo "ROUND $((b - a)) $((c - b)) $count"
    round=$((round + 1))
done
echo ALL-DONE
sleep 1000
"#;

/// Runs the benchmark.
///
/// # Errors
/// When a guest does not finish or a part is missing.
pub fn run(inputs: &Inputs) -> Result<Report> {
    let share = inputs.scratch.join("share");
    make_tree(&share)?;
    let initramfs = inputs.scratch.join("fs.cpio");
    fs::write(&initramfs, guest()?)?;

    let mut report = Report::new("fs", "QEMU -M microvm with virtiofsd", &peer_version()?);
    // In turn, twice: what the host does meanwhile hurts both.
    let (mut ours, mut peer) = (Times::default(), Times::default());
    for _ in 0..2 {
        ours.add(again("vmmctl", || vmmctl(inputs, &initramfs, &share))?);
        peer.add(again("QEMU", || qemu(inputs, &initramfs, &share))?);
    }
    let command = "vmmctl boot --memory 512M --share share=DIR --initramfs FILE KERNEL";
    report.add(
        &format!("sequential read of {FILE_MIB} MiB, cold guest cache"),
        "ms",
        &ours.read,
        &peer.read,
        Goal::Ratio(1.0),
        command,
    );
    report.add(
        &format!(
            "find over {} files, cold guest cache",
            DIRECTORIES * FILES_PER_DIRECTORY
        ),
        "ms",
        &ours.find,
        &peer.find,
        Goal::Ratio(1.0),
        command,
    );
    Ok(report)
}

/// Emulated hosts lose a guest now and then (`tests/lab/README.md`, "Known risk"): it says nothing
/// more. Then the whole side runs anew, and the table's reader is told.
fn again(side: &str, run: impl Fn() -> Result<Times>) -> Result<Times> {
    for _ in 0..ATTEMPTS {
        match run() {
            Ok(times) => return Ok(times),
            Err(error) => eprintln!("{side}: {error}; all its rounds again"),
        }
    }
    run()
}

#[derive(Debug, Default)]
struct Times {
    read: Vec<f64>,
    find: Vec<f64>,
}

impl Times {
    fn add(&mut self, other: Self) {
        self.read.extend(other.read);
        self.find.extend(other.find);
    }

    fn parse(output: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(output);
        let mut times = Self::default();
        for line in text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("ROUND "))
        {
            let numbers: Vec<f64> = line
                .split_whitespace()
                .map(str::parse)
                .collect::<Result<_, _>>()
                .with_context(|| line.to_owned())?;
            let [read, find, count] = numbers[..] else {
                bail!("unexpected line {line:?}");
            };
            if count != (DIRECTORIES * FILES_PER_DIRECTORY) as f64 {
                bail!("the guest found {count} files");
            }
            times.read.push(read);
            times.find.push(find);
        }
        if times.read.len() != ROUNDS {
            bail!("{} rounds of {ROUNDS}: {text}", times.read.len());
        }
        Ok(times)
    }
}

fn make_tree(share: &Path) -> Result<()> {
    fs::create_dir_all(share)?;
    let mut big = fs::File::create(share.join("big"))?;
    let block: Vec<u8> = (0..1 << 20)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for _ in 0..FILE_MIB {
        big.write_all(&block)?;
    }
    for directory in 0..DIRECTORIES {
        let dir = share.join("tree").join(format!("d{directory:03}"));
        fs::create_dir_all(&dir)?;
        for file in 0..FILES_PER_DIRECTORY {
            fs::write(dir.join(format!("f{file:03}")), b"x")?;
        }
    }
    Ok(())
}

fn guest() -> Result<Vec<u8>> {
    let busybox = ["/usr/bin/busybox", "/bin/busybox"]
        .iter()
        .find_map(|path| fs::read(path).ok())
        .context("busybox (static) is not installed")?;
    let mut cpio = Cpio::new();
    for dir in ["bin", "dev", "mnt", "proc"] {
        cpio.directory(dir, 0o755);
    }
    cpio.character_device("dev/console", 0o600, 5, 1);
    cpio.file("bin/busybox", 0o755, &busybox);
    cpio.file(
        "init",
        0o755,
        INIT.replace("ROUNDS", &ROUNDS.to_string()).as_bytes(),
    );
    Ok(cpio.finish())
}

fn finish(mut command: Command) -> Result<Times> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    let mut child = Guard(child);
    let mut output = child.0.stdout.take().context("stdout")?;
    let (_, seen) = wait_for_marker(&mut output, b"ALL-DONE", PATIENCE)?;
    Times::parse(&seen)
}

fn vmmctl(inputs: &Inputs, initramfs: &Path, share: &Path) -> Result<Times> {
    let mut command = Command::new(&inputs.vmmctl);
    command
        .args(["boot", "--memory", "512M", "--cmdline", "quiet", "--share"])
        .arg(format!("share={}", share.display()))
        .arg("--initramfs")
        .arg(initramfs)
        .arg(&inputs.kernel);
    finish(command)
}

fn virtiofsd() -> Result<PathBuf> {
    [
        "/usr/libexec/virtiofsd",
        "/usr/lib/qemu/virtiofsd",
        "/usr/bin/virtiofsd",
    ]
    .iter()
    .map(PathBuf::from)
    .find(|path| path.exists())
    .context("virtiofsd (the peer) is not installed")
}

fn peer_version() -> Result<String> {
    let output = Command::new(virtiofsd()?).arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().last().unwrap_or("unknown");
    Ok(format!("{} and {version}", qemu_version()?))
}

fn qemu(inputs: &Inputs, initramfs: &Path, share: &Path) -> Result<Times> {
    let socket = inputs.scratch.join("virtiofsd.sock");
    let _ = fs::remove_file(&socket);
    let daemon = Command::new(virtiofsd()?)
        .arg("--socket-path")
        .arg(&socket)
        .arg("--shared-dir")
        .arg(share)
        .args(["--sandbox", "none", "--cache", "auto"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("virtiofsd")?;
    let _daemon = Guard(daemon);
    let start = Instant::now();
    while !socket.exists() {
        if start.elapsed() > PATIENCE {
            bail!("virtiofsd made no socket");
        }
        std::thread::yield_now();
    }
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "microvm,acpi=off,rtc=on",
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-smp",
            "1",
            "-m",
            "512",
        ])
        .args(["-object", "memory-backend-memfd,id=ram,size=512M,share=on"])
        .args(["-machine", "memory-backend=ram"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ])
        .args([
            "-serial",
            "stdio",
            "-append",
            "console=ttyS0 reboot=t panic=-1 quiet",
        ])
        .arg("-chardev")
        .arg(format!("socket,id=fs,path={}", socket.display()))
        .args(["-device", "vhost-user-fs-device,chardev=fs,tag=share"])
        .arg("-initrd")
        .arg(initramfs)
        .arg("-kernel")
        .arg(&inputs.kernel);
    finish(command)
}
