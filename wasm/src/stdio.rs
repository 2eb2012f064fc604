//! Standard streams of a program on file descriptors of the host.
//!
//! A write never blocks the program's thread: a slow reader holds the program back, one buffer is
//! all that waits on our side, and the program can be ended meanwhile.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{Mode, SFlag, fstat};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use wasmtime_wasi::async_trait;
use wasmtime_wasi::cli::{IsTerminal, StdinStream, StdoutStream};
use wasmtime_wasi::p2::{InputStream, OutputStream, Pollable, StreamError, StreamResult};

/// Most bytes taken from the program before they are written, and read before it asks for more.
const CHUNK: usize = 64 << 10;
/// What may be written to a pipe that is ready without blocking.
const PIPE_BUF: usize = 4096;

/// Where a standard stream leads.
#[derive(Debug, Default)]
pub enum Stdio {
    /// Reads end at once, writes vanish.
    #[default]
    Null,
    /// A pipe, socket, terminal or file.
    Fd(OwnedFd),
}

impl Stdio {
    /// A duplicate of one of our own streams.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn duplicate(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self::Fd(fd.as_fd().try_clone_to_owned()?))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// A regular file or device without readiness.
    Direct,
    /// The open file description is ours and does not block.
    NonBlocking,
    Socket,
    /// Shared with others, so its flags stay as they are: asked before each call.
    Asked,
}

#[derive(Debug)]
struct Number(RawFd);

impl AsRawFd for Number {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// One stream. Made on the runtime that uses it.
#[derive(Debug)]
pub(crate) struct Stream {
    // Before the descriptor: it must be deregistered while that is open.
    ready: Option<AsyncFd<Number>>,
    fd: OwnedFd,
    how: How,
    terminal: bool,
    /// A pipe without a reader is an error with a number of its own (EPIPE), as programs of preview 1
    /// look for; in components, the stream is closed.
    numbered: bool,
    /// Taken from the program, not written yet.
    pending: Mutex<Bytes>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    In,
    Out,
}

impl Stream {
    /// Makes a stream; `None` for [`Stdio::Null`].
    /// `numbered`: see there.
    pub(crate) fn new(
        stdio: Stdio,
        direction: Direction,
        numbered: bool,
    ) -> io::Result<Option<Arc<Self>>> {
        let Stdio::Fd(fd) = stdio else {
            return Ok(None);
        };
        let kind = SFlag::from_bits_truncate(fstat(&fd)?.st_mode & SFlag::S_IFMT.bits());
        let terminal = nix::unistd::isatty(&fd).unwrap_or(false);
        let (fd, mut how) = match kind {
            SFlag::S_IFSOCK => (fd, How::Socket),
            SFlag::S_IFIFO | SFlag::S_IFCHR if kind == SFlag::S_IFIFO || terminal => {
                // Our own description of the same pipe: its flags are nobody else's.
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let access = match direction {
                    Direction::In => OFlag::O_RDONLY,
                    Direction::Out => OFlag::O_WRONLY,
                };
                let flags = access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
                match open(path.as_str(), flags, Mode::empty()) {
                    Ok(own) => (own, How::NonBlocking),
                    Err(_) => (fd, How::Asked),
                }
            }
            _ => (fd, How::Direct),
        };
        let ready = if how == How::Direct {
            None
        } else {
            let interest = match direction {
                Direction::In => Interest::READABLE,
                Direction::Out => Interest::WRITABLE,
            };
            // SAFETY: the descriptor is ours, stays open behind the registration (fields are
            // dropped in order, that one first) and keeps its number.
            let ready =
                unsafe { AsyncFd::register_with_interest(Number(fd.as_raw_fd()), interest) }.ok();
            if ready.is_none() {
                how = How::Direct;
            }
            ready
        };
        Ok(Some(Arc::new(Self {
            ready,
            fd,
            how,
            terminal,
            numbered,
            pending: Mutex::new(Bytes::new()),
        })))
    }

    fn pending(&self) -> MutexGuard<'_, Bytes> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if a call that may block would not.
    fn asked(&self, wanted: PollFlags) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), wanted)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    fn write_some(&self, data: &[u8]) -> io::Result<usize> {
        let written = match self.how {
            How::Direct | How::NonBlocking => nix::unistd::write(&self.fd, data),
            How::Socket => send(
                self.fd.as_raw_fd(),
                data,
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            ),
            How::Asked if !self.asked(PollFlags::POLLOUT) => Err(nix::errno::Errno::EAGAIN),
            How::Asked => {
                let some = data.get(..PIPE_BUF).unwrap_or(data);
                nix::unistd::write(&self.fd, some)
            }
        };
        written.map_err(Into::into)
    }

    fn read_some(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if matches!(self.how, How::Asked | How::Socket) && !self.asked(PollFlags::POLLIN) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(nix::unistd::read(&self.fd, buffer)?)
    }

    fn error(&self, error: io::Error) -> StreamError {
        if error.kind() == io::ErrorKind::BrokenPipe && !self.numbered {
            StreamError::Closed
        } else {
            StreamError::LastOperationFailed(error.into())
        }
    }

    /// Writes what waits, as far as it goes without blocking. True when nothing is left.
    fn drain_now(&self) -> io::Result<bool> {
        let mut pending = self.pending();
        while !pending.is_empty() {
            match self.write_some(&pending) {
                Ok(n) => {
                    let n = n.min(pending.len());
                    pending.advance(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => {
                    pending.clear();
                    return Err(e);
                }
            }
        }
        Ok(true)
    }

    /// Writes what waits.
    pub(crate) async fn drain(&self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_drain(cx)).await
    }

    fn poll_drain(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.drain_now()? {
                return Poll::Ready(Ok(()));
            }
            let Some(ready) = &self.ready else {
                return Poll::Ready(Err(io::ErrorKind::WouldBlock.into()));
            };
            // What the runtime remembers may be old: forget it, then wait or find it true again.
            let mut guard = ready!(ready.poll_write_ready(cx))?;
            if !self.drain_now()? {
                guard.clear_ready();
            }
        }
    }

    fn poll_read_into(&self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.read_some(out) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let Some(ready) = &self.ready else {
                        return Poll::Ready(Err(e));
                    };
                    let mut guard = ready!(ready.poll_read_ready(cx))?;
                    if !self.asked(PollFlags::POLLIN) {
                        guard.clear_ready();
                    }
                }
                other => return Poll::Ready(other),
            }
        }
    }
}

/// Standard output or error; [`None`] swallows all.
#[derive(Debug, Clone)]
pub(crate) struct Output(pub(crate) Option<Arc<Stream>>);

impl Output {
    /// Adds a message of ours, if there is room for it at once.
    pub(crate) fn log(&self, text: &str) {
        if let Some(stream) = &self.0 {
            let mut pending = stream.pending();
            if pending.is_empty() {
                *pending = Bytes::copy_from_slice(text.as_bytes());
                drop(pending);
                let _ = stream.drain_now();
            }
        }
    }
}

impl IsTerminal for Output {
    fn is_terminal(&self) -> bool {
        self.0.as_ref().is_some_and(|s| s.terminal)
    }
}

impl StdoutStream for Output {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }

    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }
}

#[async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {
        if let Some(stream) = &self.0 {
            // The error is found again, and reported, by the next write.
            let _ = stream.drain().await;
        }
    }
}

impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        let Some(stream) = &self.0 else {
            return Ok(());
        };
        {
            let mut pending = stream.pending();
            if !pending.is_empty() {
                return Err(StreamError::trap("write without permission"));
            }
            *pending = bytes;
        }
        stream.drain_now().map_err(|e| stream.error(e))?;
        // What is left may be a piece of the program's memory's copy: nothing is borrowed.
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        match &self.0 {
            Some(stream) if !stream.drain_now().map_err(|e| stream.error(e))? => Ok(0),
            _ => Ok(CHUNK),
        }
    }
}

impl AsyncWrite for Output {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Some(stream) = &self.0 else {
            return Poll::Ready(Ok(data.len()));
        };
        ready!(stream.poll_drain(cx))?;
        let some = data.get(..CHUNK).unwrap_or(data);
        *stream.pending() = Bytes::copy_from_slice(some);
        stream.drain_now()?;
        Poll::Ready(Ok(some.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.0 {
            Some(stream) => stream.poll_drain(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

/// Standard input; [`None`] is at its end.
#[derive(Debug, Clone)]
pub(crate) struct Input(pub(crate) Option<Arc<Stream>>);

impl IsTerminal for Input {
    fn is_terminal(&self) -> bool {
        self.0.as_ref().is_some_and(|s| s.terminal)
    }
}

impl StdinStream for Input {
    fn p2_stream(&self) -> Box<dyn InputStream> {
        Box::new(self.clone())
    }

    fn async_stream(&self) -> Box<dyn AsyncRead + Send + Sync> {
        Box::new(self.clone())
    }
}

#[async_trait]
impl Pollable for Input {
    async fn ready(&mut self) {
        let Some(Stream {
            ready: Some(ready), ..
        }) = self.0.as_deref()
        else {
            return;
        };
        loop {
            let Ok(mut guard) = ready.readable().await else {
                return;
            };
            if self.0.as_ref().is_some_and(|s| s.asked(PollFlags::POLLIN)) {
                return;
            }
            guard.clear_ready();
        }
    }
}

impl InputStream for Input {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        let Some(stream) = &self.0 else {
            return Err(StreamError::Closed);
        };
        if size == 0 {
            return Ok(Bytes::new());
        }
        let mut buffer = BytesMut::zeroed(size.min(CHUNK));
        match stream.read_some(&mut buffer) {
            Ok(0) => Err(StreamError::Closed),
            Ok(n) => {
                buffer.truncate(n);
                Ok(buffer.freeze())
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(Bytes::new())
            }
            Err(e) => Err(stream.error(e)),
        }
    }
}

impl AsyncRead for Input {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(stream) = &self.0 else {
            return Poll::Ready(Ok(()));
        };
        let n = ready!(stream.poll_read_into(cx, out.initialize_unfilled()))?;
        out.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
