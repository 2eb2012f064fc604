//! Reaps every child: the processes of containers, helpers, and the orphans PID 1 inherits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When it was reaped.
    pub at: SystemTime,
}

#[derive(Default)]
struct State {
    waiting: HashMap<i32, oneshot::Sender<Exit>>,
    /// Ends seen while somebody was starting a process and did not know its pid yet. Bounded by
    /// the kernel's pid_max, and emptied when nothing is being started.
    early: HashMap<i32, Exit>,
    starting: usize,
}

/// Knows who waits for which process.
pub struct Reaper {
    state: Mutex<State>,
}

/// While this lives, ends of unknown processes are remembered, so that a process cannot end
/// unnoticed between its start and [`Reaper::wait`].
pub struct Starting<'a>(&'a Reaper);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.starting = state.starting.saturating_sub(1);
        if state.starting == 0 {
            state.early = HashMap::new();
        }
    }
}

impl Reaper {
    /// A reaper; [`Reaper::run`] makes it work.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Call before starting a process; drop after [`Reaper::wait`].
    pub fn starting(&self) -> Starting<'_> {
        self.state().starting += 1;
        Starting(self)
    }

    /// Gives the end of `pid`, once.
    pub fn wait(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state();
        match state.early.remove(&pid) {
            Some(exit) => {
                let _ = sender.send(exit);
            }
            None => {
                state.waiting.insert(pid, sender);
            }
        }
        receiver
    }

    /// Starts to listen for SIGCHLD; children that end from now on are seen by [`Reaper::run`].
    pub fn listen() -> std::io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Reaps for ever.
    pub async fn run(self: Arc<Self>, mut children: Signal) {
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    fn reap(&self) {
        loop {
            let mut status = 0;
            // Not nix: it reports death by a real-time signal as an error, after having reaped.
            // SAFETY: `status` is valid for writing for the duration of the call.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            let status = if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status)
            } else {
                128 + libc::WTERMSIG(status)
            };
            let exit = Exit {
                status: u32::try_from(status).unwrap_or(255),
                at: SystemTime::now(),
            };
            let mut state = self.state();
            match state.waiting.remove(&pid) {
                Some(sender) => {
                    let _ = sender.send(exit);
                }
                None if state.starting > 0 => {
                    state.early.insert(pid, exit);
                }
                None => {}
            }
        }
    }
}
