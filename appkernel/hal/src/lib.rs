//! The machine under the app kernel. Most of the kernel's `unsafe` code lives here: entry, traps,
//! page tables, context switch, copies from and to programs.
//!
//! One CPU; the kernel runs with interrupts off, except while it waits in [`cpu::idle`]. Everything
//! here is for the bare machine: on the host the crate is empty.
#![cfg_attr(target_os = "none", no_std)]
#![cfg(target_os = "none")]

extern crate alloc;

pub mod apic;
pub mod boot;
pub mod clock;
pub mod context;
pub mod cpu;
pub mod frames;
pub mod heap;
pub mod mmio;
pub mod paging;
pub mod serial;
pub mod sync;
pub mod trap;
pub mod usercopy;
pub mod vdso;

/// Where all physical memory is mapped.
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
/// Difference between the kernel's addresses and where it is loaded.
pub const KERNEL_OFFSET: u64 = 0xffff_ffff_8000_0000;
/// Programs' addresses end here (the last page stays free: a system call at its end would return to
/// a non-canonical address).
pub const USER_END: u64 = 0x7fff_ffff_f000;
/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// The kernel's address of a physical one.
pub fn direct(physical: u64) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut((physical + DIRECT_MAP) as usize)
}

/// A pointer to the kernel's address `address`.
pub(crate) fn kernel_pointer<T>(address: u64) -> *mut T {
    core::ptr::with_exposed_provenance_mut(address as usize)
}
