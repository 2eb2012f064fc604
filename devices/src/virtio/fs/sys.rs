//! The system calls the share is made of, as safe functions.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::c_int;

const EMPTY: &CStr = c"";

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

pub(super) fn errno(code: c_int) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// A file's attributes and which mount it is on.
#[derive(Clone, Copy)]
pub(super) struct Stat {
    pub st: libc::stat64,
    pub mount: u64,
}

impl Stat {
    pub(super) fn kind(&self) -> u32 {
        self.st.st_mode & libc::S_IFMT
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind() == libc::S_IFDIR
    }
}

pub(super) fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| errno(libc::EINVAL))?;
    openat(libc::AT_FDCWD, &path, libc::O_PATH | libc::O_DIRECTORY, 0)
}

pub(super) fn open_proc_self_fd() -> io::Result<OwnedFd> {
    openat(
        libc::AT_FDCWD,
        c"/proc/self/fd",
        libc::O_PATH | libc::O_DIRECTORY,
        0,
    )
}

/// `openat(2)`; the result is always close-on-exec.
pub(super) fn openat(dir: RawFd, name: &CStr, flags: c_int, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: `name` is a C string that outlives the call; the call touches no other memory.
    let fd = check(unsafe { libc::openat(dir, name.as_ptr(), flags | libc::O_CLOEXEC, mode) })?;
    // SAFETY: the call returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A handle to `name` in `dir` that can be looked at but not read; links are not followed.
pub(super) fn open_path(dir: RawFd, name: &CStr) -> io::Result<OwnedFd> {
    openat(dir, name, libc::O_PATH | libc::O_NOFOLLOW, 0)
}

/// The name of a descriptor below `/proc/self/fd`.
fn fd_name(fd: RawFd) -> io::Result<CString> {
    CString::new(fd.to_string()).map_err(|_| errno(libc::EBADF))
}

/// Opens the file behind an `O_PATH` descriptor anew. No name is resolved, so that it is this very
/// file; the caller has made sure that opening it has no side effects.
pub(super) fn reopen(proc: &OwnedFd, fd: RawFd, flags: c_int) -> io::Result<File> {
    let flags = flags & !(libc::O_NOFOLLOW | libc::O_CREAT | libc::O_EXCL);
    openat(proc.as_raw_fd(), &fd_name(fd)?, flags, 0).map(File::from)
}

/// An `O_PATH` descriptor of an open file.
pub(super) fn path_of(proc: &OwnedFd, file: &File) -> io::Result<OwnedFd> {
    openat(
        proc.as_raw_fd(),
        &fd_name(file.as_raw_fd())?,
        libc::O_PATH,
        0,
    )
}

fn statx(dir: RawFd, name: &CStr, flags: c_int) -> io::Result<Stat> {
    let mut out = MaybeUninit::<libc::statx>::zeroed();
    let mask = libc::STATX_BASIC_STATS | libc::STATX_MNT_ID;
    // SAFETY: `name` is a C string and `out` has room for the result.
    check(unsafe { libc::statx(dir, name.as_ptr(), flags, mask, out.as_mut_ptr()) })?;
    // SAFETY: zero is a valid value of every field, and the call succeeded.
    let x = unsafe { out.assume_init() };
    // SAFETY: a structure of integers, for which zero is a valid value.
    let mut st: libc::stat64 = unsafe { MaybeUninit::zeroed().assume_init() };
    st.st_dev = libc::makedev(x.stx_dev_major, x.stx_dev_minor);
    st.st_rdev = libc::makedev(x.stx_rdev_major, x.stx_rdev_minor);
    st.st_ino = x.stx_ino;
    st.st_mode = u32::from(x.stx_mode);
    st.st_nlink = u64::from(x.stx_nlink);
    st.st_uid = x.stx_uid;
    st.st_gid = x.stx_gid;
    st.st_size = i64::try_from(x.stx_size).unwrap_or(i64::MAX);
    st.st_blksize = i64::from(x.stx_blksize);
    st.st_blocks = i64::try_from(x.stx_blocks).unwrap_or(i64::MAX);
    st.st_atime = x.stx_atime.tv_sec;
    st.st_atime_nsec = i64::from(x.stx_atime.tv_nsec);
    st.st_mtime = x.stx_mtime.tv_sec;
    st.st_mtime_nsec = i64::from(x.stx_mtime.tv_nsec);
    st.st_ctime = x.stx_ctime.tv_sec;
    st.st_ctime_nsec = i64::from(x.stx_ctime.tv_nsec);
    Ok(Stat {
        st,
        mount: x.stx_mnt_id,
    })
}

/// Attributes of `name` in `dir`, of a link itself if it is one.
pub(super) fn stat_at(dir: RawFd, name: &CStr) -> io::Result<Stat> {
    statx(dir, name, libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT)
}

/// Attributes of an open file.
pub(super) fn stat_fd(fd: RawFd) -> io::Result<Stat> {
    statx(fd, EMPTY, libc::AT_EMPTY_PATH)
}

pub(super) fn mkdirat(dir: RawFd, name: &CStr, mode: u32) -> io::Result<()> {
    // SAFETY: `name` is a C string.
    check(unsafe { libc::mkdirat(dir, name.as_ptr(), mode) }).map(drop)
}

pub(super) fn mknodat(dir: RawFd, name: &CStr, mode: u32, device: u32) -> io::Result<()> {
    // SAFETY: `name` is a C string.
    check(unsafe { libc::mknodat(dir, name.as_ptr(), mode, u64::from(device)) }).map(drop)
}

pub(super) fn symlinkat(target: &CStr, dir: RawFd, name: &CStr) -> io::Result<()> {
    // SAFETY: both are C strings.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir, name.as_ptr()) }).map(drop)
}

pub(super) fn unlinkat(dir: RawFd, name: &CStr, flags: c_int) -> io::Result<()> {
    // SAFETY: `name` is a C string.
    check(unsafe { libc::unlinkat(dir, name.as_ptr(), flags) }).map(drop)
}

pub(super) fn renameat2(
    from: RawFd,
    old: &CStr,
    to: RawFd,
    new: &CStr,
    flags: u32,
) -> io::Result<()> {
    // SAFETY: both are C strings.
    check(unsafe { libc::renameat2(from, old.as_ptr(), to, new.as_ptr(), flags) }).map(drop)
}

/// Gives the file behind an `O_PATH` descriptor one more name.
pub(super) fn link(proc: &OwnedFd, fd: RawFd, dir: RawFd, name: &CStr) -> io::Result<()> {
    let from = fd_name(fd)?;
    // SAFETY: both are C strings.
    check(unsafe {
        libc::linkat(
            proc.as_raw_fd(),
            from.as_ptr(),
            dir,
            name.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    })
    .map(drop)
}

pub(super) fn readlink(fd: RawFd) -> io::Result<Vec<u8>> {
    let mut target = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer is as long as said.
    let n =
        unsafe { libc::readlinkat(fd, EMPTY.as_ptr(), target.as_mut_ptr().cast(), target.len()) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    target.truncate(n);
    Ok(target)
}

/// `chmod` of the file behind an `O_PATH` descriptor.
pub(super) fn chmod_path(proc: &OwnedFd, fd: RawFd, mode: u32) -> io::Result<()> {
    let name = fd_name(fd)?;
    // SAFETY: `name` is a C string.
    check(unsafe { libc::fchmodat(proc.as_raw_fd(), name.as_ptr(), mode, 0) }).map(drop)
}

/// Changes owners; `u32::MAX` leaves one as it is.
pub(super) fn chown(fd: RawFd, uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: the path is a C string.
    check(unsafe { libc::fchownat(fd, EMPTY.as_ptr(), uid, gid, libc::AT_EMPTY_PATH) }).map(drop)
}

pub(super) fn truncate(fd: RawFd, size: i64) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::ftruncate64(fd, size) }).map(drop)
}

/// Sets access and modification time of the file behind an `O_PATH` descriptor.
pub(super) fn set_times(proc: &OwnedFd, fd: RawFd, times: &[libc::timespec; 2]) -> io::Result<()> {
    let name = fd_name(fd)?;
    // SAFETY: `name` is a C string, `times` has two entries.
    check(unsafe { libc::utimensat(proc.as_raw_fd(), name.as_ptr(), times.as_ptr(), 0) }).map(drop)
}

pub(super) fn sync(fd: RawFd, data_only: bool) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe {
        if data_only {
            libc::fdatasync(fd)
        } else {
            libc::fsync(fd)
        }
    })
    .map(drop)
}

pub(super) fn fallocate(fd: RawFd, mode: c_int, offset: i64, len: i64) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fallocate64(fd, mode, offset, len) }).map(drop)
}

pub(super) fn lseek(fd: RawFd, offset: i64, whence: c_int) -> io::Result<i64> {
    // SAFETY: no memory is involved.
    let at = unsafe { libc::lseek64(fd, offset, whence) };
    if at < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(at)
    }
}

pub(super) fn copy_range(
    from: RawFd,
    mut at: i64,
    to: RawFd,
    mut to_at: i64,
    len: usize,
) -> io::Result<usize> {
    // SAFETY: both offsets are valid for the call.
    let n = unsafe { libc::copy_file_range(from, &raw mut at, to, &raw mut to_at, len, 0) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

pub(super) fn statvfs(fd: RawFd) -> io::Result<libc::statvfs64> {
    let mut out = MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: `out` has room for the result.
    check(unsafe { libc::fstatvfs64(fd, out.as_mut_ptr()) })?;
    // SAFETY: zero is a valid value of every field, and the call succeeded.
    Ok(unsafe { out.assume_init() })
}

/// Reads directory entries into `buffer`; returns how many bytes of it are filled.
pub(super) fn getdents(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is as long as said.
    let n = unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), buffer.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// The path of a descriptor for calls that have no form for `O_PATH` descriptors.
fn fd_path(fd: RawFd) -> io::Result<CString> {
    CString::new(format!("/proc/self/fd/{fd}")).map_err(|_| errno(libc::EBADF))
}

pub(super) fn setxattr(fd: RawFd, name: &CStr, value: &[u8], flags: c_int) -> io::Result<()> {
    let path = fd_path(fd)?;
    // SAFETY: two C strings and a buffer as long as said.
    check(unsafe {
        libc::setxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    })
    .map(drop)
}

/// Fills `value` (or, if it is empty, says how long the value is).
pub(super) fn getxattr(fd: RawFd, name: &CStr, value: &mut [u8]) -> io::Result<usize> {
    let path = fd_path(fd)?;
    // SAFETY: two C strings and a buffer as long as said.
    let n = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

pub(super) fn listxattr(fd: RawFd, names: &mut [u8]) -> io::Result<usize> {
    let path = fd_path(fd)?;
    // SAFETY: a C string and a buffer as long as said.
    let n = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

pub(super) fn removexattr(fd: RawFd, name: &CStr) -> io::Result<()> {
    let path = fd_path(fd)?;
    // SAFETY: two C strings.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
}
