//! The host side of Bulkhead: images, engines and `vmmctl`.

pub mod daemon;
pub mod debug;
pub mod engine;
pub mod fsutil;
pub mod hint;
pub mod image;
pub mod rundir;
pub mod spec;
pub mod timeouts;
pub mod units;
pub mod vmmctl;

/// One heap for all threads of a process that is a VM, or a part of one: by default each thread gets
/// pages of its own, which counts where such a process takes a few hundred KiB. Call it before there
/// are threads.
pub(crate) fn one_heap() {
    // SAFETY: sets a parameter of glibc's allocator, which takes its own lock to do it.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
