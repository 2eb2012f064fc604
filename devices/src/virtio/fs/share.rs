//! The shared directory: its state, and the steps file operations are made of.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry, OpenOptions};

use super::config::{Caching, FsConfig, UPPER_PREFIX};
use super::creds::ActAs;
use super::dir::DirStream;
use super::metrics::FsMetrics;
use super::sys::{self, Stat, errno};
use super::tree::{ROOT, Tree, Version};

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
    pub writeback_wanted: bool,
    pub device_nodes: bool,
    pub upper_layers: bool,
    pub fixed_top: bool,
    pub proc: OwnedFd,
    inner: Mutex<Inner>,
}

/// A name the guest may use: one component.
pub(super) fn checked(name: &CStr) -> io::Result<&CStr> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(errno(libc::EINVAL));
    }
    Ok(name)
}

pub(super) fn offset(value: u64) -> io::Result<i64> {
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
            upper_layers: config.upper_layers,
            fixed_top: config.fixed_top || config.upper_layers,
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

    /// Whether the guest may change which names are in a directory. Those of a fixed top and of the
    /// directories above its upper layers are the host's: a link in the place of a mount or a layer
    /// would lead others, who use its path, out of the share.
    pub(super) fn names_are_guests(&self, inner: &Inner, directory: u64) -> io::Result<()> {
        let node = inner.tree.get(directory)?;
        let holds_layer = self.upper_layers
            && node.parent == ROOT
            && node.name.to_bytes().starts_with(UPPER_PREFIX.as_bytes());
        match self.fixed_top && directory == ROOT || holds_layer {
            true => Err(errno(libc::EPERM)),
            false => Ok(()),
        }
    }

    pub(super) fn timeout(&self) -> Duration {
        self.caching.timeout()
    }

    pub(super) fn entry(&self, inner: &Inner, node: u64, stat: &Stat) -> Entry {
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
    pub(super) fn enter(
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
    pub(super) fn make(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&OwnedFd, &CStr) -> io::Result<()>,
    ) -> io::Result<Entry> {
        self.writable()?;
        let name = checked(name)?;
        let mut inner = self.inner();
        self.names_are_guests(&inner, parent)?;
        let dir = inner.tree.fd(parent)?;
        {
            let _as = ActAs::enter(ctx.uid, ctx.gid)?;
            make(&dir, name)?;
        }
        self.enter(&mut inner, parent, &dir, name)
    }

    /// Keeps of a guest's open flags what has a meaning here. `O_DIRECT` is left out: the host's
    /// page cache is what all guests share, and guest memory need not be aligned for it.
    pub(super) fn open_flags(&self, inner: &Inner, flags: u32) -> io::Result<i32> {
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
        let file = sys::reopen(&self.proc, fd.as_raw_fd(), flags)?;
        if flags & libc::O_ACCMODE != libc::O_RDONLY {
            inner.tree.changed(node);
        }
        Ok(file)
    }

    pub(super) fn add_handle(
        &self,
        inner: &mut Inner,
        node: u64,
        file: File,
        flags: i32,
    ) -> io::Result<u64> {
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

    pub(super) fn close(&self, node: u64, id: u64) -> io::Result<()> {
        let mut inner = self.inner();
        inner.handle(node, id)?;
        inner.handles.remove(&id);
        inner.tree.drop_use(node);
        Ok(())
    }

    /// Whether the guest's cached pages of a file are still right when it opens it.
    pub(super) fn cache_options(&self, inner: &mut Inner, node: u64, file: &File) -> OpenOptions {
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
    pub(super) fn list_quietly(
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

    /// `FUSE_TMPFILE`, which the server does not know: a new file without a name, opened.
    pub(super) fn temporary(
        &self,
        ctx: &Context,
        parent: u64,
        args: CreateIn,
    ) -> io::Result<(Entry, u64)> {
        self.writable()?;
        let mut inner = self.inner();
        let flags = self.open_flags(&inner, args.flags)?;
        let dir = inner.tree.fd(parent)?;
        let file = {
            let _as = ActAs::enter(ctx.uid, ctx.gid)?;
            let exclusive = args.flags.cast_signed() & libc::O_EXCL;
            let create = flags | libc::O_TMPFILE | exclusive;
            File::from(sys::openat(
                dir.as_raw_fd(),
                c".",
                create,
                args.mode & 0o7777 & !args.umask,
            )?)
        };
        let stat = sys::stat_fd(file.as_raw_fd())?;
        let path = sys::path_of(&self.proc, &file)?;
        let node = inner.tree.add_nameless(parent, &stat, path)?;
        match self.add_handle(&mut inner, node, file, flags) {
            Ok(handle) => Ok((self.entry(&inner, node, &stat), handle)),
            Err(error) => {
                inner.tree.forget(node, 1);
                Err(error)
            }
        }
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
    pub(super) fn follow_flags(&mut self, flags: u32, writeback: bool) -> io::Result<()> {
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

impl Share {
    pub(super) fn remove(&self, parent: u64, name: &CStr, flags: i32) -> io::Result<()> {
        self.writable()?;
        let name = checked(name)?;
        let mut inner = self.inner();
        self.names_are_guests(&inner, parent)?;
        let dir = inner.tree.fd(parent)?;
        let node = inner.tree.before_removal(parent, &dir, name);
        sys::unlinkat(dir.as_raw_fd(), name, flags)?;
        inner.tree.detach(node);
        Ok(())
    }
}
