//! Sets of semaphores.

use alloc::vec;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::sysv::{
    self, Blocked, MAX_OBJECTS, NOWAIT, OPERATIONS_MAX, Operation, SEMAPHORES_MAX, Set, VALUE_MAX,
};
use appkernel_hal::clock;

use super::{INFO, RMID, Record, SET, STAT, caller, readable, wanted_owner};
use crate::container::visible;
use crate::syscall::{Call, Result, get, get_timespec, put};
use crate::task;

pub(super) fn semget(c: &Call<'_>) -> Result {
    let (key, count, flags) = (c.int(0), c.int(1), c.uint(2));
    let caller = caller(c);
    let count = usize::try_from(count).map_err(|_| Errno::EINVAL)?;
    if count > SEMAPHORES_MAX {
        return Err(Errno::EINVAL);
    }
    let fits = |s: &Set| {
        if count > s.all.len() {
            return Err(Errno::EINVAL);
        }
        Ok(())
    };
    let make = || Set::new(count, caller.now);
    let mut ipc = c.task.container.ipc.lock();
    let id = ipc.sets.get(key, flags, &caller, fits, make)?;
    Ok(id.cast_unsigned().into())
}

pub(super) fn semop(c: &Call<'_>, timeout: u64) -> Result {
    let (id, count) = (c.int(0), c.arg(2) & 0xffff_ffff);
    if count == 0 || id < 0 {
        return Err(Errno::EINVAL);
    }
    if count > OPERATIONS_MAX as u64 {
        return Err(Errno::E2BIG);
    }
    let mut operations = Vec::new();
    for i in 0..count {
        let [a, b, d, e, f, g] = get::<6>(c.arg(1).wrapping_add(i * 6))?;
        let flags = u16::from_le_bytes([f, g]);
        operations.push(Operation {
            number: u16::from_le_bytes([a, b]),
            add: i16::from_le_bytes([d, e]),
            nowait: u32::from(flags) & NOWAIT != 0,
            undo: flags & 0x1000 != 0,
        });
    }
    let deadline = match timeout {
        0 => None,
        at => Some(clock::monotonic_ns().saturating_add(get_timespec(at)?)),
    };
    let caller = caller(c);
    let wanted = if operations.iter().all(|o| o.add == 0) {
        4
    } else {
        2
    };
    let container = &c.task.container;
    let first = {
        let mut ipc = container.ipc.lock();
        let entry = ipc.sets.find(id)?;
        if operations
            .iter()
            .any(|o| usize::from(o.number) >= entry.it.all.len())
        {
            return Err(Errno::EFBIG);
        }
        if !entry.owner.may(&caller, wanted) {
            return Err(Errno::EACCES);
        }
        entry.it.operate(&operations, &caller)
    };
    let blocked = match first {
        Ok(()) => {
            task::wake(task::OBJECTS);
            return Ok(0);
        }
        Err(Blocked::Failed(e)) => return Err(e),
        Err(blocked) => blocked,
    };
    // How many wait is what programs can ask for.
    let count_waiting = |by: i32| {
        let mut ipc = container.ipc.lock();
        let Ok(entry) = ipc.sets.find(id) else { return };
        let (Blocked::Grow(number) | Blocked::Zero(number)) = blocked else {
            return;
        };
        if let Some(semaphore) = entry.it.all.get_mut(usize::from(number)) {
            let counter = match blocked {
                Blocked::Zero(_) => &mut semaphore.waiting_zero,
                _ => &mut semaphore.waiting,
            };
            *counter = counter.saturating_add_signed(by);
        }
    };
    count_waiting(1);
    let attempt = || {
        let mut ipc = container.ipc.lock();
        let Ok(entry) = ipc.sets.find(id) else {
            return Some(Err(Errno::EIDRM));
        };
        match entry.it.operate(&operations, &caller) {
            Ok(()) => Some(Ok(())),
            Err(Blocked::Failed(e)) => Some(Err(e)),
            Err(_) => None,
        }
    };
    let result = task::wait_until(task::OBJECTS, deadline, attempt);
    count_waiting(-1);
    match result {
        Err(Errno::ETIMEDOUT) => Err(Errno::EAGAIN),
        other => {
            other??;
            task::wake(task::OBJECTS);
            Ok(0)
        }
    }
}

pub(super) fn semctl(c: &Call<'_>) -> Result {
    const GETPID: u32 = 11;
    const GETVAL: u32 = 12;
    const GETALL: u32 = 13;
    const GETNCNT: u32 = 14;
    const GETZCNT: u32 = 15;
    const SETVAL: u32 = 16;
    const SETALL: u32 = 17;
    const STAT_PLACE: u32 = 18;
    const USED: u32 = 19;
    const STAT_ANY: u32 = 20;
    let (id, number, command, to) = (c.int(0), c.int(1), c.uint(2), c.arg(3));
    let caller = caller(c);
    let mut ipc = c.task.container.ipc.lock();
    match command {
        INFO | USED => {
            let of = |limit: usize, used: usize| if command == INFO { limit } else { used } as u32;
            let all: usize = ipc.sets.iter().map(|(_, e)| e.it.all.len()).sum();
            let most = MAX_OBJECTS * SEMAPHORES_MAX;
            let record = Record::new(40)
                .int(0, most as u32)
                .int(4, MAX_OBJECTS as u32)
                .int(8, most as u32)
                .int(12, most as u32)
                .int(16, SEMAPHORES_MAX as u32)
                .int(20, OPERATIONS_MAX as u32)
                .int(24, OPERATIONS_MAX as u32)
                .int(28, of(20, ipc.sets.count()))
                .int(32, VALUE_MAX as u32)
                .int(36, of(VALUE_MAX as usize, all));
            put(to, &record.0)?;
            Ok(ipc.sets.highest() as u64)
        }
        STAT | STAT_PLACE | STAT_ANY => {
            let (found, entry) = readable(
                &mut ipc.sets,
                id,
                command != STAT,
                command == STAT_ANY,
                &caller,
            )?;
            let record = Record::new(104)
                .owner(&entry.owner, 0)
                .long(48, entry.it.op_time)
                .long(64, entry.it.change_time)
                .long(80, entry.it.all.len() as u64);
            put(to, &record.0)?;
            Ok(if command == STAT {
                0
            } else {
                found.cast_unsigned().into()
            })
        }
        SET => {
            let (uid, gid, mode) = wanted_owner(to)?;
            let entry = ipc.sets.find(id)?;
            sysv::set_owner(&mut entry.owner, &caller, uid, gid, mode)?;
            entry.it.change_time = caller.now;
            Ok(0)
        }
        RMID => {
            if !ipc.sets.find(id)?.owner.owns(&caller) {
                return Err(Errno::EPERM);
            }
            ipc.sets.remove(id)?;
            drop(ipc);
            task::wake(task::OBJECTS);
            Ok(0)
        }
        GETALL | GETPID | GETVAL | GETNCNT | GETZCNT => {
            let entry = ipc.sets.find(id)?;
            if !entry.owner.may(&caller, 4) {
                return Err(Errno::EACCES);
            }
            if command == GETALL {
                let values = entry.it.all.iter();
                let bytes: Vec<u8> = values
                    .flat_map(|s| (s.value as u16).to_le_bytes())
                    .collect();
                put(to, &bytes)?;
                return Ok(0);
            }
            let at = usize::try_from(number).map_err(|_| Errno::EINVAL)?;
            let semaphore = entry.it.all.get(at).ok_or(Errno::EINVAL)?;
            Ok(match command {
                GETPID => visible(semaphore.process).into(),
                GETVAL => semaphore.value as u64,
                GETNCNT => semaphore.waiting.into(),
                _ => semaphore.waiting_zero.into(),
            })
        }
        SETVAL | SETALL => {
            let entry = ipc.sets.find(id)?;
            let count = entry.it.all.len();
            let at = usize::try_from(number).unwrap_or(usize::MAX);
            if command == SETVAL && at >= count {
                return Err(Errno::EINVAL);
            }
            if !entry.owner.may(&caller, 2) {
                return Err(Errno::EACCES);
            }
            let (first, values) = if command == SETVAL {
                (at, vec![to as i32])
            } else {
                let mut bytes = vec![0; count * 2];
                appkernel_hal::usercopy::read(&mut bytes, to).map_err(|_| Errno::EFAULT)?;
                let values = bytes.chunks_exact(2).map(|b| match b {
                    [a, b] => u16::from_le_bytes([*a, *b]).into(),
                    _ => 0,
                });
                (0, values.collect())
            };
            if values.iter().any(|v| !(0..=VALUE_MAX).contains(v)) {
                return Err(Errno::ERANGE);
            }
            for (i, value) in values.into_iter().enumerate() {
                if let Some(semaphore) = entry.it.all.get_mut(first + i) {
                    semaphore.value = value;
                    semaphore.process = caller.process;
                }
                entry.it.undo.retain(|u| usize::from(u.1) != first + i);
            }
            entry.it.change_time = caller.now;
            drop(ipc);
            task::wake(task::OBJECTS);
            Ok(0)
        }
        _ => Err(Errno::EINVAL),
    }
}
