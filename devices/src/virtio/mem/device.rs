//! The memory device.
//!
//! A range of the guest's address space, in blocks, of which none is memory at first. The host says
//! how much of it the guest should have; the guest plugs and unplugs blocks of its own choice until
//! it has that, in its own time. What is unplugged goes back to the host at once.

use std::sync::Arc;

use event_manager::EventOps;
use serde::{Deserialize, Serialize};
use serde_json::json;
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::balloon::io::{GUEST_PAGE, release};
use crate::virtio::guest_log::GuestLog;
use crate::virtio::queue::{Buffers, drain, end_turn, read_front, write_front};
use crate::virtio::{Activation, DeviceError, InterruptKind, StateError, VirtioDevice};

/// Size of a block in bytes: what a huge page has.
pub const BLOCK: u64 = 2 << 20;

/// The guest does not touch what is not plugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const QUEUE_SIZES: &[u16] = &[64];
/// Requests per turn: each may give much memory back.
const BUDGET: usize = 4;
/// Length of a request: type, address, number of blocks, padding.
const REQUEST: usize = 24;
/// Length of an answer.
const RESPONSE: usize = 10;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

pub(super) const ACK: u16 = 0;
pub(super) const NACK: u16 = 1;
pub(super) const ERROR: u16 = 3;

#[derive(Debug, Default, Serialize)]
pub(super) struct Metrics {
    pub plugs: u64,
    pub unplugs: u64,
    pub released_bytes: u64,
    pub refused: u64,
    pub errors: u64,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    address: u64,
    blocks: usize,
    usable: usize,
    requested: usize,
    /// First block and number of blocks of each run that is plugged.
    plugged: Vec<(usize, usize)>,
}

/// The memory device.
#[derive(Debug)]
pub struct Mem {
    address: u64,
    /// Whether each block is plugged.
    plugged: Vec<bool>,
    count: usize,
    /// Blocks from the first on that the guest may plug.
    usable: usize,
    /// Blocks that the host wants plugged.
    requested: usize,
    queue: Vec<Queue>,
    activation: Option<Activation>,
    events: Option<Arc<[EventFd]>>,
    buffers: Buffers,
    pub(super) metrics: Metrics,
    log: GuestLog,
}

/// Number of blocks; sizes here are those of memory that is mapped.
fn blocks(bytes: u64) -> usize {
    usize::try_from(bytes / BLOCK).unwrap_or(usize::MAX)
}

impl Mem {
    /// A range of `bytes` at `address`, both multiples of [`BLOCK`], which is mapped in guest memory
    /// (not necessarily for the guest's CPUs yet).
    ///
    /// # Errors
    /// It does not consist of whole blocks, or is too large.
    pub fn new(address: u64, bytes: u64) -> Result<Self, DeviceError> {
        let bad = |reason: &str| DeviceError::BadSetup {
            device: "mem",
            reason: reason.to_owned(),
        };
        if !address.is_multiple_of(BLOCK) || !bytes.is_multiple_of(BLOCK) || bytes == 0 {
            return Err(bad("the range does not consist of whole blocks"));
        }
        if address.checked_add(bytes).is_none() {
            return Err(bad("the range does not end"));
        }
        let mut plugged = Vec::new();
        plugged
            .try_reserve_exact(blocks(bytes))
            .map_err(|_| bad("the range is too large"))?;
        plugged.resize(blocks(bytes), false);
        Ok(Self {
            address,
            plugged,
            count: 0,
            usable: 0,
            requested: 0,
            queue: Vec::new(),
            activation: None,
            events: None,
            buffers: Buffers::default(),
            metrics: Metrics::default(),
            log: GuestLog::new("mem"),
        })
    }

    /// Makes as much usable as [`Self::request`] would, without asking for it: the owner lets the
    /// guest's CPUs reach it in between. Gives the number of blocks.
    pub fn prepare(&mut self, bytes: u64) -> usize {
        let wanted = blocks(bytes.saturating_add(BLOCK - 1)).min(self.plugged.len());
        // What was usable stays so: the guest may have blocks there.
        self.usable = self.usable.max(wanted);
        wanted
    }

    /// Bytes, from the first on, that the guest may plug.
    pub fn usable_bytes(&self) -> u64 {
        self.usable as u64 * BLOCK
    }

    /// Wants the guest to have `bytes` of it, rounded up to whole blocks, and no more than there
    /// are. How much it has is [`Self::plugged_bytes`].
    pub fn request(&mut self, bytes: u64) {
        let wanted = self.prepare(bytes);
        if self.requested != wanted {
            self.requested = wanted;
            if let Some(activation) = &self.activation {
                activation.interrupt.trigger(InterruptKind::ConfigChange);
            }
        }
    }

    /// Bytes that the host wants plugged.
    pub fn requested_bytes(&self) -> u64 {
        self.requested as u64 * BLOCK
    }

    /// Bytes that are plugged.
    pub fn plugged_bytes(&self) -> u64 {
        self.count as u64 * BLOCK
    }

    /// Whether a driver works on it.
    pub fn is_active(&self) -> bool {
        self.activation.is_some()
    }

    /// The blocks of a request, if all of them are in the usable part.
    fn range(&self, address: u64, count: u16) -> Option<std::ops::Range<usize>> {
        let offset = address.checked_sub(self.address)?;
        if !offset.is_multiple_of(BLOCK) || count == 0 {
            return None;
        }
        let first = blocks(offset);
        let end = first.checked_add(count.into())?;
        (end <= self.usable).then_some(first..end)
    }

    fn all(&self, range: &std::ops::Range<usize>, wanted: bool) -> bool {
        let part = self.plugged.get(range.clone()).unwrap_or_default();
        part.iter().all(|plugged| *plugged == wanted)
    }

    fn set(&mut self, range: std::ops::Range<usize>, plugged: bool) {
        let count = range.len();
        if let Some(part) = self.plugged.get_mut(range) {
            part.fill(plugged);
        }
        match plugged {
            true => self.count += count,
            false => self.count = self.count.saturating_sub(count),
        }
    }

    fn plug(&mut self, address: u64, count: u16) -> u16 {
        let Some(range) = self.range(address, count) else {
            return ERROR;
        };
        if !self.all(&range, false) {
            return ERROR;
        }
        // The host may have changed its mind meanwhile.
        if self.count + range.len() > self.requested {
            return NACK;
        }
        self.set(range, true);
        self.metrics.plugs += u64::from(count);
        ACK
    }

    fn unplug(&mut self, mem: &GuestMemoryMmap<()>, address: u64, count: u16) -> u16 {
        let Some(range) = self.range(address, count) else {
            return ERROR;
        };
        if !self.all(&range, true) {
            return ERROR;
        }
        self.give_back(mem, address, range.len());
        self.set(range, false);
        self.metrics.unplugs += u64::from(count);
        ACK
    }

    /// Memory of blocks goes back to the host. Where the host refuses, it stays with this VM, whose
    /// guest may not use it.
    fn give_back(&mut self, mem: &GuestMemoryMmap<()>, address: u64, count: usize) {
        let bytes = count as u64 * BLOCK;
        match release(mem, GuestAddress(address), bytes, GUEST_PAGE) {
            Ok(bytes) => self.metrics.released_bytes += bytes,
            Err(error) => {
                self.metrics.errors += 1;
                self.log.warn(format_args!(
                    "{count} blocks at {address:#x}: cannot be given back: {error}"
                ));
            }
        }
    }

    fn unplug_all(&mut self, mem: &GuestMemoryMmap<()>) -> u16 {
        for (first, count) in self.runs() {
            self.give_back(mem, self.address + first as u64 * BLOCK, count);
            self.set(first..first + count, false);
        }
        ACK
    }

    fn runs(&self) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (index, _) in self.plugged.iter().enumerate().filter(|(_, p)| **p) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == index => *count += 1,
                _ => runs.push((index, 1)),
            }
        }
        runs
    }

    /// Whether blocks are plugged: 0 all, 1 none, 2 some.
    fn state(&self, address: u64, count: u16) -> Option<u16> {
        let range = self.range(address, count)?;
        Some(match (self.all(&range, true), self.all(&range, false)) {
            (true, _) => 0,
            (_, true) => 1,
            _ => 2,
        })
    }

    /// Answers the request in `buffers`; the number of bytes written.
    fn answer(&mut self, mem: &GuestMemoryMmap<()>, buffers: &Buffers) -> u32 {
        let mut request = [0; REQUEST];
        // A request without an address need not have the bytes for one.
        let got = read_front(mem, &buffers.readable, &mut request);
        let [t0, t1, ..] = request;
        let [_, _, _, _, _, _, _, _, a @ .., c0, c1, _, _, _, _, _, _] = request;
        let (kind, address) = (u16::from_le_bytes([t0, t1]), u64::from_le_bytes(a));
        let count = u16::from_le_bytes([c0, c1]);
        let whole = got >= REQUEST - 6;
        let mut state = 0;
        let answer = match kind {
            PLUG if whole => self.plug(address, count),
            UNPLUG if whole => self.unplug(mem, address, count),
            UNPLUG_ALL if got >= 2 => self.unplug_all(mem),
            STATE if whole => match self.state(address, count) {
                Some(found) => {
                    state = found;
                    ACK
                }
                None => ERROR,
            },
            _ => ERROR,
        };
        if answer != ACK {
            self.metrics.refused += 1;
        }
        let mut response = [0; RESPONSE];
        response[..2].copy_from_slice(&answer.to_le_bytes());
        response[8..].copy_from_slice(&state.to_le_bytes());
        // At most ten.
        write_front(mem, &buffers.writable, &response) as u32
    }

    pub(super) fn work(&mut self) {
        let Some(activation) = self.activation.take() else {
            return;
        };
        let mem = activation.mem.memory();
        let mut queues = std::mem::take(&mut self.queue);
        let mut buffers = std::mem::take(&mut self.buffers);
        if let Some(queue) = queues.first_mut() {
            let result =
                drain(
                    queue,
                    &mem,
                    &activation.interrupt,
                    BUDGET,
                    |mem, chain| match buffers.fill(mem, chain, 8) {
                        Ok(()) => Some(self.answer(mem, &buffers)),
                        Err(error) => {
                            self.metrics.errors += 1;
                            self.log.warn(format_args!("request refused: {error}"));
                            Some(0)
                        }
                    },
                );
            let event = self.events.as_ref().and_then(|events| events.first());
            end_turn(result, event, &activation.interrupt, &self.log);
        }
        drop(mem);
        self.queue = queues;
        self.buffers = buffers;
        self.activation = Some(activation);
    }
}

impl VirtioDevice for Mem {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn device_type(&self) -> u32 {
        24
    }

    fn queue_max_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let bytes = |blocks: usize| blocks as u64 * BLOCK;
        // The second word is the NUMA node, of which there is none.
        let words = [
            BLOCK,
            0,
            self.address,
            bytes(self.plugged.len()),
            bytes(self.usable),
            bytes(self.count),
            bytes(self.requested),
        ];
        let mut config = [0; 56];
        for (to, word) in config.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        crate::virtio::read_config(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        // A guest that does not know of it may touch what it has no right to, as long as it is there.
        if activation.features & F_UNPLUGGED_INACCESSIBLE == 0 {
            return Err(DeviceError::BadSetup {
                device: "mem",
                reason: "the driver wants to use memory that is not plugged".to_owned(),
            });
        }
        activation.expect_queues("mem", QUEUE_SIZES.len())?;
        self.queue = std::mem::take(&mut activation.queues);
        self.activation = Some(activation);
        Ok(())
    }

    fn handle_queue(&mut self, _index: u16, _ops: &mut EventOps) {
        self.work();
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        // Blocks stay as they are (5.15.5.2): a driver that comes back asks for their states.
        self.activation = None;
        self.buffers = Buffers::default();
        std::mem::take(&mut self.queue)
    }

    fn queues(&self) -> &[Queue] {
        &self.queue
    }

    fn set_queue_events(&mut self, events: Arc<[EventFd]>) {
        self.events = Some(events);
    }

    fn save(&self) -> serde_json::Value {
        json!(Saved {
            version: 1,
            address: self.address,
            blocks: self.plugged.len(),
            usable: self.usable,
            requested: self.requested,
            plugged: self.runs(),
        })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let bad = |reason: String| StateError {
            device: "mem",
            reason,
        };
        let saved = Saved::deserialize(state).map_err(|e| bad(e.to_string()))?;
        if saved.version != 1 {
            return Err(bad(format!("it has version {}, not 1", saved.version)));
        }
        if saved.address != self.address || saved.blocks != self.plugged.len() {
            return Err(bad("its range is another".to_owned()));
        }
        if saved.usable > saved.blocks || saved.requested > saved.usable {
            return Err(bad("it wants more than there is".to_owned()));
        }
        self.plugged.fill(false);
        self.count = 0;
        for (first, count) in saved.plugged {
            let end = first.checked_add(count).filter(|end| *end <= saved.usable);
            let range = first..end.ok_or_else(|| bad("a block lies outside".to_owned()))?;
            if !self.all(&range, false) {
                return Err(bad("a block is there twice".to_owned()));
            }
            self.set(range, true);
        }
        self.usable = saved.usable;
        self.requested = saved.requested;
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        json!({
            "requested_bytes": self.requested_bytes(),
            "plugged_bytes": self.plugged_bytes(),
            "counters": self.metrics,
        })
    }
}
