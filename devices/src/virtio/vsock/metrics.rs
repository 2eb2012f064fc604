//! Counters of one vsock device.

use serde::Serialize;

/// Counters since the device was made. "rx" is towards the guest, "tx" from the guest, as the
/// queues are named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VsockMetrics {
    /// Packets put into the guest's receive queue.
    pub rx_packets: u64,
    /// Payload bytes in them.
    pub rx_bytes: u64,
    /// Packets taken from the guest's transmit queue.
    pub tx_packets: u64,
    /// Payload bytes in them that belonged to a stream.
    pub tx_bytes: u64,
    /// Streams that were established, in either direction.
    pub streams_opened: u64,
    /// Connection attempts refused, in either direction.
    pub refused: u64,
    /// Streams ended by a reset of either side that was not an orderly close.
    pub resets: u64,
    /// Packets and buffers from the guest that made no sense and were dropped.
    pub malformed: u64,
    /// Streams that exist now.
    pub streams: u64,
}
