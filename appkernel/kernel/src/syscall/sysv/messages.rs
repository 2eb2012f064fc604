//! Queues of messages.

use alloc::vec;

use appkernel_core::errno::Errno;
use appkernel_core::sysv::{
    self, Caller, MAX_OBJECTS, MESSAGE_MAX, NOWAIT, QUEUE_BYTES, Queue, Wanted,
};
use appkernel_hal::frames;

use super::{INFO, Ipc, RMID, Record, SET, STAT, caller, readable, wanted_owner};
use crate::container::visible;
use crate::syscall::{Call, Result, get_u64, put};
use crate::task;

pub(super) fn msgget(c: &Call<'_>) -> Result {
    let caller = caller(c);
    let make = || Ok(Queue::new(caller.now));
    let mut ipc = c.task.container.ipc.lock();
    let id = ipc
        .queues
        .get(c.int(0), c.uint(1), &caller, |_| Ok(()), make)?;
    Ok(id.cast_unsigned().into())
}

/// A queue's entry that the caller may use as `wanted`; removed ones are noticed by who waits.
fn queue<'a>(ipc: &'a mut Ipc, id: i32, wanted: u32, caller: &Caller) -> Result<&'a mut Queue> {
    let entry = ipc.queues.find(id)?;
    if !entry.owner.may(caller, wanted) {
        return Err(Errno::EACCES);
    }
    Ok(&mut entry.it)
}

pub(super) fn msgsnd(c: &Call<'_>) -> Result {
    let (id, from, len, flags) = (c.int(0), c.arg(1), c.arg(2), c.uint(3));
    let len = usize::try_from(len).ok().filter(|len| *len <= MESSAGE_MAX);
    let len = len.filter(|_| id >= 0).ok_or(Errno::EINVAL)?;
    let kind = get_u64(from)?.cast_signed();
    if kind < 1 {
        return Err(Errno::EINVAL);
    }
    // What waits in queues is the kernel's memory.
    if frames::is_scarce() {
        return Err(Errno::ENOMEM);
    }
    let mut text = vec![0; len];
    appkernel_hal::usercopy::read(&mut text, from.wrapping_add(8)).map_err(|_| Errno::EFAULT)?;
    let caller = caller(c);
    let container = &c.task.container;
    let attempt = |ipc: &mut Ipc| -> Result<bool> {
        Ok(queue(ipc, id, 2, &caller)?.send(kind, &text, &caller))
    };
    if !attempt(&mut container.ipc.lock())? {
        if flags & NOWAIT != 0 {
            return Err(Errno::EAGAIN);
        }
        task::wait_for(task::OBJECTS, || match attempt(&mut container.ipc.lock()) {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(Errno::EINVAL) => Some(Err(Errno::EIDRM)),
            Err(e) => Some(Err(e)),
        })??;
    }
    task::wake(task::OBJECTS);
    Ok(0)
}

pub(super) fn msgrcv(c: &Call<'_>) -> Result {
    const NOERROR: u32 = 0o10_000;
    const EXCEPT: u32 = 0o20_000;
    const COPY: u32 = 0o40_000;
    let (id, to, room, flags) = (c.int(0), c.arg(1), c.arg(2), c.uint(4));
    if id < 0 || room > i64::MAX.cast_unsigned() {
        return Err(Errno::EINVAL);
    }
    let wanted = Wanted {
        kind: c.arg(3).cast_signed(),
        except: flags & EXCEPT != 0,
        copy: flags & COPY != 0,
    };
    if wanted.copy && (wanted.except || flags & NOWAIT == 0) {
        return Err(Errno::EINVAL);
    }
    let room = room.min(MESSAGE_MAX as u64) as usize;
    let caller = caller(c);
    let container = &c.task.container;
    let attempt = |ipc: &mut Ipc| {
        queue(ipc, id, 4, &caller)?.receive(wanted, room, flags & NOERROR != 0, &caller)
    };
    let first = attempt(&mut container.ipc.lock())?;
    let (kind, text) = match first {
        Some(message) => message,
        None if flags & NOWAIT != 0 => return Err(Errno::ENOMSG),
        None => task::wait_for(task::OBJECTS, || match attempt(&mut container.ipc.lock()) {
            Ok(message) => message.map(Ok),
            Err(Errno::EINVAL) => Some(Err(Errno::EIDRM)),
            Err(e) => Some(Err(e)),
        })??,
    };
    task::wake(task::OBJECTS);
    put(to, &kind.to_le_bytes())?;
    put(to.wrapping_add(8), &text)?;
    Ok(text.len() as u64)
}

pub(super) fn msgctl(c: &Call<'_>) -> Result {
    const STAT_PLACE: u32 = 11;
    const USED: u32 = 12;
    const STAT_ANY: u32 = 13;
    let (id, command, to) = (c.int(0), c.uint(1), c.arg(2));
    let caller = caller(c);
    let mut ipc = c.task.container.ipc.lock();
    match command {
        INFO | USED => {
            let of = |limit: usize, used: usize| if command == INFO { limit } else { used } as u32;
            let messages: usize = ipc.queues.iter().map(|(_, e)| e.it.len()).sum();
            let bytes: usize = ipc.queues.iter().map(|(_, e)| e.it.bytes).sum();
            let record = Record::new(32)
                .int(0, of(MAX_OBJECTS * QUEUE_BYTES / 1024, ipc.queues.count()))
                .int(4, of(QUEUE_BYTES, messages))
                .int(8, MESSAGE_MAX as u32)
                .int(12, QUEUE_BYTES as u32)
                .int(16, MAX_OBJECTS as u32)
                .int(20, 16)
                .int(24, of(QUEUE_BYTES, bytes))
                .int(28, 0xffff);
            put(to, &record.0)?;
            Ok(ipc.queues.highest() as u64)
        }
        STAT | STAT_PLACE | STAT_ANY => {
            let (found, entry) = readable(
                &mut ipc.queues,
                id,
                command != STAT,
                command == STAT_ANY,
                &caller,
            )?;
            let q = &entry.it;
            let record = Record::new(120)
                .owner(&entry.owner, 0)
                .long(48, q.times[0])
                .long(56, q.times[1])
                .long(64, q.times[2])
                .long(72, q.bytes as u64)
                .long(80, q.len() as u64)
                .long(88, q.most as u64)
                .int(96, visible(q.processes[0]))
                .int(100, visible(q.processes[1]));
            put(to, &record.0)?;
            Ok(if command == STAT {
                0
            } else {
                found.cast_unsigned().into()
            })
        }
        SET => {
            let (uid, gid, mode) = wanted_owner(to)?;
            let most = get_u64(to.wrapping_add(88))?;
            let entry = ipc.queues.find(id)?;
            if most > QUEUE_BYTES as u64 && !caller.root {
                return Err(Errno::EPERM);
            }
            // A queue is the kernel's memory, also root's.
            let most = most.min(16 * QUEUE_BYTES as u64);
            sysv::set_owner(&mut entry.owner, &caller, uid, gid, mode)?;
            entry.it.most = most as usize;
            entry.it.times[2] = caller.now;
            drop(ipc);
            task::wake(task::OBJECTS);
            Ok(0)
        }
        RMID => {
            if !ipc.queues.find(id)?.owner.owns(&caller) {
                return Err(Errno::EPERM);
            }
            ipc.queues.remove(id)?;
            drop(ipc);
            task::wake(task::OBJECTS);
            Ok(0)
        }
        _ => Err(Errno::EINVAL),
    }
}
