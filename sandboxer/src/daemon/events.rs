//! Events for containerd, as its shims send them: `Events/Forward` on its ttrpc socket.
//!
//! CRI learns of a process's end by `Wait`, but of lack of memory only from here; `ctr events` and
//! other subscribers see the rest. containerd may be down: what does not fit into the queue by
//! then is lost, as it would be with a shim.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_protocol::client::{Client, ClientOptions};
use bulkhead_protocol::types::{Any, Empty, Timestamp};
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::proto::{
    Envelope, ForwardRequest, TaskCreate, TaskDelete, TaskExec, TaskExit, TaskId, TaskStart,
};

const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
/// Events that wait for containerd.
const QUEUE: usize = 4096;
/// Pause before the next attempt to reach containerd; doubled up to the second value.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Attempts to deliver one event.
const ATTEMPTS: u32 = 8;
/// Time for one call.
const CALL: Duration = Duration::from_secs(10);

/// What happened.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "named after containerd's events")]
pub enum Event {
    Create(TaskCreate),
    Start(TaskStart),
    ExecAdded(TaskExec),
    ExecStarted(TaskExec),
    Exit(TaskExit),
    Oom(TaskId),
    Paused(TaskId),
    Resumed(TaskId),
    Delete(TaskDelete),
}

impl Event {
    /// Topic, name of the type, and encoded value.
    fn parts(&self) -> (&'static str, &'static str, Vec<u8>) {
        match self {
            Self::Create(e) => ("/tasks/create", "TaskCreate", e.encode_to_vec()),
            Self::Start(e) => ("/tasks/start", "TaskStart", e.encode_to_vec()),
            Self::ExecAdded(e) => ("/tasks/exec-added", "TaskExecAdded", e.encode_to_vec()),
            Self::ExecStarted(e) => ("/tasks/exec-started", "TaskExecStarted", e.encode_to_vec()),
            Self::Exit(e) => ("/tasks/exit", "TaskExit", e.encode_to_vec()),
            Self::Oom(e) => ("/tasks/oom", "TaskOOM", e.encode_to_vec()),
            Self::Paused(e) => ("/tasks/paused", "TaskPaused", e.encode_to_vec()),
            Self::Resumed(e) => ("/tasks/resumed", "TaskResumed", e.encode_to_vec()),
            Self::Delete(e) => ("/tasks/delete", "TaskDelete", e.encode_to_vec()),
        }
    }
}

/// Now.
pub fn now() -> Timestamp {
    timestamp(SystemTime::now())
}

/// A time as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

/// Sends events, in order, without making anyone wait. Clones share the queue.
#[derive(Debug, Clone)]
pub struct Events(mpsc::Sender<(String, Timestamp, Event)>);

impl Events {
    /// Starts sending to containerd's ttrpc socket.
    pub fn start(socket: PathBuf) -> Self {
        let (sender, mut queue) = mpsc::channel::<(String, Timestamp, Event)>(QUEUE);
        tokio::spawn(async move {
            let mut client = None;
            while let Some((namespace, at, event)) = queue.recv().await {
                let (topic, kind, value) = event.parts();
                let request = ForwardRequest {
                    envelope: Some(Envelope {
                        timestamp: Some(at),
                        namespace,
                        topic: topic.into(),
                        event: Some(Any {
                            type_url: format!("containerd.events.{kind}"),
                            value,
                        }),
                    }),
                };
                deliver(&socket, &mut client, &request).await;
            }
        });
        Self(sender)
    }

    /// Queues an event.
    pub fn send(&self, namespace: &str, event: Event) {
        if self
            .0
            .try_send((namespace.to_owned(), now(), event))
            .is_err()
        {
            tracing::warn!("an event is lost: containerd does not take them");
        }
    }
}

async fn deliver(socket: &PathBuf, client: &mut Option<Client>, request: &ForwardRequest) {
    let mut pause = RETRY.0;
    for _ in 0..ATTEMPTS {
        if client.as_ref().is_none_or(Client::is_closed) {
            *client = UnixStream::connect(socket)
                .await
                .ok()
                .map(|s| Client::with_options(s, ClientOptions::default()));
        }
        if let Some(client) = client {
            let sent: Result<Empty, _> = client
                .call_for(SERVICE, "Forward", request, Some(CALL))
                .await;
            match sent {
                Ok(_) => return,
                // It was understood and refused: another attempt changes nothing.
                Err(e) if e.code().is_some() => {
                    tracing::warn!(error = %e, "containerd refuses an event");
                    return;
                }
                Err(_) => {}
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
    tracing::warn!("an event is lost: containerd cannot be reached");
}
