//! virtio-mmio devices and their queues (virtio 1.2, 2.7 and 4.2).

use core::sync::atomic::{Ordering, fence};

use appkernel_core::cmdline::Device;
use appkernel_core::errno::Errno;
use appkernel_core::virtio_mmio::{MAGIC, reg, status};
use appkernel_hal::mmio::Mmio;
use appkernel_hal::{apic, cpu, direct, frames};

/// Most entries of a queue: what its frame has room for.
const MAX_ENTRIES: u16 = 64;
/// Parts of the frame that holds a queue.
const AVAILABLE_AT: usize = 1024;
const USED_AT: usize = 2048;

/// A descriptor is followed by another.
pub const NEXT: u16 = 1;
/// The device writes to it.
pub const WRITE: u16 = 2;

/// A device.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    registers: Mmio,
    pin: u8,
}

impl Transport {
    /// The device and its type, if there is one.
    pub fn find(device: &Device, ram_end: u64) -> Option<(Self, u32)> {
        let registers = Mmio::new(device.address, device.size.max(0x200), ram_end)?;
        let there = registers.read(reg::MAGIC) == MAGIC && registers.read(reg::VERSION) == 2;
        let transport = Self {
            registers,
            pin: device.irq,
        };
        there.then(|| (transport, registers.read(reg::DEVICE_ID)))
    }

    /// A byte of the device's configuration.
    pub fn config(self, offset: u64) -> u8 {
        self.registers.read_byte(reg::CONFIG + offset)
    }

    /// Resets it and agrees on VERSION_1 and on those of the first 32 features that are wanted and
    /// there; gives these.
    pub fn begin(self, wanted: u32) -> Option<u32> {
        let registers = self.registers;
        registers.write(reg::STATUS, 0);
        registers.write(reg::STATUS, status::ACKNOWLEDGE);
        registers.write(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        registers.write(reg::DEVICE_FEATURES_SEL, 0);
        let agreed = registers.read(reg::DEVICE_FEATURES) & wanted;
        for (half, bits) in [(0, agreed), (1, 1)] {
            registers.write(reg::DRIVER_FEATURES_SEL, half);
            registers.write(reg::DRIVER_FEATURES, bits);
        }
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        registers.write(reg::STATUS, ready);
        (registers.read(reg::STATUS) & status::FEATURES_OK != 0).then_some(agreed)
    }

    /// Sets a queue up.
    pub fn queue(self, index: u32, entries: u16) -> Option<Queue> {
        let registers = self.registers;
        let entries = entries.min(MAX_ENTRIES);
        registers.write(reg::QUEUE_SEL, index);
        if registers.read(reg::QUEUE_NUM_MAX) < entries.into() {
            return None;
        }
        let ring = frames::allocate_zeroed()?;
        registers.write(reg::QUEUE_NUM, entries.into());
        for (register, at) in [
            (reg::DESCRIPTORS, 0),
            (reg::DRIVER_AREA, AVAILABLE_AT),
            (reg::DEVICE_AREA, USED_AT),
        ] {
            let address = ring + at as u64;
            registers.write(register, address as u32);
            registers.write(register + 4, (address >> 32) as u32);
        }
        registers.write(reg::QUEUE_READY, 1);
        Some(Queue {
            registers,
            index,
            entries,
            ring,
            offered: 0,
            taken: 0,
        })
    }

    /// Starts it; from here it interrupts.
    pub fn finish(self) {
        apic::enable_pin(self.pin);
        let registers = self.registers;
        let now = registers.read(reg::STATUS);
        registers.write(reg::STATUS, now | status::DRIVER_OK);
    }

    /// Interrupt line.
    pub fn pin(self) -> u8 {
        self.pin
    }

    /// Tells the device that its interrupt was seen.
    pub fn acknowledge(self) {
        let pending = self.registers.read(reg::INTERRUPT_STATUS);
        if pending != 0 {
            self.registers.write(reg::INTERRUPT_ACK, pending);
        }
    }

    /// Whether the device gave up.
    pub fn is_broken(self) -> bool {
        self.registers.read(reg::STATUS) & status::NEEDS_RESET != 0
    }
}

/// A queue. Descriptors are the caller's to give out.
#[derive(Debug)]
pub struct Queue {
    registers: Mmio,
    index: u32,
    entries: u16,
    ring: u64,
    offered: u16,
    taken: u16,
}

impl Queue {
    /// Writes a descriptor.
    pub fn describe(&mut self, entry: u16, address: u64, len: usize, flags: u16, next: u16) {
        assert!(entry < self.entries, "a descriptor outside of its queue");
        // SAFETY: within the ring's frame, which is the driver's own; the device reads it only
        // after it was offered.
        unsafe {
            let to = direct(self.ring).add(usize::from(entry) * 16);
            to.cast::<u64>().write_volatile(address);
            to.add(8).cast::<u32>().write_volatile(len as u32);
            to.add(12).cast::<u16>().write_volatile(flags);
            to.add(14).cast::<u16>().write_volatile(next);
        }
    }

    /// Gives the device the chain that starts with a descriptor.
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.offered % self.entries);
        self.offered = self.offered.wrapping_add(1);
        // SAFETY: within the ring's frame; the index is published after what it stands for.
        unsafe {
            let available = direct(self.ring).add(AVAILABLE_AT).cast::<u16>();
            available.add(2 + slot).write_volatile(head);
            fence(Ordering::SeqCst);
            available.add(1).write_volatile(self.offered);
        }
        fence(Ordering::SeqCst);
    }

    /// Tells the device that there is something, unless it said that it looks anyway.
    pub fn notify(&self) {
        const LOOKS_ANYWAY: u16 = 1;
        fence(Ordering::SeqCst);
        // SAFETY: within the ring's frame; the device changes it.
        let flags = unsafe { direct(self.ring).add(USED_AT).cast::<u16>().read_volatile() };
        if flags & LOOKS_ANYWAY == 0 {
            self.registers.write(reg::QUEUE_NOTIFY, self.index);
        }
    }

    /// Asks the device not to interrupt when it is done with something, or to do so again.
    pub fn quiet(&mut self, quiet: bool) {
        // SAFETY: within the ring's frame, in the part that the driver writes.
        unsafe {
            let available = direct(self.ring).add(AVAILABLE_AT).cast::<u16>();
            available.write_volatile(quiet.into());
        }
        fence(Ordering::SeqCst);
    }

    /// Whether the device is done with a chain.
    pub fn has_used(&self) -> bool {
        // SAFETY: within the ring's frame.
        let used = unsafe { direct(self.ring).add(USED_AT).cast::<u16>().add(1) };
        // SAFETY: as above; the device changes it.
        unsafe { used.read_volatile() != self.taken }
    }

    /// A chain that the device is done with: its first descriptor and how many bytes it says it
    /// wrote. Neither is to be believed.
    pub fn take(&mut self) -> Option<(u16, usize)> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::SeqCst);
        let slot = usize::from(self.taken % self.entries);
        self.taken = self.taken.wrapping_add(1);
        // SAFETY: within the ring's frame.
        unsafe {
            let at = direct(self.ring).add(USED_AT + 4 + slot * 8).cast::<u32>();
            let (head, len) = (at.read_volatile(), at.add(1).read_volatile());
            Some((head as u16 % self.entries, len as usize))
        }
    }
}

/// Largest request, its header included.
pub const REQUEST_MAX: usize = 4096 << REQUEST_ORDER;
/// Largest answer, its header included.
pub const ANSWER_MAX: usize = 4096 << ANSWER_ORDER;
const REQUEST_ORDER: usize = 4;
const ANSWER_ORDER: usize = 5;

/// One request at a time on one queue.
#[derive(Debug)]
pub struct Caller {
    transport: Transport,
    queue: Queue,
    request: u64,
    answer: u64,
    broken: bool,
}

impl Caller {
    /// Starts a device with `queues` queues, of which the last is used.
    pub fn start(transport: Transport, queues: u32) -> Option<Self> {
        transport.begin(0)?;
        let mut queue = None;
        for index in 0..queues {
            queue = Some(transport.queue(index, 8)?);
        }
        let request = frames::allocate(REQUEST_ORDER)?;
        let answer = frames::allocate(ANSWER_ORDER)?;
        transport.finish();
        Some(Self {
            transport,
            queue: queue?,
            request,
            answer,
            broken: false,
        })
    }

    /// Sends a request of these parts and waits for the answer, of at most `room` bytes. What the
    /// device says about lengths is not believed: the answer is cut to what it may be.
    pub fn call(&mut self, parts: &[&[u8]], room: usize) -> Result<&[u8], Errno> {
        if self.broken {
            return Err(Errno::EIO);
        }
        let len: usize = parts.iter().map(|p| p.len()).sum();
        if len > REQUEST_MAX || room > ANSWER_MAX || room == 0 {
            return Err(Errno::EINVAL);
        }
        let mut at = 0;
        for part in parts {
            // SAFETY: the request buffer is the driver's own, has REQUEST_MAX bytes, and the device
            // does not read it before it is told.
            unsafe {
                direct(self.request + at as u64)
                    .copy_from_nonoverlapping(part.as_ptr(), part.len());
            }
            at += part.len();
        }
        self.queue.describe(0, self.request, len, NEXT, 1);
        self.queue.describe(1, self.answer, room, WRITE, 0);
        self.queue.offer(0);
        self.queue.notify();
        let written = loop {
            if let Some((_, written)) = self.queue.take() {
                break written;
            }
            if self.transport.is_broken() {
                self.broken = true;
                return Err(Errno::EIO);
            }
            cpu::idle();
        };
        self.transport.acknowledge();
        // SAFETY: the answer buffer is the driver's own; the device is done with it.
        Ok(unsafe { core::slice::from_raw_parts(direct(self.answer), written.min(room)) })
    }
}
