//! Moving frames between the tap and guest memory, without a copy in between.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::device::Metrics;
use super::tap::Tap;
use crate::virtio::guest_log::GuestLog;
use crate::virtio::queue::{Buffers, QueueError, Segment, pop, push_iovecs, total};

/// Length of the header before each frame (virtio 1.2, 5.1.6; with `num_buffers`).
pub(super) const HEADER: usize = 12;
/// Where in it the number of buffers is.
const NUM_BUFFERS: u64 = 10;
/// The longest frame with its header: 64 KiB to be segmented, and Ethernet with a VLAN tag.
pub(super) const MAX_FRAME: u64 = HEADER as u64 + 65_536 + 18;
/// Descriptors of one frame.
pub(super) const MAX_DESCRIPTORS: usize = 128;
/// Frames per turn and direction: other devices share the thread.
pub(super) const BUDGET: usize = 64;

/// Pointers for one system call; empty between them.
#[derive(Debug, Default)]
pub(super) struct Iovecs(pub Vec<libc::iovec>);

// SAFETY: the pointers are used only within the call that put them there; between calls they are
// leftovers that nothing reads.
unsafe impl Send for Iovecs {}

/// Why receiving stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// Nothing to receive.
    Dry,
    /// No room in the guest.
    Starved,
    /// The turn is over.
    Budget,
}

/// A chain of receive buffers.
#[derive(Debug, Default)]
struct RxChain {
    head: u16,
    /// Without segments: it broke a rule and is to be given back empty.
    segments: Vec<Segment>,
    len: u64,
}

/// Receive buffers taken apart already but not used: they are still the driver's, the queue's
/// position is before the first of them. A frame of unknown length needs room for the longest, and
/// taking all that apart anew for each frame would cost more than the frame.
#[derive(Debug, Default)]
pub(super) struct Rx {
    ready: VecDeque<RxChain>,
    room: u64,
    spare: Vec<Vec<Segment>>,
}

/// What a turn of receiving works with.
pub(super) struct RxTurn<'a> {
    pub queue: &'a mut Queue,
    pub mem: &'a GuestMemoryMmap<()>,
    pub tap: &'a Tap,
    pub buffers: &'a mut Buffers,
    pub iovecs: &'a mut Iovecs,
    pub metrics: &'a mut Metrics,
    pub log: &'a GuestLog,
    /// Frames may span chains.
    pub mergeable: bool,
    /// Room a frame may need, with header.
    pub frame: u64,
    /// Something was put into the used ring.
    pub used: bool,
}

impl Rx {
    /// Receives frames until there are none, there is no room, or the turn is over.
    pub(super) fn run(&mut self, turn: &mut RxTurn<'_>) -> Result<Stopped, QueueError> {
        for _ in 0..BUDGET {
            // Where the driver has given up all buffers it has, they have to do.
            while !self.enough(turn) {
                if self.top_up(turn)? {
                    continue;
                }
                // Empty: ask to be told of new buffers, unless some came just now.
                let more = self.ahead(turn.queue, |queue| queue.enable_notification(turn.mem))?;
                if !more {
                    turn.metrics.rx_starved += 1;
                    return Ok(Stopped::Starved);
                }
            }
            match self.receive(turn)? {
                Some(()) => {}
                None => return Ok(Stopped::Dry),
            }
        }
        Ok(Stopped::Budget)
    }

    fn enough(&self, turn: &RxTurn<'_>) -> bool {
        let whole_ring = self.ready.len() >= usize::from(turn.queue.size());
        let usable = self.room > 0;
        usable && (!turn.mergeable || self.room >= turn.frame || whole_ring) || whole_ring
    }

    /// Runs `f` with the queue's position after the buffers taken apart already.
    fn ahead<R>(&self, queue: &mut Queue, f: impl FnOnce(&mut Queue) -> R) -> R {
        let base = queue.next_avail();
        // At most as many as the ring has entries.
        queue.set_next_avail(base.wrapping_add(self.ready.len() as u16));
        let result = f(queue);
        queue.set_next_avail(base);
        result
    }

    /// Takes the next chain apart; false if there is none.
    fn top_up(&mut self, turn: &mut RxTurn<'_>) -> Result<bool, QueueError> {
        let mem = turn.mem;
        let Some(chain) = self.ahead(turn.queue, |queue| pop(queue, mem))? else {
            return Ok(false);
        };
        let mut segments = self.spare.pop().unwrap_or_default();
        segments.clear();
        let head = chain.head_index();
        match turn.buffers.fill(mem, chain, MAX_DESCRIPTORS) {
            Ok(()) if turn.buffers.writable_len() >= HEADER as u64 => {
                segments.extend_from_slice(&turn.buffers.writable);
            }
            Ok(()) => turn
                .log
                .warn(format_args!("receive buffer too short for a header")),
            Err(e) => turn.log.warn(format_args!("receive buffer refused: {e}")),
        }
        let len = total(&segments);
        self.room += len;
        self.ready.push_back(RxChain {
            head,
            segments,
            len,
        });
        Ok(true)
    }

    /// Receives one frame into the buffers at hand.
    fn receive(&mut self, turn: &mut RxTurn<'_>) -> Result<Option<()>, QueueError> {
        turn.iovecs.0.clear();
        let mut room = 0;
        for chain in self.ready.iter().filter(|c| c.len > 0) {
            let want = MAX_FRAME - room;
            match push_iovecs(turn.mem, &chain.segments, want, &mut turn.iovecs.0) {
                Ok(n) => room += n,
                // Memory has gone since the chain was checked.
                Err(_) => break,
            }
            let full = turn.iovecs.0.len() + MAX_DESCRIPTORS > libc::UIO_MAXIOV as usize;
            if !turn.mergeable || full || room >= turn.frame {
                break;
            }
        }
        if room == 0 {
            // Only refused buffers: give them back, and see whether better ones follow.
            turn.metrics.errors += 1;
            self.give_back(turn, 0)?;
            return Ok(Some(()));
        }
        let parts = turn.iovecs.0.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        // SAFETY: every entry lies within guest memory, which `mem` keeps mapped; the kernel's
        // copy may race with the guest, but no Rust reference to that memory exists.
        let n = unsafe { libc::readv(turn.tap.as_raw_fd(), turn.iovecs.0.as_ptr(), parts) };
        let Ok(n) = u64::try_from(n) else {
            let e = io::Error::last_os_error();
            return match e.kind() {
                io::ErrorKind::WouldBlock => Ok(None),
                io::ErrorKind::Interrupted => Ok(Some(())),
                // The interface is down or gone. A change of that is a new event.
                _ => {
                    turn.metrics.errors += 1;
                    Ok(None)
                }
            };
        };
        if n == 0 {
            return Ok(None);
        }
        if n < HEADER as u64 {
            turn.metrics.errors += 1;
            return Ok(Some(()));
        }
        turn.metrics.rx_packets += 1;
        turn.metrics.rx_bytes += n - HEADER as u64;
        self.give_back(turn, n)?;
        Ok(Some(()))
    }

    /// Gives back the chains that hold the first `n` received bytes, and refused ones among them.
    fn give_back(&mut self, turn: &mut RxTurn<'_>, n: u64) -> Result<(), QueueError> {
        // Refused chains come first, so that the parts of a frame stay together in the used ring.
        let mut left = n;
        let mut count = 0usize;
        let mut parts = 0u16;
        for chain in &self.ready {
            if left == 0 && chain.len > 0 {
                break;
            }
            count += 1;
            if chain.len == 0 {
                turn.queue.add_used(turn.mem, chain.head, 0)?;
            } else {
                parts = parts.saturating_add(1);
                left = left.saturating_sub(chain.len);
            }
        }
        let mut left = n;
        let mut first = true;
        for chain in self.ready.drain(..count) {
            if chain.len > 0 {
                if first {
                    first = false;
                    if let Some(at) = address_at(&chain.segments, NUM_BUFFERS) {
                        // Two bytes may straddle two buffers.
                        let [low, high] = parts.to_le_bytes();
                        let _ = turn.mem.write_slice(&[low], at);
                        if let Some(at) = address_at(&chain.segments, NUM_BUFFERS + 1) {
                            let _ = turn.mem.write_slice(&[high], at);
                        }
                    }
                }
                let part = left.min(chain.len);
                left -= part;
                turn.queue.add_used(turn.mem, chain.head, part as u32)?;
                self.room -= chain.len;
            }
            if self.spare.len() < usize::from(turn.queue.size()) {
                self.spare.push(chain.segments);
            }
        }
        turn.used |= count > 0;
        let next = turn.queue.next_avail().wrapping_add(count as u16);
        turn.queue.set_next_avail(next);
        Ok(())
    }

    /// Forgets the buffers; they are the driver's.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Where byte `offset` of the buffers is.
fn address_at(segments: &[Segment], mut offset: u64) -> Option<GuestAddress> {
    for segment in segments {
        if offset < u64::from(segment.len) {
            return Some(GuestAddress(segment.addr.0.wrapping_add(offset)));
        }
        offset -= u64::from(segment.len);
    }
    None
}

/// Sends the frame in `buffers`.
pub(super) fn transmit(
    tap: &Tap,
    mem: &GuestMemoryMmap<()>,
    buffers: &Buffers,
    iovecs: &mut Iovecs,
    metrics: &mut Metrics,
) {
    let len = buffers.readable_len();
    iovecs.0.clear();
    if len <= HEADER as u64
        || len > MAX_FRAME
        || push_iovecs(mem, &buffers.readable, len, &mut iovecs.0).is_err()
    {
        metrics.errors += 1;
        return;
    }
    let parts = iovecs.0.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
    loop {
        // SAFETY: as for `readv` above; the kernel only reads here.
        let n = unsafe { libc::writev(tap.as_raw_fd(), iovecs.0.as_ptr(), parts) };
        if n >= 0 {
            metrics.tx_packets += 1;
            metrics.tx_bytes += len - HEADER as u64;
            return;
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            // Full, down, or a header the host does not believe: networks may lose frames.
            metrics.tx_dropped += 1;
            return;
        }
    }
}
