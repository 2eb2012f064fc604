//! Applying layers to a directory.
//!
//! The archive is hostile: paths are resolved by the kernel inside the target (`openat2` with
//! `RESOLVE_IN_ROOT`), the last component is never followed, and what an archive may take (bytes,
//! entries, path depth) is bounded. An image that puts a link `a -> /etc` and then writes `a/passwd`
//! writes its own `/etc/passwd`, never the host's.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{fchownat, linkat, symlinkat};

use super::ImageError;
use super::tarball::{Entry, EntryKind, TarReader};
use crate::fsutil::{children, open_in_root, remove_tree};

/// Components of a path in a layer.
const MAX_DEPTH: usize = 128;
/// Latest time stamp accepted (year 2100); later ones are set to it.
const MAX_MTIME: i64 = 4_102_444_800;

/// What one image may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// File content of all layers, bytes.
    pub bytes: u64,
    /// Entries of all layers.
    pub entries: u64,
}

/// Unpacks layers, lowest first, into one directory.
pub struct Unpacker<'a> {
    image: &'a str,
    root: OwnedFd,
    privileged: bool,
    limits: Limits,
    bytes: u64,
    entries: u64,
    stop: &'a dyn Fn() -> bool,
    /// Directory of the last entry: archives list siblings together.
    last_parent: Option<(Vec<u8>, Rc<OwnedFd>)>,
}

impl std::fmt::Debug for Unpacker<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker")
            .field("image", &self.image)
            .field("bytes", &self.bytes)
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

struct DirAttributes {
    path: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
}

/// Why an entry cannot be applied.
enum Refusal {
    Hostile(String),
    Host(io::Error),
    Archive(io::Error),
    Limit(String, String),
    Interrupted,
}

impl From<Errno> for Refusal {
    fn from(e: Errno) -> Self {
        Self::Host(e.into())
    }
}

impl From<io::Error> for Refusal {
    fn from(e: io::Error) -> Self {
        Self::Host(e)
    }
}

impl<'a> Unpacker<'a> {
    /// Unpacks into `target`, an empty directory. `stop` is asked now and then whether the user
    /// has had enough.
    ///
    /// # Errors
    /// `target` cannot be opened.
    pub fn new(
        image: &'a str,
        target: &Path,
        limits: Limits,
        stop: &'a dyn Fn() -> bool,
    ) -> Result<Self, ImageError> {
        let root = crate::fsutil::open_dir(target)
            .map_err(|e| ImageError::io(format!("opening {}", target.display()), e))?;
        Ok(Self {
            image,
            root,
            privileged: nix::unistd::geteuid().is_root(),
            limits,
            bytes: 0,
            entries: 0,
            stop,
            last_parent: None,
        })
    }

    /// Applies one uncompressed layer.
    ///
    /// # Errors
    /// The layer is malformed, hostile or too large, or the host refuses. The target is then left
    /// half-done and must be thrown away.
    pub fn layer(&mut self, layer: &str, reader: impl Read) -> Result<(), ImageError> {
        let mut tar = TarReader::new(reader);
        let mut seen = HashSet::new();
        let mut directories = Vec::new();
        self.last_parent = None;
        loop {
            let entry = match tar.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(e) => return Err(self.refuse(layer, b"", Refusal::Archive(e))),
            };
            self.apply(&entry, &mut tar, &mut seen, &mut directories)
                .map_err(|r| self.refuse(layer, &entry.path, r))?;
        }
        // Attributes of directories last, so that a read-only directory can be filled and keeps
        // its time; innermost first.
        for dir in directories.iter().rev() {
            self.finish_directory(dir)
                .map_err(|r| self.refuse(layer, &dir.path, r))?;
        }
        // The digest covers what follows the end mark, too.
        io::copy(&mut tar.into_inner(), &mut io::sink())
            .map_err(|e| self.refuse(layer, b"", Refusal::Archive(e)))?;
        Ok(())
    }

    fn refuse(&self, layer: &str, path: &[u8], refusal: Refusal) -> ImageError {
        let image = self.image.to_owned();
        let entry: String = String::from_utf8_lossy(path).chars().take(120).collect();
        match refusal {
            Refusal::Hostile(reason) => ImageError::Hostile {
                image,
                layer: layer.to_owned(),
                entry,
                reason,
            },
            Refusal::Archive(e) => ImageError::Corrupt {
                image,
                what: layer.to_owned(),
                reason: e.to_string(),
            },
            Refusal::Host(e) => {
                ImageError::io(format!("image {image}: {layer}: unpacking {entry:?}"), e)
            }
            Refusal::Limit(what, limit) => ImageError::TooLarge { image, what, limit },
            Refusal::Interrupted => ImageError::Interrupted { image },
        }
    }

    fn apply(
        &mut self,
        entry: &Entry,
        content: &mut impl Read,
        seen: &mut HashSet<Vec<u8>>,
        directories: &mut Vec<DirAttributes>,
    ) -> Result<(), Refusal> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(Refusal::Limit(
                "the number of files".into(),
                self.limits.entries.to_string(),
            ));
        }
        if self.entries.is_multiple_of(64) && (self.stop)() {
            return Err(Refusal::Interrupted);
        }
        let path = normalise(&entry.path)?;
        if path.is_empty() {
            if entry.kind == EntryKind::Directory {
                directories.push(attributes(path, entry));
            }
            return Ok(());
        }
        let (parent_path, name) = split(&path);
        if let Some(target) = name.strip_prefix(b".wh.") {
            return self.whiteout(parent_path, target, seen);
        }
        let parent = self.parent(parent_path, seen)?;
        let name_c =
            CString::new(name).map_err(|_| Refusal::Hostile("the name holds a NUL byte".into()))?;
        let existing = match fstatat(
            parent.as_fd(),
            name_c.as_c_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        ) {
            Ok(stat) => Some(stat.st_mode & libc::S_IFMT),
            Err(Errno::ENOENT) => None,
            Err(e) => return Err(e.into()),
        };
        let keep = entry.kind == EntryKind::Directory && existing == Some(libc::S_IFDIR);
        if existing.is_some() && !keep {
            remove_tree(parent.as_fd(), OsStr::from_bytes(name))?;
            // The cached directory may have been below what was just removed.
            self.last_parent = None;
        }
        match entry.kind {
            EntryKind::Directory => {
                if !keep {
                    mkdirat(parent.as_fd(), name_c.as_c_str(), Mode::S_IRWXU)?;
                }
                self.set_dir_xattrs(&parent, &name_c, entry)?;
                directories.push(attributes(path.clone(), entry));
            }
            EntryKind::File => self.file(&parent, &name_c, entry, content)?,
            EntryKind::HardLink => {
                let target = normalise(&entry.link)?;
                let (target_parent, target_name) = split(&target);
                if target_name.is_empty() {
                    return Err(Refusal::Hostile("a hard link to the root directory".into()));
                }
                let target_dir = self
                    .resolve(target_parent)
                    .map_err(|e| self.link_error(e))?;
                linkat(
                    target_dir.as_fd(),
                    OsStr::from_bytes(target_name),
                    parent.as_fd(),
                    name_c.as_c_str(),
                    AtFlags::empty(),
                )
                .map_err(|e| self.link_error(e))?;
            }
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.contains(&0) {
                    return Err(Refusal::Hostile(
                        "a symbolic link without a usable target".into(),
                    ));
                }
                symlinkat(
                    OsStr::from_bytes(&entry.link),
                    parent.as_fd(),
                    name_c.as_c_str(),
                )?;
                self.finish(&parent, &name_c, entry)?;
            }
            EntryKind::Char | EntryKind::Block | EntryKind::Fifo => {
                self.node(&parent, &name_c, entry)?
            }
            EntryKind::Other(byte) => {
                return Err(Refusal::Archive(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("an entry of unknown type {:?}", char::from(byte)),
                )));
            }
        }
        seen.insert(path);
        Ok(())
    }

    fn link_error(&self, e: Errno) -> Refusal {
        match e {
            Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP => {
                Refusal::Hostile("a hard link to something that is not in the image".into())
            }
            e => e.into(),
        }
    }

    fn file(
        &mut self,
        parent: &OwnedFd,
        name: &CString,
        entry: &Entry,
        content: &mut impl Read,
    ) -> Result<(), Refusal> {
        self.bytes = self.bytes.saturating_add(entry.size);
        if self.bytes > self.limits.bytes {
            return Err(Refusal::Limit(
                "the unpacked size".into(),
                format!("{} bytes", self.limits.bytes),
            ));
        }
        let fd = nix::fcntl::openat(
            parent.as_fd(),
            name.as_c_str(),
            OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::S_IRUSR | Mode::S_IWUSR,
        )?;
        let mut file = File::from(fd);
        let mut buffer = [0u8; 32 << 10];
        let mut since_check = 0u64;
        loop {
            let n = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Refusal::Archive(e)),
            };
            file.write_all(&buffer[..n])?;
            since_check += n as u64;
            if since_check > 4 << 20 {
                since_check = 0;
                if (self.stop)() {
                    return Err(Refusal::Interrupted);
                }
            }
        }
        self.finish(parent, name, entry)?;
        // After chown, which drops `security.capability`.
        self.set_xattrs(&file, entry)
    }

    fn node(&mut self, parent: &OwnedFd, name: &CString, entry: &Entry) -> Result<(), Refusal> {
        let kind = match entry.kind {
            EntryKind::Char => SFlag::S_IFCHR,
            EntryKind::Block => SFlag::S_IFBLK,
            _ => SFlag::S_IFIFO,
        };
        let device = libc::makedev(entry.dev_major, entry.dev_minor);
        // Without privileges there are no device nodes; containers get theirs from the agent. A
        // 0:0 character device would be a whiteout to overlayfs.
        if entry.kind != EntryKind::Fifo && (!self.privileged || device == 0) {
            return Ok(());
        }
        mknodat(
            parent.as_fd(),
            name.as_c_str(),
            kind,
            Mode::S_IRUSR | Mode::S_IWUSR,
            device,
        )?;
        self.finish(parent, name, entry)
    }

    /// Owner, mode and time of anything but directories.
    fn finish(&self, parent: &OwnedFd, name: &CString, entry: &Entry) -> Result<(), Refusal> {
        if self.privileged {
            fchownat(
                parent.as_fd(),
                name.as_c_str(),
                Some(entry.uid.into()),
                Some(entry.gid.into()),
                AtFlags::AT_SYMLINK_NOFOLLOW,
            )?;
        }
        if entry.kind != EntryKind::Symlink {
            // What we made is not a link, and nobody else writes here: following is the same.
            fchmodat(
                parent.as_fd(),
                name.as_c_str(),
                self.mode(entry.mode, 0o600),
                FchmodatFlags::FollowSymlink,
            )?;
        }
        let time = TimeSpec::new(entry.mtime.clamp(0, MAX_MTIME), 0);
        utimensat(
            parent.as_fd(),
            name.as_c_str(),
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )?;
        Ok(())
    }

    fn finish_directory(&self, dir: &DirAttributes) -> Result<(), Refusal> {
        let fd = match open_in_root(
            &self.root,
            OsStr::from_bytes(&dir.path),
            OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_NOFOLLOW,
        ) {
            Ok(fd) => fd,
            // Replaced or whited out later in the same layer.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)
                ) =>
            {
                return Ok(());
            }
            Err(e) => return Err(e.into()),
        };
        if self.privileged {
            nix::unistd::fchown(&fd, Some(dir.uid.into()), Some(dir.gid.into()))?;
        }
        nix::sys::stat::fchmod(&fd, self.mode(dir.mode, 0o700))?;
        let time = TimeSpec::new(dir.mtime.clamp(0, MAX_MTIME), 0);
        nix::sys::stat::futimens(&fd, &time, &time)?;
        Ok(())
    }

    /// Without privileges we must stay able to read what we unpacked.
    fn mode(&self, mode: u32, own: u32) -> Mode {
        Mode::from_bits_truncate(if self.privileged { mode } else { mode | own })
    }

    fn set_dir_xattrs(
        &self,
        parent: &OwnedFd,
        name: &CString,
        entry: &Entry,
    ) -> Result<(), Refusal> {
        if entry.xattrs.is_empty() {
            return Ok(());
        }
        let fd = nix::fcntl::openat(
            parent.as_fd(),
            name.as_c_str(),
            OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        self.set_xattrs(&fd, entry)
    }

    fn set_xattrs(&self, file: impl AsFd, entry: &Entry) -> Result<(), Refusal> {
        for (name, value) in &entry.xattrs {
            // `trusted.overlay.*` and `user.overlay.*` would steer the overlay we mount on top
            // (redirects, opaque marks); `security.*` other than capabilities is the host's.
            let allowed = (name.starts_with("user.") && !name.starts_with("user.overlay."))
                || (name == "security.capability" && self.privileged);
            if !allowed {
                continue;
            }
            match crate::fsutil::set_xattr(file.as_fd(), name, value) {
                Ok(()) => {}
                // The file system keeps none: the image works without.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Opens a directory inside the root; links in the path are the image's own.
    fn resolve(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        open_in_root(
            &self.root,
            OsStr::from_bytes(path),
            OFlag::O_DIRECTORY | OFlag::O_RDONLY,
        )
        .map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    }

    /// Opens the directory an entry goes into, making what the archive did not list.
    fn parent(&mut self, path: &[u8], seen: &mut HashSet<Vec<u8>>) -> Result<Rc<OwnedFd>, Refusal> {
        if let Some((last, fd)) = &self.last_parent
            && last == path
        {
            return Ok(Rc::clone(fd));
        }
        let fd = match self.resolve(path) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => self.make_parents(path)?,
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                return Err(Refusal::Hostile("its parent is not a directory".into()));
            }
            Err(e) => return Err(e.into()),
        };
        // A directory with something of this layer in it belongs to the layer, listed or not.
        for (at, _) in path.iter().enumerate().filter(|(_, b)| **b == b'/') {
            seen.insert(path[..at].to_vec());
        }
        if !path.is_empty() {
            seen.insert(path.to_vec());
        }
        let fd = Rc::new(fd);
        self.last_parent = Some((path.to_vec(), Rc::clone(&fd)));
        Ok(fd)
    }

    fn make_parents(&self, path: &[u8]) -> Result<OwnedFd, Refusal> {
        let mut current = self.resolve(b"")?;
        let mut prefix = Vec::new();
        for part in path.split(|b| *b == b'/') {
            if !prefix.is_empty() {
                prefix.push(b'/');
            }
            prefix.extend_from_slice(part);
            current = match self.resolve(&prefix) {
                Ok(fd) => fd,
                Err(Errno::ENOENT) => {
                    match mkdirat(
                        current.as_fd(),
                        OsStr::from_bytes(part),
                        Mode::from_bits_truncate(0o755),
                    ) {
                        Ok(()) => {}
                        Err(Errno::EEXIST) => {
                            return Err(Refusal::Hostile(
                                "its parent is a link that leads nowhere".into(),
                            ));
                        }
                        Err(e) => return Err(e.into()),
                    }
                    self.resolve(&prefix)?
                }
                Err(Errno::ENOTDIR | Errno::ELOOP) => {
                    return Err(Refusal::Hostile("its parent is not a directory".into()));
                }
                Err(e) => return Err(e.into()),
            };
        }
        Ok(current)
    }

    /// `.wh.NAME` removes NAME of the layers below, `.wh..wh..opq` all of the directory.
    fn whiteout(
        &mut self,
        parent: &[u8],
        target: &[u8],
        seen: &HashSet<Vec<u8>>,
    ) -> Result<(), Refusal> {
        let dir = match self.resolve(parent) {
            Ok(dir) => dir,
            Err(Errno::ENOENT) => return Ok(()),
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                return Err(Refusal::Hostile("its parent is not a directory".into()));
            }
            Err(e) => return Err(e.into()),
        };
        self.last_parent = None;
        if target == b".wh..opq" {
            return Ok(self.hide_lower(&dir, parent, seen, 0)?);
        }
        if target.starts_with(b".wh.") {
            // aufs bookkeeping.
            return Ok(());
        }
        if target.is_empty() || target == b"." || target == b".." {
            return Err(Refusal::Hostile("a whiteout of nothing".into()));
        }
        let mut full = parent.to_vec();
        if !full.is_empty() {
            full.push(b'/');
        }
        full.extend_from_slice(target);
        if seen.contains(&full) {
            return Ok(());
        }
        Ok(remove_tree(&dir, OsStr::from_bytes(target))?)
    }

    /// Removes what lower layers put into a directory; what this layer brought stays.
    fn hide_lower(
        &self,
        dir: &OwnedFd,
        path: &[u8],
        seen: &HashSet<Vec<u8>>,
        depth: usize,
    ) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other("directories are nested too deeply"));
        }
        for child in children(dir)? {
            let mut full = path.to_vec();
            if !full.is_empty() {
                full.push(b'/');
            }
            full.extend_from_slice(child.as_bytes());
            if seen.contains(&full) {
                if let Ok(fd) = nix::fcntl::openat(
                    dir.as_fd(),
                    child.as_c_str(),
                    OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
                    Mode::empty(),
                ) {
                    self.hide_lower(&fd, &full, seen, depth + 1)?;
                }
            } else {
                remove_tree(dir, OsStr::from_bytes(child.as_bytes()))?;
            }
        }
        Ok(())
    }
}

fn attributes(path: Vec<u8>, entry: &Entry) -> DirAttributes {
    DirAttributes {
        path,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
    }
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// Strips leading slashes and `.`; refuses `..`, which no honest layer holds.
fn normalise(path: &[u8]) -> Result<Vec<u8>, Refusal> {
    if path.contains(&0) {
        return Err(Refusal::Hostile("the name holds a NUL byte".into()));
    }
    let mut out = Vec::with_capacity(path.len());
    let mut depth = 0;
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(Refusal::Hostile("the path climbs out with '..'".into())),
            part => {
                depth += 1;
                if depth > MAX_DEPTH || part.len() > 255 || out.len() + part.len() > 4000 {
                    return Err(Refusal::Hostile("the path is too long or too deep".into()));
                }
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(part);
            }
        }
    }
    Ok(out)
}
