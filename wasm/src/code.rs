//! Compiled code on its way from the process that has it made to one that runs it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::cache::Sha;
use crate::engine::Engine;
use crate::error::WasmError;
use crate::program::{Origin, Program};

/// The machine code of a program, which nobody can change: sealed memory, or a file of the cache's.
#[derive(Debug)]
pub struct Code {
    pub(crate) name: String,
    pub(crate) file: File,
    pub(crate) inlined: bool,
    pub(crate) origin: Origin,
}

impl Code {
    /// Takes what another process's [`Self::file`] and the other answers about it were.
    ///
    /// # Safety
    /// `file` must be of a [`Code`] of this very version of the library: its content is executed, and
    /// wasmtime trusts it.
    pub unsafe fn received(name: &str, file: OwnedFd, inlined: bool) -> Self {
        Self {
            name: crate::error::one_line(name),
            file: File::from(file),
            inlined,
            origin: Origin::Disk,
        }
    }

    /// Where it is.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether it was made with functions inlined.
    pub fn inlined(&self) -> bool {
        self.inlined
    }
}

/// What becomes of code that was found or made: a program of this process, or [`Code`] for another.
pub(crate) trait Outcome: Sized {
    /// Whether other processes make the same: they take turns.
    const SHARED: bool;

    /// What this process has already.
    fn known(engine: &Engine, digest: &Sha) -> Option<Self>;

    /// Makes it.
    fn take(engine: &Engine, digest: &Sha, code: Code) -> Result<Self, WasmError>;
}

impl Outcome for Code {
    const SHARED: bool = true;

    fn known(_: &Engine, _: &Sha) -> Option<Self> {
        None
    }

    fn take(_: &Engine, _: &Sha, code: Code) -> Result<Self, WasmError> {
        Ok(code)
    }
}

impl Outcome for Program {
    const SHARED: bool = false;

    fn known(engine: &Engine, digest: &Sha) -> Option<Self> {
        engine.loaded(digest)
    }

    fn take(engine: &Engine, digest: &Sha, code: Code) -> Result<Self, WasmError> {
        Ok(engine.keep(*digest, engine.map(&code)?))
    }
}
