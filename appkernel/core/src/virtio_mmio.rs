//! Registers of a virtio-mmio device (virtio 1.2, 4.2.2) as its driver uses them.

/// What [`reg::MAGIC`] holds: `virt`.
pub const MAGIC: u32 = 0x7472_6976;

/// Offsets of registers; the three areas of a queue and wide values take two, low half first.
#[expect(missing_docs, reason = "they are the registers of these names")]
pub mod reg {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
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
    pub const DESCRIPTORS: u64 = 0x080;
    pub const DRIVER_AREA: u64 = 0x090;
    pub const DEVICE_AREA: u64 = 0x0a0;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of [`reg::STATUS`] (2.1).
#[expect(missing_docs, reason = "they are the bits of these names")]
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
}
