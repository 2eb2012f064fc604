//! Registers of devices in memory.

use crate::direct;

/// A block of registers at a physical address below 4 GiB.
#[derive(Clone, Copy, Debug)]
pub struct Mmio {
    base: u64,
    len: u64,
}

impl Mmio {
    /// Registers at `base`, `len` bytes; `None` if they are not in the first 4 GiB, which are
    /// mapped, or overlap memory below `ram_end`.
    pub fn new(base: u64, len: u64, ram_end: u64) -> Option<Self> {
        let end = base.checked_add(len)?;
        (base >= ram_end && end <= 1 << 32 && base & 3 == 0).then_some(Self { base, len })
    }

    fn at(self, offset: u64) -> *mut u32 {
        assert!(offset + 4 <= self.len, "a register outside of its device");
        direct(self.base + offset).cast()
    }

    /// Reads a register.
    pub fn read(self, offset: u64) -> u32 {
        // SAFETY: inside of the device, which is no memory (checked by `new`).
        unsafe { self.at(offset & !3).read_volatile() }
    }

    /// Reads one byte, of a device's configuration.
    pub fn read_byte(self, offset: u64) -> u8 {
        assert!(offset < self.len, "a register outside of its device");
        // SAFETY: as for `read`.
        unsafe { direct(self.base + offset).read_volatile() }
    }

    /// Writes a register.
    pub fn write(self, offset: u64, value: u32) {
        // SAFETY: inside of the device. What its writes do to memory is what its driver told it.
        unsafe { self.at(offset & !3).write_volatile(value) };
    }
}
