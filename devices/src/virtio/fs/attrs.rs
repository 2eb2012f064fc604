//! Attributes of files, plain and extended.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply, SetattrValid};

use super::creds::KillPrivileges;
use super::share::Share;
use super::sys::{self, errno};

/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`: the kernel gives no more, so no more is allocated,
/// whatever size the guest names.
const MAX_XATTR: usize = 65_536;

/// Which extended attributes the guest may see and set. Left out are those with which a guest
/// could act on the host: `trusted.*` steers overlayfs, and `security.*` holds the host's labels.
fn visible(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name.starts_with(b"system.posix_acl_")
        || name == b"security.capability"
}

impl Share {
    fn visible(&self, name: &[u8]) -> bool {
        visible(name) || self.upper_layers && name.starts_with(b"trusted.overlay.")
    }

    pub(super) fn attributes(
        &self,
        node: u64,
        handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        let mut inner = self.inner();
        let stat = match handle {
            // A guest may name the handle of a file it has removed.
            Some(handle) => sys::stat_fd(inner.handle(node, handle)?.file.as_raw_fd())?,
            None => inner.tree.stat(node)?,
        };
        let mut attr = stat.st;
        attr.st_ino = inner.tree.shown_ino(stat.mount, attr.st_ino);
        Ok((attr, self.timeout()))
    }

    pub(super) fn set_attributes(
        &self,
        node: u64,
        attr: &libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<()> {
        self.writable()?;
        let mut inner = self.inner();
        let kind = inner.tree.get(node)?.kind;
        let kill_priv = inner.kill_priv;
        if let Some(handle) = handle {
            inner.handle(node, handle)?;
        }
        let fd = inner.tree.fd(node)?;
        let fd = fd.as_raw_fd();

        if valid.contains(SetattrValid::MODE) {
            if kind == libc::S_IFLNK {
                return Err(errno(libc::EOPNOTSUPP));
            }
            sys::chmod_path(&self.proc, fd, attr.st_mode & 0o7777)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = if valid.contains(SetattrValid::UID) {
                attr.st_uid
            } else {
                u32::MAX
            };
            let gid = if valid.contains(SetattrValid::GID) {
                attr.st_gid
            } else {
                u32::MAX
            };
            sys::chown(fd, uid, gid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            if attr.st_size < 0 {
                return Err(errno(libc::EINVAL));
            }
            let _kill =
                KillPrivileges::enter(kill_priv && valid.contains(SetattrValid::KILL_SUIDGID))?;
            match handle {
                Some(handle) => {
                    sys::truncate(inner.handle(node, handle)?.file.as_raw_fd(), attr.st_size)?
                }
                None => {
                    let file =
                        self.open_node(&mut inner, node, libc::O_WRONLY | libc::O_NONBLOCK)?;
                    sys::truncate(file.as_raw_fd(), attr.st_size)?;
                }
            }
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |set, now, seconds, nanoseconds| {
                let nsec = if !valid.contains(set) {
                    libc::UTIME_OMIT
                } else if valid.contains(now) {
                    libc::UTIME_NOW
                } else {
                    nanoseconds
                };
                libc::timespec {
                    tv_sec: seconds,
                    tv_nsec: nsec,
                }
            };
            let times = [
                time(
                    SetattrValid::ATIME,
                    SetattrValid::ATIME_NOW,
                    attr.st_atime,
                    attr.st_atime_nsec,
                ),
                time(
                    SetattrValid::MTIME,
                    SetattrValid::MTIME_NOW,
                    attr.st_mtime,
                    attr.st_mtime_nsec,
                ),
            ];
            sys::set_times(&self.proc, fd, &times)?;
        }
        inner.tree.changed(node);
        Ok(())
    }

    fn xattrs_on(&self) -> io::Result<()> {
        // ENOSYS tells the guest's kernel not to ask again.
        if self.xattrs {
            Ok(())
        } else {
            Err(errno(libc::ENOSYS))
        }
    }

    pub(super) fn set_xattr(
        &self,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.xattrs_on()?;
        self.writable()?;
        if !self.visible(name.to_bytes()) {
            return Err(errno(libc::EOPNOTSUPP));
        }
        let mut inner = self.inner();
        let fd = inner.tree.fd(node)?;
        sys::setxattr(fd.as_raw_fd(), name, value, flags.cast_signed())?;
        inner.tree.changed(node);
        Ok(())
    }

    pub(super) fn get_xattr(&self, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.xattrs_on()?;
        if !self.visible(name.to_bytes()) {
            return Err(errno(libc::ENODATA));
        }
        let fd = self.inner().tree.fd(node)?;
        let mut value = vec![0; (size as usize).min(MAX_XATTR)];
        let n = sys::getxattr(fd.as_raw_fd(), name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(u32::try_from(n).unwrap_or(0)));
        }
        value.truncate(n);
        Ok(GetxattrReply::Value(value))
    }

    pub(super) fn list_xattrs(&self, node: u64, size: u32) -> io::Result<ListxattrReply> {
        self.xattrs_on()?;
        let fd = self.inner().tree.fd(node)?;
        let mut all = vec![0; MAX_XATTR];
        let n = sys::listxattr(fd.as_raw_fd(), &mut all)?;
        all.truncate(n);
        let mut names = Vec::new();
        for name in all.split_inclusive(|byte| *byte == 0) {
            if self.visible(name.strip_suffix(b"\0").unwrap_or(name)) {
                names.extend_from_slice(name);
            }
        }
        if size == 0 {
            return Ok(ListxattrReply::Count(
                u32::try_from(names.len()).unwrap_or(0),
            ));
        }
        if names.len() > size as usize {
            return Err(errno(libc::ERANGE));
        }
        Ok(ListxattrReply::Names(names))
    }

    pub(super) fn remove_xattr(&self, node: u64, name: &CStr) -> io::Result<()> {
        self.xattrs_on()?;
        self.writable()?;
        if !self.visible(name.to_bytes()) {
            return Err(errno(libc::EOPNOTSUPP));
        }
        let mut inner = self.inner();
        let fd = inner.tree.fd(node)?;
        sys::removexattr(fd.as_raw_fd(), name)?;
        inner.tree.changed(node);
        Ok(())
    }
}
