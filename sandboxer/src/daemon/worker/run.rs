//! The worker: one VM, in a jail, for as long as its daemon wants it.
//!
//! Its main thread does what the daemon orders and tells it what happens; the VM has its own
//! threads, as it has in the daemon. It ends with the VM, and with the daemon.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_vmm::{Caching, Connecting, DiskConfig, DiskSource, NetConfig, ShareConfig, VmConfig};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::Value;

use super::channel::{Begin, Birth, Channel, Order, Report, Wish};
use super::jail::{self, Side};
use crate::debug;
use crate::engine::console::{ConsoleHub, last_line};
use crate::engine::microvm::MicroVm;
use crate::engine::{EngineError, Sandbox};

/// Attempts to dial that may be under way.
const MAX_DIALS: usize = 1024;

/// Runs a worker; the channel to the daemon is standard input.
pub fn main() -> ExitCode {
    start(bulkhead_vmm::seccomp::confine_process, run)
}

/// Goes into the jail, with `confine` as the last step, and does `work` there.
pub fn start(
    confine: fn() -> io::Result<()>,
    work: fn(&Channel) -> Result<(), String>,
) -> ExitCode {
    // The daemon has put a socket there; nothing else in this process reads it.
    let Ok(daemon) = io::stdin().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    let daemon = Channel::from(daemon);
    let worked = match enter(&daemon, confine) {
        Ok(true) => work(&daemon),
        other => other.map(drop),
    };
    match worked {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            let _ = daemon.send(&Birth::Failed { reason }, &[]);
            ExitCode::FAILURE
        }
    }
}

fn io_text(what: &str) -> impl FnOnce(io::Error) -> String {
    move |error| format!("{what}: {error}")
}

/// What is wrong with the daemon's channel.
pub fn channel_failed(error: io::Error) -> String {
    format!("the daemon's channel: {error}")
}

/// True: in the jail; false: there is nothing more to do.
fn enter(daemon: &Channel, confine: fn() -> io::Result<()>) -> Result<bool, String> {
    let Some((begin, mut fds)) = daemon.receive::<Begin>().map_err(channel_failed)? else {
        return Ok(false);
    };
    tracing_subscriber::fmt()
        .with_max_level(begin.log.parse().unwrap_or(tracing::Level::INFO))
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    let entered = jail::enter(&begin, fds.pop(), daemon, confine);
    match entered.map_err(|(what, error)| format!("{what}: {error}"))? {
        Side::Starter => return Ok(false),
        Side::Jailed => {}
    }
    // For people only.
    let _ = nix::sys::prctl::set_name(c"bulkhead-worker");
    daemon.send(&Birth::Jailed, &[]).map_err(channel_failed)?;
    Ok(true)
}

fn run(daemon: &Channel) -> Result<(), String> {
    let Some((Order::Run(wish), fds)) = daemon.receive().map_err(channel_failed)? else {
        return Ok(());
    };
    let worker = Worker::start(wish, fds, daemon)?;
    daemon.send(&Report::Running, &[]).map_err(channel_failed)?;
    worker.serve();
    Ok(())
}

/// The VM's parts, of descriptors.
fn config(wish: &Wish, fds: &mut VecDeque<OwnedFd>) -> io::Result<(VmConfig, File)> {
    let mut next = || {
        fds.pop_front()
            .ok_or_else(|| io::Error::other("a descriptor is missing"))
    };
    let kvm = next()?;
    let memory = File::from(next()?);
    let kernel = File::from(next()?);
    let mut disks = Vec::new();
    for disk in &wish.disks {
        disks.push(DiskConfig {
            source: DiskSource::File(File::from(next()?)),
            read_only: disk.read_only,
            serial: disk.serial.clone(),
        });
    }
    let mut nets = Vec::new();
    for net in &wish.nets {
        nets.push(NetConfig {
            tap: net.tap.clone(),
            fd: Some(next()?),
            mac: net.mac,
            mtu: net.mtu,
            // Opening it would need a device file in the jail.
            vhost: false,
            plain: net.plain,
        });
    }
    let share = |share: &super::channel::Share| ShareConfig {
        tag: share.tag.clone(),
        root: PathBuf::from("/").join(&share.name),
        read_only: false,
        caching: match share.unchanging {
            true => Caching::Always,
            false => Caching::Auto,
        },
        // Only for layers of images that are disks.
        upper_layers: false,
        fixed_top: true,
    };
    let config = VmConfig {
        id: wish.id.clone(),
        kvm: Some(kvm),
        vcpus: wish.vcpus,
        memory_mib: wish.memory_mib,
        memory: Some(memory),
        hugepages: wish.hugepages,
        kernel: format!("/proc/self/fd/{}", kernel.as_raw_fd()).into(),
        cmdline: wish.cmdline.clone(),
        disks,
        shares: wish.shares.iter().map(share).collect(),
        nets,
        vsock_cid: Some(3),
        rng: true,
        allow_emulated_kvm: wish.allow_emulated_kvm,
        ..VmConfig::default()
    };
    Ok((config, kernel))
}

/// How attempts to dial went, from the device's thread to ours.
#[derive(Debug)]
struct Dialled {
    results: Mutex<Vec<(u64, io::Result<()>)>>,
    wake: EventFd,
}

struct Worker<'a> {
    daemon: &'a Channel,
    vm: Arc<MicroVm>,
    debug: Option<UnixListener>,
    dials: BTreeMap<u64, Connecting>,
    dialled: Arc<Dialled>,
}

impl<'a> Worker<'a> {
    fn start(wish: Wish, fds: Vec<OwnedFd>, daemon: &'a Channel) -> Result<Self, String> {
        let mut fds = VecDeque::from(fds);
        let (config, kernel) = config(&wish, &mut fds).map_err(io_text("the VM's parts"))?;
        let made = MicroVm::create(config, ConsoleHub::new(None)).map_err(|e| e.to_string())?;
        drop(kernel);
        let vm = Arc::new(made);
        vm.vm().start().map_err(|e| e.to_string())?;
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|e| format!("eventfd: {e}"))?;
        Ok(Self {
            daemon,
            vm,
            debug: None,
            dials: BTreeMap::new(),
            dialled: Arc::new(Dialled {
                results: Mutex::default(),
                wake,
            }),
        })
    }

    /// Until the VM has ended, or the daemon has, or wants it.
    fn serve(mut self) {
        // SAFETY: the VM keeps its event open, and lives as long as this function runs.
        let exit = unsafe { BorrowedFd::borrow_raw(self.vm.vm().exit_event().as_raw_fd()) };
        loop {
            let poll_in = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut watched = vec![
                poll_in(self.daemon.as_fd()),
                poll_in(exit),
                poll_in(self.vm.stop_event()),
                poll_in(self.dialled.wake.as_fd()),
            ];
            watched.extend(self.debug.iter().map(|debug| poll_in(debug.as_fd())));
            match poll(&mut watched, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait for anything");
                    return;
                }
            }
            let ready: Vec<bool> = watched
                .iter()
                .map(|fd| fd.any().unwrap_or_default())
                .collect();
            drop(watched);
            let is = |at: usize| ready.get(at).copied().unwrap_or_default();
            if is(0) && !self.orders() {
                break;
            }
            if is(1) {
                self.report_end();
                break;
            }
            if is(2)
                && let Some(grace) = self.vm.take_stop()
            {
                let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
                self.tell(&Report::StopAsked { grace_ms });
            }
            if is(3) {
                self.report_dials();
            }
            if is(4) {
                self.accept();
            }
        }
        self.vm.vm().stop();
    }

    fn tell(&self, report: &Report) {
        if let Err(error) = self.daemon.send(report, &[]) {
            tracing::debug!(%error, "the daemon cannot be told");
        }
    }

    /// One order; false: to end.
    fn orders(&mut self) -> bool {
        let (order, fds) = match self.daemon.receive::<Order>() {
            Ok(Some(order)) => order,
            Ok(None) => return false,
            Err(error) => {
                tracing::error!(%error, "an order that makes no sense");
                return false;
            }
        };
        match order {
            Order::Run(_) => return false,
            Order::Dial { id, port } => self.dial(id, port, fds.into_iter().next()),
            Order::GiveUp { id } => drop(self.dials.remove(&id)),
            Order::Mark { stage } => self.vm.vm().mark(&stage),
            Order::Tail { id } => {
                let text = last_line(&self.vm.vm().console_tail());
                self.tell(&Report::Tail { id, text });
            }
            Order::Debug => self.debug = fds.into_iter().next().map(UnixListener::from),
        }
        true
    }

    fn dial(&mut self, id: u64, port: u32, stream: Option<OwnedFd>) {
        let started = match (self.vm.vm().vsock(), stream) {
            _ if self.dials.len() >= MAX_DIALS => Err(io::ErrorKind::QuotaExceeded.into()),
            (Some(vsock), Some(stream)) => {
                let dialled = Arc::clone(&self.dialled);
                vsock.start_connect_over(port, UnixStream::from(stream), move |outcome| {
                    let result = outcome.map(drop);
                    let mut results = dialled
                        .results
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner);
                    results.push((id, result));
                    let _ = dialled.wake.write(1);
                })
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        };
        match started {
            Ok(attempt) => drop(self.dials.insert(id, attempt)),
            Err(error) => self.tell(&Report::Dialled {
                id,
                error: Some(plain(&error)),
            }),
        }
    }

    fn report_dials(&mut self) {
        let _ = self.dialled.wake.read();
        let results = std::mem::take(
            &mut *self
                .dialled
                .results
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for (id, result) in results {
            drop(self.dials.remove(&id));
            let error = result.err().as_ref().map(plain);
            self.tell(&Report::Dialled { id, error });
        }
    }

    fn report_end(&self) {
        let EngineError::GuestEnded {
            reason,
            console,
            remedy,
            ..
        } = self.vm.ended("")
        else {
            return;
        };
        let mut tail = self.vm.vm().console_tail();
        let start = tail.len().saturating_sub(super::TAIL);
        self.tell(&Report::Ended {
            reason: format!("{reason}{console}{remedy}"),
            tail: String::from_utf8_lossy(&tail.split_off(start)).into_owned(),
        });
    }

    fn accept(&self) {
        let Some(debug) = &self.debug else { return };
        // It does not wait: who knocked may have left.
        if let Ok((stream, _)) = debug.accept() {
            let vm: Arc<dyn Sandbox> = Arc::new(Jailed(Arc::clone(&self.vm)));
            debug::serve_connection(stream, vm);
        }
    }
}

/// An error as it crosses the channel.
fn plain(error: &io::Error) -> (i32, String) {
    let number = error.raw_os_error().unwrap_or(match error.kind() {
        io::ErrorKind::ConnectionRefused => libc::ECONNREFUSED,
        io::ErrorKind::NotConnected => libc::ENOTCONN,
        io::ErrorKind::QuotaExceeded => libc::EDQUOT,
        _ => libc::EIO,
    });
    (number, error.to_string())
}

/// The VM, as those at the debug socket may have it.
#[derive(Debug)]
struct Jailed(Arc<MicroVm>);

impl Sandbox for Jailed {
    fn id(&self) -> String {
        self.0.id()
    }

    fn inspect(&self) -> Result<Value, EngineError> {
        self.0.inspect()
    }

    fn stats(&self) -> Result<Value, EngineError> {
        self.0.stats()
    }

    fn registers(&self) -> Result<Value, EngineError> {
        self.0.registers()
    }

    fn pause(&self) -> Result<(), EngineError> {
        self.0.pause()
    }

    fn resume(&self) -> Result<(), EngineError> {
        self.0.resume()
    }

    fn dump(&self, path: &std::path::Path) -> Result<(), EngineError> {
        Err(EngineError::io(format!(
            "{}: the process of this VM is in a jail without files (isolation = \"process\"); run \
             the pod with isolation = \"thread\" to dump it",
            path.display()
        ))(io::ErrorKind::Unsupported.into()))
    }

    fn stop(&self, grace: Duration) -> Result<(), EngineError> {
        self.0.stop(grace)
    }

    fn connect(&self, port: u32, timeout: Duration) -> Result<UnixStream, EngineError> {
        self.0.connect(port, timeout)
    }

    fn console(&self) -> Result<UnixStream, EngineError> {
        self.0.console()
    }
}
