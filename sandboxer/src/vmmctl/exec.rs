//! `vmmctl exec`: another program in a running VM.

use std::io::IsTerminal;
use std::sync::Arc;

use super::Context;
use super::error::CliError;
use super::signals::Signals;
use super::terminal::{self, RawMode};
use crate::engine::Sandbox;
use crate::engine::agent::Agent;
use crate::engine::container::{Process, Wiring};
use crate::spec::{self, Overrides};

/// Run another program in a running VM.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vmmctl exec a41f ps
  vmmctl exec -it a41f sh")]
pub struct Args {
    /// Id or name of the VM.
    id: String,
    /// Command and arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// Pass standard input on.
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Environment: KEY=VALUE, or KEY to pass on our own.
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Working directory.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
}

/// `KEY=VALUE` as it is, `KEY` with our own value if there is one.
pub fn environment(wanted: &[String]) -> Vec<String> {
    wanted
        .iter()
        .filter_map(|entry| match entry.contains('=') {
            true => Some(entry.clone()),
            false => std::env::var(entry)
                .ok()
                .map(|value| format!("{entry}={value}")),
        })
        .collect()
}

/// Runs the command.
pub fn run(args: Args, context: &Context) -> Result<u8, CliError> {
    let (found, remote) = context.find(&args.id)?;
    let Some(container) = found.state.spec.as_ref() else {
        return Err(CliError::new(
            "no_container",
            format!(
                "VM {}: runs a bare kernel, no container to execute in",
                found.state.id
            ),
        ));
    };
    if args.tty && args.interactive && !std::io::stdin().is_terminal() {
        return Err(CliError::new(
            "no_terminal",
            "-t with -i needs a terminal on standard input; leave -t out",
        ));
    }
    let wish = Overrides {
        command: args.command.clone(),
        env: environment(&args.env),
        workdir: args.workdir.clone(),
        terminal: args.tty,
        ..Overrides::default()
    };
    let process = spec::exec_process(container, &wish)?;
    let signals = Signals::install().map_err(|e| CliError::io("signals", e))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::io("starting the runtime", e))?;
    let result = runtime.block_on(session(&args, &found.state.id, remote, &process, &signals));
    runtime.shutdown_background();
    let code = result?;
    if context.json {
        eprintln!(
            "{}",
            serde_json::json!({"id": found.state.id, "command": args.command, "exit_code": code})
        );
    }
    Ok(code)
}

async fn session(
    args: &Args,
    container: &str,
    sandbox: Arc<dyn Sandbox>,
    process: &serde_json::Value,
    signals: &Signals,
) -> Result<u8, CliError> {
    let agent = Agent::connect(sandbox).await?;
    let name = format!("exec-{}-{:x}", std::process::id(), crate::rundir::now_ms());
    let wiring = Wiring {
        stdin: args.interactive,
        terminal: args.tty,
    };
    let process = Process::exec(agent, container, &name, process, wiring).await?;
    let raw = if args.tty && args.interactive {
        RawMode::enter().map_err(|e| CliError::io("terminal", e))?
    } else {
        None
    };
    process.start().await?;
    if args.tty
        && let Some((width, height)) = terminal::size()
    {
        process.resize(width, height).await?;
    }
    let watched = signals.watch().map_err(|e| CliError::io("signals", e))?;
    let code = {
        let wait = process.wait();
        tokio::pin!(wait);
        loop {
            tokio::select! {
                code = &mut wait => break code?,
                guard = watched.readable() => {
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                    for signal in signals.take() {
                        // The program may just have ended.
                        let _ = match (signal, terminal::size()) {
                            (libc::SIGWINCH, Some((width, height))) => process.resize(width, height).await,
                            (libc::SIGWINCH, None) => Ok(()),
                            _ => process.kill(u32::try_from(signal).unwrap_or(15)).await,
                        };
                    }
                }
            }
        }
    };
    process.finish().await;
    drop(raw);
    Ok(u8::try_from(code & 0xff).unwrap_or(super::error::FAILED))
}
