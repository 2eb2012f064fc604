//! The seam between an address space (port or memory mapped I/O) and a device.

/// A device reachable by port or memory mapped I/O.
///
/// Methods take `&self`: the bus is shared by all vCPU threads without a lock around it, and each
/// device guards its own state with the narrowest lock that serves.
///
/// `offset` is relative to the start of the device's range. Reads must fill `data` with something
/// defined (zeros where nothing answers) for *every* offset and length the guest may choose.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes (1 to 8) at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` (1 to 8 bytes) at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}
