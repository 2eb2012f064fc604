//! A container's files: its image, with its volumes mounted into it, as any container has them.
//! The program gets this one tree as `/`.
//!
//! An image is hostile: it may hold links that lead out, and nodes of the host's devices. Mount
//! points are found by the kernel below the root, and no device in the tree can be opened.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::rpc::{Code, Status};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, mkdirat};

use super::spec::Bind;
use crate::fsutil;

const NOTHING: Option<&str> = None;

/// Mounts `binds` into `root` and makes it safe to be handed out.
///
/// # Errors
/// A volume is missing, or the image is in its way.
pub fn complete(root: &Path, binds: &[Bind], read_only: bool) -> Result<(), Status> {
    let failed = |e: io::Error| Status::new(Code::Internal, format!("{}: {e}", root.display()));
    let top = fsutil::open_dir(root).map_err(failed)?;
    for bind in binds {
        volume(&top, bind).map_err(|e| {
            let code = match e.kind() {
                io::ErrorKind::NotFound => Code::NotFound,
                _ => Code::InvalidArgument,
            };
            let (from, to) = (bind.source.display(), bind.destination.display());
            Status::new(code, format!("volume {from} at {to}: {e}"))
        })?;
    }
    // The image alone: volumes in it are what they are.
    set_attributes(&top, read_only, 0).map_err(failed)
}

/// Forbids devices and set-user-id programs on a mount, given by its root directory; `below` may be
/// `AT_RECURSIVE`.
fn set_attributes(mounted: &OwnedFd, read_only: bool, below: libc::c_int) -> io::Result<()> {
    let mut attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    if read_only {
        attributes.attr_set |= libc::MOUNT_ATTR_RDONLY;
    }
    // SAFETY: path and attributes live through the call, and the size is that of the attributes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mounted.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | below,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn volume(root: &OwnedFd, bind: &Bind) -> io::Result<()> {
    let meta = std::fs::metadata(&bind.source)?;
    if !meta.is_dir() && !meta.is_file() {
        return Err(io::Error::other(
            "neither a directory nor a file: devices and sockets of the host mean nothing to WASI",
        ));
    }
    let place = mount_point(root, &bind.destination, meta.is_dir())?;
    let at = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(&bind.source), &at, NOTHING, flags, NOTHING)?;
    // What is visible there now; the old descriptor is of what lies beneath.
    let mounted = fsutil::open_in_root(root, bind.destination.as_os_str(), OFlag::O_PATH)?;
    set_attributes(&mounted, bind.read_only, libc::AT_RECURSIVE)
}

/// The place in the image, made if it is not there.
fn mount_point(root: &OwnedFd, destination: &Path, directory: bool) -> io::Result<OwnedFd> {
    let names: Vec<&OsStr> = destination
        .components()
        .filter_map(|c| match c {
            Component::RootDir | Component::CurDir => None,
            Component::Normal(name) => Some(Ok(name)),
            Component::ParentDir | Component::Prefix(_) => Some(Err(io::Error::other(
                "the destination must be a plain absolute path",
            ))),
        })
        .collect::<io::Result<_>>()?;
    if names.is_empty() {
        return Err(io::Error::other("nothing can be mounted over the image"));
    }
    let mut path = PathBuf::new();
    let mut parent = fsutil::open_in_root(root, path.as_os_str(), OFlag::O_PATH)?;
    for (index, name) in names.iter().enumerate() {
        path.push(name);
        let opened = fsutil::open_in_root(root, path.as_os_str(), OFlag::O_PATH);
        parent = match opened {
            Ok(fd) => fd,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                make(&parent, name, directory || index + 1 < names.len())?;
                fsutil::open_in_root(root, path.as_os_str(), OFlag::O_PATH)?
            }
            Err(e) => return Err(e),
        };
    }
    Ok(parent)
}

/// Fails if something is there, a link that leads nowhere for example.
fn make(parent: &OwnedFd, name: &OsStr, directory: bool) -> io::Result<()> {
    let mode = Mode::from_bits_truncate(0o755);
    if directory {
        match mkdirat(parent.as_fd(), name, mode) {
            Ok(()) => Ok(()),
            Err(Errno::EEXIST) => Err(io::Error::other("the image has a dead link in its place")),
            Err(e) => Err(e.into()),
        }
    } else {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(0o644);
        nix::fcntl::openat(parent.as_fd(), name, flags, mode)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_stay_in_the_image() {
        let dir = tempfile::tempdir().expect("tempdir");
        let image = dir.path().join("image");
        std::fs::create_dir_all(image.join("etc")).expect("mkdir");
        std::os::unix::fs::symlink("/../../outside", image.join("link")).expect("link");
        std::os::unix::fs::symlink("/etc", image.join("conf")).expect("link");
        let root = fsutil::open_dir(&image).expect("open");
        mount_point(&root, Path::new("/a/b/c"), true).expect("made");
        assert!(image.join("a/b/c").is_dir());
        mount_point(&root, Path::new("/conf/file"), false).expect("made");
        assert!(image.join("etc/file").is_file());
        assert!(mount_point(&root, Path::new("/link/x"), true).is_err());
        assert!(mount_point(&root, Path::new("/../x"), true).is_err());
        assert!(mount_point(&root, Path::new("/"), true).is_err());
        assert!(!dir.path().join("outside").exists() && !dir.path().join("x").exists());
    }

    #[test]
    fn devices_of_images_and_read_only_volumes() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("needs root");
            return;
        }
        // A namespace of this thread alone.
        std::thread::spawn(|| {
            use nix::sched::{CloneFlags, unshare};
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("unshare");
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(NOTHING, "/", NOTHING, private, NOTHING).expect("private");
            let dir = tempfile::tempdir().expect("tempdir");
            let (image, volume) = (dir.path().join("image"), dir.path().join("volume"));
            std::fs::create_dir_all(&image).expect("mkdir");
            std::fs::create_dir_all(&volume).expect("mkdir");
            std::fs::write(volume.join("file"), "text").expect("write");
            let null = nix::sys::stat::SFlag::S_IFCHR;
            let mode = Mode::from_bits_truncate(0o666);
            nix::sys::stat::mknod(&image.join("null"), null, mode, libc::makedev(1, 3))
                .expect("mknod");
            mount(Some(&image), &image, NOTHING, MsFlags::MS_BIND, NOTHING).expect("bind");
            let bind = |destination: &str, source: &Path, read_only| Bind {
                source: source.to_owned(),
                destination: destination.into(),
                read_only,
            };
            let binds = [
                bind("/data", &volume, true),
                bind("/etc/one", &volume.join("file"), false),
            ];
            complete(&image, &binds, false).expect("complete");
            assert!(std::fs::File::open(image.join("null")).is_err());
            assert_eq!(
                std::fs::read(image.join("data/file")).expect("read"),
                b"text"
            );
            assert!(std::fs::write(image.join("data/file"), "other").is_err());
            std::fs::write(image.join("etc/one"), "other").expect("write");
            assert_eq!(std::fs::read(volume.join("file")).expect("read"), b"other");
            let missing = [bind("/m", Path::new("/nowhere"), false)];
            let error = complete(&image, &missing, false).expect_err("missing");
            assert!(error.message.contains("/nowhere"), "{}", error.message);
            nix::mount::umount2(&image, nix::mount::MntFlags::MNT_DETACH).expect("umount");
        })
        .join()
        .expect("joined");
    }
}
