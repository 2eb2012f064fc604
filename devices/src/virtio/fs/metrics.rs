//! Counters of one share.

use serde::Serialize;

/// Counters since the device was made, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FsMetrics {
    /// Requests taken from the queues.
    pub requests: u64,
    /// Of these, requests that made no sense.
    pub malformed: u64,
    /// Bytes read by the guest from files.
    pub read_bytes: u64,
    /// Bytes written by the guest to files.
    pub written_bytes: u64,
    /// Times a limit of the share was hit.
    pub limit_hits: u64,
    /// Requests that ended in a caught bug of this device.
    pub panics: u64,
    /// Files the guest knows of now.
    pub nodes: u64,
    /// Descriptors kept for them now.
    pub node_fds: u64,
    /// Files and directories open now.
    pub handles: u64,
}
