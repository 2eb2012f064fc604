//! ACPI tables for kernels of distributions, which find their devices and CPUs by ACPI only. Our own
//! guest kernel is built without ACPI and never looks.
//!
//! Hardware-reduced ACPI (ACPI 6.5, 4.1): no fixed registers to emulate but those of sleep. CPUs and
//! I/O APIC are in the MADT; the serial port and the virtio-mmio devices (`LNRO0005`) in the DSDT.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::VirtioPlace;
use crate::layout;

const OEM_ID: [u8; 6] = *b"BLKHD ";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// `IAPC_BOOT_ARCH` (ACPI 6.5, 5.2.9.3): no VGA, no MSI, no CMOS clock to be found by probing.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 3 | 1 << 5;
/// Length of a table's header; what follows in a DSDT is its byte code.
const HEADER: u32 = 36;

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

fn dsdt(virtio: &[VirtioPlace]) -> Vec<u8> {
    let mut sdt = Sdt::new(*b"DSDT", HEADER, 2, OEM_ID, OEM_TABLE, OEM_REVISION);
    // The sleep type of "off" (7.4.2): what a guest writes to the sleep register.
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&layout::ACPI_SLEEP_TYPE_OFF]),
    )
    .to_aml_bytes(&mut sdt);
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 0, 8),
                    &Interrupt::new(true, true, false, false, layout::SERIAL_IRQ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut sdt);
    for (number, place) in virtio.iter().enumerate() {
        // Below 4 GiB by the layout; a device elsewhere could not be described and is left out.
        let Ok(address) = u32::try_from(place.address) else {
            continue;
        };
        let name = format!("_SB_.V{number:03X}");
        Device::new(
            name.as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &(number as u32)),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, address, layout::VIRTIO_MMIO_SIZE as u32),
                        &Interrupt::new(true, true, false, true, place.irq),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(&mut sdt);
    }
    sdt.update_checksum();
    sdt.as_slice().to_vec()
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LAPIC_ADDR),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, layout::IOAPIC_ADDR, 0));
    bytes(&madt)
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::I8042_PORT + 4);
    fadt.reset_value = 0xFE;
    fadt.sleep_control_reg = port(layout::ACPI_SLEEP_PORT);
    fadt.sleep_status_reg = port(layout::ACPI_SLEEP_PORT + 1);
    bytes(&fadt.finalize())
}

/// All tables in one piece, to be placed at [`layout::ACPI_ADDR`]; the RSDP comes first.
pub(super) fn build(vcpus: u8, virtio: &[VirtioPlace]) -> Vec<u8> {
    // The RSDP, padded, then tables at multiples of 16.
    let mut blob = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut put = |table: Vec<u8>| {
        let address = layout::ACPI_ADDR + blob.len() as u64;
        blob.extend_from_slice(&table);
        blob.resize(blob.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = put(dsdt(virtio));
    let fadt = put(fadt(dsdt));
    let madt = put(madt(vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    blob[..rsdp.len()].copy_from_slice(&rsdp);
    blob
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(blob: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(blob[at..at + 8].try_into().unwrap())
    }

    fn table(blob: &[u8], address: u64) -> &[u8] {
        let at = (address - layout::ACPI_ADDR) as usize;
        let len = u32::from_le_bytes(blob[at + 4..at + 8].try_into().unwrap()) as usize;
        &blob[at..at + len]
    }

    #[test]
    fn the_tables_of_the_largest_vm_fit_lead_to_each_other_and_sum_to_zero() {
        let virtio: Vec<VirtioPlace> = (0..64)
            .map(|n| VirtioPlace {
                address: layout::VIRTIO_MMIO_START + n * layout::VIRTIO_MMIO_SIZE,
                irq: 5,
            })
            .collect();
        let blob = build(layout::MAX_VCPUS, &virtio);
        assert!(blob.len() <= layout::ACPI_MAX, "{}", blob.len());
        assert_eq!(&blob[..8], b"RSD PTR ");
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
        assert_eq!((sum(&blob[..20]), sum(&blob[..36])), (0, 0));
        let xsdt = table(&blob, word(&blob, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(&blob, word(xsdt, 36));
        let madt = table(&blob, word(xsdt, 44));
        let dsdt = table(&blob, word(fadt, 140));
        for (table, name) in [
            (xsdt, b"XSDT"),
            (fadt, b"FACP"),
            (madt, b"APIC"),
            (dsdt, b"DSDT"),
        ] {
            assert_eq!(&table[..4], name);
            assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(name));
        }
        // Local APICs of 8 bytes, an I/O APIC of 12.
        assert_eq!(madt.len(), 44 + usize::from(layout::MAX_VCPUS) * 8 + 12);
        let found = dsdt.windows(8).filter(|w| *w == b"LNRO0005").count();
        assert_eq!(found, 64);
    }
}
