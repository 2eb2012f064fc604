//! Moving bytes from one open file to another without the program seeing them.

use appkernel_core::errno::Errno;

use super::files::{CHUNK, MAX_COUNT, buffer};
use super::{Call, Result, get_u64, put_words};
use crate::fs::file::{File, Kind, flag};
use crate::fs::pipe::{End, Pipe};
use crate::task;

fn offset(at: u64) -> Result {
    if at > i64::MAX.cast_unsigned() {
        Err(Errno::EINVAL)
    } else {
        Ok(at)
    }
}

/// copy_file_range(2): by the kernel's own hands, a piece at a time.
pub fn copy_range(c: &Call<'_>) -> Result {
    let (from, to) = (c.task.used_file(c.int(0))?, c.task.used_file(c.int(2))?);
    if c.uint(5) != 0 {
        return Err(Errno::EINVAL);
    }
    for file in [&from, &to] {
        match file.kind {
            Kind::Regular(..) => {}
            Kind::Directory(..) => return Err(Errno::EISDIR),
            _ => return Err(Errno::EINVAL),
        }
    }
    if !from.may_read() || !to.may_write() || to.flags() & flag::APPEND != 0 {
        return Err(Errno::EBADF);
    }
    let start = |place: u64, file: &File| -> Result {
        match place {
            0 => Ok(*file.offset.lock()),
            place => offset(get_u64(place)?),
        }
    };
    let (from_at, to_at) = (start(c.arg(1), &from)?, start(c.arg(3), &to)?);
    let count = c.arg(4).min(MAX_COUNT);
    let end = |at: u64| at.checked_add(count).ok_or(Errno::EOVERFLOW);
    let (from_end, to_end) = (end(from_at)?, end(to_at)?);
    if from.node() == to.node() && from_at < to_end && to_at < from_end {
        return Err(Errno::EINVAL);
    }
    let count = count.min(super::files::may_grow(c.task, to_at)?);
    let mut done = 0;
    while done < count {
        let mut buffer = match buffer(count - done) {
            Err(_) if done > 0 => break,
            other => other?,
        };
        let moved = from
            .read(&mut buffer, Some(from_at + done))
            .and_then(|got| to.write(buffer.get(..got).unwrap_or_default(), Some(to_at + done)));
        match moved {
            Ok(0) => break,
            Ok(taken) => done += taken as u64,
            Err(e) if done == 0 => return Err(e),
            Err(_) => break,
        }
        if task::breathe().is_err() {
            break;
        }
    }
    for (place, file, at) in [(c.arg(1), &from, from_at), (c.arg(3), &to, to_at)] {
        match place {
            0 => *file.offset.lock() = at + done,
            place => put_words(place, &[at + done])?,
        }
    }
    Ok(done)
}

/// sendfile(2).
pub fn sendfile(c: &Call<'_>) -> Result {
    let to = c.task.file(c.int(0))?;
    let from = c.task.file(c.int(1))?;
    if !from.may_read() || !to.may_write() {
        return Err(Errno::EBADF);
    }
    if !matches!(from.kind, Kind::Regular(..)) {
        return Err(Errno::EINVAL);
    }
    let place = c.arg(2);
    let start = if place == 0 {
        *from.offset.lock()
    } else {
        offset(get_u64(place)?)?
    };
    let count = c.arg(3).min(MAX_COUNT);
    let mut done = 0;
    let mut result = Ok(());
    'all: while done < count {
        let mut buffer = match buffer(count - done) {
            Err(e) => {
                result = Err(e);
                break;
            }
            Ok(buffer) => buffer,
        };
        let got = match from.read(&mut buffer, Some(start.saturating_add(done))) {
            Ok(0) => break,
            Ok(got) => got,
            Err(e) => {
                result = Err(e);
                break;
            }
        };
        let mut sent = 0;
        // What the other side does not take stays in the file: only what went counts.
        while sent < got {
            match to.write(buffer.get(sent..got).unwrap_or_default(), None) {
                Ok(0) => break 'all,
                Ok(taken) => {
                    sent += taken;
                    done += taken as u64;
                }
                Err(e) => {
                    result = Err(e);
                    break 'all;
                }
            }
        }
        if task::breathe().is_err() {
            break;
        }
    }
    if done == 0 {
        result?;
    }
    if place == 0 {
        *from.offset.lock() = start + done;
    } else {
        put_words(place, &[start + done])?;
    }
    Ok(done)
}

/// Waits until `ready` gives something, if it may.
fn until<T>(wait: bool, mut ready: impl FnMut() -> Option<T>) -> Result<T> {
    if wait {
        task::wait_for(task::FILES, ready)
    } else {
        ready().ok_or(Errno::EAGAIN)
    }
}

/// Where a file is read or written: at the offset that the program has, or at its own.
fn place(at: u64) -> Result<Option<u64>> {
    if at == 0 {
        return Ok(None);
    }
    get_u64(at).and_then(offset).map(Some)
}

fn advance(at: u64, from: Option<u64>, count: usize) -> Result<()> {
    match from {
        Some(from) => put_words(at, &[from + count as u64]),
        None => Ok(()),
    }
}

/// Out of a pipe: what the other side does not take stays in it.
fn out_of(pipe: &Pipe, wait: bool, to: &File, len: usize, at: Option<u64>) -> Result<usize> {
    let bytes = until(wait, || {
        let bytes = pipe.peek(len);
        (!bytes.is_empty() || !pipe.has_writers()).then_some(bytes)
    })?;
    if bytes.is_empty() {
        return Ok(0);
    }
    let count = match &to.kind {
        // No more than fits: the rest would wait with both.
        Kind::Pipe(other, End::Write | End::Both) => {
            let room = until(wait && to.waits(), || match other.room() {
                Some(0) => None,
                room => Some(room),
            })?;
            let fits = room.ok_or(Errno::EPIPE)?.min(bytes.len());
            other.write(bytes.get(..fits).unwrap_or_default(), false)?
        }
        _ => to.write(&bytes, at)?,
    };
    pipe.skip(count);
    Ok(count)
}

/// Into a pipe: no more than it has room for is taken.
fn into(pipe: &Pipe, wait: bool, from: &File, len: usize, at: Option<u64>) -> Result<usize> {
    let room = until(wait, || match pipe.room() {
        Some(0) => None,
        room => Some(room),
    })?;
    let room = room.ok_or(Errno::EPIPE)?.min(len);
    let mut buffer = buffer(room as u64)?;
    let count = from.read(&mut buffer, at)?;
    pipe.write(buffer.get(..count).unwrap_or_default(), false)
}

/// splice(2): one side is a pipe.
pub fn splice(c: &Call<'_>) -> Result {
    const NONBLOCK: u32 = 2;
    const KNOWN: u32 = 15;
    let (from, to) = (c.task.file(c.int(0))?, c.task.file(c.int(2))?);
    let (from_at, to_at) = (c.arg(1), c.arg(3));
    if c.uint(5) & !KNOWN != 0 {
        return Err(Errno::EINVAL);
    }
    let len = c.arg(4).min(CHUNK as u64) as usize;
    if len == 0 {
        return Ok(0);
    }
    let wait = c.uint(5) & NONBLOCK == 0;
    if let (Kind::Pipe(a, _), Kind::Pipe(b, _)) = (&from.kind, &to.kind)
        && a.number() == b.number()
    {
        return Err(Errno::EINVAL);
    }
    if !from.may_read() || !to.may_write() {
        return Err(Errno::EBADF);
    }
    const APPEND: u32 = crate::fs::file::flag::APPEND;
    let directory = [&from, &to]
        .iter()
        .any(|f| matches!(f.kind, Kind::Directory(..)));
    if directory || to.flags() & APPEND != 0 {
        return Err(Errno::EINVAL);
    }
    let count = match (&from.kind, &to.kind) {
        (Kind::Pipe(..), _) if from_at != 0 => return Err(Errno::ESPIPE),
        (_, Kind::Pipe(..)) if to_at != 0 => return Err(Errno::ESPIPE),
        (Kind::Pipe(pipe, End::Read | End::Both), _) => {
            let at = place(to_at)?;
            let count = out_of(pipe, wait && from.waits(), &to, len, at)?;
            advance(to_at, at, count)?;
            count
        }
        (_, Kind::Pipe(pipe, End::Write | End::Both)) => {
            let at = place(from_at)?;
            let count = into(pipe, wait && to.waits(), &from, len, at)?;
            advance(from_at, at, count)?;
            count
        }
        (Kind::Pipe(..), _) | (_, Kind::Pipe(..)) => return Err(Errno::EBADF),
        _ => return Err(Errno::EINVAL),
    };
    Ok(count as u64)
}

/// tee(2): both sides are pipes, and the first keeps what it has.
pub fn tee(c: &Call<'_>) -> Result {
    const NONBLOCK: u32 = 2;
    let (from, to) = (c.task.file(c.int(0))?, c.task.file(c.int(1))?);
    let (Kind::Pipe(source, End::Read), Kind::Pipe(pipe, End::Write)) = (&from.kind, &to.kind)
    else {
        return Err(Errno::EINVAL);
    };
    let wait = c.uint(3) & NONBLOCK == 0;
    if source.number() == pipe.number() {
        return Err(Errno::EINVAL);
    }
    let len = c.arg(2).min(CHUNK as u64) as usize;
    let bytes = until(wait && from.waits(), || {
        let bytes = source.peek(len);
        (!bytes.is_empty() || len == 0 || !source.has_writers()).then_some(bytes)
    })?;
    let room = until(wait && to.waits(), || match pipe.room() {
        Some(0) => None,
        room => Some(room),
    })?;
    let fits = room.ok_or(Errno::EPIPE)?.min(bytes.len());
    let count = pipe.write(bytes.get(..fits).unwrap_or_default(), false)?;
    Ok(count as u64)
}
