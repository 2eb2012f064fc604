//! The connection to one agent: calls, and the streams of processes.

use std::fmt::Debug;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_protocol::client::{Client, ClientOptions, RpcError, SandboxClient, TaskClient};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{ConfigureSandboxRequest, GetInfoRequest, SetTimeRequest};
use bulkhead_protocol::{PROTOCOL_VERSION, STREAM_PORT};
use tokio::net::UnixStream;

use crate::engine::EngineError;
use crate::engine::agent::failed;
use crate::rundir;
use crate::timeouts;

/// The way to an agent's ports: vsock of a guest, or sockets on this host.
pub trait Dial: Debug + Send + Sync + 'static {
    /// One attempt to connect.
    fn dial(&self, port: u32) -> impl Future<Output = io::Result<UnixStream>> + Send;
}

/// An agent that answers.
#[derive(Debug)]
pub struct Link<D> {
    way: D,
    client: Client,
    next_stream: AtomicU64,
    /// It can put containers into one PID namespace.
    shares_pids: bool,
}

/// Whose clock an agent is to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// Its guest's.
    Guest,
    /// None: it is on this host.
    Host,
}

impl<D: Dial> Link<D> {
    /// By an open connection to its control port.
    pub fn new(way: D, control: UnixStream) -> Self {
        let options = ClientOptions {
            timeout: Some(timeouts::call()),
            ..ClientOptions::default()
        };
        Self {
            way,
            client: Client::with_options(control, options),
            next_stream: AtomicU64::new(0),
            shares_pids: false,
        }
    }

    /// Sets the sandbox `id` up.
    ///
    /// # Errors
    /// The agent refuses, or is of another version.
    pub async fn configure(
        &mut self,
        id: &str,
        request: &ConfigureSandboxRequest,
        clock: Clock,
    ) -> Result<(), EngineError> {
        let now = Duration::from_millis(rundir::now_ms());
        let time = SetTimeRequest {
            seconds: i64::try_from(now.as_secs()).unwrap_or(0),
            nanos: now.subsec_nanos(),
        };
        let sandbox = self.sandbox();
        let set_time = async {
            match clock {
                Clock::Guest => sandbox.set_time(&time).await.map(drop),
                Clock::Host => Ok(()),
            }
        };
        let (info, configured, timed) = tokio::join!(
            sandbox.get_info(&GetInfoRequest {}),
            sandbox.configure_sandbox(request),
            set_time
        );
        let info = info.map_err(failed("asking the agent for its version"))?;
        if info.protocol != PROTOCOL_VERSION {
            return Err(EngineError::Protocol {
                found: info.protocol,
                wanted: PROTOCOL_VERSION,
            });
        }
        let configured = configured.map_err(failed("setting up the sandbox"))?;
        for warning in &configured.warnings {
            let clean: String = warning
                .chars()
                .filter(|c| !c.is_control())
                .take(300)
                .collect();
            tracing::warn!(sandbox = id, "agent: {clean}");
        }
        timed.map_err(failed("setting the guest's clock"))?;
        self.shares_pids = info.features.iter().any(|f| f == "shared-pid");
        Ok(())
    }

    /// Whether its agent can put containers into one PID namespace.
    pub fn shares_pids(&self) -> bool {
        self.shares_pids
    }

    /// Calls about containers.
    pub fn tasks(&self) -> TaskClient {
        TaskClient::new(self.client.clone())
    }

    /// Calls about the sandbox.
    pub fn sandbox(&self) -> SandboxClient {
        SandboxClient::new(self.client.clone())
    }

    /// Connects to a port of the agent.
    ///
    /// # Errors
    /// Nothing listens there, or it does not answer.
    pub async fn dial(&self, port: u32) -> io::Result<UnixStream> {
        tokio::time::timeout(timeouts::connect(), self.way.dial(port))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Opens a stream for a process; gives the name that the Create or Exec call needs.
    ///
    /// # Errors
    /// The agent refuses it.
    pub async fn stream(&self) -> Result<(String, UnixStream), Status> {
        // Our own short names: containerd's may be longer than the agent takes.
        let id = format!("s{}", self.next_stream.fetch_add(1, Ordering::Relaxed));
        let failed = |e: io::Error| {
            Status::new(
                Code::Unavailable,
                format!("the sandbox's stream for a process: {e}"),
            )
        };
        let mut stream = self.dial(STREAM_PORT).await.map_err(failed)?;
        tokio::time::timeout(
            timeouts::call(),
            bulkhead_protocol::stream::connect(&mut stream, &id),
        )
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(failed)?;
        Ok((bulkhead_protocol::stream::uri(&id), stream))
    }

    /// Asks it to go down in order. It may end before it has answered.
    pub async fn shut_down(&self, grace: Duration) {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let request = bulkhead_protocol::sandbox::ShutdownRequest { grace_ms };
        let _ = self.sandbox().shutdown(&request).await;
    }
}

/// The answer to containerd for a call that the agent has refused.
pub fn refused(error: RpcError) -> Status {
    match error {
        RpcError::Status { status, .. } => status,
        RpcError::Timeout { .. } => Status::new(Code::DeadlineExceeded, error.to_string()),
        RpcError::Closed { .. } => Status::new(Code::Unavailable, error.to_string()),
        RpcError::TooLong { .. } => Status::new(Code::ResourceExhausted, error.to_string()),
        RpcError::BadAnswer { .. } => Status::new(Code::Internal, error.to_string()),
    }
}
