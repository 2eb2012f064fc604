//! Sharing a directory of the host with the guest (virtio 1.2, 5.11), in this process.
//!
//! FUSE messages are taken apart and answered by `fuse-backend-rs`' server and virtio-fs
//! transport; the file system behind them is ours: `tree.rs` (what the guest knows), `share.rs`,
//! `ops.rs` and `attrs.rs` (what it may do). The crate's own passthrough is not used: it keeps an
//! entry for every file ever looked up (or stops after 255 mounts), sets the umask of the whole
//! process, needs a descriptor or more system calls per file, makes files without close-on-exec
//! and cannot be saved.
//!
//! # What keeps the guest inside
//! - Only single names are looked up, never `.`, `..` or anything with a slash, relative to a
//!   descriptor and without following symbolic links; the guest resolves links itself, by names.
//! - Only regular files and directories are opened, through a descriptor whose identity was
//!   checked before; other kinds are never opened.
//! - A read-only share refuses every change here, whatever the guest's mount options are.
//! - Device nodes, `trusted.*` and most `security.*` attributes cannot be made unless configured;
//!   what an overlay of the guest needs of them (whiteouts, which nobody can open, and
//!   `trusted.overlay.*`, which means nothing outside of an overlay's upper layer) is configured
//!   apart, and then the guest cannot exchange the directories that hold such layers.
//! - Nodes, descriptors, handles and request sizes are bounded.

mod attrs;
mod config;
mod creds;
mod device;
mod dir;
mod fuzz;
mod metrics;
mod ops;
mod request;
mod share;
mod state;
mod sys;
#[cfg(test)]
mod tests;
mod tree;

pub use config::{Caching, FsConfig, FsLimits, UPPER_PREFIX};
pub use creds::prepare_thread;
pub use device::Fs;
#[doc(hidden)]
pub use fuzz::fuzz_fs;
pub use metrics::FsMetrics;
