//! A loaded program: compiled code, checked against what the sandbox offers.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use wasmtime::component::{self, Component};
use wasmtime::{Module, component::types::ComponentItem};
use wasmtime_wasi_http::p2::bindings::ProxyPre as HttpPre;
use wasmtime_wasi_http::p3::bindings::ServicePre;

use crate::cache::Sha;
use crate::error::{WasmError, one_line};
use crate::state::{ComponentState, CoreState};

/// What a program is, by what it exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgramKind {
    /// A core module, with WASI preview 1 or without WASI.
    Core,
    /// A component with `wasi:cli/run` 0.2.
    Command,
    /// A component with `wasi:cli/run` 0.3.
    CommandP3,
    /// A component with `wasi:http/incoming-handler` 0.2.
    Http,
    /// A component with `wasi:http/handler` 0.3.
    HttpP3,
    /// A component with none of these: its functions can be called by name.
    Library,
}

impl ProgramKind {
    /// True if it answers HTTP requests instead of running once.
    pub fn serves_http(self) -> bool {
        matches!(self, Self::Http | Self::HttpP3)
    }
}

pub(crate) enum Code {
    Core(wasmtime::InstancePre<CoreState>),
    Component(component::InstancePre<ComponentState>),
    Command(wasmtime_wasi::p2::bindings::CommandPre<ComponentState>),
    CommandP3(wasmtime_wasi::p3::bindings::CommandPre<ComponentState>),
    Http(HttpPre<ComponentState>),
    HttpP3(ServicePre<ComponentState>),
}

/// A program ready to be started any number of times.
#[derive(Clone)]
pub struct Program(pub(crate) Arc<Loaded>);

pub(crate) struct Loaded {
    pub(crate) name: String,
    pub(crate) kind: ProgramKind,
    /// What it was made ready by, and runs on.
    pub(crate) engine: wasmtime::Engine,
    pub(crate) code: Code,
    /// Exported functions of a core module, for messages.
    pub(crate) exports: Vec<String>,
    /// Where it was found; for tests and statistics.
    pub(crate) origin: Origin,
}

/// How a program came to be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Compiled just now.
    Compiled,
    /// Found compiled on disk.
    Disk,
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program")
            .field("name", &self.0.name)
            .field("kind", &self.0.kind)
            .field("origin", &self.0.origin)
            .finish_non_exhaustive()
    }
}

impl Program {
    /// What it is.
    pub fn kind(&self) -> ProgramKind {
        self.0.kind
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// How it came to be loaded.
    pub fn origin(&self) -> Origin {
        self.0.origin
    }
}

/// Where a program comes from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// A file.
    File(&'a Path),
    /// A file that is open for reading, at its beginning.
    Open {
        /// For messages.
        name: &'a str,
        /// The file.
        file: &'a std::fs::File,
    },
    /// The program itself.
    Bytes {
        /// For messages.
        name: &'a str,
        /// The program.
        bytes: &'a [u8],
    },
}

/// What the first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Module,
    Component,
}

impl Format {
    /// Reads the preamble of a binary.
    pub(crate) fn of(name: &str, head: &[u8]) -> Result<Self, WasmError> {
        let invalid = |reason: &str| WasmError::Invalid {
            name: name.to_owned(),
            reason: reason.to_owned(),
        };
        match head.get(..8) {
            _ if head.is_empty() => Err(invalid("the file is empty")),
            Some([0, b'a', b's', b'm', 1, 0, 0, 0]) => Ok(Self::Module),
            Some([0, b'a', b's', b'm', _, _, 1, 0]) => Ok(Self::Component),
            Some([0, b'a', b's', b'm', ..]) => Err(invalid("unknown version of the format")),
            _ if head.starts_with(b"\x7fELF") => Err(invalid(
                "it is a native program (ELF); run its image in another kind of sandbox",
            )),
            _ if head.trim_ascii_start().starts_with(b"(") => Err(invalid(
                "it is WebAssembly text; turn it into a binary with wat2wasm or wasm-tools parse",
            )),
            _ => Err(invalid("it does not begin with \\0asm")),
        }
    }

    /// True for bytes that begin as WebAssembly binaries do.
    pub(crate) fn is_wasm(head: &[u8]) -> bool {
        head.starts_with(b"\0asm")
    }
}

/// The key of compiled code: the program, and all that decides what is made of it. It is `as_asked`,
/// or the program was too large for what the configuration asks for.
pub(crate) fn code_key(digest: &Sha, configuration: &[u8], as_asked: bool) -> Sha {
    use sha2::{Digest, Sha256};
    Sha256::new()
        .chain_update(b"bulkhead-wasm 2\0")
        .chain_update([u8::from(as_asked)])
        .chain_update(digest)
        .chain_update(configuration)
        .finalize()
        .into()
}

fn unsupported(name: &str, error: &wasmtime::Error) -> WasmError {
    WasmError::Unsupported {
        name: name.to_owned(),
        reason: one_line(&format!("{error:#}")),
    }
}

/// Links a core module.
pub(crate) fn core(
    name: &str,
    linker: &wasmtime::Linker<CoreState>,
    module: &Module,
    origin: Origin,
) -> Result<Loaded, WasmError> {
    if let Some(import) = module.imports().find(|i| i.module() == "wasi_unstable") {
        return Err(WasmError::Unsupported {
            name: name.to_owned(),
            reason: format!(
                "imports {}.{}, which was replaced in 2020; build it with a current WASI SDK",
                import.module(),
                one_line(import.name())
            ),
        });
    }
    let pre = linker
        .instantiate_pre(module)
        .map_err(|e| unsupported(name, &e))?;
    let exports = module
        .exports()
        .filter(|e| e.ty().func().is_some())
        .take(64)
        .map(|e| one_line(e.name()))
        .collect();
    Ok(Loaded {
        name: name.to_owned(),
        kind: ProgramKind::Core,
        engine: module.engine().clone(),
        code: Code::Core(pre),
        exports,
        origin,
    })
}

/// Links a component, by what it exports.
pub(crate) fn component(
    name: &str,
    engine: &wasmtime::Engine,
    linker: &component::Linker<ComponentState>,
    component: &Component,
    origin: Origin,
) -> Result<Loaded, WasmError> {
    let ty = component.component_type();
    let has = |interface: &str| {
        ty.exports(engine).any(|(export, item)| {
            export.starts_with(interface) && matches!(item.ty, ComponentItem::ComponentInstance(_))
        })
    };
    let kind = if has("wasi:http/incoming-handler@0.2.") {
        ProgramKind::Http
    } else if has("wasi:http/handler@0.3.") {
        ProgramKind::HttpP3
    } else if has("wasi:cli/run@0.2.") {
        ProgramKind::Command
    } else if has("wasi:cli/run@0.3.") {
        ProgramKind::CommandP3
    } else {
        ProgramKind::Library
    };
    let fail = |e: wasmtime::Error| unsupported(name, &e);
    let pre = linker.instantiate_pre(component).map_err(fail)?;
    let code = match kind {
        ProgramKind::Http => Code::Http(HttpPre::new(pre).map_err(fail)?),
        ProgramKind::HttpP3 => Code::HttpP3(ServicePre::new(pre).map_err(fail)?),
        ProgramKind::Command => {
            Code::Command(wasmtime_wasi::p2::bindings::CommandPre::new(pre).map_err(fail)?)
        }
        ProgramKind::CommandP3 => {
            Code::CommandP3(wasmtime_wasi::p3::bindings::CommandPre::new(pre).map_err(fail)?)
        }
        ProgramKind::Library | ProgramKind::Core => Code::Component(pre),
    };
    let exports = ty
        .exports(engine)
        .take(64)
        .map(|(export, _)| one_line(export))
        .collect();
    Ok(Loaded {
        name: name.to_owned(),
        kind,
        engine: engine.clone(),
        code,
        exports,
        origin,
    })
}
