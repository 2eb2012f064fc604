//! Calls on open files.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::DirEntry;
use appkernel_core::locks::Lock;
use appkernel_hal::sync::Mutex;

use super::{Call, Result, get, moves, put, sockets};
use crate::container::visible;
use crate::fs::file::{File, Kind, flag};
use crate::fs::fuse::Change;
use crate::fs::node::Node;
use crate::fs::pipe::{End, Pipe};
use crate::fs::pty::{Master, Slave};
use crate::fs::watch::Inotify;
use crate::net::Socket;
use crate::signal::{self, Info, Signal};
use crate::task::{self, Task, limits};

/// Bytes copied at once between program and kernel.
pub const CHUNK: usize = 64 << 10;
/// Parts of readv and writev (`IOV_MAX`).
const MAX_PARTS: u64 = 1024;
/// Most bytes of one call, as Linux.
pub const MAX_COUNT: u64 = 0x7fff_f000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        0 => read(c, c.arg(1), c.arg(2), None),
        1 => write(c, c.arg(1), c.arg(2), None),
        3 => close(c),
        8 => seek(c),
        16 => ioctl(c),
        17 => at(c.arg(3)).and_then(|at| read(c, c.arg(1), c.arg(2), Some(at))),
        18 => at(c.arg(3)).and_then(|at| write(c, c.arg(1), c.arg(2), Some(at))),
        19 => parts(c, read),
        20 => parts(c, write),
        22 => pipe(c, 0),
        32 => duplicate(c, 0, false),
        33 | 292 => duplicate_to(c),
        40 => moves::sendfile(c),
        72 => control(c),
        74 | 75 => sync(c),
        77 => truncate(c),
        78 | 217 => entries(c),
        293 => pipe(c, c.uint(1)),
        _ => return None,
    })
}

fn at(offset: u64) -> Result {
    if offset > i64::MAX.cast_unsigned() {
        return Err(Errno::EINVAL);
    }
    Ok(offset)
}

fn read(c: &Call<'_>, address: u64, count: u64, at: Option<u64>) -> Result {
    let file = c.task.file(c.int(0))?;
    let mut done = 0;
    let count = count.min(MAX_COUNT);
    loop {
        let mut buffer = vec![0; (count - done).min(CHUNK as u64) as usize];
        let got = match file.read(&mut buffer, at.map(|at| at + done)) {
            Ok(got) => got,
            Err(_) if done > 0 => return Ok(done),
            Err(e) => return Err(e),
        };
        put(
            address.wrapping_add(done),
            buffer.get(..got).unwrap_or_default(),
        )?;
        done += got as u64;
        // Only files give more at once; others are asked again by the program.
        if got < CHUNK || done >= count || !matches!(file.kind, Kind::Regular(..) | Kind::Device(_))
        {
            return Ok(done);
        }
    }
}

/// How many bytes of a file from `at` on the process may write (RLIMIT_FSIZE).
pub fn may_grow(task: &Task, at: u64) -> Result {
    let limit = task.limits.lock().soft(limits::FILE_SIZE);
    if at >= limit {
        signal::send(task, Signal::XFSZ, Info::default());
        return Err(Errno::EFBIG);
    }
    Ok(limit - at)
}

fn write(c: &Call<'_>, address: u64, count: u64, at: Option<u64>) -> Result {
    let file = c.task.file(c.int(0))?;
    let mut count = count.min(MAX_COUNT);
    if let Kind::Regular(node, _) = &file.kind
        && c.task.limits.lock().soft(limits::FILE_SIZE) < u64::MAX
        && count > 0
    {
        let start = match at {
            Some(at) => at,
            None if file.flags() & flag::APPEND != 0 => node.attributes()?.size,
            None => *file.offset.lock(),
        };
        count = count.min(may_grow(c.task, start)?);
    }
    let mut done = 0;
    while done < count || count == 0 {
        let mut buffer = vec![0; (count - done).min(CHUNK as u64) as usize];
        let result = appkernel_hal::usercopy::read(&mut buffer, address.wrapping_add(done))
            .map_err(|_| Errno::EFAULT)
            .and_then(|()| file.write(&buffer, at.map(|at| at + done)));
        match result {
            Ok(0) => break,
            Ok(taken) => done += taken as u64,
            Err(_) if done > 0 => break,
            Err(e) => {
                if e == Errno::EPIPE {
                    signal::send(c.task, Signal::PIPE, Info::default());
                }
                return Err(e);
            }
        }
        if count == 0 {
            break;
        }
    }
    Ok(done)
}

fn parts(c: &Call<'_>, f: fn(&Call<'_>, u64, u64, Option<u64>) -> Result) -> Result {
    let count = c.arg(2);
    if count > MAX_PARTS {
        return Err(Errno::EINVAL);
    }
    let mut done = 0;
    for i in 0..count {
        let entry: [u8; 16] = get(c.arg(1).wrapping_add(i * 16))?;
        let (address, len) = entry.split_at(8);
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let (address, len) = (number(address), number(len));
        if len == 0 {
            continue;
        }
        match f(c, address, len, None) {
            Ok(count) => {
                done += count;
                if count < len {
                    break;
                }
            }
            Err(_) if done > 0 => break,
            Err(e) => return Err(e),
        }
    }
    if done == 0 && count == 0 {
        c.task.file(c.int(0))?;
    }
    Ok(done)
}

fn close(c: &Call<'_>) -> Result {
    let file = c.task.files().lock().remove(c.int(0))?;
    drop_locks(&file, c.task.process);
    drop(file);
    Ok(0)
}

fn seek(c: &Call<'_>) -> Result {
    let file = c.task.used_file(c.int(0))?;
    let size = match &file.kind {
        Kind::Regular(node, _) => node.attributes()?.size,
        Kind::Directory(_, entries) => {
            *entries.lock() = None;
            0
        }
        Kind::Device(_) => 0,
        Kind::Console | Kind::Pipe(..) | Kind::Object(_) => return Err(Errno::ESPIPE),
    };
    let mut offset = file.offset.lock();
    let base = match c.uint(2) {
        0 => 0,
        1 => *offset,
        2 => size,
        _ => return Err(Errno::EINVAL),
    };
    let new = base
        .checked_add_signed(c.arg(1).cast_signed())
        .ok_or(Errno::EINVAL)?;
    if new > i64::MAX.cast_unsigned() {
        return Err(Errno::EINVAL);
    }
    *offset = new;
    Ok(new)
}

fn ioctl(c: &Call<'_>) -> Result {
    const FIONREAD: u32 = 0x541b;
    const FIONBIO: u32 = 0x5421;
    const FIOCLEX: u32 = 0x5451;
    const FIONCLEX: u32 = 0x5450;
    const FIOASYNC: u32 = 0x5452;
    let file = c.task.used_file(c.int(0))?;
    match c.uint(1) {
        FIONREAD => {
            let count = match &file.kind {
                Kind::Object(_) if file.object::<Socket>().is_some() => {
                    file.object::<Socket>().map_or(0, |s| s.waiting() as u32)
                }
                Kind::Object(_) if file.object::<Inotify>().is_some() => {
                    file.object::<Inotify>().map_or(0, |i| i.waiting() as u32)
                }
                Kind::Object(_) => return terminal_call(c, &file, FIONREAD),
                Kind::Pipe(pipe, _) => pipe.len() as u32,
                Kind::Regular(node, _) => {
                    let offset = *file.offset.lock();
                    node.attributes()?
                        .size
                        .saturating_sub(offset)
                        .min(i32::MAX as u64) as u32
                }
                _ => return Err(Errno::ENOTTY),
            };
            put(c.arg(2), &count.to_le_bytes())?;
            Ok(0)
        }
        FIONBIO => {
            let on = u32::from_le_bytes(get(c.arg(2))?) != 0;
            let flags = file.flags() & !flag::NONBLOCK;
            file.set_flags(if on { flags | flag::NONBLOCK } else { flags });
            Ok(0)
        }
        FIOCLEX => {
            c.task.files().lock().set_close_on_exec(c.int(0), true)?;
            Ok(0)
        }
        // Signals for input: accepted, none are sent.
        FIOASYNC => Ok(0),
        FIONCLEX => {
            c.task.files().lock().set_close_on_exec(c.int(0), false)?;
            Ok(0)
        }
        _ if file.object::<Socket>().is_some() => sockets::control(c),
        request => terminal_call(c, &file, request),
    }
}

/// Calls that only terminals know.
fn terminal_call(c: &Call<'_>, file: &File, request: u32) -> Result {
    let (pty, is_master) = match (file.object::<Slave>(), file.object::<Master>()) {
        (Some(slave), _) => (slave.pty(), false),
        (None, Some(master)) => (master.pty(), true),
        _ => return Err(Errno::ENOTTY),
    };
    // What the argument points to, for the calls that read it.
    let mut value = [0u8; 64];
    let len = match request {
        0x5402..=0x5404 => 36,
        0x5410 | 0x4004_5431 => 4,
        0x5414 => 8,
        _ => 0,
    };
    if let Some(part) = value.get_mut(..len) {
        appkernel_hal::usercopy::read(part, c.arg(2)).map_err(|_| Errno::EFAULT)?;
    }
    let answer = pty.control_call(c.task, request, &value, c.arg(2), is_master)?;
    if !answer.is_empty() {
        put(c.arg(2), &answer)?;
    }
    Ok(0)
}

fn pipe(c: &Call<'_>, flags: u32) -> Result {
    if flags & !(flag::CLOEXEC | flag::NONBLOCK) != 0 {
        return Err(Errno::EINVAL);
    }
    let pipe = Arc::new(Pipe::new());
    let status = flags & flag::NONBLOCK;
    let close = flags & flag::CLOEXEC != 0;
    let reader = Arc::new(File::new(Kind::Pipe(Arc::clone(&pipe), End::Read), status));
    let writer = Arc::new(File::new(
        Kind::Pipe(pipe, End::Write),
        status | flag::WRITE_ONLY,
    ));
    let files = c.task.files();
    let first = files.lock().insert(reader, 0, close)?;
    let second = files.lock().insert(writer, 0, close);
    let undo = |fd| {
        let file = files.lock().remove(fd);
        drop(file);
    };
    let second = second.inspect_err(|_| undo(first))?;
    let mut bytes = [0; 8];
    let (a, b) = bytes.split_at_mut(4);
    a.copy_from_slice(&first.to_le_bytes());
    b.copy_from_slice(&second.to_le_bytes());
    put(c.arg(0), &bytes).inspect_err(|_| {
        undo(first);
        undo(second);
    })?;
    Ok(0)
}

fn duplicate(c: &Call<'_>, from: usize, close: bool) -> Result {
    let file = c.task.file(c.int(0))?;
    let fd = c.task.files().lock().insert(file, from, close)?;
    Ok(fd as u64)
}

fn duplicate_to(c: &Call<'_>) -> Result {
    let (from, to) = (c.int(0), c.int(1));
    let three = c.number == 292;
    let flags = if three { c.uint(2) } else { 0 };
    if flags & !flag::CLOEXEC != 0 || three && from == to {
        return Err(Errno::EINVAL);
    }
    let file = c.task.file(from)?;
    if from != to {
        let old = c.task.files().lock().replace(to, file, flags != 0)?;
        drop(old);
    }
    Ok(to as u64)
}

fn control(c: &Call<'_>) -> Result {
    let (fd, files) = (c.int(0), c.task.files());
    let file = c.task.file(fd)?;
    match c.uint(1) {
        0 | 1030 => {
            let from = usize::try_from(c.int(2)).map_err(|_| Errno::EINVAL)?;
            if from >= crate::fs::file::MAX_FILES {
                return Err(Errno::EINVAL);
            }
            duplicate(c, from, c.uint(1) == 1030)
        }
        1 => Ok(files.lock().closes_on_exec(fd)?.into()),
        2 => files
            .lock()
            .set_close_on_exec(fd, c.arg(2) & 1 != 0)
            .map(|()| 0),
        3 => Ok(file.flags().into()),
        4 => {
            file.set_flags(c.uint(2));
            Ok(0)
        }
        command @ 5..=7 => lock(c, &file, command),
        // Owner for signals of input, of which none are sent; pipe sizes and seals are as they are.
        8 | 9 => Ok(0),
        command @ (1031 | 1032) => match &file.kind {
            Kind::Pipe(pipe, _) if command == 1031 => {
                pipe.set_capacity(c.uint(2)).map(|bytes| bytes as u64)
            }
            Kind::Pipe(pipe, _) => Ok(pipe.capacity() as u64),
            _ => Err(Errno::EBADF),
        },
        _ => Err(Errno::EINVAL),
    }
}

/// Record locks: known to the programs of this kernel, not to the host.
fn lock(c: &Call<'_>, file: &File, command: u32) -> Result {
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
        0 => (first, u64::MAX),
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
    let wanted = Lock {
        owner: c.task.process,
        exclusive: kind == 1,
        start,
        end,
    };
    match (command, kind) {
        (GET, 0 | 1) => {
            match node.with_locks(|locks| locks.conflict(&wanted)).flatten() {
                None => raw[..2].copy_from_slice(&UNLOCK.to_le_bytes()),
                Some(other) => {
                    let len = if other.end == u64::MAX {
                        0
                    } else {
                        other.end - other.start
                    };
                    raw[..2].copy_from_slice(&u16::from(other.exclusive).to_le_bytes());
                    raw[2..4].fill(0);
                    raw[8..16].copy_from_slice(&other.start.to_le_bytes());
                    raw[16..24].copy_from_slice(&len.to_le_bytes());
                    raw[24..28].copy_from_slice(&visible(other.owner).to_le_bytes());
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
                        would_deadlock(wanted.owner, other).then_some(Err(Errno::EDEADLK))
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
static WAITING: Mutex<BTreeMap<u32, u32>> = Mutex::new(BTreeMap::new());

/// Notes that a process waits for another; whether that one waits for it, over however many.
fn would_deadlock(process: u32, other: u32) -> bool {
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

fn unlock(node: &Node, owner: u32, start: u64, end: u64) {
    if node.with_locks(|locks| locks.release(owner, start, end)) == Some(true) {
        task::wake(task::FILES);
    }
}

/// A process that closes any of its descriptors of a file loses all its locks on it (POSIX).
pub fn drop_locks(file: &File, process: u32) {
    if let Kind::Regular(node, _) = &file.kind {
        unlock(node, process, 0, u64::MAX);
    }
}

fn sync(c: &Call<'_>) -> Result {
    let file = c.task.used_file(c.int(0))?;
    match &file.kind {
        Kind::Regular(node, handle) => node.sync(c.number == 75, *handle)?,
        Kind::Directory(..) => {}
        _ => return Err(Errno::EINVAL),
    }
    Ok(0)
}

fn truncate(c: &Call<'_>) -> Result {
    let size = at(c.arg(1))?;
    may_grow(c.task, size.saturating_sub(1))?;
    match &c.task.used_file(c.int(0))?.kind {
        Kind::Regular(node, Some(_)) => node.change(&Change {
            size: Some(size),
            ..Change::default()
        })?,
        _ => return Err(Errno::EINVAL),
    }
    Ok(0)
}

fn entries(c: &Call<'_>) -> Result {
    let file = c.task.used_file(c.int(0))?;
    let Kind::Directory(node, cached) = &file.kind else {
        return Err(Errno::ENOTDIR);
    };
    if cached.lock().is_none() {
        let mut entries = node.entries()?;
        // What is mounted here is seen here, also if the directory below it is missing.
        for name in c.task.container.mounted_names(&file.path) {
            if entries.iter().all(|e| e.name != name) {
                entries.push(DirEntry {
                    ino: 1,
                    offset: 0,
                    kind: 4,
                    name,
                });
            }
        }
        *cached.lock() = Some(entries);
    }
    let room = c.uint(2) as usize;
    let mut bytes = alloc::vec::Vec::new();
    let mut offset = *file.offset.lock();
    {
        let cached = cached.lock();
        let all = cached.as_deref().unwrap_or_default();
        for entry in all.iter().skip(offset as usize) {
            let len = (19 + entry.name.len() + 1).next_multiple_of(8);
            if bytes.len() + len > room {
                break;
            }
            offset += 1;
            let end = bytes.len() + len;
            bytes.extend(entry.ino.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            bytes.extend((len as u16).to_le_bytes());
            if c.number == 217 {
                bytes.push(entry.kind);
            }
            bytes.extend(&entry.name);
            bytes.resize(end, 0);
            // The old call has the kind in its last byte.
            if c.number == 78
                && let Some(last) = bytes.last_mut()
            {
                *last = entry.kind;
            }
        }
        if bytes.is_empty() && (offset as usize) < all.len() {
            return Err(Errno::EINVAL);
        }
    }
    put(c.arg(1), &bytes)?;
    *file.offset.lock() = offset;
    Ok(bytes.len() as u64)
}
