//! MultiProcessor Specification 1.4 table: tells Linux, without ACPI, of its CPUs and interrupts.

use crate::layout;

const VERSION_1_4: u8 = 4;

fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, b| sum.wrapping_add(*b))
        .wrapping_neg()
}

/// Builds the floating pointer and the table behind it, to be placed at
/// [`layout::MPTABLE_ADDR`].
pub(super) fn build(vcpus: u8, lines: &[u32]) -> Vec<u8> {
    let ioapic_id = vcpus;
    let table_addr = (layout::MPTABLE_ADDR + 16) as u32;

    let mut entries = Vec::with_capacity(1008);
    let mut count: u16 = 0;
    // Processors (4.3.1): local APIC id, version, enabled and boot flags, signature, features.
    for id in 0..vcpus {
        entries.extend_from_slice(&[0, id, 0x14, if id == 0 { 3 } else { 1 }]);
        entries.extend_from_slice(&0x600u32.to_le_bytes());
        entries.extend_from_slice(&0x201u32.to_le_bytes());
        entries.extend_from_slice(&[0; 8]);
        count += 1;
    }
    // One ISA bus (4.3.2): its interrupts are edge triggered, as irqfds deliver them.
    entries.extend_from_slice(&[1, 0]);
    entries.extend_from_slice(b"ISA   ");
    // I/O APIC (4.3.3).
    entries.extend_from_slice(&[2, ioapic_id, 0x11, 1]);
    entries.extend_from_slice(&layout::IOAPIC_ADDR.to_le_bytes());
    count += 2;
    // I/O interrupts (4.3.4): bus interrupt n arrives at pin n, as KVM routes its lines.
    // Only lines in use: the kernel programs each it is told of, by four slow accesses and more.
    // Pin 0 is the timer's, which Linux wants to see even if it never uses it.
    let used = |pin: &u8| *pin == 0 || lines.contains(&u32::from(*pin));
    for pin in (0..layout::IOAPIC_PINS).filter(used) {
        entries.extend_from_slice(&[3, 0, 0, 0, 0, pin, ioapic_id, pin]);
        count += 1;
    }
    // Local interrupts (4.3.5): external interrupts at LINT0 of the boot CPU, NMI at LINT1 of all.
    entries.extend_from_slice(&[4, 3, 0, 0, 0, 0, 0, 0]);
    entries.extend_from_slice(&[4, 1, 0, 0, 0, 0, 0xFF, 1]);
    count += 2;

    let mut header = Vec::with_capacity(44);
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    header.extend_from_slice(&[VERSION_1_4, 0]);
    header.extend_from_slice(b"BULKHEAD");
    header.extend_from_slice(b"MICROVM     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&layout::LAPIC_ADDR.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    let mut table = header;
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    let mut pointer = Vec::with_capacity(16 + table.len());
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&table_addr.to_le_bytes());
    pointer.extend_from_slice(&[1, VERSION_1_4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend_from_slice(&table);
    pointer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_table_fits_and_sums_to_zero() {
        for vcpus in [1, 2, layout::MAX_VCPUS] {
            let all: Vec<u32> = (0..24).collect();
            let table = build(vcpus, &all);
            assert!(table.len() <= layout::MPTABLE_MAX, "{}", table.len());
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            assert_eq!(sum(&table[..16]), 0);
            assert_eq!(sum(&table[16..]), 0);
            let len = u16::from_le_bytes([table[20], table[21]]);
            assert_eq!(usize::from(len), table.len() - 16);
        }
    }
}
