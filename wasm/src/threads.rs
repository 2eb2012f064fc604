//! Threads of one pod: they run its programs and do its host calls, and nobody else's.
//!
//! A thread enters the pod's network namespace before anything else; the runtime's helper threads
//! are its children and inherit that, as they inherit a cgroup or seccomp filter set by the hook.
//! Idle threads wait a moment for the next program and then go, so that an idle pod has none.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::runtime::Runtime;

use crate::error::WasmError;
use crate::harden::harden_thread;
use crate::user::User;

/// How long an idle thread waits for work.
const KEEP: Duration = Duration::from_secs(2);
/// Threads that wait for disks and the like, beside each program's own.
const MAX_BLOCKING_THREADS: usize = 4;
/// Host functions run on the program's fiber; this is for the thread itself.
const STACK_BYTES: usize = 1 << 20;

pub(crate) type Job = Box<dyn FnOnce(&Runtime) + Send>;

/// Called on each new thread of a pod, in the pod's network namespace, before anything of the pod
/// runs on it and before it gives its rights up: joins a cgroup.
pub type ThreadHook = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;
/// Starts a thread by name. A daemon whose threads are filtered passes its unfiltered spawner.
pub type Spawner = Arc<dyn Fn(String, Box<dyn FnOnce() + Send>) -> io::Result<()> + Send + Sync>;

/// Which network a pod's programs see.
#[derive(Debug, Default)]
pub enum Network {
    /// None: no sockets, no names.
    #[default]
    None,
    /// The namespace behind this descriptor.
    Namespace(OwnedFd),
    /// That of the process.
    Host,
}

pub(crate) struct Threads {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    network: Network,
    hook: Option<ThreadHook>,
    harden: bool,
    /// `None`: a thread is a child of the one that asks for it.
    spawner: Option<Spawner>,
    idle: Mutex<Vec<Idle>>,
    next: AtomicU64,
    closed: AtomicBool,
}

thread_local! {
    /// Of a thread of a pod: which pod's (by address, which it keeps alive), and which user's.
    static OF: RefCell<Option<(usize, Option<User>)>> = const { RefCell::new(None) };
}

/// A thread that waits for its next program.
struct Idle {
    number: u64,
    /// Whose it is, for good.
    user: Option<User>,
    sender: mpsc::Sender<Job>,
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threads")
            .field("name", &self.shared.name)
            .field("network", &self.shared.network)
            .finish_non_exhaustive()
    }
}

/// Plain threads of the standard library.
pub(crate) fn default_spawner() -> Spawner {
    Arc::new(|name, work| {
        std::thread::Builder::new()
            .name(name)
            .stack_size(STACK_BYTES)
            .spawn(work)
            .map(drop)
    })
}

impl Threads {
    pub(crate) fn new(
        pod: &str,
        network: Network,
        hook: Option<ThreadHook>,
        harden: bool,
        spawner: Option<Spawner>,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                // The kernel shows 15 characters.
                name: format!("wasm-{}", pod.chars().take(10).collect::<String>()),
                network,
                hook,
                harden,
                spawner,
                idle: Mutex::new(Vec::new()),
                next: AtomicU64::new(0),
                closed: AtomicBool::new(false),
            }),
        }
    }

    pub(crate) fn has_network(&self) -> bool {
        !matches!(self.shared.network, Network::None)
    }

    /// Runs `job` on a thread of the pod that is `user`'s.
    pub(crate) fn run(&self, user: Option<&User>, mut job: Job) -> Result<(), WasmError> {
        loop {
            let Some(idle) = self.shared.take_idle(user) else {
                break;
            };
            match idle.sender.send(job) {
                Ok(()) => return Ok(()),
                // It has just gone.
                Err(mpsc::SendError(back)) => job = back,
            }
        }
        let shared = Arc::clone(&self.shared);
        let user = user.cloned();
        let (report, ready) = mpsc::sync_channel(1);
        let fail = |e| WasmError::io(format!("thread of pod {}", self.shared.name), e);
        let whose = (Arc::as_ptr(&shared).addr(), user.clone());
        // A server starts more threads from its first one, which has given up the right to enter
        // anything: its children are where it is, as whom it is, and held to its filter.
        let inherits = shared.spawner.is_none() && OF.with_borrow(|of| of.as_ref() == Some(&whose));
        let spawner = shared.spawner.clone().unwrap_or_else(default_spawner);
        spawner(
            self.shared.name.clone(),
            Box::new(move || {
                let entered = match inherits {
                    true => Ok(()),
                    false => shared.enter(user.as_ref()),
                };
                OF.set(Some(whose));
                let made = entered.and_then(|()| shared.runtime());
                match made {
                    Ok(runtime) => {
                        let _ = report.send(Ok(()));
                        shared.work(&runtime, user, job);
                    }
                    Err(e) => {
                        let _ = report.send(Err(e));
                    }
                }
            }),
        )
        .map_err(fail)?;
        match ready.recv() {
            Ok(result) => result.map_err(fail),
            Err(_) => Err(fail(io::Error::other("ended while it was set up"))),
        }
    }
}

impl Threads {
    /// Lets idle threads go, and those that work when they are done.
    pub(crate) fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        // Their receivers disconnect.
        self.shared.idle().clear();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The idle thread of a user that was busy last.
    fn take_idle(&self, user: Option<&User>) -> Option<Idle> {
        let mut idle = self.idle();
        let at = idle.iter().rposition(|i| i.user.as_ref() == user)?;
        Some(idle.remove(at))
    }

    fn enter(&self, user: Option<&User>) -> io::Result<()> {
        if let Network::Namespace(namespace) = &self.network {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        }
        if let Some(hook) = &self.hook {
            hook()?;
        }
        if let Some(user) = user {
            user.adopt().map_err(|e| {
                let User { uid, gid, .. } = user;
                io::Error::new(e.kind(), format!("becoming user {uid}:{gid}: {e}"))
            })?;
        }
        match self.harden {
            true => harden_thread(),
            false => Ok(()),
        }
    }

    fn runtime(&self) -> io::Result<Runtime> {
        tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            // A program that only computes yields once a tick; sockets and timers are looked at
            // each time, not at every 61st.
            .event_interval(1)
            .max_blocking_threads(MAX_BLOCKING_THREADS)
            .thread_keep_alive(KEEP)
            .thread_name(self.name.clone())
            .build()
    }

    fn work(&self, runtime: &Runtime, user: Option<User>, first: Job) {
        let mut job = Some(first);
        while let Some(work) = job.take() {
            // A bug in a host function ends this program; the thread and the process go on. The
            // program's exit is told by a guard that is dropped on the way.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(runtime)));
            job = self.wait(user.clone());
        }
    }

    fn wait(&self, user: Option<User>) -> Option<Job> {
        let (sender, receiver) = mpsc::channel();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut idle = self.idle();
            // Looked at under the lock that the closing side takes afterwards.
            if self.closed.load(Ordering::Acquire) {
                return None;
            }
            idle.push(Idle {
                number,
                user,
                sender,
            });
        }
        match receiver.recv_timeout(KEEP) {
            Ok(job) => Some(job),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                let mut idle = self.idle();
                match idle.iter().position(|i| i.number == number) {
                    Some(at) => {
                        idle.remove(at);
                        None
                    }
                    None => {
                        // Chosen a moment ago: the job is on its way, or the pod is gone.
                        drop(idle);
                        receiver.recv().ok()
                    }
                }
            }
        }
    }
}
