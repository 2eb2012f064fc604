//! The debug socket of a process that owns a sandbox: `vmmctl` looks into running VMs with it.
//!
//! `debug.sock` in the VM's directory (mode 0600). The client writes one JSON object per line,
//! `{"op": "stats"}`, the owner answers with one line, `{"ok": true, "result": …}` or
//! `{"ok": false, "error": {"kind": …, "message": …}}`. Two operations end in a byte stream: after
//! `vsock` the answer carries the connection to the guest as a file descriptor, so that the owner
//! need not copy bytes; after `console` the connection itself becomes the console.

mod client;
mod server;
#[cfg(test)]
mod tests;

pub use client::Remote;
pub use server::{bind, serve_connection};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of this protocol, in the answer to `hello`.
pub const PROTOCOL: u32 = 1;
/// Longest request line, bytes.
pub const MAX_REQUEST: usize = 64 << 10;
/// Longest answer line, bytes.
pub const MAX_ANSWER: usize = 16 << 20;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Version and id.
    Hello,
    /// See [`crate::engine::Sandbox::inspect`].
    Inspect,
    /// See [`crate::engine::Sandbox::stats`].
    Stats,
    /// See [`crate::engine::Sandbox::registers`].
    Registers,
    /// See [`crate::engine::Sandbox::pause`].
    Pause,
    /// See [`crate::engine::Sandbox::resume`].
    Resume,
    /// See [`crate::engine::Sandbox::dump`].
    Dump {
        /// Absolute path.
        path: String,
    },
    /// See [`crate::engine::Sandbox::stop`].
    Stop {
        /// Time the program gets, in milliseconds.
        grace_ms: u64,
    },
    /// A connection to a port of the guest, as a descriptor.
    Vsock {
        /// The port.
        port: u32,
        /// Time the guest gets to answer, in milliseconds.
        timeout_ms: u64,
    },
    /// Turns this connection into the console.
    Console,
}

/// What the owner answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it was done.
    pub ok: bool,
    /// The result, if it was.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub result: Value,
    /// The error, if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

/// An error over the socket.
#[derive(Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// A word for programs.
    pub kind: String,
    /// For people.
    pub message: String,
}
