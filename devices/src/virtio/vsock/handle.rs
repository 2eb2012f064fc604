//! The host's side: connecting to ports of the guest and listening for the guest's connections.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// Most connections from the guest that wait for `accept` on one listener; further ones are
/// refused, so that a guest cannot make the host hold sockets nobody takes.
pub(super) const MAX_BACKLOG: usize = 128;
/// Most connection attempts from the host that the device has not looked at yet.
const MAX_COMMANDS: usize = 4096;

/// Called once with the outcome of a connection attempt.
pub(super) type Done = Box<dyn FnOnce(io::Result<UnixStream>) + Send>;

/// What the host's threads ask of the device's thread.
pub(super) enum Command {
    Connect {
        id: u64,
        port: u32,
        /// The host's end of the stream to be, if the caller has made a pair of its own.
        given: Option<UnixStream>,
        done: Done,
    },
    Cancel {
        id: u64,
    },
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect { id, port, .. } => write!(f, "Connect({id}, port {port})"),
            Self::Cancel { id } => write!(f, "Cancel({id})"),
        }
    }
}

/// Whom to tell how a connection attempt ended: once, by the device or, when the VM has ended and
/// with it the device's thread, by [`Shared::close`].
struct Attempt(Mutex<Option<Done>>);

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Attempt")
    }
}

impl Attempt {
    fn finish(&self, outcome: io::Result<UnixStream>) {
        let done = lock(&self.0).take();
        if let Some(done) = done {
            done(outcome);
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    closed: bool,
    commands: VecDeque<Command>,
    /// Attempts without an outcome, by the number of their command.
    attempts: HashMap<u64, Arc<Attempt>>,
    listeners: HashMap<u32, Arc<Backlog>>,
}

/// Shared by the handles and the device.
#[derive(Debug)]
pub(super) struct Shared {
    wake: EventFd,
    next_id: AtomicU64,
    inner: Mutex<Inner>,
}

/// Nothing in here panics while it holds a lock; if something ever does, the data is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone() -> io::Error {
    io::Error::new(
        io::ErrorKind::NotConnected,
        "vsock: the virtual machine has ended",
    )
}

fn event_fd(flags: i32) -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC | flags)
}

impl Shared {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            wake: event_fd(0)?,
            next_id: AtomicU64::new(1),
            inner: Mutex::new(Inner::default()),
        }))
    }

    /// Readable when there are commands, or when the device left itself work.
    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn wake(&self) {
        // Fails only if the counter is about to overflow, and then it is readable anyway.
        let _ = self.wake.write(1);
    }

    pub(super) fn take_commands(&self) -> VecDeque<Command> {
        std::mem::take(&mut lock(&self.inner).commands)
    }

    /// Puts commands back that cannot be served before the driver is ready.
    pub(super) fn put_back(&self, mut commands: VecDeque<Command>) {
        let mut inner = lock(&self.inner);
        commands.append(&mut inner.commands);
        inner.commands = commands;
    }

    /// The backlog of the listener on `port`, if it has room for one more connection.
    pub(super) fn backlog(&self, port: u32) -> Option<Arc<Backlog>> {
        let inner = lock(&self.inner);
        inner
            .listeners
            .get(&port)
            .filter(|backlog| backlog.has_room())
            .cloned()
    }

    /// The device is gone, or will never run again: nothing connects any more.
    pub(super) fn close(&self) {
        let (commands, attempts, listeners) = {
            let mut inner = lock(&self.inner);
            inner.closed = true;
            (
                std::mem::take(&mut inner.commands),
                std::mem::take(&mut inner.attempts),
                std::mem::take(&mut inner.listeners),
            )
        };
        drop(commands);
        for attempt in attempts.into_values() {
            attempt.finish(Err(gone()));
        }
        for backlog in listeners.values() {
            backlog.close();
        }
    }
}

/// Connections from the guest that wait for `accept`.
#[derive(Debug)]
pub(super) struct Backlog {
    queue: Mutex<Waiting>,
    /// Semaphore: one count per waiting connection (and one when closed).
    ready: EventFd,
}

#[derive(Debug, Default)]
struct Waiting {
    closed: bool,
    streams: VecDeque<UnixStream>,
}

impl Backlog {
    fn has_room(&self) -> bool {
        let queue = lock(&self.queue);
        !queue.closed && queue.streams.len() < MAX_BACKLOG
    }

    /// Hands a connection to whoever accepts; false if the listener has gone meanwhile.
    pub(super) fn push(&self, stream: UnixStream) -> bool {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return false;
        }
        queue.streams.push_back(stream);
        drop(queue);
        let _ = self.ready.write(1);
        true
    }

    fn close(&self) {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        // Dropping these tells the device, which resets them on the guest's side.
        queue.streams.clear();
        drop(queue);
        let _ = self.ready.write(1);
    }
}

/// The host's entrance to one guest's sockets. Cheap to clone; works from any thread.
///
/// Streams are one end of a unix socket pair: ordinary descriptors for blocking use, `epoll` or
/// tokio (`tokio::net::UnixStream::from_std` after `set_nonblocking(true)`), with half close by
/// `shutdown`. When the guest closes or resets a connection the stream reads end of file after
/// the data that arrived before.
#[derive(Clone, Debug)]
pub struct VsockHandle {
    shared: Arc<Shared>,
}

/// A connection attempt under way; dropping it gives the attempt up.
#[must_use = "dropping this cancels the connection attempt"]
#[derive(Debug)]
pub struct Connecting {
    shared: Arc<Shared>,
    id: u64,
    attempt: Arc<Attempt>,
}

impl Drop for Connecting {
    fn drop(&mut self) {
        // The caller's closure is dropped without a lock, as it may own anything.
        let Some(_done) = lock(&self.attempt.0).take() else {
            return;
        };
        let mut inner = lock(&self.shared.inner);
        let id = self.id;
        inner.attempts.remove(&id);
        let unseen = inner.commands.iter().position(
            |command| matches!(command, Command::Connect { id: other, .. } if *other == id),
        );
        // If the device has not seen the attempt yet, it never will.
        let dropped = unseen.and_then(|at| inner.commands.remove(at));
        if dropped.is_none() && !inner.closed {
            inner.commands.push_back(Command::Cancel { id });
            self.shared.wake();
        }
        drop(inner);
        drop(dropped);
    }
}

impl VsockHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Connects to `port` of the guest, waiting at most `timeout` for the guest's driver to be
    /// ready and for its answer. Must not be called on the device's event loop thread.
    ///
    /// # Errors
    /// `ConnectionRefused` if nothing listens on that port, `TimedOut`, `ConnectionReset` if the
    /// guest reset its vsock device, `NotConnected` if the VM has ended, `QuotaExceeded` if it has
    /// too many streams, or what the host says about sockets.
    pub fn connect(&self, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let attempt = self.start_connect(port, move |outcome| {
            // Fails if the waiting side timed out at this moment; the stream is then closed.
            let _ = sender.send(outcome);
        })?;
        let outcome = receiver.recv_timeout(timeout);
        drop(attempt);
        match outcome {
            Ok(outcome) => outcome,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("vsock: no answer from port {port} of the guest within {timeout:?}"),
            )),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }

    /// Starts to connect to `port` of the guest; `done` is called exactly once with the outcome,
    /// unless the returned value is dropped before. For async callers: send the outcome through
    /// a oneshot channel. `done` runs on the device's event loop and must not block.
    ///
    /// # Errors
    /// `NotConnected` if the VM has ended, `QuotaExceeded` if too many attempts are pending.
    pub fn start_connect(
        &self,
        port: u32,
        done: impl FnOnce(io::Result<UnixStream>) + Send + 'static,
    ) -> io::Result<Connecting> {
        self.start(port, None, done)
    }

    /// As [`start_connect`](Self::start_connect), but the guest's bytes go through `stream`, whose
    /// other end somebody else holds: one end of a pair of a process that does not want to share an
    /// open file with this one. `done` gets `stream` itself again; it may drop it.
    ///
    /// # Errors
    /// As [`start_connect`](Self::start_connect).
    pub fn start_connect_over(
        &self,
        port: u32,
        stream: UnixStream,
        done: impl FnOnce(io::Result<UnixStream>) + Send + 'static,
    ) -> io::Result<Connecting> {
        self.start(port, Some(stream), done)
    }

    fn start(
        &self,
        port: u32,
        given: Option<UnixStream>,
        done: impl FnOnce(io::Result<UnixStream>) + Send + 'static,
    ) -> io::Result<Connecting> {
        let attempt = Arc::new(Attempt(Mutex::new(Some(Box::new(done)))));
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let mut inner = lock(&self.shared.inner);
        if inner.closed {
            return Err(gone());
        }
        if inner.commands.len() >= MAX_COMMANDS {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("vsock: {MAX_COMMANDS} connection attempts are pending; is the guest up?"),
            ));
        }
        inner.commands.push_back(Command::Connect {
            id,
            port,
            given,
            done: Box::new({
                let attempt = Arc::clone(&attempt);
                // The device holds this, and is held by what holds `shared`.
                let shared = Arc::downgrade(&self.shared);
                move |outcome| {
                    if let Some(shared) = shared.upgrade() {
                        lock(&shared.inner).attempts.remove(&id);
                    }
                    attempt.finish(outcome);
                }
            }),
        });
        inner.attempts.insert(id, Arc::clone(&attempt));
        drop(inner);
        self.shared.wake();
        Ok(Connecting {
            shared: Arc::clone(&self.shared),
            id,
            attempt,
        })
    }

    /// Says that the VM has ended: whoever waits for a connection, in whichever direction, learns
    /// it now and not at the end of his patience, during which he might keep the VM's memory.
    pub fn close(&self) {
        self.shared.close();
    }

    /// Listens for connections of the guest to `port` of the host (CID 2).
    ///
    /// # Errors
    /// `AddrInUse` if somebody already listens there, `NotConnected` if the VM has ended, or the
    /// host is out of descriptors.
    pub fn listen(&self, port: u32) -> io::Result<VsockListener> {
        let mut inner = lock(&self.shared.inner);
        if inner.closed {
            return Err(gone());
        }
        if inner.listeners.contains_key(&port) {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("vsock: port {port} already has a listener"),
            ));
        }
        let backlog = Arc::new(Backlog {
            queue: Mutex::new(Waiting::default()),
            ready: event_fd(libc::EFD_SEMAPHORE)?,
        });
        inner.listeners.insert(port, Arc::clone(&backlog));
        drop(inner);
        Ok(VsockListener {
            shared: Arc::clone(&self.shared),
            backlog,
            port,
            nonblocking: AtomicBool::new(false),
        })
    }
}

/// Takes the guest's connections to one port of the host. Dropping it ends the listening and
/// closes the connections nobody accepted.
///
/// The descriptor (`AsRawFd`, `AsFd`) is readable while a connection waits: with
/// [`set_nonblocking`](Self::set_nonblocking) it fits `epoll` and tokio's `AsyncFd`.
#[derive(Debug)]
pub struct VsockListener {
    shared: Arc<Shared>,
    backlog: Arc<Backlog>,
    port: u32,
    nonblocking: AtomicBool,
}

impl VsockListener {
    /// The port listened on.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Whether [`accept`](Self::accept) returns `WouldBlock` instead of waiting.
    pub fn set_nonblocking(&self, nonblocking: bool) {
        self.nonblocking.store(nonblocking, Ordering::Relaxed);
    }

    /// Takes the next connection.
    ///
    /// # Errors
    /// `WouldBlock` if none waits and the listener does not block; `NotConnected` once the VM has
    /// ended.
    pub fn accept(&self) -> io::Result<UnixStream> {
        loop {
            match self.backlog.ready.read() {
                Ok(_) => {
                    let mut queue = lock(&self.backlog.queue);
                    if let Some(stream) = queue.streams.pop_front() {
                        return Ok(stream);
                    }
                    if queue.closed {
                        drop(queue);
                        // The next call must see the end too.
                        let _ = self.backlog.ready.write(1);
                        return Err(gone());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.nonblocking.load(Ordering::Relaxed) {
                        return Err(error);
                    }
                    wait_readable(self.backlog.ready.as_raw_fd())?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn wait_readable(fd: RawFd) -> io::Result<()> {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd, and the count says so.
    let n = unsafe { libc::poll(&mut poll, 1, -1) };
    if n < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}

impl AsRawFd for VsockListener {
    fn as_raw_fd(&self) -> RawFd {
        self.backlog.ready.as_raw_fd()
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the eventfd in `self.backlog`, which lives at least
        // as long as the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.backlog.ready.as_raw_fd()) }
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        let mut inner = lock(&self.shared.inner);
        if inner
            .listeners
            .get(&self.port)
            .is_some_and(|other| Arc::ptr_eq(other, &self.backlog))
        {
            inner.listeners.remove(&self.port);
        }
        drop(inner);
        self.backlog.close();
    }
}
