//! The balloon.

use std::sync::Arc;

use event_manager::EventOps;
use serde::{Deserialize, Serialize};
use serde_json::json;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::io::{self, GUEST_PAGE};
use crate::virtio::guest_log::GuestLog;
use crate::virtio::queue::{Buffers, Descriptors, drain, end_turn, read_front, signal, skip_front};
use crate::virtio::{Activation, DeviceError, InterruptKind, StateError, VirtioDevice};

pub(super) const F_STATS_VQ: u64 = 1 << 1;
pub(super) const F_DEFLATE_ON_OOM: u64 = 1 << 2;
pub(super) const F_PAGE_POISON: u64 = 1 << 4;
pub(super) const F_REPORTING: u64 = 1 << 5;

const QUEUE_SIZES: &[u16] = &[128; 4];
/// Chains per turn: other devices share the thread, and each chain may cost many system calls.
const BUDGET: usize = 8;
const MAX_DESCRIPTORS: usize = 64;
/// Pages in one chain. Linux gives 256 at a time.
const MAX_PFNS: usize = 1024;
/// Length of one statistic: a tag and a value.
const STAT: usize = 10;
/// Statistics in one buffer. The specification has ten tags.
const MAX_STATS: usize = 32;

/// What a guest says of its memory (virtio 1.2, 5.5.6.4). Untrusted: for display only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Bytes swapped in.
    pub swap_in: u64,
    /// Bytes swapped out.
    pub swap_out: u64,
    /// Major page faults.
    pub major_faults: u64,
    /// Minor page faults.
    pub minor_faults: u64,
    /// Bytes not used for anything.
    pub free: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes a new program could get without swapping.
    pub available: u64,
    /// Bytes of file caches.
    pub caches: u64,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Metrics {
    pub inflated_pages: u64,
    pub deflated_pages: u64,
    pub reported_ranges: u64,
    pub released_bytes: u64,
    pub errors: u64,
}

/// What a queue is for. Which index it has depends on the features (5.5.2): without one, the
/// queues behind it move up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    target: u32,
    actual: u32,
    poison: u32,
    held: Option<u16>,
    stats: GuestStats,
}

/// The memory balloon.
#[derive(Debug)]
pub struct Balloon {
    host_page: u64,
    target: u32,
    actual: u32,
    poison: u32,
    queues: Vec<Queue>,
    roles: Vec<Role>,
    activation: Option<Activation>,
    events: Option<Arc<[EventFd]>>,
    buffers: Buffers,
    pfns: Vec<u32>,
    /// The statistics buffer, kept until the host wants new numbers.
    held: Option<u16>,
    stats: GuestStats,
    pub(super) metrics: Metrics,
    log: GuestLog,
}

impl Default for Balloon {
    fn default() -> Self {
        Self::new()
    }
}

impl Balloon {
    /// An empty balloon for guest memory in ordinary pages.
    pub fn new() -> Self {
        Self::with_host_page(GUEST_PAGE)
    }

    /// An empty balloon for guest memory in pages of `host_page` bytes (2 MiB with huge pages):
    /// only whole ones are given back.
    pub fn with_host_page(host_page: u64) -> Self {
        Self {
            host_page: host_page.max(GUEST_PAGE),
            target: 0,
            actual: 0,
            poison: 0,
            queues: Vec::new(),
            roles: Vec::new(),
            activation: None,
            events: None,
            buffers: Buffers::default(),
            pfns: Vec::new(),
            held: None,
            stats: GuestStats::default(),
            metrics: Metrics::default(),
            log: GuestLog::new("balloon"),
        }
    }

    /// Asks the guest to give up `pages` pages of 4 KiB in all. How many it has given up is
    /// [`Self::actual`], in its own time.
    pub fn set_target(&mut self, pages: u32) {
        if self.target != pages {
            self.target = pages;
            if let Some(activation) = &self.activation {
                activation.interrupt.trigger(InterruptKind::ConfigChange);
            }
        }
    }

    /// Pages asked for.
    pub fn target(&self) -> u32 {
        self.target
    }

    /// Pages the guest says it has given up.
    pub fn actual(&self) -> u32 {
        self.actual
    }

    /// What the guest last said of its memory. [`Self::request_stats`] asks for new numbers.
    pub fn stats(&self) -> GuestStats {
        self.stats
    }

    /// Asks the guest for new statistics; false if it does not give any (now).
    pub fn request_stats(&mut self) -> bool {
        let (Some(activation), Some(index)) = (
            &self.activation,
            self.roles.iter().position(|r| *r == Role::Stats),
        ) else {
            return false;
        };
        let (Some(queue), Some(head)) = (self.queues.get_mut(index), self.held.take()) else {
            return false;
        };
        let mem = activation.mem.memory();
        if queue.add_used(&*mem, head, 0).is_err() {
            return false;
        }
        signal(queue, &mem, &activation.interrupt);
        true
    }

    fn set_roles(&mut self, features: u64) {
        self.roles = vec![Role::Inflate, Role::Deflate];
        if features & F_STATS_VQ != 0 {
            self.roles.push(Role::Stats);
        }
        if features & F_REPORTING != 0 {
            self.roles.push(Role::Reporting);
        }
    }

    pub(super) fn work(&mut self, index: usize) {
        let (Some(activation), Some(queue), Some(role)) = (
            &self.activation,
            self.queues.get_mut(index),
            self.roles.get(index).copied(),
        ) else {
            return;
        };
        let mem = activation.mem.memory();
        let mut job = Job {
            host_page: self.host_page,
            poison: if activation.features & F_PAGE_POISON != 0 {
                self.poison
            } else {
                0
            },
            buffers: &mut self.buffers,
            pfns: &mut self.pfns,
            held: &mut self.held,
            stats: &mut self.stats,
            metrics: &mut self.metrics,
            log: &self.log,
        };
        let mut replaced = None;
        let result = drain(queue, &mem, &activation.interrupt, BUDGET, |mem, chain| {
            let head = chain.head_index();
            let kept = job.chain(role, mem, chain);
            if kept {
                // A second buffer while one is held: the driver wants that one back.
                replaced = job.held.replace(head).or(replaced);
                return None;
            }
            Some(0)
        });
        if let Some(head) = replaced {
            let _ = queue.add_used(&*mem, head, 0);
        }
        let event = self.events.as_ref().and_then(|events| events.get(index));
        end_turn(result, event, &activation.interrupt, &self.log);
    }
}

/// One turn's view of the balloon, apart from its queues.
struct Job<'a> {
    host_page: u64,
    poison: u32,
    buffers: &'a mut Buffers,
    pfns: &'a mut Vec<u32>,
    held: &'a mut Option<u16>,
    stats: &'a mut GuestStats,
    metrics: &'a mut Metrics,
    log: &'a GuestLog,
}

impl Job<'_> {
    /// True if the chain is to be kept.
    fn chain(&mut self, role: Role, mem: &GuestMemoryMmap<()>, chain: Descriptors<'_>) -> bool {
        if let Err(e) = self.buffers.fill(mem, chain, MAX_DESCRIPTORS) {
            self.metrics.errors += 1;
            self.log.warn(format_args!("request refused: {e}"));
            return false;
        }
        match role {
            Role::Inflate => self.inflate(mem),
            // The host does nothing: a page comes back when the guest touches it.
            Role::Deflate => {
                self.metrics.deflated_pages += self.buffers.readable_len() / 4;
            }
            Role::Stats => {
                self.read_stats(mem);
                return true;
            }
            Role::Reporting => self.report(mem),
        }
        false
    }

    fn inflate(&mut self, mem: &GuestMemoryMmap<()>) {
        self.pfns.clear();
        let mut pfn = [0; 4];
        while self.pfns.len() < MAX_PFNS
            && read_front(mem, &self.buffers.readable, &mut pfn) == pfn.len()
        {
            skip_front(&mut self.buffers.readable, pfn.len() as u64);
            self.pfns.push(u32::from_le_bytes(pfn));
        }
        if self.buffers.readable_len() != 0 {
            self.metrics.errors += 1;
            self.log.warn(format_args!(
                "more than {MAX_PFNS} pages at once, or a part of one"
            ));
        }
        self.metrics.inflated_pages += self.pfns.len() as u64;
        let (metrics, log, host_page) = (&mut *self.metrics, self.log, self.host_page);
        io::runs(self.pfns, |addr, len| {
            match io::release(mem, addr, len, host_page) {
                Ok(bytes) => metrics.released_bytes += bytes,
                Err(e) => {
                    metrics.errors += 1;
                    log.warn(format_args!("{len} bytes at {:#x}: {e}", addr.0));
                }
            }
        });
    }

    fn report(&mut self, mem: &GuestMemoryMmap<()>) {
        self.metrics.reported_ranges += self.buffers.writable.len() as u64;
        // Released pages read as zeroes; a guest that wants to find another pattern keeps them.
        if self.poison == 0 {
            let (bytes, errors) = io::release_all(mem, &self.buffers.writable, self.host_page);
            self.metrics.released_bytes += bytes;
            self.metrics.errors += errors;
        }
    }

    fn read_stats(&mut self, mem: &GuestMemoryMmap<()>) {
        let mut stat = [0; STAT];
        for _ in 0..MAX_STATS {
            if read_front(mem, &self.buffers.readable, &mut stat) != STAT {
                return;
            }
            skip_front(&mut self.buffers.readable, STAT as u64);
            let [t0, t1, v @ ..] = stat;
            let value = u64::from_le_bytes(v);
            let field = match u16::from_le_bytes([t0, t1]) {
                0 => &mut self.stats.swap_in,
                1 => &mut self.stats.swap_out,
                2 => &mut self.stats.major_faults,
                3 => &mut self.stats.minor_faults,
                4 => &mut self.stats.free,
                5 => &mut self.stats.total,
                6 => &mut self.stats.available,
                7 => &mut self.stats.caches,
                _ => continue,
            };
            *field = value;
        }
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn device_type(&self) -> u32 {
        5
    }

    fn queue_max_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_POISON | F_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let words = [self.target, self.actual, 0, self.poison];
        let mut config = [0; 16];
        for (to, word) in config.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        crate::virtio::read_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(word) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let word = u32::from_le_bytes(word);
        match offset {
            4 => self.actual = word,
            12 => self.poison = word,
            _ => {}
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        self.set_roles(activation.features);
        self.queues = std::mem::take(&mut activation.queues);
        self.activation = Some(activation);
        Ok(())
    }

    fn handle_queue(&mut self, index: u16, _ops: &mut EventOps) {
        self.work(index.into());
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.activation = None;
        self.held = None;
        self.actual = 0;
        self.poison = 0;
        self.buffers = Buffers::default();
        self.pfns = Vec::new();
        std::mem::take(&mut self.queues)
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn set_queue_events(&mut self, events: Arc<[EventFd]>) {
        self.events = Some(events);
    }

    fn save(&self) -> serde_json::Value {
        json!(Saved {
            version: 1,
            target: self.target,
            actual: self.actual,
            poison: self.poison,
            held: self.held,
            stats: self.stats,
        })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let bad = |reason: String| StateError {
            device: "balloon",
            reason,
        };
        let saved = Saved::deserialize(state).map_err(|e| bad(e.to_string()))?;
        if saved.version != 1 {
            return Err(bad(format!("it has version {}, not 1", saved.version)));
        }
        self.target = saved.target;
        self.actual = saved.actual;
        self.poison = saved.poison;
        self.held = saved.held;
        self.stats = saved.stats;
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        json!({
            "target_pages": self.target,
            "actual_pages": self.actual,
            "counters": self.metrics,
            "guest": self.stats,
        })
    }
}
