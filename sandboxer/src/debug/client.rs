//! The looker's side: a sandbox in another process.

use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::Value;

use super::{Answer, MAX_ANSWER, Request};
use crate::engine::{EngineError, Sandbox};
use crate::timeouts;

/// A sandbox reached over its owner's debug socket.
#[derive(Debug, Clone)]
pub struct Remote {
    id: String,
    socket: PathBuf,
}

impl Remote {
    /// The VM whose directory is `dir`.
    pub fn new(id: &str, dir: &Path) -> Self {
        Self {
            id: id.to_owned(),
            socket: dir.join("debug.sock"),
        }
    }

    fn open(&self, timeout: Duration) -> Result<UnixStream, EngineError> {
        let stream = UnixStream::connect(&self.socket).map_err(EngineError::io(format!(
            "VM {}: its debug socket {} does not answer (is it still starting?)",
            self.id,
            self.socket.display()
        )))?;
        stream
            .set_read_timeout(Some(timeout))
            .map_err(EngineError::io("debug socket"))?;
        Ok(stream)
    }

    /// Sends one request on a new connection.
    fn ask(
        &self,
        request: &Request,
        timeout: Duration,
    ) -> Result<(Value, Option<OwnedFd>, UnixStream), EngineError> {
        let mut stream = self.open(timeout)?;
        let what = || format!("VM {}: debug socket", self.id);
        let mut line =
            serde_json::to_vec(request).map_err(|e| EngineError::io(what())(e.into()))?;
        line.push(b'\n');
        stream.write_all(&line).map_err(EngineError::io(what()))?;
        let (data, fd) = read_answer(&stream).map_err(EngineError::io(what()))?;
        let answer: Answer =
            serde_json::from_slice(&data).map_err(|e| EngineError::io(what())(e.into()))?;
        if answer.ok {
            return Ok((answer.result, fd, stream));
        }
        let error = answer
            .error
            .ok_or_else(|| EngineError::io(what())(io::ErrorKind::InvalidData.into()))?;
        Err(EngineError::Remote {
            kind: error.kind,
            message: error.message,
        })
    }

    fn call(&self, request: &Request) -> Result<Value, EngineError> {
        self.ask(request, timeouts::debug())
            .map(|(value, _, _)| value)
    }
}

/// Reads one line byte-exactly (bytes behind it belong to the stream it may become), with the
/// descriptor that may come with it.
fn read_answer(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut data = Vec::new();
    let mut fd = None;
    loop {
        // Look first, take up to the newline then.
        let mut buffer = [0u8; 4096];
        let (seen, received) = receive(stream, &mut buffer, MsgFlags::MSG_PEEK)?;
        drop(received);
        if seen == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "closed by the VM's process",
            ));
        }
        let end = buffer[..seen].iter().position(|b| *b == b'\n');
        let take = end.map_or(seen, |at| at + 1);
        let (got, received) = receive(stream, &mut buffer[..take], MsgFlags::empty())?;
        fd = fd.or(received);
        data.extend_from_slice(&buffer[..got]);
        if data.ends_with(b"\n") {
            return Ok((data, fd));
        }
        if data.len() > MAX_ANSWER {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "an answer without end",
            ));
        }
    }
}

fn receive(
    stream: &UnixStream,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = loop {
        match recvmsg::<()>(
            stream.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            flags | MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut fd = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            for raw in fds {
                // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
                fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
    }
    Ok((message.bytes, fd))
}

impl Sandbox for Remote {
    fn id(&self) -> String {
        self.id.clone()
    }

    fn inspect(&self) -> Result<Value, EngineError> {
        self.call(&Request::Inspect)
    }

    fn stats(&self) -> Result<Value, EngineError> {
        self.call(&Request::Stats)
    }

    fn registers(&self) -> Result<Value, EngineError> {
        self.call(&Request::Registers)
    }

    fn pause(&self) -> Result<(), EngineError> {
        self.call(&Request::Pause).map(|_| ())
    }

    fn resume(&self) -> Result<(), EngineError> {
        self.call(&Request::Resume).map(|_| ())
    }

    fn dump(&self, path: &Path) -> Result<(), EngineError> {
        let path =
            std::path::absolute(path).map_err(EngineError::io(path.display().to_string()))?;
        let path = path.to_str().ok_or_else(|| {
            EngineError::io(format!("{}: not UTF-8", path.display()))(
                io::ErrorKind::InvalidInput.into(),
            )
        })?;
        // Writing gigabytes takes a while.
        let hour = Duration::from_secs(3600);
        self.ask(
            &Request::Dump {
                path: path.to_owned(),
            },
            hour,
        )
        .map(|_| ())
    }

    fn stop(&self, grace: Duration) -> Result<(), EngineError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.call(&Request::Stop { grace_ms }).map(|_| ())
    }

    fn connect(&self, port: u32, timeout: Duration) -> Result<UnixStream, EngineError> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let (_, fd, _) = self.ask(
            &Request::Vsock { port, timeout_ms },
            timeout + timeouts::debug(),
        )?;
        fd.map(UnixStream::from).ok_or_else(|| {
            EngineError::io(format!("VM {}: no stream in the answer", self.id))(
                io::ErrorKind::InvalidData.into(),
            )
        })
    }

    fn console(&self) -> Result<UnixStream, EngineError> {
        let (_, _, stream) = self.ask(&Request::Console, timeouts::debug())?;
        stream
            .set_read_timeout(None)
            .map_err(EngineError::io("console"))?;
        Ok(stream)
    }
}
