//! Block device (virtio 1.2, 5.2) on a raw file or a host block device.

mod batch;
mod device;
mod disk;
mod io;
#[cfg(test)]
mod tests;

pub use device::Blk;
pub use disk::{Disk, DiskError};
