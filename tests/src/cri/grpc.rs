//! A small blocking gRPC client on a unix socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use http::Request;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

/// A connection.
#[derive(Debug)]
pub struct Client {
    runtime: Runtime,
    sender: SendRequest<Bytes>,
}

/// An answer that is an error.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message} (gRPC code {code})")]
pub struct Refused {
    /// gRPC code.
    pub code: i32,
    /// For people.
    pub message: String,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let sender = runtime.block_on(async {
            let stream = UnixStream::connect(socket)
                .await
                .with_context(|| socket.display().to_string())?;
            let (sender, connection) = h2::client::Builder::new()
                .initial_window_size(8 << 20)
                .handshake(stream)
                .await?;
            tokio::spawn(async move {
                let _ = connection.await;
            });
            anyhow::Ok(sender)
        })?;
        Ok(Self { runtime, sender })
    }

    /// One unary call.
    ///
    /// # Errors
    /// A [`Refused`], or what happened to the connection.
    pub fn call<Q: prost::Message, A: prost::Message + Default>(
        &self,
        path: &str,
        request: &Q,
        limit: Duration,
    ) -> Result<A> {
        let payload = request.encode_to_vec();
        let call = self.exchange(path, payload);
        let answer = self.runtime.block_on(async {
            tokio::time::timeout(limit, call)
                .await
                .map_err(|_| anyhow!("no answer within {limit:?}"))?
        })?;
        Ok(A::decode(answer)?)
    }

    async fn exchange(&self, path: &str, payload: Vec<u8>) -> Result<Bytes> {
        let request = Request::builder()
            .method("POST")
            .uri(format!("http://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let mut sender = self.sender.clone().ready().await?;
        let (answer, mut body) = sender.send_request(request, false)?;
        let mut frame = BytesMut::with_capacity(payload.len() + 5);
        frame.extend_from_slice(&[0]);
        frame.extend_from_slice(&u32::try_from(payload.len())?.to_be_bytes());
        frame.extend_from_slice(&payload);
        body.send_data(frame.freeze(), true)?;
        let (head, mut body) = answer.await?.into_parts();
        let mut data = BytesMut::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            let _ = body.flow_control().release_capacity(chunk.len());
            data.extend_from_slice(&chunk);
        }
        let trailers = match body.trailers().await? {
            Some(trailers) => trailers,
            // An error without a body comes in the head.
            None => head.headers,
        };
        let field = |name: &str| trailers.get(name).and_then(|v| v.to_str().ok());
        let code: i32 = field("grpc-status").unwrap_or("2").parse()?;
        if code != 0 {
            let message = unescape(field("grpc-message").unwrap_or_default());
            return Err(Refused { code, message }.into());
        }
        if data.len() < 5 {
            bail!("the answer holds no message");
        }
        Ok(data.freeze().slice(5..))
    }
}

fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let hex: Option<u8> = (byte == b'%')
            .then(|| {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()
            })
            .flatten();
        out.push(hex.unwrap_or(byte));
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The gRPC code of a failed call.
pub fn code(error: &anyhow::Error) -> Option<i32> {
    error
        .chain()
        .find_map(|e| e.downcast_ref::<Refused>())
        .map(|r| r.code)
}
