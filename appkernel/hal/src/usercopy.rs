//! Copies between kernel and programs. The program's address may be anything: a page that is not
//! there is asked for by the fault, and one that cannot be had ends the copy at this byte.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::USER_END;

static SMAP: AtomicBool = AtomicBool::new(false);

pub(crate) fn use_smap() {
    SMAP.store(true, Ordering::Relaxed);
}

/// Programs' memory could not be read or written at some address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

fn is_user(address: u64, len: usize) -> bool {
    address
        .checked_add(len as u64)
        .is_some_and(|end| end <= USER_END)
}

/// Copies and returns how many bytes were not.
///
/// # Safety
/// The kernel's side must be valid for `len` bytes; the other side must be in programs' half.
unsafe fn copy(to: u64, from: u64, len: usize) -> usize {
    let smap = SMAP.load(Ordering::Relaxed);
    let left: usize;
    // SAFETY: the caller's; a fault in the middle goes on at 3 with the rest in RCX. AC is set for
    // the one instruction only.
    unsafe {
        if smap {
            asm!("stac", options(nomem, nostack));
        }
        asm!(
            "2: rep movsb",
            "3:",
            ".pushsection .extable, \"a\"",
            ".quad 2b, 3b",
            ".popsection",
            inout("rcx") len => left,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
        if smap {
            asm!("clac", options(nomem, nostack));
        }
    }
    left
}

/// Reads from a program.
///
/// # Errors
/// When not all of it can be read.
pub fn read(to: &mut [u8], from: u64) -> Result<(), Fault> {
    if !is_user(from, to.len()) {
        return Err(Fault);
    }
    // SAFETY: `to` is the kernel's, the range of `from` was checked.
    match unsafe { copy(to.as_mut_ptr() as u64, from, to.len()) } {
        0 => Ok(()),
        _ => Err(Fault),
    }
}

/// Writes bytes of a frame to a program, which may have the same frame in its memory.
///
/// # Errors
/// When not all of it can be written.
pub fn write_frame(to: u64, frame: u64, offset: usize, len: usize) -> Result<(), Fault> {
    if !is_user(to, len)
        || offset
            .checked_add(len)
            .is_none_or(|end| end > crate::PAGE as usize)
    {
        return Err(Fault);
    }
    let from = crate::direct(frame) as u64 + offset as u64;
    // SAFETY: the range is within a frame, which the direct map covers; there is no reference to its
    // bytes, so it does not matter whether they change. The range of `to` was checked.
    match unsafe { copy(to, from, len) } {
        0 => Ok(()),
        _ => Err(Fault),
    }
}

/// Writes to a program.
///
/// # Errors
/// When not all of it can be written.
pub fn write(to: u64, from: &[u8]) -> Result<(), Fault> {
    if !is_user(to, from.len()) {
        return Err(Fault);
    }
    // SAFETY: `from` is the kernel's, the range of `to` was checked.
    match unsafe { copy(to, from.as_ptr() as u64, from.len()) } {
        0 => Ok(()),
        _ => Err(Fault),
    }
}
