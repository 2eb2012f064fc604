//! Async ttrpc server: unary calls, dispatched to [`TaskService`] and [`SandboxService`].
//!
//! A call's future is dropped when its connection ends. A service whose work must not be left
//! half done spawns it and awaits the handle.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::MAX_CALLS_PER_CONNECTION;
use crate::frame::{Decoder, MAX_MESSAGE};
use crate::rpc::{self, Code, Request, Status};
use crate::services::{sandbox_methods, task_methods};
use crate::{sandbox, task, types};

/// What a call gives in the end.
pub type CallFuture = Pin<Box<dyn Future<Output = Result<Vec<u8>, Status>> + Send>>;

/// One service behind a server.
pub trait Dispatch: Send + Sync {
    /// Full name of the service.
    fn service(&self) -> &'static str;
    /// Starts a call.
    fn dispatch(&self, method: &str, payload: &[u8]) -> CallFuture;
}

/// The services of a server, by name.
#[derive(Clone, Default)]
pub struct Router {
    services: Vec<Arc<dyn Dispatch>>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.services.iter().map(|s| s.service()))
            .finish()
    }
}

impl Router {
    /// No services.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a service.
    #[must_use]
    pub fn with(mut self, service: impl Dispatch + 'static) -> Self {
        self.services.push(Arc::new(service));
        self
    }

    fn call(&self, request: &Request) -> CallFuture {
        match self
            .services
            .iter()
            .find(|s| s.service() == request.service)
        {
            Some(service) => service.dispatch(&request.method, &request.payload),
            None => {
                let name: String = request.service.chars().take(64).collect();
                Box::pin(std::future::ready(Err(Status::new(
                    Code::Unimplemented,
                    format!("no service {name:?} here"),
                ))))
            }
        }
    }

    /// Serves one connection until it ends. Protocol errors are answered, not fatal; an error is
    /// the transport's.
    pub async fn serve<S>(&self, stream: S) -> std::io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (mut reader, writer) = tokio::io::split(stream);
        // Bounded: with it full, calls wait to answer and no more are read than the limit below.
        let (answers, queue) = mpsc::channel::<Vec<u8>>(16);
        let mut calls = JoinSet::new();
        let writer = tokio::spawn(write_answers(writer, queue));
        let mut decoder = Decoder::new(MAX_MESSAGE);
        let mut buffer = vec![0; 16 << 10];
        let result = loop {
            let n = match reader.read(&mut buffer).await {
                Ok(0) => break Ok(()),
                Ok(n) => n,
                Err(error) => break Err(error),
            };
            let mut input = buffer.get(..n).unwrap_or_default();
            while let Some(frame) = decoder.feed(&mut input) {
                while calls.try_join_next().is_some() {}
                match rpc::accept_request(frame) {
                    Ok((stream_id, request)) if calls.len() < MAX_CALLS_PER_CONNECTION => {
                        let call = with_deadline(self.call(&request), request.timeout_nano);
                        let answers = answers.clone();
                        calls.spawn(async move {
                            let answer = rpc::encode_response(stream_id, call.await);
                            let _ = answers.send(answer).await;
                        });
                    }
                    Ok((stream_id, _)) => {
                        let status = Status::new(
                            Code::ResourceExhausted,
                            format!(
                                "{MAX_CALLS_PER_CONNECTION} calls are under way on this \
                                 connection; wait for some, or open another"
                            ),
                        );
                        let answer = rpc::encode_response(stream_id, Err(status));
                        let _ = answers.send(answer).await;
                    }
                    Err(Some(answer)) => {
                        let _ = answers.send(answer).await;
                    }
                    Err(None) => {}
                }
            }
            if writer.is_finished() {
                break Ok(());
            }
        };
        // The caller is gone: nobody waits for these.
        calls.shutdown().await;
        drop(answers);
        let _ = writer.await;
        result
    }
}

async fn with_deadline(call: CallFuture, timeout_nano: i64) -> Result<Vec<u8>, Status> {
    match u64::try_from(timeout_nano) {
        Ok(nanos) if nanos > 0 => tokio::time::timeout(Duration::from_nanos(nanos), call)
            .await
            .unwrap_or_else(|_| {
                Err(Status::new(
                    Code::DeadlineExceeded,
                    "not done within the caller's time-out",
                ))
            }),
        _ => call.await,
    }
}

async fn write_answers<W: AsyncWrite + Unpin>(mut writer: W, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = queue.recv().await {
        let written = async {
            writer.write_all(&frame).await?;
            writer.flush().await
        };
        if written.await.is_err() {
            return;
        }
    }
    let _ = writer.shutdown().await;
}

macro_rules! make_server {
    ($service:expr, $call:ident, $client:ident, $trait:ident, $dispatch:ident, $name:literal;
     $($(#[$doc:meta])* $method:ident $function:ident $request:ty => $response:ty, $timed:ident;)*) => {
        #[doc = concat!("What a server of `", $name, "` does.")]
        pub trait $trait: Send + Sync + 'static {
            $(
                $(#[$doc])*
                fn $function(
                    &self,
                    request: $request,
                ) -> impl Future<Output = Result<$response, Status>> + Send;
            )*
        }

        #[doc = concat!("[`Dispatch`] for a [`", stringify!($trait), "`].")]
        #[derive(Debug)]
        pub struct $dispatch<S>(pub Arc<S>);

        impl<S: $trait> Dispatch for $dispatch<S> {
            fn service(&self) -> &'static str {
                $service
            }

            fn dispatch(&self, method: &str, payload: &[u8]) -> CallFuture {
                let service = self.0.clone();
                match crate::services::$call::decode(method, payload) {
                    Err(status) => Box::pin(std::future::ready(Err(status))),
                    $(
                        Ok(crate::services::$call::$method(request)) => Box::pin(async move {
                            let response: $response = service.$function(request).await?;
                            Ok(response.encode_to_vec())
                        }),
                    )*
                }
            }
        }
    };
}

task_methods!(make_server);
sandbox_methods!(make_server);
