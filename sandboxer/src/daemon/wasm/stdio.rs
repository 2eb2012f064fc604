//! Standard streams of a wasm program. A FIFO is handed to the engine itself; plain files and
//! containerd's streams are copied by the same pumps as those of other sandboxes.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_wasm::Stdio;
use tokio::net::UnixStream;
use tokio::sync::Notify;

use crate::daemon::stdio::{Names, Places, Pumps};
use crate::daemon::streaming::Streams;

/// The streams of one program.
#[derive(Debug, Default)]
pub struct Connected {
    /// For the engine.
    pub stdin: Stdio,
    /// For the engine.
    pub stdout: Stdio,
    /// For the engine.
    pub stderr: Stdio,
    /// What the daemon has to do with them.
    pub held: Held,
}

/// What is kept as long as the program runs.
#[derive(Debug, Default)]
pub struct Held {
    pumps: Pumps,
    /// Our own readers of its output: one that leaves (containerd restarts) must find the rest
    /// when it is back, so writing has to block, not to fail.
    readers: Vec<File>,
    /// Our own writer of its input, until CloseIO: a client that leaves is not the end of it.
    writer: Option<File>,
    close_stdin: Arc<Notify>,
    /// For our own words about its end.
    stderr: Option<OwnedFd>,
}

impl Held {
    /// CloseIO.
    pub fn close_stdin(&mut self) {
        self.writer = None;
        self.close_stdin.notify_one();
    }

    /// Nothing more comes from us, nor is anything taken.
    pub fn close(&mut self) {
        self.stderr = None;
        self.close_stdin();
    }

    /// After the program's end: says why, and waits until its output has been taken.
    pub async fn finish(&mut self, last_words: Option<&str>, limit: Duration) {
        if let (Some(fd), Some(text)) = (self.stderr.take(), last_words) {
            say_last(fd, text);
        }
        self.stderr = None;
        self.close_stdin();
        self.pumps.drained(limit).await;
        self.readers.clear();
    }
}

/// What a pipe takes at once if it is ready to be written to.
const PIPE_BUF: usize = 4096;

/// Written if there is room: nothing waits for a reader of ours.
fn say_last(fd: OwnedFd, text: &str) {
    use std::os::fd::AsFd;
    let mut fds = [nix::poll::PollFd::new(
        fd.as_fd(),
        nix::poll::PollFlags::POLLOUT,
    )];
    if nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO).is_ok_and(|n| n > 0) {
        let end = text.floor_char_boundary(PIPE_BUF - 1);
        let text = format!("{}\n", text.get(..end).unwrap_or(text));
        let _ = nix::unistd::write(&fd, text.as_bytes());
    }
}

/// The FIFO, if that is what the name means.
fn fifo(name: &str) -> Option<&Path> {
    let path = match name.split_once("://") {
        None => name,
        Some(("fifo", path)) => path,
        Some(_) => return None,
    };
    let path = Path::new(path);
    let is_fifo = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_fifo());
    is_fifo.then_some(path)
}

fn open(path: &Path, write: bool) -> io::Result<File> {
    File::options()
        .read(!write)
        .write(write)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// A program's end of a FIFO it writes to, and our reader of it. `None`: nobody reads yet.
fn output(name: &str) -> Option<(File, File)> {
    let path = fifo(name)?;
    // In this order: with our own reader first, the other's absence would not be seen.
    let writer = open(path, true).ok()?;
    let reader = open(path, false).ok()?;
    Some((writer, reader))
}

fn socket_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    Ok((ours, theirs.into_std()?.into()))
}

/// Opens what Create names. Must be called on a runtime.
///
/// # Errors
/// A name is no stream.
pub fn connect(names: &Names, streams: &Arc<Streams>) -> Result<Connected, Status> {
    let mut out = Connected::default();
    // What is left for the pumps.
    let mut rest = names.clone();
    if let Some(path) = fifo(&names.stdin) {
        let failed =
            |e: io::Error| Status::new(Code::InvalidArgument, format!("{}: {e}", path.display()));
        let reader = open(path, false).map_err(failed)?;
        out.held.writer = open(path, true).ok();
        out.stdin = Stdio::Fd(reader.into());
        rest.stdin.clear();
    }
    if let Some((writer, reader)) = output(&names.stdout) {
        out.stdout = Stdio::Fd(writer.into());
        out.held.readers.push(reader);
        rest.stdout.clear();
    }
    if !names.terminal
        && let Some((writer, reader)) = output(&names.stderr)
    {
        out.stderr = Stdio::Fd(writer.into());
        out.held.readers.push(reader);
        rest.stderr.clear();
    }
    // A pair of sockets for each stream that is left.
    let places = Places::parse(&rest, streams)?;
    let mut ours = [None, None, None];
    let engine_ends = [&mut out.stdin, &mut out.stdout, &mut out.stderr];
    for ((wanted, end), theirs) in places.wanted().into_iter().zip(&mut ours).zip(engine_ends) {
        if wanted {
            let (near, far) = socket_pair()
                .map_err(|e| Status::new(Code::Internal, format!("a socket pair: {e}")))?;
            *end = Some((String::new(), near));
            *theirs = Stdio::Fd(far);
        }
    }
    let (pumps, _) = Pumps::between(places, ours);
    out.held.close_stdin = pumps.close_stdin();
    out.held.pumps = pumps;
    let duplicate = |stdio: &Stdio| match stdio {
        Stdio::Fd(fd) => fd.try_clone().ok(),
        Stdio::Null => None,
    };
    if names.terminal {
        // A terminal has one stream; a program sees a pipe in its place.
        out.stderr = duplicate(&out.stdout).map_or(Stdio::Null, Stdio::Fd);
    }
    out.held.stderr = duplicate(&out.stderr);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::io::Write;

    use super::*;

    fn names(dir: &Path) -> Names {
        let make = |name: &str| {
            let path = dir.join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
            path.display().to_string()
        };
        Names {
            stdin: make("in"),
            stdout: make("out"),
            stderr: String::new(),
            terminal: false,
        }
    }

    fn written(stdio: &Stdio, text: &[u8]) {
        let Stdio::Fd(fd) = stdio else {
            panic!("no descriptor")
        };
        let mut file = File::from(fd.try_clone().expect("clone"));
        file.write_all(text).expect("write");
    }

    #[tokio::test]
    async fn fifos_are_handed_over() {
        let dir = tempfile::tempdir().expect("tempdir");
        let names = names(dir.path());
        let mut reader = open(Path::new(&names.stdout), false).expect("open");
        let streams = Arc::new(Streams::default());
        let mut made = connect(&names, &streams).expect("connected");
        written(&made.stdout, b"hello");
        let mut got = [0; 5];
        reader.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"hello");
        made.stdout = Stdio::Null;
        made.held.finish(Some("over"), Duration::ZERO).await;
        assert_eq!(reader.read(&mut got).expect("end"), 0);
        // Input ends with CloseIO.
        let Stdio::Fd(stdin) = &made.stdin else {
            panic!("no input")
        };
        let mut stdin = File::from(stdin.try_clone().expect("clone"));
        assert_eq!(stdin.read(&mut got).expect("end"), 0);
    }

    #[tokio::test]
    async fn a_reader_may_come_late() {
        let dir = tempfile::tempdir().expect("tempdir");
        let names = names(dir.path());
        let streams = Arc::new(Streams::default());
        let mut made = connect(&names, &streams).expect("connected");
        written(&made.stdout, b"late");
        made.stdout = Stdio::Null;
        let path = names.stdout.clone();
        let reader = tokio::task::spawn_blocking(move || std::fs::read(path).expect("read"));
        made.held.finish(None, Duration::from_secs(60)).await;
        assert_eq!(reader.await.expect("joined"), b"late");
    }
}
