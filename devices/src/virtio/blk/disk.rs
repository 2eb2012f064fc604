//! What a block device is backed by.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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
    /// The host has mounted it, or somebody else has claimed it for himself.
    #[error(
        "disk {0}: in use on the host or by another VM; unmount it there, or attach it read-only"
    )]
    Claimed(PathBuf),
    /// Files that do not fit one behind the other.
    #[error(
        "{0} joined files: a disk is made of 1 to {MAX_PARTS}, each of whole sectors and not empty"
    )]
    Parts(usize),
}

/// Files that make up one disk at most.
pub const MAX_PARTS: usize = 120;
/// Where each of several files begins on the disk they make up.
const PART_ALIGN: u64 = 1 << 20;
/// How long one waits for those who look at a block device that has just come, as udev does.
const LOOKERS: Duration = Duration::from_secs(2);

/// Where files of these lengths lie on the disk that they make up, in bytes; `None` if they cannot.
/// Between two of them there is always a gap, so that no request runs from one into the other.
pub fn joined_layout(lengths: &[u64]) -> Option<Vec<u64>> {
    if lengths.is_empty() || lengths.len() > MAX_PARTS {
        return None;
    }
    let mut start = 0u64;
    let mut starts = Vec::with_capacity(lengths.len());
    for length in lengths {
        if *length == 0 || !length.is_multiple_of(SECTOR) {
            return None;
        }
        starts.push(start);
        start = start
            .checked_add(*length)?
            .checked_next_multiple_of(PART_ALIGN)?
            .checked_add(PART_ALIGN)?;
    }
    i64::try_from(start).is_ok().then_some(starts)
}

/// A file of a disk that is made of several.
#[derive(Debug)]
struct Part {
    file: File,
    start: u64,
    end: u64,
}

/// A raw disk image or a host block device; or several files one behind the other, which cannot be
/// written.
#[derive(Debug)]
pub struct Disk {
    /// The only file, or the first.
    pub(super) file: File,
    /// All files, if they are several.
    parts: Vec<Part>,
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
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) => DiskError::Claimed(path.to_owned()),
            _ => DiskError::Host {
                path: path.to_owned(),
                what: "open it",
                source,
            },
        };
        // What the host has mounted must not change behind its back.
        let claims =
            !read_only && std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(if claims { libc::O_EXCL } else { 0 })
            .open(path)
            .map_err(failed)?;
        Self::from_file(file, path, read_only, serial)
    }

    /// A disk that cannot be written, of several files at the places that [`joined_layout`] says.
    ///
    /// # Errors
    /// When they do not fit, or cannot be examined.
    pub fn joined(files: Vec<File>, path: &Path, serial: &str) -> Result<Self, DiskError> {
        let count = files.len();
        let mut lengths = Vec::with_capacity(count);
        for file in &files {
            let meta = file.metadata().map_err(|source| DiskError::Host {
                path: path.to_owned(),
                what: "examine it",
                source,
            })?;
            if !meta.is_file() {
                return Err(DiskError::Kind(path.to_owned()));
            }
            lengths.push(meta.len());
        }
        let starts = joined_layout(&lengths).ok_or(DiskError::Parts(count))?;
        let mut parts: Vec<Part> = files
            .into_iter()
            .zip(starts.into_iter().zip(lengths))
            .map(|(file, (start, length))| Part {
                file,
                start,
                end: start + length,
            })
            .collect();
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else {
            return Err(DiskError::Parts(count));
        };
        let end = last.end;
        let file = first.file.try_clone().map_err(|source| DiskError::Host {
            path: path.to_owned(),
            what: "keep it open",
            source,
        })?;
        if count == 1 {
            parts.clear();
        }
        Ok(Self {
            file,
            parts,
            read_only: true,
            sectors: end / SECTOR,
            block_size: SECTOR as u32,
            id: identity(serial),
        })
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
        let begin = Instant::now();
        loop {
            let lock = if read_only {
                file.try_lock_shared()
            } else {
                file.try_lock()
            };
            match lock {
                // Who only looks at a new device is done within moments.
                Err(TryLockError::WouldBlock)
                    if meta.file_type().is_block_device() && begin.elapsed() < LOOKERS =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => return Err(DiskError::InUse(path.to_owned())),
                // Some file systems have no locks; then it is up to the user.
                Ok(()) | Err(TryLockError::Error(_)) => break,
            }
        }
        if !size.is_multiple_of(SECTOR) {
            log::warn!(
                "disk {}: {size} bytes are not a multiple of {SECTOR}; the guest does not see the rest",
                path.display()
            );
        }
        Ok(Self {
            file,
            parts: Vec::new(),
            read_only,
            sectors: size / SECTOR,
            block_size,
            id: identity(serial),
        })
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The file and the byte in it where `count` bytes from `sector` begin, if the disk has them.
    pub(super) fn range(&self, sector: u64, count: u64) -> Option<(RawFd, u64)> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(count)?;
        // File offsets are signed; a disk that large does not exist, but nothing should rely on it.
        if end > self.sectors * SECTOR || i64::try_from(end).is_err() {
            return None;
        }
        if self.parts.is_empty() {
            return Some((self.file.as_raw_fd(), start));
        }
        // A guest may ask for anything: what touches a gap or runs over an end is not there.
        let part = self
            .parts
            .iter()
            .find(|part| part.start <= start && start < part.end)?;
        (end <= part.end).then_some((part.file.as_raw_fd(), start - part.start))
    }
}

fn identity(serial: &str) -> [u8; ID_LEN] {
    let mut id = [0; ID_LEN];
    for (to, from) in id.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    id
}
