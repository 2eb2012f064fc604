//! PVH: the start info structure of Xen's x86/HVM direct boot ABI.

use super::super::layout;
use super::super::memory::VmMemory;
use crate::error::VmError;

const MAGIC: u32 = 0x336E_C578;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

const MODLIST_ADDR: u64 = layout::PVH_INFO_ADDR + 0x40;
const MEMMAP_ADDR: u64 = layout::PVH_INFO_ADDR + 0x80;

/// Writes start info, module list and memory map at [`layout::PVH_INFO_ADDR`].
pub(super) fn write(memory: &VmMemory, initramfs: Option<(u64, u64)>) -> Result<(), VmError> {
    let mut map = Vec::new();
    let mut entries = 0u32;
    let reserved = (
        layout::LOW_RAM_END,
        layout::HIGH_RAM_START - layout::LOW_RAM_END,
    );
    let usable = memory.usable();
    for (index, (addr, size)) in usable.iter().enumerate() {
        map.extend_from_slice(&addr.to_le_bytes());
        map.extend_from_slice(&size.to_le_bytes());
        map.extend_from_slice(&E820_RAM.to_le_bytes());
        map.extend_from_slice(&0u32.to_le_bytes());
        entries += 1;
        if index == 0 {
            map.extend_from_slice(&reserved.0.to_le_bytes());
            map.extend_from_slice(&reserved.1.to_le_bytes());
            map.extend_from_slice(&E820_RESERVED.to_le_bytes());
            map.extend_from_slice(&0u32.to_le_bytes());
            entries += 1;
        }
    }
    memory.put(MEMMAP_ADDR, &map)?;

    if let Some((start, end)) = initramfs {
        let mut module = Vec::with_capacity(32);
        for field in [start, end - start, 0, 0] {
            module.extend_from_slice(&field.to_le_bytes());
        }
        memory.put(MODLIST_ADDR, &module)?;
    }

    let mut info = Vec::with_capacity(56);
    for field in [MAGIC, 1, 0, u32::from(initramfs.is_some())] {
        info.extend_from_slice(&field.to_le_bytes());
    }
    let modules = if initramfs.is_some() { MODLIST_ADDR } else { 0 };
    for field in [
        modules,
        layout::CMDLINE_ADDR,
        layout::ACPI_ADDR,
        MEMMAP_ADDR,
    ] {
        info.extend_from_slice(&field.to_le_bytes());
    }
    info.extend_from_slice(&entries.to_le_bytes());
    info.extend_from_slice(&0u32.to_le_bytes());
    memory.put(layout::PVH_INFO_ADDR, &info)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn start_info_points_to_its_parts() {
        let memory = VmMemory::new(4096, false).unwrap();
        write(&memory, Some((0x4000_0000, 0x4000_1234))).unwrap();
        let word = |at: u64| -> u64 { memory.mmap().read_obj(GuestAddress(at)).unwrap() };
        assert_eq!(word(layout::PVH_INFO_ADDR) as u32, MAGIC);
        assert_eq!(word(layout::PVH_INFO_ADDR + 16), MODLIST_ADDR);
        assert_eq!(word(MODLIST_ADDR), 0x4000_0000);
        assert_eq!(word(MODLIST_ADDR + 8), 0x1234);
        // RAM, reserved, RAM below and above the hole.
        assert_eq!(word(layout::PVH_INFO_ADDR + 48) as u32, 4);
        assert_eq!(word(MEMMAP_ADDR + 3 * 24), layout::MMIO_HOLE_END);
    }
}
