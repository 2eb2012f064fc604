//! The command line tool: one file per command.

mod boot;
mod control;
#[cfg(test)]
mod docs;
mod doctor;
mod error;
mod exec;
mod inspect;
mod log;
mod progress;
mod ps;
mod run;
mod setup;
mod signals;
mod stats;
mod table;
mod terminal;
mod wasm;

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser, Subcommand};

pub use error::CliError;

use crate::debug::Remote;
use crate::engine::Sandbox as _;
use crate::rundir::{self, Found};

const AFTER_HELP: &str = "Examples:
  vmmctl run busybox.tar -- uname -a         a program of an image in a VM of its own
  vmmctl run -it --rm -v ./data:/data python3.tar
  vmmctl ps                                  what is running
  vmmctl exec -it a41f sh                    another program in a running VM
  vmmctl inspect a41f --boot                 where the boot spent its time
  vmmctl doctor                              what this host has and lacks

Exit codes: the program's own; 125 our failure, 126 cannot be executed, 127 not found,
128+n ended by signal n.
Ids can be shortened. BULKHEAD_ROOT, BULKHEAD_RUN, BULKHEAD_KERNEL, BULKHEAD_IMAGE and
BULKHEAD_TIMEOUT_FACTOR override the defaults.";

/// Run programs of OCI images in virtual machines, and look inside.
#[derive(Debug, Parser)]
#[command(name = "vmmctl", version, about, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say more: the causes of an error; twice: also the guest's console (`vmmctl -vv run …`).
    #[arg(short = 'v', action = clap::ArgAction::Count)]
    verbose_short: u8,
    /// The same, anywhere on the command line (after `run`, -v is a volume).
    #[arg(long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Machine-readable output, errors included.
    #[arg(long, global = true)]
    json: bool,
    /// Directory of unpacked images [default: /var/lib/bulkhead for root, the user's cache else].
    #[arg(long, global = true, value_name = "DIR")]
    root: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Boot(Box<boot::Args>),
    Ps(ps::Args),
    Exec(exec::Args),
    Logs(control::LogsArgs),
    Console(control::ConsoleArgs),
    Inspect(inspect::Args),
    Stats(stats::Args),
    Dump(control::DumpArgs),
    Pause(control::IdArgs),
    Resume(control::IdArgs),
    Stop(control::StopArgs),
    Kill(control::KillArgs),
    Wasm(wasm::Args),
    Doctor(doctor::Args),
    Setup(setup::Args),
    Completions(CompletionArgs),
}

/// Print a completion script.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: vmmctl completions bash > /etc/bash_completion.d/vmmctl")]
struct CompletionArgs {
    /// The shell.
    shell: clap_complete::Shell,
}

/// What every command may need to know.
#[derive(Debug)]
pub(crate) struct Context {
    json: bool,
    verbose: u8,
    store: PathBuf,
    run_root: PathBuf,
}

impl Context {
    /// Finds a running VM and a way to talk to its owner.
    fn find(&self, id: &str) -> Result<(Found, Arc<Remote>), CliError> {
        let found = rundir::find(&self.run_root, id)?;
        let remote = Arc::new(Remote::new(&found.state.id, &found.path));
        Ok((found, remote))
    }
}

/// Program of the `wasm` command. It is one of its own for the sake of all others: relocating the
/// engine's tables takes about a MiB of memory that a VM's process would have no use for.
const WASM_PROGRAM: &str = "vmmctl-wasm";

/// `vmmctl`: runs the command line; the result is the process's exit code.
pub fn main() -> ExitCode {
    // Both programs have the same command line: it need not be read twice. What stands before the
    // command is read here.
    if std::env::args_os().nth(1).is_some_and(|arg| arg == "wasm") {
        // Where it cannot be run, that is said below.
        let _ = exec_wasm_program();
    }
    start(dispatch)
}

/// `vmmctl-wasm`: runs the command line of `vmmctl wasm`.
pub fn wasm_main() -> ExitCode {
    if let Some(code) = bulkhead_wasm::compiler_main() {
        return code;
    }
    start(|command, context| match command {
        Command::Wasm(args) => wasm::run(args, context),
        other => dispatch(other, context),
    })
}

/// Becomes the program of `vmmctl wasm`, which is installed beside this one.
fn exec_wasm_program() -> CliError {
    let beside = std::env::current_exe()
        .ok()
        .map(|exe| exe.with_file_name(WASM_PROGRAM))
        .filter(|path| path.is_file());
    let program = beside.unwrap_or_else(|| WASM_PROGRAM.into());
    let error = std::process::Command::new(&program)
        // What help and errors call it.
        .arg0("vmmctl")
        .args(std::env::args_os().skip(1))
        .exec();
    CliError::io(
        format!(
            "{} (it belongs beside vmmctl: install it there)",
            program.display()
        ),
        error,
    )
}

/// Parses the command line in a thread of its own: a deep stack that would stay with the main
/// thread, and with the VM's process, goes away with it.
fn parse() -> Result<Cli, clap::Error> {
    std::thread::Builder::new()
        .spawn(Cli::try_parse)
        .ok()
        .and_then(|parser| parser.join().ok())
        .unwrap_or_else(Cli::try_parse)
}

fn start(dispatch: impl FnOnce(Command, &Context) -> Result<u8, CliError>) -> ExitCode {
    crate::one_heap();
    let cli = match parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are no errors; a wrong command line is ours, not the program's.
            let code = if e.use_stderr() { error::FAILED } else { 0 };
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    let context = Context {
        json: cli.json,
        verbose: cli.verbose.saturating_add(cli.verbose_short),
        store: cli
            .root
            .clone()
            .unwrap_or_else(crate::image::Store::default_root),
        run_root: rundir::root(),
    };
    log::init(context.verbose);
    match dispatch(cli.command, &context) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            report(&e, &context);
            ExitCode::from(e.code)
        }
    }
}

fn dispatch(command: Command, context: &Context) -> Result<u8, CliError> {
    if !matches!(command, Command::Completions(_)) {
        let removed = rundir::clean_stale(&context.run_root);
        if context.verbose > 0 && !removed.is_empty() {
            eprintln!(
                "vmmctl: removed what ended VMs left: {}",
                removed.join(", ")
            );
        }
    }
    match command {
        Command::Run(args) => run::run(*args, context),
        Command::Boot(args) => boot::run(*args, context),
        other => look(other, context),
    }
}

/// The commands that hold no VM. Not part of [`dispatch`]: while a VM runs, the stack that they would
/// need lay between its frames and counted as memory of its own.
#[inline(never)]
fn look(command: Command, context: &Context) -> Result<u8, CliError> {
    match command {
        // Run by `dispatch` already.
        Command::Run(args) => run::run(*args, context),
        Command::Boot(args) => boot::run(*args, context),
        Command::Ps(args) => ps::run(&args, context),
        Command::Exec(args) => exec::run(args, context),
        Command::Logs(args) => control::logs(&args, context),
        Command::Console(args) => control::console(&args, context),
        Command::Inspect(args) => inspect::run(&args, context),
        Command::Stats(args) => stats::run(&args, context),
        Command::Dump(args) => control::dump(&args, context),
        Command::Pause(args) => control::each(&args, context, "paused", |vm| vm.pause()),
        Command::Resume(args) => control::each(&args, context, "running", |vm| vm.resume()),
        Command::Stop(args) => control::stop(&args, context),
        Command::Kill(args) => control::kill(&args, context),
        // Of the other program: see `main`.
        Command::Wasm(_) => Err(exec_wasm_program()),
        Command::Doctor(args) => doctor::run(&args, context),
        Command::Setup(args) => setup::run(&args, context),
        Command::Completions(args) => {
            clap_complete::generate(
                args.shell,
                &mut Cli::command(),
                "vmmctl",
                &mut std::io::stdout(),
            );
            Ok(0)
        }
    }
}

fn report(error: &CliError, context: &Context) {
    if error.kind == "interrupted" && !context.json {
        return;
    }
    let mut stderr = std::io::stderr();
    if context.json {
        let body = serde_json::json!({"error": {"kind": error.kind, "message": error.to_string(), "causes": error.chain()}});
        let _ = writeln!(stderr, "{body}");
        return;
    }
    let _ = writeln!(stderr, "error: {error}");
    if context.verbose > 0 {
        for cause in error.chain() {
            let _ = writeln!(stderr, "  caused by: {cause}");
        }
    }
}

/// Prints to standard output; a reader that has gone (`| head`) ends the command quietly.
fn print(text: &str) -> Result<(), CliError> {
    let mut stdout = std::io::stdout();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(CliError::io("standard output", e))
        }
        _ => Ok(()),
    }
}

/// Prints one JSON document.
fn print_json(value: &serde_json::Value) -> Result<(), CliError> {
    print(&format!("{value:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn docker_habits_parse() {
        for line in [
            "vmmctl run busybox.tar -- uname -a",
            "vmmctl run busybox.tar uname -a",
            "vmmctl run -it --rm -v ./d:/data:ro -e A=b -w / -u 1000 --cpus 2 --memory 512M x.tar sh -c ls",
            "vmmctl run --net none --read-only --name web x.tar",
            "vmmctl boot vmlinux --initramfs i --disk d:ro --share t=/tmp --cmdline quiet --gdb 127.0.0.1:1",
            "vmmctl exec -it a41f sh -c ls",
            "vmmctl ps -a --json",
            "vmmctl kill -s TERM a41f",
            "vmmctl stop -t 3 a41f b2",
            "vmmctl inspect a41f --boot --svg out.svg",
            "vmmctl setup containerd --dry-run --io-type streaming",
        ] {
            Cli::try_parse_from(line.split_whitespace()).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
        for line in [
            "vmmctl run",
            "vmmctl run -v x y.tar",
            "vmmctl run --memory 0 y",
            "vmmctl run --cpus 0 y",
            "vmmctl nope",
        ] {
            assert!(
                Cli::try_parse_from(line.split_whitespace()).is_err(),
                "{line}"
            );
        }
    }
}
