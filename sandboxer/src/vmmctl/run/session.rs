//! From the first instruction to the program's end: boot, set up, start, pass signals on, shut
//! down. Everything on one thread; what the guest does not answer is bounded by time-outs, and
//! the user, another vmmctl or the VM's own end can cut it short at any moment.

use std::cell::RefCell;
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_protocol::CONTROL_PORT;
use bulkhead_protocol::sandbox::{
    ConfigureSandboxRequest, Interface, Route, SetTimeRequest, Share, ShutdownRequest,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use tokio::sync::oneshot;

use super::{Args, Outcome, Prepared, warn};
use crate::debug;
use crate::engine::EngineError;
use crate::engine::agent::{Agent, failed};
use crate::engine::container::{Process, Wiring, kill};
use crate::engine::microvm::MicroVm;
use crate::engine::microvm::share::PodShare;
use crate::engine::stdio::watch;
use crate::rundir;
use crate::timeouts;
use crate::vmmctl::error::CliError;
use crate::vmmctl::signals::Signals;
use crate::vmmctl::terminal::{self, RawMode};

/// Two Ctrl-C within this time end the VM at once.
const IMPATIENCE: Duration = Duration::from_secs(2);
/// First and longest pause between two attempts to reach an agent that is not listening yet.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// Where the session is; says what signals and the VM's end mean.
enum Phase {
    Booting,
    Running(Agent),
    Leaving,
}

/// What was made for the session and what happens around it.
struct Surroundings<'a> {
    signals: &'a Signals,
    signalled: AsyncFd<OwnedFd>,
    vm_end: AsyncFd<OwnedFd>,
    stop: AsyncFd<OwnedFd>,
    debug: UnixListener,
    vm: Arc<MicroVm>,
    container: String,
    phase: RefCell<Phase>,
}

/// Runs the prepared VM to the end of its program.
pub(super) fn drive(
    args: &Args,
    signals: &Signals,
    prepared: &mut Prepared,
) -> Result<Outcome, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::io("starting the runtime", e))?;
    let result = runtime.block_on(async {
        let around = Surroundings::new(signals, prepared)?;
        prepared.vm.vm().start()?;
        let session = session(args, prepared, &around);
        around.watch(session).await
    });
    // Threads that still wait for the guest are not waited for.
    runtime.shutdown_background();
    result
}

fn watchable(fd: &impl AsRawFd) -> Result<AsyncFd<OwnedFd>, CliError> {
    // SAFETY: the caller's descriptor is open; it is only duplicated.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    fd.try_clone_to_owned()
        .and_then(|fd| watch(fd, Interest::READABLE))
        .map_err(|e| CliError::io("watching the VM", e))
}

impl<'a> Surroundings<'a> {
    fn new(signals: &'a Signals, prepared: &Prepared) -> Result<Self, CliError> {
        let failed = |e: std::io::Error| CliError::io("watching the VM", e);
        let socket = prepared.dir.path().join("debug.sock");
        let listener = debug::bind(&socket)
            .map_err(|e| CliError::io(format!("debug socket {}", socket.display()), e))?;
        Ok(Self {
            signals,
            signalled: signals.watch().map_err(failed)?,
            vm_end: watchable(prepared.vm.vm().exit_event())?,
            stop: watchable(&prepared.vm.stop_event())?,
            debug: UnixListener::from_std(listener).map_err(failed)?,
            vm: Arc::clone(&prepared.vm),
            container: prepared.dir.id().to_owned(),
            phase: RefCell::new(Phase::Booting),
        })
    }

    /// Drives the session and everything that can happen meanwhile.
    async fn watch(
        &self,
        session: impl Future<Output = Result<Outcome, CliError>>,
    ) -> Result<Outcome, CliError> {
        tokio::pin!(session);
        let mut last_interrupt: Option<Instant> = None;
        let mut force_at: Option<tokio::time::Instant> = None;
        loop {
            let deadline = async {
                match force_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                result = &mut session => return match result {
                    // The broken connection is only a symptom.
                    Err(e) if e.kind == "agent" && self.vm.vm().exit_reason().is_some() => Err(self.vm.ended(self.during()).into()),
                    result => result,
                },
                () = unexpected(self.vm_end.readable(), || self.leaving()) => return Err(self.vm.ended(self.during()).into()),
                guard = self.signalled.readable() => {
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                    for signal in self.signals.take() {
                        if let Some(end) = self.signal(signal, &mut last_interrupt) {
                            return Err(end);
                        }
                    }
                }
                guard = self.stop.readable() => {
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                    if let Some(grace) = self.vm.take_stop().filter(|_| !self.leaving()) {
                        force_at = Some(tokio::time::Instant::now() + grace);
                        self.forward(15);
                        if matches!(*self.phase.borrow(), Phase::Booting) {
                            return Err(CliError::new("stopped", "stopped before the program was started").code(143));
                        }
                    }
                }
                accepted = self.debug.accept() => {
                    if let Ok(stream) = accepted.and_then(|(stream, _)| stream.into_std()) {
                        debug::serve_connection(stream, self.vm.clone());
                    }
                }
                // As asked for, and as if killed.
                () = deadline => return Ok(Outcome { exit_code: 137, boot: Duration::ZERO }),
            }
        }
    }

    fn leaving(&self) -> bool {
        matches!(*self.phase.borrow(), Phase::Leaving)
    }

    fn during(&self) -> &'static str {
        match *self.phase.borrow() {
            Phase::Booting => "booting",
            Phase::Running(_) => "the program was running",
            Phase::Leaving => "shutting down",
        }
    }

    /// Acts on a signal sent to us; an error ends the session.
    fn signal(&self, signal: i32, last_interrupt: &mut Option<Instant>) -> Option<CliError> {
        if signal == libc::SIGWINCH {
            self.resize();
            return None;
        }
        if signal == libc::SIGINT
            && last_interrupt
                .replace(Instant::now())
                .is_some_and(|t| t.elapsed() < IMPATIENCE)
        {
            return Some(CliError::interrupted());
        }
        if matches!(*self.phase.borrow(), Phase::Running(_)) {
            self.forward(u32::try_from(signal).unwrap_or(15));
            return None;
        }
        let code = u8::try_from(128 + signal).unwrap_or(super::super::error::FAILED);
        Some(CliError::interrupted().code(code))
    }

    fn forward(&self, signal: u32) {
        if let Phase::Running(agent) = &*self.phase.borrow() {
            let (agent, container) = (agent.clone(), self.container.clone());
            // The program may have ended meanwhile; then there is nobody to tell.
            tokio::spawn(async move { kill(&agent, &container, "", signal).await });
        }
    }

    fn resize(&self) {
        if let (Phase::Running(agent), Some((width, height))) =
            (&*self.phase.borrow(), terminal::size())
        {
            let request = bulkhead_protocol::task::ResizePtyRequest {
                id: self.container.clone(),
                width: width.into(),
                height: height.into(),
                ..Default::default()
            };
            let tasks = agent.tasks();
            tokio::spawn(async move { tasks.resize_pty(&request).await });
        }
    }
}

/// Completes at the VM's end if nobody has asked for it by then. What was asked for is looked at when
/// the end comes, not before: the session gets there while this waits.
async fn unexpected(end: impl Future, leaving: impl Fn() -> bool) {
    end.await;
    if leaving() {
        std::future::pending::<()>().await;
    }
}

/// The straight way.
async fn session(
    args: &Args,
    prepared: &mut Prepared,
    around: &Surroundings<'_>,
) -> Result<Outcome, CliError> {
    let vm = Arc::clone(&prepared.vm);
    let agent = reach_agent(&vm).await?;
    vm.vm().mark("agent answers");
    tokio::try_join!(agent.hello(), configure(&agent, prepared))?;
    let wiring = Wiring {
        stdin: args.interactive,
        terminal: args.tty,
    };
    // Only now: an error up to here is printed on an ordinary terminal.
    let raw = if args.tty && args.interactive {
        RawMode::enter().map_err(|e| CliError::io("terminal", e))?
    } else {
        None
    };
    let id = prepared.dir.id().to_owned();
    let process = Process::create(
        agent.clone(),
        &id,
        &PodShare::guest_root(&id),
        &prepared.spec,
        wiring,
    )
    .await?;
    if args.tty
        && let Some((width, height)) = terminal::size()
    {
        process.resize(width, height).await?;
    }
    process.start().await?;
    vm.vm().mark("process started");
    let boot = prepared.vm_begin.elapsed();
    *around.phase.borrow_mut() = Phase::Running(agent.clone());
    prepared.dir.update(|s| s.state = "running".into())?;
    let exit_code = process.wait().await?;
    process.finish().await;
    drop(raw);
    *around.phase.borrow_mut() = Phase::Leaving;
    prepared.dir.update(|s| s.state = "stopping".into())?;
    // An answer is not needed: the VM is ended if the guest does not end itself.
    let request = ShutdownRequest { grace_ms: 0 };
    let sandbox = agent.sandbox();
    let shut_down = async {
        tokio::select! {
            // Its end may be known before its answer, or instead of it.
            _ = around.vm_end.readable() => {}
            _ = sandbox.shutdown(&request) => {
                let _ = around.vm_end.readable().await;
            }
        }
    };
    let _ = tokio::time::timeout(timeouts::shutdown(), shut_down).await;
    Ok(Outcome { exit_code, boot })
}

/// Connects to the agent as soon as it listens.
async fn reach_agent(vm: &Arc<MicroVm>) -> Result<Agent, EngineError> {
    let within = timeouts::boot();
    let attempts = async {
        let mut pause = RETRY.0;
        loop {
            if let Ok(stream) = dial_control(vm).await? {
                return Agent::new(vm.clone(), stream);
            }
            // Refused: the kernel is up, the agent not yet.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
        }
    };
    match tokio::time::timeout(within, attempts).await {
        Ok(result) => result,
        Err(_) => Err(vm.hangs("waiting for the agent", within)),
    }
}

type Dialled = std::io::Result<std::os::unix::net::UnixStream>;

/// One attempt, without a thread: the device's thread tells.
async fn dial_control(vm: &Arc<MicroVm>) -> Result<Dialled, EngineError> {
    let vsock = vm
        .vm()
        .vsock()
        .ok_or_else(|| EngineError::io("vsock")(std::io::ErrorKind::Unsupported.into()))?;
    let (sender, receiver) = oneshot::channel();
    let attempt = vsock.start_connect(CONTROL_PORT, move |outcome| {
        let _ = sender.send(outcome);
    });
    match attempt {
        Ok(attempt) => {
            let outcome = receiver.await;
            drop(attempt);
            Ok(outcome.unwrap_or_else(|_| Err(std::io::ErrorKind::NotConnected.into())))
        }
        Err(e) => Ok(Err(e)),
    }
}

async fn configure(agent: &Agent, prepared: &Prepared) -> Result<(), EngineError> {
    let shares = prepared
        .share
        .guest_mounts()
        .into_iter()
        .map(|(tag, path, read_only)| Share {
            tag,
            path,
            options: if read_only {
                vec!["ro".into()]
            } else {
                Vec::new()
            },
        })
        .collect();
    let (mut interfaces, mut routes) = (Vec::new(), Vec::new());
    if let Some((host, guest)) = prepared.tap {
        interfaces.push(Interface {
            name: "eth0".into(),
            addresses: vec![format!("{guest}/30")],
            ..Interface::default()
        });
        routes.push(Route {
            gateway: host.to_string(),
            ..Route::default()
        });
    }
    let request = ConfigureSandboxRequest {
        hostname: prepared.spec.json["hostname"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        shares,
        interfaces,
        routes,
        ..ConfigureSandboxRequest::default()
    };
    let now = Duration::from_millis(rundir::now_ms());
    let time = SetTimeRequest {
        seconds: i64::try_from(now.as_secs()).unwrap_or(0),
        nanos: now.subsec_nanos(),
    };
    let sandbox = agent.sandbox();
    let (configured, timed) =
        tokio::join!(sandbox.configure_sandbox(&request), sandbox.set_time(&time));
    for warning in configured
        .map_err(failed("setting up the sandbox"))?
        .warnings
    {
        warn(&warning);
    }
    timed
        .map(|_| ())
        .map_err(failed("setting the guest's clock"))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn an_end_that_was_asked_for_while_waiting_is_not_an_error() {
        for asked in [true, false] {
            let leaving = Cell::new(false);
            let (send, receive) = oneshot::channel();
            let session = async {
                leaving.set(asked);
                // The guest is gone before it has answered.
                let _ = send.send(());
                tokio::task::yield_now().await;
            };
            let session_won = tokio::select! {
                biased;
                () = session => true,
                () = unexpected(receive, || leaving.get()) => false,
            };
            assert_eq!(session_won, asked);
        }
    }
}
