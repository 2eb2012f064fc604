//! The directory a VM shares with its guest: container roots and volumes.
//!
//! Two devices: container roots, which nobody else changes, so that the guest may cache them for
//! good; and volumes, which others may change. As root, everything is mounted below their
//! directories, in a mount namespace of this process, so that no mount outlives it however it
//! ends. Without the right to mount, container roots are copies and each volume is a device of
//! its own.

use std::path::{Path, PathBuf};

use bulkhead_vmm::{Caching, ShareConfig};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::engine::EngineError;
use crate::image::{ContainerRoot, ImageError};
use crate::spec::BindMount;
use crate::units::Volume;

/// Tag of the share; the guest mounts it at [`GUEST_PATH`].
pub const TAG: &str = "share";
/// Where the guest sees the share.
pub const GUEST_PATH: &str = "/run/bulkhead/share";
/// Tag of the device with the volumes; there is one if there are any.
pub const VOLUMES_TAG: &str = "volumes";
/// Where the guest sees the volumes.
pub const VOLUMES_PATH: &str = "/run/bulkhead/volumes";

/// Gives this process a mount namespace of its own: what it mounts, nobody else sees, and it is
/// gone with the process. Call it before any thread is started. False without the privilege.
pub fn enter_private_mounts() -> bool {
    nix::unistd::geteuid().is_root()
        && unshare(CloneFlags::CLONE_NEWNS).is_ok()
        // Slave: later mounts of the host still appear here, ours do not appear there.
        && mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>).is_ok()
}

/// A volume after its host path was looked at.
#[derive(Debug)]
struct Checked<'a> {
    volume: &'a Volume,
    host: PathBuf,
    is_dir: bool,
}

/// The share of one VM. Unmounted and removed when dropped; drop the VM before.
#[derive(Debug)]
pub struct PodShare {
    dir: PathBuf,
    roots: Vec<ContainerRoot>,
    mounted: Vec<PathBuf>,
    extra: Vec<ShareConfig>,
    can_mount: bool,
    volumes: usize,
}

impl PodShare {
    /// An empty share at `dir`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(dir: PathBuf, can_mount: bool) -> Result<Self, EngineError> {
        for sub in ["rootfs", "volumes"] {
            std::fs::create_dir_all(dir.join(sub))
                .map_err(EngineError::io(format!("share {}", dir.display())))?;
        }
        Ok(Self {
            dir,
            roots: Vec::new(),
            mounted: Vec::new(),
            extra: Vec::new(),
            can_mount,
            volumes: 0,
        })
    }

    /// Makes the root filesystem of a container; `writable` as for [`ContainerRoot::create`].
    ///
    /// # Errors
    /// It cannot be made.
    pub fn add_root(
        &mut self,
        container: &str,
        lower: &Path,
        writable: &[PathBuf],
        read_only: bool,
    ) -> Result<(), ImageError> {
        let target = self.dir.join("rootfs").join(container);
        let writable = if self.can_mount { writable } else { &[] };
        self.roots.push(ContainerRoot::create(
            lower,
            &target,
            writable,
            read_only && self.can_mount,
        )?);
        Ok(())
    }

    /// Guest path of a container's root.
    pub fn guest_root(container: &str) -> String {
        format!("{GUEST_PATH}/{container}")
    }

    /// Makes volumes appear in the guest; the result goes into the container's spec.
    ///
    /// # Errors
    /// A path does not exist or cannot be shared.
    pub fn add_volumes(&mut self, volumes: &[Volume]) -> Result<Vec<BindMount>, EngineError> {
        volumes
            .iter()
            .map(check)
            .collect::<Result<Vec<_>, _>>()?
            .iter()
            .map(|v| self.add_volume(v))
            .collect()
    }

    fn add_volume(&mut self, checked: &Checked<'_>) -> Result<BindMount, EngineError> {
        let number = self.volumes;
        self.volumes += 1;
        let read_only = checked.volume.read_only;
        let bind = |source: String| BindMount {
            source,
            target: checked.volume.guest.clone(),
            read_only,
        };
        let refuse = |reason: String| EngineError::Volume {
            path: checked.volume.host.clone(),
            reason,
        };
        if !self.can_mount {
            if !checked.is_dir {
                return Err(refuse(
                    "is a single file; sharing one needs root (share its directory instead)".into(),
                ));
            }
            let tag = format!("volume{number}");
            self.extra.push(ShareConfig {
                tag: tag.clone(),
                root: checked.host.clone(),
                read_only,
                caching: Caching::Auto,
                upper_layers: false,
                fixed_top: false,
            });
            return Ok(bind(format!("/run/bulkhead/{tag}")));
        }
        let target = self.dir.join("volumes").join(number.to_string());
        let made = if checked.is_dir {
            std::fs::create_dir(&target)
        } else {
            std::fs::File::create_new(&target).map(drop)
        };
        made.map_err(EngineError::io(target.display().to_string()))?;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(
            Some(&checked.host),
            &target,
            None::<&str>,
            flags,
            None::<&str>,
        )
        .map_err(|e| refuse(format!("cannot be mounted for the guest: {}", e.desc())))?;
        self.mounted.push(target.clone());
        if read_only {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, &target, None::<&str>, flags, None::<&str>)
                .map_err(|e| refuse(format!("cannot be made read-only: {}", e.desc())))?;
        }
        Ok(bind(format!("{VOLUMES_PATH}/{number}")))
    }

    /// The virtio-fs devices the VM needs.
    pub fn devices(&self) -> Vec<ShareConfig> {
        let device = |tag: &str, sub: &str, caching| ShareConfig {
            tag: tag.into(),
            root: self.dir.join(sub),
            read_only: false,
            caching,
            upper_layers: false,
            fixed_top: true,
        };
        let mut all = vec![device(TAG, "rootfs", Caching::Always)];
        if !self.mounted.is_empty() {
            all.push(device(VOLUMES_TAG, "volumes", Caching::Auto));
        }
        all.extend(self.extra.iter().cloned());
        all
    }

    /// What the guest mounts: tag, path and whether it cannot write.
    pub fn guest_mounts(&self) -> Vec<(String, String, bool)> {
        self.devices()
            .into_iter()
            .map(|device| {
                let path = format!("/run/bulkhead/{}", device.tag);
                (device.tag, path, device.read_only)
            })
            .collect()
    }

    /// How the container's root was made, for `inspect`.
    pub fn root_form(&self) -> &'static str {
        self.roots.first().map_or("none", ContainerRoot::form)
    }
}

impl Drop for PodShare {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
        self.roots.clear();
        let _ = crate::fsutil::remove_dir(&self.dir);
    }
}

fn check(volume: &Volume) -> Result<Checked<'_>, EngineError> {
    let path = &volume.host;
    let meta = std::fs::metadata(path).map_err(|e| {
        let reason = match e.kind() {
            std::io::ErrorKind::NotFound => {
                format!("no such directory{}", crate::hint::sibling(path))
            }
            std::io::ErrorKind::PermissionDenied => "permission denied".into(),
            _ => e.to_string(),
        };
        EngineError::Volume {
            path: path.clone(),
            reason,
        }
    })?;
    if !meta.is_dir() && !meta.is_file() {
        return Err(EngineError::Volume {
            path: path.clone(),
            reason: "is neither a directory nor a file".into(),
        });
    }
    let host = path
        .canonicalize()
        .map_err(EngineError::io(format!("volume {}", path.display())))?;
    Ok(Checked {
        volume,
        host,
        is_dir: meta.is_dir(),
    })
}

/// Checks volumes before anything expensive is done.
///
/// # Errors
/// The first that cannot be shared.
pub fn check_volumes(volumes: &[Volume]) -> Result<(), EngineError> {
    volumes.iter().try_for_each(|v| check(v).map(|_| ()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(host: &Path, read_only: bool) -> Volume {
        Volume {
            host: host.to_owned(),
            guest: "/data".into(),
            read_only,
        }
    }

    #[test]
    fn a_mistyped_volume_is_named_with_a_hint() {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(dir.path().join("data")).expect("mkdir");
        let text = check_volumes(&[volume(&dir.path().join("dta"), false)])
            .expect_err("refused")
            .to_string();
        assert!(
            text.contains("no such directory (did you mean") && text.contains("/data?)"),
            "{text}"
        );
    }

    #[test]
    fn without_mounts_a_volume_is_a_share_of_its_own() {
        let dir = tempfile::tempdir().expect("tempdir");
        let data = dir.path().join("data");
        std::fs::create_dir(&data).expect("mkdir");
        let mut share = PodShare::create(dir.path().join("share"), false).expect("share");
        let binds = share.add_volumes(&[volume(&data, true)]).expect("volume");
        assert_eq!(binds[0].source, "/run/bulkhead/volume0");
        assert!(
            share
                .devices()
                .iter()
                .any(|d| d.tag == "volume0" && d.read_only)
        );
        assert!(
            share
                .guest_mounts()
                .iter()
                .any(|m| m.1 == "/run/bulkhead/volume0")
        );
        drop(share);
        assert!(!dir.path().join("share").exists() && data.exists());
    }

    #[test]
    fn mounted_volumes_go_without_harming_the_data() {
        std::thread::spawn(|| {
            // CLONE_FS first: a thread shares it with the others.
            if !nix::unistd::geteuid().is_root()
                || unshare(CloneFlags::CLONE_FS).is_err()
                || !enter_private_mounts()
            {
                return;
            }
            let dir = tempfile::tempdir().expect("tempdir");
            let data = dir.path().join("data");
            std::fs::create_dir(&data).expect("mkdir");
            std::fs::write(data.join("f"), "precious").expect("write");
            let lower = dir.path().join("lower");
            std::fs::create_dir(&lower).expect("mkdir");
            std::fs::write(lower.join("hello"), "image").expect("write");
            let mut share = PodShare::create(dir.path().join("share"), true).expect("share");
            share
                .add_root("c", &lower, &[dir.path().join("up")], false)
                .expect("root");
            let binds = share
                .add_volumes(&[volume(&data, true), volume(&data.join("f"), false)])
                .expect("volumes");
            assert_eq!(binds[1].source, "/run/bulkhead/volumes/1");
            let inside = dir.path().join("share/volumes/0/f");
            assert!(inside.exists() && std::fs::write(&inside, "x").is_err());
            assert!(dir.path().join("share/rootfs/c/hello").exists());
            drop(share);
            assert!(!dir.path().join("share").exists() && !dir.path().join("up").exists());
            assert_eq!(
                std::fs::read_to_string(data.join("f")).expect("read"),
                "precious"
            );
        })
        .join()
        .expect("thread");
    }
}
