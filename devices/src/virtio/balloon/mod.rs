//! Memory balloon (virtio 1.2, 5.5) with free page reporting.

mod device;
pub(super) mod io;
#[cfg(test)]
mod tests;

pub use device::{Balloon, GuestStats};
