//! Compiling programs, in a process of its own.
//!
//! A compiler takes time and memory as the program it is given wants it to, and it is the largest
//! body of code that sees every byte a stranger wrote. So it does not run in the daemon: the
//! program that embeds this library starts itself again ([`compiler_main`]), and that process can
//! compute, and write its result, and nothing else. Its memory is the host's again when it ends, a
//! crash of it is an error message, and one that takes too much memory or time is ended.
//!
//! What comes back is machine code, and the daemon runs it: a compiler that a program has taken
//! over could return what it likes. This is a wall around accidents and appetite, not around that.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cache::read_limited;
use crate::config::{self, EngineConfig};
use crate::engine::wasmtime_config;
use crate::error::one_line;
use crate::harden;
use crate::program::Format;

/// How a program that embeds the library is told to be the compiler.
const ARGUMENT: &str = "--bulkhead-wasm-compiler";
/// Exit code of a compiler that refuses the program: it is not valid.
const REFUSED: u8 = 3;
/// Exit code of a compiler that was to inline functions, and has not, as the program is too large.
const PLAIN: u8 = 4;
/// Longest report that is read.
const MAX_REPORT: usize = 16 << 10;
/// A compilation that takes longer is ended: ten times what the largest program takes on a slow
/// host.
const MAX_TIME: Duration = Duration::from_secs(900);

/// A program that is to be compiled.
#[derive(Debug)]
pub(crate) enum Input<'a> {
    /// In memory that cannot be changed any more, see [`sealed`].
    Sealed(File),
    Bytes(&'a [u8]),
}

/// Machine code, in memory that cannot be changed any more.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) code: File,
    pub(crate) inlined: bool,
}

/// How something is to be compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Order {
    format: Format,
    /// Whether functions are inlined, if the program is not too large for that.
    inlining: bool,
    fuel: bool,
    core_dumps: bool,
    threads: usize,
    /// Of the compiler's process.
    memory_bytes: u64,
}

/// Why there is no code.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The program is not valid.
    Invalid(String),
    /// The compiler has failed.
    Broken(String),
    /// Somebody has ended the compiler by this signal, and means us.
    Interrupted(i32),
}

impl Order {
    fn new(config: &EngineConfig, format: Format) -> Self {
        Self {
            format,
            inlining: config.compiler.inlining,
            fuel: config.fuel,
            core_dumps: config.core_dumps,
            threads: std::thread::available_parallelism()
                .map_or(1, usize::from)
                .min(config::COMPILE_THREADS),
            memory_bytes: config.compiler.memory_bytes,
        }
    }

    /// With no more memory than half of what the host has to give now.
    fn within(self, available: Option<u64>) -> Self {
        let most = available.map_or(u64::MAX, |a| (a / 2).max(config::MIN_COMPILE_BYTES));
        Self {
            memory_bytes: self.memory_bytes.min(most),
            ..self
        }
    }

    fn config(self) -> EngineConfig {
        EngineConfig {
            fuel: self.fuel,
            core_dumps: self.core_dumps,
            ..EngineConfig::default()
        }
    }

    fn words(self) -> [String; 6] {
        [
            match self.format {
                Format::Module => "module".to_owned(),
                Format::Component => "component".to_owned(),
            },
            u8::from(self.inlining).to_string(),
            u8::from(self.fuel).to_string(),
            u8::from(self.core_dumps).to_string(),
            self.threads.to_string(),
            self.memory_bytes.to_string(),
        ]
    }

    fn parse(words: &[String]) -> Option<Self> {
        let [format, inlining, fuel, core_dumps, threads, memory] = words else {
            return None;
        };
        let flag = |word: &str| match word {
            "0" => Some(false),
            "1" => Some(true),
            _ => None,
        };
        Some(Self {
            format: match format.as_str() {
                "module" => Format::Module,
                "component" => Format::Component,
                _ => return None,
            },
            inlining: flag(inlining)?,
            fuel: flag(fuel)?,
            core_dumps: flag(core_dumps)?,
            threads: threads.parse().ok()?,
            memory_bytes: memory.parse().ok()?,
        })
    }
}

/// Gives an engine that inlines functions, or one that does not.
pub(crate) type Engines<'a> = &'a dyn Fn(bool) -> Result<wasmtime::Engine, String>;

/// Compiles a program. `engines` are for doing it in this process.
pub(crate) fn compile(
    config: &EngineConfig,
    engines: Engines<'_>,
    format: Format,
    input: Input<'_>,
) -> Result<Compiled, Failure> {
    let order = Order::new(config, format);
    let broken = |e: io::Error| Failure::Broken(e.to_string());
    let mut code = sealed("wasm-code").map_err(broken)?;
    let inlined = match &config.compiler.program {
        Some(program) => {
            let order = order.within(available());
            let input = match input {
                Input::Sealed(file) => file,
                Input::Bytes(bytes) => sealed_copy(bytes).map_err(broken)?,
            };
            let begin = Instant::now();
            match elsewhere(program, order, &input, &code) {
                // It may have taken memory that no estimate foresees. Time is not given twice.
                Err(Failure::Broken(_)) if order.inlining && begin.elapsed() < MAX_TIME / 2 => {
                    code = sealed("wasm-code").map_err(broken)?;
                    let plain = Order {
                        inlining: false,
                        ..order
                    };
                    elsewhere(program, plain, &input, &code)?
                }
                other => other?,
            }
        }
        None => {
            let read;
            let bytes = match input {
                Input::Sealed(mut file) => {
                    file.rewind().map_err(broken)?;
                    read = read_limited(&file, u64::MAX).map_err(broken)?;
                    &read
                }
                Input::Bytes(bytes) => bytes,
            };
            let (made, inlined) = here(order, engines, bytes)?;
            code.write_all(&made).map_err(broken)?;
            inlined
        }
    };
    seal(&code).map_err(broken)?;
    Ok(Compiled { code, inlined })
}

/// Compiles in this process, on threads made for this and gone afterwards: they are in no pod's
/// namespaces, and nothing stays behind that could be woken. Says whether functions were inlined.
fn here(order: Order, engines: Engines<'_>, bytes: &[u8]) -> Result<(Vec<u8>, bool), Failure> {
    let needed = code_bytes(bytes).saturating_mul(config::INLINING_BYTES_PER_CODE_BYTE);
    let inlining = order.inlining && needed <= order.memory_bytes;
    let engine = engines(inlining).map_err(Failure::Broken)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(order.threads)
        .thread_name(|n| format!("wasm-compile-{n}"))
        .build()
        .map_err(|e| Failure::Broken(format!("threads for compiling: {e}")))?;
    let code = pool.install(|| match order.format {
        Format::Module => engine.precompile_module(bytes),
        Format::Component => engine.precompile_component(bytes),
    });
    match code {
        Ok(code) => Ok((code, inlining)),
        Err(e) => Err(Failure::Invalid(one_line(&format!("{e:#}")))),
    }
}

/// Bytes of WebAssembly code in a program. What inlining takes in memory goes with them; data
/// does not count. Of a program that is not valid, those up to where that shows.
fn code_bytes(program: &[u8]) -> u64 {
    let mut sum = 0u64;
    for payload in wasmparser::Parser::new(0).parse_all(program) {
        match payload {
            Ok(wasmparser::Payload::CodeSectionStart { size, .. }) => {
                sum = sum.saturating_add(u64::from(size));
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    sum
}

/// Memory that the host can give without swapping, in bytes.
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Compiles `input`, a file at any position, into `output` by starting `program` as the compiler.
/// Says whether functions were inlined.
fn elsewhere(program: &Path, order: Order, input: &File, output: &File) -> Result<bool, Failure> {
    let broken = |e: io::Error| Failure::Broken(format!("{}: {e}", program.display()));
    let mut input = input.try_clone().map_err(broken)?;
    input.rewind().map_err(broken)?;
    let output = output.try_clone().map_err(broken)?;
    // No code of ours runs between fork and exec, so this is a cheap vfork: the address space,
    // which virtual machines may be in, is not copied.
    let mut child = Ended(
        Command::new(program)
            // What `ps` shows.
            .arg0("bulkhead-wasm-compiler")
            .arg(ARGUMENT)
            .args(order.words())
            .env_clear()
            .current_dir("/")
            .stdin(input)
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()
            .map_err(broken)?,
    );
    let report = read_report(&mut child.0).map_err(broken)?;
    let Some(report) = report else {
        return Err(Failure::Broken(format!(
            "the compiler was ended after {} s",
            MAX_TIME.as_secs()
        )));
    };
    // It has closed its end: it is over, or has been taken over.
    let _ = child.0.kill();
    let status = child.0.wait().map_err(broken)?;
    let last = report.lines().rfind(|l| !l.trim().is_empty());
    let last = one_line(last.unwrap_or_default().trim());
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(order.inlining),
        (Some(code), _) if code == i32::from(PLAIN) => Ok(false),
        (Some(code), _) if code == i32::from(REFUSED) => Err(Failure::Invalid(last)),
        (_, Some(signal @ (libc::SIGINT | libc::SIGTERM | libc::SIGHUP | libc::SIGQUIT))) => {
            Err(Failure::Interrupted(signal))
        }
        _ => Err(Failure::Broken(reason(
            status.signal(),
            &report,
            order.memory_bytes,
        ))),
    }
}

/// What an operator is told of a compiler that has not come to its end.
fn reason(signal: Option<i32>, report: &str, memory_bytes: u64) -> String {
    let mut lines = report.lines().map(str::trim).filter(|l| !l.is_empty());
    // Rust's own words, and a thread that could not be made.
    let starved = report.contains("memory allocation of") || report.contains("threads for");
    if starved {
        return format!(
            "the compiler wants more memory than {} MiB (--compile-memory; a daemon's is wasm.compile_memory_mib)",
            memory_bytes >> 20
        );
    }
    let said = one_line(lines.next().unwrap_or_default());
    let how = match signal {
        Some(libc::SIGXCPU | libc::SIGKILL) => {
            "the compiler was ended: by the host for lack of memory, or as it took too long"
                .to_owned()
        }
        Some(signal) => format!("the compiler ended by signal {signal}"),
        None => "the compiler failed".to_owned(),
    };
    if said.is_empty() {
        how
    } else {
        format!("{how}: {said}")
    }
}

/// A child that does not outlive its parent's interest in it.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Harmless if it has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads what the compiler says until it ends; `None` if it takes too long.
fn read_report(child: &mut Child) -> io::Result<Option<String>> {
    let begin = Instant::now();
    let mut report = Vec::new();
    let Some(pipe) = child.stderr.as_mut() else {
        return Ok(None);
    };
    let mut buffer = [0; 4096];
    loop {
        let Some(left) = MAX_TIME.checked_sub(begin.elapsed()) else {
            return Ok(None);
        };
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, left) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
        match pipe.read(&mut buffer)? {
            0 => return Ok(Some(String::from_utf8_lossy(&report).into_owned())),
            n => {
                let room = MAX_REPORT.saturating_sub(report.len());
                report.extend_from_slice(buffer.get(..n.min(room)).unwrap_or_default());
            }
        }
    }
}

/// For `main` of a program that gives itself as [`crate::CompilerConfig::program`], before anything
/// else: if this process was started as the compiler, it compiles and gives the exit code.
pub fn compiler_main() -> Option<ExitCode> {
    let mut args = std::env::args_os();
    if args.nth(1)? != ARGUMENT {
        return None;
    }
    let words: Vec<String> = args.map(|a| a.to_string_lossy().into_owned()).collect();
    let Some(order) = Order::parse(&words) else {
        eprintln!("this is not for use by hand");
        return Some(ExitCode::FAILURE);
    };
    Some(match work(order) {
        Ok(inlined) if inlined == order.inlining => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(PLAIN),
        Err(Failure::Invalid(reason)) => {
            eprintln!("{reason}");
            ExitCode::from(REFUSED)
        }
        Err(Failure::Broken(reason)) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
        Err(Failure::Interrupted(_)) => ExitCode::FAILURE,
    })
}

/// The compiler's process.
fn work(order: Order) -> Result<bool, Failure> {
    let broken = |what: &'static str| move |e: io::Error| Failure::Broken(format!("{what}: {e}"));
    close_others().map_err(broken("descriptors"))?;
    let input = io::stdin().as_fd().try_clone_to_owned();
    let mut input = File::from(input.map_err(broken("standard input"))?);
    let output = io::stdout().as_fd().try_clone_to_owned();
    let mut output = File::from(output.map_err(broken("standard output"))?);
    let size = input.metadata().map_err(broken("the program"))?.len();
    harden::confine_compiler(order.memory_bytes.saturating_add(size), MAX_TIME)
        .map_err(broken("giving up rights"))?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(usize::try_from(size).unwrap_or(usize::MAX))
        .map_err(|_| broken("the program")(io::ErrorKind::OutOfMemory.into()))?;
    input
        .read_to_end(&mut bytes)
        .map_err(broken("the program"))?;
    let engines = |inlining| {
        wasmtime::Engine::new(&wasmtime_config(&order.config(), inlining))
            .map_err(|e| format!("{e:#}"))
    };
    let (code, inlined) = here(order, &engines, &bytes)?;
    output
        .write_all(&code)
        .map_err(broken("writing the machine code"))?;
    Ok(inlined)
}

/// Closes what was inherited beyond the standard streams: our parent's parent may have left
/// something open.
fn close_others() -> io::Result<()> {
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // The directory that was read is gone already.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

/// A file in memory that can be [`seal`]ed.
pub(crate) fn sealed(name: &str) -> io::Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    Ok(File::from(memfd_create(name, flags)?))
}

/// From now on nobody can change it: what is hashed is what is compiled, and what is made ready is
/// what the compiler has left.
pub(crate) fn seal(file: &File) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}

fn sealed_copy(bytes: &[u8]) -> io::Result<File> {
    let mut file = sealed("wasm")?;
    file.write_all(bytes)?;
    seal(&file)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDER: Order = Order {
        format: Format::Component,
        inlining: true,
        fuel: false,
        core_dumps: true,
        threads: 3,
        memory_bytes: 1 << 30,
    };

    #[test]
    fn a_compiler_that_fails_is_an_error() {
        let engines = |_| Err("not in this process".to_owned());
        let compile = |program: &str| {
            let mut config = EngineConfig::default();
            config.compiler.program = Some(program.into());
            let input = Input::Bytes(b"\0asm\x01\0\0\0");
            compile(&config, &engines, Format::Module, input).expect_err("does not compile")
        };
        let failed = Failure::Broken("the compiler failed".into());
        assert_eq!(compile("/bin/false"), failed);
        let Failure::Broken(reason) = compile("/nowhere/compiler") else {
            panic!("another failure");
        };
        assert!(reason.contains("/nowhere/compiler"), "{reason}");
        // One that leaves nothing has not compiled anything.
        let mut config = EngineConfig::default();
        config.compiler.program = Some("/bin/true".into());
        let engine = crate::Engine::new(&config).expect("an engine");
        let source = crate::Source::Bytes {
            name: "x",
            bytes: b"\0asm\x01\0\0\0",
        };
        let error = engine.load(source).expect_err("nothing to run");
        assert_eq!(error.kind(), "wasm_engine", "{error}");
    }

    #[test]
    fn orders_survive_the_command_line() {
        for format in [Format::Module, Format::Component] {
            let order = Order { format, ..ORDER };
            assert_eq!(Order::parse(&order.words()), Some(order));
        }
        let mut words = ORDER.words();
        words[1] = "2".into();
        assert_eq!(Order::parse(&words), None);
        assert_eq!(Order::parse(&words[1..]), None);
    }

    #[test]
    fn a_host_with_little_memory_gives_less() {
        let given = |available| ORDER.within(available).memory_bytes;
        assert_eq!(given(None), 1 << 30);
        assert_eq!(given(Some(8 << 30)), 1 << 30);
        assert_eq!(given(Some(1 << 30)), 512 << 20);
        assert_eq!(given(Some(0)), 256 << 20);
        assert!(available().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn code_is_counted_and_data_is_not() {
        let wat = format!(
            r#"(component
                (core module (memory 1) (data (i32.const 0) "{}")
                  (func (drop (i32.const 1))))
                (core module (func (drop (i32.const 1)))))"#,
            "x".repeat(5000)
        );
        let bytes = wat::parse_str(wat).expect("good");
        let code = code_bytes(&bytes);
        assert!((8..100).contains(&code), "{code}");
        assert_eq!(code_bytes(b"\0asm"), 0);
        assert_eq!(code_bytes(b"nothing of the kind"), 0);
    }

    #[test]
    fn what_an_operator_is_told() {
        let report = "memory allocation of 4096 bytes failed\nstack backtrace:\n";
        let text = reason(Some(libc::SIGABRT), report, 64 << 20);
        assert!(text.contains("64 MiB") && text.contains("wasm.compile_memory_mib"));
        let text = reason(Some(libc::SIGSEGV), "", 1);
        assert_eq!(text, "the compiler ended by signal 11");
        let text = reason(None, "\nthread 'main' panicked at x.rs:1\nnote: y\n", 1);
        assert_eq!(
            text,
            "the compiler failed: thread 'main' panicked at x.rs:1"
        );
    }
}
