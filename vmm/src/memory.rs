//! Guest memory: one sealed memfd, mapped below and above the hole for devices.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
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
}

impl VmMemory {
    /// Makes `mib` MiB of zeroed memory.
    ///
    /// The memfd is sealed against resizing: a mapping of it can never raise SIGBUS, which would
    /// take every VM of the process down.
    ///
    /// # Errors
    /// When the host cannot give the address space, descriptors or huge pages.
    pub fn new(mib: u64, hugepages: bool) -> Result<Self, VmError> {
        let size = mib << 20;
        let what = || format!("guest memory of {mib} MiB");
        let file = memfd(hugepages).map_err(VmError::host(what()))?;
        file.set_len(size).map_err(VmError::host(what()))?;
        seal(&file).map_err(VmError::host(what()))?;
        Self::map(file, size)
    }

    /// Maps an existing memfd of `size` bytes (restore, hand-over).
    ///
    /// # Errors
    /// When the file is smaller than `size` or cannot be mapped.
    pub fn map(file: File, size: u64) -> Result<Self, VmError> {
        let file = Arc::new(file);
        let ranges: Vec<_> = ranges(size)
            .into_iter()
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
        Ok(Self { mmap, file, size })
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

/// (guest address, length, file offset) of each region.
fn ranges(size: u64) -> Vec<(u64, u64, u64)> {
    let low = size.min(layout::MMIO_HOLE_START);
    let mut ranges = vec![(0, low, 0)];
    if size > low {
        ranges.push((layout::MMIO_HOLE_END, size - low, low));
    }
    ranges
}

fn memfd(hugepages: bool) -> io::Result<File> {
    let name = CString::new("bulkhead-guest-ram").unwrap_or_default();
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if hugepages {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    }
    // SAFETY: the name is a valid C string, and the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn seal(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
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
    fn the_memfd_cannot_be_resized() {
        let memory = VmMemory::new(1, false).unwrap();
        assert!(memory.file().set_len(0).is_err());
        assert!(memory.file().set_len(2 << 20).is_err());
    }
}
