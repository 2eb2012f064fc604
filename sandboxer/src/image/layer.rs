//! The writable root filesystem of one container over an unpacked image.

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::ImageError;
use crate::fsutil;

/// How a container's root is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Overlay,
    Bind,
    Copy,
}

/// A mounted or copied root; gone when dropped.
#[derive(Debug)]
pub struct ContainerRoot {
    mountpoint: PathBuf,
    /// Upper and work directory of an overlay.
    writable: Option<PathBuf>,
    form: Form,
}

impl ContainerRoot {
    /// Makes `mountpoint` (created here) show `lower`, writable unless `read_only`. What the
    /// container writes goes to a directory made below one of `writable`, tried in order: not
    /// every file system can be the upper layer of an overlay.
    ///
    /// # Errors
    /// Neither an overlay nor a copy is possible. Nothing is left behind.
    pub fn create(
        lower: &Path,
        mountpoint: &Path,
        writable: &[PathBuf],
        read_only: bool,
    ) -> Result<Self, ImageError> {
        let io_error = |e| ImageError::io(format!("container root {}", mountpoint.display()), e);
        std::fs::create_dir_all(mountpoint).map_err(io_error)?;
        if nix::unistd::geteuid().is_root() {
            if read_only && bind(lower, mountpoint).is_ok() {
                return Ok(Self {
                    mountpoint: mountpoint.to_owned(),
                    writable: None,
                    form: Form::Bind,
                });
            }
            for dir in writable {
                if overlay(lower, mountpoint, dir).is_ok() {
                    return Ok(Self {
                        mountpoint: mountpoint.to_owned(),
                        writable: Some(dir.clone()),
                        form: Form::Overlay,
                    });
                }
                let _ = fsutil::remove_dir(dir);
            }
        }
        let made = Self {
            mountpoint: mountpoint.to_owned(),
            writable: None,
            form: Form::Copy,
        };
        fsutil::copy_tree(lower, mountpoint).map_err(|e| {
            ImageError::io(format!("copying the image to {}", mountpoint.display()), e)
        })?;
        Ok(made)
    }

    /// From here on, device nodes in it cannot be opened. For programs that run on this very kernel:
    /// an image may hold a node of the host's disk.
    ///
    /// # Errors
    /// The host refuses; then the root must not be used.
    pub fn forbid_devices(&mut self, read_only: bool) -> Result<(), ImageError> {
        if !nix::unistd::geteuid().is_root() {
            // Whoever unpacked it could make none, and opens none that are not theirs.
            return Ok(());
        }
        let mountpoint = self.mountpoint.display();
        let failed = |e: nix::Error| {
            ImageError::io(
                format!("container root {mountpoint}: forbidding devices"),
                e.into(),
            )
        };
        if self.form == Form::Copy {
            mount(
                Some(&self.mountpoint),
                &self.mountpoint,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .map_err(failed)?;
            self.form = Form::Bind;
        }
        let mut flags =
            MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        if read_only {
            flags |= MsFlags::MS_RDONLY;
        }
        mount(
            None::<&str>,
            &self.mountpoint,
            None::<&str>,
            flags,
            None::<&str>,
        )
        .map_err(failed)
    }

    /// `overlay`, `bind` or `copy`, for `inspect`.
    pub fn form(&self) -> &'static str {
        match self.form {
            Form::Overlay => "overlay",
            Form::Bind => "bind",
            Form::Copy => "copy",
        }
    }
}

impl Drop for ContainerRoot {
    fn drop(&mut self) {
        if self.form != Form::Copy {
            let _ = umount2(&self.mountpoint, MntFlags::MNT_DETACH);
        }
        if let Some(dir) = &self.writable {
            let _ = fsutil::remove_dir(dir);
        }
        // Fails, by design, if the mount is still there: nothing behind it is touched.
        let _ = fsutil::remove_dir(&self.mountpoint);
    }
}

fn bind(lower: &Path, mountpoint: &Path) -> io::Result<()> {
    mount(
        Some(lower),
        mountpoint,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(e) = mount(None::<&str>, mountpoint, None::<&str>, flags, None::<&str>) {
        let _ = umount2(mountpoint, MntFlags::MNT_DETACH);
        return Err(e.into());
    }
    Ok(())
}

fn overlay(lower: &Path, mountpoint: &Path, writable: &Path) -> io::Result<()> {
    let (upper, work) = (writable.join("upper"), writable.join("work"));
    std::fs::create_dir_all(&upper)?;
    std::fs::create_dir_all(&work)?;
    // The root directory's own owner and mode come from the upper layer once it exists.
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let meta = std::fs::metadata(lower)?;
    std::fs::set_permissions(
        &upper,
        std::fs::Permissions::from_mode(meta.mode() & 0o7777),
    )?;
    std::os::unix::fs::chown(&upper, Some(meta.uid()), Some(meta.gid()))?;
    let base = format!(
        "lowerdir={},upperdir={},workdir={}",
        escape(lower)?,
        escape(&upper)?,
        escape(&work)?
    );
    // With an index and exportable handles the file server needs no open descriptor per inode;
    // not every combination of layers can give them.
    let mut last = io::Error::from(io::ErrorKind::Unsupported);
    for extra in [",index=on,nfs_export=on,xino=auto", ",xino=auto", ""] {
        let options = format!("{base}{extra}");
        match mount(
            Some("bulkhead"),
            mountpoint,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        ) {
            Ok(()) => return Ok(()),
            Err(e) => last = e.into(),
        }
    }
    Err(last)
}

/// Overlay options take ',' and ':' as separators.
fn escape(path: &Path) -> io::Result<String> {
    let text = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(text.chars().fold(String::new(), |mut out, c| {
        if matches!(c, ',' | ':' | '\\') {
            out.push('\\');
        }
        out.push(c);
        out
    }))
}
