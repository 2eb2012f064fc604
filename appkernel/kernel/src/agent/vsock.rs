//! Byte streams between host and guest (virtio 1.2, 5.10). Only the host connects, and only to the
//! agent's ports.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use appkernel_core::vsock::{HEADER, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use appkernel_hal::{direct, frames};
use bulkhead_protocol::{CONTROL_PORT, HOST_CID, STREAM_PORT};

use crate::fs::virtio::{Queue, Transport, WRITE};
use crate::start::Machine;

/// virtio's type of the device.
const DEVICE_TYPE: u32 = 19;
const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
/// Buffers for packets of the host: pages, each with room for a header and its payload.
const RX_BUFFERS: u16 = 16;
const RX_BYTES: usize = 4096;
/// Buffers for our packets.
const TX_BUFFERS: u16 = 16;
const TX_ORDER: usize = 2;
const TX_BYTES: usize = 4096 << TX_ORDER;
/// Bytes of a connection that we keep, which is what we promise the host.
const BUFFER: u32 = 64 << 10;
/// Connections at once; more are refused.
const MAX_CONNECTIONS: usize = 1024;
/// Packets without data that wait for a buffer, at most: a host that takes none gets none.
const MAX_BACKLOG: usize = 4096;

/// Tells a connection apart: the host's port, and ours.
pub type Key = (u32, u32);

/// A connection.
#[derive(Debug, Default)]
struct Connection {
    /// What arrived and was not read.
    input: VecDeque<u8>,
    /// The host sends no more; and reads no more.
    input_ended: bool,
    output_refused: bool,
    /// We said that we send no more.
    finished: bool,
    /// What the host has room for: its buffer, and what it took out of it.
    peer_room: u32,
    peer_taken: u32,
    sent: u32,
    /// What we took out, and what the host knows of that.
    taken: u32,
    told: u32,
}

impl Connection {
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer_taken);
        self.peer_room.saturating_sub(under_way)
    }
}

/// The device.
pub struct Vsock {
    transport: Transport,
    rx: Queue,
    tx: Queue,
    _event: Queue,
    rx_memory: Vec<u64>,
    tx_memory: Vec<u64>,
    tx_free: Vec<u16>,
    cid: u64,
    connections: BTreeMap<Key, Connection>,
    /// New connections that nobody asked for yet.
    accepted: VecDeque<Key>,
    backlog: VecDeque<Header>,
}

impl Vsock {
    /// Finds and starts the device.
    pub fn start(machine: &Machine) -> Option<Self> {
        let transport = machine.devices.iter().find_map(|device| {
            let (transport, kind) = Transport::find(device, machine.ram_end)?;
            (kind == DEVICE_TYPE).then_some(transport)
        })?;
        transport.begin(0)?;
        let mut rx = transport.queue(RX, RX_BUFFERS)?;
        let tx = transport.queue(TX, TX_BUFFERS)?;
        let event = transport.queue(EVENT, 1)?;
        let cid = (0..8).fold(0, |cid, i| cid | u64::from(transport.config(i)) << (i * 8));
        let mut rx_memory = Vec::new();
        for i in 0..RX_BUFFERS {
            let frame = frames::allocate(0)?;
            rx.describe(i, frame, RX_BYTES, WRITE, 0);
            rx.offer(i);
            rx_memory.push(frame);
        }
        let mut tx_memory = Vec::new();
        for _ in 0..TX_BUFFERS {
            tx_memory.push(frames::allocate(TX_ORDER)?);
        }
        crate::traps::wakes_agent(transport.pin());
        transport.finish();
        rx.notify();
        Some(Self {
            transport,
            rx,
            tx,
            _event: event,
            rx_memory,
            tx_memory,
            tx_free: (0..TX_BUFFERS).collect(),
            cid,
            connections: BTreeMap::new(),
            accepted: VecDeque::new(),
            backlog: VecDeque::new(),
        })
    }

    /// Whether there is something to do.
    pub fn has_work(&self) -> bool {
        self.rx.has_used() || self.tx.has_used()
    }

    /// Whether the host has taken all packets.
    pub fn is_drained(&self) -> bool {
        self.backlog.is_empty() && self.tx_free.len() == usize::from(TX_BUFFERS)
    }

    /// Takes what the host sent.
    pub fn poll(&mut self) {
        self.transport.acknowledge();
        self.collect();
        let mut any = false;
        while self.backlog.len() < MAX_BACKLOG
            && let Some((head, len)) = self.rx.take()
        {
            any = true;
            let Some(frame) = self.rx_memory.get(usize::from(head)).copied() else {
                continue;
            };
            let len = len.min(RX_BYTES);
            // SAFETY: the buffer is the driver's own, and the device is done with it.
            let bytes = unsafe { core::slice::from_raw_parts(direct(frame), len) };
            if let Some((header, data)) = Header::parse(bytes) {
                self.packet(&header, data);
            }
            self.rx.offer(head);
        }
        if any {
            self.rx.notify();
        }
        self.flush();
    }

    fn collect(&mut self) {
        while let Some((head, _)) = self.tx.take() {
            // The device gives back what it was given: anything else would be used twice.
            if head < TX_BUFFERS && !self.tx_free.contains(&head) {
                self.tx_free.push(head);
            }
        }
    }

    fn packet(&mut self, header: &Header, data: &[u8]) {
        if header.source_cid != u64::from(HOST_CID) || header.target_cid != self.cid {
            return;
        }
        let key = (header.source_port, header.target_port);
        let Some(op) = header.op() else {
            self.reset(key);
            return;
        };
        if op == Op::Request {
            self.request(key, header);
            return;
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            if op != Op::Reset {
                self.reset(key);
            }
            return;
        };
        connection.peer_room = header.room;
        connection.peer_taken = header.taken;
        match op {
            Op::Data => {
                if connection.input.len() + data.len() > BUFFER as usize {
                    // More than was promised.
                    self.close(key);
                    return;
                }
                connection.input.extend(data);
            }
            Op::Shutdown => {
                connection.input_ended |= header.flags & SHUTDOWN_SEND != 0;
                connection.output_refused |= header.flags & SHUTDOWN_RECEIVE != 0;
            }
            Op::Reset => {
                connection.input_ended = true;
                connection.output_refused = true;
                connection.finished = true;
            }
            Op::CreditRequest => self.tell(key, Op::CreditUpdate, 0),
            Op::CreditUpdate => {}
            Op::Request | Op::Response => self.close(key),
        }
    }

    fn request(&mut self, key: Key, header: &Header) {
        let known = self.connections.contains_key(&key);
        if !matches!(key.1, CONTROL_PORT | STREAM_PORT)
            || known
            || self.connections.len() >= MAX_CONNECTIONS
            || frames::is_scarce()
        {
            self.reset(key);
            return;
        }
        let connection = Connection {
            peer_room: header.room,
            peer_taken: header.taken,
            ..Connection::default()
        };
        self.connections.insert(key, connection);
        self.accepted.push_back(key);
        self.tell(key, Op::Response, 0);
    }

    /// A packet without data on a connection.
    fn tell(&mut self, key: Key, op: Op, flags: u32) {
        let taken = match self.connections.get_mut(&key) {
            Some(connection) => {
                connection.told = connection.taken;
                connection.taken
            }
            None => 0,
        };
        let header = Header::new(self.cid, HOST_CID.into(), key, op, flags, BUFFER, taken);
        if self.backlog.len() < MAX_BACKLOG {
            self.backlog.push_back(header);
        }
    }

    fn reset(&mut self, key: Key) {
        self.tell(key, Op::Reset, 0);
    }

    fn flush(&mut self) {
        let mut any = false;
        while !self.backlog.is_empty() && !self.tx_free.is_empty() {
            if let Some(header) = self.backlog.pop_front() {
                self.put(&header, &[]);
                any = true;
            }
        }
        if any {
            self.tx.notify();
        }
    }

    /// Writes a packet into a free buffer, which there must be.
    fn put(&mut self, header: &Header, data: &[u8]) {
        let Some(slot) = self.tx_free.pop() else {
            return;
        };
        let Some(frame) = self.tx_memory.get(usize::from(slot)).copied() else {
            return;
        };
        let head = header.encode();
        let len = data.len().min(TX_BYTES - HEADER);
        // SAFETY: the buffer is the driver's own, of TX_BYTES, and the device has given it back.
        unsafe {
            direct(frame).copy_from_nonoverlapping(head.as_ptr(), HEADER);
            direct(frame)
                .add(HEADER)
                .copy_from_nonoverlapping(data.as_ptr(), len);
        }
        self.tx.describe(slot, frame, HEADER + len, 0, 0);
        self.tx.offer(slot);
    }

    /// A connection that the host made.
    pub fn accept(&mut self) -> Option<Key> {
        self.accepted.pop_front()
    }

    /// Bytes that arrived on a connection and wait.
    pub fn waiting(&self, key: Key) -> usize {
        self.connections.get(&key).map_or(0, |c| c.input.len())
    }

    /// Whether nothing more will arrive.
    pub fn at_end(&self, key: Key) -> bool {
        self.connections
            .get(&key)
            .is_none_or(|c| c.input_ended && c.input.is_empty())
    }

    /// Whether the host takes nothing any more.
    pub fn is_refused(&self, key: Key) -> bool {
        self.connections.get(&key).is_none_or(|c| c.output_refused)
    }

    /// Takes at most `room` bytes that arrived.
    pub fn read(&mut self, key: Key, room: usize) -> Vec<u8> {
        let Some(connection) = self.connections.get_mut(&key) else {
            return Vec::new();
        };
        let count = room.min(connection.input.len());
        let bytes: Vec<u8> = connection.input.drain(..count).collect();
        connection.taken = connection.taken.wrapping_add(count as u32);
        // Told when half of what the host may send is used up.
        if connection.taken.wrapping_sub(connection.told) >= BUFFER / 2 {
            self.tell(key, Op::CreditUpdate, 0);
            self.flush();
        }
        bytes
    }

    /// Bytes that can be sent now.
    pub fn room(&mut self, key: Key) -> usize {
        self.collect();
        let Some(connection) = self.connections.get(&key) else {
            return 0;
        };
        if connection.output_refused || !self.backlog.is_empty() || self.tx_free.is_empty() {
            return 0;
        }
        (connection.credit() as usize).min(self.tx_free.len() * (TX_BYTES - HEADER))
    }

    /// Sends as much as there is room for; gives how much that was.
    pub fn write(&mut self, key: Key, bytes: &[u8]) -> usize {
        let room = self.room(key).min(bytes.len());
        let mut sent = 0;
        while sent < room {
            let piece = bytes.get(sent..room).unwrap_or_default();
            let piece = piece.get(..piece.len().min(TX_BYTES - HEADER));
            let piece = piece.unwrap_or_default();
            let Some(connection) = self.connections.get_mut(&key) else {
                break;
            };
            connection.sent = connection.sent.wrapping_add(piece.len() as u32);
            connection.told = connection.taken;
            let mut header = Header::new(
                self.cid,
                HOST_CID.into(),
                key,
                Op::Data,
                0,
                BUFFER,
                connection.taken,
            );
            header.len = piece.len() as u32;
            self.put(&header, piece);
            sent += piece.len();
        }
        if sent > 0 {
            self.tx.notify();
        }
        sent
    }

    /// Says that nothing more will be sent.
    pub fn finish(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        if !core::mem::replace(&mut connection.finished, true) {
            self.tell(key, Op::Shutdown, SHUTDOWN_SEND);
            self.flush();
        }
    }

    /// Ends a connection. What was sent arrives before its end.
    pub fn close(&mut self, key: Key) {
        if self.connections.contains_key(&key) {
            self.tell(key, Op::Shutdown, SHUTDOWN_BOTH);
            self.connections.remove(&key);
            self.flush();
        }
    }
}
