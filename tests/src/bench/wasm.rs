//! Wasm pods beside wasmtime itself: the library used as plainly as it can be, in this process, and
//! the `wasmtime` command of the same version where it is in the cache.
//!
//! Runs natively, as root where crun shall be shown too.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as ChildStdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_fixtures::wasm as fixtures;
use bulkhead_wasm::{
    Allocation, CacheConfig, CompilerConfig, Container, ContainerConfig, Engine, EngineConfig,
    HttpConfig, Network, Pod, PodConfig, Program, Source, Stdio,
};
use wasmtime_wasi::WasiCtxBuilder;
use wasmtime_wasi::p1::WasiP1Ctx;

use super::crun;
use super::report::{Goal, Report, median};
use super::{wasm_idle, wasm_isolated};
use crate::process::Guard;
use crate::wasm::daemon::{Daemon, connect, run as run_task};
use crate::wasm::{HELLO_BODY, http_component, wit};

pub(super) const PATIENCE: Duration = Duration::from_secs(120);
const STARTS: usize = 300;
const TASKS: usize = 1000;
const PYTHON_ROUNDS: usize = 21;
const REQUESTS: usize = 4000;
const CLIENTS: usize = 8;
pub(super) const COMMAND: &str = "bench wasm";

/// Prints `.` and ends.
pub(super) const DOT: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write"
    (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) ".")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 1))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))))"#;
const LOOP: &str = r#"(module (func (export "_start") (loop $l (br $l))))"#;
struct Bench {
    engine: Engine,
    scratch: tempfile::TempDir,
    report: Report,
    cli: Option<PathBuf>,
}

/// What can be run alone.
pub const PARTS: [&str; 8] = [
    "starts", "tasks", "daemon", "kills", "python", "http", "isolated", "idle",
];

/// Runs the benchmark, or these parts of it.
///
/// # Errors
/// Something does not run, or a program cannot be had.
pub fn run(parts: &[String]) -> Result<Report> {
    if let Some(part) = parts.iter().find(|p| !PARTS.contains(&p.as_str())) {
        bail!("there is no part {part}, but {}", PARTS.join(", "));
    }
    let scratch = tempfile::tempdir()?;
    let engine = Engine::new(&EngineConfig {
        allocation: Allocation::Pooling { instances: 2000 },
        cache: Some(CacheConfig {
            directory: scratch.path().join("code"),
            max_bytes: 4 << 30,
        }),
        // As in vmmctl and the daemon.
        compiler: CompilerConfig {
            program: Some(crate::env::built("vmmctl-wasm")?),
            ..CompilerConfig::default()
        },
        ..EngineConfig::default()
    })?;
    let cli = bulkhead_fixtures::cache_dir()?
        .join("tools")
        .join(format!("wasmtime-{}", bulkhead_wasm::WASMTIME_VERSION))
        .join("bin/wasmtime");
    let cli = cli.is_file().then_some(cli);
    let mut bench = Bench {
        engine,
        scratch,
        report: Report::new("wasm", "wasmtime", bulkhead_wasm::WASMTIME_VERSION),
        cli,
    };
    for part in parts {
        match part.as_str() {
            "starts" => bench.starts()?,
            "tasks" => bench.tasks()?,
            "daemon" => bench.daemon_tasks()?,
            "kills" => bench.kills()?,
            "python" => bench.python()?,
            "http" => bench.http()?,
            "isolated" => wasm_isolated::run(&mut bench.report)?,
            _ => {
                wasm_idle::of_library(&bench.engine, &mut bench.report)?;
                wasm_idle::of_daemon(&mut bench.report)?;
            }
        }
    }
    Ok(bench.report)
}

fn pipe() -> Result<(fs::File, Stdio)> {
    let (reader, writer): (OwnedFd, OwnedFd) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    Ok((reader.into(), Stdio::Fd(writer)))
}

fn wait(container: &Container) -> Result<u8> {
    let exit = container
        .wait_for(PATIENCE)
        .with_context(|| format!("{container:?} does not end"))?;
    if let Some(message) = exit.message {
        bail!("{container:?}: {message}");
    }
    Ok(exit.code)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// wasmtime as plainly as it can be used: no limits, no way to interrupt, no threads.
struct Raw {
    engine: wasmtime::Engine,
    linker: wasmtime::Linker<WasiP1Ctx>,
}

impl Raw {
    fn new() -> wasmtime::Result<Self> {
        let mut config = wasmtime::Config::new();
        let mut pool = wasmtime::PoolingAllocationConfig::new();
        pool.total_memories(100).table_elements(1 << 20);
        config.allocation_strategy(wasmtime::InstanceAllocationStrategy::Pooling(pool));
        let engine = wasmtime::Engine::new(&config)?;
        let mut linker = wasmtime::Linker::new(&engine);
        wasmtime_wasi::p1::add_to_linker_sync(&mut linker, |state| state)?;
        Ok(Self { engine, linker })
    }

    /// The module as the `wasmtime compile` command would leave it on disk.
    fn precompiled(&self, module: &[u8], path: &Path) -> wasmtime::Result<wasmtime::Module> {
        fs::write(path, self.engine.precompile_module(module)?)?;
        // SAFETY: written a line above by this very engine, into a directory of our own.
        unsafe { wasmtime::Module::deserialize_file(&self.engine, path) }
    }

    fn run(
        &self,
        pre: &wasmtime::InstancePre<WasiP1Ctx>,
        setup: impl FnOnce(&mut WasiCtxBuilder) -> wasmtime::Result<()>,
    ) -> wasmtime::Result<()> {
        let mut builder = WasiCtxBuilder::new();
        builder.allow_blocking_current_thread(true);
        setup(&mut builder)?;
        let mut store = wasmtime::Store::new(&self.engine, builder.build_p1());
        let instance = pre.instantiate(&mut store)?;
        let start = instance.get_typed_func::<(), ()>(&mut store, "_start")?;
        match start.call(&mut store, ()) {
            Err(e)
                if e.downcast_ref::<wasmtime_wasi::I32Exit>()
                    .is_none_or(|x| x.0 != 0) =>
            {
                Err(e)
            }
            _ => Ok(()),
        }
    }
}

/// wasmtime's errors are no standard ones.
fn engine_error(error: wasmtime::Error) -> anyhow::Error {
    anyhow::Error::msg(format!("{error:#}"))
}

impl Bench {
    fn load(&self, wat: &str) -> Result<Program> {
        let bytes = wat::parse_str(wat)?;
        Ok(self.engine.load(Source::Bytes {
            name: "bench",
            bytes: &bytes,
        })?)
    }

    fn pod(&self) -> Pod {
        Pod::new(&self.engine, PodConfig::default())
    }

    /// From the order to make a container to its first byte, in a pod that exists.
    fn starts(&mut self) -> Result<()> {
        let program = self.load(DOT)?;
        let pod = self.pod();
        let mut samples = Vec::new();
        for _ in 0..STARTS {
            let (mut reader, writer) = pipe()?;
            let begin = Instant::now();
            let mut config = ContainerConfig::new("c", program.clone());
            config.stdout = writer;
            let container = pod.create(config)?;
            container.start()?;
            let mut byte = [0];
            reader.read_exact(&mut byte)?;
            samples.push(ms(begin.elapsed()));
            wait(&container)?;
        }
        self.report.add(
            "cached start: create to first byte of output, p50",
            "ms",
            &samples,
            &[],
            Goal::Value(1.0),
            COMMAND,
        );
        if let Some(crun) = crun::starts(self.scratch.path())? {
            self.report.add(
                "the same, beside crun run of a static hello",
                "ms",
                &samples,
                &crun,
                Goal::Ratio(1.0 / 20.0),
                "peer: crun run, without cgroups",
            );
        }
        Ok(())
    }

    /// Whole tasks through one pod, and bare instantiation for comparison.
    fn tasks(&mut self) -> Result<()> {
        let program = self.load(DOT)?;
        let pod = self.pod();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut rates = Vec::new();
        for _ in 0..5 {
            let begin = Instant::now();
            let results: Vec<Result<()>> = std::thread::scope(|scope| {
                let workers: Vec<_> = (0..cores)
                    .map(|_| {
                        scope.spawn(|| {
                            for _ in 0..TASKS / cores {
                                let (mut reader, writer) = pipe()?;
                                let mut config = ContainerConfig::new("c", program.clone());
                                config.stdout = writer;
                                let container = pod.create(config)?;
                                container.start()?;
                                wait(&container)?;
                                let mut byte = [0];
                                reader.read_exact(&mut byte)?;
                            }
                            Ok(())
                        })
                    })
                    .collect();
                workers
                    .into_iter()
                    .map(|w| w.join().unwrap_or_else(|_| bail!("a worker panicked")))
                    .collect()
            });
            results.into_iter().collect::<Result<()>>()?;
            rates.push(TASKS as f64 / begin.elapsed().as_secs_f64());
        }
        // A rate has a lower bound; the report knows upper ones, so the time of a thousand is told.
        let seconds: Vec<f64> = rates.iter().map(|rate| TASKS as f64 / rate).collect();
        self.report.add(
            "1,000 tasks (create, start, wait, own stdout)",
            "s",
            &seconds,
            &[],
            Goal::Value(1000.0 / 1500.0),
            COMMAND,
        );
        let raw = Raw::new().map_err(engine_error)?;
        let module = wat::parse_str(DOT)?;
        let module = raw
            .precompiled(&module, &self.scratch.path().join("dot.cwasm"))
            .map_err(engine_error)?;
        let pre = raw.linker.instantiate_pre(&module).map_err(engine_error)?;
        let mut bare = Vec::new();
        for _ in 0..5 {
            let begin = Instant::now();
            for _ in 0..TASKS {
                raw.run(&pre, |_| Ok(())).map_err(engine_error)?;
            }
            bare.push(begin.elapsed().as_secs_f64());
        }
        self.report.add(
            "1,000 bare instantiations in a loop (wasmtime alone)",
            "s",
            &bare,
            &[],
            Goal::Shown,
            COMMAND,
        );
        Ok(())
    }

    /// Whole tasks as containerd asks for them: by ttrpc, each with an image that is mounted, a
    /// FIFO of its own for its output, and its exit events.
    fn daemon_tasks(&mut self) -> Result<()> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("tasks through the daemon: needs root");
            return Ok(());
        }
        const CLIENTS: usize = 4;
        let daemon = Daemon::start()?;
        let address = daemon.pod("bench", "")?;
        let image = daemon.image("dot", &wat::parse_str(DOT)?)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let mut seconds = Vec::new();
        for round in 0..4 {
            // What containerd's client prepares is not the runtime's time.
            let mut bundles = Vec::new();
            for client in 0..CLIENTS {
                let mut own = Vec::new();
                for n in 0..TASKS / CLIENTS {
                    let id = format!("t{round}-{client}-{n}");
                    own.push(daemon.bundle(&id, &image, &["/app.wasm"], |_| ())?);
                }
                bundles.push(own);
            }
            let begin = Instant::now();
            runtime.block_on(async {
                let mut clients = tokio::task::JoinSet::new();
                for own in bundles {
                    let address = address.clone();
                    clients.spawn(async move {
                        let tasks = connect(&address).await?;
                        for bundle in own {
                            let (code, out, _) = run_task(&tasks, bundle).await?;
                            if code != 0 || out != "." {
                                bail!("a task ended with {code}, output {out:?}");
                            }
                        }
                        Ok(())
                    });
                }
                while let Some(done) = clients.join_next().await {
                    done??;
                }
                anyhow::Ok(())
            })?;
            if round > 0 {
                seconds.push(begin.elapsed().as_secs_f64());
            }
        }
        daemon.remove("bench")?;
        self.report.add(
            "1,000 tasks by Task v3 (create, start, wait, delete, own stdout)",
            "s",
            &seconds,
            &[],
            Goal::Value(1000.0 / 1500.0),
            COMMAND,
        );
        Ok(())
    }

    fn kills(&mut self) -> Result<()> {
        let program = self.load(LOOP)?;
        let pod = self.pod();
        let mut samples = Vec::new();
        for _ in 0..50 {
            let container = pod.create(ContainerConfig::new("c", program.clone()))?;
            container.start()?;
            while container.stats().cpu < Duration::from_millis(2) {
                std::thread::yield_now();
            }
            let begin = Instant::now();
            container.signal(9)?;
            wait(&container)?;
            samples.push(ms(begin.elapsed()));
        }
        self.report.add(
            "kill of an endless loop, p50",
            "ms",
            &samples,
            &[],
            Goal::Value(20.0),
            COMMAND,
        );
        let worst = samples.iter().copied().fold(0.0, f64::max);
        self.report.add(
            "kill of an endless loop, worst of 50",
            "ms",
            &[worst],
            &[],
            Goal::Value(20.0),
            COMMAND,
        );
        Ok(())
    }

    /// CPython from the order to start to the end of `print`.
    fn python(&mut self) -> Result<()> {
        let path = fixtures::python()?;
        let script = ["python", "-c", "print(6*7)"];
        let program = self.engine.load(Source::File(&path))?;
        let raw = Raw::new().map_err(engine_error)?;
        let module = raw
            .precompiled(&fs::read(&path)?, &self.scratch.path().join("py.cwasm"))
            .map_err(engine_error)?;
        let pre = raw.linker.instantiate_pre(&module).map_err(engine_error)?;
        let pod = self.pod();
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        // In turn, so that what the host does meanwhile hurts both.
        for _ in 0..PYTHON_ROUNDS {
            let (reader, writer) = pipe()?;
            let begin = Instant::now();
            let mut config = ContainerConfig::new("py", program.clone());
            config.args = script.map(str::to_owned).to_vec();
            config.stdout = writer;
            let container = pod.create(config)?;
            container.start()?;
            let text = read_all(reader)?;
            wait(&container)?;
            ours.push(ms(begin.elapsed()));
            check(&text)?;
            let (reader, writer) = pipe()?;
            let Stdio::Fd(writer) = writer else {
                bail!("pipe")
            };
            let begin = Instant::now();
            raw.run(&pre, |builder| {
                builder
                    .args(&script)
                    .stdout(wasmtime_wasi::cli::OutputFile::new(writer.into()));
                Ok(())
            })
            .map_err(engine_error)?;
            let text = read_all(reader)?;
            peer.push(ms(begin.elapsed()));
            check(&text)?;
        }
        self.report.add(
            "CPython 3.12, start to end of print; peer: the bare library",
            "ms",
            &ours,
            &peer,
            Goal::Ratio(1.1),
            COMMAND,
        );
        self.python_processes(&path)
    }

    /// The same as whole processes, where the `wasmtime` command is at hand.
    fn python_processes(&mut self, path: &Path) -> Result<()> {
        let vmmctl = crate::env::vmmctl()?;
        let store = self.scratch.path().join("store");
        let vmmctl_run = || {
            let mut command = Command::new(&vmmctl);
            command
                .args(["wasm", "run"])
                .arg(path)
                .args(["--", "-c", "print(6*7)"])
                .env("BULKHEAD_ROOT", &store);
            timed(&mut command)
        };
        vmmctl_run()?;
        let mut peer = Vec::new();
        let cwasm = self.scratch.path().join("cli.cwasm");
        if let Some(cli) = &self.cli {
            let status = Command::new(cli)
                .arg("compile")
                .arg(path)
                .arg("-o")
                .arg(&cwasm)
                .status()?;
            if !status.success() {
                bail!("wasmtime compile failed");
            }
        }
        let mut ours = Vec::new();
        for _ in 0..PYTHON_ROUNDS {
            ours.push(vmmctl_run()?);
            if let Some(cli) = &self.cli {
                let mut command = Command::new(cli);
                command
                    .args(["run", "--allow-precompiled"])
                    .arg(&cwasm)
                    .args(["-c", "print(6*7)"]);
                peer.push(timed(&mut command)?);
            }
        }
        self.report.add(
            "CPython 3.12 as a command; peer: wasmtime run, precompiled",
            "ms",
            &ours,
            &peer,
            // Not met without the peer.
            Goal::Ratio(1.1),
            "vmmctl wasm run python.wasm -- -c 'print(6*7)'",
        );
        Ok(())
    }

    /// A small component, a fresh instance for each request.
    fn http(&mut self) -> Result<()> {
        let component = http_component(&wit()?)?;
        let path = self.scratch.path().join("hello.wasm");
        fs::write(&path, &component)?;
        let program = self.engine.load(Source::File(&path))?;
        let pod = Pod::new(
            &self.engine,
            PodConfig {
                network: Network::Host,
                ..PodConfig::default()
            },
        );
        let listen = free_address()?;
        let mut config = ContainerConfig::new("http", program);
        config.http = HttpConfig {
            listen,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            ..HttpConfig::default()
        };
        let container = pod.create(config)?;
        container.start()?;
        let cli = self.cli.clone();
        let mut peer = match &cli {
            None => None,
            Some(cli) => {
                let address = free_address()?;
                let child = Command::new(cli)
                    .args(["serve", "--max-instance-reuse-count", "1", "--addr"])
                    .arg(address.to_string())
                    .arg(&path)
                    .stdout(ChildStdio::null())
                    .stderr(ChildStdio::null())
                    .spawn()?;
                Some((Guard(child), address))
            }
        };
        let addresses: Vec<SocketAddr> = std::iter::once(listen)
            .chain(peer.iter().map(|(_, address)| *address))
            .collect();
        for address in &addresses {
            until_listening(*address)?;
            load(*address, 200, 1)?;
        }
        let mut results = vec![(Vec::new(), Vec::new()); addresses.len()];
        for _ in 0..3 {
            for (address, (latency, seconds)) in addresses.iter().zip(&mut results) {
                latency.push(median(&load(*address, REQUESTS / 4, 1)?.0));
                seconds.push(load(*address, REQUESTS, CLIENTS)?.1 * 1000.0 / REQUESTS as f64);
            }
        }
        let (latency, time) = results.first().cloned().unwrap_or_default();
        let (peer_latency, peer_time) = results.get(1).cloned().unwrap_or_default();
        self.report.add(
            "HTTP, fresh instance per request, one client, p50",
            "ms",
            &latency,
            &peer_latency,
            Goal::Value(0.5),
            "peer: wasmtime serve --max-instance-reuse-count 1",
        );
        self.report.add(
            "HTTP, time of 1,000 requests by 8 clients",
            "s",
            &time,
            &peer_time,
            Goal::Ratio(1.0 / 0.9),
            "peer: wasmtime serve --max-instance-reuse-count 1",
        );
        drop(peer.take());
        container.signal(15)?;
        wait(&container)?;
        Ok(())
    }
}

fn read_all(mut file: fs::File) -> Result<String> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

fn check(text: &str) -> Result<()> {
    if text != "42\n" {
        bail!("CPython printed {text:?}");
    }
    Ok(())
}

fn timed(command: &mut Command) -> Result<f64> {
    let begin = Instant::now();
    let output = command.stdin(ChildStdio::null()).output()?;
    let time = ms(begin.elapsed());
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    check(&String::from_utf8_lossy(&output.stdout))?;
    Ok(time)
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn until_listening(address: SocketAddr) -> Result<()> {
    let begin = Instant::now();
    while TcpStream::connect(address).is_err() {
        if begin.elapsed() > PATIENCE {
            bail!("nobody listens at {address}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Sends `count` requests by `clients` connections that are kept; the latencies in ms and the time
/// of all in s.
fn load(address: SocketAddr, count: usize, clients: usize) -> Result<(Vec<f64>, f64)> {
    let begin = Instant::now();
    let results: Vec<Result<Vec<f64>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..clients)
            .map(|_| {
                scope.spawn(move || {
                    let mut stream = TcpStream::connect(address)?;
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(PATIENCE))?;
                    let mut times = Vec::new();
                    for _ in 0..count / clients {
                        let begin = Instant::now();
                        stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")?;
                        answer(&mut stream)?;
                        times.push(ms(begin.elapsed()));
                    }
                    Ok(times)
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|w| w.join().unwrap_or_else(|_| bail!("a client panicked")))
            .collect()
    });
    let seconds = begin.elapsed().as_secs_f64();
    let mut all = Vec::new();
    for result in results {
        all.extend(result?);
    }
    Ok((all, seconds))
}

/// Reads one answer with a chunked body, or one with a length.
fn answer(stream: &mut TcpStream) -> Result<()> {
    let mut got = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            bail!("the server closed: {:?}", String::from_utf8_lossy(&got));
        }
        got.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&got);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        if !head.starts_with("HTTP/1.1 200") {
            bail!("{text}");
        }
        let chunked = head
            .to_ascii_lowercase()
            .contains("transfer-encoding: chunked");
        if chunked && body.ends_with("0\r\n\r\n") || !chunked && body.len() >= HELLO_BODY.len() {
            if !body.contains(HELLO_BODY) {
                bail!("{text}");
            }
            return Ok(());
        }
    }
}
