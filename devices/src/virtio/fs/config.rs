//! What is shared, and how.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use super::sys;
use crate::virtio::DeviceError;

/// Longest tag in bytes (virtio 1.2, 5.11.4).
pub(super) const TAG_LEN: usize = 36;

/// What the names of directories begin with that hold an upper layer and its work directory.
pub const UPPER_PREFIX: &str = "upper-";

/// How long the guest may believe what it was told about files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Caching {
    /// Nothing is cached: every access asks the host. Files that others change constantly.
    Never,
    /// Names and attributes for a second, file contents until a file is seen changed when it is
    /// opened or its attributes are read. Coherent enough for volumes that the host also uses.
    #[default]
    Auto,
    /// Names, attributes and contents for a day, also that a name does not exist. Only for trees
    /// nobody else changes, such as a container's root file system; far fewer requests.
    Always,
}

impl Caching {
    /// How long names and attributes are valid.
    pub(super) const fn timeout(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Always => Duration::from_secs(24 * 60 * 60),
        }
    }

    /// How long "no such file" is valid. A program that waits for the host to make a file must
    /// see it, so only where the host makes none.
    pub(super) const fn negative_timeout(self) -> Duration {
        match self {
            Self::Never | Self::Auto => Duration::ZERO,
            Self::Always => self.timeout(),
        }
    }
}

/// How much one guest can make the host hold for one share. Beyond these the guest sees `ENFILE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsLimits {
    /// Files the guest knows of (about 200 bytes of host memory each).
    pub nodes: usize,
    /// Descriptors kept for them (`O_PATH`); the least recently used ones are closed beyond it and
    /// opened again by name when needed.
    pub node_fds: usize,
    /// Files and directories the guest has open, one descriptor each.
    pub handles: usize,
}

impl Default for FsLimits {
    fn default() -> Self {
        Self {
            nodes: 512 * 1024,
            node_fds: 1024,
            handles: 4096,
        }
    }
}

/// Configuration of a share.
#[derive(Debug)]
pub struct FsConfig {
    /// Name under which the guest mounts it, 1 to 36 bytes.
    pub tag: String,
    /// The shared directory.
    pub root: OwnedFd,
    /// Refuse every change.
    pub read_only: bool,
    /// How long the guest may cache.
    pub caching: Caching,
    /// Let the guest collect writes in its page cache (`FUSE_WRITEBACK_CACHE`): faster for small
    /// writes, but the host sees them late. Needs a directory nobody else changes.
    pub writeback: bool,
    /// Extended attributes.
    pub xattrs: bool,
    /// Let the guest make block and character device nodes on the host.
    pub device_nodes: bool,
    /// Let the guest use directories below it as upper layers of overlays: it may make whiteouts and
    /// set `trusted.overlay.*`. What is in the root of the share, and in directories of the root
    /// whose names begin with [`UPPER_PREFIX`], then is the host's choice alone.
    pub upper_layers: bool,
    /// What is in the root of the share is the host's choice alone: directories that the host makes
    /// and mounts to while the guest runs. A guest that could put a link there would lead the host's
    /// mounts to where it points.
    pub fixed_top: bool,
    /// Bounds.
    pub limits: FsLimits,
}

impl FsConfig {
    /// Shares the directory at `root` under `tag`, with the defaults: writable, [`Caching::Auto`],
    /// extended attributes, no writeback, no device nodes.
    ///
    /// # Errors
    /// When `root` cannot be opened as a directory.
    pub fn new(tag: impl Into<String>, root: &Path) -> Result<Self, DeviceError> {
        let fd = sys::open_root(root).map_err(|source| DeviceError::Host {
            device: "fs",
            what: format!("opening the shared directory {}", root.display()),
            source,
        })?;
        Ok(Self::from_fd(tag, fd))
    }

    /// As [`new`](Self::new), with a descriptor of the directory (`O_PATH` is enough).
    pub fn from_fd(tag: impl Into<String>, root: OwnedFd) -> Self {
        Self {
            tag: tag.into(),
            root,
            read_only: false,
            caching: Caching::default(),
            writeback: false,
            xattrs: true,
            device_nodes: false,
            upper_layers: false,
            fixed_top: false,
            limits: FsLimits::default(),
        }
    }
}
