//! What every device does with its queues: take chains apart safely, work with a bound, tell the
//! driver, save the rings' positions.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::guest_log::GuestLog;
use super::{Interrupt, InterruptKind};

/// A chain of descriptors popped from a queue.
pub type Descriptors<'m> = DescriptorChain<&'m GuestMemoryMmap<()>>;

/// Why a queue cannot be worked on any more. The device then asks to be reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Indices or ring memory make no sense.
    #[error("the driver's ring makes no sense: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The available ring went backwards or cannot be read.
    #[error("the driver's available ring changed under the device")]
    Backwards,
    /// An entry of the available ring is no index into the descriptor table.
    #[error("the driver's available ring names descriptor {0}, which the table does not have")]
    Head(u16),
}

/// Why a chain of descriptors was not understood. Such a chain is given back with length 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// More descriptors than the device takes.
    #[error("more than {0} descriptors in a chain")]
    TooMany(usize),
    /// A buffer is not inside guest memory.
    #[error("a buffer of {len} bytes at {addr:#x} is not inside guest memory")]
    Outside {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A device-readable descriptor follows a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// The chain loops, leaves the table, or is longer than 4 GiB.
    #[error("the chain is broken: it loops, leaves the table or is too long")]
    Broken,
}

/// One buffer in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub addr: GuestAddress,
    /// Length in bytes, never 0.
    pub len: u32,
}

/// The buffers of one chain, checked: all inside guest memory, readable ones before writable ones.
/// Kept by a device and filled again for each request, so that requests do not allocate.
#[derive(Debug, Default)]
pub struct Buffers {
    /// What the driver wrote for the device.
    pub readable: Vec<Segment>,
    /// What the device may write.
    pub writable: Vec<Segment>,
}

impl Buffers {
    /// Takes a chain apart, of at most `max` descriptors. Empty descriptors are left out.
    ///
    /// # Errors
    /// When the chain breaks a rule; the buffers are then to be ignored.
    pub fn fill(
        &mut self,
        mem: &GuestMemoryMmap<()>,
        chain: Descriptors<'_>,
        max: usize,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let mut count = 0usize;
        // The iterator ends silently where a chain is broken; then its last descriptor still
        // promises another one, or there was none at all.
        let mut complete = false;
        for desc in chain {
            count += 1;
            if count > max {
                return Err(ChainError::TooMany(max));
            }
            complete = !desc.has_next();
            let (addr, len) = (desc.addr(), desc.len());
            if len != 0 && !mem.check_range(addr, len as usize) {
                return Err(ChainError::Outside { addr: addr.0, len });
            }
            if desc.is_write_only() {
                if len != 0 {
                    self.writable.push(Segment { addr, len });
                }
            } else if self.writable.is_empty() {
                if len != 0 {
                    self.readable.push(Segment { addr, len });
                }
            } else {
                return Err(ChainError::Order);
            }
        }
        if complete {
            Ok(())
        } else {
            Err(ChainError::Broken)
        }
    }

    /// Bytes the device can read.
    pub fn readable_len(&self) -> u64 {
        total(&self.readable)
    }

    /// Bytes the device can write.
    pub fn writable_len(&self) -> u64 {
        total(&self.writable)
    }
}

/// Sum of the lengths.
pub fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// Takes `count` bytes off the front of `segments`; false (and nothing changed) if there are fewer.
pub fn skip_front(segments: &mut Vec<Segment>, count: u64) -> bool {
    if total(segments) < count {
        return false;
    }
    let mut left = count;
    let mut whole = 0;
    for segment in segments.iter_mut() {
        let len = u64::from(segment.len);
        if left >= len {
            left -= len;
            whole += 1;
        } else {
            segment.addr = GuestAddress(segment.addr.raw_value().wrapping_add(left));
            segment.len -= left as u32;
            break;
        }
    }
    segments.drain(..whole);
    true
}

/// Takes the last byte off `segments` and says where it is.
pub fn pop_last_byte(segments: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = segments.last_mut()?;
    last.len -= 1;
    let addr = GuestAddress(last.addr.raw_value().wrapping_add(u64::from(last.len)));
    if last.len == 0 {
        segments.pop();
    }
    Some(addr)
}

/// Reads from the front of `segments` as much as fits into `data`; returns the number of bytes.
pub fn read_front(mem: &GuestMemoryMmap<()>, segments: &[Segment], data: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        let want = (segment.len as usize).min(data.len() - done);
        if want == 0
            || mem
                .read_slice(&mut data[done..done + want], segment.addr)
                .is_err()
        {
            break;
        }
        done += want;
    }
    done
}

/// Writes `data` to the front of `segments` as far as it fits; returns the number of bytes.
pub fn write_front(mem: &GuestMemoryMmap<()>, segments: &[Segment], data: &[u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        let want = (segment.len as usize).min(data.len() - done);
        if want == 0
            || mem
                .write_slice(&data[done..done + want], segment.addr)
                .is_err()
        {
            break;
        }
        done += want;
    }
    done
}

/// Appends what system calls need to reach `segments` directly in guest memory, up to `max` bytes.
/// A buffer that spans memory regions becomes several entries. Returns the bytes covered.
///
/// The pointers stay valid while the caller holds the guard of guest memory that `mem` is from.
pub fn push_iovecs(
    mem: &GuestMemoryMmap<()>,
    segments: &[Segment],
    max: u64,
    iovecs: &mut Vec<libc::iovec>,
) -> Result<u64, ChainError> {
    let mut done = 0u64;
    for segment in segments {
        let want = u64::from(segment.len).min(max - done) as usize;
        if want == 0 {
            break;
        }
        let outside = || ChainError::Outside {
            addr: segment.addr.0,
            len: segment.len,
        };
        let slices = mem
            .get_slices(segment.addr, want)
            .stop_on_error()
            .map_err(|_| outside())?;
        let before = done;
        for slice in slices {
            iovecs.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            done += slice.len() as u64;
        }
        if done - before != want as u64 {
            return Err(outside());
        }
    }
    Ok(done)
}

/// Pops the next chain, if there is one.
///
/// # Errors
/// When the ring makes no sense; without this check a hostile ring could look empty and non-empty
/// at once, and the device would spin on it.
pub fn pop<'m>(
    queue: &mut Queue,
    mem: &'m GuestMemoryMmap<()>,
) -> Result<Option<Descriptors<'m>>, QueueError> {
    if !queue.ready() || queue.avail_idx(mem, Ordering::Acquire)?.0 == queue.next_avail() {
        return Ok(None);
    }
    match queue.iter(mem)?.next() {
        // Such a chain could not be given back, and virtio-queue would log each attempt.
        Some(chain) if chain.head_index() >= queue.size() => {
            Err(QueueError::Head(chain.head_index()))
        }
        Some(chain) => Ok(Some(chain)),
        None => Err(QueueError::Backwards),
    }
}

/// What [`drain`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Chains worked on.
    pub chains: usize,
    /// The budget ran out: there may be more. Notify yourself and return.
    pub more: bool,
}

/// Ends a turn after [`drain`]: calls the device again through its own queue event if there is more
/// to do, or asks the driver for a reset after a ring that makes no sense (false then).
pub(crate) fn end_turn(
    result: Result<Drained, QueueError>,
    queue_event: Option<&EventFd>,
    interrupt: &Interrupt,
    log: &GuestLog,
) -> bool {
    match result {
        Ok(drained) => {
            if let (true, Some(event)) = (drained.more, queue_event) {
                let _ = event.write(1);
            }
            true
        }
        Err(error) => {
            log.warn(format_args!("{error}; the device needs a reset"));
            interrupt.fail();
            false
        }
    }
}

/// Works on available chains until none is left or `budget` of them are done, gives each back with
/// the length `work` returns (`None` keeps the chain with the device), and tells the driver.
///
/// # Errors
/// When the ring makes no sense. What was done until then has been told to the driver.
pub fn drain(
    queue: &mut Queue,
    mem: &GuestMemoryMmap<()>,
    interrupt: &Interrupt,
    budget: usize,
    mut work: impl FnMut(&GuestMemoryMmap<()>, Descriptors<'_>) -> Option<u32>,
) -> Result<Drained, QueueError> {
    if !queue.ready() {
        return Ok(Drained {
            chains: 0,
            more: false,
        });
    }
    let mut chains = 0;
    let mut used = false;
    let mut run = || -> Result<bool, QueueError> {
        loop {
            queue.disable_notification(mem)?;
            while chains < budget {
                let Some(chain) = pop(queue, mem)? else {
                    break;
                };
                chains += 1;
                let head = chain.head_index();
                if let Some(len) = work(mem, chain) {
                    queue.add_used(mem, head, len)?;
                    used = true;
                }
            }
            if chains >= budget {
                return Ok(true);
            }
            if !queue.enable_notification(mem)? {
                return Ok(false);
            }
        }
    };
    let more = run();
    if used {
        signal(queue, mem, interrupt);
    }
    Ok(Drained {
        chains,
        more: more?,
    })
}

/// Interrupts the driver if it wants to hear of used buffers.
pub fn signal(queue: &mut Queue, mem: &GuestMemoryMmap<()>, interrupt: &Interrupt) {
    // VRING_AVAIL_F_NO_INTERRUPT, which counts only without event index (virtio 1.2, 2.7.7.1).
    let unwanted = !queue.event_idx_enabled()
        && mem
            .load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Acquire)
            .is_ok_and(|flags| u16::from_le(flags) & 1 != 0);
    // Where that cannot be found out, an interrupt too many is harmless.
    if !unwanted && queue.needs_notification(mem).unwrap_or(true) {
        interrupt.trigger(InterruptKind::UsedBuffer);
    }
}

/// A queue's set-up and position, in saved state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSaved {
    /// Descriptors in the ring.
    pub size: u16,
    /// The driver has set the queue up.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub desc_table: u64,
    /// Guest address of the available ring.
    pub avail_ring: u64,
    /// Guest address of the used ring.
    pub used_ring: u64,
    /// Next entry of the available ring to look at.
    pub next_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
}

impl QueueSaved {
    /// The set-up and position of `queue`.
    pub fn of(queue: &Queue) -> Self {
        Self {
            size: queue.size(),
            ready: queue.ready(),
            desc_table: queue.desc_table(),
            avail_ring: queue.avail_ring(),
            used_ring: queue.used_ring(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    /// Makes the queue, checking that all of it is inside guest memory.
    ///
    /// # Errors
    /// A sentence saying what is wrong.
    pub fn build(
        &self,
        max_size: u16,
        event_idx: bool,
        mem: &GuestMemoryMmap<()>,
    ) -> Result<Queue, String> {
        let mut queue = Queue::new(max_size).map_err(|e| e.to_string())?;
        if !self.ready {
            return Ok(queue);
        }
        let size = usize::from(self.size);
        // Stricter than `Queue::is_valid`, which looks at the last address only and logs each
        // failure (a guest could flood the log): every byte of the rings has to be in memory, with
        // the event index fields behind them. An available ring at 0 means "not set" to virtio-queue.
        let parts = [
            ("descriptor table", self.desc_table, 16 * size, 16),
            ("available ring", self.avail_ring, 6 + 2 * size, 2),
            ("used ring", self.used_ring, 6 + 8 * size, 4),
        ];
        for (what, addr, len, align) in parts {
            if !addr.is_multiple_of(align) || !mem.check_range(GuestAddress(addr), len) {
                return Err(format!(
                    "its {what} ({len} bytes at {addr:#x}) is not aligned or not inside guest memory"
                ));
            }
        }
        if self.avail_ring == 0 {
            return Err("its available ring is at address 0".to_owned());
        }
        let fail = |e: virtio_queue::Error| e.to_string();
        queue.try_set_size(self.size).map_err(fail)?;
        queue
            .try_set_desc_table_address(GuestAddress(self.desc_table))
            .map_err(fail)?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail_ring))
            .map_err(fail)?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring))
            .map_err(fail)?;
        queue.set_next_avail(self.next_avail);
        queue.set_next_used(self.next_used);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}
