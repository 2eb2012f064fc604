//! How a program ended.

use wasmtime::{Trap, WasmBacktrace};
use wasmtime_wasi::I32Exit;

use crate::error::one_line;

/// Frames shown of a backtrace.
const MAX_FRAMES: usize = 32;
/// Exit code of a program that trapped: as if by SIGABRT, which is what wasmtime's command line
/// and a native program's abort() give.
pub const TRAPPED: u8 = 128 + 6;
/// Exit code of a program ended by SIGKILL, or by its memory limit.
pub const KILLED: u8 = 128 + 9;
/// Exit code of a program that could not be started.
pub const NOT_STARTED: u8 = 126;

/// Why a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// By itself.
    Exited,
    /// By this signal.
    Signal(u32),
    /// It did what WebAssembly forbids, or gave up (`unreachable`).
    Trap,
    /// It ended because it got no more memory.
    OutOfMemory,
    /// Its time was over.
    Deadline,
    /// Its instructions were used up.
    Fuel,
    /// It could not be started, or the host failed.
    Failed,
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code as a shell would show it.
    pub code: u8,
    /// Why.
    pub reason: Reason,
    /// For people: one line, then the program's stack where there is one.
    pub message: Option<String>,
}

impl Exit {
    pub(crate) fn code(code: u8) -> Self {
        Self {
            code,
            reason: Reason::Exited,
            message: None,
        }
    }

    pub(crate) fn signal(signal: u32) -> Self {
        Self {
            code: 128u8.saturating_add(u8::try_from(signal).unwrap_or(127)),
            reason: Reason::Signal(signal),
            message: None,
        }
    }

    pub(crate) fn deadline() -> Self {
        Self {
            code: KILLED,
            reason: Reason::Deadline,
            message: Some("its time was over".into()),
        }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self {
            code: NOT_STARTED,
            reason: Reason::Failed,
            message: Some(message.into()),
        }
    }

    /// From the error that ended a call. `starved` says that memory was refused before.
    pub(crate) fn of_error(error: &wasmtime::Error, starved: bool, instantiated: bool) -> Self {
        if let Some(I32Exit(code)) = error.downcast_ref::<I32Exit>() {
            // As exit(3): the low eight bits.
            let [low, ..] = code.to_le_bytes();
            return Self::code(low);
        }
        let trap = error.downcast_ref::<Trap>();
        if starved && (trap.is_some() || !instantiated) {
            return Self {
                code: KILLED,
                reason: Reason::OutOfMemory,
                message: Some(format!(
                    "out of memory: the limit was reached{}",
                    backtrace(error)
                )),
            };
        }
        match trap {
            Some(Trap::OutOfFuel) => Self {
                code: KILLED,
                reason: Reason::Fuel,
                message: Some("all its instructions (fuel) are used up".into()),
            },
            Some(trap) => Self {
                code: TRAPPED,
                reason: Reason::Trap,
                message: Some(format!(
                    "{}{}",
                    one_line(&trap.to_string()),
                    backtrace(error)
                )),
            },
            None if instantiated => Self {
                code: TRAPPED,
                reason: Reason::Trap,
                message: Some(format!("{}{}", cause(error), backtrace(error))),
            },
            None => Self::failed(cause(error)),
        }
    }
}

/// The innermost message: the outer ones say where, which the backtrace does better.
fn cause(error: &wasmtime::Error) -> String {
    one_line(&error.root_cause().to_string())
}

/// The program's stack, innermost first, with files and lines where it has them.
fn backtrace(error: &wasmtime::Error) -> String {
    use std::fmt::Write as _;
    let Some(trace) = error.downcast_ref::<WasmBacktrace>() else {
        return String::new();
    };
    let mut out = String::new();
    for frame in trace.frames().iter().take(MAX_FRAMES) {
        let symbol = frame.symbols().first();
        let name = symbol
            .and_then(|s| s.name())
            .or_else(|| frame.func_name())
            .map_or_else(|| format!("function {}", frame.func_index()), one_line);
        let _ = write!(out, "\n    at {name}");
        if let Some((file, line)) = symbol.and_then(|s| Some((s.file()?, s.line()?))) {
            let _ = write!(out, " ({}:{line})", one_line(file));
        } else if let Some(offset) = frame.module_offset() {
            let _ = write!(out, " (offset {offset:#x})");
        }
    }
    if let more @ 1.. = trace.frames().len().saturating_sub(MAX_FRAMES) {
        let _ = write!(out, "\n    … {more} more");
    }
    out
}
