//! Memory of a split queue (virtio 1.2, 2.7) that anything can be written to.

use core::sync::atomic::{Ordering, fence};

use appkernel_hal::{direct, frames};

/// Entries of a ring.
const SIZE: u16 = 64;
/// Parts of the ring's pages.
const AVAILABLE_AT: u64 = 4096;
const USED_AT: u64 = 8192;
/// 16 KiB.
const ORDER: usize = 2;

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device writes to it.
pub const WRITE: u16 = 2;
/// It points to a table of others.
pub const INDIRECT: u16 = 4;

/// A queue's memory: four pages, never given back.
#[derive(Debug)]
pub struct Ring {
    base: u64,
    offered: u16,
    seen: u16,
}

impl Ring {
    /// A ring of zeros.
    pub fn new() -> Self {
        let base = frames::allocate(ORDER).expect("memory for a ring");
        // SAFETY: nobody else has these frames.
        unsafe { direct(base).write_bytes(0, 4096 << ORDER) };
        Self {
            base,
            offered: 0,
            seen: 0,
        }
    }

    /// As it was made.
    pub fn clear(&mut self) {
        // SAFETY: the frames are the ring's; the device was reset before.
        unsafe { direct(self.base).write_bytes(0, 4096 << ORDER) };
        self.offered = 0;
        self.seen = 0;
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        SIZE
    }

    /// Address of the descriptor table.
    pub fn descriptors(&self) -> u64 {
        self.base
    }

    /// Address of the driver's area.
    pub fn available(&self) -> u64 {
        self.base + AVAILABLE_AT
    }

    /// Address of the device's area.
    pub fn used(&self) -> u64 {
        self.base + USED_AT
    }

    /// Writes a descriptor, of this table or of an indirect one at `table`.
    pub fn describe(table: u64, entry: u16, address: u64, len: u32, flags: u16, next: u16) {
        // SAFETY: tables lie in rings or in the arena, aligned and with room for `SIZE` entries; a device that
        // reads them meanwhile reads whatever is there.
        unsafe {
            let at = direct(table).add(usize::from(entry % SIZE) * 16);
            at.cast::<u64>().write_volatile(address);
            at.add(8).cast::<u32>().write_volatile(len);
            at.add(12).cast::<u16>().write_volatile(flags);
            at.add(14).cast::<u16>().write_volatile(next);
        }
    }

    /// Writes to the driver's area: a head, and how far the index goes on.
    pub fn offer(&mut self, head: u16, step: u16) {
        let area = direct(self.available()).cast::<u16>();
        let slot = usize::from(self.offered % SIZE);
        self.offered = self.offered.wrapping_add(step);
        // SAFETY: within the ring's pages.
        unsafe {
            area.add(2 + slot).write_volatile(head);
            fence(Ordering::SeqCst);
            area.add(1).write_volatile(self.offered);
        }
        fence(Ordering::SeqCst);
    }

    /// Offers an honest chain of `parts` (address, length, whether the device writes), from the
    /// first descriptor on.
    pub fn offer_chain(&mut self, parts: &[(u64, u32, bool)]) {
        for (entry, (address, len, writes)) in parts.iter().enumerate() {
            let entry = entry as u16;
            let more = usize::from(entry) + 1 < parts.len();
            let flags = if more { NEXT } else { 0 } | if *writes { WRITE } else { 0 };
            Self::describe(self.base, entry, *address, *len, flags, entry + 1);
        }
        self.offer(0, 1);
    }

    /// Whether the device has used a chain since the last time one was seen.
    pub fn has_used(&mut self) -> bool {
        // SAFETY: within the ring's pages; the device changes it.
        let index = unsafe { direct(self.used()).cast::<u16>().add(1).read_volatile() };
        let more = index != self.seen;
        self.seen = index;
        more
    }

    /// Scribbles over the device's own area.
    pub fn lie(&mut self, at: u64, value: u16) {
        // SAFETY: within the ring's pages.
        unsafe {
            direct(self.used() + (at & 0x3fe))
                .cast::<u16>()
                .write_volatile(value);
        }
    }
}
