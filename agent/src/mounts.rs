//! Mounts: shares, and the root file systems of containers.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bulkhead_protocol::types;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{Context, Error, Result};
use crate::paths::{Resolve, by_fd, open_within, plain_absolute};

/// Where shares may be mounted and containers live.
pub const RUN_DIR: &str = "/run/bulkhead";

/// What `mount(2)` takes as data, with room for what the kernel adds.
const MAX_DATA: usize = 4000;
/// Layers of all images of a sandbox that are named by links.
const MAX_LAYERS: usize = 10_000;

/// The shares by mount point, and what stands in for virtio-fs in tests.
#[derive(Default)]
pub struct Shares {
    mounted: Mutex<BTreeMap<PathBuf, String>>,
    /// Tag to host directory: bound instead of mounted. Empty in a guest.
    stand_ins: BTreeMap<String, PathBuf>,
    /// Where the host's files are, if this runs on a host. `None` in a guest.
    host: Option<PathBuf>,
}

/// mount(8) options as flags and the file system's own data.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Flags to set.
    pub flags: MsFlags,
    /// The rest, comma-separated.
    pub data: String,
}

impl Options {
    /// Sorts options into flags and data.
    pub fn parse<S: AsRef<str>>(options: &[S]) -> Self {
        let mut flags = MsFlags::empty();
        let mut data: Vec<&str> = Vec::new();
        for option in options {
            let option = option.as_ref();
            let (set, flag) = match option {
                "ro" => (true, MsFlags::MS_RDONLY),
                "rw" => (false, MsFlags::MS_RDONLY),
                "nosuid" => (true, MsFlags::MS_NOSUID),
                "suid" => (false, MsFlags::MS_NOSUID),
                "nodev" => (true, MsFlags::MS_NODEV),
                "dev" => (false, MsFlags::MS_NODEV),
                "noexec" => (true, MsFlags::MS_NOEXEC),
                "exec" => (false, MsFlags::MS_NOEXEC),
                "sync" => (true, MsFlags::MS_SYNCHRONOUS),
                "async" => (false, MsFlags::MS_SYNCHRONOUS),
                "dirsync" => (true, MsFlags::MS_DIRSYNC),
                "noatime" => (true, MsFlags::MS_NOATIME),
                "atime" => (false, MsFlags::MS_NOATIME),
                "nodiratime" => (true, MsFlags::MS_NODIRATIME),
                "relatime" => (true, MsFlags::MS_RELATIME),
                "strictatime" => (true, MsFlags::MS_STRICTATIME),
                "bind" => (true, MsFlags::MS_BIND),
                "rbind" => (true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
                "defaults" | "" => continue,
                other => {
                    data.push(other);
                    continue;
                }
            };
            flags.set(flag, set);
        }
        Self {
            flags,
            data: data.join(","),
        }
    }
}

impl Shares {
    /// Shares whose tags may be stood in for by directories.
    pub fn with_stand_ins(stand_ins: BTreeMap<String, PathBuf>) -> Self {
        Self {
            stand_ins,
            ..Self::default()
        }
    }

    /// No shares: paths are the host's, found below `root`.
    pub fn of_host(root: PathBuf) -> Self {
        Self {
            host: Some(root),
            ..Self::default()
        }
    }

    /// Whether paths are the host's.
    pub fn are_hosts(&self) -> bool {
        self.host.is_some()
    }

    /// Mounts the share `tag` at `path`. Mounting it there again is no error.
    pub fn mount(&self, tag: &str, path: &str, options: &[String]) -> Result<()> {
        let target = plain_absolute(path)
            .filter(|p| p.starts_with(RUN_DIR) && *p != Path::new(RUN_DIR))
            .ok_or_else(|| {
                Error::Invalid(format!(
                    "share {tag:?}: path {path:?} must be absolute, plain and below {RUN_DIR}"
                ))
            })?;
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        match mounted.get(target) {
            Some(there) if there == tag => return Ok(()),
            Some(there) => {
                return Err(Error::Exists(format!(
                    "share {tag:?}: {path} holds share {there:?} already"
                )));
            }
            None => {}
        }
        std::fs::create_dir_all(target).context(|| format!("make {path}"))?;
        self.mount_virtiofs(tag, target, &Options::parse(options))?;
        mounted.insert(target.to_owned(), tag.to_owned());
        Ok(())
    }

    fn mount_virtiofs(&self, tag: &str, target: &Path, options: &Options) -> Result<()> {
        let what = || {
            format!(
                "mount virtio-fs share {tag:?} at {}; is there a device of that tag?",
                target.display()
            )
        };
        if let Some(directory) = self.stand_ins.get(tag) {
            return bind(directory, target, options.flags).context(what);
        }
        let data = Some(options.data.as_str()).filter(|d| !d.is_empty());
        mount(Some(tag), target, Some("virtiofs"), options.flags, data).context(what)
    }

    /// Opens `path`, which must lie below a mounted share, whatever symlinks are in it.
    /// On a host, it may be any path of the host's. `Ok(None)`: it is below no share.
    pub fn open(&self, path: &str) -> Result<Option<OwnedFd>> {
        if let Some(host) = &self.host
            && path.starts_with('/')
            && !Path::new(path).starts_with(RUN_DIR)
        {
            let root = File::open(host).context(|| format!("open {}", host.display()))?;
            return open_within(&root, Path::new(path), libc::O_PATH, Resolve::InRoot)
                .map(Some)
                .context(|| format!("open {path}"));
        }
        let Some(plain) = plain_absolute(path) else {
            return Err(Error::Invalid(format!(
                "path {path:?} must be absolute, without . and .."
            )));
        };
        let (root, rest) = {
            let mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
            let Some((root, rest)) = mounted
                .keys()
                .filter_map(|root| Some((root.clone(), plain.strip_prefix(root).ok()?.to_owned())))
                .max_by_key(|(root, _)| root.components().count())
            else {
                return Ok(None);
            };
            (root, rest)
        };
        let root_fd = File::open(&root).context(|| format!("open share {}", root.display()))?;
        open_within(&root_fd, &rest, libc::O_PATH, Resolve::Beneath)
            .map(Some)
            .context(|| format!("open {path} in its share"))
    }

    /// Makes a container's root at `root` from `mounts`, in order.
    pub fn mount_rootfs(&self, mounts: &[types::Mount], root: &Path) -> Result<()> {
        for m in mounts {
            self.mount_one(m, root)?;
        }
        Ok(())
    }

    fn mount_one(&self, m: &types::Mount, root: &Path) -> Result<()> {
        // Earlier mounts are the container's files: find the target without leaving them.
        let root_fd = File::open(root).context(|| format!("open {}", root.display()))?;
        let target_fd;
        let target = if m.target.is_empty() || m.target == "/" {
            root.to_owned()
        } else {
            target_fd = open_within(
                &root_fd,
                Path::new(&m.target),
                libc::O_PATH,
                Resolve::InRoot,
            )
            .context(|| format!("find mount target {:?} in the container's root", m.target))?;
            by_fd(&target_fd)
        };
        let what = || {
            format!(
                "mount {} {:?} at {:?} of the container's root",
                m.r#type, m.source, m.target
            )
        };
        let options = Options::parse(&m.options);
        match m.r#type.as_str() {
            "virtiofs" => self.mount_virtiofs(&m.source, &target, &options),
            "bulkhead-share" => {
                let source = self.open(&m.source)?.ok_or_else(|| {
                    Error::Invalid(format!(
                        "rootfs source {:?} is below no mounted share; name it in ConfigureSandbox \
                         first",
                        m.source
                    ))
                })?;
                bind(&by_fd(&source), &target, options.flags | MsFlags::MS_REC).context(what)
            }
            "bind" | "rbind" => {
                let held = self.open(&m.source)?;
                let source = match &held {
                    Some(fd) => by_fd(fd),
                    None => PathBuf::from(&m.source),
                };
                let rec = if m.r#type == "rbind" {
                    MsFlags::MS_REC
                } else {
                    MsFlags::empty()
                };
                bind(&source, &target, options.flags | rec).context(what)
            }
            "erofs" | "ext4" | "tmpfs" | "overlay" | "squashfs" | "xfs" => {
                let data = with_short_layers(&options.data).context(what)?;
                let data = Some(data.as_str()).filter(|d| !d.is_empty());
                mount(
                    Some(m.source.as_str()),
                    &target,
                    Some(m.r#type.as_str()),
                    options.flags,
                    data,
                )
                .context(what)
            }
            other => Err(Error::Unsupported(format!(
                "rootfs mount type {other:?} is not supported by this guest"
            ))),
        }
    }

    /// Binds what `source` is now to `target`, a new file or directory of ours, so that it cannot
    /// be exchanged any more.
    pub fn pin(&self, source: &OwnedFd, target: &Path) -> Result<()> {
        let stat = nix::sys::stat::fstat(source).context(|| "stat a mount source".to_owned())?;
        let is_dir = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let made = if is_dir {
            std::fs::create_dir(target)
        } else {
            File::create_new(target).map(drop)
        };
        made.context(|| format!("make {}", target.display()))?;
        bind(&by_fd(source), target, MsFlags::MS_REC)
            .context(|| format!("bind a mount source to {}", target.display()))
    }
}

/// Many layers have more text than `mount(2)` takes: short links stand for them.
pub fn with_short_layers(data: &str) -> std::io::Result<String> {
    if data.len() <= MAX_DATA {
        return Ok(data.to_owned());
    }
    let links = Path::new(RUN_DIR).join("l");
    std::fs::create_dir_all(&links)?;
    let mut options = Vec::new();
    for option in data.split(',') {
        let Some(layers) = option.strip_prefix("lowerdir=") else {
            options.push(option.to_owned());
            continue;
        };
        let mut short = Vec::new();
        for layer in layers.split(':') {
            short.push(link_to(Path::new(layer), &links)?);
        }
        options.push(format!("lowerdir={}", short.join(":")));
    }
    Ok(options.join(","))
}

/// The link in `links` that leads to `layer`.
fn link_to(layer: &Path, links: &Path) -> std::io::Result<String> {
    for number in 0..MAX_LAYERS {
        let link = links.join(number.to_string());
        match std::os::unix::fs::symlink(layer, &link) {
            Ok(()) => return Ok(link.display().to_string()),
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
            Err(_) if std::fs::read_link(&link)? == layer => return Ok(link.display().to_string()),
            Err(_) => {}
        }
    }
    Err(std::io::Error::other(format!(
        "more than {MAX_LAYERS} layers in one sandbox"
    )))
}

/// Binds `source` to `target`; flags other than `MS_REC` need a second step.
fn bind(source: &Path, target: &Path, flags: MsFlags) -> nix::Result<()> {
    let rec = flags & MsFlags::MS_REC;
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND | rec,
        None::<&str>,
    )?;
    let rest = flags - MsFlags::MS_REC - MsFlags::MS_BIND;
    if !rest.is_empty() {
        mount(
            None::<&str>,
            target,
            None::<&str>,
            MsFlags::MS_BIND | MsFlags::MS_REMOUNT | rest,
            None::<&str>,
        )?;
    }
    Ok(())
}

/// Later mounts elsewhere do not appear at `path` any more, nor below.
pub fn make_private(path: &Path) -> Result<()> {
    let none = None::<&str>;
    mount(
        none,
        path,
        none,
        MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        none,
    )
    .context(|| format!("make {} private", path.display()))
}

/// Unmounts all there is at `path`, in use or not.
pub fn unmount_all(path: &Path) {
    // Bounded: nobody stacks more, and an error that stays must not hold us.
    for _ in 0..64 {
        if umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sorted() {
        let o = Options::parse(&["ro", "nosuid", "size=1m", "rw", "mode=755", "rbind"]);
        assert_eq!(
            o.flags,
            MsFlags::MS_NOSUID | MsFlags::MS_BIND | MsFlags::MS_REC
        );
        assert_eq!(o.data, "size=1m,mode=755");
    }

    #[test]
    fn shares_only_below_the_run_directory() {
        let shares = Shares::default();
        for path in ["/etc", "/run/bulkhead", "/run/bulkhead/../x", "x", ""] {
            assert!(matches!(
                shares.mount("t", path, &[]),
                Err(Error::Invalid(_))
            ));
        }
        assert!(shares.open("/etc/passwd").unwrap().is_none());
        assert!(shares.open("/a/../b").is_err());
    }
}
