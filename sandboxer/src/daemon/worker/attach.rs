//! Mounts into a running worker's jail, made from outside: the worker has no right to mount.
//!
//! A container's root or volume is mounted in the daemon's own namespace as for a VM on a thread,
//! with all its flags. A copy of that mount is moved into the worker's namespace by a thread that
//! enters it for this one step and ends. The copy goes when its mount point is removed: the kernel
//! takes away what is mounted on a directory that goes, in every namespace.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};

/// linux/mount.h.
const OPEN_TREE_CLONE: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
/// linux/fcntl.h.
const AT_RECURSIVE: libc::c_uint = 0x8000;

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn flag(bits: libc::c_int) -> libc::c_uint {
    bits.unsigned_abs()
}

/// A copy of what is mounted at `path`, with all that is below it, mounted nowhere.
///
/// # Errors
/// As `open_tree(2)`.
pub fn open_tree(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let flags = OPEN_TREE_CLONE | AT_RECURSIVE | flag(libc::O_CLOEXEC | libc::AT_SYMLINK_NOFOLLOW);
    // SAFETY: a string that ends with a zero, and flags.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = nix::errno::Errno::result(fd)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes away what a worker never needs of a file system (programs, device nodes, set-user-id),
/// and what is `more`, from a copy that is mounted nowhere yet.
///
/// # Errors
/// As `mount_setattr(2)`.
pub fn restrict(tree: &OwnedFd, more: u64) -> io::Result<()> {
    let plain = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let attributes = libc::mount_attr {
        attr_set: plain | more,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: an empty string; the attributes live through the call, and the size is theirs.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flag(libc::AT_EMPTY_PATH) | AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}

/// Mounts a copy at `path`, which is no link.
///
/// # Errors
/// As `move_mount(2)`.
pub fn move_to(tree: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: two strings that end with a zero, two descriptors, flags.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            // Without MOVE_MOUNT_T_SYMLINKS: the last name is not followed.
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}

/// Copies what the daemon has mounted at `from` to `to` in the namespace `mounts`. Blocks shortly.
///
/// # Errors
/// What the kernel refuses.
pub fn attach(mounts: &File, from: &Path, to: &Path) -> io::Result<()> {
    let tree = open_tree(from)?;
    restrict(&tree, 0)?;
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("attach".into())
            .stack_size(256 << 10)
            .spawn_scoped(scope, || {
                // The thread ends here: nothing else ever runs in that namespace, whose files
                // belong to a guest.
                unshare(CloneFlags::CLONE_FS)?;
                setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
                move_to(&tree, to)
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace failed")))
    })
}
