//! Boot: time, exits, memory and threads, beside QEMU's `microvm` machine.
//!
//! Both run the same kernel and initramfs, one vCPU and 128 MiB, in the same minute on the same
//! KVM. Times are from the start of the process to the marker's arrival at its standard output;
//! exits are KVM's own counters in debugfs, read when the marker arrives.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_fixtures::tiny_guest;

use super::report::{Goal, Report};
use crate::process::{
    Guard, Memory, kvm_counter, kvm_directories, memory, threads, wait_for_marker,
};

const MEMORY_MIB: u64 = 128;
/// What a VM's guest memory is at least, for telling it from the rest of the process.
const GUEST_BYTES: u64 = MEMORY_MIB << 20;
/// Generous: emulated hosts under load.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest has to come to rest: boot leaves timers that run out one by one.
const SETTLE: Duration = Duration::from_secs(15);
/// How long an idle guest is watched.
const IDLE_WATCH: Duration = Duration::from_secs(10);

/// Where the parts are.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Our command.
    pub vmmctl: PathBuf,
    /// The kernel both boot.
    pub kernel: PathBuf,
    /// Scratch directory.
    pub scratch: PathBuf,
}

/// Files both sides boot.
struct Files {
    tiny: PathBuf,
    initramfs: PathBuf,
}

/// What one boot gave.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    millis: f64,
    exits: f64,
    io_exits: f64,
}

/// Makes the command that boots a kernel with or without an initramfs.
type MakeCommand<'a> = Box<dyn Fn(&Path, Option<&Path>) -> Command + 'a>;

/// A VMM under test.
struct Side<'a> {
    name: &'static str,
    command: MakeCommand<'a>,
}

impl Side<'_> {
    fn spawn(&self, kernel: &Path, initramfs: Option<&Path>) -> Result<(Child, Instant)> {
        let mut command = (self.command)(kernel, initramfs);
        let start = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("starting {}", self.name))?;
        Ok((child, start))
    }

    /// Boots to `marker`; hands the still running process to `then`.
    fn boot<R>(
        &self,
        kernel: &Path,
        initramfs: Option<&Path>,
        marker: &[u8],
        then: impl FnOnce(u32, &Sample) -> Result<R>,
    ) -> Result<(Sample, R)> {
        let (child, start) = self.spawn(kernel, initramfs)?;
        let mut child = Guard(child);
        let mut output = child.0.stdout.take().context("stdout")?;
        let (at, _) = wait_for_marker(&mut output, marker, PATIENCE)
            .with_context(|| self.name.to_string())?;
        let pid = child.0.id();
        let mut sample = Sample {
            millis: at.duration_since(start).as_secs_f64() * 1e3,
            ..Sample::default()
        };
        // Without an initramfs it is the tiny guest, which ends with its marker.
        if initramfs.is_some() {
            let vms = kvm_directories(pid)?;
            sample.exits = kvm_counter(&vms, "exits")? as f64;
            sample.io_exits =
                (kvm_counter(&vms, "io_exits")? + kvm_counter(&vms, "mmio_exits")?) as f64;
        }
        let result = then(pid, &sample)?;
        Ok((sample, result))
    }
}

/// What an idle VM costs.
#[derive(Clone, Copy, Debug, Default)]
struct Idle {
    memory: Memory,
    threads: usize,
    exits_per_second: f64,
}

fn watch_idle(pid: u32) -> Result<Idle> {
    let vms = kvm_directories(pid)?;
    thread::sleep(SETTLE);
    let before = (Instant::now(), kvm_counter(&vms, "exits")?);
    thread::sleep(IDLE_WATCH);
    let after = (Instant::now(), kvm_counter(&vms, "exits")?);
    Ok(Idle {
        memory: memory(pid, GUEST_BYTES)?,
        threads: threads(pid)?,
        exits_per_second: (after.1 - before.1) as f64
            / after.0.duration_since(before.0).as_secs_f64(),
    })
}

/// Version of QEMU, or why it cannot be the peer.
pub(super) fn qemu_version() -> Result<String> {
    let output = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .context("qemu-system-x86_64 (the peer) is not installed")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .split_whitespace()
        .nth(3)
        .unwrap_or("unknown")
        .to_owned())
}

/// Runs the benchmark. With `linux_samples` of 1, one boot of Linux each: the caller gives each
/// sample a fresh host and merges the results.
///
/// # Errors
/// When a VM does not reach its marker, or the peer is missing.
pub fn run(
    inputs: &Inputs,
    samples: usize,
    linux_samples: usize,
    with_many: bool,
) -> Result<Report> {
    let files = Files {
        tiny: inputs.scratch.join("tiny.elf"),
        initramfs: inputs.scratch.join("bench.cpio"),
    };
    fs::create_dir_all(&inputs.scratch)?;
    fs::write(&files.tiny, tiny_guest::elf(tiny_guest::Kind::Marker))?;
    fs::write(&files.initramfs, bulkhead_fixtures::bench_initramfs())?;

    let mem = MEMORY_MIB.to_string();
    let ours = Side {
        name: "vmmctl",
        command: Box::new(|kernel, initramfs| {
            let mut command = Command::new(&inputs.vmmctl);
            command.args(["boot", "--memory"]).arg(format!("{mem}M"));
            command.args(["--cmdline", "quiet"]);
            if let Some(initramfs) = initramfs {
                command.arg("--initramfs").arg(initramfs);
            }
            command.arg(kernel);
            command
        }),
    };
    let qemu = Side {
        name: "qemu",
        command: Box::new(|kernel, initramfs| {
            let mut command = Command::new("qemu-system-x86_64");
            command
                .args([
                    "-M", "microvm", "-accel", "kvm", "-cpu", "host", "-smp", "1",
                ])
                .args(["-m", &mem, "-nodefaults", "-no-user-config", "-no-reboot"])
                .args(["-display", "none", "-serial", "stdio"])
                .args(["-append", "console=ttyS0 reboot=t panic=-1 quiet"])
                .arg("-kernel")
                .arg(kernel);
            if let Some(initramfs) = initramfs {
                command.arg("-initrd").arg(initramfs);
            }
            command
        }),
    };
    let mut report = Report::new("boot", "QEMU -M microvm", &qemu_version()?);
    let ours_command = "vmmctl boot --memory 128M --cmdline quiet [--initramfs FILE] KERNEL";

    // Floor: in turn, so that a drifting host hurts both alike. The first of each warms caches.
    let mut floor = (Vec::new(), Vec::new());
    for round in 0..=samples {
        let (a, ()) = ours.boot(&files.tiny, None, tiny_guest::MARKER.as_bytes(), |_, _| {
            Ok(())
        })?;
        let (b, ()) = qemu.boot(&files.tiny, None, tiny_guest::MARKER.as_bytes(), |_, _| {
            Ok(())
        })?;
        if round > 0 {
            floor.0.push(a.millis);
            floor.1.push(b.millis);
        }
    }
    report.add(
        "floor: process start to marker of a PVH guest",
        "ms",
        &floor.0,
        &floor.1,
        Goal::Ratio(0.15),
        ours_command,
    );

    let marker = bulkhead_fixtures::BENCH_MARKER.as_bytes();
    let initramfs = Some(files.initramfs.as_path());
    let mut times = (Vec::new(), Vec::new());
    let mut exits = (Vec::new(), Vec::new());
    let mut io = (Vec::new(), Vec::new());
    let mut idle = (Idle::default(), Idle::default());
    for round in 0..linux_samples {
        // Alternate who goes first.
        let last = round + 1 == linux_samples;
        let look = |pid: u32, _: &Sample| {
            if last {
                watch_idle(pid)
            } else {
                Ok(Idle::default())
            }
        };
        let (a, a_idle, b, b_idle);
        if round % 2 == 0 {
            (a, a_idle) = ours.boot(&inputs.kernel, initramfs, marker, look)?;
            (b, b_idle) = qemu.boot(&inputs.kernel, initramfs, marker, look)?;
        } else {
            (b, b_idle) = qemu.boot(&inputs.kernel, initramfs, marker, look)?;
            (a, a_idle) = ours.boot(&inputs.kernel, initramfs, marker, look)?;
        }
        times.0.push(a.millis / 1e3);
        times.1.push(b.millis / 1e3);
        exits.0.push(a.exits);
        exits.1.push(b.exits);
        io.0.push(a.io_exits);
        io.1.push(b.io_exits);
        if last {
            idle = (a_idle, b_idle);
        }
    }
    let (o, q) = idle;
    report.add(
        "Linux: process start to user space",
        "s",
        &times.0,
        &times.1,
        Goal::Ratio(0.70),
        ours_command,
    );
    report.add(
        "KVM exits to the marker",
        "exits",
        &exits.0,
        &exits.1,
        Goal::Ratio(0.60),
        ours_command,
    );
    report.add(
        "port and MMIO exits to the marker",
        "exits",
        &io.0,
        &io.1,
        Goal::Ratio(0.15),
        ours_command,
    );
    report.add(
        "PSS beyond guest RAM, idle",
        "kB",
        &[o.memory.pss as f64],
        &[q.memory.pss as f64],
        Goal::Value(3072.0),
        ours_command,
    );
    report.add(
        "anonymous part of it",
        "kB",
        &[o.memory.anonymous as f64],
        &[q.memory.anonymous as f64],
        Goal::Value(307.2),
        ours_command,
    );
    report.add(
        "threads of a one-vCPU VM",
        "threads",
        &[o.threads as f64],
        &[q.threads as f64],
        Goal::Value(3.0),
        ours_command,
    );
    report.add(
        "exits of an idle VM",
        "1/s",
        &[o.exits_per_second],
        &[q.exits_per_second],
        Goal::Value(10.0),
        ours_command,
    );

    if with_many {
        ten_vms(inputs, &files, &mut report)?;
    }
    Ok(report)
}

/// Ten VMs in one process: one that has nothing else in it, not even the code of other benchmarks.
fn ten_vms(inputs: &Inputs, files: &Files, report: &mut Report) -> Result<()> {
    let program = crate::env::built("many-vms")?;
    let measure = |count: usize| -> Result<(Memory, usize, f64)> {
        let kernel_before = kernel_memory_kib();
        let mut child = Guard(
            Command::new(&program)
                .arg(count.to_string())
                .arg(&inputs.kernel)
                .arg(&files.initramfs)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?,
        );
        let mut output = child.0.stdout.take().context("stdout")?;
        wait_for_marker(&mut output, b"ALL-UP", PATIENCE * 4)?;
        let pid = child.0.id();
        Ok((
            memory(pid, GUEST_BYTES)?,
            threads(pid)?,
            kernel_memory_kib() - kernel_before,
        ))
    };
    let (one, _, kernel_one) = measure(1)?;
    let (ten, ten_threads, kernel_ten) = measure(10)?;
    let command = "many-vms 10 KERNEL INITRAMFS";
    report.add(
        "ten VMs in one process: PSS beyond guests",
        "MiB",
        &[ten.pss as f64 / 1024.0],
        &[],
        Goal::Value(5.0),
        command,
    );
    report.add(
        "each further VM: PSS beyond its guest",
        "MiB",
        &[(ten.pss.saturating_sub(one.pss)) as f64 / 9.0 / 1024.0],
        &[],
        Goal::Value(0.3),
        command,
    );
    report.add(
        "threads of ten one-vCPU VMs",
        "threads",
        &[ten_threads as f64],
        &[],
        Goal::Value(30.0),
        command,
    );
    report.add(
        "kernel memory of each further VM (slab, page tables)",
        "MiB",
        &[(kernel_ten - kernel_one) / 9.0 / 1024.0],
        &[],
        Goal::Shown,
        command,
    );
    Ok(())
}

/// Kernel memory of the whole host in KiB: slab, kernel stacks, page tables and KVM's own.
fn kernel_memory_kib() -> f64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| {
            matches!(
                *name,
                "Slab" | "KernelStack" | "PageTables" | "SecPageTables"
            )
        })
        .filter_map(|(_, value)| value.split_whitespace().next()?.parse::<f64>().ok())
        .sum()
}

/// The child of [`ten_vms`]: boots `count` VMs, says so, and waits for its input to end.
///
/// # Errors
/// When a VM does not reach user space.
pub fn many(count: usize, kernel: &Path, initramfs: &Path) -> Result<()> {
    use bulkhead_vmm::{Vm, VmConfig};
    let mut vms = Vec::with_capacity(count);
    for index in 0..count {
        let vm = Vm::create(VmConfig {
            id: format!("many{index}"),
            memory_mib: MEMORY_MIB,
            kernel: kernel.into(),
            initramfs: Some(initramfs.into()),
            cmdline: "quiet".into(),
            ..VmConfig::default()
        })?;
        vm.start()?;
        vms.push(vm);
    }
    let deadline = Instant::now() + PATIENCE * 3;
    for vm in &vms {
        loop {
            let console = vm.console_tail();
            if console
                .windows(bulkhead_fixtures::BENCH_MARKER.len())
                .any(|w| w == bulkhead_fixtures::BENCH_MARKER.as_bytes())
            {
                break;
            }
            if let Some(exit) = vm.wait_timeout(Duration::from_millis(20)) {
                bail!("{}: {exit}", vm.id());
            }
            if Instant::now() > deadline {
                bail!("{}: not up in time", vm.id());
            }
        }
    }
    println!("ALL-UP");
    let mut nothing = String::new();
    std::io::stdin().read_line(&mut nothing)?;
    Ok(())
}
