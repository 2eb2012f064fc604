//! Calls of little substance that programs make all the same.

use appkernel_core::capabilities;
use appkernel_core::errno::Errno;

use super::{Call, Result, get, moves, put};
use crate::fs::file::Kind;
use crate::fs::fuse::Change;
use crate::fs::node::Node;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        73 => super::file_locks::flock(c),
        135 => {
            const ASK: u32 = u32::MAX;
            let mut asked = c.task.asked.lock();
            let old = asked.persona;
            if c.uint(0) != ASK {
                asked.persona = c.uint(0);
            }
            Ok(old.into())
        }
        157 => control(c),
        162 => Ok(0),
        187 => match &c.task.used_file(c.int(0)) {
            Ok(file) if file.flags() & 3 == 1 => Err(Errno::EBADF),
            Ok(file) if matches!(file.kind, Kind::Regular(..)) => Ok(0),
            Ok(_) => Err(Errno::EINVAL),
            Err(e) => Err(*e),
        },
        221 => match c.task.used_file(c.int(0)) {
            Ok(file) if matches!(file.kind, Kind::Pipe(..)) => Err(Errno::ESPIPE),
            Ok(_) if c.uint(3) > 5 || c.arg(2).cast_signed() < 0 => Err(Errno::EINVAL),
            Ok(_) => Ok(0),
            Err(e) => Err(e),
        },
        275 => moves::splice(c),
        276 => moves::tee(c),
        285 => allocate(c),
        306 => c.task.file(c.int(0)).map(|_| 0),
        326 => moves::copy_range(c),
        309 => {
            for at in [c.arg(0), c.arg(1)] {
                if at != 0
                    && let Err(e) = put(at, &0u32.to_le_bytes())
                {
                    return Some(Err(e));
                }
            }
            Ok(0)
        }
        436 => close_range(c),
        _ => return None,
    })
}

/// prctl(2).
fn control(c: &Call<'_>) -> Result {
    match c.uint(0) {
        // Parent's death signal, dumpable, keep capabilities, timer slack, no new privileges,
        // names of memory: nothing here depends on them.
        1 if c.arg(1) > 64 => Err(Errno::EINVAL),
        4 if c.arg(1) > 1 => Err(Errno::EINVAL),
        8 if c.arg(1) > 1 => Err(Errno::EINVAL),
        38 if c.arg(1) != 1 || c.arg(2) | c.arg(3) | c.arg(4) != 0 => Err(Errno::EINVAL),
        39 if c.arg(1) | c.arg(2) | c.arg(3) | c.arg(4) != 0 => Err(Errno::EINVAL),
        4 | 0x5356_4d41 => Ok(0),
        8 => {
            c.task.credentials.lock().capabilities.keep = c.arg(1) == 1;
            Ok(0)
        }
        // No filter of calls; no special capabilities; time stamps are readable; no huge pages; what
        // a memory error does is left to the machine.
        21 | 27 => Ok(0),
        25 => put(c.arg(1), &1u32.to_le_bytes()).map(|()| 0),
        28 if c.task.credentials.lock().is_root() => Ok(0),
        28 | 35 => Err(Errno::EPERM),
        41 if c.arg(2) | c.arg(3) | c.arg(4) != 0 => Err(Errno::EINVAL),
        42 if c.arg(1) | c.arg(2) | c.arg(3) | c.arg(4) != 0 => Err(Errno::EINVAL),
        33 | 41 => Ok(0),
        34 => Ok(2),
        40 => {
            let address = c.task.clear_tid.load(core::sync::atomic::Ordering::Relaxed);
            put(c.arg(1), &address.to_le_bytes()).map(|()| 0)
        }
        42 => Ok(1),
        47 => ambient(c),
        1 => {
            c.task.asked.lock().death_signal = c.uint(1);
            Ok(0)
        }
        2 => {
            let signal = c.task.asked.lock().death_signal;
            put(c.arg(1), &signal.to_le_bytes()).map(|()| 0)
        }
        3 => Ok(1),
        7 => Ok(c.task.credentials.lock().capabilities.keep.into()),
        // No set-user-id programs are honoured: there is nothing to be denied.
        38 => {
            c.task.asked.lock().no_new_privileges = true;
            Ok(0)
        }
        39 => Ok(c.task.asked.lock().no_new_privileges.into()),
        29 => {
            let mut asked = c.task.asked.lock();
            asked.timer_slack_ns = if c.arg(1) == 0 {
                asked.default_slack_ns
            } else {
                c.arg(1)
            };
            Ok(0)
        }
        30 => Ok(c.task.asked.lock().timer_slack_ns),
        36 => {
            c.task.links.lock().reaps = c.arg(1) != 0;
            Ok(0)
        }
        37 => {
            let reaps = u32::from(c.task.links.lock().reaps);
            put(c.arg(1), &reaps.to_le_bytes()).map(|()| 0)
        }
        15 => {
            let mut name = super::get_string(c.arg(1), 16, Errno::ERANGE).or_else(|e| match e {
                // Longer names are cut.
                Errno::ERANGE => get::<15>(c.arg(1)).map(|b| b.to_vec()),
                e => Err(e),
            })?;
            name.truncate(15);
            *c.task.name.lock() = name;
            Ok(0)
        }
        16 => {
            let mut name = c.task.name.lock().clone();
            name.resize(16, 0);
            put(c.arg(1), &name).map(|()| 0)
        }
        // Capabilities of the bounding set.
        23 if c.arg(1) > capabilities::LAST => Err(Errno::EINVAL),
        23 => Ok(c.task.credentials.lock().capabilities.bounding >> c.arg(1) & 1),
        24 => {
            let mut own = c.task.credentials.lock();
            own.capabilities.drop_bounding(c.arg(1)).map(|()| 0)
        }
        _ => Err(Errno::EINVAL),
    }
}

/// Ambient capabilities: there are none, and none are raised.
fn ambient(c: &Call<'_>) -> Result {
    const IS_SET: u64 = 1;
    const RAISE: u64 = 2;
    const LOWER: u64 = 3;
    const CLEAR: u64 = 4;
    match c.arg(1) {
        CLEAR if c.arg(2) | c.arg(3) | c.arg(4) == 0 => Ok(0),
        IS_SET | RAISE | LOWER if c.arg(2) > 40 || c.arg(3) | c.arg(4) != 0 => Err(Errno::EINVAL),
        IS_SET | LOWER => Ok(0),
        RAISE => Err(Errno::EPERM),
        _ => Err(Errno::EINVAL),
    }
}

fn allocate(c: &Call<'_>) -> Result {
    const KEEP_SIZE: u32 = 1;
    const PUNCH_HOLE: u32 = 2;
    let file = c.task.used_file(c.int(0))?;
    if c.arg(2).cast_signed() < 0 || c.arg(3).cast_signed() <= 0 {
        return Err(Errno::EINVAL);
    }
    if c.uint(1) == KEEP_SIZE | PUNCH_HOLE
        && let Kind::Regular(Node::Memory(node), Some(_)) = &file.kind
    {
        node.punch(c.arg(2), c.arg(2).saturating_add(c.arg(3)))?;
        return Ok(0);
    }
    if c.uint(1) & !KEEP_SIZE != 0 {
        return Err(Errno::EOPNOTSUPP);
    }
    let node = match &file.kind {
        Kind::Regular(node, Some(_)) => node,
        Kind::Pipe(..) => return Err(Errno::ESPIPE),
        _ if file.flags() & 3 == 0 => return Err(Errno::EBADF),
        Kind::Directory(..) => return Err(Errno::EISDIR),
        _ => return Err(Errno::ENODEV),
    };
    let end = c.arg(2) + c.arg(3);
    if end > i64::MAX.cast_unsigned() {
        return Err(Errno::EFBIG);
    }
    super::files::may_grow(c.task, end.saturating_sub(1))?;
    if c.uint(1) & KEEP_SIZE == 0 && node.attributes()?.size < end {
        node.change(&Change {
            size: Some(end),
            ..Change::default()
        })?;
    }
    Ok(0)
}

fn close_range(c: &Call<'_>) -> Result {
    const CLOEXEC: u32 = 4;
    let (first, last) = (c.uint(0), c.uint(1));
    if first > last || c.uint(2) & !(CLOEXEC | 2) != 0 {
        return Err(Errno::EINVAL);
    }
    if c.uint(2) & 2 != 0 {
        let copy = c.task.files().lock().duplicate()?;
        *c.task.files.lock() = alloc::sync::Arc::new(appkernel_hal::sync::Mutex::new(copy));
    }
    let files = c.task.files();
    let numbers = files.lock().numbers();
    for fd in numbers.into_iter().filter(|n| (first..=last).contains(n)) {
        if c.uint(2) & CLOEXEC != 0 {
            files.lock().set_close_on_exec(fd.cast_signed(), true)?;
            continue;
        }
        // Not in one expression: the file is dropped without the lock.
        let removed = files.lock().remove(fd.cast_signed());
        if let Ok(file) = removed {
            super::file_locks::drop_locks(&file, c.task.process);
        }
    }
    Ok(0)
}
