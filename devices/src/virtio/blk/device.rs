//! The block device.

use std::sync::Arc;

use event_manager::EventOps;
use serde::Serialize;
use serde_json::json;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::batch::Batch;
use super::disk::{Disk, SECTOR};
use super::io;
use crate::virtio::guest_log::GuestLog;
use crate::virtio::queue::{Buffers, drain, end_turn, signal};
use crate::virtio::{Activation, DeviceError, InterruptKind, StateError, VirtioDevice};

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZES: &[u16] = &[256];
/// Of a slot: a guest keeps some hundred bytes for each entry, also while the slot is empty.
const SPARE_QUEUE_SIZES: &[u16] = &[64];
/// Data buffers of a request, and the largest of them.
const SEG_MAX: u32 = 126;
const SIZE_MAX: u32 = (io::MAX_BYTES / 128) as u32;
/// Requests per turn: other devices share the thread.
const BUDGET: usize = 32;
/// Length of the configuration space.
const CONFIG: usize = 60;

/// What the device has done.
#[derive(Debug, Default, Serialize)]
pub(super) struct Metrics {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub write_bytes: u64,
    pub flushes: u64,
    pub discards: u64,
    /// Reads and writes that went to the host's kernel together.
    pub by_io_uring: u64,
    pub errors: u64,
}

/// A block device, or a slot for one.
#[derive(Debug)]
pub struct Blk {
    disk: Option<Disk>,
    features: u64,
    queue_sizes: &'static [u16],
    queue: Vec<Queue>,
    activation: Option<Activation>,
    events: Option<Arc<[EventFd]>>,
    buffers: Buffers,
    batch: Batch,
    pub(super) metrics: Metrics,
    log: GuestLog,
}

impl Blk {
    /// A device with a disk.
    pub fn new(disk: Disk) -> Self {
        let writable = if disk.read_only {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        Self::with(Some(disk), writable, QUEUE_SIZES)
    }

    /// A slot without a disk: it has capacity 0 until [`Self::attach`].
    pub fn spare() -> Self {
        Self::with(None, F_DISCARD | F_WRITE_ZEROES, SPARE_QUEUE_SIZES)
    }

    fn with(disk: Option<Disk>, features: u64, queue_sizes: &'static [u16]) -> Self {
        let mut batch = Batch::default();
        if disk.is_some() {
            batch.prepare();
        }
        Self {
            disk,
            features: features | F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH,
            queue_sizes,
            queue: Vec::new(),
            activation: None,
            events: None,
            buffers: Buffers::default(),
            batch,
            metrics: Metrics::default(),
            log: GuestLog::new("blk"),
        }
    }

    /// Puts a disk into an empty slot and tells the guest. A read-only disk in a slot is not
    /// announced as such (features are settled by then): writes fail.
    ///
    /// # Errors
    /// Gives the disk back if the slot is taken.
    pub fn attach(&mut self, disk: Disk) -> Result<(), Disk> {
        if self.disk.is_some() {
            return Err(disk);
        }
        self.disk = Some(disk);
        self.batch.prepare();
        self.config_changed();
        Ok(())
    }

    /// Takes the disk out, flushed by the host in its own time. The guest sees capacity 0;
    /// requests fail.
    pub fn detach(&mut self) -> Option<Disk> {
        let disk = self.disk.take();
        if disk.is_some() {
            self.config_changed();
        }
        disk
    }

    /// True if there is a disk.
    pub fn is_attached(&self) -> bool {
        self.disk.is_some()
    }

    fn config_changed(&self) {
        if let Some(activation) = &self.activation {
            activation.interrupt.trigger(InterruptKind::ConfigChange);
        }
    }

    fn config(&self) -> [u8; CONFIG] {
        let mut config = [0; CONFIG];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let (sectors, block) = self
            .disk
            .as_ref()
            .map_or((0, SECTOR as u32), |d| (d.sectors, d.block_size));
        put(0, &sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &block.to_le_bytes());
        put(34, &1u16.to_le_bytes());
        put(36, &io::MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &io::MAX_DISCARD_RANGES.to_le_bytes());
        put(44, &(block / SECTOR as u32).to_le_bytes());
        put(48, &io::MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &io::MAX_ZERO_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }

    pub(super) fn work(&mut self) {
        let (Some(activation), Some(queue)) = (&self.activation, self.queue.first_mut()) else {
            return;
        };
        let mem = activation.mem.memory();
        let write_through = activation.features & F_FLUSH == 0;
        let (disk, buffers, batch) = (self.disk.as_ref(), &mut self.buffers, &mut self.batch);
        let (metrics, log) = (&mut self.metrics, &self.log);
        let result = drain(queue, &mem, &activation.interrupt, BUDGET, |mem, chain| {
            let head = chain.head_index();
            // Header and status beside the data.
            match buffers.fill(mem, chain, SEG_MAX as usize + 2) {
                Ok(()) => io::begin(disk, mem, head, buffers, batch, write_through, metrics),
                Err(e) => {
                    metrics.errors += 1;
                    log.warn(format_args!("request refused: {e}"));
                    Some(0)
                }
            }
        });
        let mut answered = false;
        io::finish(
            disk,
            &mem,
            batch,
            write_through,
            metrics,
            |head, written| {
                answered |= queue.add_used(&*mem, head, written).is_ok();
            },
        );
        if answered {
            signal(queue, &mem, &activation.interrupt);
        }
        let event = self.events.as_ref().and_then(|events| events.first());
        end_turn(result, event, &activation.interrupt, &self.log);
    }
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn device_type(&self) -> u32 {
        2
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_config(&self.config(), offset, data);
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
        self.buffers = Buffers::default();
        self.batch.clear();
        std::mem::take(&mut self.queue)
    }

    fn queues(&self) -> &[Queue] {
        &self.queue
    }

    fn set_queue_events(&mut self, events: Arc<[EventFd]>) {
        self.events = Some(events);
    }

    fn save(&self) -> serde_json::Value {
        json!({
            "version": 1,
            "sectors": self.disk.as_ref().map(|d| d.sectors),
            "features": self.features,
        })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let bad = |reason: String| StateError {
            device: "blk",
            reason,
        };
        if state["version"] != 1 {
            return Err(bad(format!("it has version {}, not 1", state["version"])));
        }
        let here = json!(self.disk.as_ref().map(|d| d.sectors));
        if state["sectors"] != here {
            return Err(bad(format!(
                "the disk had {} sectors and now has {here}; attach the same disk first",
                state["sectors"]
            )));
        }
        // A slot that was filled offers what it offered empty, whatever the disk is.
        match state["features"].as_u64() {
            Some(features)
                if features & !(self.features | F_RO | F_DISCARD | F_WRITE_ZEROES) == 0 =>
            {
                self.features = features;
                Ok(())
            }
            _ => Err(bad(
                "its features are not those of a block device".to_owned()
            )),
        }
    }

    fn metrics(&self) -> serde_json::Value {
        json!(self.metrics)
    }
}
