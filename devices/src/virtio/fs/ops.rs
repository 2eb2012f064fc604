//! File operations of the guest.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};

use super::config::Caching;
use super::creds::{ActAs, KillPrivileges};
use super::share::{Share, checked, offset};
use super::sys::{self, errno};

/// The mark of an overlay for a name that is no more: a device that nobody can open.
fn is_whiteout(mode: u32, rdev: u32) -> bool {
    mode & libc::S_IFMT == libc::S_IFCHR && rdev == 0
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let mut wanted = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::ASYNC_DIO
            | FsOptions::INIT_EXT
            | FsOptions::HANDLE_KILLPRIV_V2;
        // Locks are not offered: they stay within the guest, and no lock ever holds this thread.
        match self.caching {
            Caching::Never => {}
            Caching::Auto => wanted |= FsOptions::AUTO_INVAL_DATA,
            Caching::Always => wanted |= FsOptions::CACHE_SYMLINKS,
        }
        if self.writeback_wanted {
            wanted |= FsOptions::WRITEBACK_CACHE;
        }
        let agreed = capable & wanted;
        // A guest that mounts again after a crash has forgotten everything.
        self.clear();
        let mut inner = self.inner();
        inner.writeback = agreed.contains(FsOptions::WRITEBACK_CACHE);
        inner.kill_priv = agreed.contains(FsOptions::HANDLE_KILLPRIV_V2);
        Ok(agreed)
    }

    fn destroy(&self) {
        self.clear();
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = checked(name)?;
        let mut inner = self.inner();
        let dir = inner.tree.fd(parent)?;
        let negative = self.caching.negative_timeout();
        match self.enter(&mut inner, parent, &dir, name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && !negative.is_zero() => {
                Ok(Entry {
                    entry_timeout: negative,
                    ..Entry::default()
                })
            }
            other => other,
        }
    }

    fn forget(&self, _ctx: &Context, node: u64, count: u64) {
        self.inner().tree.forget(node, count);
    }

    fn getattr(
        &self,
        _ctx: &Context,
        node: u64,
        handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        self.attributes(node, handle)
    }

    fn setattr(
        &self,
        _ctx: &Context,
        node: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        self.set_attributes(node, &attr, handle, valid)?;
        self.attributes(node, handle)
    }

    fn readlink(&self, _ctx: &Context, node: u64) -> io::Result<Vec<u8>> {
        let mut inner = self.inner();
        if inner.tree.get(node)?.kind != libc::S_IFLNK {
            return Err(errno(libc::EINVAL));
        }
        let fd = inner.tree.fd(node)?;
        sys::readlink(fd.as_raw_fd())
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.make(ctx, parent, name, |dir, name| {
            sys::symlinkat(target, dir.as_raw_fd(), name)
        })
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        match mode & libc::S_IFMT {
            // A device node on the host is a door to the host's device for whoever opens it there.
            libc::S_IFCHR | libc::S_IFBLK
                if !(self.device_nodes || self.upper_layers && is_whiteout(mode, rdev)) =>
            {
                self.writable()?;
                Err(errno(libc::EPERM))
            }
            libc::S_IFCHR | libc::S_IFBLK => {
                self.writable()?;
                let name = checked(name)?;
                let mut inner = self.inner();
                self.names_are_guests(&inner, parent)?;
                let dir = inner.tree.fd(parent)?;
                // Needs a capability the guest's user would not have; given to the user after.
                sys::mknodat(dir.as_raw_fd(), name, mode & !umask, rdev)?;
                if let Ok(made) = sys::open_path(dir.as_raw_fd(), name) {
                    let _ = sys::chown(made.as_raw_fd(), ctx.uid, ctx.gid);
                }
                self.enter(&mut inner, parent, &dir, name)
            }
            libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK | 0 => {
                self.make(ctx, parent, name, |dir, name| {
                    sys::mknodat(dir.as_raw_fd(), name, mode & !umask, 0)
                })
            }
            _ => Err(errno(libc::EINVAL)),
        }
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(ctx, parent, name, |dir, name| {
            sys::mkdirat(dir.as_raw_fd(), name, mode & 0o7777 & !umask)
        })
    }

    fn unlink(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, 0)
    }

    fn rmdir(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, libc::AT_REMOVEDIR)
    }

    fn rename(
        &self,
        _ctx: &Context,
        old_parent: u64,
        old: &CStr,
        new_parent: u64,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.writable()?;
        let (old, new) = (checked(old)?, checked(new)?);
        // A whiteout is a device node.
        if flags & libc::RENAME_WHITEOUT != 0 && !(self.device_nodes || self.upper_layers) {
            return Err(errno(libc::EINVAL));
        }
        let mut inner = self.inner();
        self.names_are_guests(&inner, old_parent)?;
        self.names_are_guests(&inner, new_parent)?;
        let tree = &mut inner.tree;
        let from = tree.fd(old_parent)?;
        let to = tree.fd(new_parent)?;
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let moved = sys::stat_at(from.as_raw_fd(), old)
            .ok()
            .and_then(|stat| tree.known(&stat));
        let there = sys::stat_at(to.as_raw_fd(), new)
            .ok()
            .and_then(|stat| tree.known(&stat));
        let replaced = if exchange || moved == there {
            None
        } else {
            tree.before_removal(new_parent, &to, new)
        };
        sys::renameat2(from.as_raw_fd(), old, to.as_raw_fd(), new, flags)?;
        tree.detach(replaced);
        if exchange && let Some(there) = there {
            tree.relocate(there, old_parent, old);
        }
        if let Some(moved) = moved {
            tree.relocate(moved, new_parent, new);
            tree.changed(moved);
        }
        Ok(())
    }

    fn link(
        &self,
        _ctx: &Context,
        node: u64,
        new_parent: u64,
        new_name: &CStr,
    ) -> io::Result<Entry> {
        self.writable()?;
        let name = checked(new_name)?;
        let mut inner = self.inner();
        self.names_are_guests(&inner, new_parent)?;
        let fd = inner.tree.fd(node)?;
        let dir = inner.tree.fd(new_parent)?;
        sys::link(&self.proc, fd.as_raw_fd(), dir.as_raw_fd(), name)?;
        inner.tree.changed(node);
        self.enter(&mut inner, new_parent, &dir, name)
    }

    fn open(
        &self,
        _ctx: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let mut inner = self.inner();
        let flags = self.open_flags(&inner, flags)?;
        let file = {
            let _kill =
                KillPrivileges::enter(inner.kill_priv && fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
            self.open_node(&mut inner, node, flags)?
        };
        let options = self.cache_options(&mut inner, node, &file);
        let handle = self.add_handle(&mut inner, node, file, flags)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        self.writable()?;
        let name = checked(name)?;
        let mut inner = self.inner();
        self.names_are_guests(&inner, parent)?;
        let flags = self.open_flags(&inner, args.flags)?;
        let dir = inner.tree.fd(parent)?;
        let made = {
            let _as = ActAs::enter(ctx.uid, ctx.gid)?;
            // O_EXCL also keeps links from being followed.
            let create = flags | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
            sys::openat(
                dir.as_raw_fd(),
                name,
                create,
                args.mode & 0o7777 & !args.umask,
            )
        };
        let exclusive = args.flags.cast_signed() & libc::O_EXCL != 0;
        let made = match made {
            Ok(fd) => Some(File::from(fd)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !exclusive => None,
            Err(error) => return Err(error),
        };
        let entry = self.enter(&mut inner, parent, &dir, name)?;
        let opened = match made {
            Some(file) => Ok(file),
            None => {
                let kill = inner.kill_priv && args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                KillPrivileges::enter(kill)
                    .and_then(|_kill| self.open_node(&mut inner, entry.inode, flags))
            }
        };
        let handle = opened.and_then(|file| {
            let options = self.cache_options(&mut inner, entry.inode, &file);
            self.add_handle(&mut inner, entry.inode, file, flags)
                .map(|handle| (handle, options))
        });
        match handle {
            Ok((handle, options)) => Ok((entry, Some(handle), options, None)),
            Err(error) => {
                // The guest does not learn of the node.
                inner.tree.forget(entry.inode, 1);
                Err(error)
            }
        }
    }

    fn read(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        at: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        offset(at)?;
        let mut inner = self.inner();
        let open = inner.handle(node, handle)?;
        let n = w.write_from(&mut open.file, size as usize, at)?;
        inner.read_bytes += n as u64;
        Ok(n)
    }

    fn write(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        at: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.writable()?;
        offset(at)?;
        let mut inner = self.inner();
        let (writeback, kill_priv) = (inner.writeback, inner.kill_priv);
        let open = inner.handle(node, handle)?;
        open.follow_flags(flags, writeback)?;
        let n = {
            let _kill = KillPrivileges::enter(kill_priv && fuse_flags & WRITE_KILL_PRIV != 0)?;
            r.read_to(&mut open.file, size as usize, at)?
        };
        inner.written_bytes += n as u64;
        Ok(n)
    }

    fn fsync(&self, _ctx: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        sys::sync(
            self.inner().handle(node, handle)?.file.as_raw_fd(),
            data_only,
        )
    }

    fn fsyncdir(&self, ctx: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.fsync(ctx, node, data_only, handle)
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        at: u64,
        len: u64,
    ) -> io::Result<()> {
        self.writable()?;
        let mut inner = self.inner();
        let fd = inner.handle(node, handle)?.file.as_raw_fd();
        sys::fallocate(fd, mode.cast_signed(), offset(at)?, offset(len)?)
    }

    fn lseek(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        at: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let whence = whence.cast_signed();
        // The guest's kernel keeps the position; only holes are asked for.
        if whence != libc::SEEK_DATA && whence != libc::SEEK_HOLE {
            return Err(errno(libc::EINVAL));
        }
        let mut inner = self.inner();
        let open = inner.handle(node, handle)?;
        if open.dir.is_some() {
            return Err(errno(libc::EINVAL));
        }
        sys::lseek(open.file.as_raw_fd(), offset(at)?, whence).map(i64::cast_unsigned)
    }

    fn release(
        &self,
        _ctx: &Context,
        node: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.close(node, handle)
    }

    fn statfs(&self, _ctx: &Context, node: u64) -> io::Result<libc::statvfs64> {
        let fd = self.inner().tree.fd(node)?;
        sys::statvfs(fd.as_raw_fd())
    }

    fn opendir(
        &self,
        _ctx: &Context,
        node: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let mut inner = self.inner();
        if inner.tree.get(node)?.kind != libc::S_IFDIR {
            return Err(errno(libc::ENOTDIR));
        }
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let file = self.open_node(&mut inner, node, flags)?;
        let handle = self.add_handle(&mut inner, node, file, flags)?;
        let options = match self.caching {
            Caching::Always => OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE,
            Caching::Auto | Caching::Never => OpenOptions::empty(),
        };
        Ok((Some(handle), options))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        at: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list_quietly(node, handle, size, at, false, &mut |item, _| {
            add_entry(item)
        })
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        at: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list_quietly(node, handle, size, at, true, add_entry)
    }

    fn releasedir(&self, _ctx: &Context, node: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.close(node, handle)
    }

    fn setxattr(
        &self,
        _ctx: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.set_xattr(node, name, value, flags)
    }

    fn getxattr(
        &self,
        _ctx: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.get_xattr(node, name, size)
    }

    fn listxattr(&self, _ctx: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        self.list_xattrs(node, size)
    }

    fn removexattr(&self, _ctx: &Context, node: u64, name: &CStr) -> io::Result<()> {
        self.remove_xattr(node, name)
    }
}
