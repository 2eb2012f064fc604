//! `vmmctl run`: a program of an image in a VM of its own.

use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_vmm::kvm_check::Probe;
use bulkhead_vmm::{DiskConfig, DiskSource, NetConfig, VmConfig, VmError, kvm_check};
use clap::builder::NonEmptyStringValueParser;
use serde_json::json;

use super::Context;
use super::error::CliError;
use super::progress::Bar;
use super::signals::Signals;
use crate::engine::EngineError;
use crate::engine::console::ConsoleHub;
use crate::engine::microvm::MicroVm;
use crate::engine::microvm::files::{GuestFiles, find_app_kernel};
use crate::engine::microvm::share::{PodShare, check_volumes, enter_private_mounts};
use crate::engine::microvm::tap::Tap;
use crate::image::Store;
use crate::rundir::{RunDir, State};
use crate::spec::{self, Overrides, Spec};
use crate::units::{self, Volume};

mod session;

/// Run a program of an image in a VM of its own.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vmmctl run busybox.tar -- uname -a
  vmmctl run --cpus 2 --memory 512M -v ./data:/data:ro python3.tar -- python3 /data/job.py
  vmmctl run -it debian-rootfs/ bash
  vmmctl run --report result.json redis.tar

IMAGE is an OCI layout (directory or tar), a tar made by `docker save`, or a directory that holds
a root filesystem. Ctrl-C and Ctrl-\\ go to the program; a second Ctrl-C within two seconds ends
the VM at once.")]
pub struct Args {
    /// OCI layout, docker-archive tar or root filesystem directory.
    image: PathBuf,
    /// Command and arguments; the image's own if left out.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// What runs the program: a Linux guest, or the app kernel.
    #[arg(long, value_enum, default_value_t = Sandbox::Microvm)]
    sandbox: Sandbox,
    /// Number of virtual CPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: u8,
    /// Guest memory, for example 512M or 2G.
    #[arg(short, long, default_value = "256M", value_parser = units::memory_mib)]
    memory: u64,
    /// Directory or file for the program: HOST:GUEST[:ro].
    #[arg(short, long, value_name = "HOST:GUEST[:ro]", value_parser = units::volume)]
    volume: Vec<Volume>,
    /// Environment: KEY=VALUE, or KEY to pass on our own.
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// User, by name or number, and group: USER[:GROUP].
    #[arg(short, long)]
    user: Option<String>,
    /// Working directory.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Network: none, tap (made for this VM) or tap:NAME (an existing one).
    #[arg(long, default_value = "none", value_parser = parse_net)]
    net: Net,
    /// Let the host's kernel move packets between tap and guest (vhost-net), where it can.
    #[arg(long)]
    vhost: bool,
    /// The root filesystem cannot be written.
    #[arg(long)]
    read_only: bool,
    /// Pass standard input on.
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Accepted for docker's sake: nothing of a VM is ever kept.
    #[arg(long)]
    rm: bool,
    /// Name of the VM.
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    name: Option<String>,
    /// Host name in the guest [default: the VM's id].
    #[arg(long)]
    hostname: Option<String>,
    /// Replaces the image's entrypoint; "" removes it.
    #[arg(long)]
    entrypoint: Option<String>,
    /// Guest kernel (vmlinux or bzImage).
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM file system with the modules of a distribution's kernel (made by
    /// `rootfs/initramfs`).
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Guest image (erofs with the agent).
    #[arg(long = "image", value_name = "FILE")]
    guest_image: Option<PathBuf>,
    /// Appended to the guest kernel's command line.
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// With --sandbox app: print the program's system calls on standard error, as strace does.
    #[arg(long)]
    strace: bool,
    /// Back guest memory with huge pages of the host.
    #[arg(long)]
    hugepages: bool,
    /// If the guest panics or triple-faults, write a core of it to FILE for gdb or crash.
    #[arg(long, value_name = "FILE")]
    crash_core: Option<PathBuf>,
    /// Print the boot's time line on standard error at the end.
    #[arg(long)]
    timing: bool,
    /// Write exit code and times to FILE as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Do not hold the VM's threads to the system calls they need, to look for a fault.
    #[arg(long)]
    no_seccomp: bool,
    /// Run even where KVM is emulated and a boot takes minutes.
    #[arg(long, hide = true)]
    allow_emulated_kvm: bool,
}

/// Which kind of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Sandbox {
    /// Linux and the agent.
    Microvm,
    /// Our own kernel, which is the agent too.
    App,
}

impl Sandbox {
    /// Its name, as `ps` shows it.
    const fn kind(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::App => "appkernel",
        }
    }
}

/// Which network the VM gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Net {
    /// Only the loopback.
    None,
    /// A tap.
    Tap(Option<String>),
}

fn parse_net(text: &str) -> Result<Net, String> {
    match text.split_once(':') {
        None if text == "none" => Ok(Net::None),
        None if text == "tap" => Ok(Net::Tap(None)),
        Some(("tap", name)) if !name.is_empty() => Ok(Net::Tap(Some(name.to_owned()))),
        _ => Err(format!(
            "unknown network {text:?}: give none, tap or tap:NAME"
        )),
    }
}

/// What is in place before the guest runs. Fields are dropped in order: the VM before what it uses.
struct Prepared {
    vm: Arc<MicroVm>,
    share: PodShare,
    tap: Option<(std::net::Ipv4Addr, std::net::Ipv4Addr)>,
    spec: Spec,
    /// When the VM began to be built: an import is not part of the boot.
    vm_begin: Instant,
    dir: RunDir,
}

/// How it went.
#[derive(Debug, Default)]
struct Outcome {
    exit_code: u32,
    boot: Duration,
}

/// Runs the command.
#[inline(never)]
pub fn run(args: Args, context: &Context) -> Result<u8, CliError> {
    let begin = Instant::now();
    let signals = Signals::install().map_err(|e| CliError::io("signals", e))?;
    if args.tty && args.interactive && !std::io::stdin().is_terminal() {
        return Err(CliError::new(
            "no_terminal",
            "-t with -i needs a terminal on standard input; leave -t out",
        ));
    }
    // What can be wrong is found out before anything is unpacked or started.
    check_volumes(&args.volume)?;
    let files = guest_files(&args)?;
    let kvm = kvm_check(Probe::Quick);
    if !kvm.usable() && !args.allow_emulated_kvm {
        return Err(VmError::Kvm(kvm.detail).into());
    }
    let can_mount = enter_private_mounts();
    let mut prepared = prepare(&args, context, &signals, files, can_mount, &kvm)?;
    let vm = Arc::clone(&prepared.vm);
    let result = session::drive(&args, &signals, &mut prepared);
    vm.vm().stop();
    let timeline = vm.vm().stats().timeline;
    let image = prepared.dir.state().image.clone();
    let command = prepared.spec.command();
    let id = prepared.dir.id().to_owned();
    drop(vm);
    drop(prepared);
    let total = begin.elapsed();
    let (code, outcome) = match &result {
        Ok(outcome) => (
            u8::try_from(outcome.exit_code & 0xff).unwrap_or(super::error::FAILED),
            outcome,
        ),
        Err(e) => (e.code, &Outcome::default()),
    };
    let ms = |d: Duration| (d.as_secs_f64() * 1e4).round() / 10.0;
    let mut report = json!({
        "id": id, "sandbox": args.sandbox.kind(), "image": image, "command": command, "exit_code": code,
        "boot_ms": ms(outcome.boot), "total_ms": ms(total), "timeline": timeline,
    });
    if let Err(e) = &result {
        report["error"] = json!({"kind": e.kind, "message": e.to_string()});
    }
    if let Some(path) = &args.report {
        let text = format!("{report:#}\n");
        std::fs::write(path, text)
            .map_err(|e| CliError::io(format!("report {}", path.display()), e))?;
    }
    if args.timing {
        eprint!("{}", super::inspect::bars(&report["timeline"]));
    }
    result?;
    if context.json {
        eprintln!("{report}");
    }
    Ok(code)
}

/// What the guest boots from: its kernel, and the image with the agent if it needs one.
type Boot = (PathBuf, Option<PathBuf>);

/// Finds what the guest boots from; what the app kernel has not is refused.
fn guest_files(args: &Args) -> Result<Boot, CliError> {
    if args.sandbox == Sandbox::Microvm {
        if args.strace {
            let text = "--strace: the app kernel prints its programs' system calls, Linux does not; \
                        give --sandbox app, or run strace in the container";
            return Err(CliError::new("not_supported", text));
        }
        let files = GuestFiles::find(args.kernel.as_deref(), args.guest_image.as_deref())?;
        return Ok((files.kernel, Some(files.image)));
    }
    let refuse = |what: &str, instead: &str| {
        let text = format!("--sandbox app: {what}; {instead}");
        Err(CliError::new("not_supported", text))
    };
    if args.cpus > 1 {
        return refuse("the app kernel uses one CPU", "leave --cpus out");
    }
    if args.guest_image.is_some() {
        return refuse("the app kernel needs no guest image", "leave --image out");
    }
    Ok((find_app_kernel(args.kernel.as_deref())?, None))
}

fn prepare(
    args: &Args,
    context: &Context,
    signals: &Signals,
    (kernel, image_file): Boot,
    can_mount: bool,
    kvm: &bulkhead_vmm::KvmReport,
) -> Result<Prepared, CliError> {
    let store = Store::open(&context.store)?;
    let image = store.get(&args.image, &mut Bar::new(signals))?;
    if signals.interrupted() {
        return Err(CliError::interrupted());
    }
    let state = State {
        version: 0,
        id: String::new(),
        name: args.name.clone().unwrap_or_default(),
        kind: args.sandbox.kind().into(),
        mode: "run".into(),
        image: image.name.clone(),
        command: args.command.clone(),
        state: "creating".into(),
        pid: 0,
        pid_start: 0,
        created_ms: 0,
        cpus: args.cpus,
        memory_mib: args.memory,
        ..State::default()
    };
    let mut dir = RunDir::create(&context.run_root, state)?;
    let id = dir.id().to_owned();
    let scratch = store.root().join("containers").join(&id);
    dir.update(|s| s.scratch = vec![scratch.clone()])?;
    let mut share = PodShare::create(dir.path().join("share"), can_mount)?;
    share.add_root(
        &id,
        &image.rootfs,
        &[scratch, dir.path().join("writable")],
        args.read_only,
    )?;
    let binds = share.add_volumes(&args.volume)?;
    let wish = Overrides {
        command: args.command.clone(),
        entrypoint: args.entrypoint.clone(),
        env: super::exec::environment(&args.env),
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        hostname: args.hostname.clone().unwrap_or_else(|| id.clone()),
        read_only: args.read_only,
        terminal: args.tty,
        binds,
    };
    let spec = spec::build(&image.config, &wish)?;
    let (nets, tap) = network(&args.net, args.vhost, &id)?;
    let config = VmConfig {
        id: id.clone(),
        vcpus: args.cpus,
        memory_mib: args.memory,
        hugepages: args.hugepages,
        kernel,
        initramfs: args.initramfs.clone(),
        cmdline: format!(
            "{}{}{}",
            // Each byte on the console costs exits; without somebody who looks, none are written.
            if context.verbose > 1 { "" } else { "quiet " },
            match args.sandbox {
                Sandbox::Microvm =>
                    "root=/dev/vda rootfstype=erofs ro init=/sbin/agent dummy.numdummies=0 ",
                Sandbox::App if args.strace => "app.strace ",
                Sandbox::App => "",
            },
            args.cmdline
        ),
        disks: image_file
            .map(|image| DiskConfig {
                source: DiskSource::Path(image),
                read_only: true,
                serial: "bulkhead-root".into(),
            })
            .into_iter()
            .collect(),
        shares: share.devices(),
        nets,
        vsock_cid: Some(3),
        rng: true,
        crash_core: args.crash_core.clone(),
        seccomp: !args.no_seccomp,
        allow_emulated_kvm: args.allow_emulated_kvm || !kvm.usable(),
        ..VmConfig::default()
    };
    let shows_console = context.verbose > 1 || args.strace;
    let console = shows_console.then(stderr).transpose()?;
    let vm_begin = Instant::now();
    let vm = Arc::new(MicroVm::create(config, ConsoleHub::new(console))?);
    dir.update(|s| {
        s.command = spec.command();
        s.spec = Some(spec.json.clone());
        s.state = "booting".into();
    })?;
    Ok(Prepared {
        vm,
        share,
        tap,
        spec,
        vm_begin,
        dir,
    })
}

fn stderr() -> Result<OwnedFd, CliError> {
    std::io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| CliError::io("standard error", e))
}

type Addresses = Option<(std::net::Ipv4Addr, std::net::Ipv4Addr)>;

fn network(net: &Net, vhost: bool, id: &str) -> Result<(Vec<NetConfig>, Addresses), EngineError> {
    let Net::Tap(name) = net else {
        return Ok((Vec::new(), None));
    };
    // The id is random: so are network number and MAC address, and two VMs rarely collide.
    let number = u32::from_str_radix(id, 16).unwrap_or(1);
    let tap = Tap::open(name.as_deref(), u16::try_from(number & 0x3fff).unwrap_or(1))?;
    let bytes = number.to_be_bytes();
    let config = NetConfig {
        tap: tap.name.clone(),
        fd: Some(tap.fd),
        mac: Some([0x02, 0xb7, bytes[0], bytes[1], bytes[2], bytes[3]]),
        mtu: None,
        vhost,
        plain: false,
    };
    Ok((vec![config], tap.host.zip(tap.guest)))
}

/// Warnings of the guest, one line each.
fn warn(text: &str) {
    let clean: String = text.chars().filter(|c| !c.is_control()).take(300).collect();
    eprintln!("warning: guest: {clean}");
}
