//! Sockets between host and guest (virtio 1.2, 5.10), with the host's side in this process.
//!
//! [`Vsock`] is the device; [`VsockHandle`] makes and takes connections as plain unix stream
//! sockets. The device moves bytes between the guest's buffers and one end of a socket pair
//! without copying them on the way, and keeps at most what it promised the guest as credit.

mod device;
mod fuzz;
mod handle;
mod harness;
mod io;
mod metrics;
mod mux;
mod packet;
mod state;
mod stream;
#[cfg(test)]
mod tests;

pub use device::Vsock;
#[doc(hidden)]
pub use fuzz::fuzz_vsock;
pub use handle::{Connecting, VsockHandle, VsockListener};
pub use metrics::VsockMetrics;
