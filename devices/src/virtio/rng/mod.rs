//! Entropy device (virtio 1.2, 5.4): the host's random numbers.

mod device;

pub use device::Rng;
