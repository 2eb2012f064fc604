//! The program of processes that belong to one pod: keepers and workers.
//!
//! It has the same code as the daemon's, but for the engine of wasm, which these processes do not
//! need: the linker's table of addresses alone, which a process copies when it starts, is five times
//! as large with it. Those that do need it, which run wasm programs and load them, are the daemon's
//! program again ([`whole`]).

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use super::{keeper, worker};

/// What it is called, beside the daemon.
pub const NAME: &str = "sandboxer-pod";

static OPENED: OnceLock<Option<File>> = OnceLock::new();
/// The daemon's, in a process that it has started.
static WHOLE: OnceLock<File> = OnceLock::new();

/// Opens the program beside this one, so that an upgrade of both does not mix versions under a daemon
/// that runs. Called once, when the daemon starts.
pub(super) fn open() {
    let opened = OPENED.get_or_init(|| {
        let beside = std::env::current_exe().ok()?.with_file_name(NAME);
        File::open(beside).ok()
    });
    if opened.is_none() {
        tracing::warn!(
            "{NAME} is not beside this program (reinstall the package): processes of pods take more \
             memory without it"
        );
    }
}

/// How a process of a pod is started: the program opened before, or this one.
pub(super) fn command() -> Command {
    let path = match OPENED.get() {
        // Looked up before the new program's start closes it.
        Some(Some(file)) => format!("/proc/self/fd/{}", file.as_raw_fd()),
        _ => "/proc/self/exe".to_owned(),
    };
    let mut command = Command::new(path);
    command.arg0(NAME);
    command
}

/// Opens the program of the daemon that has started this process, for [`whole`]: the one that runs,
/// whatever has its name by now. To be called while the daemon waits for us.
///
/// # Errors
/// It has gone.
pub(super) fn open_whole() -> std::io::Result<()> {
    let parent = nix::unistd::getppid();
    let file = File::open(format!("/proc/{parent}/exe"))?;
    WHOLE.get_or_init(|| file);
    Ok(())
}

/// How a process of a pod is started that needs the engine of wasm: the daemon's program.
///
/// # Errors
/// It is not known.
pub(super) fn whole() -> std::io::Result<Command> {
    let file = WHOLE.get().ok_or(std::io::ErrorKind::NotFound)?;
    // Looked up before the new program's start closes it.
    let mut command = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
    command.arg0("sandboxer");
    Ok(command)
}

/// Runs what the arguments ask for, if they ask for a process of a pod.
pub(super) fn main() -> Option<ExitCode> {
    let run = match std::env::args_os().nth(1)?.to_str()? {
        worker::ARGUMENT => worker::run::main,
        keeper::ARGUMENT => keeper::process::main,
        _ => return None,
    };
    // Named by the descriptor that it was started by otherwise. A name is for people only.
    let _ = nix::sys::prctl::set_name(c"sandboxer-pod");
    crate::one_heap();
    Some(run())
}

/// `sandboxer-pod`.
pub fn pod_main() -> ExitCode {
    if std::env::args_os().nth(1).as_deref() == Some(OsStr::new("--version")) {
        println!("{NAME} {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    main().unwrap_or_else(|| {
        eprintln!("error: {NAME} is not for people: sandboxer starts it for pods with `isolation = \"process\"`");
        ExitCode::FAILURE
    })
}
