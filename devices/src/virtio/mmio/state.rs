//! Saved state of a transport and its device.

use serde::{Deserialize, Serialize};

use crate::virtio::queue::QueueSaved;

/// Version of [`TransportState`].
pub const STATE_VERSION: u32 = 1;

/// Everything needed to continue a device behind another transport of the same kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// [`STATE_VERSION`] of the writer.
    pub version: u32,
    /// Device id; has to be the one of the device restored into.
    pub device_type: u32,
    /// Device status without `NEEDS_RESET`.
    pub status: u32,
    /// The device asked for a reset.
    pub needs_reset: bool,
    /// Selector of the offered features.
    pub device_features_sel: u32,
    /// Selector of the accepted features.
    pub driver_features_sel: u32,
    /// Features the driver accepted.
    pub driver_features: u64,
    /// Queue selector.
    pub queue_sel: u32,
    /// Pending interrupt causes.
    pub interrupt_status: u32,
    /// Configuration generation.
    pub config_generation: u32,
    /// Queues in index order.
    pub queues: Vec<QueueSaved>,
    /// The device's own state.
    pub device: serde_json::Value,
}
