//! The interface between host and guest: messages, ttrpc framing and the byte-stream header.
//!
//! `no_std` + `alloc` by default, so that a guest kernel can speak it; the feature `tokio` adds
//! an async [`client`] and [`server`] for any `AsyncRead + AsyncWrite`.
//!
//! # Contract
//!
//! **Transport.** The guest listens on two vsock ports; only the host (CID 2) may connect.
//!
//! | port | what |
//! |---|---|
//! | [`CONTROL_PORT`] (1024) | ttrpc; any number of connections, calls multiplexed on each |
//! | [`STREAM_PORT`] (1025) | one connection per stdio stream |
//!
//! **ttrpc.** Each frame is a 10-byte header ([`frame`]: payload length u32 BE, stream id u32 BE,
//! type u8, flags u8) and a protobuf payload of at most 4 MiB ([`frame::MAX_MESSAGE`]): type 1
//! carries [`rpc::Request`], type 2 [`rpc::Response`]. Calls are unary; a frame with
//! `REMOTE_OPEN` (a streaming call) is answered with UNIMPLEMENTED. A request above the limit is
//! answered with RESOURCE_EXHAUSTED and the connection goes on. Errors carry the gRPC codes
//! ([`rpc::Code`]). At most [`MAX_CALLS_PER_CONNECTION`] calls may be under way on a connection.
//!
//! **Services on the control port.** `containerd.task.v3.Task` ([`task`]), byte-compatible with
//! containerd's, and `bulkhead.agent.v1.Sandbox` ([`sandbox`]).
//!
//! **Streams.** The host connects to port 1025 and writes `"<stream-id>\n"` (1 to 128 printable
//! ASCII bytes without spaces, see [`stream`]); the guest answers `"ok\n"` or
//! `"error <reason>\n"`; raw bytes follow. Then `stdin`, `stdout` and `stderr` of CreateTask or
//! Exec name a stream as `"stream:<stream-id>"`; an empty string is /dev/null. A stream serves one
//! process, is used up by the call that names it, and is dropped when no call names it within
//! [`STREAM_CLAIM_SECONDS`]. `terminal = true` uses stdin and stdout only.
//! - The guest closes stdout and stderr when all writers are gone, or when the process has ended
//!   and what it wrote has been passed on: the bytes are complete before the stream's EOF.
//! - The host half-closes stdin to give the process EOF (on a terminal: the VEOF character).
//!   `CloseIO` does the same after the bytes that had arrived by then.
//! - If the host drops an output stream, further output is discarded and the process goes on.
//! - The id `tcp:<port>` is no stream of a process: the guest connects to that port of its loopback
//!   (127.0.0.1, else ::1) and answers when it has; then the bytes are the connection's.
//! - Nothing is dropped for a slow reader: the process blocks, and only that process.
//!
//! **CreateTask.** `id`: 1 to 128 of `[A-Za-z0-9_.+-]`, not starting with a dot. `bundle` may be
//! empty. `options`: an `Any` of type [`sandbox::CONTAINER_OPTIONS_TYPE_URL`] holding
//! [`sandbox::ContainerOptions`], which carries the OCI runtime spec as JSON. The guest sets
//! `root.path` and `cgroupsPath` itself, refuses hooks, ignores AppArmor and SELinux labels, and
//! lets namespaces of type network, ipc and uts that have a `path` (a host path) mean "the
//! sandbox's own". `rootfs`: mounts in order, `target` relative to the container's root. Types:
//! - `virtiofs`: `source` is a tag;
//! - `bulkhead-share`: bind of `source`, a guest path below a share that ConfigureSandbox has
//!   mounted; options `ro`, `rbind`;
//! - `erofs`, `ext4`, `tmpfs`, `overlay`, `bind`: as in containerd, with guest paths.
//!
//! The program itself is at fault when CreateTask, or Start of an exec, answers NOT_FOUND (there is
//! no such program: exit code 127 to a user) or PERMISSION_DENIED (it cannot be executed: 126).
//! Start answers when the program has been executed.
//!
//! **Exec.** `spec`: an `Any` whose value is the OCI `process` object as JSON (containerd's own
//! type URL is [`sandbox::OCI_PROCESS_TYPE_URL`]). **Update**: `resources` is an `Any` with OCI
//! `linux.resources` JSON. **Stats** answers an `Any` of
//! [`metrics::METRICS_TYPE_URL`]. Exit status: the exit code, or 128 + signal.
//!
//! **Trust.** Each side takes the other for hostile: decoders never allocate more than their
//! limit, and a [`client::Client`] takes smaller messages than a server does, because protobuf
//! can grow some 60-fold when it is decoded.
#![cfg_attr(not(any(feature = "tokio", test)), no_std)]

extern crate alloc;

pub mod frame;
pub mod metrics;
pub mod rpc;
pub mod sandbox;
mod services;
pub mod stream;
pub mod task;
pub mod types;

#[cfg(feature = "tokio")]
pub mod client;
#[cfg(feature = "tokio")]
pub mod server;

/// vsock port of the ttrpc services.
pub const CONTROL_PORT: u32 = 1024;
/// vsock port of the stdio streams.
pub const STREAM_PORT: u32 = 1025;
/// The vsock address of the host; the guest accepts nobody else.
pub const HOST_CID: u32 = 2;
/// How long a stream may wait for the call that names it, in seconds.
pub const STREAM_CLAIM_SECONDS: u64 = 60;
/// Calls under way at once on one connection; more are answered RESOURCE_EXHAUSTED.
pub const MAX_CALLS_PER_CONNECTION: usize = 1024;
/// Version of this contract, in [`sandbox::GetInfoResponse`]. Raised when a host must know.
pub const PROTOCOL_VERSION: u32 = 1;
