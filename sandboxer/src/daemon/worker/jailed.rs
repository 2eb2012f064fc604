//! A jailed process, as who has started it sees it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::task::AbortHandle;

use super::attach;
use super::channel::{Begin, Birth, Channel};
use crate::engine::stdio;
use crate::timeouts;

/// Time for a killed worker to go.
const KILL_TIME: Duration = Duration::from_secs(10);

/// What a jailed process is started with.
#[derive(Debug)]
pub struct Start<'a> {
    /// The program.
    pub program: Command,
    /// What it is to be.
    pub argument: &'static str,
    /// What it is told first; its network namespace comes with it.
    pub begin: Begin,
    /// The namespace; `None`: an empty one is made.
    pub netns: Option<BorrowedFd<'a>>,
    /// Most threads and processes of its cgroup.
    pub max_tasks: u32,
}

/// A process in a jail. Dropping it ends it.
#[derive(Debug)]
pub struct Jailed {
    dir: PathBuf,
    cgroup: PathBuf,
    pid: u32,
    process: OwnedFd,
    channel: Channel,
    mounts: File,
}

/// One on its way. Dropping it ends what there is of it.
struct Making {
    starter: Child,
    worker: Option<(u32, OwnedFd)>,
}

impl Drop for Making {
    fn drop(&mut self) {
        // Harmless if it has ended.
        let _ = self.starter.kill();
        let _ = self.starter.wait();
        if let Some((pid, process)) = self.worker.take() {
            end(pid, &process);
        }
    }
}

impl Jailed {
    /// Starts it. Blocks until it is in its jail and has no right left.
    ///
    /// # Errors
    /// The host refuses something.
    pub fn start(start: Start<'_>) -> io::Result<Self> {
        let Start {
            mut program,
            argument,
            begin,
            netns,
            max_tasks,
        } = start;
        // Best effort, for hosts without the controller.
        let _ = std::fs::write(begin.cgroup.join("pids.max"), max_tasks.to_string());
        let (channel, theirs) = Channel::pair()?;
        // An emulated host is slow: as long as for any call.
        channel.patience(timeouts::call())?;
        // No code of ours runs between fork and exec, so this is a cheap vfork.
        let mut making = Making {
            starter: program
                .arg(argument)
                .env_clear()
                .envs(std::env::vars_os().filter(|(name, _)| name == "BULKHEAD_TIMEOUT_FACTOR"))
                .stdin(theirs)
                .stdout(Stdio::null())
                .spawn()?,
            worker: None,
        };
        let netns: Vec<_> = netns.into_iter().collect();
        channel.send(&begin, &netns)?;
        match answer(&channel)? {
            // It is our child, and nobody else waits for it: the number cannot be another's.
            Birth::Made { pid } if pid > 1 => {
                let process = open_process(pid)?;
                making.worker = Some((pid.unsigned_abs(), process));
            }
            other => return Err(unexpected(&other)),
        }
        match answer(&channel)? {
            Birth::Jailed => {}
            other => return Err(unexpected(&other)),
        }
        let Some((pid, process)) = making.worker.take() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        Ok(Self {
            // From here on, its drop ends it.
            mounts: File::open(format!("/proc/{pid}/ns/mnt"))
                .inspect_err(|_| end(pid, &process))?,
            dir: begin.dir,
            cgroup: begin.cgroup,
            pid,
            process,
            channel,
        })
    }

    /// Its end of what is said.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable once it has ended.
    pub fn process(&self) -> &OwnedFd {
        &self.process
    }

    /// Begins to listen to it, for its owner: `take` is called when there may be reports, and says whether
    /// there may be more; `ended` once, after the last of them, when it has ended. Needs a tokio runtime.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn listen<T: Send + Sync + 'static>(
        &self,
        owner: &Arc<T>,
        mut take: impl FnMut(&T) -> bool + Send + 'static,
        ended: impl FnOnce(&T) + Send + 'static,
    ) -> io::Result<AbortHandle> {
        let process = stdio::watch(self.process.try_clone()?, Interest::READABLE)?;
        let reports = self.channel.as_fd().try_clone_to_owned()?;
        let reports = stdio::watch(reports, Interest::READABLE)?;
        let owner = Arc::downgrade(owner);
        let task = tokio::spawn(async move {
            let mut more = false;
            loop {
                let has_ended = tokio::select! {
                    () = std::future::ready(()), if more => false,
                    ready = reports.readable(), if !more => {
                        if let Ok(mut ready) = ready {
                            ready.clear_ready();
                        }
                        false
                    }
                    _ = process.readable() => true,
                };
                let Some(owner) = owner.upgrade() else { return };
                // Its last words first.
                more = take(&owner);
                if has_ended && !more {
                    ended(&owner);
                    return;
                }
                drop(owner);
                tokio::task::yield_now().await;
            }
        });
        Ok(task.abort_handle())
    }

    /// Brings what is mounted at `name` of one of its shares into its jail. Blocks shortly.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn show(&self, share: &str, name: &str) -> io::Result<()> {
        let inside = Path::new("/").join(share).join(name);
        attach::attach(&self.mounts, &self.dir.join(share).join(name), &inside)
    }

    /// Its own memory that is in use now, in bytes: with what it has touched of its guest's.
    pub fn resident(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kib.saturating_mul(1024))
    }

    /// CPU time of it, its guest included: in programs, in the kernel.
    pub fn cpu(&self) -> Option<(Duration, Duration)> {
        let text = std::fs::read_to_string(self.cgroup.join("cpu.stat")).ok()?;
        let field = |name: &str| -> Option<Duration> {
            let line = text.lines().find_map(|l| l.strip_prefix(name))?;
            Some(Duration::from_micros(line.trim().parse().ok()?))
        };
        Some((field("user_usec ")?, field("system_usec ")?))
    }

    /// Kills it.
    pub fn kill(&self) {
        kill(&self.process);
    }

    /// Kills it, waits until it has gone, and reaps it. Doing it again does nothing. Blocks.
    pub fn end(&self) {
        end(self.pid, &self.process);
    }

    /// Why it has ended, if it has not said so itself; it stays for [`Self::end`] to reap.
    pub fn how_it_ended(&self) -> String {
        how_it_ended(&self.process, &self.cgroup)
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits for what it says next.
///
/// # Errors
/// It has ended, or does not answer in time.
pub fn answer<M: DeserializeOwned>(channel: &Channel) -> io::Result<M> {
    let found = channel.receive::<M>().map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::from(io::ErrorKind::TimedOut),
        _ => error,
    })?;
    found
        .map(|(answer, _)| answer)
        .ok_or_else(|| io::Error::other("it ended without a word"))
}

fn unexpected(birth: &Birth) -> io::Error {
    match birth {
        Birth::Failed { reason } => io::Error::other(clean(reason)),
        other => io::Error::other(format!("it says {other:?}")),
    }
}

/// Without what could play tricks with a log.
pub fn clean(text: &str) -> String {
    let printable = text.chars().filter(|c| !c.is_control());
    printable.take(1000).collect()
}

fn open_process(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes a pid and flags.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = nix::errno::Errno::result(fd)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn kill(process: &OwnedFd) {
    // SAFETY: takes a descriptor of a process, which is open, a signal, no information and no flags.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
}

fn end(pid: u32, process: &OwnedFd) {
    kill(process);
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let wait = PollTimeout::try_from(KILL_TIME).unwrap_or(PollTimeout::MAX);
    let _ = poll(&mut fds, wait);
    match waitid(
        Id::PIDFd(process.as_fd()),
        WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
    ) {
        Ok(WaitStatus::StillAlive) => {
            tracing::warn!(pid, "a killed worker does not end: it hangs in the kernel");
        }
        // No child: it was reaped before.
        Ok(_) | Err(nix::errno::Errno::ECHILD) => {}
        Err(error) => tracing::warn!(pid, %error, "a worker cannot be waited for"),
    }
}

/// Why a process has ended that has not said so; it stays for [`end`] to reap.
fn how_it_ended(process: &OwnedFd, cgroup: &Path) -> String {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    match waitid(Id::PIDFd(process.as_fd()), flags) {
        Ok(WaitStatus::Exited(_, code)) => format!("its worker ended with exit code {code}"),
        Ok(WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGSYS, _)) => {
            "its worker tried a system call that no worker makes and was killed: it may have been \
             broken into by the guest; please report it with what the guest did"
                .to_owned()
        }
        Ok(WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _))
            if out_of_memory(cgroup) =>
        {
            "its worker was killed for lack of memory in the pod's cgroup: raise the pod's memory \
             limit or its RuntimeClass overhead"
                .to_owned()
        }
        Ok(WaitStatus::Signaled(_, signal, _)) => format!("its worker was killed by {signal}"),
        _ => "its worker has ended".to_owned(),
    }
}

fn out_of_memory(cgroup: &Path) -> bool {
    let text = std::fs::read_to_string(cgroup.join("memory.events")).unwrap_or_default();
    let killed = text.lines().find_map(|l| l.strip_prefix("oom_kill "));
    killed.is_some_and(|count| count.trim() != "0")
}
