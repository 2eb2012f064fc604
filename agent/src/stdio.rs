//! Moves bytes between a process and its streams, through one bounded buffer per direction.
//!
//! Each direction is a task of its own: a stream nobody reads stops its own process and nothing
//! else.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::error::{Context as _, Result};
use crate::streams::Streams;
use crate::transport::watch as watch_fd;

/// Bytes under way in one direction.
const BUFFER: usize = 32 << 10;

/// A pipe's end or a terminal's master as an async stream.
#[derive(Clone)]
struct AsyncFile(Arc<AsyncFd<OwnedFd>>);

impl AsyncFile {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(Arc::new(watch_fd(
            fd,
            Interest::READABLE | Interest::WRITABLE,
        )?)))
    }
}

impl AsyncRead for AsyncFile {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let result = guard.try_io(|fd| Ok(nix::unistd::read(fd, buf.initialize_unfilled())?));
            match result {
                Ok(Ok(n)) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for AsyncFile {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(nix::unistd::write(fd, data)?)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Streams of a process before it exists.
pub struct Streaming {
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
    terminal: bool,
}

/// What the process gets as descriptors 0, 1 and 2. A terminal replaces them later.
pub struct ChildEnds {
    /// Descriptor 0.
    pub stdin: OwnedFd,
    /// Descriptor 1.
    pub stdout: OwnedFd,
    /// Descriptor 2.
    pub stderr: OwnedFd,
}

/// Our ends, once the process's ends are made.
pub struct OurEnds {
    stdin: Option<(UnixStream, OwnedFd)>,
    outputs: Vec<(UnixStream, OwnedFd)>,
    /// Of a terminal: streams that wait for its master.
    terminal: Option<(Option<UnixStream>, Option<UnixStream>)>,
}

/// The moving of a process's bytes.
#[derive(Default)]
pub struct Pumps {
    close_stdin: Arc<Notify>,
    ended: watch::Sender<bool>,
    master: Option<Arc<AsyncFd<OwnedFd>>>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Pumps {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Streaming {
    /// Takes the streams that a request names.
    pub fn take(
        streams: &Streams,
        terminal: bool,
        stdin: &str,
        stdout: &str,
        stderr: &str,
    ) -> Result<Self> {
        Ok(Self {
            stdin: streams.take(stdin)?,
            stdout: streams.take(stdout)?,
            // A terminal has one output.
            stderr: if terminal {
                None
            } else {
                streams.take(stderr)?
            },
            terminal,
        })
    }

    /// Makes the pipes. `owner` is the user and group of the process: it may open /dev/stdout
    /// and /dev/stderr again.
    pub fn open(self, owner: (u32, u32)) -> Result<(ChildEnds, OurEnds)> {
        let null = || -> Result<OwnedFd> {
            Ok(std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/null")
                .context(|| "open /dev/null".to_owned())?
                .into())
        };
        if self.terminal {
            return Ok((
                ChildEnds {
                    stdin: null()?,
                    stdout: null()?,
                    stderr: null()?,
                },
                OurEnds {
                    stdin: None,
                    outputs: Vec::new(),
                    terminal: Some((self.stdin, self.stdout)),
                },
            ));
        }
        let pipe = || -> Result<(OwnedFd, OwnedFd)> {
            let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)
                .context(|| "make a pipe for stdio".to_owned())?;
            nix::unistd::fchown(
                &read,
                Some(nix::unistd::Uid::from_raw(owner.0)),
                Some(nix::unistd::Gid::from_raw(owner.1)),
            )
            .context(|| "give a stdio pipe to the process's user".to_owned())?;
            Ok((read, write))
        };
        let mut outputs = Vec::new();
        let mut output = |stream: Option<UnixStream>| match stream {
            None => null(),
            Some(stream) => {
                let (read, write) = pipe()?;
                outputs.push((stream, read));
                Ok(write)
            }
        };
        let stdout = output(self.stdout)?;
        let stderr = output(self.stderr)?;
        let (child_stdin, stdin) = match self.stdin {
            None => (null()?, None),
            Some(stream) => {
                let (read, write) = pipe()?;
                (read, Some((stream, write)))
            }
        };
        Ok((
            ChildEnds {
                stdin: child_stdin,
                stdout,
                stderr,
            },
            OurEnds {
                stdin,
                outputs,
                terminal: None,
            },
        ))
    }
}

impl OurEnds {
    /// Starts to move bytes; `master` is the terminal's.
    pub fn start(self, master: Option<OwnedFd>) -> Result<Pumps> {
        let mut pumps = Pumps::default();
        let file = |fd| AsyncFile::new(fd).context(|| "watch a stdio pipe".to_owned());
        if let Some((stream, fd)) = self.stdin {
            pumps.spawn_input(stream, file(fd)?, None);
        }
        for (stream, fd) in self.outputs {
            pumps.spawn_output(Some(stream), file(fd)?);
        }
        if let (Some((stdin, stdout)), Some(master)) = (self.terminal, master) {
            let master = file(master)?;
            pumps.master = Some(master.0.clone());
            if let Some(stream) = stdin {
                pumps.spawn_input(stream, master.clone(), Some(master.0.clone()));
            }
            // Also without a stream: somebody has to read a terminal's output.
            pumps.spawn_output(stdout, master);
        }
        Ok(pumps)
    }
}

impl Pumps {
    fn spawn_input(
        &mut self,
        stream: UnixStream,
        file: AsyncFile,
        terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    ) {
        let close = self.close_stdin.clone();
        let task = tokio::spawn(pump_input(stream, file, terminal, close));
        self.tasks.push(task.abort_handle());
    }

    fn spawn_output(&mut self, stream: Option<UnixStream>, file: AsyncFile) {
        let ended = self.ended.subscribe();
        let task = tokio::spawn(pump_output(file, stream, ended));
        self.tasks.push(task.abort_handle());
    }

    /// Ends standard input after what has arrived.
    pub fn close_stdin(&self) {
        // Kept for a task that is not waiting yet.
        self.close_stdin.notify_one();
    }

    /// The process has ended: pass on what it wrote, then end its streams.
    pub fn process_ended(&self) {
        self.ended.send_replace(true);
        self.close_stdin.notify_one();
    }

    /// The terminal, if there is one.
    pub fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.master.as_ref().map(|m| m.get_ref().as_fd())
    }
}

async fn pump_input(
    mut stream: UnixStream,
    mut file: AsyncFile,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    close: Arc<Notify>,
) {
    let mut buffer = vec![0; BUFFER];
    let mut closing = false;
    loop {
        let n = if closing {
            stream.try_read(&mut buffer).unwrap_or(0)
        } else {
            tokio::select! {
                biased;
                read = stream.read(&mut buffer) => read.unwrap_or(0),
                () = close.notified() => {
                    closing = true;
                    continue;
                }
            }
        };
        let Some(data) = buffer.get(..n).filter(|d| !d.is_empty()) else {
            break;
        };
        // The process has closed its input, or is gone.
        if file.write_all(data).await.is_err() {
            return;
        }
    }
    if let Some(master) = terminal {
        // A terminal has no end of file; its line discipline makes one from this character.
        let eof = nix::sys::termios::tcgetattr(master.get_ref())
            .ok()
            .and_then(|t| {
                t.control_chars
                    .get(nix::sys::termios::SpecialCharacterIndices::VEOF as usize)
                    .copied()
            })
            .unwrap_or(4);
        let _ = file.write_all(&[eof]).await;
    }
}

async fn pump_output(
    mut file: AsyncFile,
    mut stream: Option<UnixStream>,
    mut ended: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; BUFFER];
    let mut draining = false;
    loop {
        let read = if draining && stream.is_some() {
            match nix::unistd::read(file.0.get_ref(), &mut buffer) {
                Err(Errno::EAGAIN) => {
                    // All that the process wrote has been passed on. Whoever it left behind may
                    // write on, to nobody.
                    if let Some(mut stream) = stream.take() {
                        let _ = stream.shutdown().await;
                    }
                    continue;
                }
                other => other.map_err(io::Error::from),
            }
        } else {
            tokio::select! {
                biased;
                read = file.read(&mut buffer) => read,
                changed = ended.changed(), if !draining => {
                    draining = changed.is_ok();
                    if changed.is_err() {
                        return;
                    }
                    continue;
                }
            }
        };
        let n = match read {
            Ok(n) => n,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
            // EIO: nobody has the terminal open any more.
            Err(_) => 0,
        };
        let Some(data) = buffer.get(..n).filter(|d| !d.is_empty()) else {
            break;
        };
        if let Some(open) = &mut stream
            && open.write_all(data).await.is_err()
        {
            // The host has gone. The process must not block on that, nor die of SIGPIPE.
            stream = None;
        }
    }
    if let Some(mut stream) = stream {
        let _ = stream.shutdown().await;
    }
}

/// Sets a terminal's size in characters; the kernel sends SIGWINCH.
pub fn resize(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    Errno::result(result)
        .map(drop)
        .context(|| format!("set the terminal's size to {columns}x{rows}"))
}
