//! Calls that name files by paths.

use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::Attributes;
use appkernel_hal::clock;

use super::{Call, Result, get_path, put};
use crate::fs::dev::Special;
use crate::fs::file::{File, Kind};
use crate::fs::fuse::Change;
use crate::fs::node::{Node, kind};
use crate::fs::watch::{self, event};
use crate::fs::{self, Found, Place};
use crate::task::may;

pub(super) const CWD: i32 = -100;
pub(super) const AT_SYMLINK_NOFOLLOW: u32 = 0x100;
const AT_REMOVEDIR: u32 = 0x200;
pub(super) const AT_EMPTY_PATH: u32 = 0x1000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    let a = |i| c.arg(i);
    Some(match c.number {
        4 => stat_path(c, CWD, a(0), a(1), 0),
        6 => stat_path(c, CWD, a(0), a(1), AT_SYMLINK_NOFOLLOW),
        5 => stat_file(c, c.int(0), a(1)),
        262 if c.uint(3) & !(AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH | 0x800) != 0 => {
            Err(Errno::EINVAL)
        }
        262 => stat_path(c, c.int(0), a(1), a(2), c.uint(3)),
        21 => access(c, CWD, a(0), c.uint(1), 0),
        269 => access(c, c.int(0), a(1), c.uint(2), 0),
        439 => access(c, c.int(0), a(1), c.uint(2), c.uint(3)),
        79 => getcwd(c),
        80 => chdir(c),
        161 => chroot(c),
        81 => fchdir(c),
        82 => rename(c, (CWD, a(0)), (CWD, a(1)), 0),
        264 => rename(c, (c.int(0), a(1)), (c.int(2), a(3)), 0),
        316 if c.uint(4) & !(NOREPLACE | EXCHANGE) == 0 && c.uint(4) != NOREPLACE | EXCHANGE => {
            rename(c, (c.int(0), a(1)), (c.int(2), a(3)), c.uint(4))
        }
        316 => Err(Errno::EINVAL),
        133 => mknod(c, CWD, a(0), c.uint(1), c.uint(2)),
        259 => mknod(c, c.int(0), a(1), c.uint(2), c.uint(3)),
        332 => statx(c),
        83 => mkdir(c, CWD, a(0), c.uint(1)),
        258 => mkdir(c, c.int(0), a(1), c.uint(2)),
        84 => unlink(c, CWD, a(0), true),
        87 => unlink(c, CWD, a(0), false),
        263 if c.uint(2) & !AT_REMOVEDIR != 0 => Err(Errno::EINVAL),
        263 => unlink(c, c.int(0), a(1), c.uint(2) & AT_REMOVEDIR != 0),
        86 => link(c, (CWD, a(0)), (CWD, a(1)), 0),
        265 => link(c, (c.int(0), a(1)), (c.int(2), a(3)), c.uint(4)),
        88 => symlink(c, a(0), CWD, a(1)),
        266 => symlink(c, a(0), c.int(1), a(2)),
        89 => readlink(c, CWD, a(0), a(1), a(2)),
        267 => readlink(c, c.int(0), a(1), a(2), a(3)),
        76 => truncate(c),
        95 => {
            let mut place = c.task.place.lock();
            Ok(core::mem::replace(&mut place.umask, c.uint(0) & 0o777).into())
        }
        137 | 138 => statfs(c),
        _ => return None,
    })
}

/// The directory that a relative path starts from.
pub(super) fn base(c: &Call<'_>, dir: i32, path: &[u8]) -> Result<Vec<u8>> {
    if path.is_empty() {
        return Err(Errno::ENOENT);
    }
    if dir == CWD || path.starts_with(b"/") {
        return Ok(c.task.place.lock().cwd.clone());
    }
    let file = c.task.file(dir)?;
    match &file.kind {
        Kind::Directory(..) => Ok(file.path.clone()),
        _ => Err(Errno::ENOTDIR),
    }
}

/// Walks to a file that is there.
pub(super) fn resolve(c: &Call<'_>, dir: i32, address: u64, follow: bool) -> Result<Found> {
    let path = get_path(address)?;
    fs::resolve(&c.task.container, &base(c, dir, &path)?, &path, follow)
}

/// Walks to a name that is made, taken away or changed: its directory must allow that.
pub(super) fn walk(c: &Call<'_>, dir: i32, address: u64) -> Result<Place> {
    let path = get_path(address)?;
    fs::walk(&c.task.container, &base(c, dir, &path)?, &path, false)
}

/// Whether the caller may change what is in the directory.
pub(super) fn changes(c: &Call<'_>, place: &Place) -> Result<()> {
    let directory = place.writable()?;
    let credentials = c.task.credentials.lock().clone();
    if !credentials.files_root()
        && !credentials.may(&directory.attributes()?, may::WRITE | may::EXECUTE)
    {
        return Err(Errno::EACCES);
    }
    Ok(())
}

/// In a directory with the sticky bit only owners take names away.
fn removes(c: &Call<'_>, place: &Place) -> Result<()> {
    const STICKY: u32 = 0o1000;
    changes(c, place)?;
    let credentials = c.task.credentials.lock().clone();
    if credentials.is_root() {
        return Ok(());
    }
    let directory = place.directory.attributes()?;
    if directory.mode & STICKY != 0
        && !credentials.owns(&directory)
        && let Some(found) = &place.found
        && !credentials.owns(&found.node.attributes()?)
    {
        return Err(Errno::EPERM);
    }
    Ok(())
}

/// Attributes of what is no file of a file system.
fn special_attributes(file: &File) -> Attributes {
    let now = clock::realtime_ns();
    let time = (now / 1_000_000_000, (now % 1_000_000_000) as u32);
    let (mode, rdev) = file.special();
    Attributes {
        ino: rdev.into(),
        mode,
        nlink: 1,
        rdev,
        block_size: 4096,
        times: [time; 3],
        ..Attributes::default()
    }
}

fn put_stat(address: u64, a: &Attributes, device: u64) -> Result {
    let mut words = [0u64; 18];
    words[0] = device;
    words[1] = a.ino;
    words[2] = a.nlink.into();
    words[3] = u64::from(a.mode) | u64::from(a.uid) << 32;
    words[4] = a.gid.into();
    words[5] = a.rdev.into();
    words[6] = a.size;
    words[7] = a.block_size.into();
    words[8] = a.blocks;
    for (pair, (seconds, ns)) in words[9..15].chunks_exact_mut(2).zip(a.times) {
        pair[0] = seconds;
        pair[1] = ns.into();
    }
    super::put_words(address, &words)?;
    Ok(0)
}

/// Device number that `stat` shows of what is on no file system.
const OWN: u64 = 0x5;

fn stat_path(c: &Call<'_>, dir: i32, path: u64, to: u64, flags: u32) -> Result {
    let (attributes, device) = attributes_of(c, dir, path, flags)?;
    put_stat(to, &attributes, device)
}

/// Attributes and device of what a path or, with `AT_EMPTY_PATH`, a file leads to.
fn attributes_of(c: &Call<'_>, dir: i32, path: u64, flags: u32) -> Result<(Attributes, u64)> {
    let of = |node: &Node| Ok((node.attributes()?, node.identity().0));
    if flags & AT_EMPTY_PATH != 0 && (path == 0 || super::get::<1>(path) == Ok([0])) {
        if dir == CWD {
            let cwd = c.task.place.lock().cwd.clone();
            return of(&fs::resolve(&c.task.container, b"/", &cwd, true)?.node);
        }
        return attributes_of_file(c, &*c.task.file(dir)?);
    }
    let found = resolve(c, dir, path, flags & AT_SYMLINK_NOFOLLOW == 0)?;
    if let Node::Proc(entry) = &found.node
        && flags & AT_SYMLINK_NOFOLLOW == 0
        && let Some(file) = entry.open_file()
    {
        return attributes_of_file(c, &file);
    }
    of(&found.node)
}

fn stat_file(c: &Call<'_>, fd: i32, to: u64) -> Result {
    let (attributes, device) = attributes_of_file(c, &*c.task.file(fd)?)?;
    put_stat(to, &attributes, device)
}

fn attributes_of_file(c: &Call<'_>, file: &File) -> Result<(Attributes, u64)> {
    if let Some(node) = file.node() {
        return Ok((node.attributes()?, node.identity().0));
    }
    // A terminal is the file under /dev/pts: programs find its name by comparing the two.
    let (_, rdev) = file.special();
    if rdev != 0
        && matches!(file.kind, Kind::Object(_))
        && let Ok(found) = fs::resolve(&c.task.container, b"/", &file.name(), true)
        && let Ok(attributes) = found.node.attributes()
        && attributes.rdev == rdev
    {
        return Ok((attributes, found.node.identity().0));
    }
    Ok((special_attributes(file), OWN))
}

/// statx(2).
fn statx(c: &Call<'_>) -> Result {
    const BASIC: u32 = 0x7ff;
    let (a, device) = attributes_of(c, c.int(0), c.arg(1), c.uint(2))?;
    let mut bytes = [0u8; 256];
    let mut put32 = |at: usize, value: u32| {
        if let Some(slot) = bytes.get_mut(at..at + 4) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
    };
    put32(0, BASIC);
    put32(4, a.block_size);
    put32(16, a.nlink);
    put32(20, a.uid);
    put32(24, a.gid);
    put32(28, a.mode & 0xffff);
    for (at, value) in [(32, a.ino), (40, a.size), (48, a.blocks)] {
        put32(at, value as u32);
        put32(at + 4, (value >> 32) as u32);
    }
    // Access, (birth is not known), change, modification.
    for (at, (seconds, ns)) in [(64, a.times[0]), (96, a.times[2]), (112, a.times[1])] {
        put32(at, seconds as u32);
        put32(at + 4, (seconds >> 32) as u32);
        put32(at + 8, ns);
    }
    put32(128, a.rdev >> 8 & 0xfff);
    put32(132, a.rdev & 0xff | a.rdev >> 12 & 0xfff00);
    put32(136, 0);
    put32(140, device as u32);
    put(c.arg(4), &bytes)?;
    Ok(0)
}

fn access(c: &Call<'_>, dir: i32, path: u64, mode: u32, flags: u32) -> Result {
    const EXECUTE: u32 = 1;
    if mode & !7 != 0 {
        return Err(Errno::EINVAL);
    }
    const EFFECTIVE: u32 = 0x200;
    const WRITE: u32 = 2;
    if flags & !(EFFECTIVE | AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH) != 0 {
        return Err(Errno::EINVAL);
    }
    let mut credentials = c.task.credentials.lock().clone();
    if flags & EFFECTIVE == 0 {
        (credentials.euid, credentials.egid) = (credentials.uid, credentials.gid);
        (credentials.fsuid, credentials.fsgid) = (credentials.uid, credentials.gid);
    }
    let text = get_path(path)?;
    let found = if text.is_empty() && flags & AT_EMPTY_PATH != 0 {
        let file = c.task.file(dir)?;
        let node = file.node().ok_or(Errno::EACCES)?.clone();
        Found {
            path: file.path.clone(),
            node,
            read_only: false,
        }
    } else {
        let base = base(c, dir, &text)?;
        let follow = flags & AT_SYMLINK_NOFOLLOW == 0;
        let place = fs::walk_as(&c.task.container, &base, &text, follow, &credentials)?;
        fs::found_at(place)?
    };
    let stored = matches!(
        found.node.kind(),
        kind::REGULAR | kind::DIRECTORY | kind::LINK
    );
    if mode & WRITE != 0 && found.read_only && stored {
        return Err(Errno::EROFS);
    }
    if mode & EXECUTE != 0 || !credentials.files_root() {
        let attributes = found.node.attributes()?;
        if !credentials.may(&attributes, mode) {
            return Err(Errno::EACCES);
        }
    }
    Ok(0)
}

fn getcwd(c: &Call<'_>) -> Result {
    let mut cwd = {
        let place = c.task.place.lock();
        let inside = place.cwd.strip_prefix(&place.root[..]);
        match inside {
            Some(b"") => b"/".to_vec(),
            Some(inside) => inside.to_vec(),
            None => [b"(unreachable)", &place.cwd[..]].concat(),
        }
    };
    cwd.push(0);
    if (cwd.len() as u64) > c.arg(1) {
        return Err(Errno::ERANGE);
    }
    put(c.arg(0), &cwd)?;
    Ok(cwd.len() as u64)
}

fn chdir(c: &Call<'_>) -> Result {
    let found = resolve(c, CWD, c.arg(0), true)?;
    if !found.node.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    if found.path.len() >= fs::PATH_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    searches(c, &found.node)?;
    c.task.place.lock().cwd = found.path;
    Ok(0)
}

/// Whether the caller may go into a directory.
fn searches(c: &Call<'_>, node: &Node) -> Result<()> {
    let credentials = c.task.credentials.lock().clone();
    if credentials.files_root() || credentials.may(&node.attributes()?, may::EXECUTE) {
        return Ok(());
    }
    Err(Errno::EACCES)
}

/// chroot(2): paths of the process start there.
fn chroot(c: &Call<'_>) -> Result {
    let found = resolve(c, CWD, c.arg(0), true)?;
    if !found.node.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    searches(c, &found.node)?;
    if !c.task.credentials.lock().is_root() {
        return Err(Errno::EPERM);
    }
    let root = if found.path == b"/" {
        alloc::vec::Vec::new()
    } else {
        found.path
    };
    c.task.place.lock().root = root;
    Ok(0)
}

fn fchdir(c: &Call<'_>) -> Result {
    let file = c.task.file(c.int(0))?;
    if !matches!(file.kind, Kind::Directory(..)) {
        return Err(Errno::ENOTDIR);
    }
    if let Some(node) = file.node() {
        searches(c, node)?;
    }
    c.task.place.lock().cwd = file.path.clone();
    Ok(0)
}

/// As renameat2 has it.
const NOREPLACE: u32 = 1;
const EXCHANGE: u32 = 2;

fn rename(c: &Call<'_>, from: (i32, u64), to: (i32, u64), flags: u32) -> Result {
    let from = walk(c, from.0, from.1)?;
    let to = walk(c, to.0, to.1)?;
    let node = &from.found.as_ref().ok_or(Errno::ENOENT)?.node;
    let busy =
        |place: &Place| place.name.is_empty() || c.task.container.mount_at(&place.path()).is_some();
    if busy(&from) || busy(&to) {
        return Err(Errno::EBUSY);
    }
    if (from.slash || to.slash) && !node.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    if flags & NOREPLACE != 0 && to.found.is_some() {
        return Err(Errno::EEXIST);
    }
    if flags & EXCHANGE != 0 && to.found.is_none() {
        return Err(Errno::ENOENT);
    }
    removes(c, &from)?;
    removes(c, &to)?;
    // Never below itself: the tree would come loose.
    let mut below = from.path();
    below.push(b'/');
    if to.path().starts_with(&below) {
        return Err(Errno::EINVAL);
    }
    if flags & EXCHANGE != 0 {
        let mut below = to.path();
        below.push(b'/');
        if from.path().starts_with(&below) {
            return Err(Errno::EINVAL);
        }
        let there = to.found.as_ref().is_some_and(|f| f.node.is_directory());
        from.directory
            .exchange(&from.name, &to.directory, &to.name)?;
        watch::moved(&from.path(), &to.path(), node.is_directory());
        watch::moved(&to.path(), &from.path(), there);
        return Ok(0);
    }
    from.directory.rename(&from.name, &to.directory, &to.name)?;
    watch::moved(&from.path(), &to.path(), node.is_directory());
    Ok(0)
}

fn mkdir(c: &Call<'_>, dir: i32, path: u64, mode: u32) -> Result {
    let place = walk(c, dir, path)?;
    if place.found.is_some() {
        return Err(Errno::EEXIST);
    }
    changes(c, &place)?;
    let umask = c.task.place.lock().umask;
    let owner = c.task.credentials.lock().owner();
    place
        .directory
        .make_directory(&place.name, mode & 0o1777 & !umask, owner)?;
    watch::tell(&place.path(), event::CREATE, true);
    Ok(0)
}

fn mknod(c: &Call<'_>, dir: i32, path: u64, mode: u32, device: u32) -> Result {
    let place = walk(c, dir, path)?;
    if place.found.is_some() {
        return Err(Errno::EEXIST);
    }
    changes(c, &place)?;
    let umask = c.task.place.lock().umask;
    let owner = c.task.credentials.lock().owner();
    let permissions = mode & 0o7777 & !umask;
    match mode & kind::MASK {
        0 | kind::REGULAR => {
            let (node, handle) = place.directory.create(&place.name, permissions, owner)?;
            node.close(handle);
        }
        special @ (kind::FIFO | kind::SOCKET) => {
            place
                .directory
                .make_special(&place.name, special | permissions, 0, owner)?;
        }
        kind::CHARACTER if c.task.credentials.lock().is_root() => {
            // The kernel's own devices only; and no terminals: they may be another container's.
            if !matches!(Special::of(device), Some(Special::Device(_) | Special::Tty)) {
                return Err(Errno::EPERM);
            }
            place.directory.make_special(
                &place.name,
                kind::CHARACTER | permissions,
                device,
                owner,
            )?;
        }
        _ => return Err(Errno::EPERM),
    }
    watch::tell(&place.path(), event::CREATE, false);
    Ok(0)
}

fn unlink(c: &Call<'_>, dir: i32, path: u64, directory: bool) -> Result {
    let place = walk(c, dir, path)?;
    if directory {
        let given = get_path(path)?;
        match given.rsplit(|b| *b == b'/').find(|part| !part.is_empty()) {
            Some(b".") => return Err(Errno::EINVAL),
            Some(b"..") => return Err(Errno::ENOTEMPTY),
            _ => {}
        }
    }
    let node = &place.found.as_ref().ok_or(Errno::ENOENT)?.node;
    if place.name.is_empty() || c.task.container.mount_at(&place.path()).is_some() {
        return Err(Errno::EBUSY);
    }
    match (directory, node.is_directory()) {
        (true, false) => return Err(Errno::ENOTDIR),
        (false, true) => return Err(Errno::EISDIR),
        _ => {}
    }
    removes(c, &place)?;
    place.directory.unlink(&place.name, directory)?;
    watch::gone(&place.path(), directory);
    Ok(0)
}

/// The file that gets one more name.
fn linked(c: &Call<'_>, from: (i32, u64), follow: bool, flags: u32) -> Result<Node> {
    if flags & AT_EMPTY_PATH != 0 && super::get::<1>(from.1) == Ok([0]) {
        let file = c.task.file(from.0)?;
        return file.node().cloned().ok_or(Errno::EXDEV);
    }
    let node = resolve(c, from.0, from.1, follow)?.node;
    if let Node::Proc(entry) = &node
        && follow
        && let Some(file) = entry.open_file()
    {
        return file.node().cloned().ok_or(Errno::EXDEV);
    }
    Ok(node)
}

fn link(c: &Call<'_>, from: (i32, u64), to: (i32, u64), flags: u32) -> Result {
    const AT_SYMLINK_FOLLOW: u32 = 0x400;
    if flags & !(AT_SYMLINK_FOLLOW | AT_EMPTY_PATH) != 0 {
        return Err(Errno::EINVAL);
    }
    let node = linked(c, from, flags & AT_SYMLINK_FOLLOW != 0, flags)?;
    let place = walk(c, to.0, to.1)?;
    if place.found.is_some() {
        return Err(Errno::EEXIST);
    }
    changes(c, &place)?;
    place.directory.link(&place.name, &node)?;
    watch::tell(&place.path(), event::CREATE, false);
    Ok(0)
}

fn symlink(c: &Call<'_>, target: u64, dir: i32, path: u64) -> Result {
    let target = get_path(target)?;
    if target.is_empty() {
        return Err(Errno::ENOENT);
    }
    let place = walk(c, dir, path)?;
    if place.found.is_some() {
        return Err(Errno::EEXIST);
    }
    changes(c, &place)?;
    let owner = c.task.credentials.lock().owner();
    place.directory.make_link(&place.name, &target, owner)?;
    watch::tell(&place.path(), event::CREATE, false);
    Ok(0)
}

fn readlink(c: &Call<'_>, dir: i32, path: u64, to: u64, room: u64) -> Result {
    if room == 0 || room > i32::MAX as u64 {
        return Err(Errno::EINVAL);
    }
    let text = get_path(path)?;
    let node = if text.is_empty() {
        if dir == CWD {
            return Err(Errno::ENOENT);
        }
        c.task.file(dir)?.node().cloned().ok_or(Errno::EINVAL)?
    } else {
        fs::resolve(&c.task.container, &base(c, dir, &text)?, &text, false)?.node
    };
    if !node.is_link() {
        return Err(Errno::EINVAL);
    }
    let target = node.read_link()?;
    let len = target.len().min(room as usize);
    put(to, target.get(..len).unwrap_or_default())?;
    Ok(len as u64)
}

fn truncate(c: &Call<'_>) -> Result {
    let size = c.arg(1);
    if size > i64::MAX.cast_unsigned() {
        return Err(Errno::EINVAL);
    }
    let found = resolve(c, CWD, c.arg(0), true)?;
    if found.node.is_directory() {
        return Err(Errno::EISDIR);
    }
    if found.read_only {
        return Err(Errno::EROFS);
    }
    let credentials = c.task.credentials.lock().clone();
    if !credentials.may(&found.node.attributes()?, may::WRITE) {
        return Err(Errno::EACCES);
    }
    super::files::may_grow(c.task, size.saturating_sub(1))?;
    found.node.change(&Change {
        size: Some(size),
        ..Change::default()
    })?;
    Ok(0)
}

fn statfs(c: &Call<'_>) -> Result {
    let node = if c.number == 138 {
        let file = c.task.file(c.int(0))?;
        file.node().cloned().ok_or(Errno::ENOSYS)?
    } else {
        resolve(c, CWD, c.arg(0), true)?.node
    };
    let [magic, block, blocks, free, files, files_free] = node.statistics()?;
    let words = [
        magic, block, blocks, free, free, files, files_free, 0, 255, block, 0, 0, 0, 0, 0,
    ];
    super::put_words(c.arg(1), &words)?;
    Ok(0)
}
