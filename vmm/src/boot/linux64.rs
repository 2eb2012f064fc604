//! Linux' 64-bit boot protocol: boot parameters, page tables and segment descriptors.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::super::layout;
use super::super::memory::VmMemory;
use crate::error::VmError;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xAA55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_TYPE_UNDEFINED: u8 = 0xFF;

/// Segment descriptors: null, unused, 64-bit code (0x10), data (0x18), TSS.
pub(crate) const GDT: [u64; 5] = [
    0,
    0,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x008F_8B00_0000_FFFF,
];

/// Writes boot parameters, page tables and GDT.
pub(super) fn write(
    memory: &VmMemory,
    initramfs: Option<(u64, u64)>,
    cmdline_len: usize,
    header: Option<setup_header>,
) -> Result<(), VmError> {
    let mut params = boot_params::default();
    if let Some(header) = header {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = 0x100_0000;
    }
    params.acpi_rsdp_addr = layout::ACPI_ADDR;
    params.hdr.type_of_loader = LOADER_TYPE_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE_ADDR as u32;
    params.hdr.cmdline_size = cmdline_len as u32;
    if let Some((start, end)) = initramfs {
        // Below 2 GiB by construction.
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = (end - start) as u32;
    }
    let mut entries = vec![(
        layout::LOW_RAM_END,
        layout::HIGH_RAM_START - layout::LOW_RAM_END,
        E820_RESERVED,
    )];
    entries.extend(memory.usable().into_iter().map(|(a, s)| (a, s, E820_RAM)));
    entries.sort_unstable();
    for (slot, (addr, size, type_)) in params.e820_table.iter_mut().zip(&entries) {
        *slot = boot_e820_entry {
            addr: *addr,
            size: *size,
            type_: *type_,
        };
    }
    params.e820_entries = entries.len() as u8;
    memory
        .mmap()
        .write_obj(params, GuestAddress(layout::ZERO_PAGE_ADDR))
        .map_err(|e| VmError::Memory(format!("boot parameters: {e}")))?;

    // Identity map of the first 4 GiB with 2 MiB pages: an initramfs may lie above 1 GiB.
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let pdpt = layout::PML4_ADDR + 0x1000;
    memory.put(layout::PML4_ADDR, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..4u64 {
        let directory = pdpt + 0x1000 * (gib + 1);
        memory.put(
            pdpt + gib * 8,
            &(directory | PRESENT_WRITABLE).to_le_bytes(),
        )?;
        let pages: Vec<u8> = (0..512u64)
            .flat_map(|i| ((gib << 30 | i << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes())
            .collect();
        memory.put(directory, &pages)?;
    }
    let gdt: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.put(layout::GDT_ADDR, &gdt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_map_covers_4_gib_and_stays_below_the_command_line() {
        let memory = VmMemory::new(64, false).unwrap();
        write(&memory, None, 10, None).unwrap();
        let last_directory = layout::PML4_ADDR + 0x1000 * 5;
        assert!(last_directory + 0x1000 <= layout::CMDLINE_ADDR);
        let entry: u64 = memory
            .mmap()
            .read_obj(GuestAddress(last_directory + 511 * 8))
            .unwrap();
        assert_eq!(entry & !0xFFF, 0xFFE0_0000);
    }
}
