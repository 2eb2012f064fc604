//! `bulkhead.agent.v1.Sandbox`: what the host asks of the guest as a whole.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

pub use crate::services::SandboxCall;
use crate::types::Timestamp;

/// Full name of the service.
pub const SERVICE: &str = "bulkhead.agent.v1.Sandbox";
/// Type URL of [`ContainerOptions`] in CreateTaskRequest.options.
pub const CONTAINER_OPTIONS_TYPE_URL: &str = "bulkhead.agent.v1.ContainerOptions";
/// containerd's type URL of an OCI process (JSON) in ExecProcessRequest.spec.
pub const OCI_PROCESS_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// containerd's type URL of OCI linux.resources (JSON) in UpdateTaskRequest.resources.
pub const OCI_RESOURCES_TYPE_URL: &str =
    "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Type of a root mount in CreateTaskRequest.rootfs whose `source` is the serial number of a disk
/// with the image's layers, each an erofs image. Options: `layer=START:LENGTH` in bytes, topmost
/// first; `upper=` and `work=`, the paths of the container's own layer and its work directory in a
/// share. It is the only mount of its root.
pub const LAYERS_MOUNT: &str = "bulkhead-layers";

/// Options of a container, in CreateTaskRequest.options.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ContainerOptions {
    /// The OCI runtime spec (config.json).
    #[prost(bytes = "vec", tag = "1")]
    pub oci_spec: Vec<u8>,
    /// `user[:group]` by name or number, looked up in the container's own /etc/passwd and
    /// /etc/group; replaces process.user of the spec. Empty: take the spec's.
    #[prost(string, tag = "2")]
    pub user: String,
    /// Bind the sandbox's resolv.conf, hosts and hostname over /etc in the container, where the
    /// spec has no mount of its own there.
    #[prost(bool, tag = "3")]
    pub sandbox_etc: bool,
    /// Disks of the guest that the spec names by the numbers of the host's devices.
    #[prost(message, repeated, tag = "4")]
    pub disks: Vec<Disk>,
}

/// A disk of the guest that stands for a block device of the host.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Disk {
    /// Its serial number, by which the guest finds it.
    #[prost(string, tag = "1")]
    pub serial: String,
    /// Major number of the host's device in the spec.
    #[prost(uint32, tag = "2")]
    pub major: u32,
    /// Its minor number.
    #[prost(uint32, tag = "3")]
    pub minor: u32,
    /// Nobody may write to it.
    #[prost(bool, tag = "4")]
    pub read_only: bool,
}

/// Argument of GetInfo.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct GetInfoRequest {}

/// Result of GetInfo.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct GetInfoResponse {
    /// Version of the agent.
    #[prost(string, tag = "1")]
    pub version: String,
    /// [`crate::PROTOCOL_VERSION`] of the guest.
    #[prost(uint32, tag = "2")]
    pub protocol: u32,
    /// Name and release of the kernel.
    #[prost(string, tag = "3")]
    pub kernel: String,
    /// When what happened, in order.
    #[prost(message, repeated, tag = "4")]
    pub boot: Vec<BootStage>,
    /// Now, in ns of the guest's monotonic clock (zero: the kernel's start).
    #[prost(uint64, tag = "5")]
    pub monotonic_ns: u64,
    /// CPUs online.
    #[prost(uint32, tag = "6")]
    pub cpus_online: u32,
    /// Memory the guest's kernel manages, in bytes.
    #[prost(uint64, tag = "7")]
    pub memory_bytes: u64,
    /// What this guest can do beyond the contract's minimum: `cgroup2`, `seccomp`, `time`,
    /// `network`, `freezer`.
    #[prost(string, repeated, tag = "8")]
    pub features: Vec<String>,
    /// System calls that programs made and the guest's kernel has not; of kernels that count them.
    #[prost(uint64, optional, tag = "9")]
    pub unknown_calls: Option<u64>,
}

/// One step of the guest's boot.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct BootStage {
    /// What was reached.
    #[prost(string, tag = "1")]
    pub name: String,
    /// When, in ns of the guest's monotonic clock.
    #[prost(uint64, tag = "2")]
    pub monotonic_ns: u64,
}

/// Argument of ConfigureSandbox. May come more than once: what is absent stays as it is, what is
/// there already (share, address, route) is no error.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ConfigureSandboxRequest {
    /// The sandbox's host name; empty: as it is.
    #[prost(string, tag = "1")]
    pub hostname: String,
    /// Name resolution; makes resolv.conf.
    #[prost(message, optional, tag = "2")]
    pub dns: Option<Dns>,
    /// Whole text of /etc/hosts; empty: made from the host name.
    #[prost(string, tag = "3")]
    pub hosts: String,
    /// Sysctls, with dots or slashes.
    #[prost(btree_map = "string, string", tag = "4")]
    pub sysctls: BTreeMap<String, String>,
    /// Shares to mount.
    #[prost(message, repeated, tag = "5")]
    pub shares: Vec<Share>,
    /// Network interfaces to set up.
    #[prost(message, repeated, tag = "6")]
    pub interfaces: Vec<Interface>,
    /// Routes to add, in order.
    #[prost(message, repeated, tag = "7")]
    pub routes: Vec<Route>,
    /// Permanent neighbours to add.
    #[prost(message, repeated, tag = "8")]
    pub neighbours: Vec<Neighbour>,
}

/// Result of ConfigureSandbox.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ConfigureSandboxResponse {
    /// What was left out because this guest cannot do it.
    #[prost(string, repeated, tag = "1")]
    pub warnings: Vec<String>,
}

/// resolv.conf in parts.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Dns {
    /// Addresses of name servers.
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    /// Search domains.
    #[prost(string, repeated, tag = "2")]
    pub searches: Vec<String>,
    /// Options, for example `ndots:5`.
    #[prost(string, repeated, tag = "3")]
    pub options: Vec<String>,
}

/// A share to mount.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Share {
    /// Tag of the virtio-fs device.
    #[prost(string, tag = "1")]
    pub tag: String,
    /// Where to, below /run/bulkhead.
    #[prost(string, tag = "2")]
    pub path: String,
    /// Options as for mount(8): `ro`, `nosuid`, ...
    #[prost(string, repeated, tag = "3")]
    pub options: Vec<String>,
}

/// A network interface.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Interface {
    /// Its name. When `mac` is given too, the interface found by it is renamed to this.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its hardware address, `aa:bb:cc:dd:ee:ff`; empty: found by name.
    #[prost(string, tag = "2")]
    pub mac: String,
    /// Addresses with prefix length, `10.0.0.2/24`, `fd00::2/64`.
    #[prost(string, repeated, tag = "3")]
    pub addresses: Vec<String>,
    /// MTU in bytes; 0: as it is.
    #[prost(uint32, tag = "4")]
    pub mtu: u32,
    /// The hardware address that it has by now, if it is to be given `mac` in its place; found by
    /// that.
    #[prost(string, tag = "5")]
    pub device_mac: String,
}

/// A route.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Route {
    /// Destination with prefix length; empty or `default`: the default route of the gateway's
    /// family (IPv4 without a gateway).
    #[prost(string, tag = "1")]
    pub destination: String,
    /// Next hop; empty: on the link.
    #[prost(string, tag = "2")]
    pub gateway: String,
    /// Interface by name; empty: the kernel finds it from the gateway.
    #[prost(string, tag = "3")]
    pub interface: String,
    /// Preferred source address; may be empty.
    #[prost(string, tag = "4")]
    pub source: String,
    /// Priority; 0: the kernel's default.
    #[prost(uint32, tag = "5")]
    pub metric: u32,
    /// Scope as the kernel's number (0 universe, 253 link). Taken as link when there is no
    /// gateway and this is 0.
    #[prost(uint32, tag = "6")]
    pub scope: u32,
}

/// A permanent neighbour entry.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Neighbour {
    /// Its address.
    #[prost(string, tag = "1")]
    pub address: String,
    /// Its hardware address.
    #[prost(string, tag = "2")]
    pub mac: String,
    /// Interface by name.
    #[prost(string, tag = "3")]
    pub interface: String,
}

/// Argument of SetTime: the wall clock as of now.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct SetTimeRequest {
    /// Seconds since 1970-01-01 UTC.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// Nanoseconds within the second.
    #[prost(uint32, tag = "2")]
    pub nanos: u32,
}

/// Argument of AddEntropy.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct AddEntropyRequest {
    /// Up to 512 random bytes, credited in full; then the kernel's generator is reseeded.
    #[prost(bytes = "vec", tag = "1")]
    pub data: Vec<u8>,
}

/// Argument of OnlineResources.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct OnlineResourcesRequest {
    /// Have this many CPUs online (the first is always); 0: as it is.
    #[prost(uint32, tag = "1")]
    pub cpus: u32,
    /// Bring all offline memory blocks online.
    #[prost(bool, tag = "2")]
    pub memory: bool,
}

/// Result of OnlineResources.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct OnlineResourcesResponse {
    /// CPUs online now.
    #[prost(uint32, tag = "1")]
    pub cpus_online: u32,
    /// Memory blocks brought online by this call.
    #[prost(uint32, tag = "2")]
    pub memory_blocks: u32,
}

/// Argument of WaitEvent: a long poll.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct WaitEventRequest {
    /// Answer with events after this sequence number; 0: from the oldest still known.
    #[prost(uint64, tag = "1")]
    pub after: u64,
    /// Answer with none after this many ms; 0: wait for ever.
    #[prost(uint32, tag = "2")]
    pub timeout_ms: u32,
}

/// Result of WaitEvent.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct WaitEventResponse {
    /// The events, at most 256 at once, oldest first. The guest keeps the last 1,024: a gap in
    /// the sequence means that some were lost.
    #[prost(message, repeated, tag = "1")]
    pub events: Vec<Event>,
}

/// Something that happened in the guest.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Event {
    /// Number, from 1.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// When.
    #[prost(message, optional, tag = "2")]
    pub at: Option<Timestamp>,
    /// What.
    #[prost(oneof = "EventKind", tags = "3, 4")]
    pub kind: Option<EventKind>,
}

/// Kinds of [`Event`].
#[derive(Clone, PartialEq, Eq, Hash, prost::Oneof)]
pub enum EventKind {
    /// A process of a container has ended.
    #[prost(message, tag = "3")]
    Exit(ExitEvent),
    /// The kernel killed for lack of memory in a container.
    #[prost(message, tag = "4")]
    Oom(OomEvent),
}

/// A process has ended.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ExitEvent {
    /// Its container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Its exec id; empty for the container's first process.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Its process id in the guest.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// Exit code, or 128 + signal.
    #[prost(uint32, tag = "4")]
    pub exit_status: u32,
    /// When.
    #[prost(message, optional, tag = "5")]
    pub exited_at: Option<Timestamp>,
}

/// Out of memory in a container.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct OomEvent {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Processes killed so far, by the cgroup's own count.
    #[prost(uint64, tag = "2")]
    pub oom_kills: u64,
}

/// Argument of Shutdown. Answered before the guest goes down.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct ShutdownRequest {
    /// How long containers get between SIGTERM and SIGKILL, in ms; 0: SIGKILL at once.
    #[prost(uint32, tag = "1")]
    pub grace_ms: u32,
}
