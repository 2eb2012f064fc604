//! Moving packets between the queues and the streams.

use std::io;
use std::os::fd::AsRawFd;

use event_manager::EventOps;
use libc::iovec;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::mux::{MAX_RESETS, Mux};
use super::packet::{Access, HEADER_LEN, Header, Op, copy_to, narrow, segments};
use super::stream::{MAX_BURST, Phase, Stream};
use crate::GuestMemory;
use crate::virtio::Interrupt;
use crate::virtio::queue::{QueueError, pop, signal};

/// Receive queue: packets for the guest.
pub(super) const RX: usize = 0;
/// Transmit queue: packets of the guest.
pub(super) const TX: usize = 1;
/// Event queue.
pub(super) const EVENT: usize = 2;

/// Most chains handled in one go, so that a busy guest leaves time for other devices of the loop.
const BUDGET: usize = 256;
/// Most payload bytes asked of a socket at once.
const MAX_READ: usize = 64 * 1024;

/// What exists while the driver runs the device.
#[derive(Debug)]
pub(super) struct Active {
    pub mem: GuestMemory,
    pub queues: Vec<Queue>,
    pub interrupt: Interrupt,
    /// Transmit buffers were left alone because too many resets wait for receive buffers.
    pub tx_held: bool,
    /// The driver's rings made no sense; nothing more is done until it resets the device.
    pub broken: bool,
}

/// What there may be to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The guest may have packets, and whatever else waits.
    Transmit,
    /// The guest gave receive buffers.
    Receive,
    /// One socket is ready, and its stream was put at the end of the line if it had something
    /// new. It gets one turn at once and the rest later: the events of other sockets follow, and
    /// otherwise the first of many would take all buffers.
    Socket { new: bool },
}

/// How a pump ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Nothing left to do until an event.
    Idle,
    /// The budget is used up; there is more.
    More,
}

/// A receive buffer of the guest that is being filled.
struct RxBuffer {
    head: u16,
    /// Its segments in the shared list: the header's place and the payload follow each other.
    first: usize,
    count: usize,
    /// Room for payload, in bytes.
    room: usize,
}

impl Active {
    /// Does everything that can be done now, then interrupts the guest at most once. Returns true
    /// if there is more to do right away.
    pub(super) fn work(&mut self, mux: &mut Mux, cause: Cause, ops: &mut EventOps) -> bool {
        let guard = self.mem.memory();
        let mem: &GuestMemoryMmap<()> = &guard;
        if self.broken {
            return false;
        }
        let before = self.used_positions();
        let result = self.pump(mem, mux, cause, ops);
        for (queue, before) in self.queues.iter_mut().zip(before) {
            if queue.next_used() != before {
                signal(queue, mem, &self.interrupt);
            }
        }
        match result {
            Ok(more) => more,
            Err(error) => {
                mux.log
                    .warn(format_args!("{error}; the device needs a reset"));
                self.interrupt.fail();
                self.broken = true;
                false
            }
        }
    }

    fn pump(
        &mut self,
        mem: &GuestMemoryMmap<()>,
        mux: &mut Mux,
        cause: Cause,
        ops: &mut EventOps,
    ) -> Result<bool, QueueError> {
        let mut iov = Vec::with_capacity(64);
        let mut more = false;
        if cause == Cause::Transmit || self.tx_held {
            more |= self.pump_tx(mem, mux, &mut iov, ops)? == Outcome::More;
        }
        more |= self.pump_rx(mem, mux, cause, &mut iov)? == Outcome::More;
        Ok(more || (self.tx_held && mux.resets.len() < MAX_RESETS))
    }

    fn used_positions(&self) -> [u16; 2] {
        [RX, TX].map(|index| self.queues.get(index).map_or(0, QueueT::next_used))
    }

    /// Tells the driver that its connections are gone (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).
    /// Returns false if the guest gave no buffer for it yet.
    pub(super) fn send_transport_reset(&mut self) -> bool {
        let guard = self.mem.memory();
        let mem: &GuestMemoryMmap<()> = &guard;
        let Some(queue) = self.queues.get_mut(EVENT).filter(|queue| queue.ready()) else {
            return false;
        };
        let Ok(Some(chain)) = pop(queue, mem) else {
            // Ask to be told of the first buffer.
            let _ = queue.enable_notification(mem);
            return false;
        };
        let head = chain.head_index();
        let mut iov = Vec::new();
        // The event is a little-endian 32-bit zero.
        let len = match segments(mem, chain, Access::DeviceWrites, &mut iov) {
            Some(_) if copy_to(&iov, &0u32.to_le_bytes()) => 4,
            _ => 0,
        };
        if queue.add_used(mem, head, len).is_ok() {
            signal(queue, mem, &self.interrupt);
        }
        true
    }

    /// Takes packets of the guest.
    fn pump_tx(
        &mut self,
        mem: &GuestMemoryMmap<()>,
        mux: &mut Mux,
        iov: &mut Vec<iovec>,
        ops: &mut EventOps,
    ) -> Result<Outcome, QueueError> {
        self.tx_held = false;
        let Some(queue) = self.queues.get_mut(TX).filter(|queue| queue.ready()) else {
            return Ok(Outcome::Idle);
        };
        let mut left = BUDGET;
        loop {
            queue.disable_notification(mem)?;
            loop {
                if mux.resets.len() >= MAX_RESETS {
                    self.tx_held = true;
                    return Ok(Outcome::Idle);
                }
                if left == 0 {
                    return Ok(Outcome::More);
                }
                let Some(chain) = pop(queue, mem)? else { break };
                left -= 1;
                let head = chain.head_index();
                iov.clear();
                match segments(mem, chain, Access::DeviceReads, iov) {
                    Some(total) => mux.packet(iov, total, ops),
                    None => mux.metrics.malformed += 1,
                }
                queue.add_used(mem, head, 0)?;
            }
            if !queue.enable_notification(mem)? {
                return Ok(Outcome::Idle);
            }
        }
    }

    /// Sends what resets and streams have for the guest, as far as it gave buffers.
    fn pump_rx(
        &mut self,
        mem: &GuestMemoryMmap<()>,
        mux: &mut Mux,
        cause: Cause,
        iov: &mut Vec<iovec>,
    ) -> Result<Outcome, QueueError> {
        let Some(queue) = self.queues.get_mut(RX).filter(|queue| queue.ready()) else {
            return Ok(Outcome::Idle);
        };
        queue.disable_notification(mem)?;
        let mut left = BUDGET;
        while left > 0 {
            if let Some(key) = mux.resets.front().copied() {
                let header =
                    Header::to_guest(Op::Reset, mux.guest_cid, key.host_port, key.guest_port);
                if !send_control(mem, queue, mux, &header, iov)? {
                    return Ok(Outcome::Idle);
                }
                mux.resets.pop_front();
                left -= 1;
                continue;
            }
            let socket = matches!(cause, Cause::Socket { .. });
            if cause == (Cause::Socket { new: false }) {
                break;
            }
            let next = if socket {
                mux.ready.pop_back()
            } else {
                mux.ready.pop_front()
            };
            let Some(index) = next else {
                return Ok(Outcome::Idle);
            };
            let Some(used) = serve(mem, queue, mux, index, iov)? else {
                // No buffers: the stream keeps its place.
                if socket {
                    mux.ready.push_back(index);
                } else {
                    mux.ready.push_front(index);
                }
                return Ok(Outcome::Idle);
            };
            left = left.saturating_sub(used.max(1));
            if let Some(stream) = mux.stream_mut(index) {
                stream.queued = false;
            }
            mux.enqueue(index);
            if socket {
                break;
            }
        }
        let idle = mux.resets.is_empty() && mux.ready.is_empty();
        Ok(if idle { Outcome::Idle } else { Outcome::More })
    }
}

/// Takes the next usable receive buffer, or asks to be told when there is one. Its segments are
/// appended to `iov`.
fn next_buffer(
    mem: &GuestMemoryMmap<()>,
    queue: &mut Queue,
    mux: &mut Mux,
    iov: &mut Vec<iovec>,
) -> Result<Option<RxBuffer>, QueueError> {
    // No more rounds than the queue has entries, as each may find only an unusable buffer.
    for _ in 0..=queue.size() {
        let Some(chain) = pop(queue, mem)? else {
            if queue.enable_notification(mem)? {
                // Buffers came in that very moment.
                queue.disable_notification(mem)?;
                continue;
            }
            return Ok(None);
        };
        let head = chain.head_index();
        let first = iov.len();
        if let Some(total) = segments(mem, chain, Access::DeviceWrites, iov)
            && let Some(room) = total.checked_sub(HEADER_LEN).filter(|room| *room > 0)
        {
            return Ok(Some(RxBuffer {
                head,
                first,
                count: iov.len() - first,
                room,
            }));
        }
        // Too small even for a header and a byte, or not in memory: give it back empty.
        iov.truncate(first);
        mux.metrics.malformed += 1;
        queue.add_used(mem, head, 0)?;
    }
    Ok(None)
}

/// Sends a packet without payload; false if there is no buffer.
fn send_control(
    mem: &GuestMemoryMmap<()>,
    queue: &mut Queue,
    mux: &mut Mux,
    header: &Header,
    iov: &mut Vec<iovec>,
) -> Result<bool, QueueError> {
    iov.clear();
    let Some(buffer) = next_buffer(mem, queue, mux, iov)? else {
        return Ok(false);
    };
    copy_to(iov, &header.encode());
    queue.add_used(mem, buffer.head, HEADER_LEN as u32)?;
    mux.metrics.rx_packets += 1;
    Ok(true)
}

/// Gives one stream its turn: one control packet or one burst of data. Returns how many buffers
/// it took, or `None` if there was none for it.
fn serve(
    mem: &GuestMemoryMmap<()>,
    queue: &mut Queue,
    mux: &mut Mux,
    index: usize,
    iov: &mut Vec<iovec>,
) -> Result<Option<usize>, QueueError> {
    let guest_cid = mux.guest_cid;
    let Some(stream) = mux.stream_mut(index) else {
        return Ok(Some(0));
    };
    let pending = stream.pending;
    let op = match stream.phase {
        Phase::Draining => return Ok(Some(0)),
        Phase::Connecting { .. } if !pending.request => return Ok(Some(0)),
        Phase::Connecting { .. } => Some(Op::Request),
        Phase::Established if pending.response => Some(Op::Response),
        Phase::Established if pending.credit_update => Some(Op::CreditUpdate),
        Phase::Established if pending.credit_request => Some(Op::CreditRequest),
        Phase::Established if stream.host_shutdown & !stream.host_shutdown_told != 0 => {
            Some(Op::Shutdown)
        }
        Phase::Established => None,
    };
    let Some(op) = op else {
        return serve_data(mem, queue, mux, index, iov);
    };
    let mut header = Header::to_guest(op, guest_cid, stream.key.host_port, stream.key.guest_port);
    let told = stream.host_shutdown;
    if op == Op::Shutdown {
        header.flags = told;
    }
    stream.stamp(&mut header);
    let sent = send_control(mem, queue, mux, &header, iov)?;
    let Some(stream) = mux.stream_mut(index) else {
        return Ok(Some(1));
    };
    if !sent {
        // `stamp` took the update for told.
        stream.pending = pending;
        return Ok(None);
    }
    match op {
        Op::Request => stream.pending.request = false,
        Op::Response => stream.pending.response = false,
        Op::CreditRequest => stream.pending.credit_request = false,
        Op::Shutdown => stream.host_shutdown_told = told,
        _ => {}
    }
    Ok(Some(1))
}

/// Reads from a stream's socket straight into the guest's buffers.
fn serve_data(
    mem: &GuestMemoryMmap<()>,
    queue: &mut Queue,
    mux: &mut Mux,
    index: usize,
    iov: &mut Vec<iovec>,
) -> Result<Option<usize>, QueueError> {
    let guest_cid = mux.guest_cid;
    let Some(stream) = mux
        .stream_mut(index)
        .filter(|stream| stream.wants_to_read())
    else {
        return Ok(Some(0));
    };
    let credit = (stream.credit() as usize).min(MAX_READ);
    if credit == 0 {
        if !stream.credit_asked {
            stream.credit_asked = true;
            stream.pending.credit_request = true;
        }
        return Ok(Some(0));
    }
    let burst = stream.burst;

    iov.clear();
    let mut buffers = Vec::with_capacity(burst);
    let mut room = 0;
    while buffers.len() < burst && room < credit {
        let Some(buffer) = next_buffer(mem, queue, mux, iov)? else {
            break;
        };
        room += buffer.room;
        buffers.push(buffer);
    }
    if buffers.is_empty() {
        return Ok(None);
    }
    // The payload's places of all buffers, in one list for the kernel.
    let mut payload: Vec<iovec> = Vec::with_capacity(iov.len());
    let mut wanted = 0;
    for buffer in &buffers {
        let mut part = iov
            .get(buffer.first..buffer.first + buffer.count)
            .unwrap_or_default()
            .to_vec();
        let take = buffer.room.min(credit - wanted);
        if take == 0 || payload.len() + part.len() > 1024 || !narrow(&mut part, HEADER_LEN, take) {
            break;
        }
        wanted += take;
        payload.append(&mut part);
    }

    let Some(stream) = mux.stream_mut(index) else {
        return Ok(Some(0));
    };
    let got = match receive(stream, &payload) {
        Ok(0) => {
            stream.host_ended_sending();
            0
        }
        Ok(n) => n,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            stream.readable = false;
            0
        }
        // The socket is unusable: for the guest the host has finished.
        Err(_) => {
            stream.host_ended_sending();
            0
        }
    };
    stream.burst = if got == wanted {
        (burst * 2).min(MAX_BURST)
    } else {
        1
    };

    let mut rest = got;
    let mut used = 0;
    for buffer in &buffers {
        let len = buffer.room.min(rest);
        if len == 0 {
            break;
        }
        rest -= len;
        let len32 = u32::try_from(len).unwrap_or(0);
        let Some(stream) = mux.stream_mut(index) else {
            break;
        };
        let mut header = Header::to_guest(
            Op::Data,
            guest_cid,
            stream.key.host_port,
            stream.key.guest_port,
        );
        header.len = len32;
        stream.stamp(&mut header);
        stream.count_sent(len32);
        let place = iov
            .get(buffer.first..buffer.first + buffer.count)
            .unwrap_or_default();
        copy_to(place, &header.encode());
        queue.add_used(mem, buffer.head, len32.saturating_add(HEADER_LEN as u32))?;
        mux.metrics.rx_packets += 1;
        mux.metrics.rx_bytes += len as u64;
        used += 1;
    }
    // Buffers that stayed empty are taken again next time.
    let unused = u16::try_from(buffers.len() - used).unwrap_or(0);
    queue.set_next_avail(queue.next_avail().wrapping_sub(unused));
    Ok(Some(used))
}

fn receive(stream: &Stream, payload: &[iovec]) -> io::Result<usize> {
    let Some(socket) = &stream.socket else {
        return Ok(0);
    };
    let count = libc::c_int::try_from(payload.len()).unwrap_or(0);
    loop {
        // SAFETY: every segment is writable guest memory that the caller's guard keeps mapped,
        // and `count` is the list's length.
        let n = unsafe { libc::readv(socket.as_raw_fd(), payload.as_ptr(), count) };
        if n >= 0 {
            return Ok(usize::try_from(n).unwrap_or(0));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
