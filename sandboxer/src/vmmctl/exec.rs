//! `vmmctl exec`: another program in a running VM.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::Context;
use super::error::CliError;
use super::signals::Signals;
use super::terminal::{self, RawMode};
use crate::engine::Sandbox;
use crate::engine::agent::Agent;
use crate::engine::container::{Process, Wiring};
use crate::rundir::State;
use crate::spec::{self, Overrides};

/// Run another program in a running VM.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vmmctl exec a41f ps
  vmmctl exec -it a41f sh
  vmmctl exec --container web a41f ps      (a pod of containerd's)")]
pub struct Args {
    /// Id or name of the VM.
    id: String,
    /// Command and arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// Which container of a pod, by name or the beginning of its id; needed if there are several.
    #[arg(short, long, value_name = "NAME|ID")]
    container: Option<String>,
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

/// Id and OCI spec of the container that is meant.
fn container(vm: &State, wanted: Option<&str>) -> Result<(String, Value), CliError> {
    let wrong = |reason: String| CliError::new("no_container", format!("VM {}: {reason}", vm.id));
    if let Some(spec) = &vm.spec {
        return Ok((vm.id.clone(), spec.clone()));
    }
    if vm.mode != "pod" {
        return Err(wrong(
            "runs a bare kernel, no container to execute in".into(),
        ));
    }
    let all = vm.containers.iter().map(|(id, bundle)| {
        let spec = read_spec(bundle).unwrap_or_default();
        let name = spec["annotations"]["io.kubernetes.cri.container-name"].as_str();
        (id.clone(), name.unwrap_or_default().to_owned(), spec)
    });
    let all: Vec<_> = all.collect();
    let mut meant = all.iter().filter(|(id, name, _)| {
        wanted.is_none_or(|wanted| !wanted.is_empty() && (name == wanted || id.starts_with(wanted)))
    });
    match (meant.next(), meant.next()) {
        (Some((id, _, spec)), None) => Ok((id.clone(), spec.clone())),
        _ if all.is_empty() => Err(wrong("the pod has no container".into())),
        (found, _) => {
            let names: Vec<String> = all
                .iter()
                .map(|(id, name, _)| format!("{name} ({})", id.get(..13).unwrap_or(id)))
                .collect();
            let problem = match found {
                Some(_) => "say which container is meant by --container",
                None => "no container of the pod has this name or id",
            };
            Err(wrong(format!("{problem}: {}", names.join(", "))))
        }
    }
}

/// The spec of a container of containerd's; its daemon checked it when it made the container.
fn read_spec(bundle: &Path) -> std::io::Result<Value> {
    let text = std::fs::read(bundle.join("config.json"))?;
    Ok(serde_json::from_slice(&text)?)
}

/// Runs the command.
pub fn run(args: Args, context: &Context) -> Result<u8, CliError> {
    let (found, remote) = context.find(&args.id)?;
    let (container, container_spec) = container(&found.state, args.container.as_deref())?;
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
    let process = spec::exec_process(&container_spec, &wish)?;
    let signals = Signals::install().map_err(|e| CliError::io("signals", e))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::io("starting the runtime", e))?;
    let result = runtime.block_on(session(&args, &container, remote, &process, &signals));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_container_is_found_by_name_and_id() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut vm = State {
            id: "a41f".into(),
            mode: "pod".into(),
            ..State::default()
        };
        let find = |vm: &State, wanted: Option<&str>| container(vm, wanted).map(|(id, _)| id);
        assert!(find(&vm, None).is_err());
        for (id, name) in [("12aaaaaaaaaaaaaa", "web"), ("12bbbbbbbbbbbbbb", "log")] {
            let bundle = dir.path().join(id);
            std::fs::create_dir(&bundle).expect("mkdir");
            let spec = serde_json::json!({
                "annotations": {"io.kubernetes.cri.container-name": name},
                "process": {"cwd": "/"},
            });
            std::fs::write(bundle.join("config.json"), spec.to_string()).expect("write");
            vm.containers.insert(id.into(), bundle);
            if name == "web" {
                assert_eq!(find(&vm, None).expect("the only one"), id);
            }
            assert_eq!(find(&vm, Some(name)).expect("by name"), id);
            assert_eq!(find(&vm, Some(&id[..3])).expect("by id"), id);
        }
        let text = |e: CliError| e.to_string();
        let error = find(&vm, None).map_err(text).expect_err("two");
        assert!(
            error.contains("--container") && error.contains("web (12aaa"),
            "{error}"
        );
        let error = find(&vm, Some("12")).map_err(text).expect_err("two");
        assert!(error.contains("--container"), "{error}");
        let error = find(&vm, Some("x")).map_err(text).expect_err("none");
        assert!(error.contains("no container"), "{error}");
        vm.mode = "boot".into();
        let error = find(&vm, None).map_err(text).expect_err("bare");
        assert!(error.contains("bare kernel"), "{error}");
    }
}
