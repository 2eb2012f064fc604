//! The vsock device (virtio 1.2, 5.10).

use std::collections::VecDeque;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use virtio_queue::Queue;

use super::handle::{Shared, VsockHandle};
use super::io::{Active, Cause, TX};
use super::metrics::VsockMetrics;
use super::mux::{Mux, WAKE_TOKEN};
use super::state::State;
use crate::virtio::{Activation, DeviceError, StateError, VirtioDevice};

const NAME: &str = "vsock";
const DEVICE_TYPE: u32 = 19;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1 << 0;
/// Smallest address a guest may have; 0 to 2 are reserved.
const MIN_CID: u32 = 3;

/// A socket device whose host side lives in this process: see [`VsockHandle`].
#[derive(Debug)]
pub struct Vsock {
    shared: Arc<Shared>,
    mux: Mux,
    active: Option<Active>,
    /// The wake-up descriptor is registered with the event loop.
    watching: bool,
    /// The guest must be told that its connections are gone.
    owes_reset_event: bool,
}

impl Vsock {
    /// Makes a device for a guest with the address `guest_cid` (3 or more; only this guest sees
    /// it, so that any number of guests may have the same).
    ///
    /// # Errors
    /// When the address is reserved or the host is out of file descriptors.
    pub fn new(guest_cid: u32) -> Result<Self, DeviceError> {
        if !(MIN_CID..u32::MAX).contains(&guest_cid) {
            return Err(DeviceError::BadSetup {
                device: NAME,
                reason: format!(
                    "CID {guest_cid} is reserved; use one from {MIN_CID} to {}",
                    u32::MAX - 1
                ),
            });
        }
        let shared = Shared::new().map_err(|source| DeviceError::Host {
            device: NAME,
            what: "making an eventfd".to_owned(),
            source,
        })?;
        Ok(Self {
            mux: Mux::new(u64::from(guest_cid), Arc::clone(&shared)),
            shared,
            active: None,
            watching: false,
            owes_reset_event: false,
        })
    }

    /// The host's entrance to the guest's sockets.
    pub fn handle(&self) -> VsockHandle {
        VsockHandle::new(Arc::clone(&self.shared))
    }

    /// The device's counters.
    pub fn counters(&self) -> VsockMetrics {
        self.mux.metrics
    }

    fn work(&mut self, cause: Cause, ops: &mut EventOps) {
        let Some(active) = &mut self.active else {
            return;
        };
        if self.owes_reset_event && active.send_transport_reset() {
            self.owes_reset_event = false;
        }
        if active.work(&mut self.mux, cause, ops) {
            // Let the loop's other devices have their turn first.
            self.shared.wake();
        }
    }

    fn take_commands(&mut self, ops: &mut EventOps) {
        let commands: VecDeque<_> = self.shared.take_commands();
        if commands.is_empty() {
            return;
        }
        if self.active.is_none() {
            self.shared.put_back(commands);
            return;
        }
        for command in commands {
            self.mux.command(command, ops);
        }
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.mux.guest_cid.to_le_bytes();
        crate::virtio::read_config(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        activation.expect_queues(NAME, QUEUE_SIZES.len())?;
        self.active = Some(Active {
            mem: activation.mem,
            queues: activation.queues,
            interrupt: activation.interrupt,
            tx_held: false,
            broken: false,
        });
        Ok(())
    }

    fn on_activated(&mut self, ops: &mut EventOps) {
        if !self.watching {
            match ops.add(Events::with_data(
                self.shared.wake_fd(),
                WAKE_TOKEN,
                EventSet::IN,
            )) {
                Ok(()) => self.watching = true,
                Err(error) => log::error!(
                    "vsock: cannot watch the wake-up descriptor: {error:?}; connections of the host will not be served"
                ),
            }
        }
        self.take_commands(ops);
        self.work(Cause::Transmit, ops);
    }

    fn handle_queue(&mut self, index: u16, ops: &mut EventOps) {
        let cause = if usize::from(index) == TX {
            Cause::Transmit
        } else {
            Cause::Receive
        };
        self.work(cause, ops);
    }

    fn handle_event(&mut self, token: u32, set: EventSet, ops: &mut EventOps) {
        if token == WAKE_TOKEN {
            let _ = self.shared.wake_fd().read();
            self.take_commands(ops);
            self.work(Cause::Transmit, ops);
        } else if self.active.is_some() {
            let new = self.mux.socket_event(token, set, ops);
            self.work(Cause::Socket { new }, ops);
        }
    }

    /// Streams end on the event loop: the thread of a vCPU may not shut sockets down.
    fn deactivate(&mut self) -> Vec<Queue> {
        self.active
            .take()
            .map(|active| active.queues)
            .unwrap_or_default()
    }

    fn on_deactivated(&mut self, ops: &mut EventOps) {
        for socket in self.mux.clear() {
            let _ = ops.remove(Events::empty(&socket));
        }
        if self.watching {
            let _ = ops.remove(Events::empty(self.shared.wake_fd()));
            self.watching = false;
        }
    }

    fn queues(&self) -> &[Queue] {
        self.active
            .as_ref()
            .map_or(&[], |active| active.queues.as_slice())
    }

    fn save(&self) -> serde_json::Value {
        serde_json::to_value(State::new(self.mux.guest_cid)).unwrap_or_default()
    }

    /// The configured address stays: a guest restored under another one learns it from the reset
    /// event, upon which its driver reads the configuration again.
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        State::from_value(state)?;
        self.owes_reset_event = true;
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::to_value(self.mux.metrics).unwrap_or_default()
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // Attempts under way end with an error, streams with end of file.
        drop(self.mux.clear());
        self.shared.close();
    }
}
