//! What can go wrong before a program runs; how a program ends is an [`crate::Exit`].

use std::io;

/// Why a program cannot be loaded or started. Each message names the object, the cause and, where
/// there is one, the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WasmError {
    /// The engine itself cannot be made.
    #[error("wasm engine: {reason}")]
    Engine {
        /// What wasmtime or the host says.
        reason: String,
    },
    /// The file is no WebAssembly, or is damaged.
    #[error("{name}: not a valid WebAssembly program: {reason}")]
    Invalid {
        /// The program.
        name: String,
        /// Where validation stopped.
        reason: String,
    },
    /// The compiler has failed, or took more than it may.
    #[error("{name}: cannot be compiled: {reason}")]
    Compiler {
        /// The program.
        name: String,
        /// What is known of it.
        reason: String,
    },
    /// The compiler was ended by a signal that was meant for us.
    #[error("{name}: interrupted while it was compiled")]
    Interrupted {
        /// The program.
        name: String,
        /// The signal.
        signal: i32,
    },
    /// The file is larger than is compiled for anybody.
    #[error(
        "{name}: {size} bytes of WebAssembly exceed the limit of {limit} (a daemon's is wasm.max_module_mib)"
    )]
    TooLarge {
        /// The program.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// It needs something this sandbox does not have.
    #[error("{name}: {reason}")]
    Unsupported {
        /// The program.
        name: String,
        /// What is missing, and what would do.
        reason: String,
    },
    /// The requested function is not there.
    #[error("{name}: exports no function {function:?}{hint}")]
    NoFunction {
        /// The program.
        name: String,
        /// What was asked for.
        function: String,
        /// Empty, or what is exported.
        hint: String,
    },
    /// A mount cannot be given to the program.
    #[error("mount {guest} from {host}: {reason}")]
    Mount {
        /// Path on the host.
        host: String,
        /// Path for the program.
        guest: String,
        /// Why not.
        reason: String,
    },
    /// A container cannot do this in its present state.
    #[error("container {id}: {reason}")]
    State {
        /// The container.
        id: String,
        /// What it is doing.
        reason: String,
    },
    /// The host refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on which object.
        what: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

impl WasmError {
    /// A word for programs, stable across versions.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Engine { .. } => "wasm_engine",
            Self::Invalid { .. } => "wasm_invalid",
            Self::TooLarge { .. } => "wasm_too_large",
            Self::Compiler { .. } => "wasm_compiler",
            Self::Interrupted { .. } => "interrupted",
            Self::Unsupported { .. } => "wasm_unsupported",
            Self::NoFunction { .. } => "wasm_no_function",
            Self::Mount { .. } => "wasm_mount",
            Self::State { .. } => "wasm_state",
            Self::Io { .. } => "io",
        }
    }

    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source,
        }
    }

    pub(crate) fn engine(error: &wasmtime::Error) -> Self {
        Self::Engine {
            reason: one_line(&format!("{error:#}")),
        }
    }
}

/// Messages may quote the program's own names: no control characters, and not without end.
pub(crate) fn one_line(text: &str) -> String {
    const LONGEST: usize = 600;
    let mut out: String = text
        .chars()
        .take(LONGEST)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    out
}
