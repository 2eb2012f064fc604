//! Locks on files: record locks, those of open files, flock, leases; and who is told about a file.

use alloc::collections::BTreeMap;

use appkernel_core::errno::Errno;
use appkernel_core::locks::{self, Lock};
use appkernel_hal::sync::Mutex;

use super::{Call, Result, get, put};
use crate::container::visible;
use crate::fs::file::{File, Kind, flag};
use crate::fs::node::Node;
use crate::task;

/// Record locks to the end of the file end here; behind it is the place for flock, so that the two
/// kinds do not meet.
const RECORDS_END: u64 = u64::MAX - 1;

/// Record locks: known to the programs of this kernel, not to the host.
pub fn lock(c: &Call<'_>, file: &File, command: u32) -> Result {
    const GET: u32 = 5;
    const SET_AND_WAIT: u32 = 7;
    const UNLOCK: u16 = 2;
    let mut raw: [u8; 32] = get(c.arg(2))?;
    if file.flags() & flag::PATH != 0 {
        return Err(Errno::EBADF);
    }
    let node = match &file.kind {
        Kind::Regular(node, _) => node,
        _ => return Err(Errno::EINVAL),
    };
    let word = |at: usize| raw[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    let kind = u16::from_le_bytes([raw[0], raw[1]]);
    let base = match raw[2] {
        0 => 0,
        1 => *file.offset.lock(),
        2 => node.attributes()?.size,
        _ => return Err(Errno::EINVAL),
    };
    let first = base
        .checked_add_signed(word(8).cast_signed())
        .ok_or(Errno::EINVAL)?;
    let (start, end) = match word(16).cast_signed() {
        0 => (first, RECORDS_END),
        len @ 1.. => (
            first,
            first
                .checked_add(len.unsigned_abs())
                .ok_or(Errno::EOVERFLOW)?,
        ),
        len => (
            first.checked_sub(len.unsigned_abs()).ok_or(Errno::EINVAL)?,
            first,
        ),
    };
    // Those of open files (OFD) have commands of their own, and name no process.
    let of_file = command >= 36;
    let command = if of_file { command - 31 } else { command };
    if of_file && raw[24..28] != [0; 4] {
        return Err(Errno::EINVAL);
    }
    let owner = if of_file {
        locks::of_file(file.number)
    } else {
        c.task.process.into()
    };
    let wanted = Lock {
        owner,
        exclusive: kind == 1,
        start,
        end,
    };
    match (command, kind) {
        (GET, 0 | 1) => {
            match node.with_locks(|locks| locks.conflict(&wanted)).flatten() {
                None => raw[..2].copy_from_slice(&UNLOCK.to_le_bytes()),
                Some(other) => {
                    let len = if other.end == RECORDS_END {
                        0
                    } else {
                        other.end - other.start
                    };
                    raw[..2].copy_from_slice(&u16::from(other.exclusive).to_le_bytes());
                    raw[2..4].fill(0);
                    raw[8..16].copy_from_slice(&other.start.to_le_bytes());
                    raw[16..24].copy_from_slice(&len.to_le_bytes());
                    let shown = u32::try_from(other.owner).map_or(u32::MAX, visible);
                    raw[24..28].copy_from_slice(&shown.to_le_bytes());
                }
            }
            put(c.arg(2), &raw)?;
        }
        (GET, _) | (_, 3..) => return Err(Errno::EINVAL),
        // A file must be open for what its lock keeps others from.
        (_, 0) if file.flags() & flag::ACCESS == flag::WRITE_ONLY => return Err(Errno::EBADF),
        (_, 1) if file.flags() & flag::ACCESS == 0 => return Err(Errno::EBADF),
        (_, UNLOCK) => unlock(node, wanted.owner, start, end),
        (SET_AND_WAIT, _) => {
            let result = task::wait_for(task::FILES, || {
                match node.with_locks(|locks| locks.take(wanted)) {
                    Some(Err(Errno::EAGAIN)) => {
                        let other = node.with_locks(|locks| locks.conflict(&wanted)).flatten();
                        let other = other.map_or(0, |lock| lock.owner);
                        (!of_file && would_deadlock(wanted.owner, other))
                            .then_some(Err(Errno::EDEADLK))
                    }
                    other => Some(other.unwrap_or(Err(Errno::EINVAL))),
                }
            });
            WAITING.lock().remove(&wanted.owner);
            result??;
        }
        _ => node
            .with_locks(|locks| locks.take(wanted))
            .unwrap_or(Err(Errno::EINVAL))?,
    }
    Ok(0)
}

/// Processes that wait for a record lock, and for whom.
static WAITING: Mutex<BTreeMap<u64, u64>> = Mutex::new(BTreeMap::new());

/// Notes that a process waits for another; whether that one waits for it, over however many.
fn would_deadlock(process: u64, other: u64) -> bool {
    let mut waiting = WAITING.lock();
    waiting.insert(process, other);
    let mut at = other;
    for _ in 0..waiting.len() {
        match waiting.get(&at) {
            Some(next) if *next == process => return true,
            Some(next) => at = *next,
            None => return false,
        }
    }
    false
}

fn unlock(node: &Node, owner: u64, start: u64, end: u64) {
    if node.with_locks(|locks| locks.release(owner, start, end)) == Some(true) {
        task::wake(task::FILES);
    }
}

/// A process that closes any of its descriptors of a file loses all its locks on it (POSIX).
pub fn drop_locks(file: &File, process: u32) {
    if let Kind::Regular(node, _) = &file.kind {
        unlock(node, process.into(), 0, RECORDS_END);
    }
}

/// flock(2): a lock of the open file.
pub fn flock(c: &Call<'_>) -> Result {
    const NOWAIT: u32 = 4;
    let file = c.task.used_file(c.int(0))?;
    let Some(node) = file.node() else {
        // Pipes and the like: nobody else can have it.
        return match c.uint(1) & !NOWAIT {
            1 | 2 | 8 => Ok(0),
            _ => Err(Errno::EINVAL),
        };
    };
    let owner = locks::of_file(file.number);
    let exclusive = match c.uint(1) & !NOWAIT {
        1 => false,
        2 => true,
        8 => {
            unlock(node, owner, RECORDS_END, u64::MAX);
            return Ok(0);
        }
        _ => return Err(Errno::EINVAL),
    };
    let wanted = Lock {
        owner,
        exclusive,
        start: RECORDS_END,
        end: u64::MAX,
    };
    let attempt = || match node.with_locks(|locks| locks.take(wanted)) {
        Some(Err(Errno::EAGAIN)) => None,
        other => Some(other.unwrap_or(Ok(()))),
    };
    if c.uint(1) & NOWAIT != 0 {
        attempt().unwrap_or(Err(Errno::EAGAIN))?;
    } else {
        task::wait_for(task::FILES, attempt)??;
    }
    // From shared to exclusive or back: somebody may go on.
    task::wake(task::FILES);
    Ok(0)
}

/// Leases: the file's identity, the open file that has it, and its kind.
static LEASES: Mutex<BTreeMap<(u64, u64), (u64, u32)>> = Mutex::new(BTreeMap::new());

/// F_SETLEASE and F_GETLEASE. A lease is given as Linux gives it; that others open the file is not
/// held up, and breaks nothing.
pub fn lease(c: &Call<'_>, file: &File, command: u32) -> Result {
    const SET: u32 = 1024;
    const READ: u32 = 0;
    const WRITE: u32 = 1;
    const NONE: u32 = 2;
    let Kind::Regular(node, _) = &file.kind else {
        return Err(Errno::EINVAL);
    };
    let key = node.identity();
    if command != SET {
        let known = LEASES.lock().get(&key).copied();
        let own = known.filter(|(of, _)| *of == file.number);
        return Ok(own.map_or(NONE, |(_, kind)| kind).into());
    }
    let attributes = node.attributes()?;
    let credentials = c.task.credentials.lock().clone();
    if credentials.uid != attributes.uid && !credentials.is_root() {
        return Err(Errno::EACCES);
    }
    let (readers, writers) = open_files(node, file.number);
    match c.uint(2) {
        NONE => {
            LEASES
                .lock()
                .retain(|at, (of, _)| (*at, *of) != (key, file.number));
            return Ok(0);
        }
        READ if file.flags() & flag::ACCESS != 0 || writers > 0 => return Err(Errno::EAGAIN),
        WRITE if readers + writers > 0 => return Err(Errno::EAGAIN),
        READ | WRITE => {}
        _ => return Err(Errno::EINVAL),
    }
    LEASES.lock().insert(key, (file.number, c.uint(2)));
    Ok(0)
}

/// How many other open files of a node there are: for reading, for writing.
fn open_files(node: &Node, but: u64) -> (usize, usize) {
    let mut seen = alloc::vec![but];
    let (mut readers, mut writers) = (0, 0);
    for task in task::living() {
        let files = task.files();
        let files = files.lock();
        for file in files.all() {
            if seen.contains(&file.number) || file.node() != Some(node) {
                continue;
            }
            seen.push(file.number);
            if file.flags() & flag::ACCESS == 0 {
                readers += 1;
            } else {
                writers += 1;
            }
        }
    }
    (readers, writers)
}

/// F_SETOWN, F_SETSIG and the like: kept and given back; no signals are sent for files.
pub fn owner(c: &Call<'_>, file: &File, command: u32) -> Result {
    let mut own = file.owner.lock();
    match command {
        8 => {
            let id = c.int(2);
            if id == i32::MIN {
                return Err(Errno::EINVAL);
            }
            // A group is a negative number.
            *own = if id < 0 { (2, -id) } else { (1, id) };
        }
        9 => {
            let id = if own.0 == 2 { -own.1 } else { own.1 };
            return Ok(i64::from(id).cast_unsigned());
        }
        10 => {
            let signal = c.int(2);
            if !(0..=64).contains(&signal) {
                return Err(Errno::EINVAL);
            }
            *file.signal.lock() = signal;
        }
        11 => return Ok(*file.signal.lock() as u64),
        15 => {
            let raw: [u8; 8] = get(c.arg(2))?;
            let (kind, id) = raw.split_at(4);
            let int = |b: &[u8]| b.try_into().map_or(0, i32::from_le_bytes);
            if !(0..=2).contains(&int(kind)) {
                return Err(Errno::EINVAL);
            }
            *own = (int(kind), int(id));
        }
        _ => {
            let bytes = [own.0.to_le_bytes(), own.1.to_le_bytes()].concat();
            put(c.arg(2), &bytes)?;
        }
    }
    Ok(0)
}

/// The last number of an open file is closed: its own locks and its lease end.
pub fn file_closed(file: &File) {
    if let Some(node) = file.node() {
        unlock(node, locks::of_file(file.number), 0, u64::MAX);
        let key = node.identity();
        LEASES
            .lock()
            .retain(|at, (of, _)| (*at, *of) != (key, file.number));
    }
}
