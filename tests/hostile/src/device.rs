//! A virtio-mmio device (virtio 1.2, 4.2.2), to be used against its rules or by them.

use appkernel_core::cmdline::Device;
pub use appkernel_core::virtio_mmio::reg;
use appkernel_core::virtio_mmio::{MAGIC, status};
use appkernel_hal::direct;

use crate::access;
use crate::chance::Chance;
use crate::ring::Ring;

/// Device types (virtio 1.2, 5).
pub mod id {
    pub const NET: u32 = 1;
    pub const BLOCK: u32 = 2;
    pub const RNG: u32 = 4;
    pub const BALLOON: u32 = 5;
    pub const VSOCK: u32 = 19;
    pub const MEM: u32 = 24;
    pub const FS: u32 = 26;
}

const READY: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
/// Most queues any device is asked for.
pub const QUEUES: u32 = 8;

/// A device at a physical address.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    base: u64,
    /// Its type.
    pub id: u32,
}

impl Target {
    /// The device that the command line names, if there is one.
    pub fn find(device: &Device) -> Option<Self> {
        let target = Self {
            base: device.address,
            id: 0,
        };
        let there = (0xc000_0000..0x1_0000_0000).contains(&device.address)
            && target.read(reg::MAGIC) == MAGIC;
        there.then(|| Self {
            id: target.read(reg::DEVICE_ID),
            ..target
        })
    }

    /// Reads a register.
    pub fn read(self, offset: u64) -> u32 {
        // SAFETY: the first 4 GiB are mapped and the hole of devices is no memory.
        unsafe { direct(self.base + offset).cast::<u32>().read_volatile() }
    }

    /// Writes a register.
    pub fn write(self, offset: u64, value: u32) {
        // SAFETY: as for `read`; what the device does to memory it does in the arena or in rings.
        unsafe {
            direct(self.base + offset)
                .cast::<u32>()
                .write_volatile(value)
        };
    }

    /// Reads or writes any number of bytes anywhere in the device's page.
    pub fn poke(self, chance: &mut Chance) {
        let offset = if chance.once_in(4) {
            chance.below(0x1000 - 8)
        } else {
            chance.below(0x120)
        };
        // SAFETY: the page is the device's and no memory; as for `write`.
        unsafe { access::anyhow(direct(self.base + offset), chance) };
    }

    /// Resets it and agrees on the features of `mask` that it has. `None` if it does not agree.
    pub fn begin(self, mask: u64) -> Option<()> {
        self.write(reg::STATUS, 0);
        self.write(reg::STATUS, 1);
        self.write(reg::STATUS, 1 | 2);
        for half in 0..2 {
            self.write(reg::DEVICE_FEATURES_SEL, half);
            let has = self.read(reg::DEVICE_FEATURES);
            self.write(reg::DRIVER_FEATURES_SEL, half);
            self.write(reg::DRIVER_FEATURES, has & (mask >> (32 * half)) as u32);
        }
        self.write(reg::STATUS, READY);
        (self.read(reg::STATUS) & READY == READY).then_some(())
    }

    /// Gives it the memory of a queue. `None` if it has no such queue.
    pub fn queue(self, index: u32, ring: &Ring) -> Option<()> {
        self.write(reg::QUEUE_SEL, index);
        let most = self.read(reg::QUEUE_NUM_MAX);
        if most < u32::from(ring.size()) {
            return None;
        }
        self.write(reg::QUEUE_NUM, ring.size().into());
        for (register, address) in [
            (reg::DESCRIPTORS, ring.descriptors()),
            (reg::DRIVER_AREA, ring.available()),
            (reg::DEVICE_AREA, ring.used()),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
        Some(())
    }

    /// The driver is ready.
    pub fn finish(self) {
        self.write(reg::STATUS, READY | status::DRIVER_OK);
    }

    /// Whether it has given up.
    pub fn is_broken(self) -> bool {
        self.read(reg::STATUS) & status::NEEDS_RESET != 0
    }

    /// Tells it to look at a queue.
    pub fn notify(self, queue: u32) {
        self.write(reg::QUEUE_NOTIFY, queue);
    }

    /// Number of queues it has.
    pub fn queues(self) -> u32 {
        (0..QUEUES)
            .take_while(|queue| {
                self.write(reg::QUEUE_SEL, *queue);
                self.read(reg::QUEUE_NUM_MAX) != 0
            })
            .count() as u32
    }
}
