//! `containerd-shim-bulkhead-microvm-v1`: containerd wants a program of this name to exist for its
//! runtime type, and one of a like name for each of our other runtimes: links to it. It asks it what it is (`-info`), and to clean up after a container whose daemon
//! does not answer (`delete`). Pods are run by the daemon: this starts nothing.

use std::io::Write;
use std::process::ExitCode;

use bulkhead_sandboxer::daemon::shim;

fn main() -> ExitCode {
    let mut args = std::env::args_os().map(|a| a.to_string_lossy().into_owned());
    let program = args.next().unwrap_or_default();
    let args: Vec<String> = args.collect();
    match shim::answer(&program, &args) {
        Ok(bytes) => match std::io::stdout().write_all(&bytes) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
