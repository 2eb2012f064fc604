//! The file system device (virtio 1.2, 5.11).

use std::sync::Arc;

use event_manager::EventOps;
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::config::{FsConfig, TAG_LEN};
use super::creds;
use super::metrics::FsMetrics;
use super::request::Handler;
use super::share::Share;
use super::state::State;
use crate::GuestMemory;
use crate::virtio::queue::{drain, end_turn};
use crate::virtio::{Activation, DeviceError, Interrupt, StateError, VirtioDevice};

const NAME: &str = "fs";
const DEVICE_TYPE: u32 = 26;
/// High-priority queue (forgets) and one request queue. 1,024 entries take three requests of a
/// mebibyte without indirect descriptors.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
/// Requests served before others on the same loop, and the guest's interrupt, get their turn.
const BUDGET: usize = 64;

#[derive(Debug)]
struct Active {
    mem: GuestMemory,
    queues: Vec<Queue>,
    interrupt: Interrupt,
    broken: bool,
}

/// A shared directory.
///
/// Requests block on the host's disk: give the device an event loop of its own. The thread gets
/// its own umask and no supplementary groups, and acts as the guest's users when it makes files.
#[derive(Debug)]
pub struct Fs {
    tag: String,
    handler: Handler,
    active: Option<Active>,
    events: Option<Arc<[EventFd]>>,
    /// The share still holds what a driver before the last reset had open.
    stale: bool,
}

impl Fs {
    /// Makes the device.
    ///
    /// # Errors
    /// When the tag is empty or too long, the root is not a directory, or `/proc` is not there.
    pub fn new(config: FsConfig) -> Result<Self, DeviceError> {
        let tag = config.tag.clone();
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains('\0') {
            return Err(DeviceError::BadSetup {
                device: NAME,
                reason: format!("the tag {tag:?} must have 1 to {TAG_LEN} bytes and no zero byte"),
            });
        }
        let host = |what: &str| {
            let what = format!("{what} for the share {tag:?}");
            move |source| DeviceError::Host {
                device: NAME,
                what,
                source,
            }
        };
        let share =
            Share::new(config).map_err(host("opening the root directory and /proc/self/fd"))?;
        Ok(Self {
            tag,
            handler: Handler::new(share),
            active: None,
            events: None,
            stale: false,
        })
    }

    /// The device's counters.
    pub fn counters(&self) -> FsMetrics {
        let mut metrics = self.handler.metrics;
        self.handler.share.fill_metrics(&mut metrics);
        metrics
    }

    /// Serves what is there, forgets first.
    pub(super) fn work(&mut self) {
        let Self {
            handler,
            active: Some(active),
            events,
            ..
        } = self
        else {
            return;
        };
        if active.broken {
            return;
        }
        let guard = active.mem.memory();
        for (index, queue) in active.queues.iter_mut().enumerate() {
            let served = drain(queue, &guard, &active.interrupt, BUDGET, |mem, chain| {
                Some(handler.handle(mem, chain))
            });
            let event = events.as_ref().and_then(|events| events.get(index));
            if !end_turn(served, event, &active.interrupt, &handler.log) {
                active.broken = true;
                return;
            }
        }
    }
}

impl VirtioDevice for Fs {
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
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // The tag, padded with zeros, and the number of request queues.
        let mut config = [0u8; TAG_LEN + 4];
        for (to, from) in config.iter_mut().zip(self.tag.bytes().take(TAG_LEN)) {
            *to = from;
        }
        config[TAG_LEN] = 1;
        crate::virtio::read_config(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        activation.expect_queues(NAME, QUEUE_SIZES.len())?;
        self.stale = false;
        self.active = Some(Active {
            mem: activation.mem,
            queues: activation.queues,
            interrupt: activation.interrupt,
            broken: false,
        });
        Ok(())
    }

    fn on_activated(&mut self, _ops: &mut EventOps) {
        creds::prepare_thread();
        self.work();
    }

    fn handle_queue(&mut self, _index: u16, _ops: &mut EventOps) {
        self.work();
    }

    /// The files that the driver had open are closed on the event loop: the thread of a vCPU may
    /// not, and need not wait for it.
    fn deactivate(&mut self) -> Vec<Queue> {
        self.stale = true;
        self.active
            .take()
            .map(|active| active.queues)
            .unwrap_or_default()
    }

    fn on_deactivated(&mut self, _ops: &mut EventOps) {
        self.handler.reset();
        self.stale = false;
    }

    fn queues(&self) -> &[Queue] {
        self.active
            .as_ref()
            .map_or(&[], |active| active.queues.as_slice())
    }

    fn set_queue_events(&mut self, events: Arc<[EventFd]>) {
        self.events = Some(events);
    }

    fn save(&self) -> serde_json::Value {
        if self.stale {
            self.handler.share.clear();
        }
        serde_json::to_value(State::save(&self.tag, &self.handler.share)).unwrap_or_default()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        State::restore(state, &self.tag, &self.handler.share)
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::to_value(self.counters()).unwrap_or_default()
    }
}
