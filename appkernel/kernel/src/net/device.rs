//! The network device (virtio 1.2, 5.1): one frame of Ethernet per buffer, no offloads.

use alloc::vec::Vec;

use appkernel_core::netconf::Counters;
use appkernel_hal::{direct, frames};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use crate::fs::virtio::{Queue, Transport, WRITE};
use crate::start::Machine;

/// virtio's type of the device.
const DEVICE_TYPE: u32 = 1;
const F_MTU: u32 = 1 << 3;
const F_MAC: u32 = 1 << 5;
const RX: u32 = 0;
const TX: u32 = 1;
const BUFFERS: u16 = 64;
/// What is before each frame.
const HEADER: usize = 12;
/// Of Ethernet.
const FRAME_HEADER: usize = 14;
/// With a VLAN's tag.
const FRAME_MORE: usize = 4;
const MTU: usize = 1500;
/// Least and largest packet that an interface may have; IPv6 wants the first.
const MTUS: core::ops::RangeInclusive<usize> = 1280..=16_000;

/// Buffers that the device fills.
struct Receiver {
    queue: Queue,
    memory: Vec<u64>,
    bytes: usize,
    /// A frame that the device is done with, and nobody has looked at: its buffer and length.
    inbox: Option<(u16, usize)>,
}

/// Buffers that the device empties.
struct Sender {
    queue: Queue,
    memory: Vec<u64>,
    bytes: usize,
    free: Vec<u16>,
    offered: bool,
    counters: (u64, u64),
}

/// The device.
pub struct Device {
    transport: Transport,
    receiver: Receiver,
    sender: Sender,
    received: (u64, u64),
    refilled: bool,
    pub mac: [u8; 6],
    /// What the device says.
    pub mtu: usize,
    /// The longest that its buffers have room for.
    pub largest: usize,
}

impl Device {
    /// Finds and starts the device with this address, or the first.
    pub fn start(machine: &Machine, mac: Option<[u8; 6]>) -> Option<Self> {
        let transport = machine.devices.iter().find_map(|device| {
            let (transport, kind) = Transport::find(device, machine.ram_end)?;
            let own = [0, 1, 2, 3, 4, 5].map(|i| transport.config(i));
            (kind == DEVICE_TYPE && mac.is_none_or(|mac| mac == own)).then_some(transport)
        })?;
        let features = transport.begin(F_MAC | F_MTU)?;
        let mut mac = [0; 6];
        if features & F_MAC != 0 {
            for (at, byte) in (0..).zip(&mut mac) {
                *byte = transport.config(at);
            }
        } else {
            appkernel_hal::cpu::random(&mut mac);
            // Of one machine, and locally made.
            mac[0] = mac[0] & 0xfe | 2;
        }
        let mtu = if features & F_MTU != 0 {
            let said = u16::from_le_bytes([transport.config(10), transport.config(11)]);
            usize::from(said).clamp(*MTUS.start(), *MTUS.end())
        } else {
            MTU
        };
        let bytes = HEADER + FRAME_HEADER + FRAME_MORE + mtu.max(MTU);
        let order = bytes.div_ceil(4096).next_power_of_two().trailing_zeros() as usize;
        let bytes = 4096 << order;
        let mut receiver = Receiver {
            queue: transport.queue(RX, BUFFERS)?,
            memory: Vec::new(),
            bytes,
            inbox: None,
        };
        let mut sender = Sender {
            queue: transport.queue(TX, BUFFERS)?,
            memory: Vec::new(),
            bytes,
            free: (0..BUFFERS).collect(),
            offered: false,
            counters: (0, 0),
        };
        // Nobody waits for a frame to be gone.
        sender.queue.quiet(true);
        for i in 0..BUFFERS {
            let frame = frames::allocate(order)?;
            receiver.queue.describe(i, frame, bytes, WRITE, 0);
            receiver.queue.offer(i);
            receiver.memory.push(frame);
            let frame = frames::allocate(order)?;
            // SAFETY: the driver's own, and longer than the header, which stays zero: no offloads.
            unsafe { direct(frame).write_bytes(0, HEADER) };
            sender.memory.push(frame);
        }
        crate::traps::wakes_network(transport.pin());
        transport.finish();
        receiver.queue.notify();
        Some(Self {
            transport,
            receiver,
            sender,
            received: (0, 0),
            refilled: false,
            mac,
            mtu,
            largest: bytes - HEADER - FRAME_HEADER - FRAME_MORE,
        })
    }

    /// Whether the device has brought something.
    pub fn has_work(&self) -> bool {
        self.receiver.queue.has_used() || self.sender.is_full() && self.sender.queue.has_used()
    }

    /// Bytes and packets so far.
    pub fn counters(&self) -> Counters {
        Counters {
            received: self.received,
            sent: self.sender.counters,
        }
    }

    /// Tells the device that its interrupt was seen.
    pub fn acknowledge(&self) {
        self.transport.acknowledge();
    }

    /// Takes the next frame out of the queue and shows it; it is the next that `receive` gives.
    pub fn fetch(&mut self) -> Option<&[u8]> {
        let receiver = &mut self.receiver;
        if receiver.inbox.is_none() {
            let (head, len) = receiver.queue.take()?;
            let len = len.min(receiver.bytes);
            self.received.0 += len.saturating_sub(HEADER) as u64;
            self.received.1 += 1;
            receiver.inbox = Some((head, len));
        }
        self.receiver.frame()
    }

    /// Gives the buffer of the frame back, whoever has looked at it.
    pub fn done(&mut self) {
        if let Some((head, _)) = self.receiver.inbox.take() {
            self.receiver.queue.offer(head);
            self.refilled = true;
        }
    }

    /// Takes back what the device has sent; whether there is room for frames.
    pub fn collect(&mut self) -> bool {
        self.sender.collect();
        let room = !self.sender.is_full();
        self.sender.queue.quiet(room);
        // It may have been done before it was asked to say so.
        if !room {
            self.sender.collect();
        }
        !self.sender.is_full()
    }

    /// Tells the device what came up.
    pub fn flush(&mut self) {
        if core::mem::take(&mut self.sender.offered) {
            self.sender.queue.notify();
        }
        if core::mem::take(&mut self.refilled) {
            self.receiver.queue.notify();
        }
    }
}

impl Receiver {
    fn frame(&self) -> Option<&[u8]> {
        let (head, len) = self.inbox?;
        let at = *self.memory.get(usize::from(head))?;
        // SAFETY: the buffer is the driver's own, of that many bytes; the device is done with it,
        // and gets it back after the frame was looked at (`done` needs all of the device).
        let bytes = unsafe { core::slice::from_raw_parts(direct(at), len) };
        Some(bytes.get(HEADER..).unwrap_or_default())
    }
}

impl Sender {
    fn is_full(&self) -> bool {
        // Frames that answer others need room too.
        self.free.len() < 2
    }

    fn collect(&mut self) {
        while let Some((head, _)) = self.queue.take() {
            // The device gives back what it was given: anything else would be used twice.
            if head < BUFFERS && !self.free.contains(&head) {
                self.free.push(head);
            }
        }
    }
}

/// A frame that came.
pub struct RxToken<'a>(&'a [u8]);

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for a frame.
pub struct TxToken<'a>(&'a mut Sender);

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let sender = self.0;
        let room = sender.bytes - HEADER;
        let slot = if len <= room { sender.free.pop() } else { None };
        let at = slot.and_then(|slot| sender.memory.get(usize::from(slot)).copied());
        let (Some(slot), Some(at)) = (slot, at) else {
            // Not with a token that was given out; the frame is lost, as frames may be.
            return f(&mut alloc::vec![0; len]);
        };
        // SAFETY: the buffer is the driver's own, has `bytes` bytes, and the device has given it
        // back.
        let bytes = unsafe { core::slice::from_raw_parts_mut(direct(at + HEADER as u64), len) };
        let result = f(bytes);
        sender.queue.describe(slot, at, HEADER + len, 0, 0);
        sender.queue.offer(slot);
        sender.offered = true;
        sender.counters.0 += len as u64;
        sender.counters.1 += 1;
        result
    }
}

impl phy::Device for Device {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        if self.sender.free.is_empty() {
            return None;
        }
        let frame = self.receiver.frame()?;
        Some((RxToken(frame), TxToken(&mut self.sender)))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        (!self.sender.is_full()).then_some(TxToken(&mut self.sender))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + FRAME_HEADER;
        capabilities
    }
}
