//! Entry points for fuzzing: a whole device behind its transport, driven by bytes.
//!
//! The bytes are a little program of what a hostile guest (and the host beside it) can do: register
//! and configuration accesses, writes to memory and rings, notifications, resets; saving at any
//! moment. [`drive`] must neither panic nor hang, whatever they are. Devices with a protocol of
//! their own above this have their own entry points (`virtio::vsock::fuzz_vsock`).

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::legacy::{I8042, Rtc, Serial};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, Disk};
use crate::virtio::mem::{BLOCK, Mem};
use crate::virtio::net::{Net, NetOptions, Tap};
use crate::virtio::rng::Rng;
use crate::virtio::{Interrupt, MmioTransport, TransportState, VirtioDevice};

/// What to fuzz.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Serial port, clock and keyboard controller.
    Legacy,
    /// The entropy device, and with it the transport.
    Rng,
    /// The block device.
    Blk,
    /// The memory balloon.
    Balloon,
    /// The memory device.
    Mem,
    /// The network device.
    Net,
}

impl Target {
    /// All targets.
    pub const ALL: [Self; 6] = [
        Self::Legacy,
        Self::Rng,
        Self::Blk,
        Self::Balloon,
        Self::Mem,
        Self::Net,
    ];
}

/// Main memory in bytes; a second bank lies at [`SECOND_BANK`].
const MEMORY: usize = 1 << 20;
const SECOND_BANK: u64 = 2 << 20;
const SECOND_BANK_LEN: usize = 64 << 10;
/// Where the memory device has its blocks.
const ROOM: u64 = 4 << 20;
const ROOM_BLOCKS: u64 = 4;
/// Rings of queue n are at `RINGS + n * RING_STRIDE`.
const RINGS: u64 = 0x8_0000;
const RING_STRIDE: u64 = 0x4000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Operations of one program, and turns of the loop after each notification.
const MAX_OPS: usize = 2000;
const MAX_TURNS: usize = 8;

/// Runs the program in `data` against `target`.
pub fn drive(target: Target, data: &[u8]) {
    let mut input = Input(data);
    if target == Target::Legacy {
        let _ = legacy(&mut input);
        return;
    }
    let Ok(mut machine) = Machine::new(target) else {
        return;
    };
    for _ in 0..MAX_OPS {
        if machine.step(&mut input).is_none() {
            break;
        }
    }
    machine.turn();
    machine.check_state();
}

/// Bytes of the program; `None` at its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*now)
    }

    fn u8(&mut self) -> Option<u8> {
        self.bytes().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.bytes().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn slice(&mut self, len: usize) -> &[u8] {
        let (now, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        now
    }
}

fn legacy(input: &mut Input<'_>) -> Option<()> {
    let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).ok();
    let serial = Serial::new(event()?, Box::new(io::sink()));
    let (rtc, i8042) = (Rtc::new(), I8042::new(Arc::default()));
    let devices: [&dyn BusDevice; 3] = [&serial, &rtc, &i8042];
    for _ in 0..MAX_OPS {
        let op = input.u8()?;
        let device = devices[usize::from(op) % devices.len()];
        let offset = u64::from(input.u8()?);
        let len = usize::from(op >> 2) % 9;
        match op >> 6 {
            0 => device.read(offset, &mut [0xff; 8][..len]),
            1 => device.write(offset, input.slice(len)),
            2 => {
                serial.enqueue_input(input.slice(usize::from(op)));
            }
            _ => {
                let _ = serial.restore(&serial.save());
                let _ = rtc.restore(&rtc.save());
                let _ = i8042.restore(&i8042.save());
            }
        }
    }
    None
}

/// A guest with one device.
struct Machine {
    target: Target,
    mem: GuestMemory,
    transport: Arc<MmioTransport>,
    manager: EventManager<Arc<MmioTransport>>,
    /// The other end of the network cable.
    cable: Option<UnixDatagram>,
}

fn memfd(len: u64) -> io::Result<File> {
    // SAFETY: the name is a C string; the descriptor is checked and owned by nobody else.
    let file = unsafe {
        let fd = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(len)?;
    Ok(file)
}

fn disk() -> io::Result<Disk> {
    Disk::from_file(memfd(64 << 10)?, Path::new("fuzz"), false, "fuzz").map_err(io::Error::other)
}

fn device(target: Target) -> io::Result<(Box<dyn VirtioDevice>, Option<UnixDatagram>)> {
    Ok(match target {
        Target::Legacy | Target::Rng => (Box::new(Rng::new()), None),
        Target::Blk => (Box::new(Blk::new(disk()?)), None),
        Target::Balloon => (Box::new(Balloon::new()), None),
        Target::Mem => {
            let mem = Mem::new(ROOM, ROOM_BLOCKS * BLOCK).map_err(io::Error::other)?;
            (Box::new(mem), None)
        }
        Target::Net => {
            let (near, far) = UnixDatagram::pair()?;
            near.set_nonblocking(true)?;
            far.set_nonblocking(true)?;
            let tap = Tap::from_socket(OwnedFd::from(near));
            let options = NetOptions {
                mac: Some([2, 0, 0, 0, 0, 1]),
                mtu: Some(1500),
                vhost: false,
                plain: false,
            };
            (Box::new(Net::new(tap, &options)), Some(far))
        }
    })
}

impl Machine {
    fn new(target: Target) -> io::Result<Self> {
        let ranges = [
            (GuestAddress(0), MEMORY),
            (GuestAddress(SECOND_BANK), SECOND_BANK_LEN),
            (GuestAddress(ROOM), (ROOM_BLOCKS * BLOCK) as usize),
        ];
        let mem = GuestMemoryMmap::from_ranges(&ranges).map_err(io::Error::other)?;
        let mem = GuestMemory::new(mem);
        let (device, cable) = device(target)?;
        let transport = MmioTransport::new(mem.clone(), device, Interrupt::new()?)?;
        let mut manager = EventManager::new_with_capacity(16).map_err(io::Error::other)?;
        manager.add_subscriber(Arc::clone(&transport));
        Ok(Self {
            target,
            mem,
            transport,
            manager,
            cable,
        })
    }

    fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn poke(&self, addr: u64, data: &[u8]) {
        // Outside memory: nothing happens, as in a guest.
        let _ = self.mem.memory().write(data, GuestAddress(addr));
    }

    /// Runs the event loop's turns until nothing is left to do, within reason.
    fn turn(&mut self) {
        for _ in 0..MAX_TURNS {
            if !matches!(self.manager.run_with_timeout(0), Ok(1..)) {
                return;
            }
            if let Some(cable) = &self.cable {
                let mut sink = [0; 64];
                while cable.recv(&mut sink).is_ok() {}
            }
        }
    }

    /// What a well-behaved driver does, up to DRIVER_OK.
    fn set_up(&self, mask: u64, size: u32) {
        for status in [0, 1, 3] {
            self.set(0x70, status);
        }
        for half in 0..2 {
            self.set(0x14, half);
            let offered = self.get(0x10);
            self.set(0x24, half);
            let keep = (mask >> (32 * half)) as u32 | half;
            self.set(0x20, offered & keep);
        }
        self.set(0x70, 0xb);
        for queue in 0..4 {
            self.set(0x30, queue);
            let max = self.get(0x34);
            if max == 0 {
                break;
            }
            self.set(0x38, size.min(max));
            let base = (RINGS + u64::from(queue) * RING_STRIDE) as u32;
            self.set(0x80, base);
            self.set(0x90, base + AVAIL as u32);
            self.set(0xa0, base + USED as u32);
            self.set(0x44, 1);
        }
        self.set(0x70, 0xf);
    }

    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let op = input.u8()?;
        let queue = u64::from(input.u8()? & 3);
        let ring = RINGS + queue * RING_STRIDE;
        match op % 16 {
            0 => {
                let offset = u64::from(input.u8()?);
                self.set(offset & !3, input.u32()?);
            }
            1 => {
                let offset = input.u64()?;
                let mut data = [0; 8];
                self.transport
                    .read(offset, &mut data[..usize::from(op) / 16 % 9]);
            }
            2 => {
                let offset = 0x100 + u64::from(input.u8()?);
                let data = input.bytes::<4>()?;
                self.transport.write(offset, &data);
                self.transport.read(offset, &mut [0; 8]);
            }
            3 => self.set_up(input.u64()?, 1 << (op / 16 % 7)),
            // Descriptors, often almost right.
            4..=7 => {
                let index = u64::from(input.u8()? & 63);
                let addr = match op / 16 {
                    0 => input.u64()?,
                    1..=2 => SECOND_BANK + u64::from(input.u16()?),
                    _ => u64::from(input.u32()? & 0x1f_ffff),
                };
                let len = match op / 16 % 4 {
                    0 => input.u32()?,
                    1 => u32::from(input.u8()?),
                    _ => u32::from(input.u16()?),
                };
                let flags = u16::from(input.u8()?) & 7;
                let next = u16::from(input.u8()? & 63);
                let at = ring + index * 16;
                self.poke(at, &addr.to_le_bytes());
                self.poke(at + 8, &len.to_le_bytes());
                self.poke(at + 12, &flags.to_le_bytes());
                self.poke(at + 14, &next.to_le_bytes());
            }
            8..=9 => {
                let head = u16::from(input.u8()?);
                let index = self
                    .mem
                    .memory()
                    .read_obj::<u16>(GuestAddress(ring + AVAIL + 2))
                    .unwrap_or(0);
                let slot = u64::from(index % (1 << (op / 16 % 7)));
                self.poke(ring + AVAIL + 4 + slot * 2, &head.to_le_bytes());
                self.poke(ring + AVAIL + 2, &index.wrapping_add(1).to_le_bytes());
            }
            10 => self.poke(ring + AVAIL + 2, &input.bytes::<2>()?),
            11 => {
                self.set(0x50, queue as u32);
                self.turn();
            }
            12..=13 => {
                let addr = u64::from(input.u32()? & 0x1f_ffff);
                let len = usize::from(input.u8()?);
                let data = input.slice(len).to_vec();
                self.poke(addr, &data);
            }
            14 => self.host(op / 16, input)?,
            _ => {
                if queue == 0 {
                    self.set(0x70, 0);
                } else {
                    self.check_state();
                    self.transport.kick_all();
                }
            }
        }
        self.check_status();
        Some(())
    }

    /// What the host does to the device meanwhile.
    fn host(&mut self, what: u8, input: &mut Input<'_>) -> Option<()> {
        let value = input.u16()?;
        if let Some(cable) = &self.cable {
            let _ = cable.send(&vec![what; usize::from(value)]);
        }
        self.transport.with_device(|device| {
            let device: &mut dyn Any = device;
            if let Some(blk) = device.downcast_mut::<Blk>() {
                if value % 2 == 0 {
                    drop(blk.detach());
                } else if let Ok(disk) = disk() {
                    let _ = blk.attach(disk);
                }
            } else if let Some(balloon) = device.downcast_mut::<Balloon>() {
                balloon.set_target(value.into());
                balloon.request_stats();
            } else if let Some(mem) = device.downcast_mut::<Mem>() {
                mem.request(u64::from(value % 8) * BLOCK);
            } else if let Some(net) = device.downcast_mut::<Net>() {
                net.set_link(value % 2 == 0);
            }
        });
        self.turn();
        Some(())
    }

    fn check_status(&self) {
        let status = self.get(0x70);
        assert!(status & !0xcf == 0, "unknown status {status:#x}");
        assert!(
            status & 4 == 0 || status & 0xb == 0xb,
            "DRIVER_OK out of order: {status:#x}"
        );
    }

    /// Saved state goes through text and back, and means the same to another device.
    fn check_state(&self) {
        let state = self.transport.save();
        let text = serde_json::to_string(&state).unwrap_or_default();
        let read: Option<TransportState> = serde_json::from_str(&text).ok();
        assert_eq!(read.as_ref(), Some(&state), "state does not survive text");
        let _ = self.transport.describe();
        let Ok((device, _cable)) = device(self.target) else {
            return;
        };
        let Ok(interrupt) = Interrupt::new() else {
            return;
        };
        let Ok(other) = MmioTransport::new(self.mem.clone(), device, interrupt) else {
            return;
        };
        if other.restore(&state).is_ok() {
            assert_eq!(other.save(), state, "state changes by being restored");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A program that sets the device up and does sensible things most of the time.
    fn program() -> impl Strategy<Value = Vec<u8>> {
        let op = prop_oneof![
            1 => Just(vec![3 + 16 * 4, 0, 255, 255, 255, 255, 255, 255, 255, 255]),
            // A descriptor somewhere in main memory.
            8 => (0u8..4, 0u8..16, 0u16..0x4000, prop_oneof![Just(16u16), Just(1), 0u16..5000], 0u8..4)
                .prop_map(|(queue, index, addr, len, flags)| {
                    let [a0, a1] = addr.to_le_bytes();
                    let [l0, l1] = len.to_le_bytes();
                    vec![4 + 16 * 6, queue, index, a0, a1, 0, 0, l0, l1, flags, index + 1]
                }),
            4 => (0u8..4, 0u8..16).prop_map(|(queue, head)| vec![8 + 16 * 4, queue, head]),
            4 => (0u8..4).prop_map(|queue| vec![11, queue]),
            // Something that may be a request header.
            4 => (0u16..0x4000, prop::sample::select(vec![0u8, 1, 4, 8, 11, 13]), 0u8..130)
                .prop_map(|(addr, kind, sector)| {
                    let [a0, a1] = addr.to_le_bytes();
                    let mut op = vec![12, 0, a0, a1, 0, 0, 16, kind, 0, 0, 0, 0, 0, 0, 0, sector];
                    op.extend([0; 7]);
                    op
                }),
            2 => (any::<u8>(), any::<u16>()).prop_map(|(kind, value)| {
                let [v0, v1] = value.to_le_bytes();
                vec![14 + 16 * (kind % 16), 0, v0, v1 & 15]
            }),
            1 => Just(vec![15, 1]),
            2 => prop::collection::vec(any::<u8>(), 0..24),
        ];
        prop::collection::vec(op, 0..80).prop_map(|ops| {
            let mut program = vec![3 + 16 * 4, 0, 255, 255, 255, 255, 255, 255, 255, 255];
            program.extend(ops.concat());
            program
        })
    }

    proptest! {
        #[test]
        fn any_bytes(data in prop::collection::vec(any::<u8>(), 0..600)) {
            for target in Target::ALL {
                drive(target, &data);
            }
        }

        #[test]
        fn almost_sensible_guests(data in program()) {
            for target in Target::ALL {
                drive(target, &data);
            }
        }
    }

    /// The program language reaches the devices: an ordinary request is answered.
    #[test]
    fn programs_reach_the_device() {
        let mut machine = Machine::new(Target::Rng).unwrap();
        let mut program = vec![3 + 16 * 4, 0, 255, 255, 255, 255, 255, 255, 255, 255];
        program.extend([4 + 16 * 6, 0, 0, 0, 0x10, 0, 0, 64, 0, 2, 0]);
        program.extend([8 + 16 * 4, 0, 0]);
        program.extend([11, 0]);
        let mut input = Input(&program);
        while machine.step(&mut input).is_some() {}
        let used = machine.mem.memory();
        let index: u16 = used.read_obj(GuestAddress(RINGS + USED + 2)).unwrap();
        assert_eq!(index, 1);
        let described = machine.transport.describe();
        assert_eq!(described["metrics"]["bytes"], 64);
    }
}
