//! System V shared memory, semaphores and messages, per container.

mod messages;
mod semaphores;
mod shared;

use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write;

use appkernel_core::errno::Errno;
use appkernel_core::sysv::{Caller, Entry, Owner, Queue, Set, Table};
use appkernel_hal::clock;

use super::{Call, Result, get};
use crate::container::visible;
use crate::fs::memory;
use crate::mm::Mapping;
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
        29 => shared::shmget(c),
        30 => shared::shmat(c),
        31 => shared::shmctl(c),
        64 => semaphores::semget(c),
        65 => semaphores::semop(c, 0),
        66 => semaphores::semctl(c),
        67 => shared::shmdt(c),
        68 => messages::msgget(c),
        69 => messages::msgsnd(c),
        70 => messages::msgrcv(c),
        71 => messages::msgctl(c),
        220 => semaphores::semop(c, c.arg(3)),
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
