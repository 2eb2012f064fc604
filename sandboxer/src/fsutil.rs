//! File operations that cannot be led astray: every path is resolved by the kernel inside a given
//! directory (`openat2`), and trees are removed without following links or crossing mounts.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// How deep a tree may be that we remove: one descriptor is open per level.
const MAX_DEPTH: usize = 512;

/// Opens a directory for use as the root of [`open_in_root`].
///
/// # Errors
/// As `open(2)`.
pub fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open(
        path,
        OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?)
}

/// Opens `path` as a process with root directory `root` would see it: absolute links and `..`
/// stay inside.
///
/// # Errors
/// As `openat2(2)` with `RESOLVE_IN_ROOT`; magic links are refused.
pub fn open_in_root(root: impl AsFd, path: &OsStr, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let path = if path.is_empty() {
        OsStr::new(".")
    } else {
        path
    };
    loop {
        match openat2(root.as_fd(), path, how) {
            // The kernel asks for a retry when a rename happened meanwhile.
            Err(Errno::EAGAIN) => {}
            other => return Ok(other?),
        }
    }
}

/// Opens a direct child directory: no link, no mount point.
fn open_child(parent: BorrowedFd<'_>, name: &CStr) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_XDEV
                | ResolveFlag::RESOLVE_NO_SYMLINKS,
        );
    openat2(parent, name, how)
}

fn is_dir(parent: BorrowedFd<'_>, name: &CStr) -> nix::Result<bool> {
    let stat = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    Ok(stat.st_mode & libc::S_IFMT == SFlag::S_IFDIR.bits())
}

/// Removes `name` below `parent` with everything in it. Links are removed, not followed; a mount
/// point inside makes it fail before anything behind it is touched, also when the mount is of the
/// same file system.
///
/// # Errors
/// The first failure; a missing `name` is none.
pub fn remove_tree(parent: impl AsFd, name: &OsStr) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    remove_level(parent.as_fd(), &name, 0)
}

fn remove_level(parent: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other("directories are nested too deeply"));
    }
    match is_dir(parent, name) {
        Err(Errno::ENOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
        Ok(false) => return Ok(unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?),
        Ok(true) => {}
    }
    match unlinkat(parent, name, UnlinkatFlags::RemoveDir) {
        Ok(()) => return Ok(()),
        Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::EACCES) => {}
        Err(e) => return Err(e.into()),
    }
    let fd = match open_child(parent, name) {
        // Not ours to read (an unprivileged import of an image with closed directories).
        Err(Errno::EACCES) => {
            nix::sys::stat::fchmodat(
                parent,
                name,
                Mode::S_IRWXU,
                nix::sys::stat::FchmodatFlags::FollowSymlink,
            )?;
            open_child(parent, name)?
        }
        other => other?,
    };
    for child in children(&fd)? {
        remove_level(fd.as_fd(), &child, depth + 1)?;
    }
    Ok(unlinkat(parent, name, UnlinkatFlags::RemoveDir)?)
}

/// Names in a directory, without `.` and `..`.
///
/// # Errors
/// As `readdir(3)`.
pub fn children(dir: &OwnedFd) -> io::Result<Vec<CString>> {
    // A duplicate would share the position with `dir`; opening "." again does not.
    let again = open_child(dir.as_fd(), c".")?;
    let mut dir = Dir::from_fd(again)?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Removes a whole directory by path; see [`remove_tree`].
///
/// # Errors
/// As [`remove_tree`].
pub fn remove_dir(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no directory name",
        ));
    };
    match open_dir(parent) {
        Ok(parent) => remove_tree(&parent, name),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// How often, and how often at most, one tries to remove what could not be removed.
const REMOVE_PAUSE: Duration = Duration::from_secs(1);
const REMOVE_ATTEMPTS: usize = 3600;

/// Removes a directory that is of no use any more, now or, where the host lacks descriptors or
/// memory for that, in the background when it has them: nobody else would before the next start.
pub fn remove_at_last(dir: PathBuf, remove: fn(&Path) -> io::Result<()>) {
    let Err(error) = remove(&dir) else { return };
    tracing::warn!(%error, dir = %dir.display(), "cannot be removed yet");
    let again = move || {
        for _ in 0..REMOVE_ATTEMPTS {
            std::thread::sleep(REMOVE_PAUSE);
            if remove(&dir).is_ok() {
                return;
            }
        }
        tracing::warn!(dir = %dir.display(), "stays until the next start");
    };
    let thread = std::thread::Builder::new().name("remover".into());
    // Without a thread it stays until the next start, too.
    let _ = thread.spawn(again);
}

/// Copies a tree, sharing blocks where the file system can (reflink). Owners, modes and times are
/// kept as far as the caller may.
///
/// # Errors
/// The first failure, naming the entry.
pub fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    let source = open_dir(from)?;
    let target = open_dir(to)?;
    copy_level(source.as_fd(), target.as_fd(), 0)?;
    copy_attributes(source.as_fd(), c".", target.as_fd(), c".")
}

fn copy_level(source: BorrowedFd<'_>, target: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other("directories are nested too deeply"));
    }
    let entries = {
        let again = open_child(source, c".")?;
        let mut dir = Dir::from_fd(again)?;
        dir.iter()
            .filter_map(|e| match e {
                Ok(e) if e.file_name() == c"." || e.file_name() == c".." => None,
                Ok(e) => Some(Ok((e.file_name().to_owned(), e.file_type()))),
                Err(e) => Some(Err(e)),
            })
            .collect::<nix::Result<Vec<_>>>()?
    };
    for (name, kind) in entries {
        copy_entry(source, target, &name, kind, depth)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", name.to_string_lossy())))?;
    }
    Ok(())
}

fn copy_entry(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    name: &CStr,
    kind: Option<Type>,
    depth: usize,
) -> io::Result<()> {
    let stat = fstatat(source, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    match kind {
        Some(Type::Directory) => {
            nix::sys::stat::mkdirat(target, name, Mode::S_IRWXU)?;
            copy_level(
                open_child(source, name)?.as_fd(),
                open_child(target, name)?.as_fd(),
                depth + 1,
            )?;
        }
        Some(Type::Symlink) => {
            let link = nix::fcntl::readlinkat(source, name)?;
            nix::unistd::symlinkat(link.as_os_str(), target, name)?;
        }
        Some(Type::File) => {
            let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let mut input = File::from(nix::fcntl::openat(
                source,
                name,
                flags | OFlag::O_RDONLY,
                Mode::empty(),
            )?);
            let mut output = File::from(nix::fcntl::openat(
                target,
                name,
                flags | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL,
                Mode::S_IRUSR | Mode::S_IWUSR,
            )?);
            if !reflink(&input, &output) {
                // std uses copy_file_range where it can.
                io::copy(&mut input, &mut output)?;
            }
        }
        _ => {
            let kind = SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT);
            // Device nodes need privileges; an unprivileged copy goes on without them.
            match nix::sys::stat::mknodat(
                target,
                name,
                kind,
                Mode::from_bits_truncate(stat.st_mode & 0o7777),
                stat.st_rdev,
            ) {
                Err(Errno::EPERM) => return Ok(()),
                other => other?,
            }
        }
    }
    copy_attributes(source, name, target, name)
}

fn copy_attributes(
    source: BorrowedFd<'_>,
    name: &CStr,
    target: BorrowedFd<'_>,
    to: &CStr,
) -> io::Result<()> {
    use nix::sys::stat::{FchmodatFlags, UtimensatFlags, fchmodat, utimensat};
    use nix::sys::time::TimeSpec;
    let stat = fstatat(source, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if nix::unistd::geteuid().is_root() {
        nix::unistd::fchownat(
            target,
            to,
            Some(stat.st_uid.into()),
            Some(stat.st_gid.into()),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )?;
    }
    if stat.st_mode & libc::S_IFMT != libc::S_IFLNK {
        fchmodat(
            target,
            to,
            Mode::from_bits_truncate(stat.st_mode & 0o7777),
            FchmodatFlags::FollowSymlink,
        )?;
    }
    let at = TimeSpec::new(stat.st_atime, stat.st_atime_nsec);
    let mt = TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec);
    Ok(utimensat(
        target,
        to,
        &at,
        &mt,
        UtimensatFlags::NoFollowSymlink,
    )?)
}

fn reflink(from: &File, to: &File) -> bool {
    // SAFETY: FICLONE takes a file descriptor by value and touches no memory of ours; both
    // descriptors are open for the duration of the call.
    unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE as _, from.as_raw_fd()) == 0 }
}

/// Sets an extended attribute on an open file.
///
/// # Errors
/// As `fsetxattr(2)`.
pub fn set_xattr(file: impl AsFd, name: &str, value: &[u8]) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: `name` is NUL-terminated, `value` is valid for its length, the descriptor is open.
    let result = unsafe {
        libc::fsetxattr(
            file.as_fd().as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Writes a file so that a reader sees the old or the new content, never a part.
///
/// # Errors
/// The first failure; the temporary file is removed.
pub fn write_atomically(path: &Path, data: &[u8], mode: u32) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
    let result = (|| {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(data)?;
        file.sync_data()?;
        std::fs::rename(&temporary, path)
    })();
    if result.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    result
}

/// Takes an exclusive lock on a file made for it; released when the result is dropped.
///
/// # Errors
/// `WouldBlock` if another process holds it and `wait` is false.
pub fn lock(path: &Path, wait: bool) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    if wait {
        file.lock()?;
    } else {
        file.try_lock().map_err(io::Error::from)?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn what_cannot_be_removed_now_is_removed_later() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("dir");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(scratch.path().join("shortage"), "").unwrap();
        remove_at_last(dir.clone(), |dir| {
            match dir.with_file_name("shortage").exists() {
                true => Err(io::Error::from_raw_os_error(libc::EMFILE)),
                false => remove_dir(dir),
            }
        });
        assert!(dir.exists());
        std::fs::remove_file(scratch.path().join("shortage")).unwrap();
        let begin = std::time::Instant::now();
        while dir.exists() {
            assert!(begin.elapsed() < Duration::from_secs(60), "it stays");
            std::thread::yield_now();
        }
    }

    #[test]
    fn removal_does_not_follow_links() {
        let dir = tempfile::tempdir().expect("tempdir");
        let keep = dir.path().join("keep");
        std::fs::create_dir_all(keep.join("sub")).expect("mkdir");
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("a/b")).expect("mkdir");
        symlink(&keep, tree.join("a/link")).expect("symlink");
        std::fs::write(tree.join("a/b/file"), "x").expect("write");
        remove_dir(&tree).expect("removed");
        assert!(!tree.exists() && keep.join("sub").exists());
        remove_dir(&tree).expect("missing is fine");
    }

    #[test]
    fn removal_stops_at_mounts_of_the_same_file_system() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // A thread of its own, since the namespace stays with it.
        std::thread::spawn(|| {
            use nix::mount::{MsFlags, mount};
            use nix::sched::{CloneFlags, unshare};
            if unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).is_err() {
                return;
            }
            mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )
            .expect("private");
            let dir = tempfile::tempdir().expect("tempdir");
            let data = dir.path().join("data");
            let tree = dir.path().join("tree");
            std::fs::create_dir_all(&data).expect("mkdir");
            std::fs::create_dir_all(tree.join("volume")).expect("mkdir");
            std::fs::write(data.join("precious"), "x").expect("write");
            mount(
                Some(&data),
                &tree.join("volume"),
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .expect("bind");
            assert!(remove_dir(&tree).is_err());
            assert!(data.join("precious").exists());
            nix::mount::umount(&tree.join("volume")).expect("umount");
            remove_dir(&tree).expect("now it goes");
            assert!(data.join("precious").exists());
        })
        .join()
        .expect("thread");
    }

    #[test]
    fn copies_keep_modes_and_links() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir_all(a.join("d")).expect("mkdir");
        std::fs::create_dir(&b).expect("mkdir");
        std::fs::write(a.join("d/f"), "text").expect("write");
        std::fs::set_permissions(a.join("d/f"), std::fs::Permissions::from_mode(0o750))
            .expect("chmod");
        symlink("/etc/passwd", a.join("l")).expect("symlink");
        copy_tree(&a, &b).expect("copied");
        assert_eq!(
            std::fs::read_to_string(b.join("d/f")).expect("read"),
            "text"
        );
        assert_eq!(
            std::fs::metadata(b.join("d/f")).expect("stat").mode() & 0o7777,
            0o750
        );
        assert_eq!(
            std::fs::read_link(b.join("l")).expect("link"),
            Path::new("/etc/passwd")
        );
    }
}
