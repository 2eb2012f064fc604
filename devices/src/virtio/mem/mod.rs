//! Memory that comes and goes while the guest runs (virtio 1.2, 5.15).

mod device;
#[cfg(test)]
mod tests;

pub use device::{BLOCK, Mem};
