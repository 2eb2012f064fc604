//! Pods of wasm programs: containerd's sandbox plugin a second time, on a socket of its own, for
//! the runtime `bulkhead-wasm`. The programs run on threads of this process, in `bulkhead-wasm`'s
//! engine; see `docs/wasm.md`.

mod controller;
mod pod;
mod root;
mod spec;
mod stdio;
mod task;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_wasm::{Allocation, CacheConfig, Engine, EngineConfig};

pub use controller::{Controller, Endpoint};

use super::config::Config;
use super::events::Events;

/// What all wasm pods of a daemon share.
#[derive(Debug)]
pub struct Shared {
    /// The daemon's configuration.
    pub config: Arc<Config>,
    /// Where events go.
    pub events: Events,
    /// Made when first needed: it reserves a lot of address space.
    engine: OnceLock<Engine>,
}

impl Shared {
    /// Without an engine yet.
    pub fn new(config: Arc<Config>, events: Events) -> Arc<Self> {
        Arc::new(Self {
            config,
            events,
            engine: OnceLock::new(),
        })
    }

    /// Where pods are kept.
    fn directory(&self) -> PathBuf {
        self.config.run_dir.join("wasm")
    }

    /// The engine of this daemon. Blocks while it is made.
    ///
    /// # Errors
    /// Too little address space, or the cache's directory is not ours.
    fn engine(&self) -> Result<Engine, Status> {
        if let Some(engine) = self.engine.get() {
            return Ok(engine.clone());
        }
        let wish = &self.config.wasm;
        let made = Engine::new(&EngineConfig {
            allocation: Allocation::Pooling {
                instances: wish.max_instances,
            },
            cache: Some(CacheConfig {
                directory: wish.cache_dir.clone(),
                max_bytes: wish.cache_mib.saturating_mul(1 << 20),
            }),
            max_module_bytes: wish.max_module_mib.saturating_mul(1 << 20),
            ..EngineConfig::default()
        })
        .map_err(|e| Status::new(Code::Internal, format!("wasm engine: {e}")))?;
        Ok(self.engine.get_or_init(|| made).clone())
    }
}
