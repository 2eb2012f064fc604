//! Network device (virtio 1.2, 5.1) on a tap, worked on by this process or by the host kernel
//! (vhost-net).

mod device;
mod io;
mod tap;
#[cfg(test)]
mod tap_tests;
#[cfg(test)]
mod tests;
mod vhost;

pub use device::{Net, NetOptions};
pub use tap::{Tap, TapError};
