//! Calls of inotify.

use alloc::sync::Arc;

use appkernel_core::errno::Errno;

use super::paths::{CWD, resolve};
use super::{Call, Result};
use crate::fs::file::{File, Kind, flag};
use crate::fs::watch::{self, Inotify, event};
use crate::task::may;

const NONBLOCK: u32 = 0o4000;
const CLOEXEC: u32 = 0o2_000_000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        253 => make(c, 0),
        294 => make(c, c.uint(0)),
        254 => add(c),
        255 => {
            let number = c.int(1);
            with(c, |inotify| inotify.remove(number).map(|()| 0))
        }
        _ => return None,
    })
}

fn with(c: &Call<'_>, f: impl FnOnce(&Inotify) -> Result) -> Result {
    let file = c.task.file(c.int(0))?;
    f(file.object::<Inotify>().ok_or(Errno::EINVAL)?)
}

fn make(c: &Call<'_>, flags: u32) -> Result {
    if flags & !(NONBLOCK | CLOEXEC) != 0 {
        return Err(Errno::EINVAL);
    }
    let status = if flags & NONBLOCK != 0 {
        flag::NONBLOCK
    } else {
        0
    };
    let file = Arc::new(File::new(Kind::Object(watch::make()?), status));
    let files = c.task.files();
    let fd = files.lock().insert(file, 0, flags & CLOEXEC != 0)?;
    Ok(fd as u64)
}

fn add(c: &Call<'_>) -> Result {
    let mask = c.uint(2);
    let found = resolve(c, CWD, c.arg(1), mask & event::DONT_FOLLOW == 0)?;
    if mask & event::ONLY_DIRECTORY != 0 && !found.node.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    let credentials = c.task.credentials.lock().clone();
    if !credentials.is_root() && !credentials.may(&found.node.attributes()?, may::READ) {
        return Err(Errno::EACCES);
    }
    with(c, |inotify| {
        let number = inotify.add(&found.path, mask)?;
        Ok(u64::from(number.cast_unsigned()))
    })
}
