//! Opening paths that a container controls.
//!
//! A container can put a symlink anywhere below its root or in a volume, and exchange it while we
//! look. So such paths are resolved by the kernel in one step, within a directory that is open,
//! and used by descriptor afterwards.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// How far a path may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolve {
    /// As if the directory were the root: `..` and absolute symlinks stay inside.
    InRoot,
    /// Leading out of the directory is an error.
    Beneath,
}

/// Opens `path` within `root` with `O_*` flags; magic links of /proc are never followed.
pub fn open_within(
    root: impl AsFd,
    path: &Path,
    flags: libc::c_int,
    resolve: Resolve,
) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let c_path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: open_how is plain old data for which all zeroes is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_NO_MAGICLINKS
        | match resolve {
            Resolve::InRoot => libc::RESOLVE_IN_ROOT,
            Resolve::Beneath => libc::RESOLVE_BENEATH,
        };
    loop {
        // SAFETY: the path is a C string and `how` an open_how of the size given; both live
        // through the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                root.as_fd().as_raw_fd(),
                c_path.as_ptr(),
                &raw const how,
                size_of::<libc::open_how>(),
            )
        };
        if fd >= 0 {
            let fd = i32::try_from(fd).map_err(io::Error::other)?;
            // SAFETY: openat2 has just returned this descriptor and nothing else knows it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let error = io::Error::last_os_error();
        // EAGAIN: a rename raced with the resolution of `..`; the kernel asks to try again.
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
            return Err(error);
        }
    }
}

/// A path by which the kernel finds an open file, whatever happens to its name.
pub fn by_fd(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// An absolute path without `.`, `..` and empty components; `None` for anything else.
pub fn plain_absolute(path: &str) -> Option<&Path> {
    let p = Path::new(path);
    let plain = p.is_absolute()
        && !path.contains('\0')
        && p.components()
            .all(|c| matches!(c, Component::RootDir | Component::Normal(_)))
        && !path.contains("/./")
        && !path.ends_with("/.");
    plain.then_some(p)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn symlinks_do_not_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("in"), "in").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("abs")).unwrap();
        std::os::unix::fs::symlink("../../../etc/passwd", dir.path().join("up")).unwrap();
        let root = File::open(dir.path()).unwrap();
        let open = |p: &str, r| open_within(&root, Path::new(p), libc::O_RDONLY, r);
        assert!(open("in", Resolve::Beneath).is_ok());
        assert!(open("/in", Resolve::InRoot).is_ok());
        for p in ["abs", "up", "../x", "/etc/passwd"] {
            assert!(open(p, Resolve::Beneath).is_err(), "{p}");
            let error = open(p, Resolve::InRoot).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{p}");
        }
        // Not even by way of /proc.
        std::os::unix::fs::symlink("/proc/self/root/etc/passwd", dir.path().join("magic")).unwrap();
        assert!(open("magic", Resolve::InRoot).is_err());
    }

    #[test]
    fn plain_paths() {
        for good in ["/", "/run/bulkhead/share", "/a/b"] {
            assert!(plain_absolute(good).is_some(), "{good}");
        }
        for bad in ["", "a", "/a/../b", "/a/./b", "/..", "/a/.", "a/b", "/a\0"] {
            assert!(plain_absolute(bad).is_none(), "{bad}");
        }
    }
}
