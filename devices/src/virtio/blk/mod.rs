//! Block device (virtio 1.2, 5.2) on a raw file, a host block device, or several files in a row.

mod batch;
mod device;
mod disk;
mod io;
#[cfg(test)]
mod tests;

pub use device::Blk;
pub use disk::{Disk, DiskError, MAX_PARTS, joined_layout};
