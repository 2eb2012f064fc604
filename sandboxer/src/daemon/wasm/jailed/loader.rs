//! How a keeper, which has no engine, comes by a program's machine code: from a process that is
//! started for it and ends with it.
//!
//! That process is the daemon's program: it looks into the cache of compiled programs, or has one
//! compiled, as the daemon does for pods on its threads, and hands the file with the code over.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, ExitCode, Stdio};

use bulkhead_wasm::{Allocation, Code, Engine, Source};
use serde::{Deserialize, Serialize};

use crate::daemon::config::Wasm as Settings;
use crate::daemon::program;
use crate::daemon::wasm::threads::engine_config;
use crate::daemon::worker::channel::Channel;

/// How the program is told that it is to be one.
pub const ARGUMENT: &str = "--bulkhead-wasm-loader";

/// A program's code, in a file that nobody can change.
#[derive(Debug)]
pub struct Loaded {
    /// The program's name in messages.
    pub name: String,
    /// The code.
    pub file: OwnedFd,
    /// It was made with functions inlined.
    pub inlined: bool,
}

/// Where the program comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum From {
    /// The file that comes along.
    File,
    /// Only if it was made ready before: the digest of its bytes.
    Known(String),
}

/// What is to be loaded, and by which settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Order {
    name: String,
    from: From,
    cache_dir: PathBuf,
    cache_mib: u64,
    max_module_mib: u64,
    compile_memory_mib: u64,
    inlining: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Answer {
    /// The code comes along.
    Loaded { inlined: bool },
    /// It was not made ready before.
    Unknown,
    /// For people.
    Failed { reason: String },
}

impl Order {
    fn new(settings: &Settings, name: &str, from: From) -> Self {
        Self {
            name: name.to_owned(),
            from,
            cache_dir: settings.cache_dir.clone(),
            cache_mib: settings.cache_mib,
            max_module_mib: settings.max_module_mib,
            compile_memory_mib: settings.compile_memory_mib,
            inlining: settings.inlining,
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            cache_dir: self.cache_dir.clone(),
            cache_mib: self.cache_mib,
            max_module_mib: self.max_module_mib,
            compile_memory_mib: self.compile_memory_mib,
            inlining: self.inlining,
            ..Settings::default()
        }
    }
}

/// Does not outlive who waits for it.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Harmless if it has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks a process of its own. `None`: it was not made ready before.
fn ask(order: &Order, file: Option<&File>) -> io::Result<Option<Loaded>> {
    let (channel, theirs) = Channel::pair()?;
    let _child = Ended(
        program::whole()?
            .arg(ARGUMENT)
            .env_clear()
            .current_dir("/")
            .stdin(theirs)
            .stdout(Stdio::null())
            .spawn()?,
    );
    let files: Vec<_> = file.iter().map(|f| f.as_fd()).collect();
    channel.send(order, &files)?;
    match channel.receive::<Answer>()? {
        None => Err(io::Error::other(
            "the process that loads programs ended without a word",
        )),
        Some((Answer::Loaded { inlined }, fds)) => {
            let file = fds.into_iter().next();
            let file = file.ok_or_else(|| io::Error::other("the code is missing"))?;
            let name = order.name.clone();
            Ok(Some(Loaded {
                name,
                file,
                inlined,
            }))
        }
        Some((Answer::Unknown, _)) => Ok(None),
        Some((Answer::Failed { reason }, _)) => Err(io::Error::other(reason)),
    }
}

/// What was made ready before, by the digest of its bytes. Blocks.
pub fn find(settings: &Settings, name: &str, digest: &str) -> Option<Loaded> {
    let order = Order::new(settings, name, From::Known(digest.to_owned()));
    // It is asked for again when it has been read.
    ask(&order, None).ok().flatten()
}

/// Makes a program ready. Blocks, for long if it has to be compiled.
///
/// # Errors
/// For people.
pub fn load(settings: &Settings, source: Source<'_>) -> Result<Loaded, String> {
    let made;
    let (name, file) = match source {
        Source::Open { name, file } => (name.to_owned(), file),
        Source::File(path) => {
            made = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
            (path.display().to_string(), &made)
        }
        Source::Bytes { name, bytes } => {
            made = in_memory(bytes).map_err(|e| format!("{name}: {e}"))?;
            (name.to_owned(), &made)
        }
    };
    let loaded = ask(&Order::new(settings, &name, From::File), Some(file));
    loaded
        .map_err(|e| e.to_string())?
        .ok_or_else(|| format!("{name}: it was not loaded"))
}

/// A file in memory, at its beginning.
pub(super) fn in_memory(bytes: &[u8]) -> io::Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::io::{Seek, Write};
    let mut file = File::from(memfd_create("bulkhead", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

/// Runs a loader; the channel to the keeper is standard input.
pub fn main() -> ExitCode {
    // The keeper has put a socket there; nothing else in this process reads it.
    let Ok(keeper) = io::stdin().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    let keeper = Channel::from(keeper);
    let Ok(Some((order, fds))) = keeper.receive::<Order>() else {
        return ExitCode::FAILURE;
    };
    let (answer, code) = match work(&order, fds) {
        Ok(Some(code)) => {
            let inlined = code.inlined();
            (Answer::Loaded { inlined }, Some(code))
        }
        Ok(None) => (Answer::Unknown, None),
        Err(reason) => (Answer::Failed { reason }, None),
    };
    let files: Vec<_> = code.iter().map(Code::file).collect();
    match keeper.send(&answer, &files) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn work(order: &Order, fds: Vec<OwnedFd>) -> Result<Option<Code>, String> {
    let engine = Engine::new(&engine_config(&order.settings(), Allocation::OnDemand))
        .map_err(|e| format!("wasm engine: {e}"))?;
    match &order.from {
        From::Known(digest) => Ok(engine.find_code(&order.name, digest)),
        From::File => {
            let file = fds.into_iter().next().map(File::from);
            let file = file.ok_or_else(|| "the program's file is missing".to_owned())?;
            let source = Source::Open {
                name: &order.name,
                file: &file,
            };
            engine.code(source).map(Some).map_err(|e| e.to_string())
        }
    }
}
