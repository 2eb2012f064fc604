//! `containerd.task.v3`: containerd's Task API, version 3 (api/runtime/task/v3/shim.proto).

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

pub use crate::services::TaskCall;
use crate::types::{Any, Mount, ProcessInfo, ProcessStatus, Timestamp};

/// Full name of the service.
pub const SERVICE: &str = "containerd.task.v3.Task";

/// Argument of Create.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct CreateTaskRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Bundle directory in the guest; may be empty.
    #[prost(string, tag = "2")]
    pub bundle: String,
    /// Mounts that make the root, in order.
    #[prost(message, repeated, tag = "3")]
    pub rootfs: Vec<Mount>,
    /// Whether it has a terminal.
    #[prost(bool, tag = "4")]
    pub terminal: bool,
    /// Stream for standard input; empty for /dev/null.
    #[prost(string, tag = "5")]
    pub stdin: String,
    /// Stream for standard output; empty for /dev/null.
    #[prost(string, tag = "6")]
    pub stdout: String,
    /// Stream for standard error; empty for /dev/null.
    #[prost(string, tag = "7")]
    pub stderr: String,
    /// Not supported.
    #[prost(string, tag = "8")]
    pub checkpoint: String,
    /// Not supported.
    #[prost(string, tag = "9")]
    pub parent_checkpoint: String,
    /// See the [contract](crate).
    #[prost(message, optional, tag = "10")]
    pub options: Option<Any>,
}

/// Result of Create.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct CreateTaskResponse {
    /// Process id in the guest.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

/// Argument of Delete.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct DeleteRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process in it; empty for the first one.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// Result of Delete.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct DeleteResponse {
    /// Process id in the guest.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// Exit code, or 128 + signal.
    #[prost(uint32, tag = "2")]
    pub exit_status: u32,
    /// When it ended.
    #[prost(message, optional, tag = "3")]
    pub exited_at: Option<Timestamp>,
}

/// Argument of Exec.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ExecProcessRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process in it; empty for the first one.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Whether it has a terminal.
    #[prost(bool, tag = "3")]
    pub terminal: bool,
    /// Stream for standard input; empty for /dev/null.
    #[prost(string, tag = "4")]
    pub stdin: String,
    /// Stream for standard output; empty for /dev/null.
    #[prost(string, tag = "5")]
    pub stdout: String,
    /// Stream for standard error; empty for /dev/null.
    #[prost(string, tag = "6")]
    pub stderr: String,
    /// OCI process as JSON.
    #[prost(message, optional, tag = "7")]
    pub spec: Option<Any>,
}

/// Argument of ResizePty.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ResizePtyRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process in it; empty for the first one.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Columns.
    #[prost(uint32, tag = "3")]
    pub width: u32,
    /// Rows.
    #[prost(uint32, tag = "4")]
    pub height: u32,
}

/// Argument of State.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct StateRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process in it; empty for the first one.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// Result of State.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct StateResponse {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Bundle directory in the guest; may be empty.
    #[prost(string, tag = "2")]
    pub bundle: String,
    /// Process id in the guest.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// A [`ProcessStatus`].
    #[prost(enumeration = "ProcessStatus", tag = "4")]
    pub status: i32,
    /// Stream for standard input; empty for /dev/null.
    #[prost(string, tag = "5")]
    pub stdin: String,
    /// Stream for standard output; empty for /dev/null.
    #[prost(string, tag = "6")]
    pub stdout: String,
    /// Stream for standard error; empty for /dev/null.
    #[prost(string, tag = "7")]
    pub stderr: String,
    /// Whether it has a terminal.
    #[prost(bool, tag = "8")]
    pub terminal: bool,
    /// Exit code, or 128 + signal.
    #[prost(uint32, tag = "9")]
    pub exit_status: u32,
    /// When it ended.
    #[prost(message, optional, tag = "10")]
    pub exited_at: Option<Timestamp>,
    /// The process in it; empty for the first one.
    #[prost(string, tag = "11")]
    pub exec_id: String,
}

/// Argument of Kill.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct KillRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process in it; empty for the first one.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Signal number.
    #[prost(uint32, tag = "3")]
    pub signal: u32,
    /// To all processes of the container.
    #[prost(bool, tag = "4")]
    pub all: bool,
}

/// Argument of CloseIO.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct CloseIoRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process in it; empty for the first one.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Close standard input.
    #[prost(bool, tag = "3")]
    pub stdin: bool,
}

/// Argument of Pids.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct PidsRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Result of Pids.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct PidsResponse {
    /// The processes.
    #[prost(message, repeated, tag = "1")]
    pub processes: Vec<ProcessInfo>,
}

/// Argument of Checkpoint.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct CheckpointTaskRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Where to.
    #[prost(string, tag = "2")]
    pub path: String,
    /// See the [contract](crate).
    #[prost(message, optional, tag = "3")]
    pub options: Option<Any>,
}

/// Argument of Update.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct UpdateTaskRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// OCI linux.resources as JSON.
    #[prost(message, optional, tag = "2")]
    pub resources: Option<Any>,
    /// Annotations.
    #[prost(btree_map = "string, string", tag = "3")]
    pub annotations: BTreeMap<String, String>,
}

/// Argument of Start.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct StartRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process in it; empty for the first one.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// Result of Start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct StartResponse {
    /// Process id in the guest.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

/// Argument of Wait.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct WaitRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The process in it; empty for the first one.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// Result of Wait.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct WaitResponse {
    /// Exit code, or 128 + signal.
    #[prost(uint32, tag = "1")]
    pub exit_status: u32,
    /// When it ended.
    #[prost(message, optional, tag = "2")]
    pub exited_at: Option<Timestamp>,
}

/// Argument of Stats.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct StatsRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Result of Stats.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct StatsResponse {
    /// An `Any` of [`crate::metrics::Metrics`].
    #[prost(message, optional, tag = "1")]
    pub stats: Option<Any>,
}

/// Argument of Connect.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ConnectRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Result of Connect.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ConnectResponse {
    /// Process id of the agent.
    #[prost(uint32, tag = "1")]
    pub shim_pid: u32,
    /// Process id of the container.
    #[prost(uint32, tag = "2")]
    pub task_pid: u32,
    /// Version of the agent.
    #[prost(string, tag = "3")]
    pub version: String,
}

/// Argument of Shutdown.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ShutdownRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Without waiting.
    #[prost(bool, tag = "2")]
    pub now: bool,
}

/// Argument of Pause.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct PauseRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Argument of Resume.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ResumeRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
}
