//! The driver's side of a split queue, for tests and fuzz targets: what a guest kernel would do.

use std::collections::HashMap;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::GuestMemory;

/// One buffer of a chain: guest address, length in bytes, and whether the device may write it.
pub(crate) type Part = (u64, u32, bool);

/// A queue as its driver sees it. Ring memory starts at `base` (which must not be 0) and takes
/// 26 bytes per entry and a little.
#[derive(Debug)]
pub(crate) struct DriverQueue {
    mem: GuestMemory,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    avail_idx: u16,
    used_idx: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl DriverQueue {
    pub(crate) fn new(mem: &GuestMemory, base: u64, size: u16) -> Self {
        let entries = u64::from(size);
        let desc = base;
        let avail = desc + 16 * entries;
        let used = (avail + 6 + 2 * entries).next_multiple_of(4);
        Self {
            mem: mem.clone(),
            size,
            desc,
            avail,
            used,
            avail_idx: 0,
            used_idx: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    /// The device's side of this queue.
    pub(crate) fn device_side(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size).unwrap_or_default();
        let halves = |addr: u64| (Some(addr as u32), Some((addr >> 32) as u32));
        let (low, high) = halves(self.desc);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.avail);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue
    }

    /// Descriptors that are not in a chain.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// The head the next chain gets.
    pub(crate) fn next_free(&self) -> u16 {
        self.free.last().copied().unwrap_or(0)
    }

    /// Offers a chain; `None` if there are too few descriptors.
    pub(crate) fn add(&mut self, parts: &[Part]) -> Option<u16> {
        if parts.is_empty() || parts.len() > self.free.len() {
            return None;
        }
        let mut chain: Vec<u16> = self.free.split_off(self.free.len() - parts.len());
        chain.reverse();
        let mem = self.mem.memory();
        for (i, (addr, len, write)) in parts.iter().enumerate() {
            let next = chain.get(i + 1).copied();
            let flags = u16::from(next.is_some()) | if *write { 2 } else { 0 };
            let mut raw = [0u8; 16];
            raw[0..8].copy_from_slice(&addr.to_le_bytes());
            raw[8..12].copy_from_slice(&len.to_le_bytes());
            raw[12..14].copy_from_slice(&flags.to_le_bytes());
            raw[14..16].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
            let at = self.desc + 16 * u64::from(*chain.get(i)?);
            mem.write_slice(&raw, GuestAddress(at)).ok()?;
        }
        let head = *chain.first()?;
        self.chains.insert(head, chain);
        let at = self.avail + 4 + 2 * u64::from(self.avail_idx % self.size);
        mem.write_slice(&head.to_le_bytes(), GuestAddress(at))
            .ok()?;
        self.avail_idx = self.avail_idx.wrapping_add(1);
        mem.write_slice(&self.avail_idx.to_le_bytes(), GuestAddress(self.avail + 2))
            .ok()?;
        Some(head)
    }

    /// Takes the next chain the device has used: its head and the length written.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        let mem = self.mem.memory();
        let mut raw = [0u8; 8];
        mem.read_slice(&mut raw[..2], GuestAddress(self.used + 2))
            .ok()?;
        if u16::from_le_bytes([raw[0], raw[1]]) == self.used_idx {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        mem.read_slice(&mut raw, GuestAddress(at)).ok()?;
        self.used_idx = self.used_idx.wrapping_add(1);
        let head = u16::from_le_bytes([raw[0], raw[1]]);
        let len = u32::from_le_bytes([raw[4], raw[5], raw[6], raw[7]]);
        self.free
            .extend(self.chains.remove(&head).unwrap_or_default());
        Some((head, len))
    }
}
