//! WebAssembly sandboxes on an embedded wasmtime. A library: it knows nothing of containerd.
//!
//! An [`Engine`] compiles programs and keeps them, on disk too; a [`Pod`] is a network, a memory
//! budget and threads of its own; a [`Container`] runs one program in a pod.
//!
//! ```no_run
//! use bulkhead_wasm::{ContainerConfig, Engine, EngineConfig, Pod, PodConfig, Source};
//!
//! # fn main() -> Result<(), bulkhead_wasm::WasmError> {
//! let engine = Engine::new(&EngineConfig::default())?;
//! let program = engine.load(Source::File("hello.wasm".as_ref()))?;
//! let pod = Pod::new(&engine, PodConfig::default());
//! let container = pod.create(ContainerConfig::new("hello", program))?;
//! container.start()?;
//! println!("exit code {}", container.wait()?.code);
//! # Ok(())
//! # }
//! ```
//!
//! What holds a program back:
//! - its memory and tables are drawn from its container's and its pod's budget;
//! - epochs interrupt it: at once to end or hold it, every 10 ms while it executes to look at its
//!   sockets, timers and CPU share. Nothing wakes up while nothing executes;
//! - files are reached through directories opened beforehand, below which the kernel keeps every
//!   path (`openat2` with `RESOLVE_BENEATH`);
//! - sockets are made by the pod's threads, which are in the pod's network namespace, and names
//!   are asked from the pod's servers through them.

mod cache;
mod client;
mod code;
mod compile;
mod compiles;
mod config;
mod control;
mod engine;
mod error;
mod exit;
mod flavour;
mod harden;
mod http;
mod limits;
mod link;
mod names;
mod pod;
mod program;
mod run;
mod state;
mod stdio;
mod threads;
mod ticker;
mod user;

pub use cache::fuzz_cache;
pub use code::Code;
pub use compile::compiler_main;
pub use config::{Allocation, CacheConfig, CompilerConfig, EngineConfig};
pub use engine::Engine;
pub use error::WasmError;
pub use exit::{Exit, KILLED, NOT_STARTED, Reason, TRAPPED};
pub use harden::{harden_thread, thread_table};
pub use limits::Budget;
pub use names::{NameError, Resolver};
pub use pod::{Container, ContainerConfig, HttpConfig, Mount, Pod, PodConfig, Stats, Status};
pub use program::{Origin, Program, ProgramKind, Source};
pub use stdio::Stdio;
pub use threads::{Network, Spawner, ThreadHook};
pub use user::User;

/// The version of wasmtime inside.
pub const WASMTIME_VERSION: &str = "48.0.8";
