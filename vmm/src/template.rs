//! A VM that others begin as copies of: booted once, kept as it was then, never run again.
//!
//! A copy has memory of its own, filled from the template: nothing is shared between copies, so
//! that none can see by timing what another has touched. What they do have in common is what the
//! template's kernel had drawn at random by then: the caller has each be given fresh entropy before
//! it does anything that should not be guessed.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use crate::config::VmConfig;
use crate::error::VmError;
use crate::layout::MMIO_HOLE_START;
use crate::memory::{VmMemory, sealed_memfd};
use crate::snapshot::VmState;
use crate::vm::{Frame, Vm};

/// What is looked at, and copied, at a time, in bytes; whole pages.
const PIECE: usize = 256 << 10;
const PAGE: usize = 4096;

/// A VM to be copied.
#[derive(Debug)]
pub struct Template {
    state: VmState,
    /// Nobody can write to it any more.
    memory: File,
    /// Where it is not zero: offset and length in bytes.
    extents: Vec<(u64, u64)>,
}

impl Template {
    /// Of a running VM, which is paused and has served then.
    ///
    /// # Errors
    /// When the VM cannot be saved, has been given memory, or the host lacks memory.
    pub fn of(vm: &Vm) -> Result<Self, VmError> {
        let state = vm.save()?;
        if vm.added_memory().is_some_and(|(_, has)| has > 0) {
            return Err(VmError::State("the VM has been given more memory".into()));
        }
        let failed = || VmError::host("memory of a template");
        let source = vm.memory_file();
        let mut extents: Vec<(u64, u64)> = Vec::new();
        let memory = sealed_memfd(state.memory_bytes, |memory| {
            let mut piece = vec![0; PIECE];
            let mut at = 0;
            while let Some((start, end)) = next_data(source, at, state.memory_bytes)? {
                let mut from = start;
                while from < end {
                    let len = piece
                        .len()
                        .min(usize::try_from(end - from).unwrap_or(PIECE));
                    let piece = piece.get_mut(..len).unwrap_or_default();
                    source.read_exact_at(piece, from)?;
                    for (offset, page) in (from..).step_by(PAGE).zip(piece.chunks(PAGE)) {
                        if page.iter().all(|byte| *byte == 0) {
                            continue;
                        }
                        memory.write_all_at(page, offset)?;
                        let len = page.len() as u64;
                        match extents.last_mut() {
                            // A copy has a hole in its addresses there.
                            Some((start, before))
                                if *start + *before == offset && offset != MMIO_HOLE_START =>
                            {
                                *before += len;
                            }
                            _ => extents.push((offset, len)),
                        }
                    }
                    from += len as u64;
                }
                at = end;
            }
            Ok(())
        })
        .map_err(failed())?;
        Ok(Self {
            state,
            memory,
            extents,
        })
    }

    /// Bytes of memory that it keeps, and that each copy begins with.
    pub fn bytes(&self) -> u64 {
        self.extents.iter().map(|(_, len)| len).sum()
    }

    fn fill(&self, memory: &VmMemory) -> Result<(), VmError> {
        let mut piece = vec![0; PIECE];
        for (start, len) in &self.extents {
            let (mut at, end) = (*start, start + len);
            while at < end {
                let len = piece.len().min(usize::try_from(end - at).unwrap_or(PIECE));
                let piece = piece.get_mut(..len).unwrap_or_default();
                self.memory
                    .read_exact_at(piece, at)
                    .map_err(VmError::host("memory of a template"))?;
                memory.put_at_offset(at, piece)?;
                at += len as u64;
            }
        }
        Ok(())
    }
}

/// The next range of a file that may hold something, at or behind `at` and before `limit`.
fn next_data(file: &File, at: u64, limit: u64) -> std::io::Result<Option<(u64, u64)>> {
    if at >= limit {
        return Ok(None);
    }
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        lseek64(file, from, whence)
    };
    let start = match seek(at, Whence::SeekData) {
        Ok(start) => u64::try_from(start).unwrap_or(limit),
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if start >= limit {
        return Ok(None);
    }
    let end = u64::try_from(seek(start, Whence::SeekHole)?).unwrap_or(limit);
    Ok(Some((start, end.min(limit))))
}

impl Vm {
    /// Builds a VM that goes on where the template stood; [`Vm::start`] lets it. `config` must
    /// describe the same devices, whatever they are connected to.
    ///
    /// # Errors
    /// As [`Vm::create`], and when template and configuration do not belong together.
    pub fn from_template(config: VmConfig, template: &Template) -> Result<Self, VmError> {
        template.state.check(&config)?;
        let frame = Frame::new(&config, None)?;
        template.fill(&frame.memory)?;
        frame.marks.add("memory copied");
        Self::go_on(config, &template.state, frame)
    }
}
