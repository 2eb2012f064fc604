//! What a snapshot keeps of a vsock device: no streams. The guest is told that its transport was
//! reset, closes its connections and keeps its listeners (virtio 1.2, 5.10.6.6).

use serde::{Deserialize, Serialize};

use super::super::StateError;

const VERSION: u32 = 1;

/// Saved state of a vsock device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    /// The guest's address when the state was saved.
    guest_cid: u64,
}

impl State {
    pub(super) fn new(guest_cid: u64) -> Self {
        Self {
            version: VERSION,
            guest_cid,
        }
    }

    pub(super) fn from_value(value: &serde_json::Value) -> Result<Self, StateError> {
        let error = |reason: String| StateError {
            device: "vsock",
            reason,
        };
        let state: Self =
            serde_json::from_value(value.clone()).map_err(|e| error(e.to_string()))?;
        if state.version != VERSION {
            return Err(error(format!(
                "version {} was saved, this build knows {VERSION}",
                state.version
            )));
        }
        Ok(state)
    }
}
