//! The vDSO: a page of data and a page of code that every program has, to tell the time without a
//! system call.

use alloc::sync::Arc;
use alloc::vec;

use appkernel_core::errno::Errno;
use appkernel_core::vdso;
use appkernel_core::vma::{Area, Backing, EXECUTE, READ};
use appkernel_hal::sync::Mutex;
use appkernel_hal::{PAGE, clock, frames, vdso as code};

use crate::fs::memory;
use crate::fs::node::Node;
use crate::mm::{LOWEST, Mapping, Mm};

/// The two pages as a file, under the names that /proc shows. Made for the first program.
static PAGES: Mutex<Option<[Arc<Mapping>; 2]>> = Mutex::new(None);

fn make() -> Option<[Arc<Mapping>; 2]> {
    let data = clock::shared_page()?;
    let image = vdso::image(code::code(), &code::FUNCTIONS)?;
    let frame = frames::allocate_user_unwritten()?;
    // SAFETY: the frame is new, and nobody else's.
    unsafe { frames::bytes(frame) }.copy_from_slice(image.get(..PAGE as usize)?);
    // The kernel has the page of data for ever.
    frames::share(data);
    let node = Node::Memory(memory::of_frames(vec![data, frame]));
    Some([&b"[vvar]"[..], b"[vdso]"].map(|name| Mapping::new(node.clone(), name.to_vec(), false)))
}

/// Maps both into a new program's memory; gives the address of the image. Without memory for them a
/// program has none, and asks the kernel.
///
/// # Errors
/// As `Mm::map`.
pub fn map(mm: &mut Mm) -> Result<Option<u64>, Errno> {
    let pages = {
        let mut pages = PAGES.lock();
        if pages.is_none() {
            *pages = make();
        }
        pages.clone()
    };
    let (Some(pages), Some(start)) = (pages, mm.areas.find_free(2 * PAGE, LOWEST, mm.mmap_top))
    else {
        return Ok(None);
    };
    for (page, (mapping, protection)) in (0..).zip(pages.into_iter().zip([READ, READ | EXECUTE])) {
        mm.map(Area {
            start: start + page * PAGE,
            end: start + (page + 1) * PAGE,
            protection,
            shared: false,
            backing: Backing::File(mapping, page * PAGE),
        })?;
    }
    Ok(Some(start + PAGE))
}
