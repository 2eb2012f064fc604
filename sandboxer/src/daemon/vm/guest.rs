//! A running guest as the daemon sees it: its VM, the connection to its agent, its streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_protocol::client::{Client, ClientOptions, RpcError, SandboxClient, TaskClient};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{
    ConfigureSandboxRequest, GetInfoRequest, SetTimeRequest, ShutdownRequest,
};
use bulkhead_protocol::{CONTROL_PORT, PROTOCOL_VERSION, STREAM_PORT};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::engine::EngineError;
use crate::engine::agent::failed;
use crate::engine::microvm::MicroVm;
use crate::engine::stdio::watch;
use crate::rundir;
use crate::timeouts;

/// First and longest pause between two attempts to reach an agent that is not listening yet.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// A guest whose agent answers.
#[derive(Debug)]
pub struct Guest {
    vm: Arc<MicroVm>,
    client: Client,
    next_stream: AtomicU64,
    /// Its agent can put containers into one PID namespace.
    shares_pids: bool,
}

impl Guest {
    /// Waits until the agent of a started VM answers, and sets the sandbox up.
    ///
    /// # Errors
    /// The guest ends or does not answer in time, or refuses.
    pub async fn reach(
        vm: Arc<MicroVm>,
        request: &ConfigureSandboxRequest,
    ) -> Result<Self, EngineError> {
        let within = timeouts::boot();
        let attempts = async {
            let mut pause = RETRY.0;
            loop {
                if let Ok(stream) = dial(&vm, CONTROL_PORT).await {
                    return stream;
                }
                // Refused: the kernel is up, the agent not yet.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
            }
        };
        let ended = ended(&vm)?;
        let stream = tokio::select! {
            stream = tokio::time::timeout(within, attempts) => {
                stream.map_err(|_| vm.hangs("waiting for the agent", within))?
            }
            () = ended => return Err(vm.ended("booting")),
        };
        vm.vm().mark("agent answers");
        let options = ClientOptions {
            timeout: Some(timeouts::call()),
            ..ClientOptions::default()
        };
        let mut guest = Self {
            client: Client::with_options(stream, options),
            vm,
            next_stream: AtomicU64::new(0),
            shares_pids: false,
        };
        guest.shares_pids = guest.configure(request).await?;
        guest.vm.vm().mark("configured");
        Ok(guest)
    }

    /// Gives whether containers can share PIDs.
    async fn configure(&self, request: &ConfigureSandboxRequest) -> Result<bool, EngineError> {
        let now = Duration::from_millis(rundir::now_ms());
        let time = SetTimeRequest {
            seconds: i64::try_from(now.as_secs()).unwrap_or(0),
            nanos: now.subsec_nanos(),
        };
        let sandbox = self.sandbox();
        let (info, configured, timed) = tokio::join!(
            sandbox.get_info(&GetInfoRequest {}),
            sandbox.configure_sandbox(request),
            sandbox.set_time(&time)
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
            tracing::warn!(sandbox = self.vm.vm().id(), "guest: {clean}");
        }
        timed
            .map(|_| info.features.iter().any(|f| f == "shared-pid"))
            .map_err(failed("setting the guest's clock"))
    }

    /// Whether its agent can put containers into one PID namespace.
    pub fn shares_pids(&self) -> bool {
        self.shares_pids
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<MicroVm> {
        &self.vm
    }

    /// Calls about containers.
    pub fn tasks(&self) -> TaskClient {
        TaskClient::new(self.client.clone())
    }

    /// Calls about the sandbox.
    pub fn sandbox(&self) -> SandboxClient {
        SandboxClient::new(self.client.clone())
    }

    /// Connects to a port of the guest.
    ///
    /// # Errors
    /// Nothing listens there, or the guest does not answer.
    pub async fn dial(&self, port: u32) -> std::io::Result<UnixStream> {
        tokio::time::timeout(timeouts::connect(), dial(&self.vm, port))
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    }

    /// Opens a stream for a process; gives the name that the Create or Exec call needs.
    ///
    /// # Errors
    /// The guest refuses it.
    pub async fn stream(&self) -> Result<(String, UnixStream), Status> {
        // Our own short names: containerd's may be longer than the guest takes.
        let id = format!("s{}", self.next_stream.fetch_add(1, Ordering::Relaxed));
        let failed = |e: std::io::Error| {
            Status::new(
                Code::Unavailable,
                format!("guest stream for a process: {e}"),
            )
        };
        let mut stream = self.dial(STREAM_PORT).await.map_err(failed)?;
        tokio::time::timeout(
            timeouts::call(),
            bulkhead_protocol::stream::connect(&mut stream, &id),
        )
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(failed)?;
        Ok((bulkhead_protocol::stream::uri(&id), stream))
    }

    /// Asks the guest to go down, waits, and ends it if it does not heed that.
    pub async fn shut_down(&self, grace: Duration) {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let sandbox = self.sandbox();
        let request = ShutdownRequest { grace_ms };
        let asked = sandbox.shutdown(&request);
        let orderly = async {
            let Ok(ended) = ended(&self.vm) else {
                let _ = asked.await;
                return;
            };
            tokio::pin!(ended);
            // Its end may be known before its answer, or instead of it.
            tokio::select! {
                () = &mut ended => {}
                _ = asked => ended.await,
            }
        };
        let _ = tokio::time::timeout(timeouts::shutdown() + grace, orderly).await;
        self.vm.vm().stop();
    }
}

/// Resolves when the VM has ended.
///
/// # Errors
/// Out of descriptors.
pub fn ended(vm: &MicroVm) -> Result<impl Future<Output = ()> + Send + use<>, EngineError> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    let event = vm.vm().exit_event();
    // SAFETY: the VM keeps its event open; the descriptor is only duplicated.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let fd = fd
        .try_clone_to_owned()
        .map_err(EngineError::io("watching the VM"))?;
    let watched: AsyncFd<_> =
        watch(fd, Interest::READABLE).map_err(EngineError::io("watching the VM"))?;
    Ok(async move {
        let _ = watched.readable().await;
    })
}

/// One attempt, without a thread: the device's thread tells.
async fn dial(vm: &MicroVm, port: u32) -> std::io::Result<UnixStream> {
    let vsock = vm
        .vm()
        .vsock()
        .ok_or(std::io::Error::from(std::io::ErrorKind::Unsupported))?;
    let (sender, receiver) = oneshot::channel();
    let attempt = vsock.start_connect(port, move |outcome| {
        let _ = sender.send(outcome);
    })?;
    let outcome = receiver.await;
    drop(attempt);
    let stream = outcome.unwrap_or_else(|_| Err(std::io::ErrorKind::NotConnected.into()))?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
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
