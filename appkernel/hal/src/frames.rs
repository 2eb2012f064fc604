//! The machine's memory in frames of 4 KiB.

use appkernel_core::frames::{Frames, Region};

use crate::boot::{FIRST_MAPPED_END, Info, MAPPED_END, kernel_range, map_upper};
use crate::sync::Mutex;
use crate::{DIRECT_MAP, PAGE, direct, heap};

static FRAMES: Mutex<Option<Frames<'static>>> = Mutex::new(None);

/// Frames the kernel keeps for itself: programs get none of the last two MiB, so that it can still
/// end one of them.
const RESERVE: usize = 512;
/// Memory below is the loader's: boot structures, command line.
const LOWEST: u64 = 1 << 20;

/// Takes over the memory. Nothing of it is touched but the table of frames, and of that only the
/// entries of frames in use, and page tables for what lies above 4 GiB.
pub fn init(info: &Info) {
    let (_, kernel_end) = kernel_range();
    let mut end = 0;
    for (_, range_end) in info.ram {
        end = end.max(range_end.min(MAPPED_END));
    }
    let frames = (end / PAGE) as usize;
    let table_bytes = (frames * size_of::<u64>()) as u64;
    let first = (kernel_end + table_bytes).next_multiple_of(PAGE);
    // The table is a 512th of the memory, and the first part of that reaches to 3 GiB.
    debug_assert!(first < FIRST_MAPPED_END);
    let first = map_upper(&info.ram, first);
    let mut regions = [Region::default(); 8];
    for (slot, (from, to)) in regions.iter_mut().zip(info.ram) {
        let from = if from < kernel_end {
            from.max(first)
        } else {
            from
        }
        .max(LOWEST);
        let to = to.min(MAPPED_END);
        if from < to {
            *slot = Region {
                next: from.div_ceil(PAGE) as u32,
                end: (to / PAGE) as u32,
            };
        }
    }
    // SAFETY: directly behind the kernel in memory nothing else uses; `first` keeps it so.
    let meta = unsafe { core::slice::from_raw_parts_mut(direct(kernel_end).cast::<u64>(), frames) };
    *FRAMES.lock() = Some(Frames::new(meta, regions));
}

fn with<T>(f: impl FnOnce(&mut Frames<'static>) -> T) -> Option<T> {
    FRAMES.lock().as_mut().map(f)
}

/// `1 << order` frames in a row, not zeroed; their physical address.
pub fn allocate(order: usize) -> Option<u64> {
    with(|frames| frames.allocate(order))?.map(|frame| u64::from(frame) * PAGE)
}

/// One frame of zeros.
pub fn allocate_zeroed() -> Option<u64> {
    let frame = allocate(0)?;
    // SAFETY: nobody else has the frame yet.
    unsafe { direct(frame).write_bytes(0, PAGE as usize) };
    Some(frame)
}

/// One frame of zeros for a program, also one that caches give back; leaves the kernel its reserve.
/// A page of a file that is not shared may be gone afterwards.
pub fn allocate_user() -> Option<u64> {
    let again = || heap::help().then(allocate_user_unwritten).flatten();
    let frame = allocate_user_unwritten().or_else(again)?;
    // SAFETY: nobody else has the frame yet.
    unsafe { direct(frame).write_bytes(0, PAGE as usize) };
    Some(frame)
}

/// One frame for a program, of any content: the caller writes all of it. Caches keep theirs.
pub fn allocate_user_unwritten() -> Option<u64> {
    if is_low() {
        return None;
    }
    with(Frames::allocate_page)?.map(|frame| u64::from(frame) * PAGE)
}

fn is_low() -> bool {
    with(|frames| frames.available()).is_none_or(|free| free < RESERVE)
}

/// Whether only the kernel's reserve is left, also after caches gave back what they have: nothing
/// more is started for programs then. Files that were read are no reason to refuse a `fork`.
pub fn is_scarce() -> bool {
    is_low() && (!heap::help() || is_low())
}

/// Whether the kernel itself has used up half of its reserve.
pub fn is_critical() -> bool {
    with(|frames| frames.available()).is_none_or(|free| free < RESERVE / 2)
}

/// One more owner of a frame.
pub fn share(physical: u64) {
    with(|frames| frames.share((physical / PAGE) as u32));
}

/// How many own a frame.
pub fn owners(physical: u64) -> u32 {
    with(|frames| frames.owners((physical / PAGE) as u32)).unwrap_or(0)
}

/// One owner less; the last one frees it.
pub fn release(physical: u64, order: usize) {
    with(|frames| frames.release((physical / PAGE) as u32, order));
}

/// Frames in all, and those nobody has.
pub fn statistics() -> (usize, usize) {
    with(|frames| (frames.total(), frames.available())).unwrap_or((0, 0))
}

/// The frame's bytes.
///
/// # Safety
/// The caller owns the frame, and holds no other reference to its bytes. Programs may change what
/// they have mapped, but never while the kernel runs (one CPU).
pub unsafe fn bytes<'a>(physical: u64) -> &'a mut [u8] {
    // SAFETY: the caller's; the direct map covers all frames that are given out.
    unsafe { core::slice::from_raw_parts_mut(direct(physical), PAGE as usize) }
}

/// Physical address of memory of the kernel's heap.
pub fn physical(pointer: *const u8) -> u64 {
    (pointer as u64).wrapping_sub(DIRECT_MAP)
}
