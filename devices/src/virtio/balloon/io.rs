//! Giving guest memory back to the host.

use std::io;

use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap};

use crate::virtio::queue::Segment;

/// Size of the pages a guest counts in, in bytes.
pub(in crate::virtio) const GUEST_PAGE: u64 = 4096;

/// Makes one list of neighbouring pages of `pfns` out of many single ones: a request to the kernel
/// costs the same for one page as for a thousand.
pub(super) fn runs(pfns: &mut Vec<u32>, mut each: impl FnMut(GuestAddress, u64)) {
    pfns.sort_unstable();
    pfns.dedup();
    let mut rest = pfns.as_slice();
    while let [first, ..] = rest {
        let run = rest
            .iter()
            .zip(u64::from(*first)..)
            .take_while(|(pfn, expected)| u64::from(**pfn) == *expected)
            .count();
        each(
            GuestAddress(u64::from(*first) * GUEST_PAGE),
            run as u64 * GUEST_PAGE,
        );
        rest = &rest[run..];
    }
}

/// Gives the host pages that lie wholly within the range back to the host; reading them gives
/// zeroes afterwards. Returns the number of bytes.
///
/// # Errors
/// When the range is not inside guest memory, or the host refuses.
pub(in crate::virtio) fn release(
    mem: &GuestMemoryMmap<()>,
    addr: GuestAddress,
    len: u64,
    host_page: u64,
) -> io::Result<u64> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    if !mem.check_range(addr, len) {
        return Err(io::Error::other("not inside guest memory"));
    }
    let mut released = 0;
    let slices = mem
        .get_slices(addr, len)
        .stop_on_error()
        .map_err(io::Error::other)?;
    for slice in slices {
        let guard = slice.ptr_guard_mut();
        let start = guard.as_ptr() as u64;
        let first = start.next_multiple_of(host_page);
        let end = (start + slice.len() as u64) / host_page * host_page;
        if first >= end {
            continue;
        }
        let at = guard.as_ptr().wrapping_add((first - start) as usize).cast();
        let bytes = (end - first) as usize;
        // Memory is usually a shared mapping of a memfd, of which REMOVE frees the file's pages.
        // Private mappings (copy-on-write templates, tests) refuse that: there, dropping the
        // private pages is what frees memory, and it must not touch the template.
        let advice = [libc::MADV_REMOVE, libc::MADV_DONTNEED];
        let done = advice.iter().any(|advice| {
            // SAFETY: the range lies within a slice of guest memory, whose contents Rust takes to
            // be able to change at any time; both calls leave it mapped.
            unsafe { libc::madvise(at, bytes, *advice) == 0 }
        });
        if !done {
            return Err(io::Error::last_os_error());
        }
        released += bytes as u64;
    }
    Ok(released)
}

/// [`release`] for each buffer; returns the bytes released and the number of failures.
pub(super) fn release_all(
    mem: &GuestMemoryMmap<()>,
    segments: &[Segment],
    host_page: u64,
) -> (u64, u64) {
    segments.iter().fold((0, 0), |(bytes, errors), s| {
        match release(mem, s.addr, s.len.into(), host_page) {
            Ok(n) => (bytes + n, errors),
            Err(_) => (bytes, errors + 1),
        }
    })
}
