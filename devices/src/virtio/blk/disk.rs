//! What a block device is backed by.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Unit of addresses in requests, in bytes.
pub const SECTOR: u64 = 512;
/// Length of the identity a guest can ask for.
pub const ID_LEN: usize = 20;

nix::ioctl_read!(blk_get_size, 0x12, 114, u64);
nix::ioctl_read_bad!(blk_get_block_size, 0x1268, libc::c_int);

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened or examined.
    #[error("disk {path}: cannot {what}: {source}")]
    Host {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// It is a directory, a pipe, …
    #[error("disk {0}: neither a file nor a block device; give a raw image")]
    Kind(PathBuf),
    /// Another VM uses it.
    #[error("disk {0}: in use by another VM; attach it read-only in all of them, or copy it")]
    InUse(PathBuf),
}

/// A raw disk image or a host block device.
#[derive(Debug)]
pub struct Disk {
    pub(super) file: File,
    pub(super) read_only: bool,
    pub(super) sectors: u64,
    pub(super) block_size: u32,
    pub(super) id: [u8; ID_LEN],
}

impl Disk {
    /// Opens `path`. `serial` is what the guest finds as the disk's serial number (20 bytes of
    /// it). A disk that can be written is locked against use by others, one that cannot be
    /// written may be shared with others that do not write either.
    ///
    /// # Errors
    /// When it cannot be opened, is of the wrong kind, or in use.
    pub fn open(path: &Path, read_only: bool, serial: &str) -> Result<Self, DiskError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(|source| DiskError::Host {
                path: path.to_owned(),
                what: "open it",
                source,
            })?;
        Self::from_file(file, path, read_only, serial)
    }

    /// As [`Self::open`], with a file that is open already; `path` is for messages.
    ///
    /// # Errors
    /// See [`Self::open`].
    pub fn from_file(
        file: File,
        path: &Path,
        read_only: bool,
        serial: &str,
    ) -> Result<Self, DiskError> {
        let host = |what: &'static str| {
            move |source| DiskError::Host {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let meta = file.metadata().map_err(host("examine it"))?;
        let (size, block_size) = if meta.file_type().is_block_device() {
            let (mut size, mut block) = (0, 0);
            // SAFETY: the kernel writes one u64 and one int to where the pointers point.
            unsafe {
                blk_get_size(file.as_raw_fd(), &raw mut size)
                    .and_then(|_| blk_get_block_size(file.as_raw_fd(), &raw mut block))
            }
            .map_err(io::Error::from)
            .map_err(host("ask for its size"))?;
            (size, u32::try_from(block).unwrap_or(SECTOR as u32))
        } else if meta.is_file() {
            (meta.len(), SECTOR as u32)
        } else {
            return Err(DiskError::Kind(path.to_owned()));
        };
        let lock = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match lock {
            Err(TryLockError::WouldBlock) => return Err(DiskError::InUse(path.to_owned())),
            // Some file systems have no locks; then it is up to the user.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        if !size.is_multiple_of(SECTOR) {
            log::warn!(
                "disk {}: {size} bytes are not a multiple of {SECTOR}; the guest does not see the rest",
                path.display()
            );
        }
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            file,
            read_only,
            sectors: size / SECTOR,
            block_size,
            id,
        })
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The byte range of `count` bytes from `sector`, if the disk has it.
    pub(super) fn range(&self, sector: u64, count: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(count)?;
        // File offsets are signed; a disk that large does not exist, but nothing should rely on it.
        (end <= self.sectors * SECTOR && i64::try_from(end).is_ok()).then_some(start)
    }
}
