//! Calls on memory.

use alloc::sync::Arc;

use appkernel_core::errno::Errno;
use appkernel_core::vma::{Area, Backing, EXECUTE, READ, WRITE};
use appkernel_hal::{PAGE, USER_END};

use super::{Call, Result};
use crate::fs::file::{Kind, flag};
use crate::mm::{Access, LOWEST, MMAP_TOP, Mm};

const SHARED: u32 = 1;
const PRIVATE: u32 = 2;
const FIXED: u32 = 0x10;
const ANONYMOUS: u32 = 0x20;
const FIXED_NOREPLACE: u32 = 0x10_0000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        9 => map(c),
        10 => protect(c),
        11 => unmap(c),
        12 => brk(c),
        28 => advise(c),
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
    if len == 0 {
        return Err(Errno::EINVAL);
    }
    let protection = protection(c.uint(2));
    let shared = match flags & 3 {
        SHARED | 3 => true,
        PRIVATE => false,
        _ => return Err(Errno::EINVAL),
    };
    let backing = if flags & ANONYMOUS != 0 {
        Backing::Zero
    } else {
        let file = c.task.file(c.int(4))?;
        if file.flags() & flag::ACCESS == flag::WRITE_ONLY || !c.arg(5).is_multiple_of(PAGE) {
            return Err(if !c.arg(5).is_multiple_of(PAGE) {
                Errno::EINVAL
            } else {
                Errno::EACCES
            });
        }
        c.arg(5).checked_add(len).ok_or(Errno::EOVERFLOW)?;
        match &file.kind {
            // Nothing writes changed pages back yet: refused rather than lost.
            Kind::Regular(..) if shared && protection & WRITE != 0 => return Err(Errno::ENODEV),
            Kind::Regular(node, _) => Backing::File(Arc::clone(node), c.arg(5)),
            Kind::Device(crate::fs::Device::Zero) => Backing::Zero,
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
                    .find_free(len, LOWEST, MMAP_TOP)
                    .ok_or(Errno::ENOMEM)?;
                (start, start + len)
            }
        }
    };
    let zero = matches!(backing, Backing::Zero);
    mm.map(Area {
        start,
        end,
        protection,
        shared,
        backing,
    })?;
    // Pages shared with children have to be there before these are: two processes that touch one
    // later would get one each.
    if shared && zero {
        fill(&mut mm, start, end, protection)?;
    }
    Ok(start)
}

fn fill(mm: &mut Mm, start: u64, end: u64, protection: u8) -> Result<()> {
    mm.areas.protect(start, end, READ | WRITE);
    let mut at = start;
    let mut result = Ok(());
    while at < end && result.is_ok() {
        result = mm.fault(at, Access::Write);
        at += PAGE;
    }
    if result.is_err() {
        mm.unmap(start, end)?;
        return result;
    }
    mm.protect(start, end, protection)
}

fn protect(c: &Call<'_>) -> Result {
    let (start, end) = range(c.arg(0), c.arg(1))?;
    let protection = protection(c.uint(2));
    let mm = c.task.mm();
    let mut mm = mm.lock();
    let lost = |a: &Area<_>| a.shared && matches!(a.backing, Backing::File(..));
    if protection & WRITE != 0 && mm.areas.within(start, end).any(lost) {
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
    match c.uint(2) {
        DONTNEED => {
            c.task.mm().lock().discard(start, end);
            Ok(0)
        }
        // Hints.
        0..=3 | 8 | 10..=21 => Ok(0),
        _ => Err(Errno::EINVAL),
    }
}
