//! Guest memory: one unnamed shared file, mapped below and above the hole for devices.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

use crate::error::VmError;
use crate::layout;

/// Guest memory and the memfd behind it.
#[derive(Clone, Debug)]
pub struct VmMemory {
    mmap: GuestMemoryMmap<()>,
    file: Arc<File>,
    size: u64,
    /// Bytes that may become memory later, behind `size` in the file.
    room: u64,
}

impl VmMemory {
    /// Makes `mib` MiB of zeroed memory.
    ///
    /// Nobody can shrink the file (a memfd is sealed, a file of our own tmpfs has no name): a
    /// mapping of it never raises SIGBUS, which would take every VM of the process down.
    ///
    /// # Errors
    /// When the host cannot give the address space, descriptors or huge pages.
    pub fn new(mib: u64, hugepages: bool) -> Result<Self, VmError> {
        Self::over(Self::make_file(mib, hugepages)?, mib)
    }

    /// The same, with room for `room_mib` MiB more: mapped, but nothing the guest knows of, and
    /// nothing that the host gives before it is used.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_room(mib: u64, room_mib: u64, hugepages: bool) -> Result<Self, VmError> {
        let file = Self::make_file(mib + room_mib, hugepages)?;
        let memory = Self::map_with_room(file, mib << 20, room_mib << 20)?;
        // Without effect on a memfd.
        memory.advise_huge();
        Ok(memory)
    }

    /// Makes the file for `mib` MiB of memory, for another process to map with [`VmMemory::over`]:
    /// one that has not the privilege that transparent huge pages take.
    ///
    /// # Errors
    /// As [`VmMemory::new`].
    pub fn make_file(mib: u64, hugepages: bool) -> Result<File, VmError> {
        let what = || format!("guest memory of {mib} MiB");
        let huge_file = if hugepages { None } else { huge_tmpfs_file() };
        let transparent = huge_file.is_some();
        let file = match huge_file {
            Some(file) => file,
            None => memfd(hugepages).map_err(VmError::host(what()))?,
        };
        file.set_len(mib << 20).map_err(VmError::host(what()))?;
        if !transparent {
            seal(&file).map_err(VmError::host(what()))?;
        }
        Ok(file)
    }

    /// Maps a file of [`VmMemory::make_file`].
    ///
    /// # Errors
    /// The host cannot give the address space.
    pub fn over(file: File, mib: u64) -> Result<Self, VmError> {
        let memory = Self::map(file, mib << 20)?;
        // Without effect on a memfd.
        memory.advise_huge();
        Ok(memory)
    }

    /// Asks for transparent huge pages. Also for the first 2 MiB, which a Linux guest fills with
    /// its first slabs: 300 page faults of a boot.
    fn advise_huge(&self) {
        for region in self.mmap.iter() {
            if let Ok(host) = region.get_host_address(MemoryRegionAddress(0)) {
                // SAFETY: the range is this region's own mapping. Failing to get huge pages is
                // harmless.
                unsafe { libc::madvise(host.cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
            }
        }
    }

    /// Maps an existing memfd of `size` bytes (restore, hand-over).
    ///
    /// # Errors
    /// When the file is smaller than `size` or cannot be mapped.
    pub fn map(file: File, size: u64) -> Result<Self, VmError> {
        Self::map_with_room(file, size, 0)
    }

    /// The same with room behind it.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn map_with_room(file: File, size: u64, room: u64) -> Result<Self, VmError> {
        let file = Arc::new(file);
        let behind = (room > 0).then(|| (room_start(size), room, size));
        let ranges: Vec<_> = ranges(size)
            .into_iter()
            .chain(behind)
            .map(|(start, len, offset)| {
                (
                    GuestAddress(start),
                    len as usize,
                    Some(FileOffset::from_arc(Arc::clone(&file), offset)),
                )
            })
            .collect();
        let mmap = GuestMemoryMmap::from_ranges_with_files(ranges)
            .map_err(|e| VmError::Memory(format!("mapping {} MiB: {e}", size >> 20)))?;
        for region in mmap.iter() {
            if let Ok(host) = region.get_host_address(MemoryRegionAddress(0)) {
                // SAFETY: the range is this region's own mapping. Core dumps of the daemon must
                // not hold guest memory (secrets, size); failing to say so is harmless.
                unsafe { libc::madvise(host.cast(), region.len() as usize, libc::MADV_DONTDUMP) };
            }
        }
        Ok(Self {
            mmap,
            file,
            size,
            room,
        })
    }

    /// The mapped memory.
    pub fn mmap(&self) -> &GuestMemoryMmap<()> {
        &self.mmap
    }

    /// The memfd.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where memory can be added, and how many bytes; `None`: nowhere.
    pub fn room(&self) -> Option<(u64, u64)> {
        (self.room > 0).then(|| (room_start(self.size), self.room))
    }

    /// End of RAM below the hole for devices.
    pub fn low_end(&self) -> u64 {
        self.size.min(layout::MMIO_HOLE_START)
    }

    /// End of RAM above 4 GiB, if there is any.
    pub fn high_end(&self) -> Option<u64> {
        (self.size > layout::MMIO_HOLE_START)
            .then(|| layout::MMIO_HOLE_END + (self.size - layout::MMIO_HOLE_START))
    }

    /// Writes boot data.
    pub(crate) fn put(&self, address: u64, data: &[u8]) -> Result<(), VmError> {
        self.mmap
            .write_slice(data, GuestAddress(address))
            .map_err(|e| VmError::Memory(format!("{} bytes at {address:#x}: {e}", data.len())))
    }

    /// Writes at an offset of the file; a piece must not reach across the hole for devices.
    pub(crate) fn put_at_offset(&self, offset: u64, data: &[u8]) -> Result<(), VmError> {
        let address = match offset < layout::MMIO_HOLE_START {
            true => offset,
            false => layout::MMIO_HOLE_END + (offset - layout::MMIO_HOLE_START),
        };
        self.put(address, data)
    }

    /// RAM the guest may use, as (start, size), for boot memory maps.
    pub(crate) fn usable(&self) -> Vec<(u64, u64)> {
        let mut map = vec![(0, layout::LOW_RAM_END)];
        map.push((
            layout::HIGH_RAM_START,
            self.low_end().saturating_sub(layout::HIGH_RAM_START),
        ));
        if let Some(end) = self.high_end() {
            map.push((layout::MMIO_HOLE_END, end - layout::MMIO_HOLE_END));
        }
        map
    }
}

/// Where memory is added: beyond all other, and where Linux wants it, which adds memory in pieces of
/// 128 MiB.
fn room_start(size: u64) -> u64 {
    let high = size.saturating_sub(layout::MMIO_HOLE_START);
    (layout::MMIO_HOLE_END + high).next_multiple_of(crate::room::ROOM_PIECE)
}

/// (guest address, length, file offset) of each region.
fn ranges(size: u64) -> Vec<(u64, u64, u64)> {
    let low = size.min(layout::MMIO_HOLE_START);
    let mut ranges = vec![(0, low, 0)];
    if size > low {
        ranges.push((layout::MMIO_HOLE_END, size - low, low));
    }
    ranges
}

/// An unnamed file on a tmpfs of our own that gives transparent huge pages where asked: a guest
/// boots with a hundredth of the page faults. `None` where that takes privileges we lack; a memfd
/// then serves, in small pages.
///
/// The mount is never attached to the file system tree and goes with the last descriptor of the
/// file. Like a memfd the file has no name, so that nobody else can open or truncate it; tmpfs
/// files cannot be sealed, and no code of ours resizes it.
fn huge_tmpfs_file() -> Option<File> {
    let context = syscall_fd(
        libc::SYS_fsopen,
        &[c"tmpfs".as_ptr() as i64, FSOPEN_CLOEXEC],
    )?;
    let set = |key: &std::ffi::CStr, value: &std::ffi::CStr| {
        syscall(
            libc::SYS_fsconfig,
            &[
                i64::from(context.as_raw_fd()),
                FSCONFIG_SET_STRING,
                key.as_ptr() as i64,
                value.as_ptr() as i64,
                0,
            ],
        )
    };
    set(c"huge", c"advise")?;
    // The guest's size is the file's; the mount needs no limit of its own.
    set(c"size", c"0")?;
    syscall(
        libc::SYS_fsconfig,
        &[i64::from(context.as_raw_fd()), FSCONFIG_CMD_CREATE, 0, 0, 0],
    )?;
    let mount = syscall_fd(
        libc::SYS_fsmount,
        &[
            i64::from(context.as_raw_fd()),
            FSMOUNT_CLOEXEC,
            MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
        ],
    )?;
    let file = syscall_fd(
        libc::SYS_openat,
        &[
            i64::from(mount.as_raw_fd()),
            c".".as_ptr() as i64,
            i64::from(libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC),
            0o600,
        ],
    )?;
    Some(File::from(file))
}

// linux/mount.h
const FSOPEN_CLOEXEC: i64 = 1;
const FSMOUNT_CLOEXEC: i64 = 1;
const FSCONFIG_SET_STRING: i64 = 1;
const FSCONFIG_CMD_CREATE: i64 = 6;
const MOUNT_ATTR_NOSUID: i64 = 2;
const MOUNT_ATTR_NODEV: i64 = 4;
const MOUNT_ATTR_NOEXEC: i64 = 8;

/// A system call with up to five arguments; `None` on error.
fn syscall(number: libc::c_long, args: &[i64]) -> Option<i64> {
    let arg = |index: usize| args.get(index).copied().unwrap_or(0);
    // SAFETY: used above only with calls of the mount API and openat, whose pointers are static C
    // strings and whose other arguments are descriptors and flags.
    let result = unsafe { libc::syscall(number, arg(0), arg(1), arg(2), arg(3), arg(4)) };
    (result >= 0).then_some(result)
}

fn syscall_fd(number: libc::c_long, args: &[i64]) -> Option<OwnedFd> {
    let fd = i32::try_from(syscall(number, args)?).ok()?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A file of `size` bytes in memory, written by `fill`, which nobody can write to any more.
pub(crate) fn sealed_memfd(
    size: u64,
    fill: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<File> {
    let file = memfd_named(c"bulkhead-template", 0)?;
    file.set_len(size)?;
    fill(&file)?;
    add_seals(
        &file,
        libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL,
    )?;
    Ok(file)
}

fn memfd(hugepages: bool) -> io::Result<File> {
    let flags = match hugepages {
        true => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        false => 0,
    };
    memfd_named(c"bulkhead-guest-ram", flags)
}

fn memfd_named(name: &CStr, flags: libc::c_uint) -> io::Result<File> {
    let flags = flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a valid C string, and the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn seal(file: &File) -> io::Result<()> {
    add_seals(
        file,
        libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
    )
}

fn add_seals(file: &File, seals: libc::c_int) -> io::Result<()> {
    // SAFETY: plain fcntl on an owned descriptor.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_3_gib_continues_above_4_gib() {
        assert_eq!(ranges(1 << 30), vec![(0, 1 << 30, 0)]);
        assert_eq!(
            ranges(4 << 30),
            vec![(0, 0xC000_0000, 0), (0x1_0000_0000, 1 << 30, 0xC000_0000)]
        );
        let memory = VmMemory::new(3073, false).unwrap();
        assert_eq!(memory.high_end(), Some(0x1_0000_0000 + (1 << 20)));
        memory.put(0x1_0000_0000, b"high").unwrap();
        assert!(memory.put(0xC000_0000, b"hole").is_err());
    }

    #[test]
    fn room_lies_beyond_all_memory() {
        assert_eq!(VmMemory::new(16, false).unwrap().room(), None);
        let memory = VmMemory::with_room(16, 64, false).unwrap();
        let (start, bytes) = memory.room().unwrap();
        assert_eq!((start, bytes), (0x1_0000_0000, 64 << 20));
        assert_eq!((memory.size(), memory.high_end()), (16 << 20, None));
        assert!(memory.usable().iter().all(|(at, _)| *at < start));
        memory.put(start + bytes - 4, b"room").unwrap();
        assert_eq!(memory.file().metadata().unwrap().len(), 80 << 20);
        let start = room_start(3073 << 20);
        assert_eq!(start, 0x1_0000_0000 + (128 << 20));
    }

    #[test]
    fn a_memfd_cannot_be_resized() {
        let file = memfd(false).unwrap();
        file.set_len(1 << 20).unwrap();
        seal(&file).unwrap();
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(2 << 20).is_err());
    }
}
