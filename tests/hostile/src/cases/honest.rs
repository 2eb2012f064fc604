//! An honest driver: what a device that was abused must still do after a reset.

use appkernel_hal::{cpu, direct};

use crate::chance::Chance;
use crate::device::{Target, id, reg};
use crate::ring::Ring;

/// Longest wait for a device, in cycles of the time stamp counter: half a minute on slow hosts.
const PATIENCE: u64 = 60_000_000_000;
/// What the test put at the begin of the disk.
const DISK_MARK: &[u8] = b"BULKHEAD-DISK";

/// Waits until the device has used something.
pub fn wait(ring: &mut Ring, cycles: u64) -> bool {
    let begin = cpu::tsc();
    while !ring.has_used() {
        if cpu::tsc().wrapping_sub(begin) > cycles {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Copies bytes to guest memory in the arena.
pub fn put(address: u64, bytes: &[u8]) {
    // SAFETY: the arena is mapped memory that nothing in Rust refers to.
    unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), direct(address), bytes.len()) };
}

/// Reads bytes of the arena.
pub fn get(address: u64, bytes: &mut [u8]) {
    // SAFETY: as for `put`.
    unsafe { core::ptr::copy_nonoverlapping(direct(address), bytes.as_mut_ptr(), bytes.len()) };
}

/// Whether the device, after a reset, answers one request as it should.
pub fn serves(target: Target, chance: &mut Chance) -> bool {
    target.write(reg::STATUS, 0);
    if target.begin(!(3 << 28)).is_none() {
        return false;
    }
    // A slot for a disk that is not there yet.
    if target.id == id::BLOCK && target.read(reg::CONFIG) == 0 {
        return true;
    }
    let at = chance.arena();
    let queue = match target.id {
        id::VSOCK | id::NET | id::FS => 1,
        _ => 0,
    };
    let mut rings: [Ring; 2] = [Ring::new(), Ring::new()];
    for (index, ring) in rings.iter().enumerate().take(queue + 1) {
        if target.queue(index as u32, ring).is_none() {
            return false;
        }
    }
    target.finish();
    let [first, second] = &mut rings;
    let ring = if queue == 0 { first } else { second };
    put(at, &[0; 4096]);
    match target.id {
        id::RNG => ring.offer_chain(&[(at, 64, true)]),
        id::BLOCK => {
            ring.offer_chain(&[(at, 16, false), (at + 512, 512, true), (at + 1024, 1, true)])
        }
        id::BALLOON => {
            put(at, &(((at >> 12) + 8) as u32).to_le_bytes());
            ring.offer_chain(&[(at, 4, false)]);
        }
        id::MEM => {
            // The state of a block that may be there.
            put(at, &3u16.to_le_bytes());
            put(at + 512, &[0xff; 10]);
            ring.offer_chain(&[(at, 24, false), (at + 512, 10, true)]);
        }
        id::NET => ring.offer_chain(&[(at, 12 + 60, false)]),
        id::VSOCK => {
            put(at, &super::requests::packet(3, 2, 1024, 1, 0, 1, 1));
            ring.offer_chain(&[(at, 44, false)]);
        }
        id::FS => {
            put(at, &super::requests::fuse_header(40 + 64, 26, 1, 0));
            put(at + 40, &7u32.to_le_bytes());
            put(at + 44, &38u32.to_le_bytes());
            put(at + 1024, &[0xff; 16]);
            ring.offer_chain(&[(at, 40 + 64, false), (at + 1024, 1024, true)]);
        }
        _ => return true,
    }
    target.notify(queue as u32);
    if !wait(ring, PATIENCE) {
        return false;
    }
    match target.id {
        id::BLOCK => {
            let mut mark = [0; DISK_MARK.len()];
            get(at + 512, &mut mark);
            let mut status = [0xff];
            get(at + 1024, &mut status);
            mark == DISK_MARK && status == [0]
        }
        id::MEM => {
            let mut answer = [0xff; 10];
            get(at + 512, &mut answer);
            answer != [0xff; 10]
        }
        id::RNG => {
            let mut bytes = [0; 64];
            get(at, &mut bytes);
            bytes != [0; 64]
        }
        id::FS => {
            let mut error = [0xff; 4];
            get(at + 1028, &mut error);
            error == [0; 4]
        }
        _ => true,
    }
}
