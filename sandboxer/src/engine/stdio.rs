//! Copying between this process's standard streams and the guest's, on the runtime's own thread.
//!
//! The descriptors stay in blocking mode, since others share them (the shell that started us):
//! readiness is asked before each read or write, and writes to pipes and terminals are no longer
//! than what a ready one takes without blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// `PIPE_BUF`: what a pipe that polls writable takes whole.
const CHUNK: usize = 4096;

/// Waits for readiness of a descriptor within the current runtime.
///
/// # Errors
/// The descriptor is of a kind that cannot be waited for.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` gives one and the same open descriptor as long as it lives, and the
    // `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// One of our standard streams.
#[derive(Debug)]
pub struct Standard {
    /// `None` for regular files and the like, which never block.
    waiter: Option<AsyncFd<OwnedFd>>,
    file: OwnedFd,
    events: PollFlags,
}

impl Standard {
    /// Standard input.
    ///
    /// # Errors
    /// It is closed.
    pub fn input() -> io::Result<Self> {
        Self::new(io::stdin().as_fd(), Interest::READABLE, PollFlags::POLLIN)
    }

    /// Standard output.
    ///
    /// # Errors
    /// It is closed.
    pub fn output() -> io::Result<Self> {
        Self::new(io::stdout().as_fd(), Interest::WRITABLE, PollFlags::POLLOUT)
    }

    /// Standard error.
    ///
    /// # Errors
    /// It is closed.
    pub fn error() -> io::Result<Self> {
        Self::new(io::stderr().as_fd(), Interest::WRITABLE, PollFlags::POLLOUT)
    }

    fn new(fd: BorrowedFd<'_>, interest: Interest, events: PollFlags) -> io::Result<Self> {
        let file = fd.try_clone_to_owned()?;
        // epoll takes no regular files; they are always ready.
        let waiter = watch(file.try_clone()?, interest).ok();
        Ok(Self {
            waiter,
            file,
            events,
        })
    }

    fn ready_now(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.file.as_fd(), self.events)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(n) => Ok(n > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    async fn ready(&self) -> io::Result<()> {
        let Some(waiter) = &self.waiter else {
            return Ok(());
        };
        loop {
            let mut guard = if self.events == PollFlags::POLLIN {
                waiter.readable().await?
            } else {
                waiter.writable().await?
            };
            if self.ready_now()? {
                return Ok(());
            }
            guard.clear_ready();
        }
    }

    async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.ready().await?;
            match nix::unistd::read(&self.file, buffer) {
                Ok(n) => return Ok(n),
                Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => {
                    tokio::task::yield_now().await
                }
                // A terminal whose session has ended.
                Err(nix::errno::Errno::EIO) => return Ok(0),
                Err(e) => return Err(e.into()),
            }
        }
    }

    async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            self.ready().await?;
            let most = if self.waiter.is_some() {
                CHUNK.min(data.len())
            } else {
                data.len()
            };
            match nix::unistd::write(&self.file, data.get(..most).unwrap_or(data)) {
                Ok(n) => data = data.get(n..).unwrap_or_default(),
                Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => {
                    tokio::task::yield_now().await
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Copies our input to the guest until its end, then gives the guest end of file.
///
/// # Errors
/// Reading ours failed. A guest that takes no more input is no error.
pub async fn feed(mut to: OwnedWriteHalf) -> io::Result<()> {
    let input = Standard::input()?;
    let mut buffer = vec![0u8; 16 << 10];
    loop {
        let n = input.read(&mut buffer).await?;
        if n == 0 {
            // Half close: the guest gives the program end of file.
            let _ = to.shutdown().await;
            return Ok(());
        }
        if to
            .write_all(buffer.get(..n).unwrap_or_default())
            .await
            .is_err()
        {
            return Ok(());
        }
    }
}

/// Copies the guest's output to `output` until its end.
///
/// # Errors
/// Writing ours failed (the reader of our pipe has gone); the guest's output is dropped then.
pub async fn drain(mut from: OwnedReadHalf, output: Standard) -> io::Result<()> {
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let n = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return Ok(()),
            Ok(n) => n,
        };
        output
            .write_all(buffer.get(..n).unwrap_or_default())
            .await?;
    }
}

/// Both halves of a guest stream.
pub fn split(stream: UnixStream) -> (OwnedReadHalf, OwnedWriteHalf) {
    stream.into_split()
}
