//! The owner's side.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

use super::{Answer, ErrorBody, MAX_REQUEST, PROTOCOL, Request};
use crate::engine::{EngineError, Sandbox};

/// Connections served at once, each by a thread of its own.
const MAX_CONNECTIONS: usize = 16;
static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);

/// Makes the socket, for the owner's user only.
///
/// # Errors
/// As `bind(2)`; a path longer than a socket address can hold is an error.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    // The directory is closed to others already.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves one connection on a thread that ends with it. `console_input` is called with what is
/// typed by someone attached to the console.
pub fn serve_connection(stream: UnixStream, sandbox: std::sync::Arc<dyn Sandbox>) {
    if CONNECTIONS.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
        CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    struct Count;
    impl Drop for Count {
        fn drop(&mut self) {
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let count = Count;
    let started = crate::engine::agent::spawn_brief("debug", move || {
        let _count = count;
        // Our side of a broken connection: nobody is left to be told.
        let _ = serve(stream, sandbox.as_ref());
    });
    if let Err(e) = started {
        // Dropping the stream tells the client; there is nothing better to do.
        drop(e);
    }
}

fn serve(mut stream: UnixStream, sandbox: &dyn Sandbox) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let mut pending = Vec::new();
    while let Some(line) = read_line(&mut stream, &mut pending)? {
        let request: Request = match serde_json::from_slice(&line) {
            Ok(request) => request,
            Err(e) => {
                refuse(&mut stream, "bad_request", &format!("request: {e}"))?;
                continue;
            }
        };
        match request {
            Request::Vsock { port, timeout_ms } => {
                match sandbox.connect(port, Duration::from_millis(timeout_ms.min(600_000))) {
                    Ok(guest) => answer_with_fd(&stream, guest.into())?,
                    Err(e) => refuse(&mut stream, e.kind(), &e.to_string())?,
                }
            }
            Request::Console => match sandbox.console() {
                Ok(console) => {
                    answer(&mut stream, Value::Null)?;
                    return splice(stream, console);
                }
                Err(e) => refuse(&mut stream, e.kind(), &e.to_string())?,
            },
            other => match simple(sandbox, &other) {
                Ok(result) => answer(&mut stream, result)?,
                Err(e) => refuse(&mut stream, e.kind(), &e.to_string())?,
            },
        }
    }
    Ok(())
}

fn simple(sandbox: &dyn Sandbox, request: &Request) -> Result<Value, EngineError> {
    match request {
        Request::Inspect => sandbox.inspect(),
        Request::Stats => sandbox.stats(),
        Request::Registers => sandbox.registers(),
        Request::Pause => sandbox.pause().map(|()| Value::Null),
        Request::Resume => sandbox.resume().map(|()| Value::Null),
        Request::Dump { path } => sandbox.dump(Path::new(path)).map(|()| Value::Null),
        Request::Stop { grace_ms } => sandbox
            .stop(Duration::from_millis(*grace_ms))
            .map(|()| Value::Null),
        Request::Hello | Request::Vsock { .. } | Request::Console => {
            Ok(json!({"protocol": PROTOCOL, "id": sandbox.id()}))
        }
    }
}

fn read_line(stream: &mut UnixStream, pending: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    loop {
        if let Some(end) = pending.iter().position(|b| *b == b'\n') {
            let rest = pending.split_off(end + 1);
            let mut line = std::mem::replace(pending, rest);
            line.pop();
            return Ok(Some(line));
        }
        if pending.len() > MAX_REQUEST {
            refuse(stream, "bad_request", "request: longer than 64 KiB")?;
            return Ok(None);
        }
        let mut buffer = [0u8; 4096];
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok(None);
        }
        pending.extend_from_slice(&buffer[..n]);
    }
}

fn line(answer: &Answer) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    Ok(line)
}

fn answer(stream: &mut UnixStream, result: Value) -> io::Result<()> {
    stream.write_all(&line(&Answer {
        ok: true,
        result,
        error: None,
    })?)
}

fn refuse(stream: &mut UnixStream, kind: &str, message: &str) -> io::Result<()> {
    let error = Some(ErrorBody {
        kind: kind.to_owned(),
        message: message.to_owned(),
    });
    stream.write_all(&line(&Answer {
        ok: false,
        result: Value::Null,
        error,
    })?)
}

fn answer_with_fd(stream: &UnixStream, fd: OwnedFd) -> io::Result<()> {
    let text = line(&Answer {
        ok: true,
        result: json!({"fd": true}),
        error: None,
    })?;
    let fds = [fd.as_raw_fd()];
    // Shorter than any socket buffer: sent whole.
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[io::IoSlice::new(&text)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Copies both ways until one side ends.
fn splice(client: UnixStream, console: UnixStream) -> io::Result<()> {
    let (mut from_console, mut to_client) = (console.try_clone()?, client.try_clone()?);
    crate::engine::agent::spawn_brief("console", move || {
        let _ = io::copy(&mut from_console, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Both);
    })
    .map_err(|e| io::Error::other(e.to_string()))?;
    let result = io::copy(&mut &client, &mut &console).map(drop);
    let _ = console.shutdown(Shutdown::Both);
    result
}
