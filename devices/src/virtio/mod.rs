//! Virtio 1.2 devices and their MMIO transport.

pub mod balloon;
pub mod blk;
pub mod device;
pub(crate) mod driver_side;
pub mod fs;
mod guest_log;
pub mod interrupt;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod vsock;

pub use device::{Activation, DeviceError, StateError, VirtioDevice};
pub use interrupt::{Interrupt, InterruptKind};
pub use mmio::{MmioTransport, TransportState};

/// Reads from a configuration space: bytes past its end are zero.
pub(crate) fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset).ok().and_then(|o| config.get(o..)) else {
        return;
    };
    let n = rest.len().min(data.len());
    data[..n].copy_from_slice(&rest[..n]);
}
