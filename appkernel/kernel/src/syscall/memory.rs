//! Calls on memory.

use appkernel_core::errno::Errno;
use appkernel_core::vma::{Area, Backing, EXECUTE, READ, WRITE};
use appkernel_hal::{PAGE, USER_END};

use super::{Call, Result};
use crate::fs::dev::Device;
use crate::fs::file::{Kind, flag};
use crate::fs::fuse::Change;
use crate::fs::memory::{self, seal};
use crate::fs::node::Node;
use crate::mm::{KEPT_BACK, LOWEST, MMAP_TOP, Mapping, WIPED};
use crate::task::{self, limits::LOCKED};

const SHARED: u32 = 1;
const PRIVATE: u32 = 2;
/// O_RDWR
const READ_WRITE: u32 = 2;
const FIXED: u32 = 0x10;
const ANONYMOUS: u32 = 0x20;
const FIXED_NOREPLACE: u32 = 0x10_0000;
const LOCKED_NOW: u32 = 0x2000;
const POPULATE: u32 = 0x8000;
const NONBLOCK: u32 = 0x1_0000;
/// MAP_SHARED_VALIDATE: as MAP_SHARED, but with unknown flags refused. Those that Linux has for every
/// file: it has no MAP_SYNC for ours either.
const VALIDATED: u32 = 3;
const KNOWN: u32 = 0xfc17_f9f3;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        9 => map(c),
        10 => protect(c),
        11 => unmap(c),
        12 => brk(c),
        25 => remap(c),
        26 => sync(c),
        27 => resident(c),
        28 => advise(c),
        149 => lock(c, 0),
        325 => lock(c, c.uint(2)),
        150 => unlock(c),
        151 => lock_all(c),
        152 => {
            let mm = c.task.mm();
            let mut mm = mm.lock();
            mm.unlock(0, USER_END);
            mm.lock_future = false;
            Ok(0)
        }
        _ => return None,
    })
}

/// A range of whole pages that programs may have.
fn range(start: u64, len: u64) -> Result<(u64, u64)> {
    let len = len.checked_next_multiple_of(PAGE).ok_or(Errno::ENOMEM)?;
    let end = start
        .checked_add(len)
        .filter(|end| *end <= USER_END)
        .ok_or(Errno::ENOMEM)?;
    if !start.is_multiple_of(PAGE) {
        return Err(Errno::EINVAL);
    }
    Ok((start, end))
}

/// The pages that a range touches.
fn pages(start: u64, len: u64) -> Result<(u64, u64)> {
    let end = start.checked_add(len).ok_or(Errno::EINVAL)?;
    let end = end.checked_next_multiple_of(PAGE).ok_or(Errno::EINVAL)?;
    if end > USER_END {
        return Err(Errno::ENOMEM);
    }
    Ok((start & !(PAGE - 1), end))
}

/// Whether the caller may have so many bytes stay.
fn may_lock(c: &Call<'_>, bytes: u64) -> Result<()> {
    let limit = c.task.limits.lock().soft(LOCKED);
    if c.task.credentials.lock().is_root() || bytes <= limit {
        return Ok(());
    }
    Err(if limit == 0 {
        Errno::EPERM
    } else {
        Errno::ENOMEM
    })
}

/// mlock(2) and mlock2(2).
fn lock(c: &Call<'_>, flags: u32) -> Result {
    const ON_FAULT: u32 = 1;
    if flags & !ON_FAULT != 0 {
        return Err(Errno::EINVAL);
    }
    let (start, end) = pages(c.arg(0), c.arg(1))?;
    {
        let mm = c.task.mm();
        let mut mm = mm.lock();
        let more = (end - start).saturating_sub(mm.locked_bytes(start, end));
        may_lock(c, mm.locked_bytes(0, USER_END).saturating_add(more))?;
        if !mm.areas.covers(start, end) {
            return Err(Errno::ENOMEM);
        }
        mm.lock(start, end);
    }
    if flags & ON_FAULT == 0 {
        populate(c, start, end)?;
    }
    Ok(0)
}

/// Brings the pages of a range, in pieces, so that others run in between. They count for the container's
/// limit as if they were touched; where that is passed it ends, and the next page that is touched, or the
/// next call, finds it so.
fn populate(c: &Call<'_>, start: u64, end: u64) -> Result<()> {
    const PIECE: u64 = 256 * PAGE;
    let mm = c.task.mm();
    let mut at = start;
    while at < end && !c.task.container.charge.is_over() {
        let next = at.saturating_add(PIECE).min(end);
        let count = mm.lock().populate(at, next)?;
        c.task.container.charge.add(count);
        at = next;
        task::breathe()?;
    }
    Ok(())
}

fn unlock(c: &Call<'_>) -> Result {
    let (start, end) = pages(c.arg(0), c.arg(1))?;
    let mm = c.task.mm();
    let mut mm = mm.lock();
    if !mm.areas.covers(start, end) {
        return Err(Errno::ENOMEM);
    }
    mm.unlock(start, end);
    Ok(0)
}

/// mlockall(2).
fn lock_all(c: &Call<'_>) -> Result {
    const CURRENT: u32 = 1;
    const FUTURE: u32 = 2;
    const ON_FAULT: u32 = 4;
    let flags = c.uint(0);
    if flags & !(CURRENT | FUTURE | ON_FAULT) != 0 || flags & (CURRENT | FUTURE) == 0 {
        return Err(Errno::EINVAL);
    }
    let mm = c.task.mm();
    let mut mm = mm.lock();
    let all: alloc::vec::Vec<_> = mm.areas.iter().map(|a| (a.start, a.end)).collect();
    may_lock(c, all.iter().map(|(start, end)| end - start).sum())?;
    mm.lock_future = flags & FUTURE != 0;
    if flags & CURRENT != 0 {
        for (start, end) in all {
            mm.lock(start, end);
            // The stack and the heap come as they are touched: all of them now would be too much.
        }
    }
    Ok(0)
}

fn protection(bits: u32) -> u8 {
    let mut protection = 0;
    for (bit, ours) in [(1, READ), (2, WRITE), (4, EXECUTE)] {
        if bits & bit != 0 {
            protection |= ours;
        }
    }
    protection
}

fn map(c: &Call<'_>) -> Result {
    let (hint, len, flags) = (c.arg(0), c.arg(1), c.uint(3));
    if flags & ANONYMOUS == 0 {
        // As Linux, before anything else.
        c.task.used_file(c.int(4))?;
    }
    if len == 0 {
        return Err(Errno::EINVAL);
    }
    let protection = protection(c.uint(2));
    if flags & 3 == VALIDATED && flags & ANONYMOUS == 0 && flags & !KNOWN != 0 {
        return Err(Errno::EOPNOTSUPP);
    }
    let shared = match flags & 3 {
        SHARED | VALIDATED => true,
        PRIVATE => false,
        _ => return Err(Errno::EINVAL),
    };
    let backing = if flags & ANONYMOUS != 0 {
        if shared {
            anonymous(len)?
        } else {
            Backing::Zero
        }
    } else {
        let file = c.task.used_file(c.int(4))?;
        if file.flags() & flag::ACCESS == flag::WRITE_ONLY || !c.arg(5).is_multiple_of(PAGE) {
            return Err(if !c.arg(5).is_multiple_of(PAGE) {
                Errno::EINVAL
            } else {
                Errno::EACCES
            });
        }
        c.arg(5).checked_add(len).ok_or(Errno::EOVERFLOW)?;
        let writable = file.flags() & flag::ACCESS == READ_WRITE;
        match &file.kind {
            // Changes would go to the file: it must be open for that.
            Kind::Regular(..) if shared && protection & WRITE != 0 && !writable => {
                return Err(Errno::EACCES);
            }
            Kind::Regular(Node::Proc(_), _) => return Err(Errno::ENODEV),
            Kind::Regular(node, handle) => {
                let mut written = shared && writable && handle.is_some();
                if let Node::Memory(node) = node
                    && shared
                    && node.seals() & (seal::WRITE | seal::FUTURE_WRITE) != 0
                {
                    if protection & WRITE != 0 {
                        return Err(Errno::EPERM);
                    }
                    written = false;
                }
                let mapping = Mapping::new(node.clone(), file.path.clone(), written);
                Backing::File(mapping, c.arg(5))
            }
            Kind::Device(Device::Zero) if shared => anonymous(len)?,
            Kind::Device(Device::Zero) => Backing::Zero,
            _ => return Err(Errno::ENODEV),
        }
    };
    let mm = c.task.mm();
    let mut mm = mm.lock();
    let (start, end) = if flags & (FIXED | FIXED_NOREPLACE) != 0 {
        let (start, end) = range(hint, len)?;
        if start < LOWEST {
            return Err(Errno::EPERM);
        }
        if flags & FIXED_NOREPLACE != 0 && mm.areas.within(start, end).next().is_some() {
            return Err(Errno::EEXIST);
        }
        (start, end)
    } else {
        let len = len
            .checked_next_multiple_of(PAGE)
            .filter(|l| *l < USER_END)
            .ok_or(Errno::ENOMEM)?;
        let wanted = range(hint & !(PAGE - 1), len).ok();
        match wanted {
            Some((start, end))
                if start >= LOWEST && mm.areas.within(start, end).next().is_none() =>
            {
                (start, end)
            }
            _ => {
                let start = mm
                    .areas
                    .find_free(len, LOWEST, mm.mmap_top)
                    .ok_or(Errno::ENOMEM)?;
                (start, start + len)
            }
        }
    };
    if flags & LOCKED_NOW != 0 {
        let more = mm.locked_bytes(0, USER_END).saturating_add(end - start);
        may_lock(c, more).map_err(|_| Errno::EAGAIN)?;
    }
    mm.map(Area {
        start,
        end,
        protection,
        shared,
        backing,
    })?;
    if flags & LOCKED_NOW != 0 {
        mm.lock(start, end);
    }
    drop(mm);
    if flags & LOCKED_NOW != 0 || flags & (POPULATE | NONBLOCK) == POPULATE {
        // What cannot come now comes when it is touched.
        let _ = populate(c, start, end);
    }
    Ok(start)
}

/// Memory that children share: a file without a name.
fn anonymous(len: u64) -> Result<Backing<alloc::sync::Arc<Mapping>>> {
    let node = memory::anonymous(crate::fs::node::Owner::default());
    let size = Some(len.checked_next_multiple_of(PAGE).ok_or(Errno::ENOMEM)?);
    node.change(&Change {
        size,
        ..Change::default()
    })
    .map_err(|_| Errno::ENOMEM)?;
    let mapping = Mapping::new(Node::Memory(node), b"/dev/zero (deleted)".to_vec(), true);
    Ok(Backing::File(mapping, 0))
}

fn protect(c: &Call<'_>) -> Result {
    let (start, end) = range(c.arg(0), c.arg(1))?;
    let protection = protection(c.uint(2));
    let mm = c.task.mm();
    let mut mm = mm.lock();
    let refused = |a: &Area<alloc::sync::Arc<Mapping>>| match &a.backing {
        Backing::File(file, _) => a.shared && !file.is_shared(),
        Backing::Zero => false,
    };
    if protection & WRITE != 0 && mm.areas.within(start, end).any(refused) {
        return Err(Errno::EACCES);
    }
    mm.protect(start, end, protection)?;
    Ok(0)
}

fn unmap(c: &Call<'_>) -> Result {
    let (start, end) = range(c.arg(0), c.arg(1)).map_err(|_| Errno::EINVAL)?;
    if start == end {
        return Err(Errno::EINVAL);
    }
    c.task.mm().lock().unmap(start, end)?;
    Ok(0)
}

/// mremap(2).
fn remap(c: &Call<'_>) -> Result {
    const MAY_MOVE: u32 = 1;
    const FIXED: u32 = 2;
    let (old, old_end) = range(c.arg(0), c.arg(1)).map_err(|_| Errno::EINVAL)?;
    let (_, new_len) = range(0, c.arg(2)).map_err(|_| Errno::EINVAL)?;
    let flags = c.uint(3);
    if new_len == 0 || old == old_end || flags & !(MAY_MOVE | FIXED) != 0 {
        return Err(Errno::EINVAL);
    }
    let mm = c.task.mm();
    let mut mm = mm.lock();
    let area = mm.areas.find(old).cloned().ok_or(Errno::EFAULT)?;
    if old_end > area.end {
        return Err(Errno::EFAULT);
    }
    let old_len = old_end - old;
    if flags & FIXED == 0 {
        if new_len <= old_len {
            if new_len < old_len {
                mm.unmap(old + new_len, old_end)?;
            }
            return Ok(old);
        }
        let end = old.checked_add(new_len).filter(|e| *e <= USER_END);
        if old_end == area.end
            && let Some(end) = end
            && mm.areas.within(old_end, end).next().is_none()
        {
            let grown = Area { end, ..area };
            // The area itself stays as it is, with its pages; only what follows it is new.
            mm.areas.insert(grown);
            return Ok(old);
        }
        if flags & MAY_MOVE == 0 {
            return Err(Errno::ENOMEM);
        }
    }
    let new = if flags & FIXED != 0 {
        let (new, new_end) = range(c.arg(4), new_len).map_err(|_| Errno::EINVAL)?;
        if flags & MAY_MOVE == 0 || new < LOWEST || new < old_end && old < new_end {
            return Err(Errno::EINVAL);
        }
        new
    } else {
        mm.areas
            .find_free(new_len, LOWEST, mm.mmap_top)
            .ok_or(Errno::ENOMEM)?
    };
    let backing = match &area.backing {
        Backing::Zero => Backing::Zero,
        Backing::File(file, offset) => {
            Backing::File(alloc::sync::Arc::clone(file), offset + (old - area.start))
        }
    };
    mm.map(Area {
        start: new,
        end: new + new_len,
        backing,
        ..area
    })?;
    mm.move_pages(old, new, old_len.min(new_len))?;
    mm.unmap(old, old_end)?;
    Ok(new)
}

/// msync(2): files that are mapped shared are written now.
fn sync(c: &Call<'_>) -> Result {
    const ASYNC: u32 = 1;
    const INVALIDATE: u32 = 2;
    const SYNC: u32 = 4;
    let flags = c.uint(2);
    if flags & !(ASYNC | INVALIDATE | SYNC) != 0 || flags & (ASYNC | SYNC) == ASYNC | SYNC {
        return Err(Errno::EINVAL);
    }
    let (start, end) = range(c.arg(0), c.arg(1))?;
    let mm = c.task.mm();
    let mut mm = mm.lock();
    if !mm.areas.covers(start, end) {
        return Err(Errno::ENOMEM);
    }
    if flags & INVALIDATE != 0 && mm.locked_bytes(start, end) > 0 {
        return Err(Errno::EBUSY);
    }
    mm.write_back(start, end)?;
    Ok(0)
}

/// mincore(2).
fn resident(c: &Call<'_>) -> Result {
    let (start, end) = range(c.arg(0), c.arg(1))?;
    if !c.task.mm().lock().areas.covers(start, end) {
        return Err(Errno::ENOMEM);
    }
    let pages = (end - start) / PAGE;
    let mut done = 0;
    while done < pages {
        let mut piece = [0; 512];
        let count = (pages - done).min(512);
        {
            let mm = c.task.mm();
            let mut mm = mm.lock();
            for (i, there) in (0..count).zip(&mut piece) {
                *there = mm.is_resident(start + (done + i) * PAGE).into();
            }
        }
        let piece = piece.get(..count as usize).unwrap_or_default();
        super::put(c.arg(2).wrapping_add(done), piece)?;
        done += count;
        task::breathe()?;
    }
    Ok(0)
}

fn brk(c: &Call<'_>) -> Result {
    let wanted = c.arg(0);
    let mm = c.task.mm();
    let mut mm = mm.lock();
    if wanted < mm.brk_start || wanted > MMAP_TOP {
        return Ok(mm.brk);
    }
    let (old, new) = (mm.brk.next_multiple_of(PAGE), wanted.next_multiple_of(PAGE));
    if new > old {
        if mm.areas.within(old, new).next().is_some() {
            return Ok(mm.brk);
        }
        let area = Area {
            start: old,
            end: new,
            protection: READ | WRITE,
            shared: false,
            backing: Backing::Zero,
        };
        if mm.map(area).is_err() {
            return Ok(mm.brk);
        }
    } else if new < old && mm.unmap(new, old).is_err() {
        return Ok(mm.brk);
    }
    mm.brk = wanted;
    Ok(wanted)
}

fn advise(c: &Call<'_>) -> Result {
    const DONTNEED: u32 = 4;
    let (start, end) = range(c.arg(0), c.arg(1))?;
    // MADV_POPULATE_READ, MADV_POPULATE_WRITE.
    if matches!(c.uint(2), 22 | 23) {
        if !c.task.mm().lock().areas.covers(start, end) {
            return Err(Errno::ENOMEM);
        }
        return populate(c, start, end).map(|()| 0);
    }
    let mm = c.task.mm();
    let mut mm = mm.lock();
    match c.uint(2) {
        DONTNEED if mm.locked_bytes(start, end) > 0 => return Err(Errno::EINVAL),
        DONTNEED => mm.discard(start, end),
        // MADV_DONTFORK, MADV_WIPEONFORK, and their opposites: programs rely on these for their secrets.
        10 => mm.set_at_fork(start, end, KEPT_BACK)?,
        18 => mm.set_at_fork(start, end, WIPED)?,
        11 | 19 => mm.set_at_fork(start, end, 0)?,
        // MADV_FREE is a hint, but for memory of the process's own.
        8 => {
            let own = |a: &Area<_>| !a.shared && matches!(a.backing, Backing::Zero);
            if !mm.areas.within(start, end).all(own) {
                return Err(Errno::EINVAL);
            }
        }
        // Hints.
        0..=3 | 12..=17 | 20..=21 => {}
        _ => return Err(Errno::EINVAL),
    }
    // Said last: what is mapped follows the advice.
    if !mm.areas.covers(start, end) {
        return Err(Errno::ENOMEM);
    }
    Ok(0)
}
