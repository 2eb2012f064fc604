//! Types shared by the services: `google.protobuf`, `containerd.types`, `containerd.v1.types`.

use alloc::string::String;
use alloc::vec::Vec;

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    /// What `value` is.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The value, in whatever encoding that type has (protobuf, or JSON for OCI types).
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

impl Any {
    /// An `Any` of an encoded protobuf message.
    #[must_use]
    pub fn of<M: prost::Message>(type_url: &str, message: &M) -> Self {
        Self {
            type_url: String::from(type_url),
            value: message.encode_to_vec(),
        }
    }
}

/// `google.protobuf.Timestamp`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 UTC.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// Nanoseconds within the second, 0 to 999,999,999.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

/// `google.protobuf.Empty`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Empty {}

/// `containerd.types.Mount`.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Mount {
    /// File system type, or one of the types the [contract](crate) adds.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// Device, tag or path.
    #[prost(string, tag = "2")]
    pub source: String,
    /// Below the root being built; empty for the root itself.
    #[prost(string, tag = "3")]
    pub target: String,
    /// As for mount(8).
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// `containerd.v1.types.Status`: where a process stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ProcessStatus {
    /// Not known.
    Unknown = 0,
    /// Created, not started.
    Created = 1,
    /// Running.
    Running = 2,
    /// Ended.
    Stopped = 3,
    /// Frozen.
    Paused = 4,
    /// About to be frozen.
    Pausing = 5,
}

/// `containerd.v1.types.ProcessInfo`.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ProcessInfo {
    /// Process id in the guest.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// More about it; not used.
    #[prost(message, optional, tag = "2")]
    pub info: Option<Any>,
}
