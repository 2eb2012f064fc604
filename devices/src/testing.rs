//! A guest for the tests of devices: memory, rings, and ways to misuse them.

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use proptest::prelude::*;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use crate::GuestMemory;
use crate::virtio::queue::QueueSaved;
use crate::virtio::{Activation, Interrupt};

/// Descriptor flag: the device reads.
pub const READ: u16 = 0;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;

/// Guest memory in bytes.
pub const MEMORY: u64 = 0x20_0000;
/// Rings of queue n are at `RINGS + n * RING_STRIDE`; buffers belong below.
const RINGS: u64 = 0x10_0000;
const RING_STRIDE: u64 = 0x8000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x6000;

pub struct Guest {
    pub mem: GuestMemory,
    pub interrupt: Interrupt,
    size: u16,
    queues: usize,
    next_desc: Vec<u16>,
}

impl Guest {
    pub fn new(queues: usize, size: u16) -> Self {
        Self::with_memory(
            queues,
            size,
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap(),
        )
    }

    pub fn with_memory(queues: usize, size: u16, mem: GuestMemoryMmap<()>) -> Self {
        Self {
            mem: GuestMemory::new(mem),
            interrupt: Interrupt::new().unwrap(),
            size,
            queues,
            next_desc: vec![0; queues],
        }
    }

    pub fn activation(&self, features: u64) -> Activation {
        let mem = self.mem.memory();
        let queue = |n: usize| -> Queue {
            let base = RINGS + n as u64 * RING_STRIDE;
            QueueSaved {
                size: self.size,
                ready: true,
                desc_table: base,
                avail_ring: base + AVAIL,
                used_ring: base + USED,
                next_avail: 0,
                next_used: 0,
            }
            .build(self.size, features & (1 << 29) != 0, &mem)
            .unwrap()
        };
        Activation {
            mem: self.mem.clone(),
            queues: (0..self.queues).map(queue).collect(),
            interrupt: self.interrupt.clone(),
            features,
        }
    }

    fn base(queue: usize) -> u64 {
        RINGS + queue as u64 * RING_STRIDE
    }

    /// Puts a chain of (address, length, flags) up for the device; returns its head.
    pub fn add(&mut self, queue: usize, chain: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_desc[queue] % self.size;
        for (n, (addr, len, flags)) in chain.iter().enumerate() {
            let index = self.next_desc[queue] % self.size;
            self.next_desc[queue] = self.next_desc[queue].wrapping_add(1);
            let more = n + 1 < chain.len();
            let next = self.next_desc[queue] % self.size;
            let flags = flags | u16::from(more);
            let at = Self::base(queue) + u64::from(index) * 16;
            self.write(at, &addr.to_le_bytes());
            self.write(at + 8, &len.to_le_bytes());
            self.write(at + 12, &flags.to_le_bytes());
            self.write(at + 14, &next.to_le_bytes());
        }
        let avail = Self::base(queue) + AVAIL;
        let index = self.read_u16(avail + 2);
        let slot = avail + 4 + u64::from(index % self.size) * 2;
        self.write(slot, &head.to_le_bytes());
        self.set_avail_index(queue, index.wrapping_add(1));
        head
    }

    pub fn set_avail_index(&mut self, queue: usize, index: u16) {
        self.write(Self::base(queue) + AVAIL + 2, &index.to_le_bytes());
    }

    /// (head, length) of everything the device gave back (while fewer than the ring's size).
    pub fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let used = Self::base(queue) + USED;
        let count = self.read_u16(used + 2);
        (0..u64::from(count.min(self.size)))
            .map(|n| {
                let element = self.read(used + 4 + n * 8, 8);
                (
                    u32::from_le_bytes(element[..4].try_into().unwrap()),
                    u32::from_le_bytes(element[4..].try_into().unwrap()),
                )
            })
            .collect()
    }

    fn read_u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.read(addr, 2).try_into().unwrap())
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem
            .memory()
            .read_slice(&mut data, GuestAddress(addr))
            .unwrap();
        data
    }

    pub fn write(&mut self, addr: u64, data: &[u8]) {
        self.mem
            .memory()
            .write_slice(data, GuestAddress(addr))
            .unwrap();
    }

    /// Makes a mess of every queue.
    pub fn scribble(&mut self, noise: &Noise) {
        for queue in 0..self.queues {
            let base = Self::base(queue);
            for (n, (addr, len, flags, next)) in noise.descriptors.iter().enumerate() {
                let at = base + n as u64 % u64::from(self.size) * 16;
                self.write(at, &addr.to_le_bytes());
                self.write(at + 8, &len.to_le_bytes());
                self.write(at + 12, &flags.to_le_bytes());
                self.write(at + 14, &next.to_le_bytes());
            }
            for (n, head) in noise.heads.iter().enumerate() {
                let slot = n as u64 % u64::from(self.size);
                self.write(base + AVAIL + 4 + slot * 2, &head.to_le_bytes());
            }
            self.set_avail_index(queue, noise.index);
        }
        for (addr, data) in &noise.bytes {
            self.write(u64::from(*addr), data);
        }
    }
}

/// Hostile ring contents.
#[derive(Clone, Debug)]
pub struct Noise {
    descriptors: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    index: u16,
    bytes: Vec<(u16, Vec<u8>)>,
}

/// Descriptors that are often almost right: only those get far into a device.
pub fn noise() -> impl Strategy<Value = Noise> {
    let addr = prop_oneof![
        8 => 0u64..0x2_0000,
        2 => MEMORY - 64..MEMORY + 64,
        1 => RINGS..RINGS + 0x1000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => prop::sample::select(vec![0u32, 1, 4, 12, 16, 17, 20, 512, 513, 1024, 4096]),
        2 => 0u32..0x1_0000,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0u16..4, 2 => 4u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..16, 1 => any::<u16>()];
    let descriptors = prop::collection::vec((addr, len, flags, next), 16);
    let heads = prop::collection::vec(prop_oneof![8 => 0u16..16, 1 => any::<u16>()], 16);
    let index = prop_oneof![8 => 0u16..17, 1 => any::<u16>()];
    // Request headers at the addresses that descriptors like: small numbers mean something.
    let byte = prop_oneof![3 => Just(0u8), 3 => 0u8..16, 1 => any::<u8>()];
    let bytes = prop::collection::vec((any::<u16>(), prop::collection::vec(byte, 0..64)), 0..32);
    (descriptors, heads, index, bytes).prop_map(|(descriptors, heads, index, bytes)| Noise {
        descriptors,
        heads,
        index,
        bytes,
    })
}

struct Idle;

impl MutEventSubscriber for Idle {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}
    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

/// Runs `f` as if on an event loop that watches nothing.
pub fn with_event_ops<R>(f: impl FnOnce(&mut EventOps<'_>) -> R) -> R {
    let mut manager = EventManager::<Idle>::new().unwrap();
    let id = manager.add_subscriber(Idle);
    f(&mut manager.event_ops(id).unwrap())
}
