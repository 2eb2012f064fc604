//! VMs in processes of their own, for `isolation = "process"`: the daemon's side.
//!
//! A worker is this program again, started for one VM and jailed ([`jail`]) before it sees anything
//! of a guest ([`run`]). It has the VM and its devices, the file server included: all code that a
//! guest's memory, registers and rings reach. Everything else about the pod stays in the daemon's code,
//! as for a VM on threads: containerd's calls, mounts, standard streams, the connection to the
//! agent. What crosses the boundary is little: the VM's parts once, as descriptors; streams to ports
//! of the guest; its end ([`channel`]).
//!
//! The boundary is there and not further out, at containerd's Task calls, because who takes these
//! calls decides what is mounted into a pod: that must not be the process that a guest may have
//! broken into. That pods outlive the daemon all the same is the work of [`super::keeper`].

pub mod attach;
pub mod channel;
pub mod jail;
pub mod run;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_vmm::memory::VmMemory;
use bulkhead_vmm::{Caching, DiskSource, VmConfig};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use crate::daemon::program;
use crate::daemon::sandbox::Stop;
use crate::engine::EngineError;
use crate::engine::stdio;
use crate::timeouts;
use channel::{Begin, Channel, Disk, Net, Order, Report, Share, Wish};

/// How the program is told that it is to be a worker.
pub const ARGUMENT: &str = "--bulkhead-worker";
/// How much of the console is told when a guest ends by itself, in bytes.
pub const TAIL: usize = 2048;
/// Threads and processes of a worker: vCPUs, devices, those at the debug socket.
const MAX_TASKS: u32 = 256;
/// Time for a killed worker to go.
const KILL_TIME: Duration = Duration::from_secs(10);
/// Reports that are read before others have their turn.
const REPORTS: usize = 64;

/// What a worker is made of.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The pod's directory.
    pub dir: &'a Path,
    /// The cgroup to be in.
    pub cgroup: &'a Path,
    /// The pod's network namespace.
    pub netns: Option<BorrowedFd<'a>>,
    /// What it logs: `error` to `trace`.
    pub log: &'a str,
    /// Its VM.
    pub vm: VmConfig,
}

/// How a worker has ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: String,
    /// What the guest's console said last.
    pub tail: String,
}

#[derive(Debug)]
enum Waiter {
    Dial(oneshot::Sender<io::Result<()>>),
    Tail(oneshot::Sender<String>),
}

/// A running worker. Dropping it ends it.
#[derive(Debug)]
pub struct Worker {
    id: String,
    dir: PathBuf,
    cgroup: PathBuf,
    pid: u32,
    process: OwnedFd,
    channel: Channel,
    mounts: File,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, Waiter>>,
    end: watch::Sender<Option<End>>,
    watcher: Mutex<Option<AbortHandle>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Splits a VM into what can be written down and what is handed over.
fn hand_over(vm: VmConfig) -> Result<(Wish, Vec<OwnedFd>), EngineError> {
    let open = |path: &Path, write: bool| {
        let file = File::options().read(true).write(write).open(path);
        file.map_err(EngineError::io(path.display().to_string()))
            .map(OwnedFd::from)
    };
    let mut fds = vec![
        open(Path::new("/dev/kvm"), true)?,
        VmMemory::make_file(vm.memory_mib, vm.hugepages)?.into(),
        open(&vm.kernel, false)?,
    ];
    let mut disks = Vec::new();
    for disk in vm.disks {
        fds.push(match disk.source {
            DiskSource::Path(path) => open(&path, !disk.read_only)?,
            DiskSource::File(file) => file.into(),
            // Layers of images, which are put into slots: there are none.
            DiskSource::Joined(_) => {
                let error = io::Error::from(io::ErrorKind::Unsupported);
                return Err(EngineError::io(format!("disk {}", disk.serial))(error));
            }
        });
        disks.push(Disk {
            read_only: disk.read_only,
            serial: disk.serial,
        });
    }
    let mut nets = Vec::new();
    for net in vm.nets {
        let missing =
            || EngineError::io(format!("tap {}", net.tap))(io::ErrorKind::NotFound.into());
        fds.push(net.fd.ok_or_else(missing)?);
        nets.push(Net {
            tap: net.tap,
            mac: net.mac,
            mtu: net.mtu,
            plain: net.plain,
        });
    }
    let shares = vm.shares.into_iter().map(|share| Share {
        tag: share.tag,
        name: name_of(&share.root),
        unchanging: share.caching == Caching::Always,
    });
    let wish = Wish {
        id: vm.id,
        vcpus: vm.vcpus,
        memory_mib: vm.memory_mib,
        hugepages: vm.hugepages,
        cmdline: vm.cmdline,
        disks,
        shares: shares.collect(),
        nets,
        allow_emulated_kvm: vm.allow_emulated_kvm,
    };
    Ok((wish, fds))
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// A worker on its way. Dropping it ends what there is of it.
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

impl Worker {
    /// Starts a worker and its VM. Blocks until the VM's first instruction can run.
    ///
    /// # Errors
    /// The host refuses something, or the VM cannot be.
    pub fn launch(launch: Launch<'_>) -> Result<Arc<Self>, EngineError> {
        let id = launch.vm.id.clone();
        let what = || EngineError::io(format!("worker of sandbox {id}"));
        let (wish, fds) = hand_over(launch.vm)?;
        // Best effort, for hosts without the controller.
        let _ = std::fs::write(launch.cgroup.join("pids.max"), MAX_TASKS.to_string());
        let (channel, theirs) = Channel::pair().map_err(what())?;
        // An emulated host is slow: as long as for any call.
        channel.patience(timeouts::call()).map_err(what())?;
        // No code of ours runs between fork and exec, so this is a cheap vfork.
        let mut making = Making {
            starter: program::command()
                .arg(ARGUMENT)
                .env_clear()
                .envs(std::env::vars_os().filter(|(name, _)| name == "BULKHEAD_TIMEOUT_FACTOR"))
                .stdin(theirs)
                .stdout(Stdio::null())
                .spawn()
                .map_err(what())?,
            worker: None,
        };
        let begin = Begin {
            dir: launch.dir.to_owned(),
            shares: wish.shares.iter().map(|s| s.name.clone()).collect(),
            cgroup: launch.cgroup.to_owned(),
            log: launch.log.to_owned(),
        };
        let netns: Vec<_> = launch.netns.into_iter().collect();
        channel.send(&begin, &netns).map_err(what())?;
        match report(&channel).map_err(what())? {
            // It is our child, and nobody else waits for it: the number cannot be another's.
            Report::Made { pid } if pid > 1 => {
                let process = open_process(pid).map_err(what())?;
                making.worker = Some((pid.unsigned_abs(), process));
            }
            other => return Err(what()(unexpected(&other))),
        }
        match report(&channel).map_err(what())? {
            Report::Jailed => {}
            other => return Err(what()(unexpected(&other))),
        }
        let Some((pid, process)) = making.worker.take() else {
            return Err(what()(io::ErrorKind::NotFound.into()));
        };
        let worker = Arc::new(Self {
            mounts: File::open(format!("/proc/{pid}/ns/mnt")).map_err(what())?,
            dir: launch.dir.to_owned(),
            cgroup: launch.cgroup.to_owned(),
            pid,
            process,
            channel,
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
            end: watch::Sender::new(None),
            watcher: Mutex::default(),
            id: id.clone(),
        });
        drop(making);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let channel = &worker.channel;
        channel.send(&Order::Run(wish), &fds).map_err(what())?;
        match report(channel).map_err(what())? {
            Report::Running => Ok(worker),
            Report::Failed { reason } => Err(what()(io::Error::other(clean(&reason)))),
            other => Err(what()(unexpected(&other))),
        }
    }

    /// Begins to listen to it; `stop` is called when somebody asks the worker to stop. Needs a tokio
    /// runtime.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn watch(self: &Arc<Self>, stop: Stop) -> io::Result<()> {
        let process = stdio::watch(self.process.try_clone()?, Interest::READABLE)?;
        let reports = self.channel.as_fd().try_clone_to_owned()?;
        let reports = stdio::watch(reports, Interest::READABLE)?;
        let weak = Arc::downgrade(self);
        let mut stop = Some(stop);
        let task = tokio::spawn(async move {
            let mut more = false;
            loop {
                let ended = tokio::select! {
                    () = std::future::ready(()), if more => false,
                    ready = reports.readable(), if !more => {
                        if let Ok(mut ready) = ready {
                            ready.clear_ready();
                        }
                        false
                    }
                    _ = process.readable() => true,
                };
                let Some(worker) = weak.upgrade() else { return };
                // Its last words first.
                more = worker.take_reports(&mut stop);
                if ended {
                    worker.note_end(&how_it_ended(&worker.process, &worker.cgroup));
                    return;
                }
                drop(worker);
                tokio::task::yield_now().await;
            }
        });
        *lock(&self.watcher) = Some(task.abort_handle());
        Ok(())
    }

    /// Reads some of what has come; whether there may be more.
    fn take_reports(&self, stop: &mut Option<Stop>) -> bool {
        for _ in 0..REPORTS {
            match self.channel.look::<Report>() {
                Ok(Some(report)) => self.take(report, stop),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                // It has closed its end, or talks nonsense: it is of no use any more.
                Ok(None) | Err(_) => {
                    self.kill();
                    return false;
                }
            }
        }
        true
    }

    fn take(&self, report: Report, stop: &mut Option<Stop>) {
        match report {
            Report::Dialled { id, error } => {
                if let Some(Waiter::Dial(waiter)) = lock(&self.waiting).remove(&id) {
                    let result = match error {
                        None => Ok(()),
                        Some((number, _)) => Err(io::Error::from_raw_os_error(number)),
                    };
                    let _ = waiter.send(result);
                }
            }
            Report::Tail { id, text } => {
                if let Some(Waiter::Tail(waiter)) = lock(&self.waiting).remove(&id) {
                    let _ = waiter.send(clean(&text));
                }
            }
            Report::StopAsked { grace_ms } => {
                // Once: the pod ends by it.
                if let Some(stop) = stop.take() {
                    stop.0(Duration::from_millis(grace_ms));
                }
            }
            Report::Ended { reason, tail } => {
                self.end.send_if_modified(|end| {
                    let first = end.is_none();
                    end.get_or_insert_with(|| End {
                        reason: clean(&reason),
                        tail,
                    });
                    first
                });
            }
            Report::Failed { reason } => self.note_end(&clean(&reason)),
            Report::Made { .. } | Report::Jailed | Report::Running => {}
        }
    }

    fn note_end(&self, reason: &str) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert_with(|| End {
                reason: reason.to_owned(),
                tail: String::new(),
            });
            first
        });
        // Whoever waits for an answer learns that none comes.
        lock(&self.waiting).clear();
    }

    /// The pod's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Resolves once its VM or its process has ended.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut end = self.end.subscribe();
        async move {
            let _ = end.wait_for(Option::is_some).await;
        }
    }

    /// How it has ended.
    pub fn end_reason(&self) -> End {
        self.end.borrow().clone().unwrap_or_default()
    }

    fn expect(&self, waiter: Waiter) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.waiting).insert(id, waiter);
        id
    }

    /// One attempt to connect to a port of the guest.
    ///
    /// # Errors
    /// Nothing listens there, or the worker has ended.
    pub async fn dial(self: &Arc<Self>, port: u32) -> io::Result<UnixStream> {
        // Made here, so that this end is an open file of ours alone: the worker cannot make a read
        // of ours wait.
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let (sender, receiver) = oneshot::channel();
        let id = self.expect(Waiter::Dial(sender));
        let attempt = Attempt { worker: self, id };
        let order = Order::Dial { id, port };
        self.channel.send(&order, &[theirs.as_fd()])?;
        drop(theirs);
        let result = receiver.await;
        drop(attempt);
        result.unwrap_or_else(|_| Err(io::ErrorKind::NotConnected.into()))?;
        UnixStream::from_std(ours)
    }

    /// The last line of the guest's console, if it says so soon.
    pub async fn last_line(&self) -> String {
        let (sender, receiver) = oneshot::channel();
        let id = self.expect(Waiter::Tail(sender));
        let sent = self.channel.send(&Order::Tail { id }, &[]);
        let answer = match sent {
            Ok(()) => tokio::time::timeout(timeouts::figures(), receiver).await,
            Err(_) => Ok(Ok(String::new())),
        };
        lock(&self.waiting).remove(&id);
        answer.ok().and_then(Result::ok).unwrap_or_default()
    }

    /// Notes a point in the VM's life.
    pub fn mark(&self, stage: &str) {
        let stage = stage.to_owned();
        let _ = self.channel.send(&Order::Mark { stage }, &[]);
    }

    /// Lets it serve `vmmctl`.
    ///
    /// # Errors
    /// It has ended.
    pub fn serve_debug(&self, listener: &UnixListener) -> io::Result<()> {
        self.channel.send(&Order::Debug, &[listener.as_fd()])
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
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(watcher) = lock(&self.watcher).take() {
            watcher.abort();
        }
        self.end();
    }
}

/// Gives an attempt up that nobody waits for any more.
struct Attempt<'a> {
    worker: &'a Worker,
    id: u64,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if lock(&self.worker.waiting).remove(&self.id).is_some() {
            let _ = self
                .worker
                .channel
                .send(&Order::GiveUp { id: self.id }, &[]);
        }
    }
}

fn report(channel: &Channel) -> io::Result<Report> {
    let found = channel
        .receive::<Report>()
        .map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::Error::from(io::ErrorKind::TimedOut),
            _ => error,
        })?;
    found
        .map(|(report, _)| report)
        .ok_or_else(|| io::Error::other("it ended without a word"))
}

fn unexpected(report: &Report) -> io::Error {
    match report {
        Report::Failed { reason } => io::Error::other(clean(reason)),
        other => io::Error::other(format!("it says {other:?}")),
    }
}

/// Without what could play tricks with a log.
fn clean(text: &str) -> String {
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
