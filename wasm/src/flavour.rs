//! wasmtime with one set of compiler settings. It runs only code that was made with the same, so
//! programs that are compiled without inlining, because they are too large for it, have one of
//! their own.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use wasmtime::Module;
use wasmtime::component::Component;

use crate::config::EngineConfig;
use crate::engine::wasmtime_config;
use crate::error::WasmError;
use crate::link;
use crate::program::{self, Loaded, Origin};
use crate::state::{ComponentState, CoreState};

pub(crate) struct Flavour {
    pub(crate) wasmtime: wasmtime::Engine,
    // Made when first needed: a process that runs one module needs one of them.
    core_linker: OnceLock<wasmtime::Linker<CoreState>>,
    component_linker: OnceLock<wasmtime::component::Linker<ComponentState>>,
}

impl Flavour {
    pub(crate) fn new(config: &EngineConfig, inlining: bool) -> Result<Self, WasmError> {
        let wasmtime = wasmtime::Engine::new(&wasmtime_config(config, inlining))
            .map_err(|e| WasmError::engine(&e))?;
        Ok(Self {
            wasmtime,
            core_linker: OnceLock::new(),
            component_linker: OnceLock::new(),
        })
    }

    pub(crate) fn load(
        &self,
        name: &str,
        file: &File,
        origin: Origin,
    ) -> Result<Loaded, WasmError> {
        let engine = &self.wasmtime;
        let fail = |e: wasmtime::Error| WasmError::engine(&e);
        // The very file that was verified, not one that has its name by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let kind = wasmtime::Engine::detect_precompiled_file(&path).map_err(fail)?;
        match kind {
            Some(wasmtime::Precompiled::Module) => {
                // SAFETY: this very program's compiler made the file, with this engine's settings,
                // and nobody can change it: it is sealed memory, or lies where only we can write
                // and its MAC was checked (see `cache`).
                let module = unsafe { Module::deserialize_file(engine, &path) }.map_err(fail)?;
                program::core(name, self.core_linker()?, &module, origin)
            }
            Some(wasmtime::Precompiled::Component) => {
                // SAFETY: as for modules.
                let component =
                    unsafe { Component::deserialize_file(engine, &path) }.map_err(fail)?;
                program::component(name, engine, self.component_linker()?, &component, origin)
            }
            None => Err(WasmError::Engine {
                reason: format!("{name}: the compiled code is damaged"),
            }),
        }
    }

    fn core_linker(&self) -> Result<&wasmtime::Linker<CoreState>, WasmError> {
        if let Some(linker) = self.core_linker.get() {
            return Ok(linker);
        }
        let linker = link::core(&self.wasmtime).map_err(|e| WasmError::engine(&e))?;
        Ok(self.core_linker.get_or_init(|| linker))
    }

    fn component_linker(&self) -> Result<&wasmtime::component::Linker<ComponentState>, WasmError> {
        if let Some(linker) = self.component_linker.get() {
            return Ok(linker);
        }
        let linker = link::component(&self.wasmtime).map_err(|e| WasmError::engine(&e))?;
        Ok(self.component_linker.get_or_init(|| linker))
    }
}
