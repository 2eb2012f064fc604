//! `vmmctl boot`: a bare kernel, its console on this terminal.
//!
//! The main thread waits in one `poll` for everything; there is no runtime, and once the guest
//! runs this process neither allocates nor wakes up by itself.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_vmm::{DiskConfig, DiskSource, NetConfig, ShareConfig, VmConfig, VmExit};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use super::Context;
use super::error::CliError;
use super::signals::Signals;
use super::terminal::RawMode;
use crate::debug;
use crate::engine::EngineError;
use crate::engine::console::ConsoleHub;
use crate::engine::microvm::MicroVm;
use crate::engine::microvm::files::find_kernel;
use crate::engine::microvm::tap::Tap;
use crate::rundir::{RunDir, State};
use crate::units;

/// Ctrl-], as in telnet.
const ESCAPE: u8 = 0x1d;
/// Exit codes by what went wrong (BSD's sysexits where one fits).
mod code {
    pub const CONFIG: u8 = 64;
    pub const FILE: u8 = 66;
    pub const KVM: u8 = 69;
    pub const GUEST_PANIC: u8 = 70;
    pub const HOST: u8 = 71;
    pub const TRIPLE_FAULT: u8 = 76;
    pub const GUEST: u8 = 77;
    /// As timeout(1) has it.
    pub const TIMEOUT: u8 = 124;
}

/// Boot a kernel with its console on this terminal.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vmmctl boot vmlinux --initramfs initramfs.cpio --cmdline 'quiet'
  vmmctl boot --disk root.img --disk data.img:ro --cmdline 'root=/dev/vda rw'
  vmmctl boot vmlinux --gdb 127.0.0.1:1234     (gdb: target remote 127.0.0.1:1234)

Ctrl-] ends the VM. Exit codes: 0 the guest shut down or was stopped, 64 impossible configuration,
66 a file is missing or wrong, 69 no usable KVM, 70 the guest's kernel panicked, 71 the host lacks
something, 76 triple fault, 77 other faults of the guest, 124 still running at --timeout, 125 other failures of ours.")]
pub struct Args {
    /// vmlinux (ELF) or bzImage; the installed guest kernel if left out.
    kernel: Option<PathBuf>,
    /// Initial RAM file system.
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Raw disk image or block device: PATH[:ro]; the first is /dev/vda.
    #[arg(long, value_name = "PATH[:ro]")]
    disk: Vec<String>,
    /// Directory shared by virtio-fs: TAG=DIR[:ro].
    #[arg(long, value_name = "TAG=DIR[:ro]", value_parser = parse_share)]
    share: Vec<ShareConfig>,
    /// Tap device for a network card: NAME, or "new" for one of its own.
    #[arg(long, value_name = "NAME")]
    tap: Vec<String>,
    /// Let the host's kernel move packets between taps and guest (vhost-net), where it can.
    #[arg(long)]
    vhost: bool,
    /// Appended to the default kernel command line.
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// Leave the default kernel command line out.
    #[arg(long)]
    bare_cmdline: bool,
    /// Number of virtual CPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: u8,
    /// Guest memory, for example 512M or 2G.
    #[arg(short, long, default_value = "256M", value_parser = units::memory_mib)]
    memory: u64,
    /// If the guest panics or triple-faults, write a core of it to FILE for gdb or crash.
    #[arg(long, value_name = "FILE")]
    crash_core: Option<PathBuf>,
    /// Wait for gdb on this address (HOST:PORT or a socket path) before the first instruction.
    #[arg(long, value_name = "ADDR")]
    gdb: Option<String>,
    /// Add a vsock device with this guest CID.
    #[arg(long, value_name = "CID")]
    vsock_cid: Option<u32>,
    /// Add an entropy device.
    #[arg(long)]
    rng: bool,
    /// Add a memory balloon with free page reporting.
    #[arg(long)]
    balloon: bool,
    /// Back guest memory with huge pages of the host.
    #[arg(long)]
    hugepages: bool,
    /// Do not show the console (see it with vmmctl console).
    #[arg(short, long)]
    quiet: bool,
    /// End the VM after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Name of the VM.
    #[arg(long)]
    name: Option<String>,
    /// Write how it ended, times and counters to FILE as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Count the guest's instructions before its first program (slow); they are in the report.
    #[arg(long, requires = "report")]
    count_instructions: bool,
    /// Do not hold the VM's threads to the system calls they need, to look for a fault.
    #[arg(long)]
    no_seccomp: bool,
    /// Run even where KVM is emulated and a boot takes minutes.
    #[arg(long, hide = true)]
    allow_emulated_kvm: bool,
}

fn read_only_suffix(text: &str) -> (&str, bool) {
    match text.strip_suffix(":ro") {
        Some(path) => (path, true),
        None => (text.strip_suffix(":rw").unwrap_or(text), false),
    }
}

fn parse_share(text: &str) -> Result<ShareConfig, String> {
    let (tag, dir) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?}: give TAG=DIR or TAG=DIR:ro"))?;
    let (dir, read_only) = read_only_suffix(dir);
    if tag.is_empty() || dir.is_empty() {
        return Err(format!("{text:?}: give TAG=DIR or TAG=DIR:ro"));
    }
    Ok(ShareConfig {
        tag: tag.to_owned(),
        root: dir.into(),
        read_only,
        caching: bulkhead_vmm::Caching::Auto,
        upper_layers: false,
        fixed_top: false,
    })
}

fn check_share(share: &ShareConfig) -> Result<(), CliError> {
    let dir = &share.root;
    if dir.is_dir() {
        return Ok(());
    }
    let reason = if dir.exists() {
        "is not a directory".to_owned()
    } else {
        format!("no such directory{}", crate::hint::sibling(dir))
    };
    let text = format!("share {}: {}: {reason}", share.tag, dir.display());
    Err(CliError::new("vm_file", text))
}

/// Runs the command.
#[inline(never)]
pub fn run(args: Args, context: &Context) -> Result<u8, CliError> {
    let begin = Instant::now();
    let signals = Signals::install().map_err(|e| CliError::io("signals", e))?;
    let report = args.report.clone();
    let ended = start_and_watch(args, context, &signals);
    let (vm, exit) = match ended {
        Ok(ended) => ended,
        Err(mut e) => {
            e.code = match e.kind.as_str() {
                "vm_config" => code::CONFIG,
                "vm_file" | "guest_files" => code::FILE,
                "kvm" => code::KVM,
                "host" => code::HOST,
                "guest" => code::GUEST,
                _ => e.code,
            };
            if let Some(path) = report {
                write_report(
                    &path,
                    &json!({"exit_code": e.code, "error": {"kind": e.kind, "message": e.to_string()}}),
                )?;
            }
            return Err(e);
        }
    };
    let total_ms = begin.elapsed().as_secs_f64() * 1e3;
    let code = match exit {
        VmExit::Reset | VmExit::Stopped => 0,
        VmExit::GuestPanic { .. } => code::GUEST_PANIC,
        VmExit::TripleFault { .. } => code::TRIPLE_FAULT,
        VmExit::Error(_) => code::GUEST,
    };
    if let Some(path) = report {
        let report = json!({"exit_code": code, "end": exit.to_string(), "total_ms": total_ms, "stats": vm.vm().stats()});
        write_report(&path, &report)?;
    }
    if code != 0 {
        return Err(CliError::from(vm.ended("running")).code(code));
    }
    Ok(0)
}

fn write_report(path: &std::path::Path, report: &serde_json::Value) -> Result<(), CliError> {
    std::fs::write(path, format!("{report:#}\n"))
        .map_err(|e| CliError::io(format!("report {}", path.display()), e))
}

fn start_and_watch(
    args: Args,
    context: &Context,
    signals: &Signals,
) -> Result<(Arc<MicroVm>, VmExit), CliError> {
    let kernel = find_kernel(args.kernel.as_deref())?;
    for share in &args.share {
        check_share(share)?;
    }
    let state = State {
        version: 0,
        id: String::new(),
        name: args.name.unwrap_or_default(),
        kind: "microvm".into(),
        mode: "boot".into(),
        image: crate::image::display_name(&kernel),
        command: Vec::new(),
        state: "running".into(),
        pid: 0,
        pid_start: 0,
        created_ms: 0,
        cpus: args.cpus,
        memory_mib: args.memory,
        ..State::default()
    };
    let dir = RunDir::create(&context.run_root, state)?;
    let config = VmConfig {
        id: dir.id().to_owned(),
        vcpus: args.cpus,
        memory_mib: args.memory,
        hugepages: args.hugepages,
        kernel,
        initramfs: args.initramfs,
        cmdline: args.cmdline,
        bare_cmdline: args.bare_cmdline,
        disks: args.disk.iter().map(|d| disk(d)).collect(),
        shares: args.share,
        nets: args
            .tap
            .iter()
            .enumerate()
            .map(|(i, name)| tap(dir.id(), i, name, args.vhost))
            .collect::<Result<_, _>>()?,
        vsock_cid: args.vsock_cid,
        rng: args.rng,
        balloon: args.balloon,
        gdb: args.gdb.clone(),
        crash_core: args.crash_core,
        seccomp: !args.no_seccomp,
        allow_emulated_kvm: args.allow_emulated_kvm,
        count_instructions: args.count_instructions,
        ..VmConfig::default()
    };
    let console = if args.quiet {
        None
    } else {
        Some(
            io::stdout()
                .as_fd()
                .try_clone_to_owned()
                .map_err(|e| CliError::io("standard output", e))?,
        )
    };
    let vm = Arc::new(MicroVm::create(config, ConsoleHub::new(console))?);
    let socket = dir.path().join("debug.sock");
    let listener = debug::bind(&socket)
        .map_err(|e| CliError::io(format!("debug socket {}", socket.display()), e))?;
    let raw = if args.quiet {
        None
    } else {
        RawMode::enter().map_err(|e| CliError::io("terminal", e))?
    };
    if args.gdb.is_some() {
        // The debugger drives the VM from a thread of its own.
        let debugged = Arc::clone(&vm);
        crate::engine::agent::spawn_brief("gdb", move || {
            // The VM's end, or its error, is seen by the main thread.
            let _ = debugged.vm().debug();
        })?;
    } else {
        vm.vm().start()?;
    }
    trim();
    let deadline = args
        .timeout
        .map(|s| Instant::now() + Duration::from_secs(s.into()));
    let exit = watch(&vm, signals, &listener, raw.is_some(), args.quiet, deadline)?;
    drop(raw);
    // Taps and shares are the VM's own; the directory goes last.
    drop(dir);
    Ok((vm, exit))
}

/// Gives memory that only start-up needed back to the host: freed heap, the stack that was deeper
/// then, and the pages of program code (command line parser, kernel loader) that a running VM does
/// not execute.
#[inline(never)]
fn trim() {
    // Something on the stack that callees' frames lie below of.
    let here = 0u8;
    let here = std::ptr::from_ref(std::hint::black_box(&here)).addr();
    // SAFETY: glibc's own allocator, which is ours; no argument that could be wrong.
    unsafe { libc::malloc_trim(0) };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(rights), Some(path)) = (fields.next(), fields.next(), fields.nth(3))
        else {
            continue;
        };
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let address = |hex| usize::from_str_radix(hex, 16);
        let (Ok(start), Ok(end)) = (address(start), address(end)) else {
            continue;
        };
        let discard = |end: usize| {
            // SAFETY: see the two callers: nobody reads what is in the range now.
            unsafe {
                libc::madvise(
                    std::ptr::without_provenance_mut(start),
                    end.saturating_sub(start),
                    libc::MADV_DONTNEED,
                )
            };
        };
        if rights == "r-xp" && path.starts_with('/') {
            // A private mapping of a file that is not writable and holds code only, so that no page
            // of it was ever changed: the next use reads the same bytes again.
            discard(end);
        } else if path == "[stack]" && (start..end).contains(&here) {
            // Of this thread's stack what is more than a page below this frame: dead, as the calls
            // above have returned and madvise has less than a page of frames (and no handler of a
            // signal keeps anything there when it has returned).
            discard((here & !0xfff).saturating_sub(2 * 4096));
        }
    }
}

fn disk(text: &str) -> DiskConfig {
    let (path, read_only) = read_only_suffix(text);
    DiskConfig {
        source: DiskSource::Path(path.into()),
        read_only,
        serial: String::new(),
    }
}

fn tap(id: &str, index: usize, name: &str, vhost: bool) -> Result<NetConfig, EngineError> {
    let number = u32::from_str_radix(id, 16)
        .unwrap_or(1)
        .wrapping_add(u32::try_from(index).unwrap_or(0));
    let tap = Tap::open(
        (name != "new").then_some(name),
        u16::try_from(number & 0x3fff).unwrap_or(1),
    )?;
    let bytes = number.to_be_bytes();
    Ok(NetConfig {
        tap: tap.name,
        fd: Some(tap.fd),
        mac: Some([0x02, 0xb7, bytes[0], bytes[1], bytes[2], bytes[3]]),
        mtu: None,
        vhost,
        plain: false,
    })
}

/// Waits for the VM's end, serving terminal, signals and debug socket meanwhile.
fn watch(
    vm: &Arc<MicroVm>,
    signals: &Signals,
    listener: &std::os::unix::net::UnixListener,
    raw: bool,
    quiet: bool,
    deadline: Option<Instant>,
) -> Result<VmExit, CliError> {
    let stdin = io::stdin();
    let mut typing = !quiet;
    loop {
        let end = vm.vm().exit_event();
        // SAFETY: the VM owns the descriptor and outlives the borrow.
        let end =
            unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(end)) };
        let mut fds = [
            PollFd::new(end, PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(vm.stop_event(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(
                stdin.as_fd(),
                if typing {
                    PollFlags::POLLIN
                } else {
                    PollFlags::empty()
                },
            ),
        ];
        // Without stdin's slot if it is at its end: a closed pipe would be reported for ever.
        let used = if typing { fds.len() } else { fds.len() - 1 };
        let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
            Some(left) if left.is_zero() => {
                vm.vm().stop();
                let text = "guest: still runs at the end of --timeout";
                return Err(CliError::new("timeout", text).code(code::TIMEOUT));
            }
            Some(left) => {
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        match poll(fds.get_mut(..used).unwrap_or_default(), timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(CliError::io("poll", e.into())),
        }
        let ready = fds.map(|fd| fd.any().unwrap_or(false));
        let ready = |i: usize| ready.get(i).copied().unwrap_or(false);
        if ready(0) {
            return Ok(vm.vm().wait());
        }
        if ready(1) && signals.take().iter().any(|s| *s != libc::SIGWINCH) {
            vm.vm().stop();
            return Err(CliError::interrupted());
        }
        if ready(2) && vm.take_stop().is_some() {
            vm.vm().stop();
            return Ok(VmExit::Stopped);
        }
        if ready(3)
            && let Ok((stream, _)) = listener.accept()
        {
            debug::serve_connection(stream, vm.clone());
        }
        if typing && ready(4) {
            let mut buffer = [0u8; 256];
            let n = nix::unistd::read(&stdin, &mut buffer).unwrap_or(0);
            let keys = buffer.get(..n).unwrap_or_default();
            if raw && keys.contains(&ESCAPE) {
                vm.vm().stop();
                return Ok(VmExit::Stopped);
            }
            typing = n > 0;
            vm.vm().console_input(keys);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_disks_parse() {
        let share = parse_share("data=/srv:ro").expect("share");
        assert_eq!((share.tag.as_str(), share.read_only), ("data", true));
        assert!(parse_share("data").is_err() && parse_share("=/x").is_err());
        assert!(disk("a.img:ro").read_only && !disk("a.img").read_only);
    }
}
