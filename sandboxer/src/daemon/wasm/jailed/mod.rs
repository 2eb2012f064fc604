//! Programs in a jailed process of the pod, for `wasm.isolation = "process"`: the keeper's side.
//!
//! As with VMs ([`crate::daemon::worker`]), everything about a pod but its programs stays in the
//! keeper: containerd's calls, images and volumes, standard streams. The process gets descriptors:
//! of machine code, which a [`loader`] has found or had made, and of streams; and mounts, which the
//! keeper brings into its jail. What it says is little: that a program has started, what it uses,
//! how it has ended ([`message`]).

pub mod loader;
pub mod message;
pub mod worker;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::rpc::{Code, Status as RpcStatus};
use bulkhead_wasm::{Source, Stats, Status, Stdio};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use super::place::{Ended, Net, Place, PodWish, Program, ProgramWish, Programs, ROOTS};
use super::precondition;
use crate::daemon::cgroup::{CpuShare, Used};
use crate::daemon::config::{Config, Wasm as Settings};
use crate::daemon::pod::blocking;
use crate::daemon::process::cgroup::{self, PodCgroup};
use crate::daemon::program;
use crate::daemon::sandbox::{Answer, OwnEnd, Plan};
use crate::daemon::state::State;
use crate::daemon::vm::resources;
use crate::daemon::worker::channel::Begin;
use crate::daemon::worker::jailed::{Jailed, Start, answer, clean};
use crate::timeouts;
use loader::Loaded;
use message::{Order, Refusal, Report};

/// Threads of a pod: some for each program, or for each CPU that serves its requests.
const MAX_TASKS: u32 = 1024;
/// Reports that are read before others have their turn.
const REPORTS: usize = 64;

/// Runs what the arguments ask for, if they ask for a process of a pod that needs the engine.
pub fn main() -> Option<ExitCode> {
    let (name, run): (_, fn() -> ExitCode) = match std::env::args_os().nth(1)?.to_str()? {
        worker::ARGUMENT => (c"bulkhead-wasm", worker::main),
        loader::ARGUMENT => (c"wasm-loader", loader::main),
        _ => return None,
    };
    // Named by the descriptor that it was started by otherwise. A name is for people only.
    let _ = nix::sys::prctl::set_name(name);
    Some(run())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A jailed process for each pod.
#[derive(Debug, Default)]
pub struct InProcess;

/// The cgroup of a pod's process: beside that of its ordinary containers, which the name of no pod
/// can be.
fn cgroup_of(parent: &str, id: &str) -> (PathBuf, String) {
    (cgroup::expand(parent), format!("{id}:wasm"))
}

impl Place for InProcess {
    type Programs = JailedPod;

    fn open(&self, config: &Config, plan: &Plan, wish: PodWish) -> Answer<JailedPod> {
        let failed = |e: io::Error| {
            let text = format!("worker of sandbox {}: {e}", plan.id);
            RpcStatus::new(Code::Internal, text)
        };
        let parent = plan.wish.linux.as_ref();
        let parent = parent.map_or("", |l| l.cgroup_parent.as_str());
        let (parent, name) = cgroup_of(parent, &plan.id);
        let cgroup = PodCgroup::create(&parent, &name)
            .map_err(|e| RpcStatus::new(Code::Internal, e.to_string()))?;
        let cgroup = RemovedCgroup(cgroup);
        if let Err(error) = CpuShare::of(&resources(&plan.wish)).set(cgroup.0.path()) {
            tracing::warn!(sandbox = plan.id, %error, "the pod's share of CPU is not set");
        }
        let settings = message::Settings {
            id: plan.id.clone(),
            network: !matches!(wish.net, Net::None),
            resolv: wish.resolv,
            memory_bytes: wish.memory_bytes,
            inlining: config.wasm.inlining,
        };
        let netns = match wish.net {
            Net::None => None,
            Net::Host => Some(File::open("/proc/self/ns/net").map_err(failed)?),
            Net::Namespace(file) => Some(file),
        };
        let jailed = Jailed::start(Start {
            program: program::whole().map_err(failed)?,
            argument: worker::ARGUMENT,
            begin: Begin {
                dir: plan.dir.clone(),
                shares: vec![ROOTS.to_owned()],
                cgroup: cgroup.0.path().to_owned(),
                log: config.log.level.clone(),
            },
            netns: netns.as_ref().map(AsFd::as_fd),
            max_tasks: MAX_TASKS,
        })
        .map_err(failed)?;
        let channel = jailed.channel();
        channel.send(&Order::Pod(settings), &[]).map_err(failed)?;
        match answer(channel).map_err(failed)? {
            Report::Ready => {}
            Report::Failed { reason } => return Err(failed(io::Error::other(clean(&reason)))),
            other => return Err(failed(io::Error::other(format!("it says {other:?}")))),
        }
        Ok(JailedPod {
            settings: config.wasm.clone(),
            shared: Arc::new(Shared {
                id: plan.id.clone(),
                jailed,
                next: AtomicU64::new(0),
                asked: Mutex::default(),
                programs: Mutex::default(),
                end: watch::Sender::new(None),
            }),
            cgroup: Mutex::new(Some(cgroup)),
            watcher: Mutex::default(),
        })
    }

    fn clean(&self, state: &State) {
        remove_cgroup(state);
    }
}

/// Ends what an earlier process has left of a pod's own. Blocks.
pub fn remove_cgroup(state: &State) {
    let (parent, name) = cgroup_of(&state.cgroup_parent, &state.id);
    PodCgroup::of(&parent, &name).remove();
}

/// Gone with its owner.
#[derive(Debug)]
struct RemovedCgroup(PodCgroup);

impl Drop for RemovedCgroup {
    fn drop(&mut self) {
        self.0.remove();
    }
}

/// Who waits for an answer.
#[derive(Debug)]
enum Asked {
    Done(oneshot::Sender<Option<Refusal>>),
    Uses(oneshot::Sender<Option<message::Usage>>),
}

/// Where a program is in its life, as the process has told.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Created,
    Running,
    Ended(Ended),
}

#[derive(Debug)]
struct Shared {
    id: String,
    jailed: Jailed,
    next: AtomicU64,
    asked: Mutex<HashMap<u64, Asked>>,
    programs: Mutex<HashMap<u64, Arc<watch::Sender<Phase>>>>,
    /// Why it has ended.
    end: watch::Sender<Option<String>>,
}

fn gone() -> RpcStatus {
    precondition("the sandbox has ended")
}

/// An answer, unless the process hangs or has ended.
async fn in_time<T>(receiver: oneshot::Receiver<T>) -> Answer<T> {
    match tokio::time::timeout(timeouts::call(), receiver).await {
        Ok(answer) => answer.map_err(|_| gone()),
        Err(_) => {
            let text = "the process of the pod's programs does not answer";
            Err(RpcStatus::new(Code::DeadlineExceeded, text))
        }
    }
}

impl Shared {
    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn order(&self, order: &Order, fds: &[BorrowedFd<'_>]) -> Answer<()> {
        let sent = self.jailed.channel().send(order, fds);
        sent.map_err(|error| {
            let text = format!("worker of sandbox {}: {error}", self.id);
            RpcStatus::new(Code::Unavailable, text)
        })
    }

    /// Notes who waits, unless nobody will answer.
    fn expect(&self, ask: u64, asked: Asked) -> Answer<()> {
        let mut all = lock(&self.asked);
        // Looked at with the lock held that its end takes afterwards.
        if self.end.borrow().is_some() {
            return Err(gone());
        }
        all.insert(ask, asked);
        Ok(())
    }

    /// Orders something that is answered by its being done.
    async fn done(&self, ask: u64, order: Order, fds: &[BorrowedFd<'_>]) -> Answer<()> {
        let (sender, receiver) = oneshot::channel();
        self.expect(ask, Asked::Done(sender))?;
        let forget = Forget { shared: self, ask };
        self.order(&order, fds)?;
        let answered = in_time(receiver).await;
        drop(forget);
        match answered? {
            None => Ok(()),
            Some(refusal) => {
                let code = match refusal.invalid {
                    true => Code::InvalidArgument,
                    false => Code::Internal,
                };
                Err(RpcStatus::new(code, clean_lines(&refusal.text)))
            }
        }
    }

    /// Reads some of what has come; whether there may be more.
    fn take_reports(&self) -> bool {
        for _ in 0..REPORTS {
            match self.jailed.channel().look::<Report>() {
                Ok(Some(report)) => self.take(report),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                // It has closed its end, or talks nonsense: it is of no use any more.
                Ok(None) | Err(_) => {
                    self.jailed.kill();
                    return false;
                }
            }
        }
        true
    }

    fn take(&self, report: Report) {
        match report {
            Report::Done { ask, refused } => {
                if let Some(Asked::Done(waiter)) = lock(&self.asked).remove(&ask) {
                    let _ = waiter.send(refused);
                }
            }
            Report::Uses { ask, usage } => {
                if let Some(Asked::Uses(waiter)) = lock(&self.asked).remove(&ask) {
                    let _ = waiter.send(usage);
                }
            }
            Report::Ended { program, mut ended } => {
                ended.message = ended.message.as_deref().map(clean_lines);
                let phase = lock(&self.programs).get(&program).cloned();
                if let Some(phase) = phase {
                    end_once(&phase, ended);
                }
            }
            Report::Failed { reason } => self.note_end(&clean(&reason)),
            Report::Ready => {}
        }
    }

    fn note_end(&self, reason: &str) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert_with(|| reason.to_owned());
            first
        });
        // Whoever waits for an answer learns that none comes.
        lock(&self.asked).clear();
        for phase in lock(&self.programs).values() {
            end_once(
                phase,
                Ended {
                    code: bulkhead_wasm::KILLED,
                    out_of_memory: false,
                    message: Some(reason.to_owned()),
                },
            );
        }
    }
}

/// Unless it has ended before.
fn end_once(phase: &watch::Sender<Phase>, ended: Ended) {
    phase.send_if_modified(|phase| {
        let first = !matches!(phase, Phase::Ended(_));
        if first {
            *phase = Phase::Ended(ended);
        }
        first
    });
}

/// As [`clean`], but with its lines: a stack has several.
fn clean_lines(text: &str) -> String {
    let lines: Vec<String> = text.lines().take(64).map(clean).collect();
    lines.join("\n")
}

/// Nobody waits for an answer any more.
struct Forget<'a> {
    shared: &'a Shared,
    ask: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.shared.asked).remove(&self.ask);
    }
}

/// The programs of a pod.
#[derive(Debug)]
pub struct JailedPod {
    settings: Settings,
    shared: Arc<Shared>,
    /// `None`: taken down.
    cgroup: Mutex<Option<RemovedCgroup>>,
    watcher: Mutex<Option<AbortHandle>>,
}

impl Drop for JailedPod {
    fn drop(&mut self) {
        if let Some(watcher) = lock(&self.watcher).take() {
            watcher.abort();
        }
    }
}

impl Programs for JailedPod {
    type Code = Loaded;
    type Program = JailedProgram;

    fn find(&self, name: &str, digest: &str) -> Option<Loaded> {
        loader::find(&self.settings, name, digest)
    }

    fn load(&self, source: Source<'_>) -> Result<Loaded, String> {
        loader::load(&self.settings, source)
    }

    async fn create(
        &self,
        code: Loaded,
        wish: ProgramWish,
        streams: [Stdio; 3],
    ) -> Answer<JailedProgram> {
        let shared = Arc::clone(&self.shared);
        let internal = |e: io::Error| RpcStatus::new(Code::Internal, e.to_string());
        let wish = blocking(move || {
            shared.jailed.show(ROOTS, &wish.root)?;
            loader::in_memory(&serde_json::to_vec(&wish)?)
        });
        let wish = wish.await?.map_err(internal)?;
        let shared = &self.shared;
        let (ask, program) = (shared.number(), shared.number());
        let mut fds = vec![wish.as_fd(), code.file.as_fd()];
        let mut there = [false; 3];
        for (stream, there) in streams.iter().zip(&mut there) {
            if let Stdio::Fd(fd) = stream {
                fds.push(fd.as_fd());
                *there = true;
            }
        }
        let order = Order::Create {
            ask,
            program,
            name: code.name.clone(),
            inlined: code.inlined,
            streams: there,
        };
        // Before it can end.
        let phase = Arc::new(watch::Sender::new(Phase::Created));
        lock(&shared.programs).insert(program, Arc::clone(&phase));
        let made = JailedProgram(Arc::new(Inner {
            shared: Arc::clone(shared),
            program,
            phase,
            paused: AtomicBool::new(false),
        }));
        shared.done(ask, order, &fds).await?;
        Ok(made)
    }

    fn pid(&self) -> u32 {
        self.shared.jailed.pid()
    }

    fn watch(&self) -> io::Result<()> {
        let heard = self
            .shared
            .jailed
            .listen(&self.shared, Shared::take_reports, |shared| {
                shared.note_end(&shared.jailed.how_it_ended());
            })?;
        *lock(&self.watcher) = Some(heard);
        Ok(())
    }

    async fn ended(&self) -> OwnEnd {
        let mut end = self.shared.end.subscribe();
        let reason = match end.wait_for(Option::is_some).await {
            Ok(end) => end.clone(),
            Err(_) => None,
        };
        OwnEnd {
            reason: reason.unwrap_or_default(),
            details: String::new(),
        }
    }

    fn used(&self) -> Option<Used> {
        let (user, system) = self.shared.jailed.cpu()?;
        Some(Used { user, system })
    }

    fn info(&self) -> Option<String> {
        Some(serde_json::json!({"worker": self.pid()}).to_string())
    }

    fn take_down(&self, programs: Vec<JailedProgram>) {
        self.shared.jailed.end();
        self.shared.note_end("the sandbox has ended");
        drop(programs);
        let cgroup = lock(&self.cgroup).take();
        // Waits until it is empty.
        drop(cgroup);
    }
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    program: u64,
    phase: Arc<watch::Sender<Phase>>,
    paused: AtomicBool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let program = self.program;
        lock(&self.shared.programs).remove(&program);
        let _ = self.shared.order(&Order::Remove { program }, &[]);
    }
}

/// A program of the pod's.
#[derive(Debug, Clone)]
pub struct JailedProgram(Arc<Inner>);

impl JailedProgram {
    fn running(&self) -> Answer<()> {
        let id = &self.0.shared.id;
        match &*self.0.phase.borrow() {
            Phase::Running => Ok(()),
            Phase::Created => Err(precondition(format!(
                "the program of sandbox {id} is not started"
            ))),
            Phase::Ended(_) => Err(precondition(format!(
                "the program of sandbox {id} has ended"
            ))),
        }
    }
}

impl Program for JailedProgram {
    fn status(&self) -> Status {
        match &*self.0.phase.borrow() {
            Phase::Created => Status::Created,
            Phase::Running if self.0.paused.load(Ordering::Relaxed) => Status::Paused,
            Phase::Running => Status::Running,
            Phase::Ended(_) => Status::Stopped,
        }
    }

    async fn start(&self) -> Answer<()> {
        let Inner {
            shared,
            program,
            phase,
            ..
        } = &*self.0;
        // From here on it is waited for: its end may come before the answer.
        let first = phase.send_if_modified(|phase| {
            let first = *phase == Phase::Created;
            if first {
                *phase = Phase::Running;
            }
            first
        });
        if !first {
            return Err(precondition("was started before"));
        }
        let ask = shared.number();
        let order = Order::Start {
            ask,
            program: *program,
        };
        let started = shared.done(ask, order, &[]).await;
        if let Err(error) = &started {
            end_once(
                phase,
                Ended {
                    code: bulkhead_wasm::NOT_STARTED,
                    out_of_memory: false,
                    message: Some(error.message.clone()),
                },
            );
        }
        started
    }

    fn signal(&self, signal: i32) -> Answer<()> {
        self.running()?;
        let program = self.0.program;
        self.0
            .shared
            .order(&Order::Signal { program, signal }, &[])?;
        match signal {
            libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU => {
                self.0.paused.store(true, Ordering::Relaxed);
            }
            libc::SIGCONT => self.0.paused.store(false, Ordering::Relaxed),
            _ => {}
        }
        Ok(())
    }

    async fn ended(&self) -> Ended {
        let mut phase = self.0.phase.subscribe();
        let ended = phase.wait_for(|phase| matches!(phase, Phase::Ended(_)));
        match ended.await.as_deref() {
            Ok(Phase::Ended(ended)) => ended.clone(),
            _ => Ended {
                code: bulkhead_wasm::KILLED,
                out_of_memory: false,
                message: None,
            },
        }
    }

    fn set_memory_limit(&self, bytes: Option<u64>) -> Answer<()> {
        let program = self.0.program;
        let order = Order::MemoryLimit { program, bytes };
        self.0.shared.order(&order, &[])
    }

    fn set_cpu_share(&self, milli: Option<u32>) -> Answer<()> {
        let program = self.0.program;
        let order = Order::CpuShare { program, milli };
        self.0.shared.order(&order, &[])
    }

    async fn stats(&self) -> Answer<Stats> {
        let shared = &self.0.shared;
        let ask = shared.number();
        let (sender, receiver) = oneshot::channel();
        shared.expect(ask, Asked::Uses(sender))?;
        let _forget = Forget { shared, ask };
        let program = self.0.program;
        shared.order(&Order::Stats { ask, program }, &[])?;
        in_time(receiver).await?.map(Into::into).ok_or_else(gone)
    }
}
