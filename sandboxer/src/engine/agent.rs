//! Talking to the agent in a guest: control calls and stdio streams.

use std::sync::Arc;

use bulkhead_protocol::client::{Client, ClientOptions, RpcError, SandboxClient, TaskClient};
use bulkhead_protocol::rpc::Code;
use bulkhead_protocol::{CONTROL_PORT, PROTOCOL_VERSION, STREAM_PORT, sandbox};
use tokio::net::UnixStream;

use super::{EngineError, Sandbox};
use crate::timeouts;

/// A connection to a guest's agent. Needs a tokio runtime.
#[derive(Debug, Clone)]
pub struct Agent {
    handle: Arc<dyn Sandbox>,
    client: Client,
}

impl Agent {
    /// Takes an open connection to the control port.
    ///
    /// # Errors
    /// The stream cannot be used.
    pub fn new(
        handle: Arc<dyn Sandbox>,
        stream: std::os::unix::net::UnixStream,
    ) -> Result<Self, EngineError> {
        let stream = into_tokio(stream)?;
        let options = ClientOptions {
            timeout: Some(timeouts::call()),
            ..ClientOptions::default()
        };
        Ok(Self {
            handle,
            client: Client::with_options(stream, options),
        })
    }

    /// Connects to the control port of a guest that is up.
    ///
    /// # Errors
    /// The guest does not answer.
    pub async fn connect(handle: Arc<dyn Sandbox>) -> Result<Self, EngineError> {
        let stream = dial(Arc::clone(&handle), CONTROL_PORT).await?;
        Self::new(handle, stream)
    }

    /// Calls about containers.
    pub fn tasks(&self) -> TaskClient {
        TaskClient::new(self.client.clone())
    }

    /// Calls about the sandbox.
    pub fn sandbox(&self) -> SandboxClient {
        SandboxClient::new(self.client.clone())
    }

    /// Checks that the agent speaks our protocol.
    ///
    /// # Errors
    /// It does not, or does not answer.
    pub async fn hello(&self) -> Result<sandbox::GetInfoResponse, EngineError> {
        let info = self
            .sandbox()
            .get_info(&sandbox::GetInfoRequest {})
            .await
            .map_err(failed("asking the agent for its version"))?;
        if info.protocol != PROTOCOL_VERSION {
            return Err(EngineError::Protocol {
                found: info.protocol,
                wanted: PROTOCOL_VERSION,
            });
        }
        Ok(info)
    }

    /// Opens a stdio stream under `id`, to be named in a Create or Exec call.
    ///
    /// # Errors
    /// The guest refuses it.
    pub async fn stream(&self, id: &str) -> Result<UnixStream, EngineError> {
        let mut stream = into_tokio(dial(Arc::clone(&self.handle), STREAM_PORT).await?)?;
        let opened = tokio::time::timeout(
            timeouts::call(),
            bulkhead_protocol::stream::connect(&mut stream, id),
        )
        .await;
        match opened {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(e)) => Err(EngineError::io(format!("opening stream {id}"))(e)),
            Err(_) => Err(EngineError::io(format!("opening stream {id}"))(
                std::io::ErrorKind::TimedOut.into(),
            )),
        }
    }
}

/// Connecting blocks until the guest answers: done beside the runtime's thread.
async fn dial(
    handle: Arc<dyn Sandbox>,
    port: u32,
) -> Result<std::os::unix::net::UnixStream, EngineError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    spawn_brief("dial", move || {
        let _ = sender.send(handle.connect(port, timeouts::connect()));
    })?;
    receiver.await.unwrap_or_else(|_| {
        Err(EngineError::io("connecting to the guest")(
            std::io::ErrorKind::BrokenPipe.into(),
        ))
    })
}

/// A thread for one blocking call; small, because it is one more thread while a VM runs.
pub(crate) fn spawn_brief(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), EngineError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(256 << 10)
        .spawn(work)
        .map(|_| ())
        .map_err(EngineError::io("starting a thread"))
}

fn into_tokio(stream: std::os::unix::net::UnixStream) -> Result<UnixStream, EngineError> {
    stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .map_err(EngineError::io("guest stream"))
}

/// Wraps a refused call.
pub fn failed(what: impl Into<String>) -> impl FnOnce(RpcError) -> EngineError {
    let what = what.into();
    move |source| EngineError::Agent { what, source }
}

/// Sorts out whether a refused Create, Start or Exec is the program's fault: docker's exit codes
/// 126 and 127 tell that apart.
pub fn program_error(command: &str, what: &str, error: RpcError) -> EngineError {
    let RpcError::Status { status, .. } = &error else {
        return failed(what)(error);
    };
    let missing = error.code() == Some(Code::NotFound);
    let refused = error.code() == Some(Code::PermissionDenied);
    if missing || refused {
        return EngineError::Program {
            command: command.to_owned(),
            reason: program_reason(&status.message),
            missing,
        };
    }
    failed(what)(error)
}

/// The part of the agent's message that is about the program: `… exec: "NAME": REASON`.
fn program_reason(message: &str) -> String {
    let reason = message
        .rsplit_once("exec: \"")
        .and_then(|(_, rest)| rest.split_once("\": "));
    reason.map_or(message, |(_, reason)| reason).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_program_is_said_once() {
        let message = "container x: failed: exec: \"nosuch\": executable file not found in PATH";
        assert_eq!(program_reason(message), "executable file not found in PATH");
        assert_eq!(
            program_reason("working directory /x is missing"),
            "working directory /x is missing"
        );
    }
}
