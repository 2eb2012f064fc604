//! Messages of containerd's public API that the daemon speaks, beside those of the Task service
//! in `bulkhead_protocol`: `containerd.services.sandbox.v1`, `…streaming.v1`, `…events`, and the
//! parts of CRI's pod configuration that matter to a sandbox.
//!
//! Field numbers are those of containerd 2.1 (`api/services/sandbox/v1/sandbox.proto` and its
//! neighbours) and of Kubernetes' `runtime.v1`.

use std::collections::BTreeMap;

use bulkhead_protocol::types::{Any, Mount, Timestamp};

/// Full name of the sandbox controller's gRPC service.
pub const CONTROLLER: &str = "containerd.services.sandbox.v1.Controller";
/// Full name of the ttrpc streaming service.
pub const STREAMING: &str = "containerd.services.streaming.v1.Streaming";
/// Type URL of [`StreamInit`].
pub const STREAM_INIT: &str = "containerd.services.streaming.v1.StreamInit";
/// Type URL of [`Data`].
pub const DATA: &str = "containerd.types.transfer.Data";
/// Type URL of [`WindowUpdate`].
pub const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

/// `containerd.types.Sandbox`, as far as used.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SandboxInfo {
    /// Id.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// Runtime.
    #[prost(message, optional, tag = "2")]
    pub runtime: Option<SandboxRuntime>,
}

/// `containerd.types.Sandbox.Runtime`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SandboxRuntime {
    /// `runtime_type` of the configuration.
    #[prost(string, tag = "1")]
    pub name: String,
    /// `options` of the configuration.
    #[prost(message, optional, tag = "2")]
    pub options: Option<Any>,
}

/// Argument of Create.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateRequest {
    /// Id.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// Mounts of a root for the sandbox; CRI gives none.
    #[prost(message, repeated, tag = "2")]
    pub rootfs: Vec<Mount>,
    /// [`PodSandboxConfig`] when the caller is CRI.
    #[prost(message, optional, tag = "3")]
    pub options: Option<Any>,
    /// Network namespace; empty for the host's.
    #[prost(string, tag = "4")]
    pub netns_path: String,
    /// Annotations.
    #[prost(btree_map = "string, string", tag = "5")]
    pub annotations: BTreeMap<String, String>,
    /// What containerd stores.
    #[prost(message, optional, tag = "6")]
    pub sandbox: Option<SandboxInfo>,
}

/// Result of Create.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateResponse {
    /// Id.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
}

/// Argument of Start, Platform, Wait, Shutdown and Metrics.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IdRequest {
    /// Id.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
}

/// Argument of Update.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateRequest {
    /// Id.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// Which fields are meant.
    #[prost(string, repeated, tag = "4")]
    pub fields: Vec<String>,
}

/// Result of Start.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StartResponse {
    /// Id.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// A process of the host.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// When it was started.
    #[prost(message, optional, tag = "3")]
    pub created_at: Option<Timestamp>,
    /// Labels.
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
    /// Where its Task service is.
    #[prost(string, tag = "5")]
    pub address: String,
    /// Version of the Task service.
    #[prost(uint32, tag = "6")]
    pub version: u32,
}

/// `containerd.types.Platform`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Platform {
    /// `linux`.
    #[prost(string, tag = "1")]
    pub os: String,
    /// `amd64`.
    #[prost(string, tag = "2")]
    pub architecture: String,
    /// Empty.
    #[prost(string, tag = "3")]
    pub variant: String,
}

/// Result of Platform.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PlatformResponse {
    /// What images it runs.
    #[prost(message, optional, tag = "1")]
    pub platform: Option<Platform>,
}

/// Argument of Stop.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StopRequest {
    /// Id.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// Grace; 0: none.
    #[prost(uint32, tag = "2")]
    pub timeout_secs: u32,
}

/// Result of calls that give nothing.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Nothing {}

/// Result of Wait.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WaitResponse {
    /// Exit status.
    #[prost(uint32, tag = "1")]
    pub exit_status: u32,
    /// When it ended.
    #[prost(message, optional, tag = "2")]
    pub exited_at: Option<Timestamp>,
}

/// Argument of Status.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatusRequest {
    /// Id.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// With `info`.
    #[prost(bool, tag = "2")]
    pub verbose: bool,
}

/// Result of Status.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatusResponse {
    /// Id.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// As in [`StartResponse`].
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// `SANDBOX_READY` or `SANDBOX_NOTREADY`.
    #[prost(string, tag = "3")]
    pub state: String,
    /// For people.
    #[prost(btree_map = "string, string", tag = "4")]
    pub info: BTreeMap<String, String>,
    /// When it was started.
    #[prost(message, optional, tag = "5")]
    pub created_at: Option<Timestamp>,
    /// When it ended.
    #[prost(message, optional, tag = "6")]
    pub exited_at: Option<Timestamp>,
    /// As in [`StartResponse`].
    #[prost(string, tag = "8")]
    pub address: String,
    /// As in [`StartResponse`].
    #[prost(uint32, tag = "9")]
    pub version: u32,
}

/// `containerd.types.Metric`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Metric {
    /// When.
    #[prost(message, optional, tag = "1")]
    pub timestamp: Option<Timestamp>,
    /// Id.
    #[prost(string, tag = "2")]
    pub id: String,
    /// `io.containerd.cgroups.v2.Metrics`.
    #[prost(message, optional, tag = "3")]
    pub data: Option<Any>,
}

/// Result of Metrics.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricsResponse {
    /// The metrics.
    #[prost(message, optional, tag = "1")]
    pub metrics: Option<Metric>,
}

/// First message on a stream.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StreamInit {
    /// Which stream.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Bytes on a stream.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Data {
    /// The bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub data: Vec<u8>,
}

/// The receiver can take more.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct WindowUpdate {
    /// So many bytes more.
    #[prost(int32, tag = "1")]
    pub update: i32,
}

/// `containerd.types.Envelope`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Envelope {
    /// When.
    #[prost(message, optional, tag = "1")]
    pub timestamp: Option<Timestamp>,
    /// containerd's namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// For example `/tasks/oom`.
    #[prost(string, tag = "3")]
    pub topic: String,
    /// The event.
    #[prost(message, optional, tag = "4")]
    pub event: Option<Any>,
}

/// Argument of `containerd.services.events.ttrpc.v1.Events/Forward`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ForwardRequest {
    /// The event.
    #[prost(message, optional, tag = "1")]
    pub envelope: Option<Envelope>,
}

/// Fields of `containerd.events.Task*` messages that have nothing else in field 1.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskId {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// `containerd.events.TaskCreate`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskCreate {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Its bundle.
    #[prost(string, tag = "2")]
    pub bundle: String,
    /// Its process.
    #[prost(uint32, tag = "6")]
    pub pid: u32,
}

/// `containerd.events.TaskStart`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskStart {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Its process.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
}

/// `containerd.events.TaskExit`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskExit {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The process: the container's id for its first.
    #[prost(string, tag = "2")]
    pub id: String,
    /// Its number.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// Exit code, or 128 + signal.
    #[prost(uint32, tag = "4")]
    pub exit_status: u32,
    /// When.
    #[prost(message, optional, tag = "5")]
    pub exited_at: Option<Timestamp>,
}

/// `containerd.events.TaskDelete`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskDelete {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Its process.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// Exit code, or 128 + signal.
    #[prost(uint32, tag = "3")]
    pub exit_status: u32,
    /// When.
    #[prost(message, optional, tag = "4")]
    pub exited_at: Option<Timestamp>,
    /// The process: empty for the first.
    #[prost(string, tag = "5")]
    pub id: String,
}

/// `containerd.events.TaskExecAdded`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskExec {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The process.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Its number; 0 when added.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
}

/// `runtime.v1.PodSandboxConfig`, as far as used.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxConfig {
    /// Names.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<PodSandboxMetadata>,
    /// Host name.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Name resolution.
    #[prost(message, optional, tag = "4")]
    pub dns_config: Option<DnsConfig>,
    /// Annotations.
    #[prost(btree_map = "string, string", tag = "7")]
    pub annotations: BTreeMap<String, String>,
    /// What is Linux's.
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxPodSandboxConfig>,
}

/// `runtime.v1.PodSandboxMetadata`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxMetadata {
    /// Name of the pod.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its UID.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// Its namespace.
    #[prost(string, tag = "3")]
    pub namespace: String,
}

/// `runtime.v1.DNSConfig`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DnsConfig {
    /// Name servers.
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    /// Search domains.
    #[prost(string, repeated, tag = "2")]
    pub searches: Vec<String>,
    /// Options.
    #[prost(string, repeated, tag = "3")]
    pub options: Vec<String>,
}

/// `runtime.v1.LinuxPodSandboxConfig`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LinuxPodSandboxConfig {
    /// The pod's cgroup.
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
    /// Security of the sandbox.
    #[prost(message, optional, tag = "2")]
    pub security_context: Option<LinuxSandboxSecurityContext>,
    /// Sysctls.
    #[prost(btree_map = "string, string", tag = "3")]
    pub sysctls: BTreeMap<String, String>,
    /// What the sandbox itself takes, by the RuntimeClass.
    #[prost(message, optional, tag = "4")]
    pub overhead: Option<LinuxResources>,
    /// Sum of the containers' limits.
    #[prost(message, optional, tag = "5")]
    pub resources: Option<LinuxResources>,
}

/// `runtime.v1.LinuxSandboxSecurityContext`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LinuxSandboxSecurityContext {
    /// Which namespaces are shared with what.
    #[prost(message, optional, tag = "1")]
    pub namespace_options: Option<NamespaceOptions>,
}

/// `runtime.v1.NamespaceOption`; 0 pod, 1 container, 2 node, 3 target.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NamespaceOptions {
    /// Network.
    #[prost(int32, tag = "1")]
    pub network: i32,
    /// Processes.
    #[prost(int32, tag = "2")]
    pub pid: i32,
    /// IPC.
    #[prost(int32, tag = "3")]
    pub ipc: i32,
    /// User namespace.
    #[prost(message, optional, tag = "5")]
    pub userns: Option<UserNamespace>,
}

/// `runtime.v1.UserNamespace`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UserNamespace {
    /// As in [`NamespaceOptions`].
    #[prost(int32, tag = "1")]
    pub mode: i32,
}

/// `NamespaceMode.NODE`.
pub const NODE: i32 = 2;

/// `runtime.v1.LinuxContainerResources`, as far as used.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct LinuxResources {
    /// CPU period in µs.
    #[prost(int64, tag = "1")]
    pub cpu_period: i64,
    /// CPU quota in µs; 0 or less: none.
    #[prost(int64, tag = "2")]
    pub cpu_quota: i64,
    /// CPU shares, as of cgroup v1; 0: not said.
    #[prost(int64, tag = "3")]
    pub cpu_shares: i64,
    /// Memory limit in bytes; 0: none.
    #[prost(int64, tag = "4")]
    pub memory_limit_in_bytes: i64,
}
