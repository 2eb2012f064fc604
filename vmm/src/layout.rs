//! Guest physical memory map, port numbers and interrupt lines.
//!
//! ```text
//! 0x0000_0000  RAM (boot structures below 640 KiB, MP table in the last KiB of it)
//! 0x000E_0000  ACPI tables
//! 0x0010_0000  RAM: kernel, initramfs at the top of low RAM
//! 0xC000_0000  hole for devices (1 GiB): virtio-mmio, IOAPIC, LAPIC, KVM's own pages
//! 0x1_0000_0000 RAM beyond 3 GiB
//! ```

/// Start of the hole for devices; low RAM ends here at most.
pub const MMIO_HOLE_START: u64 = 0xC000_0000;
/// End of the hole; RAM that does not fit below continues here.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// First virtio-mmio device; each takes [`VIRTIO_MMIO_SIZE`] bytes.
pub const VIRTIO_MMIO_START: u64 = 0xD000_0000;
/// Address space of one virtio-mmio device in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// `QueueNotify` register (virtio 1.2, 4.2.2).
pub const VIRTIO_MMIO_NOTIFY: u64 = 0x50;

/// IOAPIC as KVM emulates it.
pub const IOAPIC_ADDR: u32 = 0xFEC0_0000;
/// Local APIC as KVM emulates it.
pub const LAPIC_ADDR: u32 = 0xFEE0_0000;
/// One page KVM needs on Intel for real mode.
pub const KVM_IDENTITY_MAP_ADDR: u64 = 0xFFFB_C000;
/// Three pages KVM needs on Intel for the TSS.
pub const KVM_TSS_ADDR: usize = 0xFFFB_D000;

/// Global descriptor table for the 64-bit boot protocol.
pub const GDT_ADDR: u64 = 0x500;
/// PVH start info, followed by its module list and memory map.
pub const PVH_INFO_ADDR: u64 = 0x6000;
/// Linux boot parameters ("zero page").
pub const ZERO_PAGE_ADDR: u64 = 0x7000;
/// Initial stack pointer of the boot vCPU.
pub const BOOT_STACK_ADDR: u64 = 0x8FF0;
/// Page tables for the 64-bit boot protocol: PML4, PDPT, then four page directories.
pub const PML4_ADDR: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE_ADDR: u64 = 0x2_0000;
/// Longest command line in bytes with its end (Linux' `COMMAND_LINE_SIZE` on x86).
pub const CMDLINE_MAX: usize = 2048;
/// MP table, in the last KiB of base memory, where Linux looks for it.
pub const MPTABLE_ADDR: u64 = 0x9_FC00;
/// Most bytes the MP table may take.
pub const MPTABLE_MAX: usize = 1024;
/// RAM below 640 KiB that the guest may use ends here.
pub const LOW_RAM_END: u64 = 0x9_FC00;
/// ACPI tables, RSDP first, in the area of the firmware, which no memory map calls usable.
pub const ACPI_ADDR: u64 = 0xE_0000;
/// Most bytes the ACPI tables may take.
pub const ACPI_MAX: usize = 0x1_0000;
/// RAM continues here after the legacy hole; kernels are loaded here.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3F8;
/// Its interrupt line.
pub const SERIAL_IRQ: u32 = 4;
/// Keyboard controller: only its reset line exists.
pub const I8042_PORT: u16 = 0x60;
/// Real time clock (index and data).
pub const RTC_PORT: u16 = 0x70;
/// ACPI sleep control register; the status register follows.
pub const ACPI_SLEEP_PORT: u16 = 0x600;
/// What a guest writes there to be powered off.
pub const ACPI_SLEEP_TYPE_OFF: u8 = 5;
/// A byte written here is recorded in the boot timeline (our own debug port).
pub const BOOT_MARK_PORT: u16 = 0x3F0;

/// Interrupt lines for virtio devices: all IOAPIC pins that no legacy device has. Past the end of
/// the list, lines are shared (Linux' virtio-mmio driver asks for shared interrupts and looks at
/// its own `InterruptStatus`).
pub const VIRTIO_IRQS: [u32; 18] = [
    5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
];
/// Pins of the IOAPIC.
pub const IOAPIC_PINS: u8 = 24;

/// Most vCPUs of one VM (the MP table has one KiB).
pub const MAX_VCPUS: u8 = 32;
/// Least guest memory in MiB: below it a Linux kernel does not reach user space.
pub const MIN_MEMORY_MIB: u64 = 16;
