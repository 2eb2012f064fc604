//! Pieces of memory that processes share.

use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::sysv::{self, MAX_OBJECTS};
use appkernel_core::vma::{Area, Backing, EXECUTE, READ, WRITE};
use appkernel_hal::{PAGE, frames};

use super::{INFO, RMID, Record, SET, STAT, Segment, caller, readable, sweep, wanted_owner};
use crate::container::visible;
use crate::fs::fuse::Change;
use crate::fs::memory;
use crate::fs::node::Node;
use crate::mm::{LOWEST, MMAP_TOP, Mapping};
use crate::syscall::{Call, Result, put};

pub(super) fn shmget(c: &Call<'_>) -> Result {
    const LARGEST: u64 = 1 << 40;
    let (key, bytes, flags) = (c.int(0), c.arg(1), c.uint(2));
    let caller = caller(c);
    let fits = |s: &Segment| {
        if bytes > s.bytes {
            return Err(Errno::EINVAL);
        }
        Ok(())
    };
    let make = || {
        if bytes == 0 || bytes > LARGEST {
            return Err(Errno::EINVAL);
        }
        let (total, _) = frames::statistics();
        if bytes.div_ceil(PAGE) > total as u64 {
            return Err(Errno::ENOMEM);
        }
        // Huge pages are not there, as on a machine that has none set aside.
        if flags & 0o4000 != 0 {
            return Err(Errno::ENOMEM);
        }
        let node = memory::anonymous(crate::fs::node::Owner::default());
        node.change(&Change {
            size: Some(bytes.next_multiple_of(PAGE)),
            ..Change::default()
        })?;
        Ok(Segment {
            node,
            bytes,
            times: [0, 0, caller.now],
            processes: [caller.process, 0],
            mappings: Vec::new(),
            removed: false,
        })
    };
    let mut ipc = c.task.container.ipc.lock();
    sweep(&mut ipc);
    let id = ipc.shared.get(key, flags, &caller, fits, make)?;
    Ok(id.cast_unsigned().into())
}

pub(super) fn shmat(c: &Call<'_>) -> Result {
    const READ_ONLY: u32 = 0o10_000;
    const ROUND: u32 = 0o20_000;
    const REMAP: u32 = 0o40_000;
    const EXEC: u32 = 0o100_000;
    let (id, mut at, flags) = (c.int(0), c.arg(1), c.uint(2));
    let caller = caller(c);
    let (mapping, bytes) = {
        let mut ipc = c.task.container.ipc.lock();
        sweep(&mut ipc);
        let entry = ipc.shared.find(id)?;
        let wanted = if flags & READ_ONLY != 0 { 4 } else { 6 };
        if !entry.owner.may(&caller, wanted) {
            return Err(Errno::EACCES);
        }
        let path = format!("/SYSV{:08x} (deleted)", entry.owner.key).into_bytes();
        let node = Node::Memory(Arc::clone(&entry.it.node));
        (Mapping::new(node, path, true), entry.it.bytes)
    };
    let len = bytes.next_multiple_of(PAGE);
    if at != 0 && !at.is_multiple_of(PAGE) {
        if flags & ROUND == 0 {
            return Err(Errno::EINVAL);
        }
        at &= !(PAGE - 1);
    }
    let mut protection = READ;
    if flags & READ_ONLY == 0 {
        protection |= WRITE;
    }
    if flags & EXEC != 0 {
        protection |= EXECUTE;
    }
    let mm = c.task.mm();
    let start = {
        let mut mm = mm.lock();
        let start = if at == 0 {
            if flags & REMAP != 0 {
                return Err(Errno::EINVAL);
            }
            mm.areas
                .find_free(len, LOWEST, mm.mmap_top)
                .ok_or(Errno::ENOMEM)?
        } else {
            let end = at.checked_add(len).filter(|end| *end <= MMAP_TOP);
            let end = end.filter(|_| at >= LOWEST).ok_or(Errno::EINVAL)?;
            if flags & REMAP == 0 && mm.areas.within(at, end).next().is_some() {
                return Err(Errno::EINVAL);
            }
            at
        };
        mm.map(Area {
            start,
            end: start + len,
            protection,
            shared: true,
            backing: Backing::File(Arc::clone(&mapping), 0),
        })?;
        start
    };
    let mut ipc = c.task.container.ipc.lock();
    let segment = &mut ipc.shared.find(id)?.it;
    segment.mappings.retain(|m| m.strong_count() > 0);
    segment.mappings.push(Arc::downgrade(&mapping));
    segment.times[0] = caller.now;
    segment.processes[1] = caller.process;
    Ok(start)
}

pub(super) fn shmdt(c: &Call<'_>) -> Result {
    let at = c.arg(0);
    let caller = caller(c);
    let mm = c.task.mm();
    let mut mm = mm.lock();
    let area = mm.areas.find(at).cloned().filter(|a| a.start == at);
    let area = area.ok_or(Errno::EINVAL)?;
    let Backing::File(mapping, 0) = &area.backing else {
        return Err(Errno::EINVAL);
    };
    let mut ipc = c.task.container.ipc.lock();
    let id = ipc.shared.iter().find_map(|(id, e)| {
        let mut known = e.it.mappings.iter();
        known
            .any(|m| core::ptr::eq(m.as_ptr(), Arc::as_ptr(mapping)))
            .then_some(id)
    });
    let id = id.ok_or(Errno::EINVAL)?;
    let segment = &mut ipc.shared.find(id)?.it;
    segment.times[1] = caller.now;
    segment.processes[1] = caller.process;
    let end = at.saturating_add(segment.bytes.next_multiple_of(PAGE));
    drop(area);
    mm.unmap(at, end)?;
    drop(mm);
    sweep(&mut ipc);
    Ok(0)
}

pub(super) fn shmctl(c: &Call<'_>) -> Result {
    const LOCK: u32 = 11;
    const UNLOCK: u32 = 12;
    const STAT_PLACE: u32 = 13;
    const USED: u32 = 14;
    const STAT_ANY: u32 = 15;
    let (id, command, to) = (c.int(0), c.uint(1), c.arg(2));
    let caller = caller(c);
    let mut ipc = c.task.container.ipc.lock();
    sweep(&mut ipc);
    match command {
        INFO => {
            let record = Record::new(72)
                .long(0, u64::MAX - (1 << 24))
                .long(8, 1)
                .long(16, MAX_OBJECTS as u64)
                .long(24, MAX_OBJECTS as u64)
                .long(32, u64::MAX - (1 << 24));
            put(to, &record.0)?;
            Ok(ipc.shared.highest() as u64)
        }
        USED => {
            let pages: u64 = ipc
                .shared
                .iter()
                .map(|(_, e)| e.it.bytes.div_ceil(PAGE))
                .sum();
            let there: u64 = ipc
                .shared
                .iter()
                .map(|(_, e)| e.it.node.attributes().blocks / 8)
                .sum();
            let record = Record::new(48)
                .int(0, ipc.shared.count() as u32)
                .long(8, pages)
                .long(16, there);
            put(to, &record.0)?;
            Ok(ipc.shared.highest() as u64)
        }
        STAT | STAT_PLACE | STAT_ANY => {
            const DEST: u32 = 0o1000;
            let (found, entry) = readable(
                &mut ipc.shared,
                id,
                command != STAT,
                command == STAT_ANY,
                &caller,
            )?;
            let s = &entry.it;
            let record = Record::new(112)
                .owner(&entry.owner, if s.removed { DEST } else { 0 })
                .long(48, s.bytes)
                .long(56, s.times[0])
                .long(64, s.times[1])
                .long(72, s.times[2])
                .int(80, visible(s.processes[0]))
                .int(84, visible(s.processes[1]))
                .long(88, s.attached() as u64);
            put(to, &record.0)?;
            Ok(if command == STAT {
                0
            } else {
                found.cast_unsigned().into()
            })
        }
        SET => {
            let (uid, gid, mode) = wanted_owner(to)?;
            let entry = ipc.shared.find(id)?;
            sysv::set_owner(&mut entry.owner, &caller, uid, gid, mode)?;
            entry.it.times[2] = caller.now;
            Ok(0)
        }
        RMID => {
            let entry = ipc.shared.find(id)?;
            if !entry.owner.owns(&caller) {
                return Err(Errno::EPERM);
            }
            entry.it.removed = true;
            entry.owner.key = sysv::PRIVATE;
            sweep(&mut ipc);
            Ok(0)
        }
        LOCK | UNLOCK => {
            let entry = ipc.shared.find(id)?;
            if !entry.owner.owns(&caller) {
                return Err(Errno::EPERM);
            }
            // Nothing is ever swapped out.
            const LOCKED: u32 = 0o2000;
            entry.owner.mode = if command == LOCK {
                entry.owner.mode | LOCKED
            } else {
                entry.owner.mode & !LOCKED
            };
            Ok(0)
        }
        _ => Err(Errno::EINVAL),
    }
}
