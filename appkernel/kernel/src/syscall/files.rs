//! Calls on open files.

use alloc::sync::Arc;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::DirEntry;
use appkernel_hal::USER_END;

use super::{Call, Result, file_locks, get, moves, put, sockets};
use crate::fs::file::{File, Kind, flag};
use crate::fs::fuse::Change;
use crate::fs::node::Node;
use crate::fs::pipe::{End, Pipe};
use crate::fs::pty::{Master, Slave};
use crate::fs::watch::{self, Inotify};
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
        19 => parts(c, read, None),
        20 => parts(c, write, None),
        295 => at(c.arg(3)).and_then(|at| parts(c, read, Some(at))),
        296 => at(c.arg(3)).and_then(|at| parts(c, write, Some(at))),
        327 => flagged(c, read),
        328 => flagged(c, write),
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

/// Zeros to copy at most `count` bytes through; fewer when there is no such piece of memory.
///
/// # Errors
/// `ENOMEM`: there is next to none.
pub fn buffer(count: u64) -> Result<Vec<u8>> {
    const SMALL: usize = 2048;
    let wanted = count.min(CHUNK as u64) as usize;
    let mut bytes = Vec::new();
    let len = match bytes.try_reserve_exact(wanted) {
        Ok(()) => wanted,
        Err(_) => wanted.min(SMALL),
    };
    bytes.try_reserve_exact(len).map_err(|_| Errno::ENOMEM)?;
    bytes.resize(len, 0);
    Ok(bytes)
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
    if let Kind::Regular(Node::Share(node), _) = &file.kind
        && file.may_read()
    {
        let offset = at.unwrap_or(*file.offset.lock());
        let got = node.read_to_program(offset, address, count)?;
        watch::tell(&file.path, watch::event::ACCESS, false);
        if at.is_none() {
            *file.offset.lock() = offset.saturating_add(got);
        }
        return Ok(got);
    }
    loop {
        let mut buffer = match buffer(count - done) {
            Err(_) if done > 0 => return Ok(done),
            other => other?,
        };
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
        if task::breathe().is_err() {
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
            _ if file.flags() & flag::APPEND != 0 => node.attributes()?.size,
            Some(at) => at,
            None => *file.offset.lock(),
        };
        count = count.min(may_grow(c.task, start)?);
    }
    let mut done = 0;
    while done < count || count == 0 {
        let mut buffer = match buffer(count - done) {
            Err(_) if done > 0 => break,
            other => other?,
        };
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
        if count == 0 || task::breathe().is_err() {
            break;
        }
    }
    Ok(done)
}

/// preadv2 and pwritev2.
fn flagged(c: &Call<'_>, f: fn(&Call<'_>, u64, u64, Option<u64>) -> Result) -> Result {
    // How urgent it is, that it is to be written through, that it must not wait, to the end.
    const KNOWN: u32 = 0x1f;
    const APPEND: u32 = 0x10;
    const NOWAIT: u32 = 8;
    if c.uint(5) & !KNOWN != 0 {
        return Err(Errno::EOPNOTSUPP);
    }
    let file = c.task.file(c.int(0))?;
    // Files of the share are read by waiting for the host.
    if c.uint(5) & NOWAIT != 0 && !matches!(file.kind, Kind::Regular(Node::Memory(_), _)) {
        return Err(Errno::EOPNOTSUPP);
    }
    if c.arg(3) == u64::MAX {
        return parts(c, f, None);
    }
    let mut start = at(c.arg(3))?;
    if let (Kind::Regular(node, _), true) = (&file.kind, c.uint(5) & APPEND != 0) {
        start = node.attributes()?.size;
    }
    parts(c, f, Some(start))
}

/// readv, writev and the like: all parts are looked at before the first is moved.
fn parts(
    c: &Call<'_>,
    f: fn(&Call<'_>, u64, u64, Option<u64>) -> Result,
    at: Option<u64>,
) -> Result {
    let count = c.arg(2);
    if count > MAX_PARTS {
        return Err(Errno::EINVAL);
    }
    // What is wrong with the file is said first.
    let file = c.task.used_file(c.int(0))?;
    if at.is_some()
        && !matches!(
            file.kind,
            Kind::Regular(..) | Kind::Directory(..) | Kind::Device(_)
        )
    {
        return Err(Errno::ESPIPE);
    }
    let mut all = alloc::vec::Vec::with_capacity(count as usize);
    let mut total = 0;
    for i in 0..count {
        let entry: [u8; 16] = get(c.arg(1).wrapping_add(i * 16))?;
        let (address, len) = entry.split_at(8);
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let (address, len) = (number(address), number(len));
        if len > i64::MAX.cast_unsigned() {
            return Err(Errno::EINVAL);
        }
        if len > 0
            && address
                .checked_add(len.min(MAX_COUNT))
                .is_none_or(|end| end > USER_END)
        {
            return Err(Errno::EFAULT);
        }
        // All of them together are no more than one call may have.
        let len = len.min(MAX_COUNT - total);
        total += len;
        all.push((address, len));
    }
    if total == 0 {
        // The file has to fit the call all the same.
        return f(c, 0, 0, at);
    }
    let mut done = 0;
    for (address, len) in all {
        if len == 0 {
            continue;
        }
        match f(c, address, len, at.map(|at| at.saturating_add(done))) {
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
    Ok(done)
}

fn close(c: &Call<'_>) -> Result {
    let file = c.task.files().lock().remove(c.int(0))?;
    file_locks::drop_locks(&file, c.task.process);
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
    const DATA: u32 = 3;
    const HOLE: u32 = 4;
    let mut offset = file.offset.lock();
    if let (Kind::Regular(..), DATA | HOLE) = (&file.kind, c.uint(2)) {
        // Holes are not told from zeros: all is data up to the end.
        if c.arg(1) >= size {
            return Err(Errno::ENXIO);
        }
        *offset = if c.uint(2) == DATA { c.arg(1) } else { size };
        return Ok(*offset);
    }
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
        command @ (5..=7 | 36..=38) => file_locks::lock(c, &file, command),
        command @ (8..=11 | 15 | 16) => file_locks::owner(c, &file, command),
        command @ (1024 | 1025) => file_locks::lease(c, &file, command),
        command @ (1031 | 1032) => match &file.kind {
            Kind::Pipe(pipe, _) if command == 1031 => {
                pipe.set_capacity(c.uint(2)).map(|bytes| bytes as u64)
            }
            Kind::Pipe(pipe, _) => Ok(pipe.capacity() as u64),
            _ => Err(Errno::EBADF),
        },
        // F_ADD_SEALS, F_GET_SEALS.
        command @ (1033 | 1034) => match &file.kind {
            Kind::Regular(Node::Memory(_), handle) if command == 1033 && handle.is_none() => {
                Err(Errno::EPERM)
            }
            Kind::Regular(Node::Memory(node), _) if command == 1033 => {
                node.add_seals(c.uint(2)).map(|()| 0)
            }
            Kind::Regular(Node::Memory(node), _) => Ok(node.seals().into()),
            _ => Err(Errno::EINVAL),
        },
        _ => Err(Errno::EINVAL),
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
    // The rest comes with the next call, however much room there is.
    let room = (c.uint(2) as usize).min(CHUNK);
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
