//! Acting as a user of the guest, for the few calls that make files.
//!
//! The guest's kernel has already decided that its process may do what it asks (virtio-fs mounts
//! with `default_permissions`), with groups the host does not know. So the host only has to give
//! new files the right owner: file system user and group ids are per thread, and the two
//! capabilities that permission checks need are kept.

use std::cell::Cell;
use std::io;

use super::sys::errno;

const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_DAC_READ_SEARCH: u32 = 2;
const CAP_FSETID: u32 = 4;
/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn change_caps(change: impl Fn(&mut CapData)) -> io::Result<()> {
    let mut header = CapHeader {
        version: VERSION,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: header and data are laid out as version 3 of the call defines, for this thread.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    change(&mut data[0]);
    // SAFETY: as above.
    if unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

thread_local! {
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Makes the calling thread fit to serve a share. Done once per thread, at the latest when the
/// device is activated; a thread that is to have a system call filter calls it before.
///
/// - Its umask becomes 0 without changing the process': the guest applied its own already.
/// - Supplementary groups of the daemon go, so that they never help a user of the guest.
/// - `SIGXFSZ` is blocked: a guest that writes past the daemon's file size limit gets `EFBIG`
///   instead of killing the daemon.
pub fn prepare_thread() {
    if PREPARED.replace(true) {
        return;
    }
    // SAFETY: unsharing file system attributes affects this thread only and needs no privilege.
    if unsafe { libc::unshare(libc::CLONE_FS) } == 0 {
        // SAFETY: sets this thread's own umask, now that it is its own.
        unsafe { libc::umask(0) };
    } else {
        log::warn!(
            "fs: cannot give the thread its own umask: {}; modes follow the daemon's",
            io::Error::last_os_error()
        );
    }
    if privileged() {
        // The bare call: the C library's would change all threads of the process.
        // SAFETY: an empty list needs no memory.
        unsafe { libc::syscall(libc::SYS_setgroups, 0usize, std::ptr::null::<libc::gid_t>()) };
    }
    // SAFETY: the set is initialised before use and lives on this stack.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGXFSZ);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// Whether this process can give files away. If not, new files belong to the daemon's user, as
/// there is no other way.
pub(super) fn privileged() -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::geteuid() == 0 }
}

/// While this lives, new files of this thread belong to a user of the guest.
#[derive(Debug)]
pub(super) struct ActAs {
    uid: libc::c_int,
    gid: libc::c_int,
}

fn set_fs_ids(uid: u32, gid: u32) -> bool {
    // SAFETY: no memory is involved; the ids are this thread's. An invalid id changes nothing and
    // returns the current one, which is how to find out whether the change was made.
    unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        libc::setfsgid(u32::MAX).cast_unsigned() == gid
            && libc::setfsuid(u32::MAX).cast_unsigned() == uid
    }
}

impl ActAs {
    /// Becomes `uid` and `gid` for file access. `None` if nothing has to change.
    pub(super) fn enter(uid: u32, gid: u32) -> io::Result<Option<Self>> {
        if (uid == 0 && gid == 0) || !privileged() {
            return Ok(None);
        }
        if uid == u32::MAX || gid == u32::MAX {
            return Err(errno(libc::EINVAL));
        }
        // SAFETY: as in `set_fs_ids`: reads the current ids.
        let guard = unsafe {
            Self {
                uid: libc::setfsuid(u32::MAX),
                gid: libc::setfsgid(u32::MAX),
            }
        };
        if !set_fs_ids(uid, gid) {
            return Err(errno(libc::EPERM));
        }
        change_caps(|data| {
            data.effective |= data.permitted & (1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH);
        })?;
        Ok(Some(guard))
    }
}

impl Drop for ActAs {
    fn drop(&mut self) {
        // Back to user 0 also brings the file capabilities back (capabilities(7)).
        if !set_fs_ids(self.uid.cast_unsigned(), self.gid.cast_unsigned()) {
            log::error!("fs: cannot return to the daemon's identity after acting for the guest");
        }
    }
}

/// While this lives, writing and truncating clear the set-user-id and set-group-id bits, as they
/// do for an ordinary user.
#[derive(Debug)]
pub(super) struct KillPrivileges(());

impl KillPrivileges {
    pub(super) fn enter(wanted: bool) -> io::Result<Option<Self>> {
        if !wanted || !privileged() {
            return Ok(None);
        }
        change_caps(|data| data.effective &= !(1 << CAP_FSETID))?;
        Ok(Some(Self(())))
    }
}

impl Drop for KillPrivileges {
    fn drop(&mut self) {
        if let Err(error) = change_caps(|data| data.effective |= data.permitted & (1 << CAP_FSETID))
        {
            log::error!("fs: cannot take CAP_FSETID back: {error}");
        }
    }
}
