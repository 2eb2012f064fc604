//! The kernel's heap: lists of equal pieces up to half a page, whole frames above.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::null_mut;

use crate::sync::Mutex;
use crate::{PAGE, direct, frames};

/// Pieces of 16, 32 … 2048 bytes.
const CLASSES: usize = 8;
const SMALLEST: usize = 16;

#[derive(Debug)]
struct Lists([u64; CLASSES]);

/// The allocator; make one `#[global_allocator]`.
#[derive(Debug)]
pub struct Heap(Mutex<Lists>);

impl Heap {
    /// An empty heap, which grows as it is used.
    #[expect(clippy::new_without_default, reason = "const, for a static")]
    pub const fn new() -> Self {
        Self(Mutex::new(Lists([0; CLASSES])))
    }
}

/// What gives memory back when there is none left: caches. Whoever allocates may hold any lock, so it
/// takes only those that are free; it says whether it freed anything.
static HELP: Mutex<Option<fn() -> bool>> = Mutex::new(None);

/// Names what gives memory back.
pub fn ask_for_help(help: fn() -> bool) {
    *HELP.lock() = Some(help);
}

/// Asks for memory back; says whether there was any.
pub(crate) fn help() -> bool {
    let help = *HELP.lock();
    help.is_some_and(|help| help())
}

/// Frames in a row, also those that caches give back.
pub(crate) fn frames_in_need(order: usize) -> Option<u64> {
    let again = || help().then(|| frames::allocate(order)).flatten();
    frames::allocate(order).or_else(again)
}

/// The list for so many bytes, or the order of frames.
fn class(layout: &Layout) -> Result<usize, usize> {
    let bytes = layout.size().max(layout.align()).max(SMALLEST);
    let class = bytes.next_power_of_two().trailing_zeros() as usize - 4;
    if class < CLASSES {
        Ok(class)
    } else {
        let pages = bytes.div_ceil(PAGE as usize);
        Err(pages.next_power_of_two().trailing_zeros() as usize)
    }
}

// SAFETY: pieces of a list have its size and are aligned to it; frames are aligned to 4 KiB, and no
// kernel type wants more. A piece is in a list or given out, never both.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() > PAGE as usize {
            return null_mut();
        }
        let class = match class(&layout) {
            Ok(class) => class,
            Err(order) => return frames_in_need(order).map_or(null_mut(), direct),
        };
        let is_empty = self.0.lock().0.get(class).is_some_and(|head| *head == 0);
        // Without the lock: what is given back was in pieces too.
        let fresh = if is_empty { frames_in_need(0) } else { None };
        let mut lists = self.0.lock();
        let Some(head) = lists.0.get_mut(class) else {
            return null_mut();
        };
        if let Some(frame) = fresh {
            let size = (SMALLEST << class) as u64;
            for at in (0..PAGE / size).map(|i| frame + i * size) {
                // SAFETY: a fresh frame, cut into pieces that each hold the address of the next.
                unsafe { direct(at).cast::<u64>().write(*head) };
                *head = at;
            }
        }
        if *head == 0 {
            return null_mut();
        }
        let piece = direct(*head);
        // SAFETY: a piece in the list holds the next one's address.
        *head = unsafe { piece.cast::<u64>().read() };
        piece
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let physical = frames::physical(pointer);
        match class(&layout) {
            Err(order) => frames::release(physical, order),
            Ok(class) => {
                let mut lists = self.0.lock();
                if let Some(head) = lists.0.get_mut(class) {
                    // SAFETY: the piece is nobody's any more and at least 16 bytes.
                    unsafe { pointer.cast::<u64>().write(*head) };
                    *head = physical;
                }
            }
        }
    }
}
