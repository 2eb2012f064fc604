//! Which disks a pod's VM has in the slots that it was given at boot, and for which containers.
//!
//! A disk is put in once for all containers of the pod that want it, and taken out when the last of
//! them goes. Each gets a serial number that is never used again, by which the guest finds it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bulkhead_protocol::rpc::{Code, Status};

use crate::engine::EngineError;

/// Why a container cannot have a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// This VM takes none.
    #[error(
        "{0}: this pod's VM has no slots for disks: raise microvm.disk_slots, or use the runtime \
         bulkhead-microvm with isolation = \"thread\" for this pod"
    )]
    NoSlots(String),
    /// All are taken.
    #[error("{what}: all {slots} disk slots of this pod's VM are taken: raise microvm.disk_slots")]
    Full {
        /// What was to be put in.
        what: String,
        /// How many there are.
        slots: usize,
    },
    /// The host has mounted it, or another VM has it.
    #[error("{0}: in use on the host or by another VM: unmount it there, or give it read-only")]
    Claimed(String),
    /// The host refused.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// More than one disk takes, or no images.
    #[error("the image's layers do not fit on a disk")]
    Layers,
    /// The VM refused.
    #[error("{what}: {source}")]
    Vm {
        /// What was to be put in.
        what: String,
        /// Why not.
        #[source]
        source: Box<EngineError>,
    },
}

impl From<DiskError> for Status {
    fn from(error: DiskError) -> Self {
        let code = match error {
            DiskError::NoSlots(_) | DiskError::Full { .. } => Code::ResourceExhausted,
            DiskError::Claimed(_) => Code::FailedPrecondition,
            DiskError::Io { .. } | DiskError::Vm { .. } | DiskError::Layers => Code::Internal,
        };
        Status::new(code, error.to_string())
    }
}

/// What a disk is, so that it is put in only once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// A block device of the host, by its numbers.
    Device {
        /// Major and minor.
        number: (u32, u32),
        /// Nobody in the guest can write to it.
        read_only: bool,
    },
    /// Files, by their file systems and inodes.
    Files(Vec<(u64, u64)>),
}

#[derive(Debug)]
struct Attached {
    key: Key,
    serial: String,
    /// Containers.
    users: BTreeSet<String>,
}

/// The slots of a VM.
#[derive(Debug)]
pub struct Disks {
    slots: Vec<Option<Attached>>,
    next: u64,
}

impl Disks {
    /// All empty.
    pub fn new(slots: u8) -> Self {
        Self {
            slots: (0..slots).map(|_| None).collect(),
            next: 1,
        }
    }

    /// Whether it has no slots at all.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Gives a container the disk `key`, if it is in a slot already.
    pub fn share(&mut self, container: &str, key: &Key) -> Option<String> {
        let there = self.slots.iter_mut().flatten().find(|a| a.key == *key)?;
        there.users.insert(container.to_owned());
        Some(there.serial.clone())
    }

    /// Gives a container the disk `key`, which `put` puts into a slot under a serial number, if it
    /// is not in one. Gives the serial number. `what` is for messages.
    ///
    /// # Errors
    /// There is no slot, or what `put` says.
    pub fn attach(
        &mut self,
        container: &str,
        what: &str,
        key: Key,
        put: impl FnOnce(usize, &str) -> Result<(), DiskError>,
    ) -> Result<String, DiskError> {
        if let Some(serial) = self.share(container, &key) {
            return Ok(serial);
        }
        let slots = self.slots.len();
        let free = self.slots.iter_mut().enumerate().find(|(_, s)| s.is_none());
        let Some((number, slot)) = free else {
            let what = what.to_owned();
            return Err(match slots {
                0 => DiskError::NoSlots(what),
                _ => DiskError::Full { what, slots },
            });
        };
        let serial = format!("bulkhead-{}", self.next);
        put(number, &serial)?;
        self.next += 1;
        *slot = Some(Attached {
            key,
            serial: serial.clone(),
            users: BTreeSet::from([container.to_owned()]),
        });
        Ok(serial)
    }

    /// A container has gone. Gives the slots that nobody uses any more, which are free from now
    /// on: the caller takes their disks out.
    pub fn release(&mut self, container: &str) -> Vec<usize> {
        let mut freed = Vec::new();
        for (number, slot) in self.slots.iter_mut().enumerate() {
            if let Some(attached) = slot
                && attached.users.remove(container)
                && attached.users.is_empty()
            {
                *slot = None;
                freed.push(number);
            }
        }
        freed
    }
}

/// Files, which disk they make, and their lengths.
type Opened = (Vec<File>, Key, Vec<u64>);

/// Opens the layers of an image.
///
/// # Errors
/// One cannot be opened.
pub fn open_layers(paths: &[PathBuf]) -> Result<Opened, DiskError> {
    let (mut files, mut ids, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
    for path in paths {
        let failed = |source| DiskError::Io {
            what: path.display().to_string(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        ids.push((meta.dev(), meta.ino()));
        lengths.push(meta.len());
        files.push(file);
    }
    Ok((files, Key::Files(ids), lengths))
}

/// The numbers of the block device behind a path of the host, if it is one.
pub fn block_device(path: &Path) -> Option<(u32, u32)> {
    let meta = std::fs::metadata(path).ok()?;
    meta.file_type()
        .is_block_device()
        .then(|| numbers(meta.rdev()))
}

fn numbers(device: u64) -> (u32, u32) {
    (libc::major(device), libc::minor(device))
}

/// Opens a block device of the host by its numbers. One that is to be written is claimed: what the
/// host has mounted, or another VM has, must not change behind their backs.
///
/// # Errors
/// It is not there, or in use.
pub fn open_device(
    what: &str,
    (major, minor): (u32, u32),
    read_only: bool,
) -> Result<File, DiskError> {
    let failed = |source: io::Error| DiskError::Io {
        what: format!("{what}: block device {major}:{minor} of the host"),
        source,
    };
    let path = device_path((major, minor)).map_err(failed)?;
    let file = File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(if read_only { 0 } else { libc::O_EXCL })
        .open(&path)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => DiskError::Claimed(format!("{what}: {}", path.display())),
            _ => failed(source),
        })?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.file_type().is_block_device() || numbers(meta.rdev()) != (major, minor) {
        let text = format!("{} is another file", path.display());
        return Err(failed(io::Error::other(text)));
    }
    Ok(file)
}

/// The kernel's own name of a device, in /dev: links there are up to others.
fn device_path((major, minor): (u32, u32)) -> io::Result<PathBuf> {
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .filter(|name| !name.is_empty() && !name.contains(".."))
        .map(|name| Path::new("/dev").join(name.trim_start_matches('/')))
        .ok_or_else(|| io::Error::other("it has no name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(minor: u32, read_only: bool) -> Key {
        Key::Device {
            number: (7, minor),
            read_only,
        }
    }

    #[test]
    fn a_disk_is_put_in_once_and_taken_out_with_its_last_user() {
        let mut disks = Disks::new(2);
        let mut put = Vec::new();
        let mut attach = |disks: &mut Disks, container: &str, key: Key| {
            disks.attach(container, "device /dev/x", key, |slot, serial| {
                put.push((slot, serial.to_owned()));
                Ok(())
            })
        };
        let first = attach(&mut disks, "a", device(0, false)).expect("first");
        assert_eq!(
            attach(&mut disks, "b", device(0, false)).expect("shared"),
            first
        );
        let second = attach(&mut disks, "b", device(0, true)).expect("another");
        assert_ne!(first, second);
        let full = attach(&mut disks, "c", device(1, false)).expect_err("full");
        assert!(full.to_string().contains("all 2 disk slots"), "{full}");
        assert!(disks.release("a").is_empty());
        assert!(disks.release("a").is_empty());
        assert_eq!(disks.release("b"), [0, 1]);
        let third = attach(&mut disks, "c", device(0, false)).expect("free again");
        assert!(third != first && third != second, "{third} was used before");
        assert_eq!(
            put,
            [(0, first), (1, second), (0, third)].map(|(n, s)| (n, s))
        );
    }

    #[test]
    fn a_disk_that_does_not_come_takes_no_slot() {
        let mut disks = Disks::new(1);
        let failed = disks.attach("a", "device /dev/x", device(0, false), |_, _| {
            Err(DiskError::Claimed("device /dev/x".into()))
        });
        assert!(matches!(failed, Err(DiskError::Claimed(_))));
        assert!(disks.release("a").is_empty());
        let files = Key::Files(vec![(1, 2)]);
        disks
            .attach("a", "image", files, |slot, _| {
                assert_eq!(slot, 0);
                Ok(())
            })
            .expect("attached");
        let none = Disks::new(0).attach("a", "device /dev/x", device(0, true), |_, _| Ok(()));
        let text = none.expect_err("no slots").to_string();
        assert!(text.contains("disk_slots") && text.contains("/dev/x"));
    }

    #[test]
    fn devices_are_told_from_other_files() {
        assert_eq!(block_device(Path::new("/dev/null")), None);
        assert_eq!(block_device(Path::new("/")), None);
        assert_eq!(block_device(Path::new("/nonexistent")), None);
        let missing = open_device("device /dev/x", (4095, 1), true);
        let text = missing.expect_err("no such device").to_string();
        assert!(text.contains("/dev/x") && text.contains("4095:1"), "{text}");
    }
}
