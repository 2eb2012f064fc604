//! The jailed process: the engine, with the programs of one pod, for as long as its keeper wants it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use bulkhead_vmm::seccomp::confine_wasm_process;
use bulkhead_wasm::{
    Allocation, Code, Container, Engine, EngineConfig, Network, Pod, Stdio, WasmError,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::Interest;
use tokio::task::LocalSet;

use super::message::{Order, Refusal, Report, Settings};
use crate::daemon::wasm::place::{ProgramWish, ROOTS};
use crate::daemon::wasm::threads::{container_config, pod_config};
use crate::daemon::worker::channel::Channel;
use crate::daemon::worker::run::{channel_failed, start};
use crate::engine::stdio;

/// How the program is told that it is to be one.
pub const ARGUMENT: &str = "--bulkhead-wasm-worker";
/// Longest wish: the kernel takes no more for a program's arguments and variables either.
const MAX_WISH: u64 = 8 << 20;

/// Runs it; the channel to the keeper is standard input.
pub fn main() -> ExitCode {
    start(confine_wasm_process, run)
}

fn run(keeper: &Channel) -> Result<(), String> {
    let Some((Order::Pod(settings), _)) = keeper.receive().map_err(channel_failed)? else {
        return Ok(());
    };
    let engine = engine(&settings).map_err(|e| e.to_string())?;
    let network = match settings.network {
        // This process is in the pod's.
        true => Network::Host,
        false => Network::None,
    };
    let config = pod_config(
        &settings.id,
        network,
        &settings.resolv,
        settings.memory_bytes,
    );
    let pod = Pod::new(&engine, config);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(|e| format!("its runtime: {e}"))?;
    keeper.send(&Report::Ready, &[]).map_err(channel_failed)?;
    let worker = Worker {
        keeper,
        engine,
        pod,
        programs: HashMap::new(),
    };
    let tasks = LocalSet::new();
    tasks.block_on(&runtime, worker.serve())
}

fn engine(settings: &Settings) -> Result<Engine, WasmError> {
    let mut config = EngineConfig {
        // One pod has few programs; what is reserved beforehand costs memory, too.
        allocation: Allocation::OnDemand,
        cache: None,
        ..EngineConfig::default()
    };
    config.compiler.inlining = settings.inlining;
    Engine::new(&config)
}

struct Worker<'a> {
    keeper: &'a Channel,
    engine: Engine,
    pod: Pod,
    programs: HashMap<u64, Container>,
}

impl Worker<'_> {
    async fn serve(mut self) -> Result<(), String> {
        let watched = self.keeper.as_fd().try_clone_to_owned();
        let watched = watched.and_then(|fd| stdio::watch(fd, Interest::READABLE));
        let watched = watched.map_err(channel_failed)?;
        // What programs have ended; told by the only one that speaks to the keeper.
        let ends: Rc<RefCell<Vec<Report>>> = Rc::default();
        let more = Rc::new(tokio::sync::Notify::new());
        loop {
            tokio::select! {
                ready = watched.readable() => {
                    ready.map_err(channel_failed)?.clear_ready();
                    // All that has come: a new one is told of only once.
                    loop {
                        let order = match self.keeper.look_with_fds::<Order>() {
                            Ok(Some(order)) => order,
                            // The keeper has gone, and with it the pod.
                            Ok(None) => return Ok(()),
                            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                            Err(error) => return Err(channel_failed(error)),
                        };
                        if let Some(started) = self.obey(order)? {
                            let (ends, more) = (Rc::clone(&ends), Rc::clone(&more));
                            tokio::task::spawn_local(async move {
                                let (program, container) = started;
                                let ended = container.ended().await.into();
                                ends.borrow_mut().push(Report::Ended { program, ended });
                                more.notify_one();
                            });
                        }
                    }
                }
                () = more.notified() => {
                    let ends = std::mem::take(&mut *ends.borrow_mut());
                    for end in &ends {
                        self.tell(end)?;
                    }
                }
            }
        }
    }

    /// Nothing may be lost: waits while the keeper is busy.
    fn tell(&self, report: &Report) -> Result<(), String> {
        loop {
            match self.keeper.send(report, &[]) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(self.keeper.as_fd(), PollFlags::POLLOUT)];
                    let _ = poll(&mut fds, PollTimeout::NONE);
                }
                other => return other.map_err(channel_failed),
            }
        }
    }

    /// Does what it is told; a program that was started has to be waited for.
    fn obey(
        &mut self,
        (order, fds): (Order, Vec<OwnedFd>),
    ) -> Result<Option<(u64, Container)>, String> {
        match order {
            Order::Pod(_) => return Err("it is told twice which pod it is".into()),
            Order::Create {
                ask,
                program,
                name,
                inlined,
                streams,
            } => {
                let refused = match self.create(&name, inlined, streams, fds) {
                    Ok(container) => {
                        self.programs.insert(program, container);
                        None
                    }
                    Err(refusal) => Some(refusal),
                };
                self.tell(&Report::Done { ask, refused })?;
            }
            Order::Start { ask, program } => {
                let container = self.programs.get(&program).cloned();
                let refused = match &container {
                    Some(container) => container.start().err().map(|e| refusal(&e)),
                    None => Some(broken("there is no such program")),
                };
                let started = refused.is_none();
                self.tell(&Report::Done { ask, refused })?;
                return Ok(container.filter(|_| started).map(|c| (program, c)));
            }
            Order::Signal { program, signal } => {
                if let Some(container) = self.programs.get(&program) {
                    // One that has ended meanwhile refuses it; who has sent it learns of the end.
                    let _ = container.signal(signal);
                }
            }
            Order::MemoryLimit { program, bytes } => {
                if let Some(container) = self.programs.get(&program) {
                    container.set_memory_limit(bytes);
                }
            }
            Order::CpuShare { program, milli } => {
                if let Some(container) = self.programs.get(&program) {
                    container.set_cpu_share(milli);
                }
            }
            Order::Stats { ask, program } => {
                let container = self.programs.get(&program);
                let usage = container.map(|c| c.stats().into());
                self.tell(&Report::Uses { ask, usage })?;
            }
            Order::Remove { program } => drop(self.programs.remove(&program)),
        }
        Ok(None)
    }

    fn create(
        &self,
        name: &str,
        inlined: bool,
        streams: [bool; 3],
        fds: Vec<OwnedFd>,
    ) -> Result<Container, Refusal> {
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or_else(|| broken("a descriptor is missing"));
        let wish = read_wish(next()?).map_err(|e| broken(format!("its settings: {e}")))?;
        let code = next()?;
        // SAFETY: from our keeper, which has it from a loader: this very program, started from the
        // same file as we are (see `jailed::loader`).
        let code = unsafe { Code::received(name, code, inlined) };
        let mut ends = [Stdio::Null, Stdio::Null, Stdio::Null];
        for (end, _) in ends.iter_mut().zip(streams).filter(|(_, there)| *there) {
            *end = Stdio::Fd(next()?);
        }
        let program = self.engine.program(&code).map_err(|e| refusal(&e))?;
        let config = container_config(program, wish, Path::new("/").join(ROOTS), ends);
        self.pod.create(config).map_err(|e| refusal(&e))
    }
}

fn read_wish(file: OwnedFd) -> io::Result<ProgramWish> {
    let mut text = Vec::new();
    File::from(file).take(MAX_WISH).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

fn refusal(error: &WasmError) -> Refusal {
    Refusal {
        invalid: crate::daemon::wasm::is_invalid(error),
        text: error.to_string(),
    }
}

fn broken(text: impl Into<String>) -> Refusal {
    Refusal {
        invalid: false,
        text: text.into(),
    }
}
