//! `vmmctl wasm`: WebAssembly programs, without a virtual machine and without containerd.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_wasm::{
    CacheConfig, CompilerConfig, Container, ContainerConfig, Engine, EngineConfig, Exit,
    HttpConfig, Mount, Network, Pod, PodConfig, Program, Reason, Resolver, Source, Stdio,
    WasmError,
};
use serde_json::json;

use super::Context;
use super::error::{self, CliError};
use super::progress::Bar;
use super::signals::Signals;
use crate::engine::microvm::share::{check_volumes, enter_private_mounts};
use crate::image::{ContainerRoot, ImageConfig, Store, WasmImage, open_in_image};
use crate::units::{self, Volume};

/// Exit code of a program that was ended by `--timeout`, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// Compiled programs kept on disk.
const CACHE_BYTES: u64 = 2 << 30;

/// WebAssembly programs.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Run(Box<RunArgs>),
}

/// Run a WebAssembly program.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vmmctl wasm run hello.wasm
  vmmctl wasm run -v ./data:/data:ro python.wasm -- /data/job.py
  vmmctl wasm run -v .:/ tool.wasm -- in.txt out.txt
  vmmctl wasm run --http 127.0.0.1:8080 server.wasm
  vmmctl wasm run 'library.wasm#answer'

FILE is a WebAssembly module or component; IMAGE an OCI layout (directory or tar), a tar made by
`docker save` or a root filesystem directory: an artifact whose layer is the module, or an image
with a .wasm entrypoint. #NAME calls the function NAME instead of the program's main function.
The program sees the volumes (and its image) and nothing else of the host.")]
struct RunArgs {
    /// Module, component or image, with `#NAME` for one of its functions.
    #[arg(value_name = "FILE|IMAGE")]
    image: PathBuf,
    /// Arguments; of an image that is a root filesystem: command and arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// Limit of the program's memory, for example 512M or 2G.
    #[arg(short, long, default_value = "1G", value_parser = units::memory_mib)]
    memory: u64,
    /// Share of the processor, for example 0.5.
    #[arg(long, value_parser = parse_cpus)]
    cpus: Option<u32>,
    /// Directory for the program: HOST:GUEST[:ro]. Without an image of files, GUEST may be /.
    #[arg(short, long, value_name = "HOST:GUEST[:ro]", value_parser = parse_volume)]
    volume: Vec<Volume>,
    /// Environment: KEY=VALUE, or KEY to pass on our own.
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Working directory (components; modules of WASI preview 1 always start in /).
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Network: none or host.
    #[arg(long, default_value = "none", value_parser = ["none", "host"])]
    net: String,
    /// Serve a program that answers HTTP requests at this address.
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Option<SocketAddr>,
    /// End the program after this many seconds, with exit code 124.
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    timeout: Option<Duration>,
    /// End the program when it has executed about COUNT instructions, with exit code 137. Counting
    /// makes it slower.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    fuel: Option<u64>,
    /// The image's root filesystem cannot be written.
    #[arg(long)]
    read_only: bool,
    /// Pass standard input on.
    #[arg(short, long)]
    interactive: bool,
    /// Accepted for docker's sake: nothing of a program is ever kept.
    #[arg(long)]
    rm: bool,
    /// Replaces the image's entrypoint.
    #[arg(long)]
    entrypoint: Option<String>,
    /// Compile anew and keep nothing.
    #[arg(long)]
    no_cache: bool,
    /// Most memory that compiling the program may take.
    #[arg(long, default_value = "4G", value_name = "SIZE", value_parser = units::memory_mib)]
    compile_memory: u64,
    /// If the program traps, write its memory and stack to FILE (WebAssembly core dump).
    #[arg(long, value_name = "FILE")]
    core_dump: Option<PathBuf>,
    /// Write exit code, times and use of memory to FILE as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

fn parse_cpus(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is no share of a processor: give for example 0.5 or 2");
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if part.len() > 3 || !part.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let whole: u32 = whole.parse().map_err(|_| wrong())?;
    let part: u32 = format!("{part:0<3}").parse().map_err(|_| wrong())?;
    match whole.checked_mul(1000).and_then(|w| w.checked_add(part)) {
        Some(milli) if milli > 0 => Ok(milli),
        _ => Err(wrong()),
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.strip_suffix('s')
        .unwrap_or(text)
        .parse::<f64>()
        .ok()
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
        .filter(|d| !d.is_zero())
        .ok_or_else(|| format!("{text:?} is no time: give seconds, for example 5 or 0.5"))
}

/// As other sandboxes have them; here `/`, where modules start, can be one too.
fn parse_volume(text: &str) -> Result<Volume, String> {
    let mut parts: Vec<&str> = text.split(':').collect();
    match parts.get_mut(1) {
        Some(guest) if *guest == "/" => {
            *guest = "/root";
            let volume = units::volume(&parts.join(":"))?;
            Ok(Volume {
                guest: "/".into(),
                ..volume
            })
        }
        _ => units::volume(text),
    }
}

impl From<WasmError> for CliError {
    fn from(error: WasmError) -> Self {
        let code = match &error {
            WasmError::Invalid { .. } | WasmError::Unsupported { .. } => error::NOT_EXECUTABLE,
            WasmError::NoFunction { .. } => error::NOT_FOUND,
            WasmError::Interrupted { signal, .. } => {
                u8::try_from(128 + signal).unwrap_or(error::INTERRUPTED)
            }
            _ => error::FAILED,
        };
        Self::new(error.kind(), error).code(code)
    }
}

/// Runs the command.
pub fn run(args: Args, context: &Context) -> Result<u8, CliError> {
    let Command::Run(args) = args.command;
    let begin = Instant::now();
    let signals = Signals::install().map_err(|e| CliError::io("signals", e))?;
    check_volumes(&args.volume)?;
    let (path, function) = split_function(&args.image);
    let store = Store::open(&context.store)?;
    let engine = Engine::new(&EngineConfig {
        cache: (!args.no_cache).then(|| CacheConfig {
            directory: store.root().join("wasm-code"),
            max_bytes: CACHE_BYTES,
        }),
        core_dumps: args.core_dump.is_some(),
        compiler: CompilerConfig {
            program: Some("/proc/self/exe".into()),
            // Who wants to see the stack wants to see all of it.
            inlining: context.verbose == 0 && args.core_dump.is_none(),
            memory_bytes: args.compile_memory.saturating_mul(1 << 20),
        },
        fuel: args.fuel.is_some(),
        ..EngineConfig::default()
    })?;
    let image = store.get_wasm(&path, &mut Bar::new(&signals))?;
    let mut prepared = prepare(&args, &store, &engine, image, function)?;
    // Not before it is known that there is something to run.
    let core = args
        .core_dump
        .as_deref()
        .map(CoreFile::create)
        .transpose()?;
    prepared.config.core_dump = core.as_ref().map(CoreFile::open).transpose()?;
    let pod = Pod::new(&engine, pod_config(&args)?);
    let command = prepared.config.args.clone();
    let container = pod.create(prepared.config)?;
    container.start()?;
    let boot = begin.elapsed();
    let exit = wait(&container, &signals)?;
    // The root is unmounted before anything is reported.
    drop(prepared.root.take());
    drop(core);
    report(&args, context, &command, &container, &exit, boot, begin)
}

/// The file of a core dump. It is removed if nothing was written.
struct CoreFile<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> CoreFile<'a> {
    fn create(path: &'a Path) -> Result<Self, CliError> {
        let file = File::create(path)
            .map_err(|e| CliError::io(format!("core dump {}", path.display()), e))?;
        Ok(Self { path, file })
    }

    fn open(&self) -> Result<File, CliError> {
        let again = self.file.try_clone();
        again.map_err(|e| CliError::io(format!("core dump {}", self.path.display()), e))
    }
}

impl Drop for CoreFile<'_> {
    fn drop(&mut self) {
        // A device stays.
        if self
            .file
            .metadata()
            .is_ok_and(|m| m.is_file() && m.len() == 0)
        {
            let _ = std::fs::remove_file(self.path);
        }
    }
}

/// `path#function`; a file whose name holds a `#` is found first.
fn split_function(image: &Path) -> (PathBuf, Option<String>) {
    if !image.exists()
        && let Some((path, function)) = image.to_str().and_then(|t| t.rsplit_once('#'))
        && !function.is_empty()
    {
        return (path.into(), Some(function.to_owned()));
    }
    (image.to_owned(), None)
}

struct Prepared {
    config: ContainerConfig,
    /// The image's files, as long as the program runs.
    root: Option<ContainerRoot>,
}

fn prepare(
    args: &RunArgs,
    store: &Store,
    engine: &Engine,
    image: WasmImage,
    function: Option<String>,
) -> Result<Prepared, CliError> {
    let mut mounts: Vec<Mount> = Vec::new();
    let mut root = None;
    let (program, image_config, command) = match image {
        WasmImage::File(path) => {
            let program = engine.load(Source::File(&path))?;
            let command = with_name(&program, &args.command);
            (program, ImageConfig::default(), (command, function))
        }
        WasmImage::Artifact { name, file, config } => {
            let file = File::open(&file)
                .map_err(|e| CliError::io(format!("module {}", file.display()), e))?;
            let program = engine.load(Source::Open {
                name: &name,
                file: &file,
            })?;
            let (command, named) = merge(args, &config);
            let command = if command.is_empty() {
                with_name(&program, &[])
            } else {
                command
            };
            (program, config, (command, function.or(named)))
        }
        WasmImage::Root(image) => {
            let (command, named) = merge(args, &image.config);
            let Some(path) = command.first() else {
                return Err(CliError::new(
                    "container_spec",
                    format!(
                        "image {}: names no program; give one after the image",
                        image.name
                    ),
                ));
            };
            if args.volume.iter().any(|v| v.guest == "/") {
                return Err(CliError::new(
                    "container_spec",
                    format!(
                        "image {}: has files of its own at /: mount the volume below it",
                        image.name
                    ),
                ));
            }
            let program = load_from_root(engine, &image.rootfs, &image.name, path)?;
            let made = mount_root(args, store, &image.rootfs)?;
            mounts.push(Mount {
                host: made.0,
                guest: "/".into(),
                read_only: args.read_only,
            });
            root = Some(made.1);
            (program, image.config, (command, function.or(named)))
        }
    };
    let (command, function) = command;
    mounts.extend(args.volume.iter().map(|v| Mount {
        host: v.host.clone(),
        guest: v.guest.clone(),
        read_only: v.read_only,
    }));
    let mut config = ContainerConfig::new("run", program);
    config.args = command;
    config.function = function;
    config.env = environment(args, &image_config);
    config.cwd = args.workdir.clone().or(image_config.working_dir);
    config.mounts = mounts;
    config.memory_bytes = args.memory.checked_mul(1 << 20);
    config.cpu_milli = args.cpus;
    config.deadline = args.timeout;
    config.fuel = args.fuel;
    // Listening for it is no reason to let it connect to everything.
    config.sockets = args.net == "host";
    if let Some(listen) = args.http {
        config.http = HttpConfig {
            listen,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            ..HttpConfig::default()
        };
        if !config.program.kind().serves_http() {
            return Err(CliError::new(
                "wasm_unsupported",
                format!(
                    "{}: does not answer HTTP requests (exports no wasi:http/incoming-handler); leave --http out",
                    config.program.name()
                ),
            )
            .code(error::NOT_EXECUTABLE));
        }
    } else if config.program.kind().serves_http() && config.function.is_none() {
        return Err(CliError::new(
            "wasm_unsupported",
            format!(
                "{}: answers HTTP requests; say where with --http 127.0.0.1:8080",
                config.program.name()
            ),
        ));
    }
    let stream = |fd: std::io::Result<OwnedFd>| {
        fd.map(Stdio::Fd)
            .map_err(|e| CliError::io("standard streams", e))
    };
    use std::os::fd::AsFd;
    if args.interactive {
        config.stdin = stream(std::io::stdin().as_fd().try_clone_to_owned())?;
    }
    config.stdout = stream(std::io::stdout().as_fd().try_clone_to_owned())?;
    config.stderr = stream(std::io::stderr().as_fd().try_clone_to_owned())?;
    Ok(Prepared { config, root })
}

/// A bare module's arguments are preceded by its name, unless the user gave one after `--`.
fn with_name(program: &Program, command: &[String]) -> Vec<String> {
    let mut all = vec![program.name().to_owned()];
    all.extend(command.iter().cloned());
    all
}

/// Command and function: the image's entrypoint may be `path#function`.
fn merge(args: &RunArgs, image: &ImageConfig) -> (Vec<String>, Option<String>) {
    let mut command = match &args.entrypoint {
        Some(entry) if entry.is_empty() => Vec::new(),
        Some(entry) => vec![entry.clone()],
        None => image.entrypoint.clone().unwrap_or_default(),
    };
    if !args.command.is_empty() {
        command.extend(args.command.iter().cloned());
    } else if args.entrypoint.is_none() {
        command.extend(image.cmd.clone().unwrap_or_default());
    }
    let mut function = None;
    if let Some(first) = command.first_mut()
        && let Some((path, name)) = first.clone().rsplit_once('#')
        && !name.is_empty()
    {
        // runwasi writes the default out.
        function = (name != "_start").then(|| name.to_owned());
        *first = path.to_owned();
    }
    (command, function)
}

fn load_from_root(
    engine: &Engine,
    rootfs: &Path,
    image: &str,
    path: &str,
) -> Result<Program, CliError> {
    let fail = |e: std::io::Error| {
        let code = match e.kind() {
            std::io::ErrorKind::NotFound => error::NOT_FOUND,
            _ => error::NOT_EXECUTABLE,
        };
        CliError::new("program", format!("{path}: {e} in image {image}")).code(code)
    };
    let file = File::from(open_in_image(rootfs, Path::new(path)).map_err(fail)?);
    let name = Path::new(path)
        .file_name()
        .map_or_else(|| path.into(), |n| n.to_string_lossy());
    Ok(engine.load(Source::Open {
        name: &name,
        file: &file,
    })?)
}

fn mount_root(
    args: &RunArgs,
    store: &Store,
    rootfs: &Path,
) -> Result<(PathBuf, ContainerRoot), CliError> {
    enter_private_mounts();
    let scratch = store
        .root()
        .join("containers")
        .join(format!("wasm-{}", std::process::id()));
    let mountpoint = scratch.join("root");
    let writable = [scratch.join("writable")];
    let mut root = ContainerRoot::create(rootfs, &mountpoint, &writable, args.read_only)?;
    root.forbid_devices(args.read_only)?;
    Ok((mountpoint, root))
}

fn environment(args: &RunArgs, image: &ImageConfig) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = Vec::new();
    let all = image.env.clone().unwrap_or_default();
    for entry in all.into_iter().chain(super::exec::environment(&args.env)) {
        let Some((key, value)) = entry.split_once('=') else {
            continue;
        };
        env.retain(|(k, _)| k != key);
        env.push((key.to_owned(), value.to_owned()));
    }
    env
}

fn pod_config(args: &RunArgs) -> Result<PodConfig, CliError> {
    let host = args.net == "host";
    let resolver = if host {
        Resolver::from_files(
            Some("/etc/resolv.conf".as_ref()),
            Some("/etc/hosts".as_ref()),
        )
        .map_err(|e| CliError::io("/etc/resolv.conf or /etc/hosts", e))?
    } else {
        Resolver::none()
    };
    Ok(PodConfig {
        id: "run".into(),
        network: if host || args.http.is_some() {
            Network::Host
        } else {
            Network::None
        },
        resolver,
        harden: true,
        ..PodConfig::default()
    })
}

/// Waits for the end and passes signals on.
fn wait(container: &Container, signals: &Signals) -> Result<Exit, CliError> {
    let fail = |e| CliError::io("waiting for the program", e);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(fail)?;
    runtime.block_on(async {
        let signalled = signals.watch().map_err(fail)?;
        loop {
            tokio::select! {
                exit = container.ended() => return Ok(exit),
                guard = signalled.readable() => {
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                    for signal in signals.take() {
                        // It may have ended a moment ago: nothing to pass on then.
                        let _ = container.signal(signal);
                    }
                }
            }
        }
    })
}

fn report(
    args: &RunArgs,
    context: &Context,
    command: &[String],
    container: &Container,
    exit: &Exit,
    boot: Duration,
    begin: Instant,
) -> Result<u8, CliError> {
    let name = command.first().map_or("program", String::as_str);
    let (code, reason) = match exit.reason {
        Reason::Exited => (exit.code, "exited"),
        Reason::Signal(_) => (exit.code, "signal"),
        Reason::Trap => (exit.code, "trap"),
        Reason::OutOfMemory => (exit.code, "out_of_memory"),
        Reason::Deadline => (TIMED_OUT, "timeout"),
        Reason::Fuel => (exit.code, "fuel"),
        _ => (exit.code, "failed"),
    };
    let stats = container.stats();
    let ms = |d: Duration| (d.as_secs_f64() * 1e4).round() / 10.0;
    let mut report = json!({
        "sandbox": "wasm", "image": crate::image::display_name(&args.image), "command": command,
        "exit_code": code, "reason": reason, "boot_ms": ms(boot), "total_ms": ms(begin.elapsed()),
        "cpu_ms": ms(stats.cpu), "memory_peak_bytes": stats.memory_peak_bytes,
    });
    if let Some(message) = &exit.message {
        report["message"] = json!(message);
    }
    if let Some(path) = &args.report {
        std::fs::write(path, format!("{report:#}\n"))
            .map_err(|e| CliError::io(format!("report {}", path.display()), e))?;
    }
    if context.json {
        eprintln!("{report}");
        return Ok(code);
    }
    if let Some(message) = &exit.message {
        let mut lines = message.lines();
        let first = lines.next().unwrap_or_default();
        let rest: Vec<&str> = lines.collect();
        let hint = match exit.reason {
            Reason::OutOfMemory => {
                format!(" ({} MiB; raise it with --memory)", args.memory)
            }
            Reason::Trap if !rest.is_empty() && context.verbose == 0 => {
                " (vmmctl -v wasm run … shows where)".into()
            }
            _ => String::new(),
        };
        eprintln!("error: {name}: {first}{hint}");
        if context.verbose > 0 {
            for line in rest {
                eprintln!("{line}");
            }
        }
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_times() {
        assert_eq!(parse_cpus("0.5"), Ok(500));
        assert_eq!(parse_cpus("2"), Ok(2000));
        assert_eq!(parse_cpus("1.25"), Ok(1250));
        for bad in ["", "0", "-1", "0.0001", "x", "1.x", "99999999999"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_seconds("5s"), Ok(Duration::from_secs(5)));
        for bad in ["", "0", "-1", "nan", "inf", "1e30"] {
            assert!(parse_seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_root_can_be_a_volume() {
        let volume = parse_volume("data:/:ro").expect("good");
        assert_eq!((volume.guest.as_str(), volume.read_only), ("/", true));
        assert_eq!(parse_volume("data:/x").expect("good").guest, "/x");
        for bad in ["data:", ":/", "data:/:rx", "data:x", "data:/../x"] {
            assert!(parse_volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn functions_are_split_off() {
        assert_eq!(
            split_function(Path::new("/nowhere/x.wasm#f")),
            ("/nowhere/x.wasm".into(), Some("f".into()))
        );
        assert_eq!(
            split_function(Path::new("/nowhere/x.wasm")),
            ("/nowhere/x.wasm".into(), None)
        );
        let dir = tempfile::tempdir().expect("tempdir");
        let odd = dir.path().join("a#b");
        std::fs::write(&odd, "").expect("write");
        assert_eq!(split_function(&odd), (odd, None));
    }
}
