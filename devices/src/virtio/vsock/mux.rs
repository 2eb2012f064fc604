//! All streams of one guest: what each packet and each socket event does to them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use libc::iovec;

use super::handle::{Command, Done, Shared};
use super::metrics::VsockMetrics;
use super::packet::{
    HEADER_LEN, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
    copy_from, narrow,
};
use super::stream::{FULL_BUFFER, FULL_BUFFER_STREAMS, Key, Pending, Phase, SMALL_BUFFER, Stream};
use crate::virtio::guest_log::GuestLog;

/// Most streams of one guest, counting those being opened and closed.
pub(super) const MAX_STREAMS: usize = 1024;
/// Resets that wait for a receive buffer of the guest. When so many wait, no more packets are
/// taken from the guest until it gives buffers: otherwise a guest that sends nonsense and never
/// offers a buffer would make this list grow for ever.
pub(super) const MAX_RESETS: usize = 256;
/// Event token of the wake-up descriptor; stream `i` has token `i + 1`.
pub(super) const WAKE_TOKEN: u32 = 0;
/// First port used for connections of the host.
const FIRST_EPHEMERAL: u32 = 0x4000_0000;

const READ_EVENTS: EventSet = EventSet::IN
    .union(EventSet::READ_HANG_UP)
    .union(EventSet::EDGE_TRIGGERED);

#[derive(Debug)]
pub(super) struct Mux {
    pub guest_cid: u64,
    shared: Arc<Shared>,
    streams: Vec<Option<Stream>>,
    free: Vec<usize>,
    keys: HashMap<Key, usize>,
    /// Streams that have something for the guest, each once, served in turn.
    pub ready: VecDeque<usize>,
    pub resets: VecDeque<Key>,
    next_port: u32,
    /// One buffer kept from a stream that no longer needs it.
    spare: Option<Vec<u8>>,
    pub metrics: VsockMetrics,
    pub log: GuestLog,
}

fn token(index: usize) -> u32 {
    // At most MAX_STREAMS indices exist.
    u32::try_from(index + 1).unwrap_or(u32::MAX >> 1)
}

fn socket_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((ours, theirs))
}

/// A stream that was given, for the device and for the caller.
fn twice(given: UnixStream) -> io::Result<(UnixStream, UnixStream)> {
    given.set_nonblocking(true)?;
    let again = given.try_clone()?;
    Ok((given, again))
}

/// Writes guest memory to a socket without waiting.
fn send(socket: &UnixStream, segments: &mut [iovec]) -> io::Result<usize> {
    loop {
        // SAFETY: an all-zero msghdr is a valid empty message.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = segments.as_mut_ptr();
        message.msg_iovlen = segments.len();
        // SAFETY: the message points to `segments`, whose memory (guest memory under the caller's
        // guard, or a slice) is valid for reading during the call.
        let n = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        if n >= 0 {
            return Ok(usize::try_from(n).unwrap_or(0));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

impl Mux {
    pub(super) fn new(guest_cid: u64, shared: Arc<Shared>) -> Self {
        Self {
            guest_cid,
            shared,
            streams: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_EPHEMERAL,
            spare: None,
            metrics: VsockMetrics::default(),
            log: GuestLog::new("vsock"),
        }
    }

    pub(super) fn stream_mut(&mut self, index: usize) -> Option<&mut Stream> {
        self.streams.get_mut(index)?.as_mut()
    }

    fn count(&self) -> usize {
        self.streams.len() - self.free.len()
    }

    /// Puts the stream at the end of the list of those with something to say, if it has and is not
    /// in it already; true if it was put there.
    pub(super) fn enqueue(&mut self, index: usize) -> bool {
        if let Some(stream) = self.streams.get_mut(index).and_then(Option::as_mut)
            && !stream.queued
            && stream.has_work()
        {
            stream.queued = true;
            self.ready.push_back(index);
            return true;
        }
        false
    }

    fn insert(&mut self, key: Key, phase: Phase, ops: &mut EventOps) -> Option<usize> {
        if self.count() >= MAX_STREAMS && !self.evict(ops) {
            return None;
        }
        let buf_alloc = if self.count() < FULL_BUFFER_STREAMS {
            FULL_BUFFER
        } else {
            SMALL_BUFFER
        };
        let stream = Stream::new(key, phase, buf_alloc);
        let index = if let Some(index) = self.free.pop() {
            index
        } else {
            self.streams.push(None);
            self.streams.len() - 1
        };
        *self.streams.get_mut(index)? = Some(stream);
        self.keys.insert(key, index);
        self.metrics.streams = self.count() as u64;
        Some(index)
    }

    /// Makes room by forgetting a stream that is over for the host and only waits for the guest
    /// (which may be a guest that never answers), or whose guest side is gone.
    fn evict(&mut self, ops: &mut EventOps) -> bool {
        let over =
            |stream: &Stream| stream.awaits_reset() || matches!(stream.phase, Phase::Draining);
        let found = self
            .streams
            .iter()
            .position(|slot| slot.as_ref().is_some_and(over));
        let Some(index) = found else { return false };
        if self
            .stream_mut(index)
            .is_some_and(|stream| stream.awaits_reset())
        {
            self.reset(index, ops);
        } else {
            self.remove(index, ops);
        }
        true
    }

    /// Forgets a stream; its socket closes, so that the host's side reads end of file.
    fn remove(&mut self, index: usize, ops: &mut EventOps) -> Option<Stream> {
        let stream = self.streams.get_mut(index)?.take()?;
        if self.keys.get(&stream.key) == Some(&index) {
            self.keys.remove(&stream.key);
        }
        if let Some(socket) = &stream.socket {
            // Fails only if it was never registered.
            let _ = ops.remove(Events::empty(socket));
        }
        if stream.queued {
            self.ready.retain(|other| *other != index);
        }
        self.free.push(index);
        self.metrics.streams = self.count() as u64;
        Some(stream)
    }

    /// Ends a stream on both sides.
    fn reset(&mut self, index: usize, ops: &mut EventOps) {
        if let Some(stream) = self.remove(index, ops) {
            self.resets.push_back(stream.key);
            if let Phase::Connecting { done, .. } = stream.phase {
                done(Err(io::ErrorKind::ConnectionRefused.into()));
            }
        }
    }

    /// The guest broke the protocol on this stream.
    fn violation(&mut self, index: usize, ops: &mut EventOps) {
        self.metrics.malformed += 1;
        self.metrics.resets += 1;
        self.reset(index, ops);
    }

    // ---- the host's requests ----

    pub(super) fn command(&mut self, command: Command, ops: &mut EventOps) {
        match command {
            Command::Connect {
                id,
                port,
                given,
                done,
            } => self.connect(id, port, given, done, ops),
            Command::Cancel { id } => {
                let found = self.streams.iter().position(|slot| {
                    matches!(slot, Some(Stream { phase: Phase::Connecting { id: other, .. }, .. }) if *other == id)
                });
                if let Some(index) = found {
                    let told = self
                        .stream_mut(index)
                        .is_some_and(|stream| !stream.pending.request);
                    if let Some(stream) = self.remove(index, ops)
                        && told
                    {
                        self.resets.push_back(stream.key);
                    }
                }
            }
        }
    }

    fn connect(
        &mut self,
        id: u64,
        guest_port: u32,
        given: Option<UnixStream>,
        done: Done,
        ops: &mut EventOps,
    ) {
        // With at most MAX_STREAMS ports in use, one of that many and one more is free.
        let mut key = Key {
            host_port: self.next_port,
            guest_port,
        };
        for _ in 0..=MAX_STREAMS {
            key.host_port = self.next_port;
            self.next_port = self
                .next_port
                .checked_add(1)
                .filter(|port| *port != u32::MAX)
                .unwrap_or(FIRST_EPHEMERAL);
            if !self.keys.contains_key(&key) {
                break;
            }
        }
        if self.count() >= MAX_STREAMS && !self.evict(ops) {
            self.metrics.refused += 1;
            done(Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("vsock: the guest has {MAX_STREAMS} streams already; close some"),
            )));
            return;
        }
        if let Some(index) = self.insert(key, Phase::Connecting { id, given, done }, ops) {
            if let Some(stream) = self.stream_mut(index) {
                stream.pending.request = true;
            }
            self.enqueue(index);
        }
    }

    // ---- packets of the guest ----

    /// Handles one packet; `segments` hold header and payload.
    pub(super) fn packet(&mut self, segments: &mut Vec<iovec>, total: usize, ops: &mut EventOps) {
        let mut raw = [0; HEADER_LEN];
        if !copy_from(segments, &mut raw) {
            self.metrics.malformed += 1;
            return;
        }
        let header = Header::parse(&raw);
        self.metrics.tx_packets += 1;
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            // Forged or misdirected: there is nobody an answer could go to.
            self.metrics.malformed += 1;
            return;
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let index = self.keys.get(&key).copied();
        let op = Op::from_u16(header.op).filter(|_| header.socket_type == TYPE_STREAM);
        let Some(op) = op else {
            match index {
                Some(index) => self.violation(index, ops),
                None => {
                    self.metrics.malformed += 1;
                    self.resets.push_back(key);
                }
            }
            return;
        };
        let Some(index) = index else {
            match op {
                Op::Request => self.accept(key, &header, ops),
                // Answering a reset with a reset could go on for ever.
                Op::Reset => {}
                _ => self.resets.push_back(key),
            }
            return;
        };
        let Some(stream) = self.stream_mut(index) else {
            return;
        };
        stream.take_credit(&header);
        let connecting = matches!(stream.phase, Phase::Connecting { .. });
        match op {
            Op::Reset => self.guest_reset(index, ops),
            Op::Response if connecting => self.established(index, ops),
            Op::Request | Op::Response => self.violation(index, ops),
            _ if connecting => self.violation(index, ops),
            Op::Data => self.data(index, &header, segments, total, ops),
            Op::Shutdown => self.guest_shutdown(index, header.flags & SHUTDOWN_BOTH, ops),
            Op::CreditUpdate => {}
            Op::CreditRequest => {
                if let Some(stream) = self.stream_mut(index) {
                    stream.pending.credit_update = true;
                }
            }
        }
        self.enqueue(index);
    }

    fn accept(&mut self, key: Key, header: &Header, ops: &mut EventOps) {
        let accepted = self.shared.backlog(key.host_port).and_then(|backlog| {
            let (ours, theirs) = socket_pair()
                .inspect_err(|error| {
                    self.log.warn(format_args!(
                        "no socket for a connection of the guest: {error}"
                    ))
                })
                .ok()?;
            let index = self.insert(key, Phase::Established, ops)?;
            if !self.attach(index, ours, ops) {
                return None;
            }
            let stream = self.stream_mut(index)?;
            stream.pending.response = true;
            stream.take_credit(header);
            if backlog.push(theirs) {
                Some(index)
            } else {
                self.remove(index, ops);
                None
            }
        });
        if let Some(index) = accepted {
            self.metrics.streams_opened += 1;
            self.enqueue(index);
        } else {
            self.metrics.refused += 1;
            self.resets.push_back(key);
        }
    }

    /// Gives the stream its socket; on failure the stream is gone.
    fn attach(&mut self, index: usize, socket: UnixStream, ops: &mut EventOps) -> bool {
        if let Err(error) = ops.add(Events::with_data(&socket, token(index), READ_EVENTS)) {
            self.log
                .warn(format_args!("cannot watch a stream's socket: {error:?}"));
            self.remove(index, ops);
            return false;
        }
        match self.stream_mut(index) {
            Some(stream) => {
                stream.socket = Some(socket);
                true
            }
            None => false,
        }
    }

    fn established(&mut self, index: usize, ops: &mut EventOps) {
        let Some(stream) = self.stream_mut(index) else {
            return;
        };
        let Phase::Connecting { done, given, .. } =
            std::mem::replace(&mut stream.phase, Phase::Established)
        else {
            return;
        };
        // A guest that guessed the port may answer before the request was sent.
        stream.pending = Pending::default();
        let key = stream.key;
        match given.map_or_else(socket_pair, twice) {
            Ok((ours, theirs)) => {
                if self.attach(index, ours, ops) {
                    self.metrics.streams_opened += 1;
                    done(Ok(theirs));
                } else {
                    self.resets.push_back(key);
                    done(Err(io::Error::other("vsock: cannot watch one more socket")));
                }
            }
            Err(error) => {
                self.reset(index, ops);
                done(Err(error));
            }
        }
    }

    fn guest_reset(&mut self, index: usize, ops: &mut EventOps) {
        let Some(stream) = self.stream_mut(index) else {
            return;
        };
        if matches!(stream.phase, Phase::Connecting { .. }) {
            self.metrics.refused += 1;
            if let Some(Stream {
                phase: Phase::Connecting { done, .. },
                key,
                ..
            }) = self.remove(index, ops)
            {
                done(Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    format!(
                        "vsock: nothing listens on port {} of the guest",
                        key.guest_port
                    ),
                )));
            }
            return;
        }
        if !stream.awaits_reset() {
            self.metrics.resets += 1;
        }
        self.drain(index, ops);
    }

    /// The guest's side is gone: the ports are free again, and what it had sent goes on to the
    /// host's reader before that reads end of file.
    fn drain(&mut self, index: usize, ops: &mut EventOps) {
        let Some(stream) = self.stream_mut(index) else {
            return;
        };
        if stream.buffered().is_empty() {
            self.remove(index, ops);
            return;
        }
        stream.phase = Phase::Draining;
        let key = stream.key;
        if let Some(socket) = &stream.socket {
            let _ = socket.shutdown(Shutdown::Read);
        }
        self.keys.remove(&key);
    }

    fn guest_shutdown(&mut self, index: usize, flags: u32, ops: &mut EventOps) {
        let Some(stream) = self.stream_mut(index) else {
            return;
        };
        let new = flags & !stream.guest_shutdown;
        stream.guest_shutdown |= flags;
        if stream.guest_shutdown == SHUTDOWN_BOTH {
            // An orderly close: the guest waits for this reset before it frees the port.
            let key = stream.key;
            self.drain(index, ops);
            self.resets.push_back(key);
            return;
        }
        let flushed = stream.buffered().is_empty();
        if let Some(socket) = &stream.socket {
            if new & SHUTDOWN_RECEIVE != 0 {
                let _ = socket.shutdown(Shutdown::Read);
            }
            if new & SHUTDOWN_SEND != 0 && flushed {
                let _ = socket.shutdown(Shutdown::Write);
            }
        }
    }

    fn data(
        &mut self,
        index: usize,
        header: &Header,
        segments: &mut Vec<iovec>,
        total: usize,
        ops: &mut EventOps,
    ) {
        let Some(stream) = self.streams.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        let len = header.len as usize;
        let whole = total
            .checked_sub(HEADER_LEN)
            .is_some_and(|payload| len <= payload);
        if !whole
            || stream.guest_shutdown & SHUTDOWN_SEND != 0
            || !narrow(segments, HEADER_LEN, len)
            || !stream.count_received(header.len)
        {
            // The length lies, data after the end of data, or more than was allowed.
            self.violation(index, ops);
            return;
        }
        self.metrics.tx_bytes += u64::from(header.len);
        if len == 0 {
            return;
        }
        let mut written = 0;
        if stream.discard {
            written = len;
        } else if stream.buffered().is_empty()
            && let Some(socket) = &stream.socket
        {
            match send(socket, segments) {
                Ok(n) => written = n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    // The host reads no more.
                    stream.discard_buffer(&mut self.spare);
                    stream.host_shutdown |= SHUTDOWN_RECEIVE;
                    written = len;
                }
            }
        }
        stream.count_forwarded(u32::try_from(written).unwrap_or(header.len));
        if written < len {
            if !narrow(segments, written, len - written) {
                return;
            }
            let copied = stream
                .buffer_room(len - written, &mut self.spare)
                .is_some_and(|room| copy_from(segments, room));
            if !copied {
                self.log.warn(format_args!(
                    "out of memory for {} bytes of a stream; resetting it",
                    len - written
                ));
                self.reset(index, ops);
                return;
            }
            if !stream.waiting_writable
                && let Some(socket) = &stream.socket
            {
                stream.waiting_writable = true;
                let _ = ops.modify(Events::with_data(
                    socket,
                    token(index),
                    READ_EVENTS.union(EventSet::OUT),
                ));
            }
        }
    }

    // ---- sockets ----

    /// Takes note of what happened to a socket; true if its stream newly has something to say.
    pub(super) fn socket_event(
        &mut self,
        event_token: u32,
        set: EventSet,
        ops: &mut EventOps,
    ) -> bool {
        let Some(index) = (event_token as usize).checked_sub(1) else {
            return false;
        };
        let Some(stream) = self.streams.get_mut(index).and_then(Option::as_mut) else {
            return false;
        };
        if set.intersects(EventSet::IN.union(EventSet::READ_HANG_UP)) {
            stream.readable = true;
        }
        if set.intersects(EventSet::HANG_UP.union(EventSet::ERROR)) {
            if matches!(stream.phase, Phase::Draining) {
                self.remove(index, ops);
                return false;
            }
            if !stream.hung_up {
                stream.host_hung_up(&mut self.spare);
            }
        }
        if set.contains(EventSet::OUT) {
            self.flush(index, ops);
        }
        self.enqueue(index)
    }

    /// The host's reader made room.
    fn flush(&mut self, index: usize, ops: &mut EventOps) {
        let Some(stream) = self.streams.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        while !stream.buffered().is_empty() {
            let Some(socket) = &stream.socket else { return };
            let buffered = stream.buffered();
            let mut segment = [iovec {
                iov_base: buffered.as_ptr().cast_mut().cast(),
                iov_len: buffered.len(),
            }];
            match send(socket, &mut segment) {
                Ok(n) => {
                    stream.consume_buffer(n, &mut self.spare);
                    stream.count_forwarded(u32::try_from(n).unwrap_or(u32::MAX));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    stream.discard_buffer(&mut self.spare);
                    stream.host_shutdown |= SHUTDOWN_RECEIVE;
                }
            }
        }
        if matches!(stream.phase, Phase::Draining) {
            self.remove(index, ops);
            return;
        }
        stream.waiting_writable = false;
        if let Some(socket) = &stream.socket {
            let _ = ops.modify(Events::with_data(socket, token(index), READ_EVENTS));
            if stream.guest_shutdown & SHUTDOWN_SEND != 0 {
                let _ = socket.shutdown(Shutdown::Write);
            }
        }
    }

    /// The device is reset: every stream ends. The sockets are given back, already shut down but
    /// still registered with the event loop.
    pub(super) fn clear(&mut self) -> Vec<UnixStream> {
        let mut sockets = Vec::new();
        for slot in &mut self.streams {
            let Some(stream) = slot.take() else { continue };
            if let Phase::Connecting { done, .. } = stream.phase {
                done(Err(io::Error::new(
                    io::ErrorKind::ConnectionReset,
                    "vsock: the guest reset its vsock device while a connection was being made",
                )));
            }
            if let Some(socket) = stream.socket {
                let _ = socket.shutdown(Shutdown::Both);
                sockets.push(socket);
            }
        }
        self.streams.clear();
        self.free.clear();
        self.keys.clear();
        self.ready.clear();
        self.resets.clear();
        self.spare = None;
        self.metrics.streams = 0;
        sockets
    }
}
