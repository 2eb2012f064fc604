//! Async ttrpc client: unary calls multiplexed over one byte stream.
//!
//! ```no_run
//! # async fn f(stream: tokio::io::DuplexStream) -> Result<(), Box<dyn std::error::Error>> {
//! use bulkhead_protocol::client::{Client, SandboxClient, TaskClient};
//! use bulkhead_protocol::{sandbox, task};
//!
//! let client = Client::new(stream); // any AsyncRead + AsyncWrite; needs a tokio runtime
//! let info = SandboxClient::new(client.clone())
//!     .get_info(&sandbox::GetInfoRequest {})
//!     .await?;
//! let tasks = TaskClient::new(client);
//! tasks.start(&task::StartRequest { id: "c1".into(), ..Default::default() }).await?;
//! let exit = tasks.wait(&task::WaitRequest { id: "c1".into(), ..Default::default() }).await?;
//! # Ok(())
//! # }
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};

use crate::frame::{self, Decoder, Frame, TooLong};
use crate::rpc::{Request, Response, Status};
use crate::services::{sandbox_methods, task_methods};
use crate::{sandbox, task, types};

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RpcError {
    /// The other side answered with an error.
    #[error("{method}: {status}")]
    Status {
        /// The method called.
        method: String,
        /// What it answered.
        status: Status,
    },
    /// No answer in time. The other side may still carry the call out.
    #[error("{method}: no answer within {after:?}; the guest hangs or is very slow")]
    Timeout {
        /// The method called.
        method: String,
        /// The time it had.
        after: Duration,
    },
    /// The connection ended.
    #[error("{method}: connection closed: {reason}")]
    Closed {
        /// The method called.
        method: String,
        /// Why.
        reason: String,
    },
    /// The request cannot be sent.
    #[error("{method}: {source}")]
    TooLong {
        /// The method called.
        method: String,
        /// How long it is.
        #[source]
        source: TooLong,
    },
    /// The answer cannot be used.
    #[error("{method}: bad answer: {reason}")]
    BadAnswer {
        /// The method called.
        method: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl RpcError {
    /// The gRPC code the other side answered with, if it answered with one.
    #[must_use]
    pub fn code(&self) -> Option<crate::rpc::Code> {
        match self {
            Self::Status { status, .. } => crate::rpc::Code::try_from(status.code).ok(),
            _ => None,
        }
    }
}

/// Limits of a [`Client`].
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// Largest answer taken, in bytes. A hostile answer can grow some 60-fold when decoded, so
    /// this is far below ttrpc's limit.
    pub max_answer: usize,
    /// Time a call may take unless it waits for an event; `None`: for ever.
    pub timeout: Option<Duration>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            max_answer: 256 << 10,
            timeout: Some(Duration::from_secs(60)),
        }
    }
}

type Answer = Result<Vec<u8>, Failure>;

enum Failure {
    Closed(String),
    Bad(String),
}

#[derive(Default)]
struct Calls {
    waiting: HashMap<u32, oneshot::Sender<Answer>>,
    next_id: u32,
    closed: Option<String>,
}

struct Shared {
    calls: Mutex<Calls>,
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, stream_id: u32, answer: Answer) {
        // An unknown id is an answer that came after its time-out, or a lie: nobody waits for it.
        let waiting = self.calls().waiting.remove(&stream_id);
        if let Some(sender) = waiting {
            let _ = sender.send(answer);
        }
    }

    fn close(&self, reason: &str) {
        let waiting = {
            let mut calls = self.calls();
            calls.closed.get_or_insert_with(|| reason.to_owned());
            std::mem::take(&mut calls.waiting)
        };
        for (_, sender) in waiting {
            let _ = sender.send(Err(Failure::Closed(reason.to_owned())));
        }
    }
}

/// Ends the connection's tasks with the last clone of the client.
struct Tasks(Vec<tokio::task::AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// A connection to a ttrpc server. Clones share it; the last one to be dropped closes it.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    frames: mpsc::Sender<Vec<u8>>,
    options: ClientOptions,
    _tasks: Arc<Tasks>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// Takes its call off the list when the caller stops waiting.
struct Waiting<'a> {
    shared: &'a Shared,
    stream_id: u32,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.calls().waiting.remove(&self.stream_id);
    }
}

impl Client {
    /// A client on `stream` with default limits. Must be called within a tokio runtime.
    pub fn new<S>(stream: S) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        Self::with_options(stream, ClientOptions::default())
    }

    /// A client on `stream`. Must be called within a tokio runtime.
    pub fn with_options<S>(stream: S, options: ClientOptions) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = tokio::io::split(stream);
        let shared = Arc::new(Shared {
            calls: Mutex::new(Calls {
                next_id: 1,
                ..Calls::default()
            }),
        });
        let (frames, queue) = mpsc::channel(16);
        let read = tokio::spawn(read_answers(reader, options.max_answer, shared.clone()));
        let write = tokio::spawn(write_requests(writer, queue, shared.clone()));
        Self {
            shared,
            frames,
            options,
            _tasks: Arc::new(Tasks(vec![read.abort_handle(), write.abort_handle()])),
        }
    }

    /// The same connection with another default timeout.
    #[must_use]
    pub fn with_timeout(&self, timeout: Option<Duration>) -> Self {
        let mut client = self.clone();
        client.options.timeout = timeout;
        client
    }

    /// Whether the connection has ended. No later call can succeed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.calls().closed.is_some()
    }

    /// Calls `service`.`method` with the default timeout.
    pub async fn call<Q: Message, A: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &Q,
    ) -> Result<A, RpcError> {
        self.call_for(service, method, request, self.options.timeout)
            .await
    }

    /// Calls `service`.`method` and waits for at most `timeout`.
    pub async fn call_for<Q: Message, A: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &Q,
        timeout: Option<Duration>,
    ) -> Result<A, RpcError> {
        let request = Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
            timeout_nano: timeout.map_or(0, |t| i64::try_from(t.as_nanos()).unwrap_or(i64::MAX)),
            metadata: Vec::new(),
        };
        let payload = self.call_raw(request, timeout).await?;
        A::decode(payload.as_slice()).map_err(|error| RpcError::BadAnswer {
            method: method.to_owned(),
            reason: error.to_string(),
        })
    }

    /// Sends `request` as it is and gives the payload of the answer: for proxies.
    pub async fn call_raw(
        &self,
        request: Request,
        timeout: Option<Duration>,
    ) -> Result<Vec<u8>, RpcError> {
        let method = request.method.clone();
        let exchange = self.exchange(request);
        let Some(after) = timeout else {
            return exchange.await;
        };
        match tokio::time::timeout(after, exchange).await {
            Ok(result) => result,
            Err(_) => Err(RpcError::Timeout { method, after }),
        }
    }

    async fn exchange(&self, request: Request) -> Result<Vec<u8>, RpcError> {
        let method = &request.method;
        let closed = |reason: String| RpcError::Closed {
            method: method.clone(),
            reason,
        };
        let (sender, receiver) = oneshot::channel();
        let stream_id = {
            let mut calls = self.shared.calls();
            if let Some(reason) = &calls.closed {
                return Err(closed(reason.clone()));
            }
            // Ids of clients are odd. After 2^31 calls they come round: skip those still in use.
            let mut id = calls.next_id;
            while calls.waiting.contains_key(&id) {
                id = id.wrapping_add(2);
            }
            calls.next_id = id.wrapping_add(2);
            calls.waiting.insert(id, sender);
            id
        };
        let _waiting = Waiting {
            shared: &self.shared,
            stream_id,
        };
        let frame = crate::rpc::encode_request(stream_id, &request).map_err(|source| {
            RpcError::TooLong {
                method: method.clone(),
                source,
            }
        })?;
        // The writer task owns the stream, so that a caller that gives up cannot leave half a
        // frame behind.
        if self.frames.send(frame).await.is_err() {
            let reason = self.shared.calls().closed.clone();
            return Err(closed(reason.unwrap_or_else(|| "writer ended".to_owned())));
        }
        let payload = match receiver.await {
            Ok(Ok(payload)) => payload,
            Ok(Err(Failure::Closed(reason))) => return Err(closed(reason)),
            Ok(Err(Failure::Bad(reason))) => {
                return Err(RpcError::BadAnswer {
                    method: method.clone(),
                    reason,
                });
            }
            Err(_) => return Err(closed("reader ended".to_owned())),
        };
        let bad = |reason: String| RpcError::BadAnswer {
            method: method.clone(),
            reason,
        };
        Response::decode(payload.as_slice())
            .map_err(|error| bad(error.to_string()))?
            .into_result()
            .map_err(|status| RpcError::Status {
                method: method.clone(),
                status,
            })
    }
}

async fn read_answers<R: AsyncRead + Unpin>(mut reader: R, limit: usize, shared: Arc<Shared>) {
    let mut decoder = Decoder::new(limit);
    let mut buffer = vec![0; 16 << 10];
    let reason = loop {
        let n = match reader.read(&mut buffer).await {
            Ok(0) if decoder.is_idle() => break "the other side closed it".to_owned(),
            Ok(0) => break "it ended within a message".to_owned(),
            Ok(n) => n,
            Err(error) => break error.to_string(),
        };
        let mut input = buffer.get(..n).unwrap_or_default();
        while let Some(frame) = decoder.feed(&mut input) {
            match frame {
                Frame::Message { header, payload } if header.kind == frame::TYPE_RESPONSE => {
                    shared.answer(header.stream_id, Ok(payload));
                }
                // Requests and data: a server sends none to unary calls. Dropped.
                Frame::Message { .. } => {}
                Frame::Oversized { header } => shared.answer(
                    header.stream_id,
                    Err(Failure::Bad(format!(
                        "{} bytes, more than the {limit} this client takes",
                        header.length
                    ))),
                ),
                Frame::NoMemory { header } => shared.answer(
                    header.stream_id,
                    Err(Failure::Bad(format!(
                        "no memory for its {} bytes",
                        header.length
                    ))),
                ),
            }
        }
    };
    shared.close(&reason);
}

async fn write_requests<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut queue: mpsc::Receiver<Vec<u8>>,
    shared: Arc<Shared>,
) {
    while let Some(frame) = queue.recv().await {
        let written = async {
            writer.write_all(&frame).await?;
            writer.flush().await
        };
        if let Err(error) = written.await {
            shared.close(&error.to_string());
            return;
        }
    }
}

macro_rules! make_client {
    ($service:expr, $call:ident, $client:ident, $trait:ident, $dispatch:ident, $name:literal;
     $($(#[$doc:meta])* $method:ident $function:ident $request:ty => $response:ty, $timed:ident;)*) => {
        #[doc = concat!("Typed calls to `", $name, "`.")]
        #[derive(Clone, Debug)]
        pub struct $client {
            client: Client,
        }

        impl $client {
            /// Calls over this connection.
            #[must_use]
            pub fn new(client: Client) -> Self {
                Self { client }
            }

            /// The connection.
            #[must_use]
            pub fn client(&self) -> &Client {
                &self.client
            }

            $(
                $(#[$doc])*
                pub async fn $function(&self, request: &$request) -> Result<$response, RpcError> {
                    let timeout = make_client!(@timeout self $timed);
                    self.client
                        .call_for($service, stringify!($method), request, timeout)
                        .await
                }
            )*
        }
    };
    (@timeout $self:ident timed) => { $self.client.options.timeout };
    (@timeout $self:ident untimed) => { None };
}

task_methods!(make_client);
sandbox_methods!(make_client);
