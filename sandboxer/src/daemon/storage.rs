//! A pod's share: the directory tree its VM sees by virtio-fs.
//!
//! Two devices, as for `vmmctl run`: container roots, which nobody else changes, so that the guest
//! may cache them for good; and volumes, which others may change. The devices are made with the VM;
//! roots and volumes are mounted below them as containers come and go. Each gets a path that is
//! never used again, since the guest may remember what it has seen.
//!
//! All of it blocks shortly: callers are on blocking threads.

use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::types::Mount;
use bulkhead_vmm::{Caching, ShareConfig, UPPER_PREFIX};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::engine::microvm::share::{GUEST_PATH, TAG, VOLUMES_PATH, VOLUMES_TAG};

/// Mounts one container's root may be made of.
const MAX_ROOT_MOUNTS: usize = 64;
/// What `mount(2)` takes as data.
const MAX_DATA: usize = 4095;

/// Why a container's files cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The host refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on which object.
        what: String,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// Not a mount we can make.
    #[error("{0}")]
    Unsupported(String),
    /// A volume's source does not exist.
    #[error("volume {}: no such file or directory", .0.display())]
    Missing(PathBuf),
}

impl StorageError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// How a volume is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Access {
    /// Neither the container nor the guest may write.
    pub read_only: bool,
    /// Nor to what is mounted below.
    pub recursive: bool,
    /// What the host mounts below later is seen too.
    pub follow_mounts: bool,
}

/// A root that a guest can make of the image's layers, which are files of the host, and the
/// container's own layer, which is a directory.
#[derive(Debug, PartialEq, Eq)]
pub struct Layers {
    /// erofs images, topmost first.
    pub files: Vec<PathBuf>,
    /// The directory that holds the container's own layer and its work directory.
    parent: PathBuf,
    /// Name of the layer there.
    upper: String,
    /// Name of the work directory there.
    work: String,
}

impl Layers {
    /// What containerd's erofs snapshotter hands over: an overlay of directories on which it has
    /// mounted images, each of which lies beside its directory. `None`: it is something else.
    pub fn of(mounts: &[Mount]) -> Option<Self> {
        let [m] = mounts else { return None };
        if m.r#type != "overlay" || !matches!(m.target.as_str(), "" | "/") {
            return None;
        }
        let (mut files, mut upper, mut work) = (Vec::new(), None, None);
        for option in &m.options {
            match option.split_once('=') {
                Some(("lowerdir", layers)) => {
                    for layer in layers.split(':') {
                        files.push(image_beside(Path::new(layer))?);
                    }
                }
                Some(("upperdir", path)) => upper = Some(Path::new(path)),
                Some(("workdir", path)) => work = Some(Path::new(path)),
                // The guest's overlay has its own.
                Some(("index" | "nfs_export" | "xino", _)) => {}
                None if option == "rw" => {}
                // Who knows what is meant.
                _ => return None,
            }
        }
        let (upper, work) = (upper?, work?);
        let parent = upper.parent()?;
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        if work.parent() != Some(parent) || upper == work || files.is_empty() {
            return None;
        }
        Some(Self {
            files,
            parent: parent.to_owned(),
            upper: name(upper)?,
            work: name(work)?,
        })
    }
}

/// The image that is mounted on a layer's directory.
fn image_beside(layer: &Path) -> Option<PathBuf> {
    if layer.file_name()? != "fs" || !layer.is_absolute() {
        return None;
    }
    let image = layer.with_file_name("layer.erofs");
    let meta = std::fs::symlink_metadata(&image).ok()?;
    meta.is_file().then_some(image)
}

/// The share of one pod.
#[derive(Debug)]
pub struct Storage {
    dir: PathBuf,
    next: u64,
    containers: Vec<Files>,
}

/// What one container has mounted.
#[derive(Debug)]
struct Files {
    container: String,
    /// In the order they were mounted.
    mounted: Vec<PathBuf>,
    /// Directories and files that were made as mount points, in order.
    made: Vec<PathBuf>,
}

impl Storage {
    /// An empty share below `dir`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(dir: &Path) -> Result<Self, StorageError> {
        for sub in ["rootfs", "volumes", "lower"] {
            let path = dir.join(sub);
            std::fs::create_dir_all(&path).map_err(StorageError::io(path.display().to_string()))?;
        }
        Ok(Self {
            dir: dir.to_owned(),
            next: 0,
            containers: Vec::new(),
        })
    }

    /// The virtio-fs devices of the VM.
    pub fn devices(&self) -> Vec<ShareConfig> {
        let device = |tag: &str, sub: &str, caching| ShareConfig {
            tag: tag.into(),
            root: self.dir.join(sub),
            read_only: false,
            caching,
            upper_layers: sub == "rootfs",
            fixed_top: true,
        };
        vec![
            device(TAG, "rootfs", Caching::Always),
            device(VOLUMES_TAG, "volumes", Caching::Auto),
        ]
    }

    /// What the guest mounts: tags and paths.
    pub fn guest_mounts(&self) -> [(&'static str, &'static str); 2] {
        [(TAG, GUEST_PATH), (VOLUMES_TAG, VOLUMES_PATH)]
    }

    fn files(&mut self, container: &str) -> &mut Files {
        let at = self
            .containers
            .iter()
            .position(|c| c.container == container);
        let at = at.unwrap_or_else(|| {
            self.containers.push(Files {
                container: container.to_owned(),
                mounted: Vec::new(),
                made: Vec::new(),
            });
            self.containers.len() - 1
        });
        // It was found or has just been pushed.
        &mut self.containers[at]
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Mounts a container's root; gives its path in the guest.
    ///
    /// # Errors
    /// A mount cannot be made; [`Self::remove`] undoes the others.
    pub fn add_root(&mut self, container: &str, mounts: &[Mount]) -> Result<String, StorageError> {
        if mounts.is_empty() || mounts.len() > MAX_ROOT_MOUNTS {
            return Err(StorageError::Unsupported(format!(
                "container {container}: its root is made of {} mounts; 1 to {MAX_ROOT_MOUNTS} are possible",
                mounts.len()
            )));
        }
        let number = self.number();
        let target = self.dir.join("rootfs").join(number.to_string());
        std::fs::create_dir(&target).map_err(StorageError::io(target.display().to_string()))?;
        let lower = self.dir.join("lower");
        let files = self.files(container);
        files.made.push(target.clone());
        for m in mounts {
            let place = match m.target.trim_start_matches('/') {
                "" => target.clone(),
                // Below what is mounted already, which an image has filled: never follow it.
                other => {
                    return Err(StorageError::Unsupported(format!(
                        "container {container}: a root with a mount at {other:?} is not supported"
                    )));
                }
            };
            mount_root(m, &place, &lower)?;
            files.mounted.push(place);
        }
        Ok(format!("{GUEST_PATH}/{number}"))
    }

    /// Brings a container's own layer into the share; gives its path in the guest, and that of its
    /// work directory.
    ///
    /// # Errors
    /// It cannot be bound.
    pub fn add_upper(
        &mut self,
        container: &str,
        layers: &Layers,
    ) -> Result<(String, String), StorageError> {
        let name = format!("{UPPER_PREFIX}{}", self.number());
        let target = self.dir.join("rootfs").join(&name);
        std::fs::create_dir(&target).map_err(StorageError::io(target.display().to_string()))?;
        let files = self.files(container);
        files.made.push(target.clone());
        let failed = || StorageError::io(format!("sharing {}", layers.parent.display()));
        // Both by one mount: files are moved from one to the other.
        for (source, flags) in [
            (Some(layers.parent.as_path()), MsFlags::MS_BIND),
            (None, MsFlags::MS_PRIVATE),
        ] {
            mount(source, &target, None::<&str>, flags, None::<&str>)
                .map_err(|e| failed()(e.into()))?;
            if source.is_some() {
                files.mounted.push(target.clone());
            }
        }
        let path = |sub: &str| format!("{GUEST_PATH}/{name}/{sub}");
        Ok((path(&layers.upper), path(&layers.work)))
    }

    /// Binds a volume into the share; gives its path in the guest.
    ///
    /// # Errors
    /// It is not there, or is nothing that can be shared.
    pub fn add_volume(
        &mut self,
        container: &str,
        source: &Path,
        access: Access,
    ) -> Result<String, StorageError> {
        use std::os::unix::fs::FileTypeExt;
        let shown = source.display();
        let meta = std::fs::metadata(source).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => StorageError::Missing(source.to_owned()),
            _ => StorageError::io(format!("volume {shown}"))(e),
        })?;
        let kind = meta.file_type();
        if kind.is_char_device() || kind.is_block_device() {
            return Err(StorageError::Unsupported(format!(
                "volume {shown}: of the host's devices only block devices can be given to a VM"
            )));
        }
        let number = self.number();
        let target = self.dir.join("volumes").join(number.to_string());
        let made = match meta.is_dir() {
            true => std::fs::create_dir(&target),
            false => std::fs::File::create_new(&target).map(drop),
        };
        made.map_err(StorageError::io(target.display().to_string()))?;
        let files = self.files(container);
        files.made.push(target.clone());
        let failed = || StorageError::io(format!("sharing volume {shown}"));
        // With what is mounted below it, now and (from the host's namespace) later.
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(source), &target, None::<&str>, flags, None::<&str>)
            .map_err(|e| failed()(e.into()))?;
        files.mounted.push(target.clone());
        if !access.follow_mounts {
            let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            mount(None::<&str>, &target, None::<&str>, flags, None::<&str>)
                .map_err(|e| failed()(e.into()))?;
        }
        match (access.read_only, access.recursive) {
            (true, true) => set_read_only_below(&target).map_err(failed())?,
            (true, false) => set_read_only(&target).map_err(failed())?,
            _ => {}
        }
        Ok(format!("{VOLUMES_PATH}/{number}"))
    }

    /// Takes a container's files out of the share.
    pub fn remove(&mut self, container: &str) {
        if let Some(at) = self
            .containers
            .iter()
            .position(|c| c.container == container)
        {
            self.containers.swap_remove(at).remove();
        }
    }
}

impl Files {
    fn remove(self) {
        for target in self.mounted.iter().rev() {
            let _ = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        for path in self.made.iter().rev() {
            // Both fail, by design, if the mount is still there: nothing behind it is touched.
            if std::fs::remove_dir(path).is_err() {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        for files in self.containers.drain(..) {
            files.remove();
        }
        clean(&self.dir);
    }
}

/// Unmounts and removes what a share consists of, also one of an earlier process.
pub fn clean(dir: &Path) {
    for sub in ["rootfs", "volumes"] {
        for entry in std::fs::read_dir(dir.join(sub))
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            // Bounded: an error that stays must not hold us.
            for _ in 0..MAX_ROOT_MOUNTS {
                if umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_err() {
                    break;
                }
            }
            if std::fs::remove_dir(&path).is_err() {
                let _ = std::fs::remove_file(&path);
            }
        }
        let _ = std::fs::remove_dir(dir.join(sub));
    }
    for entry in std::fs::read_dir(dir.join("lower"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let _ = std::fs::remove_file(entry.path());
    }
    let _ = std::fs::remove_dir(dir.join("lower"));
}

/// One mount of a container's root.
fn mount_root(m: &Mount, target: &Path, lower: &Path) -> Result<(), StorageError> {
    let failed = || StorageError::io(format!("mounting {} {:?}", m.r#type, m.source));
    let (flags, data) = options(&m.options);
    match m.r#type.as_str() {
        "overlay" => overlay(&m.source, target, flags, &data, lower).map_err(failed()),
        "bind" | "rbind" => {
            let bind = MsFlags::MS_BIND | (flags & MsFlags::MS_REC);
            mount(
                Some(m.source.as_str()),
                target,
                None::<&str>,
                bind,
                None::<&str>,
            )
            .map_err(|e| failed()(e.into()))?;
            match flags.contains(MsFlags::MS_RDONLY) {
                true => set_read_only(target).map_err(failed()),
                false => Ok(()),
            }
        }
        "ext4" | "xfs" | "btrfs" | "erofs" | "tmpfs" => {
            let data = data.join(",");
            let kind = Some(m.r#type.as_str());
            mount(
                Some(m.source.as_str()),
                target,
                kind,
                flags,
                Some(data.as_str()),
            )
            .map_err(|e| failed()(e.into()))
        }
        other => Err(StorageError::Unsupported(format!(
            "container root: mounts of type {other:?} are not supported; use the overlayfs snapshotter"
        ))),
    }
}

/// Mount options as flags and the file system's own.
fn options(all: &[String]) -> (MsFlags, Vec<String>) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in all {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags -= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            // A loop device would be needed.
            other => data.push(other.to_owned()),
        }
    }
    (flags, data)
}

fn set_read_only(target: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    Ok(mount(
        None::<&str>,
        target,
        None::<&str>,
        flags,
        None::<&str>,
    )?)
}

/// With all that is mounted below.
fn set_read_only_below(target: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(target.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_RECURSIVE | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: path and attributes live through the call, and the size is that of the attributes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn overlay(
    source: &str,
    target: &Path,
    flags: MsFlags,
    data: &[String],
    lower: &Path,
) -> io::Result<()> {
    // Its own wishes about these come after containerd's, which turns the index off.
    let kept: Vec<&str> = data
        .iter()
        .map(String::as_str)
        .filter(|o| !o.starts_with("index=") && !o.starts_with("nfs_export="))
        .collect();
    let mut base = kept.join(",");
    if base.len() + 64 > MAX_DATA {
        base = shortened(&kept, lower)?;
    }
    // With an index and exportable handles the file server needs no open descriptor per inode;
    // not every combination of layers can give them.
    let mut last = io::Error::from(io::ErrorKind::Unsupported);
    for extra in [",index=on,nfs_export=on", ",index=off"] {
        let options = format!("{base}{extra}");
        match mount(
            Some(source),
            target,
            Some("overlay"),
            flags,
            Some(options.as_str()),
        ) {
            Ok(()) => return Ok(()),
            Err(e) => last = e.into(),
        }
    }
    Err(last)
}

/// Many layers have more text than `mount(2)` takes: short links stand for them.
fn shortened(options: &[&str], lower: &Path) -> io::Result<String> {
    let mut out = Vec::new();
    for option in options {
        let Some(layers) = option.strip_prefix("lowerdir=") else {
            out.push((*option).to_owned());
            continue;
        };
        let mut links = Vec::new();
        for layer in layers.split(':') {
            links.push(link_to(Path::new(layer), lower)?);
        }
        out.push(format!("lowerdir={}", links.join(":")));
    }
    let text = out.join(",");
    if text.len() + 64 > MAX_DATA {
        return Err(io::Error::other(
            "the image has too many layers for one mount",
        ));
    }
    Ok(text)
}

fn link_to(layer: &Path, dir: &Path) -> io::Result<String> {
    for number in 0..10_000 {
        let link = dir.join(number.to_string());
        match std::os::unix::fs::symlink(layer, &link) {
            Ok(()) => return Ok(link.display().to_string()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                if std::fs::read_link(&link)? == layer {
                    return Ok(link.display().to_string());
                }
            }
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other("more than 10,000 layers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sorted() {
        let all = ["ro", "nosuid", "lowerdir=/a:/b", "index=off"].map(String::from);
        let (flags, data) = options(&all);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(data, ["lowerdir=/a:/b", "index=off"]);
    }

    #[test]
    fn layers_of_the_erofs_snapshotter_are_known() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name);
        let overlay = |lower: &[&str], more: &[&str]| {
            let lower: Vec<String> = lower.iter().map(|l| at(l).display().to_string()).collect();
            let mut options = vec![
                format!("workdir={}", at("9/work").display()),
                format!("upperdir={}", at("9/fs").display()),
                format!("lowerdir={}", lower.join(":")),
            ];
            options.extend(more.iter().map(|o| (*o).to_owned()));
            vec![Mount {
                r#type: "overlay".into(),
                source: "overlay".into(),
                target: String::new(),
                options,
            }]
        };
        for layer in ["1", "2", "3"] {
            std::fs::create_dir_all(at(layer).join("fs")).expect("mkdir");
        }
        // The overlayfs snapshotter's.
        assert_eq!(
            Layers::of(&overlay(&["2/fs", "1/fs"], &["index=off"])),
            None
        );
        for layer in ["1", "2"] {
            std::fs::write(at(layer).join("layer.erofs"), [0; 512]).expect("write");
        }
        let layers = Layers::of(&overlay(&["2/fs", "1/fs"], &["index=off"]));
        let expected = Layers {
            files: vec![at("2/layer.erofs"), at("1/layer.erofs")],
            parent: at("9"),
            upper: "fs".into(),
            work: "work".into(),
        };
        assert_eq!(layers, Some(expected));
        // One of them is not, what is meant is not known, or it leads elsewhere.
        assert_eq!(Layers::of(&overlay(&["3/fs", "1/fs"], &[])), None);
        assert_eq!(Layers::of(&overlay(&["1/fs"], &["metacopy=on"])), None);
        assert_eq!(Layers::of(&overlay(&["1/fs"], &["volatile"])), None);
        std::os::unix::fs::symlink(at("1/layer.erofs"), at("3/layer.erofs")).expect("link");
        assert_eq!(Layers::of(&overlay(&["3/fs"], &[])), None);
        let mut apart = overlay(&["1/fs"], &[]);
        apart[0].options[0] = format!("workdir={}", at("8/work").display());
        assert_eq!(Layers::of(&apart), None);
        assert_eq!(Layers::of(&[]), None);
    }

    #[test]
    fn many_layers_fit_by_links() {
        let dir = tempfile::tempdir().expect("tempdir");
        let long = "x".repeat(100);
        let layers: Vec<String> = (0..60).map(|n| format!("/{long}/{n}/fs")).collect();
        let option = format!("lowerdir={}", layers.join(":"));
        let text = shortened(&[&option, "upperdir=/u"], dir.path()).expect("short");
        assert!(text.len() < MAX_DATA && text.ends_with(",upperdir=/u"));
        // The same layers take the same links.
        assert_eq!(
            shortened(&[&option, "upperdir=/u"], dir.path()).expect("short"),
            text
        );
        let first = std::fs::read_link(dir.path().join("0")).expect("link");
        assert_eq!(first, Path::new(&layers[0]));
    }

    #[test]
    fn what_cannot_be_shared_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut storage = Storage::create(dir.path()).expect("storage");
        let missing = storage.add_volume("c", Path::new("/nonexistent/x"), Access::default());
        assert!(matches!(missing, Err(StorageError::Missing(_))));
        let device = storage.add_volume("c", Path::new("/dev/null"), Access::default());
        assert!(matches!(device, Err(StorageError::Unsupported(_))));
        assert!(storage.add_root("c", &[]).is_err());
        drop(storage);
        assert!(!dir.path().join("rootfs").exists());
    }
}
