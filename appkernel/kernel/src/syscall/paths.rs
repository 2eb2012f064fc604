//! Calls that name files by paths.

use alloc::sync::Arc;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::Attributes;
use appkernel_hal::clock;
use appkernel_hal::sync::Mutex;

use super::{Call, Result, get_path, get_u64, put};
use crate::fs::file::{File, Kind, flag};
use crate::fs::fuse::Change;
use crate::fs::{self, Device, Found, Place, What};

const CWD: i32 = -100;
const AT_SYMLINK_NOFOLLOW: u32 = 0x100;
const AT_REMOVEDIR: u32 = 0x200;
const AT_EMPTY_PATH: u32 = 0x1000;

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
        4 => stat_path(c, CWD, a(0), a(1), 0),
        6 => stat_path(c, CWD, a(0), a(1), AT_SYMLINK_NOFOLLOW),
        5 => stat_file(c, c.int(0), a(1)),
        262 => stat_path(c, c.int(0), a(1), a(2), c.uint(3)),
        21 => access(c, CWD, a(0), c.uint(1), 0),
        269 => access(c, c.int(0), a(1), c.uint(2), 0),
        439 => access(c, c.int(0), a(1), c.uint(2), c.uint(3)),
        79 => getcwd(c),
        80 => chdir(c),
        81 => fchdir(c),
        82 => rename(c, (CWD, a(0)), (CWD, a(1))),
        264 => rename(c, (c.int(0), a(1)), (c.int(2), a(3))),
        316 if c.uint(4) == 0 => rename(c, (c.int(0), a(1)), (c.int(2), a(3))),
        316 => Err(Errno::EINVAL),
        83 => mkdir(c, CWD, a(0), c.uint(1)),
        258 => mkdir(c, c.int(0), a(1), c.uint(2)),
        84 => unlink(c, CWD, a(0), true),
        87 => unlink(c, CWD, a(0), false),
        263 => unlink(c, c.int(0), a(1), c.uint(2) & AT_REMOVEDIR != 0),
        86 => link(c, (CWD, a(0)), (CWD, a(1)), 0),
        265 => link(c, (c.int(0), a(1)), (c.int(2), a(3)), c.uint(4)),
        88 => symlink(c, a(0), CWD, a(1)),
        266 => symlink(c, a(0), c.int(1), a(2)),
        89 => readlink(c, CWD, a(0), a(1), a(2)),
        267 => readlink(c, c.int(0), a(1), a(2), a(3)),
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
        76 => truncate(c),
        280 => utimens(c),
        95 => {
            let mut place = c.task.place.lock();
            Ok(core::mem::replace(&mut place.umask, c.uint(0) & 0o777).into())
        }
        137 => statfs(c),
        _ => return None,
    })
}

/// The directory that a relative path starts from.
fn base(c: &Call<'_>, dir: i32, path: &[u8]) -> Result<Vec<u8>> {
    if dir == CWD || path.starts_with(b"/") {
        return Ok(c.task.place.lock().cwd.clone());
    }
    match &c.task.file(dir)?.kind {
        Kind::Directory(_, path, _) => Ok(path.clone()),
        _ => Err(Errno::ENOTDIR),
    }
}

fn resolve(c: &Call<'_>, dir: i32, address: u64, follow: bool) -> Result<Found> {
    let path = get_path(address)?;
    fs::resolve(&base(c, dir, &path)?, &path, follow)
}

fn walk(c: &Call<'_>, dir: i32, address: u64) -> Result<Place> {
    let path = get_path(address)?;
    fs::walk(&base(c, dir, &path)?, &path, false)
}

fn open(c: &Call<'_>, dir: i32, address: u64, flags: u32, mode: u32) -> Result {
    let path = get_path(address)?;
    let follow = flags & flag::NOFOLLOW == 0
        && flags & (flag::CREATE | flag::EXCLUSIVE) != flag::CREATE | flag::EXCLUSIVE;
    let place = fs::walk(&base(c, dir, &path)?, &path, follow)?;
    let writes = flags & flag::ACCESS != 0 || flags & flag::TRUNCATE != 0;
    let kind = match place.found {
        None if flags & flag::CREATE == 0 => return Err(Errno::ENOENT),
        None if place.slash => return Err(Errno::EISDIR),
        None => {
            let umask = c.task.place.lock().umask;
            let (node, handle) = place
                .directory
                .create(&place.name, mode & 0o7777 & !umask)?;
            Kind::Regular(node, Some(handle))
        }
        Some(_) if flags & flag::CREATE != 0 && flags & flag::EXCLUSIVE != 0 => {
            return Err(Errno::EEXIST);
        }
        Some(found) => match found.what {
            What::Device(Device::Console) => Kind::Console,
            What::Device(device) => Kind::Device(device),
            What::Node(node) if node.is_directory() => {
                if writes || flags & flag::CREATE != 0 {
                    return Err(Errno::EISDIR);
                }
                Kind::Directory(node, found.path, Mutex::new(None))
            }
            What::Node(_) if place.slash || flags & flag::DIRECTORY != 0 => {
                return Err(Errno::ENOTDIR);
            }
            What::Node(node) if node.is_link() && flags & flag::PATH == 0 => {
                return Err(Errno::ELOOP);
            }
            What::Node(node) if flags & flag::PATH != 0 => Kind::Regular(node, None),
            What::Node(node) if node.is_regular() => {
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
                Kind::Regular(node, handle)
            }
            // Sockets, fifos and device files of the image.
            What::Node(_) => return Err(Errno::ENXIO),
        },
    };
    let kept = flags & !(flag::CREATE | flag::EXCLUSIVE | flag::TRUNCATE | flag::CLOEXEC);
    let file = Arc::new(File::new(kind, kept));
    let fd = c
        .task
        .files()
        .lock()
        .insert(file, 0, flags & flag::CLOEXEC != 0)?;
    Ok(fd as u64)
}

fn device_attributes(rdev: u64) -> Attributes {
    let now = clock::realtime_ns();
    let time = (now / 1_000_000_000, (now % 1_000_000_000) as u32);
    Attributes {
        ino: rdev,
        mode: 0o020_666,
        nlink: 1,
        rdev: rdev as u32,
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

/// Device numbers that `stat` shows: the share, and what the kernel makes itself.
const SHARE: u64 = 0x2a;
const OWN: u64 = 0x5;

fn stat_path(c: &Call<'_>, dir: i32, path: u64, to: u64, flags: u32) -> Result {
    if flags & AT_EMPTY_PATH != 0 && super::get::<1>(path) == Ok([0]) {
        if dir == CWD {
            let cwd = c.task.place.lock().cwd.clone();
            return put_stat(
                to,
                &fs::resolve(b"/", &cwd, true)?.node()?.attributes()?,
                SHARE,
            );
        }
        return stat_file(c, dir, to);
    }
    match resolve(c, dir, path, flags & AT_SYMLINK_NOFOLLOW == 0)?.what {
        What::Node(node) => put_stat(to, &node.attributes()?, SHARE),
        What::Device(device) => put_stat(to, &device_attributes(device.number()), OWN),
    }
}

fn stat_file(c: &Call<'_>, fd: i32, to: u64) -> Result {
    let file = c.task.file(fd)?;
    match &file.kind {
        Kind::Regular(node, _) | Kind::Directory(node, ..) => {
            put_stat(to, &node.attributes()?, SHARE)
        }
        Kind::Console => put_stat(to, &device_attributes(Device::Console.number()), OWN),
        Kind::Device(device) => put_stat(to, &device_attributes(device.number()), OWN),
        Kind::Pipe(..) => {
            let attributes = Attributes {
                mode: 0o010_600,
                rdev: 0,
                ..device_attributes(1)
            };
            put_stat(to, &attributes, OWN)
        }
    }
}

fn access(c: &Call<'_>, dir: i32, path: u64, mode: u32, flags: u32) -> Result {
    const EXECUTE: u32 = 1;
    if mode & !7 != 0 {
        return Err(Errno::EINVAL);
    }
    let found = resolve(c, dir, path, flags & AT_SYMLINK_NOFOLLOW == 0)?;
    if let What::Node(node) = found.what {
        // All programs are root: only what nobody may execute is refused.
        if mode & EXECUTE != 0 && node.is_regular() && node.attributes()?.mode & 0o111 == 0 {
            return Err(Errno::EACCES);
        }
    }
    Ok(0)
}

fn getcwd(c: &Call<'_>) -> Result {
    let mut cwd = c.task.place.lock().cwd.clone();
    cwd.push(0);
    if (cwd.len() as u64) > c.arg(1) {
        return Err(Errno::ERANGE);
    }
    put(c.arg(0), &cwd)?;
    Ok(cwd.len() as u64)
}

fn chdir(c: &Call<'_>) -> Result {
    let found = resolve(c, CWD, c.arg(0), true)?;
    if !found.node().map_err(|_| Errno::ENOTDIR)?.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    c.task.place.lock().cwd = found.path;
    Ok(0)
}

fn fchdir(c: &Call<'_>) -> Result {
    match &c.task.file(c.int(0))?.kind {
        Kind::Directory(_, path, _) => {
            c.task.place.lock().cwd = path.clone();
            Ok(0)
        }
        _ => Err(Errno::ENOTDIR),
    }
}

fn rename(c: &Call<'_>, from: (i32, u64), to: (i32, u64)) -> Result {
    let from = walk(c, from.0, from.1)?;
    let to = walk(c, to.0, to.1)?;
    let node = from.found.as_ref().ok_or(Errno::ENOENT)?.node()?;
    if from.name.is_empty() || to.name.is_empty() {
        return Err(Errno::EBUSY);
    }
    if (from.slash || to.slash) && !node.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    from.directory.rename(&from.name, &to.directory, &to.name)?;
    Ok(0)
}

fn mkdir(c: &Call<'_>, dir: i32, path: u64, mode: u32) -> Result {
    let place = walk(c, dir, path)?;
    if place.found.is_some() {
        return Err(Errno::EEXIST);
    }
    let umask = c.task.place.lock().umask;
    place
        .directory
        .make_directory(&place.name, mode & 0o1777 & !umask)?;
    Ok(0)
}

fn unlink(c: &Call<'_>, dir: i32, path: u64, directory: bool) -> Result {
    let place = walk(c, dir, path)?;
    let found = place.found.as_ref().ok_or(Errno::ENOENT)?;
    let node = found.node()?;
    if place.name.is_empty() {
        return Err(Errno::EBUSY);
    }
    match (directory, node.is_directory()) {
        (true, false) => return Err(Errno::ENOTDIR),
        (false, true) => return Err(Errno::EISDIR),
        _ => {}
    }
    place.directory.unlink(&place.name, directory)?;
    Ok(0)
}

fn link(c: &Call<'_>, from: (i32, u64), to: (i32, u64), flags: u32) -> Result {
    const AT_SYMLINK_FOLLOW: u32 = 0x400;
    let node = resolve(c, from.0, from.1, flags & AT_SYMLINK_FOLLOW != 0)?.node()?;
    let place = walk(c, to.0, to.1)?;
    if place.found.is_some() {
        return Err(Errno::EEXIST);
    }
    place.directory.link(&place.name, &node)?;
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
    place.directory.make_link(&place.name, &target)?;
    Ok(0)
}

fn readlink(c: &Call<'_>, dir: i32, path: u64, to: u64, room: u64) -> Result {
    if room == 0 || room > i32::MAX as u64 {
        return Err(Errno::EINVAL);
    }
    let text = get_path(path)?;
    // The one file of /proc that programs cannot do without.
    let target = if text == b"/proc/self/exe" {
        c.task.place.lock().exe.clone()
    } else {
        let node = fs::resolve(&base(c, dir, &text)?, &text, false)?
            .node()
            .map_err(|_| Errno::EINVAL)?;
        if !node.is_link() {
            return Err(Errno::EINVAL);
        }
        node.read_link()?
    };
    let len = target.len().min(room as usize);
    put(to, target.get(..len).unwrap_or_default())?;
    Ok(len as u64)
}

fn chmod(c: &Call<'_>, dir: i32, path: u64, mode: u32) -> Result {
    let node = resolve(c, dir, path, true)?.node()?;
    node.change(&Change {
        mode: Some(mode & 0o7777),
        ..Change::default()
    })?;
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
    let node = resolve(c, dir, path, flags & AT_SYMLINK_NOFOLLOW == 0)?.node()?;
    node.change(&owner(ids.0, ids.1))?;
    Ok(0)
}

fn change_file(c: &Call<'_>, change: &Change) -> Result {
    let file = c.task.file(c.int(0))?;
    file.node().ok_or(Errno::EINVAL)?.change(change)?;
    Ok(0)
}

fn truncate(c: &Call<'_>) -> Result {
    let size = c.arg(1);
    if size > i64::MAX.cast_unsigned() {
        return Err(Errno::EINVAL);
    }
    let node = resolve(c, CWD, c.arg(0), true)?.node()?;
    if node.is_directory() {
        return Err(Errno::EISDIR);
    }
    node.change(&Change {
        size: Some(size),
        ..Change::default()
    })?;
    Ok(0)
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
    if c.arg(1) == 0 {
        return change_file(c, &change);
    }
    let node = resolve(c, c.int(0), c.arg(1), c.uint(3) & AT_SYMLINK_NOFOLLOW == 0)?.node()?;
    node.change(&change)?;
    Ok(0)
}

fn statfs(c: &Call<'_>) -> Result {
    let node = resolve(c, CWD, c.arg(0), true)?.node()?;
    let bytes = node.statistics()?;
    let word = |i: usize| {
        let bytes = bytes.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    const FUSE_MAGIC: u64 = 0x6573_5546;
    let block = word(5) & 0xffff_ffff;
    let words = [
        FUSE_MAGIC,
        block,
        word(0),
        word(1),
        word(2),
        word(3),
        word(4),
        0,
        word(5) >> 32,
        word(6) & 0xffff_ffff,
        0,
        0,
        0,
        0,
        0,
    ];
    super::put_words(c.arg(1), &words)?;
    Ok(0)
}
