//! The entropy device.

use std::sync::Arc;

use event_manager::EventOps;
use serde::Serialize;
use serde_json::json;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::guest_log::GuestLog;
use crate::virtio::queue::{Buffers, drain, end_turn};
use crate::virtio::{Activation, DeviceError, StateError, VirtioDevice};

const QUEUE_SIZES: &[u16] = &[64];
/// Requests per turn: other devices share the thread.
const BUDGET: usize = 32;
/// Bytes per request, however large the buffers are. A driver has to cope with less than it asked
/// for; a guest must not make the host produce gigabytes of random numbers at a stroke.
const MAX_REQUEST: usize = 4096;
const MAX_DESCRIPTORS: usize = 16;

#[derive(Debug, Default, Serialize)]
struct Metrics {
    requests: u64,
    bytes: u64,
    errors: u64,
}

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    queue: Vec<Queue>,
    activation: Option<Activation>,
    events: Option<Arc<[EventFd]>>,
    buffers: Buffers,
    metrics: Metrics,
    log: GuestLog,
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl Rng {
    /// A device that draws on the host's `getrandom`.
    pub fn new() -> Self {
        Self {
            queue: Vec::new(),
            activation: None,
            events: None,
            buffers: Buffers::default(),
            metrics: Metrics::default(),
            log: GuestLog::new("rng"),
        }
    }

    fn work(&mut self) {
        let (Some(activation), Some(queue)) = (&self.activation, self.queue.first_mut()) else {
            return;
        };
        let mem = activation.mem.memory();
        let (buffers, metrics, log) = (&mut self.buffers, &mut self.metrics, &self.log);
        let result = drain(queue, &mem, &activation.interrupt, BUDGET, |mem, chain| {
            metrics.requests += 1;
            match buffers.fill(mem, chain, MAX_DESCRIPTORS) {
                Ok(()) => {
                    let done = fill_random(mem, buffers);
                    metrics.bytes += done as u64;
                    Some(done as u32)
                }
                Err(e) => {
                    metrics.errors += 1;
                    log.warn(format_args!("request refused: {e}"));
                    Some(0)
                }
            }
        });
        let event = self.events.as_ref().and_then(|events| events.first());
        end_turn(result, event, &activation.interrupt, &self.log);
    }
}

/// Fills the writable buffers from the front; returns the number of bytes.
fn fill_random(mem: &GuestMemoryMmap<()>, buffers: &Buffers) -> usize {
    let mut chunk = [0u8; 256];
    let mut total = 0;
    for segment in &buffers.writable {
        let mut addr = segment.addr;
        let mut left = segment.len as usize;
        while left > 0 && total < MAX_REQUEST {
            let want = left.min(chunk.len()).min(MAX_REQUEST - total);
            // SAFETY: the pointer and length describe a part of `chunk`.
            let got = unsafe { libc::getrandom(chunk.as_mut_ptr().cast(), want, 0) };
            // Up to 256 bytes come whole and without interruption once the pool is initialised.
            let Ok(got @ 1..) = usize::try_from(got) else {
                return total;
            };
            if mem.write_slice(&chunk[..got], addr).is_err() {
                return total;
            }
            total += got;
            left -= got;
            addr.0 = addr.0.wrapping_add(got as u64);
        }
    }
    total
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn device_type(&self) -> u32 {
        4
    }

    fn queue_max_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        self.queue = std::mem::take(&mut activation.queues);
        self.activation = Some(activation);
        Ok(())
    }

    fn handle_queue(&mut self, _index: u16, _ops: &mut EventOps) {
        self.work();
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.activation = None;
        std::mem::take(&mut self.queue)
    }

    fn queues(&self) -> &[Queue] {
        &self.queue
    }

    fn set_queue_events(&mut self, events: Arc<[EventFd]>) {
        self.events = Some(events);
    }

    fn save(&self) -> serde_json::Value {
        json!({ "version": 1 })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        if state["version"] == 1 {
            return Ok(());
        }
        Err(StateError {
            device: "rng",
            reason: format!("it has version {}, not 1", state["version"]),
        })
    }

    fn metrics(&self) -> serde_json::Value {
        json!(self.metrics)
    }
}

#[cfg(test)]
mod tests {
    use proptest::proptest;

    use super::*;
    use crate::testing::{Guest, READ, WRITE};

    fn guest() -> (Guest, Rng) {
        let guest = Guest::new(1, 16);
        let mut rng = Rng::new();
        rng.activate(guest.activation(0)).unwrap();
        (guest, rng)
    }

    #[test]
    fn fills_buffers_up_to_the_bound() {
        let (mut guest, mut rng) = guest();
        guest.add(0, &[(0x8000, 64, WRITE), (0x9000, 32, WRITE)]);
        guest.add(0, &[(0xa000, 0x4000, WRITE)]);
        guest.add(0, &[(0x8000, 64, READ)]);
        guest.add(0, &[(0x8000, 64, WRITE), (0x9000, 32, READ)]);
        guest.add(0, &[(0xffff_0000, 64, WRITE)]);
        rng.work();
        let lens: Vec<u32> = guest.used(0).iter().map(|u| u.1).collect();
        assert_eq!(lens, [96, 4096, 0, 0, 0]);
        assert_ne!(guest.read(0x8000, 64), [0; 64]);
        assert_ne!(guest.read(0x9000, 32), [0; 32]);
        assert_eq!(guest.read(0xb000, 64), [0; 64]);
        assert_eq!(guest.interrupt.status(), 1);
        assert_eq!((rng.metrics.requests, rng.metrics.errors), (5, 2));
    }

    #[test]
    fn stops_at_its_budget_and_calls_itself() {
        let guest = &mut Guest::new(1, 64);
        let mut rng = Rng::new();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        rng.set_queue_events(vec![event.try_clone().unwrap()].into());
        rng.activate(guest.activation(0)).unwrap();
        for _ in 0..40 {
            guest.add(0, &[(0x8000, 16, WRITE)]);
        }
        rng.work();
        assert_eq!(guest.used(0).len(), 32);
        assert!(event.read().is_ok());
        rng.work();
        assert_eq!(guest.used(0).len(), 40);
        assert!(event.read().is_err());
    }

    #[test]
    fn a_ring_that_lies_needs_a_reset() {
        let (mut guest, mut rng) = guest();
        guest.set_avail_index(0, 1000);
        rng.work();
        assert!(guest.interrupt.needs_reset());
    }

    #[test]
    fn state_round_trip() {
        let mut rng = Rng::new();
        let state = rng.save();
        rng.restore(&state).unwrap();
        assert!(rng.restore(&json!({})).is_err());
    }

    proptest! {
        #[test]
        fn hostile_rings(noise in crate::testing::noise()) {
            let (mut guest, mut rng) = guest();
            guest.scribble(&noise);
            for _ in 0..4 {
                rng.work();
            }
        }
    }
}
