//! Calls that change what is known of a file: mode, owner, times.

use appkernel_core::errno::Errno;
use appkernel_hal::clock;

use super::paths::{AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, CWD, resolve};
use super::{Call, Result, get_u64};
use crate::fs::file::flag;
use crate::fs::fuse::Change;
use crate::fs::node::Node;
use crate::fs::watch::{self, event};
use crate::task::may;

/// Programs run with the file's group.
const SET_GROUP: u32 = 0o2000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    let a = |i| c.arg(i);
    Some(match c.number {
        90 => chmod(c, CWD, a(0), c.uint(1)),
        268 => chmod(c, c.int(0), a(1), c.uint(2)),
        91 => change_file(
            c,
            &Change {
                mode: Some(c.uint(1) & 0o7777),
                ..Change::default()
            },
        ),
        92 => chown(c, CWD, a(0), (c.uint(1), c.uint(2)), 0),
        94 => chown(c, CWD, a(0), (c.uint(1), c.uint(2)), AT_SYMLINK_NOFOLLOW),
        93 => change_file(c, &owner(c.uint(1), c.uint(2))),
        260 => chown(c, c.int(0), a(1), (c.uint(2), c.uint(3)), c.uint(4)),
        280 => utimens(c),
        132 | 235 => old_times(c, CWD, a(0), a(1)),
        261 => old_times(c, c.int(0), a(1), a(2)),
        _ => return None,
    })
}

fn chmod(c: &Call<'_>, dir: i32, path: u64, mode: u32) -> Result {
    let found = resolve(c, dir, path, true)?;
    let change = Change {
        mode: Some(mode & 0o7777),
        ..Change::default()
    };
    changed(c, (&found.node, &found.path), found.read_only, &change)
}

/// Changes attributes, if the caller may.
fn changed(c: &Call<'_>, (node, path): (&Node, &[u8]), read_only: bool, change: &Change) -> Result {
    if read_only {
        return Err(Errno::EROFS);
    }
    let credentials = c.task.credentials.lock().clone();
    if !credentials.is_root() {
        let attributes = node.attributes()?;
        let gives_away = change.uid.is_some_and(|uid| uid != attributes.uid)
            || change
                .gid
                .is_some_and(|gid| gid != credentials.fsgid && !credentials.groups.contains(&gid));
        if !credentials.owns(&attributes) || gives_away {
            return Err(Errno::EPERM);
        }
    }
    let mut change = *change;
    if let Some(mode) = change.mode
        && !credentials.is_root()
        && !credentials.in_group(node.attributes()?.gid)
    {
        // Nobody gives what they make the rights of a group that is not theirs.
        change.mode = Some(mode & !SET_GROUP);
    }
    node.change(&change)?;
    watch::tell(path, event::ATTRIB, node.is_directory());
    Ok(0)
}

fn owner(uid: u32, gid: u32) -> Change {
    let given = |id| (id != u32::MAX).then_some(id);
    Change {
        uid: given(uid),
        gid: given(gid),
        ..Change::default()
    }
}

fn chown(c: &Call<'_>, dir: i32, path: u64, ids: (u32, u32), flags: u32) -> Result {
    let change = owner(ids.0, ids.1);
    if flags & AT_EMPTY_PATH != 0 && super::get::<1>(path) == Ok([0]) {
        let file = c.task.file(dir)?;
        let node = file.node().ok_or(Errno::EINVAL)?;
        return changed(c, (node, &file.path), false, &change);
    }
    let found = resolve(c, dir, path, flags & AT_SYMLINK_NOFOLLOW == 0)?;
    changed(c, (&found.node, &found.path), found.read_only, &change)
}

fn change_file(c: &Call<'_>, change: &Change) -> Result {
    let file = c.task.used_file(c.int(0))?;
    match file.node() {
        Some(node) => changed(c, (node, &file.path), false, change),
        // Pipes and sockets have no attributes to keep.
        None => Ok(0),
    }
}

fn utimens(c: &Call<'_>) -> Result {
    const NOW: u64 = (1 << 30) - 1;
    const OMIT: u64 = (1 << 30) - 2;
    let now = Some(clock::realtime_ns());
    let time = |at: u64| -> Result<Option<u64>> {
        let ns = get_u64(at + 8)?;
        match ns {
            NOW => Ok(now),
            OMIT => Ok(None),
            0..1_000_000_000 => Ok(Some(
                get_u64(at)?
                    .saturating_mul(1_000_000_000)
                    .saturating_add(ns),
            )),
            _ => Err(Errno::EINVAL),
        }
    };
    let times = c.arg(2);
    let (atime, mtime) = if times == 0 {
        (now, now)
    } else {
        (time(times)?, time(times.wrapping_add(16))?)
    };
    let change = Change {
        atime,
        mtime,
        ..Change::default()
    };
    if c.uint(3) & !(AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH) != 0 {
        return Err(Errno::EINVAL);
    }
    // Nothing to do is done whoever asks.
    let both_now = times == 0 || (get_u64(times + 8)?, get_u64(times + 24)?) == (NOW, NOW);
    if c.arg(1) == 0 {
        let file = c.task.file(c.int(0))?;
        if file.flags() & flag::PATH != 0 {
            return Err(Errno::EBADF);
        }
        return match file.node() {
            Some(node) => set_times(c, (node, &file.path), false, &change, both_now),
            None => Ok(0),
        };
    }
    let found = resolve(c, c.int(0), c.arg(1), c.uint(3) & AT_SYMLINK_NOFOLLOW == 0)?;
    set_times(
        c,
        (&found.node, &found.path),
        found.read_only,
        &change,
        both_now,
    )
}

/// Owners set any time; who may write, the present one.
fn set_times(
    c: &Call<'_>,
    (node, path): (&Node, &[u8]),
    read_only: bool,
    change: &Change,
    both_now: bool,
) -> Result {
    if change.atime.is_none() && change.mtime.is_none() {
        return Ok(0);
    }
    if read_only {
        return Err(Errno::EROFS);
    }
    let credentials = c.task.credentials.lock().clone();
    let attributes = node.attributes()?;
    if !credentials.owns(&attributes) {
        if !both_now {
            return Err(Errno::EPERM);
        }
        if !credentials.may(&attributes, may::WRITE) {
            return Err(Errno::EACCES);
        }
    }
    node.change(change)?;
    watch::tell(path, event::ATTRIB, node.is_directory());
    Ok(0)
}

/// utime, utimes and futimesat: whole seconds, or microseconds.
fn old_times(c: &Call<'_>, dir: i32, path: u64, times: u64) -> Result {
    const SECOND: u64 = 1_000_000_000;
    let mut change = Change {
        atime: Some(clock::realtime_ns()),
        mtime: Some(clock::realtime_ns()),
        ..Change::default()
    };
    if times != 0 {
        let word = |i: u64| get_u64(times.wrapping_add(i * 8));
        let (a, m) = if c.number == 132 {
            ((word(0)?, 0), (word(1)?, 0))
        } else {
            ((word(0)?, word(1)?), (word(2)?, word(3)?))
        };
        if a.1 >= 1_000_000 || m.1 >= 1_000_000 {
            return Err(Errno::EINVAL);
        }
        let ns = |t: (u64, u64)| t.0.saturating_mul(SECOND).saturating_add(t.1 * 1000);
        (change.atime, change.mtime) = (Some(ns(a)), Some(ns(m)));
    }
    let found = resolve(c, dir, path, true)?;
    set_times(
        c,
        (&found.node, &found.path),
        found.read_only,
        &change,
        times == 0,
    )
}
