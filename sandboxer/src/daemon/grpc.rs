//! Unary gRPC over HTTP/2, as much as the sandbox controller needs.
//!
//! Callers are root on this host (the socket's mode says so), yet every size is bounded: a caller
//! that goes wrong must not take the daemon's VMs with it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::net::UnixStream;

/// Largest request.
const MAX_REQUEST: usize = 4 << 20;
/// Calls at once on one connection; `Wait` holds one per pod.
const MAX_CALLS: u32 = 65_536;

/// What a call gives in the end.
pub type Answer = Pin<Box<dyn Future<Output = Result<Vec<u8>, Status>> + Send>>;

/// A call.
#[derive(Debug)]
pub struct Call {
    /// `package.Service/Method`.
    pub path: String,
    /// `containerd-namespace` of its metadata.
    pub namespace: String,
    /// The encoded argument.
    pub payload: Bytes,
}

/// Answers calls.
pub trait Service: Send + Sync + 'static {
    /// Starts a call.
    fn call(&self, call: Call) -> Answer;
}

/// Serves one connection until it ends.
///
/// # Errors
/// What HTTP/2 says.
pub async fn serve<S: Service>(stream: UnixStream, service: Arc<S>) -> Result<(), h2::Error> {
    let mut connection = h2::server::Builder::new()
        .max_concurrent_streams(MAX_CALLS)
        .max_header_list_size(64 << 10)
        .handshake::<_, Bytes>(stream)
        .await?;
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted?;
        let service = Arc::clone(&service);
        tokio::spawn(async move {
            // A caller that has gone is no failure of ours.
            let _ = one(request, respond, service).await;
        });
    }
    Ok(())
}

async fn one<S: Service>(
    request: Request<h2::RecvStream>,
    mut respond: SendResponse<Bytes>,
    service: Arc<S>,
) -> Result<(), h2::Error> {
    let (head, body) = request.into_parts();
    let header = |name: &str| {
        let value = head.headers.get(name).and_then(|v| v.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let timeout = parse_timeout(&header("grpc-timeout"));
    let result = match collect(body).await {
        Ok(payload) => {
            let answer = service.call(Call {
                path: head.uri.path().trim_start_matches('/').to_owned(),
                namespace: header("containerd-namespace"),
                payload,
            });
            let limit = timeout.unwrap_or(Duration::MAX);
            tokio::select! {
                // The caller has given up: stop waiting for it.
                _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => return Ok(()),
                result = tokio::time::timeout(limit, answer) => result.unwrap_or_else(|_| {
                    Err(Status::new(Code::DeadlineExceeded, "not done within the caller's time-out"))
                }),
            }
        }
        Err(status) => Err(status),
    };
    let response = Response::builder()
        .status(200)
        .header("content-type", "application/grpc")
        .body(())
        .unwrap_or_default();
    let mut out = respond.send_response(response, false)?;
    let status = match result {
        Ok(payload) => {
            let mut frame = BytesMut::with_capacity(payload.len() + 5);
            frame.extend_from_slice(&[0]);
            let length = u32::try_from(payload.len()).unwrap_or(0);
            frame.extend_from_slice(&length.to_be_bytes());
            frame.extend_from_slice(&payload);
            out.send_data(frame.freeze(), false)?;
            Status::new(Code::Ok, "")
        }
        Err(status) => status,
    };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(status.code));
    if !status.message.is_empty()
        && let Ok(value) = HeaderValue::from_str(&percent(&status.message))
    {
        trailers.insert("grpc-message", value);
    }
    out.send_trailers(trailers)
}

/// Reads the one message of a unary call.
async fn collect(mut body: h2::RecvStream) -> Result<Bytes, Status> {
    let mut all = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk =
            chunk.map_err(|e| Status::new(Code::Unavailable, format!("request broke off: {e}")))?;
        if all.len() + chunk.len() > MAX_REQUEST + 5 {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("request is over the limit of {MAX_REQUEST} bytes; send less"),
            ));
        }
        all.extend_from_slice(&chunk);
        let _ = body.flow_control().release_capacity(chunk.len());
    }
    let bad = |what: &str| Status::new(Code::InvalidArgument, what);
    let all = all.freeze();
    let head: [u8; 5] = all
        .get(..5)
        .and_then(|h| h.try_into().ok())
        .ok_or_else(|| bad("request holds no gRPC message"))?;
    let [compressed, length @ ..] = head;
    if compressed != 0 {
        return Err(Status::new(
            Code::Unimplemented,
            "compressed requests are not supported",
        ));
    }
    let payload = all.slice(5..);
    if payload.len() != u32::from_be_bytes(length) as usize {
        return Err(bad("request holds no whole gRPC message"));
    }
    Ok(payload)
}

/// gRPC's `grpc-timeout`: at most eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = text.get(..text.len().checked_sub(unit.len_utf8())?)?;
    if digits.len() > 8 {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(n * 3600),
        'M' => Duration::from_secs(n * 60),
        'S' => Duration::from_secs(n),
        'm' => Duration::from_millis(n),
        'u' => Duration::from_micros(n),
        'n' => Duration::from_nanos(n),
        _ => return None,
    })
}

/// gRPC's encoding of messages in headers.
fn percent(text: &str) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes().take(4096) {
        if (0x20..0x7f).contains(&byte) && byte != b'%' {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read() {
        assert_eq!(parse_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(
            parse_timeout("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for bad in ["", "S", "123456789S", "1x", "1é", "-1S"] {
            assert_eq!(parse_timeout(bad), None, "{bad}");
        }
    }

    #[test]
    fn messages_are_encoded() {
        assert_eq!(percent("a%b\nü"), "a%25b%0A%C3%BC");
    }
}
