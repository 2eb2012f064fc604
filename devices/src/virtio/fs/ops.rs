//! File operations of the guest.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};

use super::config::{Caching, FsConfig};
use super::creds::{ActAs, KillPrivileges};
use super::dir::DirStream;
use super::metrics::FsMetrics;
use super::sys::{self, Stat, errno};
use super::tree::{Tree, Version};

/// Most bytes one `copy_file_range` request copies, so that it cannot hold the thread for long;
/// the guest asks again for the rest.
const MAX_COPY: u64 = 64 << 20;

/// A file or directory the guest has open.
#[derive(Debug)]
pub(super) struct Handle {
    pub node: u64,
    pub file: File,
    /// Flags it was opened with, for saving.
    pub flags: i32,
    /// Set for directories.
    pub dir: Option<DirStream>,
    /// `O_APPEND` and `O_NONBLOCK` as set now.
    status_flags: i32,
}

/// What changes while the share is served.
#[derive(Debug)]
pub(super) struct Inner {
    pub tree: Tree,
    pub handles: HashMap<u64, Handle>,
    pub next_handle: u64,
    pub writeback: bool,
    pub kill_priv: bool,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// An error the server is not told of because it would log it; see `take_error`.
    pending_error: Option<i32>,
}

/// The shared directory.
#[derive(Debug)]
pub(super) struct Share {
    pub read_only: bool,
    pub caching: Caching,
    pub xattrs: bool,
    writeback_wanted: bool,
    device_nodes: bool,
    pub proc: OwnedFd,
    inner: Mutex<Inner>,
}

/// A name the guest may use: one component.
fn checked(name: &CStr) -> io::Result<&CStr> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(errno(libc::EINVAL));
    }
    Ok(name)
}

fn offset(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| errno(libc::EINVAL))
}

impl Share {
    pub(super) fn new(config: FsConfig) -> io::Result<Self> {
        Ok(Self {
            read_only: config.read_only,
            caching: config.caching,
            xattrs: config.xattrs,
            writeback_wanted: config.writeback
                && !config.read_only
                && config.caching != Caching::Never,
            device_nodes: config.device_nodes,
            proc: sys::open_proc_self_fd()?,
            inner: Mutex::new(Inner {
                tree: Tree::new(config.root, config.limits)?,
                handles: HashMap::new(),
                next_handle: 1,
                writeback: false,
                kill_priv: false,
                read_bytes: 0,
                written_bytes: 0,
                pending_error: None,
            }),
        })
    }

    /// The state. Requests are handled by one thread, so that this never waits; a poisoned lock
    /// means that a bug was caught in the middle of a request, and each request leaves maps whole.
    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all files and closes all handles.
    pub(super) fn clear(&self) {
        let mut inner = self.inner();
        inner.handles.clear();
        inner.tree.clear();
    }

    /// The error of the last request, if it is to replace the server's answer.
    pub(super) fn take_error(&self) -> Option<i32> {
        self.inner().pending_error.take()
    }

    pub(super) fn fill_metrics(&self, metrics: &mut FsMetrics) {
        let inner = self.inner();
        metrics.read_bytes = inner.read_bytes;
        metrics.written_bytes = inner.written_bytes;
        metrics.limit_hits = inner.tree.limit_hits;
        metrics.nodes = inner.tree.len() as u64;
        metrics.node_fds = inner.tree.open_count() as u64;
        metrics.handles = inner.handles.len() as u64;
    }

    pub(super) fn writable(&self) -> io::Result<()> {
        if self.read_only {
            Err(errno(libc::EROFS))
        } else {
            Ok(())
        }
    }

    pub(super) fn timeout(&self) -> Duration {
        self.caching.timeout()
    }

    fn entry(&self, inner: &Inner, node: u64, stat: &Stat) -> Entry {
        let mut attr = stat.st;
        attr.st_ino = inner.tree.shown_ino(stat.mount, attr.st_ino);
        Entry {
            inode: node,
            generation: 0,
            attr,
            attr_flags: 0,
            attr_timeout: self.timeout(),
            entry_timeout: self.timeout(),
        }
    }

    /// Looks `name` up in the directory behind `dir`, which is `parent`.
    fn enter(
        &self,
        inner: &mut Inner,
        parent: u64,
        dir: &OwnedFd,
        name: &CStr,
    ) -> io::Result<Entry> {
        let stat = sys::stat_at(dir.as_raw_fd(), name)?;
        let node = inner.tree.found(parent, name, &stat)?;
        Ok(self.entry(inner, node, &stat))
    }

    /// Makes something new in a directory, as the guest's user, and looks it up.
    fn make(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&OwnedFd, &CStr) -> io::Result<()>,
    ) -> io::Result<Entry> {
        self.writable()?;
        let name = checked(name)?;
        let mut inner = self.inner();
        let dir = inner.tree.fd(parent)?;
        {
            let _as = ActAs::enter(ctx.uid, ctx.gid)?;
            make(&dir, name)?;
        }
        self.enter(&mut inner, parent, &dir, name)
    }

    /// Keeps of a guest's open flags what has a meaning here. `O_DIRECT` is left out: the host's
    /// page cache is what all guests share, and guest memory need not be aligned for it.
    fn open_flags(&self, inner: &Inner, flags: u32) -> io::Result<i32> {
        const KEPT: i32 = libc::O_ACCMODE
            | libc::O_APPEND
            | libc::O_TRUNC
            | libc::O_SYNC
            | libc::O_DSYNC
            | libc::O_NOATIME;
        let mut flags = flags.cast_signed() & KEPT;
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            self.writable()?;
        }
        if inner.writeback {
            // The guest's page cache reads what it has not written, and it appends by itself.
            if flags & libc::O_ACCMODE == libc::O_WRONLY {
                flags = flags & !libc::O_ACCMODE | libc::O_RDWR;
            }
            flags &= !libc::O_APPEND;
        }
        Ok(flags)
    }

    /// Opens a regular file or a directory for reading and writing data. Other kinds are never
    /// opened: a device or a FIFO of the host would act on it.
    pub(super) fn open_node(&self, inner: &mut Inner, node: u64, flags: i32) -> io::Result<File> {
        let kind = inner.tree.get(node)?.kind;
        match kind {
            libc::S_IFREG => {}
            libc::S_IFDIR if flags & libc::O_DIRECTORY != 0 => {}
            libc::S_IFDIR => return Err(errno(libc::EISDIR)),
            libc::S_IFLNK => return Err(errno(libc::ELOOP)),
            _ => return Err(errno(libc::ENXIO)),
        }
        let fd = inner.tree.fd(node)?;
        sys::reopen(&self.proc, fd.as_raw_fd(), flags)
    }

    fn add_handle(&self, inner: &mut Inner, node: u64, file: File, flags: i32) -> io::Result<u64> {
        let limit = inner.tree.limits.handles;
        if inner.handles.len() >= limit {
            return Err(inner.tree.limit("open files", limit));
        }
        let id = inner.next_handle;
        inner.next_handle += 1;
        let dir = (flags & libc::O_DIRECTORY != 0).then(DirStream::default);
        let status_flags = flags & (libc::O_APPEND | libc::O_NONBLOCK);
        inner.handles.insert(
            id,
            Handle {
                node,
                file,
                flags,
                dir,
                status_flags,
            },
        );
        inner.tree.add_use(node);
        Ok(id)
    }

    /// Puts a saved handle back; the file must still be there.
    pub(super) fn restore_handle(
        &self,
        inner: &mut Inner,
        id: u64,
        node: u64,
        flags: i32,
    ) -> io::Result<()> {
        let file = self.open_node(inner, node, flags & !libc::O_TRUNC)?;
        let new = self.add_handle(inner, node, file, flags)?;
        if let Some(handle) = inner.handles.remove(&new) {
            inner.handles.insert(id, handle);
        }
        inner.next_handle = inner.next_handle.max(id.saturating_add(1));
        Ok(())
    }

    fn close(&self, node: u64, id: u64) -> io::Result<()> {
        let mut inner = self.inner();
        inner.handle(node, id)?;
        inner.handles.remove(&id);
        inner.tree.drop_use(node);
        Ok(())
    }

    /// Whether the guest's cached pages of a file are still right when it opens it.
    fn cache_options(&self, inner: &mut Inner, node: u64, file: &File) -> OpenOptions {
        match self.caching {
            Caching::Never => OpenOptions::DIRECT_IO,
            Caching::Always => OpenOptions::KEEP_CACHE,
            Caching::Auto => {
                let version = sys::stat_fd(file.as_raw_fd())
                    .ok()
                    .map(|stat| Version::of(&stat));
                let Ok(node) = inner.tree.get_mut(node) else {
                    return OpenOptions::empty();
                };
                let same = version.is_some() && node.version == version;
                node.version = version;
                if same {
                    OpenOptions::KEEP_CACHE
                } else {
                    OpenOptions::empty()
                }
            }
        }
    }

    fn list(
        &self,
        node: u64,
        handle: u64,
        size: u32,
        at: u64,
        plus: bool,
        add: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut inner = self.inner();
        inner.handle(node, handle)?;
        let dir = inner.tree.fd(node)?;
        let mount = sys::stat_fd(dir.as_raw_fd())?.mount;
        // Taken out while entries are looked up, which changes the tree beside it.
        let open = inner
            .handles
            .get_mut(&handle)
            .ok_or_else(|| errno(libc::EBADF))?;
        let mut stream = open.dir.take().ok_or_else(|| errno(libc::ENOTDIR))?;
        let fd = open.file.as_raw_fd();
        let mut result = stream.seek(fd, at);
        let mut left = size as usize;
        let mut first = true;
        while result.is_ok() {
            let item = match stream.peek(fd) {
                Ok(Some(item)) => item,
                Ok(None) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            };
            let needed = item.reply_len(plus);
            if needed > left {
                if first {
                    result = Err(errno(libc::EINVAL));
                }
                break;
            }
            let mut entry = Entry::default();
            if plus && !item.is_dot() {
                // An entry that cannot be looked up (gone meanwhile, or too many files known) is
                // listed without attributes; the guest asks for them if it cares.
                entry = self
                    .enter(&mut inner, node, &dir, &item.name)
                    .unwrap_or_default();
            }
            let shown = DirEntry {
                ino: if entry.inode == 0 {
                    inner.tree.shown_ino(mount, item.ino)
                } else {
                    entry.attr.st_ino
                },
                offset: item.next,
                type_: u32::from(item.kind),
                name: item.name.to_bytes(),
            };
            match add(shown, entry) {
                Ok(n) if n > 0 => {}
                other => {
                    inner.tree.forget(entry.inode, 1);
                    if first {
                        result = other.map(drop);
                    }
                    break;
                }
            }
            left -= needed;
            first = false;
            stream.advance();
        }
        if let Some(open) = inner.handles.get_mut(&handle) {
            open.dir = Some(stream);
        }
        // What was listed before an error has been counted as looked up: it must be delivered.
        if first { result } else { Ok(()) }
    }

    /// As `list`, with errors kept for `take_error`: the server would log each.
    fn list_quietly(
        &self,
        node: u64,
        handle: u64,
        size: u32,
        at: u64,
        plus: bool,
        add: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        if let Err(error) = self.list(node, handle, size, at, plus, add) {
            self.inner().pending_error = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        Ok(())
    }

    /// `FUSE_COPY_FILE_RANGE`, which the server does not know: both ends are handles.
    pub(super) fn copy_range(
        &self,
        from: (u64, u64, u64),
        to: (u64, u64, u64),
        len: u64,
    ) -> io::Result<usize> {
        self.writable()?;
        let mut inner = self.inner();
        let source = inner.handle(from.0, from.1)?.file.as_raw_fd();
        let target = inner.handle(to.0, to.1)?.file.as_raw_fd();
        let len = usize::try_from(len.min(MAX_COPY)).unwrap_or(0);
        let n = sys::copy_range(source, offset(from.2)?, target, offset(to.2)?, len)?;
        inner.written_bytes += n as u64;
        Ok(n)
    }
}

impl Inner {
    pub(super) fn handle(&mut self, node: u64, id: u64) -> io::Result<&mut Handle> {
        self.handles
            .get_mut(&id)
            .filter(|handle| handle.node == node)
            .ok_or_else(|| errno(libc::EBADF))
    }
}

impl Handle {
    /// The guest changed `O_APPEND` with `fcntl`: each request carries the file's flags.
    fn follow_flags(&mut self, flags: u32, writeback: bool) -> io::Result<()> {
        let wanted = if writeback {
            0
        } else {
            flags.cast_signed() & libc::O_APPEND
        };
        if wanted == self.status_flags & libc::O_APPEND {
            return Ok(());
        }
        // SAFETY: changes the status flags of a descriptor we own.
        if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETFL, wanted) } < 0 {
            return Err(io::Error::last_os_error());
        }
        self.status_flags = wanted;
        Ok(())
    }
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
            libc::S_IFCHR | libc::S_IFBLK if !self.device_nodes => {
                self.writable()?;
                Err(errno(libc::EPERM))
            }
            libc::S_IFCHR | libc::S_IFBLK => {
                self.writable()?;
                let name = checked(name)?;
                let mut inner = self.inner();
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
        if flags & libc::RENAME_WHITEOUT != 0 && !self.device_nodes {
            return Err(errno(libc::EINVAL));
        }
        let mut inner = self.inner();
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
        let fd = inner.tree.fd(node)?;
        let dir = inner.tree.fd(new_parent)?;
        sys::link(&self.proc, fd.as_raw_fd(), dir.as_raw_fd(), name)?;
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

impl Share {
    fn remove(&self, parent: u64, name: &CStr, flags: i32) -> io::Result<()> {
        self.writable()?;
        let name = checked(name)?;
        let mut inner = self.inner();
        let dir = inner.tree.fd(parent)?;
        let node = inner.tree.before_removal(parent, &dir, name);
        sys::unlinkat(dir.as_raw_fd(), name, flags)?;
        inner.tree.detach(node);
        Ok(())
    }
}
