//! `containerd-shim-bulkhead-microvm-v1`: containerd wants a program of this name to exist for its
//! runtime type. It asks it what it is (`-info`), and to clean up after a container whose daemon
//! does not answer (`delete`). Pods are run by the daemon: this starts nothing.

use std::io::Write;
use std::process::ExitCode;

use bulkhead_sandboxer::daemon::shim;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    match shim::answer(&args) {
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
