//! A virtio-mmio device with one queue in use, and one request in it at a time (virtio 1.2, 4.2).

use core::sync::atomic::{Ordering, fence};

use appkernel_core::cmdline::Device;
use appkernel_core::errno::Errno;
use appkernel_hal::mmio::Mmio;
use appkernel_hal::{apic, cpu, frames};

const MAGIC: u32 = 0x7472_6976;
/// Registers.
mod reg {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const DESCRIPTORS: u64 = 0x080;
    pub const DRIVER_AREA: u64 = 0x090;
    pub const DEVICE_AREA: u64 = 0x0a0;
    pub const CONFIG: u64 = 0x100;
}
/// Device status.
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
}
const ENTRIES: u16 = 8;
/// Parts of the frame that holds a queue.
const AVAILABLE_AT: usize = 1024;
const USED_AT: usize = 2048;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Largest request, its header included.
pub const REQUEST_MAX: usize = 4096 << REQUEST_ORDER;
/// Largest answer, its header included.
pub const ANSWER_MAX: usize = 4096 << ANSWER_ORDER;
const REQUEST_ORDER: usize = 4;
const ANSWER_ORDER: usize = 5;

/// The driver.
#[derive(Debug)]
pub struct Virtio {
    registers: Mmio,
    queue: u32,
    ring: u64,
    request: u64,
    answer: u64,
    next: u16,
    broken: bool,
}

impl Virtio {
    /// The device's registers and its type, if there is a device.
    pub fn find(device: &Device, ram_end: u64) -> Option<(Mmio, u32)> {
        let registers = Mmio::new(device.address, device.size.max(0x200), ram_end)?;
        let there = registers.read(reg::MAGIC) == MAGIC && registers.read(reg::VERSION) == 2;
        there.then(|| (registers, registers.read(reg::DEVICE_ID)))
    }

    /// A byte of the device's configuration.
    pub fn config(registers: Mmio, offset: u64) -> u8 {
        registers.read_byte(reg::CONFIG + offset)
    }

    /// Sets the device up with `queues` queues, of which the last is used.
    pub fn start(registers: Mmio, pin: u8, queues: u32) -> Option<Self> {
        registers.write(reg::STATUS, 0);
        registers.write(reg::STATUS, status::ACKNOWLEDGE);
        registers.write(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        // VERSION_1 and nothing else.
        for (half, bits) in [(0, 0), (1, 1)] {
            registers.write(reg::DRIVER_FEATURES_SEL, half);
            registers.write(reg::DRIVER_FEATURES, bits);
        }
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        registers.write(reg::STATUS, ready);
        if registers.read(reg::STATUS) & status::FEATURES_OK == 0 {
            return None;
        }
        let mut ring = 0;
        for queue in 0..queues {
            registers.write(reg::QUEUE_SEL, queue);
            if registers.read(reg::QUEUE_NUM_MAX) < ENTRIES.into() {
                return None;
            }
            ring = frames::allocate_zeroed()?;
            registers.write(reg::QUEUE_NUM, ENTRIES.into());
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
        }
        let request = frames::allocate(REQUEST_ORDER)?;
        let answer = frames::allocate(ANSWER_ORDER)?;
        apic::enable_pin(pin);
        registers.write(reg::STATUS, ready | status::DRIVER_OK);
        Some(Self {
            registers,
            queue: queues.checked_sub(1)?,
            ring,
            request,
            answer,
            next: 0,
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
                appkernel_hal::direct(self.request + at as u64)
                    .copy_from_nonoverlapping(part.as_ptr(), part.len());
            }
            at += part.len();
        }
        let ring = appkernel_hal::direct(self.ring);
        let slot = usize::from(self.next % ENTRIES);
        // SAFETY: all within the ring's frame, which is the driver's own; fields that the device
        // reads or writes are accessed as volatile. The index is published after what it stands for.
        unsafe {
            let descriptor = |i: usize, address: u64, len: usize, flags: u16, next: u16| {
                let to = ring.add(i * 16);
                to.cast::<u64>().write_volatile(address);
                to.add(8).cast::<u32>().write_volatile(len as u32);
                to.add(12).cast::<u16>().write_volatile(flags);
                to.add(14).cast::<u16>().write_volatile(next);
            };
            descriptor(0, self.request, len, NEXT, 1);
            descriptor(1, self.answer, room, WRITE, 0);
            let available = ring.add(AVAILABLE_AT).cast::<u16>();
            available.add(2 + slot).write_volatile(0);
            fence(Ordering::SeqCst);
            self.next = self.next.wrapping_add(1);
            available.add(1).write_volatile(self.next);
        }
        fence(Ordering::SeqCst);
        self.registers.write(reg::QUEUE_NOTIFY, self.queue);
        // SAFETY: the used ring is within the ring's frame.
        let used = unsafe { ring.add(USED_AT) };
        loop {
            // SAFETY: as above.
            if unsafe { used.cast::<u16>().add(1).read_volatile() } == self.next {
                break;
            }
            if self.registers.read(reg::STATUS) & status::NEEDS_RESET != 0 {
                self.broken = true;
                return Err(Errno::EIO);
            }
            cpu::idle();
        }
        let pending = self.registers.read(reg::INTERRUPT_STATUS);
        self.registers.write(reg::INTERRUPT_ACK, pending);
        fence(Ordering::SeqCst);
        // SAFETY: as above; the slot is below ENTRIES.
        let written = unsafe { used.add(4 + slot * 8 + 4).cast::<u32>().read_volatile() } as usize;
        // SAFETY: the answer buffer is the driver's own; the device is done with it.
        Ok(unsafe {
            core::slice::from_raw_parts(appkernel_hal::direct(self.answer), written.min(room))
        })
    }
}
