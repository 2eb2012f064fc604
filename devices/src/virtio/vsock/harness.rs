//! A guest in miniature, for tests and the fuzz target: queues in memory of its own and the event
//! loop's machinery, all on one thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::device::Vsock;
use super::packet::{HEADER_LEN, HOST_CID, Header, Op, TYPE_STREAM};
use crate::GuestMemory;
use crate::virtio::driver_side::{DriverQueue, Part};
use crate::virtio::{Activation, Interrupt, VirtioDevice};

pub(super) const CID: u32 = 3;
const MEM_SIZE: usize = 16 << 20;
const RX_BASE: u64 = 1 << 20;
const RX_LEN: u32 = 4096;
const TX_BASE: u64 = 4 << 20;
const TX_LEN: u64 = 0x2_0000;
const TX_SLOTS: u64 = 32;
const QUEUE_SIZE: u16 = 256;

/// The device as the event loop runs it.
#[derive(Debug)]
struct Runner(Arc<Mutex<Vsock>>);

impl MutEventSubscriber for Runner {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        lock(&self.0).handle_event(events.data(), events.event_set(), ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        lock(&self.0).on_activated(ops);
    }
}

fn lock(device: &Arc<Mutex<Vsock>>) -> MutexGuard<'_, Vsock> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
pub(super) struct Guest {
    pub mem: GuestMemory,
    pub device: Arc<Mutex<Vsock>>,
    pub rx: DriverQueue,
    pub tx: DriverQueue,
    pub event: DriverQueue,
    pub interrupt: Interrupt,
    manager: EventManager<Runner>,
    id: SubscriberId,
    next_slot: u64,
}

impl Guest {
    /// A guest whose driver has set up the device and filled its receive queue.
    pub(super) fn new() -> Option<Self> {
        Self::with_device(Vsock::new(CID).ok()?)
    }

    pub(super) fn with_device(device: Vsock) -> Option<Self> {
        let mut guest = Self::inactive(device)?;
        guest.fill_rx();
        let buffer = [(0x8_0000, 8, true)];
        guest.event.add(&buffer)?;
        guest.activate()?;
        Some(guest)
    }

    pub(super) fn inactive(device: Vsock) -> Option<Self> {
        let mem =
            GuestMemory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEM_SIZE)]).ok()?);
        let device = Arc::new(Mutex::new(device));
        let mut manager = EventManager::new().ok()?;
        let id = manager.add_subscriber(Runner(Arc::clone(&device)));
        Some(Self {
            rx: DriverQueue::new(&mem, 0x1_0000, QUEUE_SIZE),
            tx: DriverQueue::new(&mem, 0x2_0000, QUEUE_SIZE),
            event: DriverQueue::new(&mem, 0x3_0000, 16),
            interrupt: Interrupt::new().ok()?,
            mem,
            device,
            manager,
            id,
            next_slot: 0,
        })
    }

    pub(super) fn activate(&mut self) -> Option<()> {
        let activation = Activation {
            mem: self.mem.clone(),
            queues: [&self.rx, &self.tx, &self.event]
                .iter()
                .map(|queue| queue.device_side(true))
                .collect(),
            interrupt: self.interrupt.clone(),
            features: 1,
        };
        self.device().activate(activation).ok()?;
        let mut ops = self.manager.event_ops(self.id).ok()?;
        lock(&self.device).on_activated(&mut ops);
        Some(())
    }

    /// The driver resets the device and starts over with empty queues.
    #[cfg(test)]
    pub(super) fn reset(&mut self) -> Option<()> {
        self.device().deactivate();
        let mut ops = self.manager.event_ops(self.id).ok()?;
        lock(&self.device).on_deactivated(&mut ops);
        let zero = vec![0; 0x3_0000];
        self.mem
            .memory()
            .write_slice(&zero, GuestAddress(0x1_0000))
            .ok()?;
        self.rx = DriverQueue::new(&self.mem, 0x1_0000, QUEUE_SIZE);
        self.tx = DriverQueue::new(&self.mem, 0x2_0000, QUEUE_SIZE);
        self.event = DriverQueue::new(&self.mem, 0x3_0000, 16);
        Some(())
    }

    pub(super) fn device(&self) -> MutexGuard<'_, Vsock> {
        lock(&self.device)
    }

    /// Runs the event loop until nothing happens any more.
    pub(super) fn settle(&mut self) {
        while self
            .manager
            .run_with_timeout(0)
            .is_ok_and(|events| events > 0)
        {}
    }

    /// Runs the event loop until something happens (at most a minute).
    #[cfg(test)]
    pub(super) fn wait(&mut self) {
        let _ = self.manager.run_with_timeout(60_000);
    }

    pub(super) fn notify(&mut self, index: u16) {
        if let Ok(mut ops) = self.manager.event_ops(self.id) {
            lock(&self.device).handle_queue(index, &mut ops);
        }
    }

    /// Offers every free receive buffer.
    pub(super) fn fill_rx(&mut self) {
        // Descriptors come and go as single entries, so that descriptor `n` always has buffer `n`.
        while self.rx.free() > 0 {
            let slot = u64::from(self.rx.next_free());
            let part = [(RX_BASE + slot * u64::from(RX_LEN), RX_LEN, true)];
            if self.rx.add(&part).is_none() {
                break;
            }
        }
    }

    /// Takes the packets the device has sent, without giving buffers back.
    pub(super) fn take(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        while let Some((head, len)) = self.rx.take_used() {
            let at = RX_BASE + u64::from(head) * u64::from(RX_LEN);
            let mut bytes = vec![0; (len.min(RX_LEN)) as usize];
            let _ = self.mem.memory().read_slice(&mut bytes, GuestAddress(at));
            if let Some(raw) = bytes.first_chunk::<HEADER_LEN>() {
                packets.push((Header::parse(raw), bytes[HEADER_LEN..].to_vec()));
            }
        }
        packets
    }

    /// Runs everything and takes all packets, giving buffers back as a driver does.
    #[cfg(test)]
    pub(super) fn receive(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        loop {
            self.settle();
            let mut now = self.take();
            if now.is_empty() {
                return packets;
            }
            packets.append(&mut now);
            self.fill_rx();
            self.notify(0);
        }
    }

    /// Sends a chain made of `bytes` cut at the offsets `cuts`, without notifying.
    pub(super) fn put(&mut self, bytes: &[u8], cuts: &[usize]) {
        while self.tx.take_used().is_some() {}
        let slot = TX_BASE + (self.next_slot % TX_SLOTS) * TX_LEN;
        self.next_slot += 1;
        let bytes = bytes.get(..TX_LEN as usize).unwrap_or(bytes);
        let _ = self.mem.memory().write_slice(bytes, GuestAddress(slot));
        let mut parts: Vec<Part> = Vec::new();
        let mut from = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            let to = cut.clamp(from, bytes.len());
            parts.push((slot + from as u64, (to - from) as u32, false));
            from = to;
        }
        self.tx.add(&parts);
    }

    pub(super) fn send_raw(&mut self, bytes: &[u8], cuts: &[usize]) {
        self.put(bytes, cuts);
        self.notify(1);
    }

    #[cfg(test)]
    pub(super) fn send(&mut self, header: &Header, payload: &[u8]) {
        let mut header = *header;
        header.len = payload.len() as u32;
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(payload);
        self.send_raw(&bytes, &[HEADER_LEN]);
    }
}

/// A packet of the guest with generous credit.
pub(super) fn from_guest(op: Op, guest_port: u32, host_port: u32) -> Header {
    let mut header = Header::to_guest(op, HOST_CID, guest_port, host_port);
    header.src_cid = u64::from(CID);
    header.socket_type = TYPE_STREAM;
    header.buf_alloc = 1 << 20;
    header
}
