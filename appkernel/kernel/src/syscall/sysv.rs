//! System V shared memory, semaphores and messages, per container.

use alloc::format;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write;

use appkernel_core::errno::Errno;
use appkernel_core::sysv::{
    self, Blocked, Caller, Entry, MAX_OBJECTS, MESSAGE_MAX, NOWAIT, OPERATIONS_MAX, Operation,
    Owner, QUEUE_BYTES, Queue, SEMAPHORES_MAX, Set, Table, VALUE_MAX, Wanted,
};
use appkernel_core::vma::{Area, Backing, EXECUTE, READ, WRITE};
use appkernel_hal::{PAGE, clock, frames};

use super::{Call, Result, get, get_u64, put};
use crate::container::visible;
use crate::fs::fuse::Change;
use crate::fs::memory;
use crate::fs::node::Node;
use crate::mm::{LOWEST, MMAP_TOP, Mapping};
use crate::task;

const RMID: u32 = 0;
const SET: u32 = 1;
const STAT: u32 = 2;
const INFO: u32 = 3;

/// A piece of shared memory.
pub struct Segment {
    node: Arc<memory::Node>,
    bytes: u64,
    /// Attach, detach and change.
    times: [u64; 3],
    /// Who made it; who attached or detached last.
    processes: [u32; 2],
    /// Where it is mapped.
    mappings: Vec<Weak<Mapping>>,
    /// Goes with its last mapping.
    removed: bool,
}

impl Segment {
    fn attached(&self) -> usize {
        self.mappings.iter().map(Weak::strong_count).sum()
    }
}

/// The objects of a container.
#[derive(Default)]
pub struct Ipc {
    shared: Table<Segment>,
    sets: Table<Set>,
    queues: Table<Queue>,
}

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        29 => shmget(c),
        30 => shmat(c),
        31 => shmctl(c),
        64 => semget(c),
        65 => semop(c, 0),
        66 => semctl(c),
        67 => shmdt(c),
        68 => msgget(c),
        69 => msgsnd(c),
        70 => msgrcv(c),
        71 => msgctl(c),
        220 => semop(c, c.arg(3)),
        _ => return None,
    })
}

fn caller(c: &Call<'_>) -> Caller {
    let own = c.task.credentials.lock().clone();
    Caller {
        root: own.is_root(),
        uid: own.euid,
        gid: own.egid,
        groups: own.groups,
        process: c.task.process,
        now: clock::realtime_ns() / 1_000_000_000,
    }
}

/// Bytes of a structure that is filled at places.
struct Record(Vec<u8>);

impl Record {
    fn new(bytes: usize) -> Self {
        Self(vec![0; bytes])
    }
    fn bytes(mut self, at: usize, bytes: &[u8]) -> Self {
        if let Some(slot) = self.0.get_mut(at..at + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
        self
    }
    fn int(self, at: usize, value: u32) -> Self {
        self.bytes(at, &value.to_le_bytes())
    }
    fn long(self, at: usize, value: u64) -> Self {
        self.bytes(at, &value.to_le_bytes())
    }
    /// `struct ipc64_perm` at the start; `mode` with what is not kept in the owner.
    fn owner(self, owner: &Owner, mode: u32) -> Self {
        self.int(0, owner.key.cast_unsigned())
            .int(4, owner.uid)
            .int(8, owner.gid)
            .int(12, owner.cuid)
            .int(16, owner.cgid)
            .int(20, owner.mode | mode)
            .int(24, owner.sequence.into())
    }
}

/// Owner, group and mode that a program wants (`IPC_SET`).
fn wanted_owner(address: u64) -> Result<(u32, u32, u32)> {
    let bytes: [u8; 24] = get(address)?;
    let int = |at: usize| {
        let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    Ok((int(4), int(8), int(20)))
}

/// The entry of an identifier, or for `*_STAT` calls of a place, with the identifier; the caller
/// must be allowed to read it unless `any`.
fn readable<'a, T>(
    table: &'a mut Table<T>,
    id: i32,
    by_place: bool,
    any: bool,
    caller: &Caller,
) -> Result<(i32, &'a mut Entry<T>)> {
    let (id, entry) = if by_place {
        table.at(id)?
    } else {
        (id, table.find(id)?)
    };
    if !any && !entry.owner.may(caller, 4) {
        return Err(Errno::EACCES);
    }
    Ok((id, entry))
}

fn shmget(c: &Call<'_>) -> Result {
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

/// Forgets segments that were removed while they were mapped, and are not any more.
fn sweep(ipc: &mut Ipc) {
    let gone: Vec<i32> = ipc
        .shared
        .iter()
        .filter(|(_, e)| e.it.removed && e.it.attached() == 0)
        .map(|(id, _)| id)
        .collect();
    for id in gone {
        let _ = ipc.shared.remove(id);
    }
}

fn shmat(c: &Call<'_>) -> Result {
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
                .find_free(len, LOWEST, MMAP_TOP)
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

fn shmdt(c: &Call<'_>) -> Result {
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

fn shmctl(c: &Call<'_>) -> Result {
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

fn semget(c: &Call<'_>) -> Result {
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

fn semop(c: &Call<'_>, timeout: u64) -> Result {
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
        at => Some(clock::monotonic_ns().saturating_add(super::get_timespec(at)?)),
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

/// A process ended: what it did to semaphores to be taken back is.
pub fn ended(container: &crate::container::Container, process: u32) {
    let any = {
        let mut ipc = container.ipc.lock();
        let ids: Vec<i32> = ipc.sets.iter().map(|(id, _)| id).collect();
        let mut any = false;
        for id in ids {
            if let Ok(entry) = ipc.sets.find(id) {
                any |= entry.it.ended(process);
            }
        }
        sweep(&mut ipc);
        any
    };
    if any {
        task::wake(task::OBJECTS);
    }
}

fn semctl(c: &Call<'_>) -> Result {
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

fn msgget(c: &Call<'_>) -> Result {
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

fn msgsnd(c: &Call<'_>) -> Result {
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

fn msgrcv(c: &Call<'_>) -> Result {
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

fn msgctl(c: &Call<'_>) -> Result {
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

/// /proc/sysvipc/`which`.
pub fn text(which: &str) -> String {
    let container = Arc::clone(&task::current().container);
    let mut ipc = container.ipc.lock();
    sweep(&mut ipc);
    let mut text = String::new();
    let owner = |o: &Owner| (o.key, o.mode, o.uid, o.gid, o.cuid, o.cgid);
    match which {
        "shm" => {
            text += "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap\n";
            for (id, e) in ipc.shared.iter() {
                let (key, mode, uid, gid, cuid, cgid) = owner(&e.owner);
                let s = &e.it;
                let _ = writeln!(
                    text,
                    "{key:10} {id:10}  {mode:4o} {:21} {:5} {:5}  {:5} {uid:5} {gid:5} {cuid:5} {cgid:5} {:10} {:10} {:10} {:21} {:21}",
                    s.bytes,
                    visible(s.processes[0]),
                    visible(s.processes[1]),
                    s.attached(),
                    s.times[0],
                    s.times[1],
                    s.times[2],
                    s.node.attributes().blocks * 512,
                    0
                );
            }
        }
        "sem" => {
            text += "       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n";
            for (id, e) in ipc.sets.iter() {
                let (key, mode, uid, gid, cuid, cgid) = owner(&e.owner);
                let _ = writeln!(
                    text,
                    "{key:10} {id:10}  {mode:4o} {:10} {uid:5} {gid:5} {cuid:5} {cgid:5} {:10} {:10}",
                    e.it.all.len(),
                    e.it.op_time,
                    e.it.change_time
                );
            }
        }
        _ => {
            text += "       key      msqid perms      cbytes       qnum lspid lrpid   uid   gid  cuid  cgid      stime      rtime      ctime\n";
            for (id, e) in ipc.queues.iter() {
                let (key, mode, uid, gid, cuid, cgid) = owner(&e.owner);
                let q = &e.it;
                let _ = writeln!(
                    text,
                    "{key:10} {id:10}  {mode:4o}  {:10} {:10} {:5} {:5} {uid:5} {gid:5} {cuid:5} {cgid:5} {:10} {:10} {:10}",
                    q.bytes,
                    q.len(),
                    visible(q.processes[0]),
                    visible(q.processes[1]),
                    q.times[0],
                    q.times[1],
                    q.times[2]
                );
            }
        }
    }
    text
}
