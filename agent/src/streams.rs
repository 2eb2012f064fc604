//! Stdio streams the host has opened and no call has named yet.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::{STREAM_CLAIM_SECONDS, stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::error::{Error, Result};

/// Streams that may wait at once.
const MAX_WAITING: usize = 1024;
/// Time for the header line.
const HEADER_TIME: Duration = Duration::from_secs(30);

#[derive(Default)]
struct State {
    waiting: HashMap<String, (u64, UnixStream)>,
    next: u64,
}

/// The waiting streams by id.
#[derive(Default)]
pub struct Streams {
    state: Mutex<State>,
}

impl Streams {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the stream that `uri` names; `None` for an empty `uri`.
    pub fn take(&self, uri: &str) -> Result<Option<UnixStream>> {
        if uri.is_empty() {
            return Ok(None);
        }
        let id = uri.strip_prefix(stream::SCHEME).ok_or_else(|| {
            Error::Invalid(format!(
                "stdio {uri:?} is not of the form {}<id>",
                stream::SCHEME
            ))
        })?;
        match self.state().waiting.remove(id) {
            Some((_, stream)) => Ok(Some(stream)),
            None => Err(Error::State(format!(
                "stream {id:?} is not connected; open it on port {} before naming it",
                bulkhead_protocol::STREAM_PORT
            ))),
        }
    }

    /// Reads the header of a new connection and keeps the stream until it is taken.
    pub async fn serve(self: Arc<Self>, mut connection: UnixStream) {
        let header = tokio::time::timeout(HEADER_TIME, read_header(&mut connection)).await;
        let Ok(Ok(id)) = header else {
            let _ = connection
                .write_all(&stream::error_answer("bad stream header"))
                .await;
            return;
        };
        if let Some(port) = id.strip_prefix(stream::TCP) {
            return forward(connection, port).await;
        }
        // Hold the stream back from takers until the host has its answer.
        let refusal = {
            let state = self.state();
            if state.waiting.contains_key(&id) {
                Some("a stream of this id is waiting already")
            } else if state.waiting.len() >= MAX_WAITING {
                Some("too many streams wait to be named")
            } else {
                None
            }
        };
        if let Some(reason) = refusal {
            let _ = connection.write_all(&stream::error_answer(reason)).await;
            return;
        }
        // The socket is new and empty: three bytes fit without waiting.
        if connection.try_write(stream::OK).ok() != Some(stream::OK.len()) {
            return;
        }
        let number = {
            let mut state = self.state();
            state.next += 1;
            let number = state.next;
            state.waiting.insert(id.clone(), (number, connection));
            number
        };
        tokio::time::sleep(Duration::from_secs(STREAM_CLAIM_SECONDS)).await;
        let mut state = self.state();
        if state.waiting.get(&id).is_some_and(|(n, _)| *n == number) {
            state.waiting.remove(&id);
        }
    }
}

/// A connection to a port of this guest's loopback, as the host's port-forwarding wants it.
async fn forward(mut connection: UnixStream, port: &str) {
    let refuse = |reason: String| stream::error_answer(&reason);
    let reached = match port.parse::<u16>() {
        Ok(port) if port > 0 => {
            let addresses = [
                SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
                SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
            ];
            let reached = TcpStream::connect(addresses.as_slice()).await;
            reached.map_err(|e| refuse(format!("port {port} of the sandbox: {e}")))
        }
        _ => Err(refuse("no port number".to_owned())),
    };
    match reached {
        Ok(mut tcp) => {
            if connection.write_all(stream::OK).await.is_ok() {
                // Either side may half-close; an error of one ends both.
                let _ = tokio::io::copy_bidirectional(&mut connection, &mut tcp).await;
            }
        }
        Err(answer) => {
            let _ = connection.write_all(&answer).await;
        }
    }
}

/// Byte by byte: what follows the line belongs to the stream.
async fn read_header(connection: &mut UnixStream) -> std::io::Result<String> {
    let mut line = Vec::with_capacity(stream::MAX_HEADER);
    loop {
        line.push(connection.read_u8().await?);
        match stream::parse_header(&line) {
            Ok(Some((id, _))) => return Ok(id),
            Ok(None) => {}
            Err(error) => return Err(std::io::Error::other(error)),
        }
    }
}
