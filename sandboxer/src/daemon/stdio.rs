//! Standard streams of a process: between the guest's streams and what containerd names in Create
//! and Exec, which is a FIFO, a plain file, or a stream of its own (see [`super::streaming`]).
//!
//! Each direction is one task with one bounded buffer. Output nobody reads stops the process that
//! writes it, and nothing else. Output is whole before the process's end is reported, unless
//! nobody takes it.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::streaming::{CHUNK, Claim, End, Streams};

/// First and longest pause while containerd's reader has not opened its FIFO yet.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// How long that may take: containerd opens its end before it makes the call.
const READER_TIME: Duration = Duration::from_secs(60);

/// What a Create or Exec call says about standard streams.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct Names {
    /// Standard input; empty: none.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Whether there is a terminal.
    pub terminal: bool,
}

/// Where a stream leads to on the host.
#[derive(Debug)]
enum Place {
    Fifo(PathBuf),
    File(PathBuf),
    Stream(Claim),
}

impl Place {
    fn parse(text: &str, streams: &Arc<Streams>) -> Result<Option<Self>, Status> {
        if text.is_empty() {
            return Ok(None);
        }
        let unsupported = || {
            let shown: String = text.chars().take(200).collect();
            Status::new(
                Code::InvalidArgument,
                format!("standard stream {shown:?}: neither a FIFO, a file: URL nor a stream"),
            )
        };
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Some(Self::Fifo(text.into())));
        };
        match scheme {
            "fifo" => Ok(Some(Self::Fifo(rest.into()))),
            "file" => Ok(Some(Self::File(rest.into()))),
            "ttrpc+unix" => {
                let (_, query) = rest.split_once('?').ok_or_else(unsupported)?;
                let id = query
                    .split('&')
                    .find_map(|part| part.strip_prefix("streaming_id="))
                    .filter(|id| !id.is_empty())
                    .ok_or_else(unsupported)?;
                Ok(Some(Self::Stream(streams.claim(id)?)))
            }
            _ => Err(unsupported()),
        }
    }
}

/// Where the streams of one process lead to.
#[derive(Debug, Default)]
pub struct Places {
    stdin: Option<Place>,
    stdout: Option<Place>,
    stderr: Option<Place>,
}

impl Places {
    /// What the names mean.
    ///
    /// # Errors
    /// One of them is no stream.
    pub fn parse(names: &Names, streams: &Arc<Streams>) -> Result<Self, Status> {
        Ok(Self {
            stdin: Place::parse(&names.stdin, streams)?,
            stdout: Place::parse(&names.stdout, streams)?,
            stderr: match names.terminal {
                true => None,
                false => Place::parse(&names.stderr, streams)?,
            },
        })
    }

    /// Which of input, output and error there are.
    pub fn wanted(&self) -> [bool; 3] {
        [&self.stdin, &self.stdout, &self.stderr].map(Option::is_some)
    }
}

/// The streams of one process, being copied.
#[derive(Debug, Default)]
pub struct Pumps {
    input: Option<JoinHandle<()>>,
    output: Vec<JoinHandle<()>>,
    close_stdin: Arc<Notify>,
}

/// Names of the guest's streams, for the call to the agent.
#[derive(Debug, Default)]
pub struct GuestNames {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Pumps {
    /// Copies between the places and named other ends, which are there where one is wanted.
    /// Dropping the result ends that.
    pub fn between(places: Places, ends: [Option<(String, UnixStream)>; 3]) -> (Self, GuestNames) {
        let [guest_in, guest_out, guest_err] = ends;
        let mut pumps = Self::default();
        let mut guest_names = GuestNames::default();
        if let (Some(place), Some((uri, stream))) = (places.stdin, guest_in) {
            guest_names.stdin = uri;
            let close = Arc::clone(&pumps.close_stdin);
            pumps.input = Some(tokio::spawn(async move {
                if let Err(error) = input(place, stream, &close).await {
                    tracing::debug!(%error, "standard input ended");
                }
            }));
        }
        for (place, stream, name) in [
            (places.stdout, guest_out, &mut guest_names.stdout),
            (places.stderr, guest_err, &mut guest_names.stderr),
        ] {
            if let (Some(place), Some((uri, stream))) = (place, stream) {
                *name = uri;
                pumps.output.push(tokio::spawn(async move {
                    if let Err(error) = output(place, stream).await {
                        tracing::debug!(%error, "output ended early");
                    }
                }));
            }
        }
        (pumps, guest_names)
    }

    /// After the process's end: waits until its output has been taken, but not for ever. What is
    /// left goes on being copied.
    pub async fn drained(&mut self, limit: Duration) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
        let all = async {
            for pump in &mut self.output {
                let _ = pump.await;
            }
        };
        if tokio::time::timeout(limit, all).await.is_ok() {
            self.output.clear();
        } else {
            // Those that have ended must not be waited for again.
            self.output.retain(|pump| !pump.is_finished());
        }
    }

    /// CloseIO: standard input ends once its writers have left.
    pub fn close_stdin(&self) -> Arc<Notify> {
        Arc::clone(&self.close_stdin)
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        for pump in self.input.iter().chain(&self.output) {
            pump.abort();
        }
    }
}

/// From the guest to the host until the guest says that there is no more.
async fn output(place: Place, mut guest: UnixStream) -> io::Result<()> {
    match place {
        Place::Fifo(path) => {
            let mut out = open_for_writing(&path).await?;
            // A reader that leaves (containerd restarts) must find the rest when it is back: with
            // a reader of our own, writing blocks instead of failing.
            let keep = pipe::OpenOptions::new().open_receiver(&path)?;
            let copied = copy(&mut guest, &mut out).await;
            drop(keep);
            copied
        }
        Place::File(path) => {
            let mut file = File::options().append(true).create(true).open(&path)?;
            let mut buffer = vec![0; CHUNK];
            loop {
                let n = guest.read(&mut buffer).await?;
                if n == 0 {
                    return Ok(());
                }
                file.write_all(buffer.get(..n).unwrap_or_default())?;
            }
        }
        Place::Stream(claim) => output_stream(claim, guest).await,
    }
}

async fn copy(guest: &mut UnixStream, out: &mut pipe::Sender) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = guest.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        out.write_all(buffer.get(..n).unwrap_or_default()).await?;
    }
}

/// A FIFO cannot be opened for writing before somebody reads; and opened for both, its content
/// would be lost if we left before the reader comes.
async fn open_for_writing(path: &Path) -> io::Result<pipe::Sender> {
    let attempts = async {
        let mut pause = RETRY.0;
        loop {
            match pipe::OpenOptions::new().open_sender(path) {
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
                }
                other => return other,
            }
        }
    };
    tokio::time::timeout(READER_TIME, attempts)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn output_stream(mut claim: Claim, mut guest: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    // Bytes that the guest has given and no peer has taken.
    let mut have = 0;
    'peers: while let Some(mut peer) = claim.peer().await {
        loop {
            let room = match peer.room().await {
                Ok(room) => room,
                Err(End::Lost) => continue 'peers,
                Err(End::Closed) => break 'peers,
            };
            if have == 0 {
                let space = buffer.get_mut(..room).unwrap_or_default();
                let read = tokio::select! {
                    read = guest.read(space) => read?,
                    end = peer.gone() => match end {
                        End::Lost => continue 'peers,
                        End::Closed => break 'peers,
                    },
                };
                if read == 0 {
                    peer.finish_when_taken().await;
                    return Ok(());
                }
                have = read;
            }
            let part = have.min(room);
            match peer.data(buffer.get(..part).unwrap_or_default()).await {
                Ok(()) => {
                    buffer.copy_within(part..have, 0);
                    have -= part;
                }
                Err(End::Lost) => continue 'peers,
                Err(End::Closed) => break 'peers,
            }
        }
    }
    // Nobody wants it: the process goes on as if somebody did.
    while guest.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// From the host to the guest until the host says that there is no more.
async fn input(place: Place, guest: UnixStream, close: &Notify) -> io::Result<()> {
    let (mut ended, mut guest) = guest.into_split();
    let feed = async {
        match place {
            Place::Fifo(path) => {
                let mut from = pipe::OpenOptions::new().open_receiver(&path)?;
                // A client that leaves is not the end of input, CloseIO is: until then there is a
                // writer of our own.
                let keep = pipe::OpenOptions::new().open_sender(&path)?;
                let closing = async {
                    close.notified().await;
                    drop(keep);
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    copied = tokio::io::copy(&mut from, &mut guest) => { copied?; }
                    () = closing => {}
                }
            }
            Place::File(path) => {
                let mut file = File::open(&path)?;
                let mut buffer = vec![0; CHUNK];
                loop {
                    let n = io::Read::read(&mut file, &mut buffer)?;
                    if n == 0 {
                        break;
                    }
                    guest.write_all(buffer.get(..n).unwrap_or_default()).await?;
                }
            }
            Place::Stream(mut claim) => {
                'peers: while let Some(mut peer) = claim.peer().await {
                    loop {
                        match peer.receive().await {
                            Ok(Some(bytes)) => guest.write_all(&bytes).await?,
                            Ok(None) => {
                                peer.finish().await;
                                break 'peers;
                            }
                            Err(_) => continue 'peers,
                        }
                    }
                }
            }
        }
        guest.shutdown().await
    };
    // The guest never writes here: this ends when the process has closed its input.
    let mut nothing = [0];
    tokio::select! {
        fed = feed => fed,
        _ = ended.read(&mut nothing) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fifo(dir: &Path) -> PathBuf {
        let path = dir.join("f");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
        path
    }

    #[tokio::test]
    async fn output_is_whole_for_a_late_and_for_a_second_reader() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = fifo(dir.path());
        let (mut guest, ours) = UnixStream::pair().expect("pair");
        let pump = tokio::spawn(output(Place::Fifo(path.clone()), ours));
        guest.write_all(b"one").await.expect("write");
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).expect("open");
        let mut got = [0; 3];
        reader.read_exact(&mut got).await.expect("read");
        drop(reader);
        guest.write_all(b"two").await.expect("write");
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).expect("open");
        reader.read_exact(&mut got).await.expect("read");
        assert_eq!(&got, b"two");
        drop(guest);
        pump.await.expect("task").expect("pump");
        assert_eq!(reader.read(&mut got).await.expect("end"), 0);
    }

    #[tokio::test]
    async fn input_ends_with_close_io_and_not_before() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = fifo(dir.path());
        let (mut guest, ours) = UnixStream::pair().expect("pair");
        let close = Arc::new(Notify::new());
        let (place, told) = (Place::Fifo(path.clone()), Arc::clone(&close));
        let pump = tokio::spawn(async move { input(place, ours, &told).await });
        // Opened for both: the pump may not have opened its end yet.
        for text in ["a", "b"] {
            let mut writer = pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(&path)
                .expect("open");
            writer.write_all(text.as_bytes()).await.expect("write");
            let mut got = [0; 1];
            guest.read_exact(&mut got).await.expect("read");
            assert_eq!(got, text.as_bytes());
        }
        close.notify_one();
        assert_eq!(guest.read(&mut [0; 1]).await.expect("end"), 0);
        pump.await.expect("task").expect("pump");
    }

    #[test]
    fn names_are_sorted() {
        let streams = Arc::new(Streams::default());
        let place = |text: &str| Place::parse(text, &streams);
        assert!(matches!(place(""), Ok(None)));
        assert!(matches!(place("/run/x"), Ok(Some(Place::Fifo(_)))));
        assert!(matches!(place("file:///x"), Ok(Some(Place::File(_)))));
        let url = "ttrpc+unix:///run/x.sock?streaming_id=c-stdout";
        assert!(matches!(place(url), Ok(Some(Place::Stream(_)))));
        for bad in [
            "binary:///x",
            "ttrpc+unix:///x",
            "ttrpc+unix:///x?streaming_id=",
        ] {
            assert!(place(bad).is_err(), "{bad}");
        }
    }
}
