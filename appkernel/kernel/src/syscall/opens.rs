//! Opening files by paths.

use alloc::sync::Arc;

use appkernel_core::errno::Errno;
use appkernel_hal::sync::Mutex;

use super::paths::{CWD, base, changes};
use super::{Call, Result, get_path};
use crate::fs::dev::Special;
use crate::fs::file::{File, Kind, flag};
use crate::fs::fuse::Change;
use crate::fs::node::{Node, kind};
use crate::fs::pipe::End;
use crate::fs::watch::{self, event};
use crate::fs::{self, Found, Place, pty};
use crate::task::may;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    let a = |i| c.arg(i);
    Some(match c.number {
        2 => open(c, CWD, a(0), c.uint(1), c.uint(2)),
        257 => open(c, c.int(0), a(1), c.uint(2), c.uint(3)),
        85 => open(
            c,
            CWD,
            a(0),
            flag::CREATE | flag::WRITE_ONLY | flag::TRUNCATE,
            c.uint(1),
        ),
        437 => open_how(c),
        _ => return None,
    })
}

/// openat2(2), but for the ways to restrict the walk: programs that want these go on without them
/// where there is no such call.
fn open_how(c: &Call<'_>) -> Result {
    const FIRST: u64 = 24;
    const RESOLVE: u64 = 0x3f;
    const TMPFILE: u64 = 0o20_000_000;
    const KNOWN: u64 = 0o37_777_703;
    let size = c.arg(3);
    if size < FIRST {
        return Err(Errno::EINVAL);
    }
    if size > 4096 {
        return Err(Errno::E2BIG);
    }
    let mut bytes = alloc::vec![0; size as usize];
    appkernel_hal::usercopy::read(&mut bytes, c.arg(2)).map_err(|_| Errno::EFAULT)?;
    if bytes.iter().skip(FIRST as usize).any(|b| *b != 0) {
        return Err(Errno::E2BIG);
    }
    let word = |i: usize| {
        let part = bytes.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok());
        part.map_or(0, u64::from_le_bytes)
    };
    let (flags, mode, resolve) = (word(0), word(1), word(2));
    let makes = flags & (u64::from(flag::CREATE) | TMPFILE) != 0;
    if flags & !KNOWN != 0 || resolve & !RESOLVE != 0 || mode & !0o7777 != 0 || mode != 0 && !makes
    {
        return Err(Errno::EINVAL);
    }
    if resolve != 0 {
        return Err(Errno::ENOSYS);
    }
    open(c, c.int(0), c.arg(1), flags as u32, mode as u32)
}

fn open(c: &Call<'_>, dir: i32, address: u64, flags: u32, mode: u32) -> Result {
    const TMPFILE: u32 = 0o20_000_000;
    let path = get_path(address)?;
    if flags & TMPFILE != 0 && flags & flag::PATH == 0 {
        return open_nameless(c, &base(c, dir, &path)?, &path, flags, mode);
    }
    let follow = flags & flag::NOFOLLOW == 0
        && flags & (flag::CREATE | flag::EXCLUSIVE) != flag::CREATE | flag::EXCLUSIVE;
    let place = fs::walk(&c.task.container, &base(c, dir, &path)?, &path, follow)?;
    let (kind, path) = match &place.found {
        None if flags & flag::CREATE == 0 => return Err(Errno::ENOENT),
        None if place.slash => return Err(Errno::EISDIR),
        None => {
            changes(c, &place)?;
            let umask = c.task.place.lock().umask;
            let owner = c.task.credentials.lock().owner();
            let (node, handle) =
                place
                    .directory
                    .create(&place.name, mode & 0o7777 & !umask, owner)?;
            // What is open for reading only can be changed by no call.
            let handle = if flags & flag::ACCESS == 0 {
                node.close(handle);
                None
            } else {
                Some(handle)
            };
            (Kind::Regular(node, handle), place.path())
        }
        Some(_) if flags & flag::CREATE != 0 && flags & flag::EXCLUSIVE != 0 => {
            return Err(Errno::EEXIST);
        }
        Some(found) => {
            let kind = open_found(c, &place, found, flags)?;
            let again = match &found.node {
                Node::Proc(entry) if flags & (flag::PATH | flag::NOFOLLOW) == 0 => {
                    entry.open_file()
                }
                _ => None,
            };
            // An open file that is opened again is where it was, not in /proc.
            (
                kind,
                again.map_or_else(|| found.path.clone(), |file| file.path.clone()),
            )
        }
    };
    let is_directory = matches!(kind, Kind::Directory(..));
    if flags & flag::PATH == 0 {
        if place.found.is_none() {
            watch::tell(&path, event::CREATE, false);
        } else if flags & flag::TRUNCATE != 0 {
            watch::tell(&path, event::MODIFY, false);
        }
        watch::tell(&path, event::OPEN, is_directory);
    }
    let kept = flags & !(flag::CREATE | flag::EXCLUSIVE | flag::TRUNCATE | flag::CLOEXEC);
    let file = Arc::new(File::at(kind, kept, path));
    let fd = c
        .task
        .files()
        .lock()
        .insert(file, 0, flags & flag::CLOEXEC != 0)?;
    Ok(fd as u64)
}

/// `O_TMPFILE`: a file without a name in a directory.
fn open_nameless(c: &Call<'_>, base: &[u8], path: &[u8], flags: u32, mode: u32) -> Result {
    if flags & (flag::DIRECTORY | flag::CREATE) != flag::DIRECTORY || flags & flag::ACCESS == 0 {
        return Err(Errno::EINVAL);
    }
    let follow = flags & flag::NOFOLLOW == 0;
    let found = fs::resolve(&c.task.container, base, path, follow)?;
    if !found.node.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    if found.read_only {
        return Err(Errno::EROFS);
    }
    let credentials = c.task.credentials.lock().clone();
    let wanted = may::WRITE | may::EXECUTE;
    if !credentials.files_root() && !credentials.may(&found.node.attributes()?, wanted) {
        return Err(Errno::EACCES);
    }
    let umask = c.task.place.lock().umask;
    let exclusive = flags & flag::EXCLUSIVE != 0;
    let permissions = mode & 0o7777 & !umask;
    let (node, handle) = found
        .node
        .create_nameless(permissions, exclusive, credentials.owner())?;
    let number = node.identity().1;
    let name = alloc::format!("/#{number} (deleted)").into_bytes();
    let directory = if found.path == b"/" {
        &[]
    } else {
        &found.path[..]
    };
    let made = [directory, &name].concat();
    let kept = flags & !(flag::CREATE | flag::EXCLUSIVE | flag::TRUNCATE | flag::CLOEXEC);
    let file = Arc::new(File::at(Kind::Regular(node, Some(handle)), kept, made));
    let files = c.task.files();
    let fd = files.lock().insert(file, 0, flags & flag::CLOEXEC != 0)?;
    Ok(fd as u64)
}

fn open_found(c: &Call<'_>, place: &Place, found: &Found, flags: u32) -> Result<Kind> {
    let node = found.node.clone();
    if flags & flag::PATH != 0 {
        return Ok(if node.is_directory() {
            Kind::Directory(node, Mutex::new(None))
        } else {
            Kind::Regular(node, None)
        });
    }
    if let Node::Proc(entry) = &node
        && let Some(file) = entry.open_file()
        && flags & flag::NOFOLLOW == 0
    {
        return open_again(c, &file, flags);
    }
    if node.is_link() {
        return Err(Errno::ELOOP);
    }
    let access = flags & flag::ACCESS;
    let mut wanted = match access {
        0 => may::READ,
        flag::WRITE_ONLY => may::WRITE,
        _ => may::READ | may::WRITE,
    };
    if flags & flag::TRUNCATE != 0 {
        wanted |= may::WRITE;
    }
    let writes = wanted & may::WRITE != 0;
    let credentials = c.task.credentials.lock().clone();
    if !credentials.files_root() && !credentials.may(&node.attributes()?, wanted) {
        return Err(Errno::EACCES);
    }
    const NOATIME: u32 = 0o1_000_000;
    if flags & NOATIME != 0 && !credentials.owns(&node.attributes()?) {
        return Err(Errno::EPERM);
    }
    match node.kind() {
        kind::DIRECTORY if writes || flags & flag::CREATE != 0 => Err(Errno::EISDIR),
        kind::DIRECTORY => Ok(Kind::Directory(node, Mutex::new(None))),
        _ if place.slash || flags & flag::DIRECTORY != 0 => Err(Errno::ENOTDIR),
        kind::REGULAR => {
            if writes && found.read_only {
                return Err(Errno::EROFS);
            }
            let handle = if writes {
                Some(node.open_for_writing()?)
            } else {
                None
            };
            if flags & flag::TRUNCATE != 0 {
                node.change(&Change {
                    size: Some(0),
                    ..Change::default()
                })?;
            }
            Ok(Kind::Regular(node, handle))
        }
        // Device files of an image are its own numbers, but the kernel's devices.
        kind::CHARACTER => special(c, &node, flags),
        kind::FIFO => fs::pipe::open_fifo(&node, access, flags & flag::NONBLOCK == 0),
        _ => Err(Errno::ENXIO),
    }
}

/// /dev/stdout and the like: the same pipe, terminal or socket again.
fn open_again(c: &Call<'_>, file: &Arc<File>, flags: u32) -> Result<Kind> {
    let end = match flags & flag::ACCESS {
        0 => End::Read,
        flag::WRITE_ONLY => End::Write,
        _ => End::Both,
    };
    Ok(match &file.kind {
        Kind::Pipe(pipe, _) => {
            pipe.open(end);
            Kind::Pipe(Arc::clone(pipe), end)
        }
        Kind::Object(object) if object.mode() & kind::MASK == kind::SOCKET => {
            return Err(Errno::ENXIO);
        }
        Kind::Object(object) => Kind::Object(Arc::clone(object)),
        Kind::Console => Kind::Console,
        Kind::Device(device) => Kind::Device(*device),
        Kind::Regular(node, _) => {
            let wanted = match end {
                End::Read => may::READ,
                End::Write => may::WRITE,
                End::Both => may::READ | may::WRITE,
            };
            let credentials = c.task.credentials.lock().clone();
            if !credentials.files_root() && !credentials.may(&node.attributes()?, wanted) {
                return Err(Errno::EACCES);
            }
            let handle = match end {
                End::Read => None,
                _ if c.task.container.is_read_only(&file.path) => return Err(Errno::EROFS),
                _ => Some(node.open_for_writing()?),
            };
            if flags & flag::TRUNCATE != 0 && handle.is_some() {
                node.change(&Change {
                    size: Some(0),
                    ..Change::default()
                })?;
            }
            Kind::Regular(node.clone(), handle)
        }
        Kind::Directory(node, _) => Kind::Directory(node.clone(), Mutex::new(None)),
    })
}

fn special(c: &Call<'_>, node: &Node, flags: u32) -> Result<Kind> {
    const NOCTTY: u32 = 0o400;
    let rdev = node.attributes()?.rdev;
    match Special::of(rdev).ok_or(Errno::ENXIO)? {
        Special::Device(device) => Ok(Kind::Device(device)),
        Special::Console => Ok(Kind::Console),
        Special::Tty if c.task.container.number == 0 => Ok(Kind::Console),
        Special::Tty => {
            let session = c.task.links.lock().session;
            Ok(Kind::Object(
                pty::of_session(session).ok_or(Errno::ENXIO)?.open(),
            ))
        }
        Special::Ptmx => {
            let master = pty::Master::new()?;
            if let Some((Node::Memory(pts), _)) = c.task.container.mount_at(b"/dev/pts") {
                let owner = c.task.credentials.lock().owner();
                fs::dev::add_terminal(&pts, master.pty().number, owner);
            }
            Ok(Kind::Object(Arc::new(master)))
        }
        Special::Pts(number) => {
            let pty = pty::find(number).ok_or(Errno::ENXIO)?;
            let session = c.task.links.lock().session;
            if flags & NOCTTY == 0 && session == c.task.process {
                pty.take_over(session);
            }
            Ok(Kind::Object(pty.open()))
        }
    }
}
