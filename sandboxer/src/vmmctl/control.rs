//! Commands that act on running VMs: pause, resume, stop, kill, dump, console, logs.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::CliError;
use super::terminal::RawMode;
use super::{Context, print, print_json};
use crate::debug::Remote;
use crate::engine::agent::{Agent, spawn_brief};
use crate::engine::{EngineError, Sandbox, container};
use crate::{timeouts, units};

/// Stop time in VMs, or let it go on.
#[derive(Debug, clap::Args)]
pub struct IdArgs {
    /// Ids or names of VMs.
    #[arg(required = true)]
    ids: Vec<String>,
}

/// Acts on each VM; the first failure is reported after all were tried.
pub fn each(
    args: &IdArgs,
    context: &Context,
    state: &str,
    act: impl Fn(&Remote) -> Result<(), EngineError>,
) -> Result<u8, CliError> {
    for_all(&args.ids, context, state, |id| {
        let (found, remote) = context.find(id)?;
        act(&remote)?;
        Ok(found.state.id)
    })
}

fn for_all(
    ids: &[String],
    context: &Context,
    state: &str,
    act: impl Fn(&String) -> Result<String, CliError>,
) -> Result<u8, CliError> {
    let mut first_error = None;
    for id in ids {
        match act(id) {
            Ok(id) if context.json => print_json(&serde_json::json!({"id": id, "state": state}))?,
            Ok(id) => print(&format!("{id}\n"))?,
            Err(e) => first_error = first_error.or(Some(e)),
        }
    }
    first_error.map_or(Ok(0), Err)
}

/// Stop VMs: SIGTERM to the program, the end for good after a while.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: vmmctl stop -t 3 a41f")]
pub struct StopArgs {
    /// Ids or names of VMs.
    #[arg(required = true)]
    ids: Vec<String>,
    /// Seconds the program gets to end by itself.
    #[arg(short, long, default_value_t = 10)]
    time: u32,
}

/// Stops VMs and waits until they are gone.
pub fn stop(args: &StopArgs, context: &Context) -> Result<u8, CliError> {
    let grace = Duration::from_secs(args.time.into());
    for_all(&args.ids, context, "stopped", |id| {
        let (found, remote) = context.find(id)?;
        remote.stop(grace)?;
        // Its owner holds this lock until all is cleaned up.
        let lock = found.path.join("lock");
        let (sender, receiver) = mpsc::channel();
        spawn_brief("wait", move || {
            let _ = sender.send(wait_for_lock(&lock));
        })?;
        let within = grace + timeouts::shutdown() + timeouts::debug();
        match receiver.recv_timeout(within) {
            Ok(Ok(())) => Ok(found.state.id),
            Ok(Err(e)) => Err(CliError::io(
                format!("waiting for VM {}", found.state.id),
                e,
            )),
            Err(_) => Err(CliError::new(
                "stop_timeout",
                format!(
                    "VM {}: process {} does not end; kill it with kill -9 {}",
                    found.state.id, found.state.pid, found.state.pid
                ),
            )),
        }
    })
}

fn wait_for_lock(path: &std::path::Path) -> io::Result<()> {
    match std::fs::File::open(path) {
        Ok(file) => file.lock_shared(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// Send a signal to the programs of VMs.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: vmmctl kill -s HUP web")]
pub struct KillArgs {
    /// Ids or names of VMs.
    #[arg(required = true)]
    ids: Vec<String>,
    /// Signal by name or number.
    #[arg(short, long, default_value = "KILL", value_parser = units::signal)]
    signal: u32,
}

/// Sends signals.
pub fn kill(args: &KillArgs, context: &Context) -> Result<u8, CliError> {
    for_all(&args.ids, context, "signalled", |id| {
        let (found, remote) = context.find(id)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| CliError::io("starting the runtime", e))?;
        let vm = found.state.id.clone();
        let result = runtime.block_on(async {
            let agent = Agent::connect(remote).await?;
            if !found.state.containers.is_empty() {
                // A pod: those of its containers that have ended take no signal.
                let (mut sent, mut error) = (false, None);
                for id in found.state.containers.keys() {
                    match container::kill(&agent, id, "", args.signal).await {
                        Ok(()) => sent = true,
                        Err(e) => error = error.or(Some(e)),
                    }
                }
                return error.filter(|_| !sent).map_or(Ok(()), Err);
            }
            container::kill(&agent, &vm, "", args.signal).await
        });
        runtime.shutdown_background();
        result?;
        Ok(found.state.id)
    })
}

/// Write a VM's memory and registers to a core file for gdb or crash.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: vmmctl dump a41f core && gdb vmlinux core")]
pub struct DumpArgs {
    /// Id or name of the VM.
    id: String,
    /// The file; must not exist.
    file: PathBuf,
}

/// Writes a core.
pub fn dump(args: &DumpArgs, context: &Context) -> Result<u8, CliError> {
    let (found, remote) = context.find(&args.id)?;
    if args.file.exists() {
        return Err(CliError::new(
            "file_exists",
            format!(
                "{}: exists already; choose another name",
                args.file.display()
            ),
        ));
    }
    remote.dump(&args.file)?;
    let bytes = std::fs::metadata(&args.file).map_or(0, |m| m.len());
    if context.json {
        print_json(&serde_json::json!({"id": found.state.id, "file": args.file, "bytes": bytes}))?;
    } else {
        print(&format!(
            "{}  {}\n",
            args.file.display(),
            units::bytes(bytes)
        ))?;
    }
    Ok(0)
}

/// Print the guest's console.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: vmmctl logs -f a41f")]
pub struct LogsArgs {
    /// Id or name of the VM.
    id: String,
    /// Go on until the VM ends.
    #[arg(short, long)]
    follow: bool,
}

/// Prints the console's last 32 KiB, and more with `-f`.
pub fn logs(args: &LogsArgs, context: &Context) -> Result<u8, CliError> {
    let (_, remote) = context.find(&args.id)?;
    let mut stream = remote.console()?;
    let failed = |e| CliError::io("console", e);
    if args.follow {
        let copied = io::copy(&mut stream, &mut io::stdout());
        return match copied {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(failed(e)),
            _ => Ok(0),
        };
    }
    // The tail is there at once; silence means that it was all.
    stream
        .set_read_timeout(Some(Duration::from_millis(200)))
        .map_err(failed)?;
    let mut buffer = [0u8; 4096];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        io::stdout()
            .write_all(buffer.get(..n).unwrap_or_default())
            .map_err(failed)?;
    }
    Ok(0)
}

/// Attach to the guest's console; Ctrl-] leaves.
#[derive(Debug, clap::Args)]
pub struct ConsoleArgs {
    /// Id or name of the VM.
    id: String,
}

/// Connects terminal and console until Ctrl-], the end of input, or of the VM.
pub fn console(args: &ConsoleArgs, context: &Context) -> Result<u8, CliError> {
    const ESCAPE: u8 = 0x1d;
    let (_, remote) = context.find(&args.id)?;
    let mut stream = remote.console()?;
    let failed = |e: io::Error| CliError::io("console", e);
    let raw = RawMode::enter().map_err(failed)?;
    if raw.is_some() {
        eprint!("attached; Ctrl-] leaves\r\n");
    }
    let stdin = io::stdin();
    let mut buffer = [0u8; 4096];
    let mut typing = true;
    loop {
        let mut fds = [
            PollFd::new(stream.as_fd(), PollFlags::POLLIN),
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
        ];
        let used = if typing { 2 } else { 1 };
        match poll(fds.get_mut(..used).unwrap_or_default(), PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(failed(e.into())),
        }
        let [from_guest, from_user] = fds.map(|fd| fd.any().unwrap_or(false));
        if from_guest {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return Ok(0),
                Ok(n) => {
                    let mut stdout = io::stdout();
                    stdout
                        .write_all(buffer.get(..n).unwrap_or_default())
                        .and_then(|()| stdout.flush())
                        .map_err(failed)?;
                }
            }
        }
        if typing && from_user {
            let n = nix::unistd::read(&stdin, &mut buffer).unwrap_or(0);
            let keys = buffer.get(..n).unwrap_or_default();
            if raw.is_some() && keys.contains(&ESCAPE) {
                let _ = stream.shutdown(Shutdown::Both);
                return Ok(0);
            }
            typing = n > 0;
            if stream.write_all(keys).is_err() {
                return Ok(0);
            }
        }
    }
}
