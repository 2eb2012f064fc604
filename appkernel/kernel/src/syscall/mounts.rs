//! mount and umount2: file systems in memory and binds, in the container's own view. What the
//! container was started with stays as it is: a program cannot make a read-only mount writable.

use alloc::string::String;

use appkernel_core::errno::Errno;

use super::{Call, Result, get_string, paths};
use crate::container::{Mount, Origin};
use crate::fs::node::Node;
use crate::fs::{memory, proc};

const READ_ONLY: u64 = 1;
const REMOUNT: u64 = 0x20;
const BIND: u64 = 0x1000;
const MOVE: u64 = 0x2000;
/// Unbindable, private, slave, shared: there is one view, so they change nothing.
const PROPAGATION: u64 = 0xf << 17;
/// Mounts that programs of a container may make, at most: they are the kernel's memory.
const MAX_OWN: usize = 256;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        165 => mount(c),
        166 => unmount(c),
        _ => return None,
    })
}

fn page_string(at: u64) -> Result<alloc::vec::Vec<u8>> {
    if at == 0 {
        return Ok(alloc::vec::Vec::new());
    }
    get_string(at, 4096, Errno::ENAMETOOLONG)
}

fn is_root(c: &Call<'_>) -> bool {
    c.task.credentials.lock().is_root()
}

fn mount(c: &Call<'_>) -> Result {
    let (source, kind) = (page_string(c.arg(0))?, page_string(c.arg(2))?);
    let flags = c.arg(3);
    let found = paths::resolve(c, paths::CWD, c.arg(1), true)?;
    if !is_root(c) {
        return Err(Errno::EPERM);
    }
    let container = &c.task.container;
    if flags & REMOUNT != 0 {
        return container.remount(&found.path, flags & READ_ONLY != 0);
    }
    if flags & PROPAGATION != 0 {
        return Ok(0);
    }
    if flags & MOVE != 0 {
        return Err(Errno::EINVAL);
    }
    let (node, inherited) = if flags & BIND != 0 {
        let from = paths::resolve(c, paths::CWD, c.arg(0), true)?;
        if from.node.is_directory() != found.node.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        (from.node, from.read_only)
    } else {
        if !found.node.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        let node = match &kind[..] {
            b"tmpfs" | b"ramfs" => {
                Node::Memory(memory::new_for(&c.task.container.charge, None, 0o1777))
            }
            b"proc" => Node::Proc(proc::Entry::root()),
            b"sysfs" => Node::Proc(proc::Entry::sys()),
            b"" => return Err(Errno::EINVAL),
            _ => return Err(Errno::ENODEV),
        };
        (node, false)
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let read_only = inherited || flags & READ_ONLY != 0;
    let own = container
        .mounts()
        .iter()
        .filter(|m| m.origin == Origin::Program)
        .count();
    if own >= MAX_OWN {
        return Err(Errno::ENOSPC);
    }
    container.mount(Mount {
        at: found.path,
        root: node,
        read_only,
        origin: Origin::Program,
        fixed_read_only: inherited,
        shown: (
            text(&source),
            if flags & BIND != 0 {
                String::from("none")
            } else {
                text(&kind)
            },
            String::from(if read_only { "ro" } else { "rw" }),
        ),
    });
    Ok(0)
}

fn unmount(c: &Call<'_>) -> Result {
    const EXPIRE: u32 = 4;
    const NOFOLLOW: u32 = 8;
    const DETACH: u32 = 2;
    const KNOWN: u32 = 15;
    let flags = c.uint(1);
    if flags & !KNOWN != 0 || flags & EXPIRE != 0 && flags & 3 != 0 {
        return Err(Errno::EINVAL);
    }
    let found = paths::resolve(c, paths::CWD, c.arg(0), flags & NOFOLLOW == 0)?;
    if !is_root(c) {
        return Err(Errno::EPERM);
    }
    let container = &c.task.container;
    let (root, _) = container.mount_at(&found.path).ok_or(Errno::EINVAL)?;
    if flags & DETACH == 0 && in_use(c, &found.path, &root) {
        return Err(Errno::EBUSY);
    }
    if flags & EXPIRE != 0 && container.expire(&found.path) {
        // The first call only marks it.
        return Err(Errno::EAGAIN);
    }
    container.unmount(&found.path)
}

/// Whether somebody is in a mount: a directory, an open file.
fn in_use(c: &Call<'_>, at: &[u8], root: &Node) -> bool {
    let below = |path: &[u8]| {
        path.strip_prefix(at)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
    };
    let device = root.identity().0;
    crate::task::living().iter().any(|task| {
        if !c.task.container.has(task.id) {
            return false;
        }
        let cwd = task.place.lock().cwd.clone();
        let files = task.files();
        let files = files.lock();
        below(&cwd)
            || files
                .all()
                .any(|f| below(&f.path) && f.node().is_some_and(|n| n.identity().0 == device))
    })
}
