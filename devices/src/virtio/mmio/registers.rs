//! Register layout and the driver's part of the transport's state (virtio 1.2, 4.2.2).

use crate::virtio::queue::QueueSaved;

/// "virt", little endian.
pub const MAGIC: u32 = 0x7472_6976;
/// Version of the modern interface.
pub const VERSION: u32 = 2;
/// "BLKH"; any value identifies the implementation.
pub const VENDOR: u32 = 0x484b_4c42;

/// Offsets of the registers.
pub mod reg {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the device status (virtio 1.2, 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
    /// The order in which a driver has to set the bits.
    pub const ORDER: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
}

/// Features of the transport and the rings (virtio 1.2, 6).
pub mod feature {
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ALL: u64 = RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1;
}

/// What the driver has written. `NEEDS_RESET` is not in `status`: the device sets it, it lives
/// with the interrupt.
#[derive(Debug)]
pub struct Registers {
    pub status: u32,
    pub device_features_sel: u32,
    pub driver_features_sel: u32,
    pub driver_features: u64,
    pub queue_sel: u32,
    /// Set-up by the driver; positions count only in restored state.
    pub queues: Vec<QueueSaved>,
    max_sizes: Vec<u16>,
}

impl Registers {
    pub fn new(max_sizes: &[u16]) -> Self {
        let mut registers = Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: Vec::new(),
            max_sizes: max_sizes.to_vec(),
        };
        registers.reset();
        registers
    }

    pub fn reset(&mut self) {
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.queues = self
            .max_sizes
            .iter()
            .map(|max| QueueSaved {
                size: *max,
                ..QueueSaved::default()
            })
            .collect();
    }

    pub fn max_sizes(&self) -> &[u16] {
        &self.max_sizes
    }

    pub fn selected_max(&self) -> u32 {
        let index = usize::try_from(self.queue_sel).unwrap_or(usize::MAX);
        self.max_sizes.get(index).copied().map_or(0, u32::from)
    }

    pub fn selected(&self) -> Option<&QueueSaved> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    pub fn selected_mut(&mut self) -> Option<&mut QueueSaved> {
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }

    pub fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    /// Queues may be set up: features are settled, the device does not run yet. Changing a ring
    /// under a running device would bypass the checks made at activation.
    pub fn queues_writable(&self) -> bool {
        self.has(status::FEATURES_OK) && self.status & (status::DRIVER_OK | status::FAILED) == 0
    }

    /// Features may be written.
    pub fn features_writable(&self) -> bool {
        self.has(status::DRIVER) && self.status & (status::FEATURES_OK | status::FAILED) == 0
    }
}

/// The half of a 64-bit feature set that a selector shows.
pub fn feature_word(features: u64, selector: u32) -> u32 {
    match selector {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Replaces the low or high half of a 64-bit register.
pub fn set_half(register: &mut u64, high: bool, value: u32) {
    *register = if high {
        (*register & 0xffff_ffff) | (u64::from(value) << 32)
    } else {
        (*register & !0xffff_ffff) | u64::from(value)
    };
}
