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
pub mod jailed;
pub mod run;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_vmm::memory::VmMemory;
use bulkhead_vmm::{Caching, DiskSource, VmConfig};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use crate::daemon::program;
use crate::daemon::sandbox::Stop;
use crate::engine::EngineError;
use crate::timeouts;
use channel::{Begin, Disk, Net, Order, Report, Share, Wish};
use jailed::{Jailed, Start, answer, clean};

/// How the program is told that it is to be a worker.
pub const ARGUMENT: &str = "--bulkhead-worker";
/// How much of the console is told when a guest ends by itself, in bytes.
pub const TAIL: usize = 2048;
/// Threads and processes of a worker: vCPUs, devices, those at the debug socket.
const MAX_TASKS: u32 = 256;
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
    jailed: Jailed,
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

impl Worker {
    /// Starts a worker and its VM. Blocks until the VM's first instruction can run.
    ///
    /// # Errors
    /// The host refuses something, or the VM cannot be.
    pub fn launch(launch: Launch<'_>) -> Result<Arc<Self>, EngineError> {
        let id = launch.vm.id.clone();
        let what = || EngineError::io(format!("worker of sandbox {id}"));
        let (wish, fds) = hand_over(launch.vm)?;
        let jailed = Jailed::start(Start {
            program: program::command(),
            argument: ARGUMENT,
            begin: Begin {
                dir: launch.dir.to_owned(),
                shares: wish.shares.iter().map(|s| s.name.clone()).collect(),
                cgroup: launch.cgroup.to_owned(),
                log: launch.log.to_owned(),
            },
            netns: launch.netns,
            max_tasks: MAX_TASKS,
        })
        .map_err(what())?;
        let worker = Arc::new(Self {
            jailed,
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
            end: watch::Sender::new(None),
            watcher: Mutex::default(),
            id: id.clone(),
        });
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let channel = worker.jailed.channel();
        channel.send(&Order::Run(wish), &fds).map_err(what())?;
        match answer(channel).map_err(what())? {
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
        let mut stop = Some(stop);
        let heard = self.jailed.listen(
            self,
            move |worker| worker.take_reports(&mut stop),
            |worker| worker.note_end(&worker.jailed.how_it_ended()),
        )?;
        *lock(&self.watcher) = Some(heard);
        Ok(())
    }

    /// Reads some of what has come; whether there may be more.
    fn take_reports(&self, stop: &mut Option<Stop>) -> bool {
        for _ in 0..REPORTS {
            match self.jailed.channel().look::<Report>() {
                Ok(Some(report)) => self.take(report, stop),
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
            Report::Running => {}
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
        self.jailed.channel().send(&order, &[theirs.as_fd()])?;
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
        let sent = self.jailed.channel().send(&Order::Tail { id }, &[]);
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
        let _ = self.jailed.channel().send(&Order::Mark { stage }, &[]);
    }

    /// Lets it serve `vmmctl`.
    ///
    /// # Errors
    /// It has ended.
    pub fn serve_debug(&self, listener: &UnixListener) -> io::Result<()> {
        self.jailed
            .channel()
            .send(&Order::Debug, &[listener.as_fd()])
    }

    /// Its process.
    pub fn jailed(&self) -> &Jailed {
        &self.jailed
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(watcher) = lock(&self.watcher).take() {
            watcher.abort();
        }
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
                .jailed
                .channel()
                .send(&Order::GiveUp { id: self.id }, &[]);
        }
    }
}

fn unexpected(report: &Report) -> io::Error {
    match report {
        Report::Failed { reason } => io::Error::other(clean(reason)),
        other => io::Error::other(format!("it says {other:?}")),
    }
}
