//! Virtio 1.2 devices and their MMIO transport.

pub mod device;
pub mod interrupt;

pub use device::{Activation, DeviceError, StateError, VirtioDevice};
pub use interrupt::{Interrupt, InterruptKind};
