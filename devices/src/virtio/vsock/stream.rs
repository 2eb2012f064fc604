//! One stream: credit, buffering and the state of both halves.

use std::os::unix::net::UnixStream;

use super::handle::Done;
use super::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Receive buffer promised to the guest for each of the first [`FULL_BUFFER_STREAMS`] streams of
/// a VM, in bytes; only allocated while the host's reader is slower than the guest. Four of the
/// largest packets Linux makes keep the guest sending while credit is on its way.
pub(super) const FULL_BUFFER: u32 = 256 * 1024;
/// The same for further streams, so that one guest can make the host hold at most
/// 64 × 256 KiB + 960 × 64 KiB = 76 MiB.
pub(super) const SMALL_BUFFER: u32 = 64 * 1024;
/// How many streams get [`FULL_BUFFER`].
pub(super) const FULL_BUFFER_STREAMS: usize = 64;
/// Most chains filled by one read of a socket. Linux gives buffers of 4 KiB, so this is 64 KiB.
pub(super) const MAX_BURST: usize = 16;

/// The two ports that name a stream (both CIDs are fixed).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// Packets that a stream still has to send, beside data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending {
    pub request: bool,
    pub response: bool,
    pub credit_update: bool,
    pub credit_request: bool,
}

/// Where a stream is in its life.
pub(super) enum Phase {
    /// The host asked; `REQUEST` is pending or sent.
    Connecting {
        id: u64,
        /// The host's end, where the caller has brought one.
        given: Option<UnixStream>,
        done: Done,
    },
    /// Both sides agree that it exists.
    Established,
    /// The guest's side is gone; what it had sent is still being written to the host's reader.
    Draining,
}

impl std::fmt::Debug for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connecting { .. } => "Connecting",
            Self::Established => "Established",
            Self::Draining => "Draining",
        })
    }
}

#[derive(Debug)]
pub(super) struct Stream {
    pub key: Key,
    pub phase: Phase,
    /// The device's end of the socket pair; `None` while connecting.
    pub socket: Option<UnixStream>,
    pub pending: Pending,
    /// In the list of streams that have something for the guest.
    pub queued: bool,

    // Host to guest.
    /// The socket may have data (edge-triggered: cleared when a read would block).
    pub readable: bool,
    /// The host's writer has finished.
    pub eof: bool,
    /// Chains to fill with the next read; doubles while reads fill all of them.
    pub burst: usize,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    sent: u32,
    /// Credit was asked for and nothing was heard since.
    pub credit_asked: bool,

    // Guest to host.
    pub buf_alloc: u32,
    received: u32,
    forwarded: u32,
    forwarded_told: u32,
    buffer: Vec<u8>,
    buffer_start: usize,
    /// `EPOLLOUT` is being waited for.
    pub waiting_writable: bool,
    /// The host's end is closed (both ways).
    pub hung_up: bool,
    /// The host reads no more: what the guest sends is thrown away.
    pub discard: bool,

    /// Halves the guest has shut down.
    pub guest_shutdown: u32,
    /// Halves the host has shut down, and what of it the guest was told.
    pub host_shutdown: u32,
    pub host_shutdown_told: u32,
}

impl Stream {
    pub(super) fn new(key: Key, phase: Phase, buf_alloc: u32) -> Self {
        Self {
            key,
            phase,
            socket: None,
            pending: Pending::default(),
            queued: false,
            readable: false,
            eof: false,
            burst: 1,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
            credit_asked: false,
            buf_alloc,
            received: 0,
            forwarded: 0,
            forwarded_told: 0,
            buffer: Vec::new(),
            buffer_start: 0,
            waiting_writable: false,
            hung_up: false,
            discard: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            host_shutdown_told: 0,
        }
    }

    /// Takes the credit fields every packet of the guest carries.
    pub(super) fn take_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        self.credit_asked = false;
    }

    /// Bytes the guest can take now. A guest that claims to have taken more than was sent gets
    /// nothing: the difference wraps to a huge number in flight.
    pub(super) fn credit(&self) -> u32 {
        self.peer_buf_alloc
            .saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// `len` bytes went to the guest.
    pub(super) fn count_sent(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// Writes the stream's credit into a header that is about to be sent.
    pub(super) fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = self.buf_alloc;
        header.fwd_cnt = self.forwarded;
        self.forwarded_told = self.forwarded;
        self.pending.credit_update = false;
    }

    /// Bytes held for a host reader that is slower than the guest.
    pub(super) fn buffered(&self) -> &[u8] {
        self.buffer.get(self.buffer_start..).unwrap_or_default()
    }

    /// Accepts `len` bytes from the guest, or says that it broke its credit. A guest that keeps
    /// to what it was told never does: it knows less than what is free.
    pub(super) fn count_received(&mut self, len: u32) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        match held.checked_add(len) {
            Some(total) if total <= self.buf_alloc => {
                self.received = self.received.wrapping_add(len);
                true
            }
            _ => false,
        }
    }

    /// `len` bytes went to the host's reader (or were thrown away because it closed).
    pub(super) fn count_forwarded(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
        // Tell the guest before it runs dry, but not for every packet.
        if self.forwarded.wrapping_sub(self.forwarded_told) >= self.buf_alloc / 4 {
            self.pending.credit_update = true;
        }
    }

    /// Room for `len` more bytes at the end of the buffer, or `None` if the host is out of memory.
    pub(super) fn buffer_room(
        &mut self,
        len: usize,
        spare: &mut Option<Vec<u8>>,
    ) -> Option<&mut [u8]> {
        if self.buffer.capacity() == 0 {
            self.buffer = spare.take().unwrap_or_default();
        }
        if self.buffer_start > 0 && self.buffer_start >= self.buffer.len() / 2 {
            self.buffer.drain(..self.buffer_start);
            self.buffer_start = 0;
        }
        let old = self.buffer.len();
        self.buffer.try_reserve(len).ok()?;
        self.buffer.resize(old.checked_add(len)?, 0);
        self.buffer.get_mut(old..)
    }

    /// Removes `len` bytes from the front of the buffer, and gives its memory back once empty.
    pub(super) fn consume_buffer(&mut self, len: usize, spare: &mut Option<Vec<u8>>) {
        self.buffer_start = self.buffer_start.saturating_add(len);
        if self.buffer_start >= self.buffer.len() {
            let mut buffer = std::mem::take(&mut self.buffer);
            self.buffer_start = 0;
            if spare.is_none() {
                buffer.clear();
                *spare = Some(buffer);
            }
        }
    }

    /// The host reads no more: throws away what is held for it.
    pub(super) fn discard_buffer(&mut self, spare: &mut Option<Vec<u8>>) {
        let len = self.buffered().len();
        self.discard = true;
        if len > 0 {
            self.consume_buffer(len, spare);
            self.count_forwarded(u32::try_from(len).unwrap_or(u32::MAX));
        }
    }

    /// Whether data of the host may go to the guest if there is credit.
    pub(super) fn wants_to_read(&self) -> bool {
        matches!(self.phase, Phase::Established)
            && self.readable
            && !self.eof
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Whether there is something to tell the guest (credit for data not considered).
    pub(super) fn has_work(&self) -> bool {
        match self.phase {
            Phase::Connecting { .. } => self.pending.request,
            Phase::Established => {
                self.pending != Pending::default()
                    || self.host_shutdown & !self.host_shutdown_told != 0
                    || (self.wants_to_read() && (self.credit() > 0 || !self.credit_asked))
            }
            Phase::Draining => false,
        }
    }

    /// The host's writer has finished.
    pub(super) fn host_ended_sending(&mut self) {
        self.eof = true;
        self.host_shutdown |= SHUTDOWN_SEND;
    }

    /// The host closed its end; data it wrote before may still be in the socket.
    pub(super) fn host_hung_up(&mut self, spare: &mut Option<Vec<u8>>) {
        self.hung_up = true;
        self.readable = true;
        self.host_shutdown |= SHUTDOWN_RECEIVE;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.host_ended_sending();
        }
        self.discard_buffer(spare);
    }

    /// Everything the host had to say is said, and only the guest's answer is missing.
    pub(super) fn awaits_reset(&self) -> bool {
        matches!(self.phase, Phase::Established) && self.host_shutdown_told == SHUTDOWN_BOTH
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::vsock::packet::Op;

    fn stream() -> Stream {
        Stream::new(
            Key {
                host_port: 1,
                guest_port: 2,
            },
            Phase::Established,
            SMALL_BUFFER,
        )
    }

    fn credit(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            buf_alloc,
            fwd_cnt,
            ..Header::to_guest(Op::CreditUpdate, 3, 1, 2)
        }
    }

    #[test]
    fn credit_towards_the_guest_wraps_and_survives_lies() {
        let mut s = stream();
        s.take_credit(&credit(100, 0));
        assert_eq!(s.credit(), 100);
        s.count_sent(60);
        assert_eq!(s.credit(), 40);
        s.take_credit(&credit(100, 60));
        assert_eq!(s.credit(), 100);
        // The guest claims to have taken more than it was sent.
        s.take_credit(&credit(100, 61));
        assert_eq!(s.credit(), 0);
        s.take_credit(&credit(u32::MAX, 61));
        assert_eq!(s.credit(), 0);
        // Counters wrap after 4 GiB.
        s.sent = u32::MAX - 9;
        s.take_credit(&credit(100, u32::MAX - 9));
        s.count_sent(50);
        assert_eq!(s.sent, 40);
        assert_eq!(s.credit(), 50);
        // A shrunken buffer below what is in flight.
        s.take_credit(&credit(10, u32::MAX - 9));
        assert_eq!(s.credit(), 0);
    }

    #[test]
    fn credit_of_the_guest_is_enforced() {
        let mut s = stream();
        assert!(s.count_received(SMALL_BUFFER));
        assert!(!s.count_received(1));
        assert!(!s.count_received(u32::MAX));
        s.count_forwarded(10);
        assert!(!s.pending.credit_update);
        assert!(s.count_received(10));
        assert!(!s.count_received(1));
        s.count_forwarded(SMALL_BUFFER / 4);
        assert!(s.pending.credit_update);
        let mut header = credit(0, 0);
        s.stamp(&mut header);
        assert!(!s.pending.credit_update);
        assert_eq!(
            (header.buf_alloc, header.fwd_cnt),
            (SMALL_BUFFER, 10 + SMALL_BUFFER / 4)
        );
    }

    #[test]
    fn buffer_keeps_order_and_gives_memory_back() {
        let mut s = stream();
        let mut spare = None;
        s.buffer_room(4, &mut spare)
            .unwrap()
            .copy_from_slice(b"abcd");
        s.consume_buffer(3, &mut spare);
        s.buffer_room(3, &mut spare)
            .unwrap()
            .copy_from_slice(b"efg");
        assert_eq!(s.buffered(), b"defg");
        s.consume_buffer(4, &mut spare);
        assert_eq!(s.buffered(), b"");
        assert_eq!(s.buffer.capacity(), 0);
        assert!(spare.is_some());
        s.buffer_room(1, &mut spare).unwrap()[0] = b'x';
        assert!(spare.is_none());
        assert_eq!(s.buffered(), b"x");
    }
}
