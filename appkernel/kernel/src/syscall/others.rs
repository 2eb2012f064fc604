//! Calls on other processes' memory, and barriers.

use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_hal::{USER_END, usercopy};

use super::{Call, Result, files, get, put};
use crate::fs::file::Kind;
use crate::task;

/// Parts of the calls on another process' memory.
const MAX_PARTS: u64 = 1024;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        277 => sync_range(c),
        310 => copy(c, false),
        311 => copy(c, true),
        324 => barrier(c),
        _ => return None,
    })
}

/// Address and length of each part.
fn parts(at: u64, count: u64) -> Result<Vec<(u64, u64)>> {
    if count > MAX_PARTS {
        return Err(Errno::EINVAL);
    }
    let mut all = Vec::with_capacity(count as usize);
    for i in 0..count {
        let entry: [u8; 16] = get(at.wrapping_add(i * 16))?;
        let (address, len) = entry.split_at(8);
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let (address, len) = (number(address), number(len));
        if len > i64::MAX.cast_unsigned() {
            return Err(Errno::EINVAL);
        }
        all.push((address, len.min(files::MAX_COUNT)));
    }
    Ok(all)
}

/// process_vm_readv(2) and process_vm_writev(2).
fn copy(c: &Call<'_>, write: bool) -> Result {
    if c.arg(5) != 0 {
        return Err(Errno::EINVAL);
    }
    let (mut own, mut other) = (parts(c.arg(1), c.arg(2))?, parts(c.arg(3), c.arg(4))?);
    let target = task::find(c.task.container.id(c.uint(0))).ok_or(Errno::ESRCH)?;
    {
        let (me, it) = (c.task.credentials.lock().clone(), &target);
        let it = it.credentials.lock().clone();
        let same = [it.uid, it.euid, it.suid].iter().all(|u| *u == me.uid)
            && [it.gid, it.egid, it.sgid].iter().all(|g| *g == me.gid);
        if !me.is_root() && !same {
            return Err(Errno::EPERM);
        }
    }
    let memory = target.memory().ok_or(Errno::ESRCH)?;
    own.reverse();
    other.reverse();
    let mut done = 0;
    let mut buffer = files::buffer(files::CHUNK as u64)?;
    // From the ends of both lists: what is left of a part goes back.
    while let (Some((here, mine)), Some((there, its))) = (own.pop(), other.pop()) {
        let len = mine.min(its).min(buffer.len() as u64);
        if len > 0 {
            let bytes = buffer.get_mut(..len as usize).unwrap_or_default();
            // The caller's own memory is touched without the lock, which its faults take.
            let moved = if there.checked_add(len).is_none_or(|end| end > USER_END) {
                Err(Errno::EFAULT)
            } else if write {
                usercopy::read(bytes, here)
                    .map_err(|_| Errno::EFAULT)
                    .and_then(|()| memory.lock().write(there, bytes))
            } else if memory.lock().read(there, bytes) < bytes.len() {
                Err(Errno::EFAULT)
            } else {
                put(here, bytes)
            };
            match moved {
                Ok(()) => done += len,
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        if mine > len {
            own.push((here + len, mine - len));
        }
        if its > len {
            other.push((there + len, its - len));
        }
        if task::breathe().is_err() {
            break;
        }
    }
    Ok(done)
}

/// sync_file_range(2): all of the file's data.
fn sync_range(c: &Call<'_>) -> Result {
    const KNOWN: u32 = 7;
    let (offset, len) = (c.arg(1).cast_signed(), c.arg(2).cast_signed());
    let file = c.task.used_file(c.int(0))?;
    if c.uint(3) & !KNOWN != 0 || offset < 0 || len < 0 || offset.checked_add(len).is_none() {
        return Err(Errno::EINVAL);
    }
    match &file.kind {
        Kind::Regular(node, handle) => node.sync(true, *handle).map(|()| 0),
        Kind::Directory(..) => Ok(0),
        _ => Err(Errno::ESPIPE),
    }
}

/// membarrier(2). With one CPU whoever runs sees what the others wrote.
fn barrier(c: &Call<'_>) -> Result {
    const QUERY: u32 = 0;
    const GLOBAL: u32 = 1;
    const GLOBAL_EXPEDITED: u32 = 2;
    const REGISTER_GLOBAL: u32 = 4;
    const PRIVATE: u32 = 8;
    const REGISTER_PRIVATE: u32 = 16;
    const CORE: u32 = 32;
    const REGISTER_CORE: u32 = 64;
    if c.uint(1) != 0 {
        return Err(Errno::EINVAL);
    }
    let mut links = c.task.links.lock();
    match c.uint(0) {
        QUERY => Ok(0x7f),
        GLOBAL | GLOBAL_EXPEDITED => Ok(0),
        register @ (REGISTER_GLOBAL | REGISTER_PRIVATE | REGISTER_CORE) => {
            links.barriers |= register;
            Ok(0)
        }
        barrier @ (PRIVATE | CORE) if links.barriers & barrier << 1 == 0 => Err(Errno::EPERM),
        PRIVATE | CORE => Ok(0),
        _ => Err(Errno::EINVAL),
    }
}
