//! Queues: descriptors, indices and tables that lie.

use alloc::vec::Vec;

use crate::cases::transport::pick;
use crate::chance::Chance;
use crate::device::{Target, reg};
use crate::ring::{INDIRECT, NEXT, Ring, WRITE};

/// A device with all of its queues set up.
struct Driven {
    target: Target,
    rings: Vec<Ring>,
}

impl Driven {
    fn new(target: Target) -> Self {
        let rings = (0..target.queues()).map(|_| Ring::new()).collect();
        let mut driven = Self { target, rings };
        driven.begin(u64::MAX);
        driven
    }

    /// Resets the device and sets it up again.
    fn begin(&mut self, features: u64) {
        self.target.write(reg::STATUS, 0);
        for ring in &mut self.rings {
            ring.clear();
        }
        let _ = self.target.begin(features);
        for (index, ring) in self.rings.iter().enumerate() {
            let _ = self.target.queue(index as u32, ring);
        }
        self.target.finish();
    }

    fn notify_all(&self) {
        for queue in 0..self.rings.len() as u32 {
            self.target.notify(queue);
        }
    }
}

fn drive(targets: &[Target]) -> Vec<Driven> {
    targets.iter().map(|target| Driven::new(*target)).collect()
}

/// One descriptor of any kind.
fn scribble(chance: &mut Chance, table: u64, entries: u16) {
    let entry = chance.below(entries.into()) as u16;
    let flags = match chance.below(8) {
        0 => chance.bits() as u16,
        1 => INDIRECT,
        2 => INDIRECT | NEXT,
        3 => WRITE,
        4 => WRITE | NEXT,
        5 => 0,
        _ => NEXT,
    };
    // Indirect tables with and without a whole number of entries.
    let len = if flags & INDIRECT != 0 && chance.once_in(2) {
        16 * chance.below(70) as u32 + u32::from(chance.once_in(8))
    } else {
        chance.length()
    };
    let next = match chance.below(4) {
        0 => chance.bits() as u16,
        1 => entry,
        _ => chance.below(entries.into()) as u16,
    };
    Ring::describe(table, entry, chance.address(), len, flags, next);
}

/// Writes tables of nonsense, offers any of it and notifies.
pub fn chains(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let mut all = drive(targets);
    for round in 0..rounds {
        // Indirect tables are wherever the arena is hit.
        for _ in 0..4 {
            let table = chance.inside(64 * 16) & !15;
            scribble(chance, table, 64);
        }
        let index = chance.below(all.len() as u64) as usize;
        let Some(driven) = all.get_mut(index) else {
            return;
        };
        if driven.target.is_broken() || round % 64 == 0 {
            driven.begin(if chance.once_in(2) {
                u64::MAX
            } else {
                !(3 << 28)
            });
        }
        let queue = chance.below(driven.rings.len() as u64) as usize;
        let Some(ring) = driven.rings.get_mut(queue) else {
            continue;
        };
        for _ in 0..chance.below(12) {
            scribble(chance, ring.descriptors(), ring.size());
        }
        let head = match chance.below(8) {
            0 => chance.bits() as u16,
            _ => chance.below(ring.size().into()) as u16,
        };
        let step = match chance.below(16) {
            0 => chance.bits() as u16,
            1 => ring.size() + 1,
            2 => 0,
            _ => 1,
        };
        ring.offer(head, step);
        driven.target.notify(queue as u32);
    }
}

/// As `chains`, but what was offered is changed while the device looks at it, and so is the area
/// that only the device writes.
pub fn races(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let mut all = drive(targets);
    for _ in 0..rounds {
        let index = chance.below(all.len() as u64) as usize;
        let Some(driven) = all.get_mut(index) else {
            return;
        };
        if driven.target.is_broken() || chance.once_in(32) {
            driven.begin(u64::MAX);
        }
        for ring in &mut driven.rings {
            for entry in 0..8 {
                let flags = if entry == 7 { 0 } else { NEXT } | if entry > 2 { WRITE } else { 0 };
                let at = chance.inside(4096);
                Ring::describe(ring.descriptors(), entry, at, 64, flags, entry + 1);
            }
            ring.offer(0, 1);
        }
        driven.notify_all();
        for _ in 0..64 {
            for ring in &mut driven.rings {
                scribble(chance, ring.descriptors(), 8);
                if chance.once_in(8) {
                    ring.lie(chance.bits(), chance.bits() as u16);
                }
            }
        }
    }
}

/// Requests in flight when the device is reset, its queues are taken away or given new memory.
pub fn resets(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let mut all = drive(targets);
    for _ in 0..rounds {
        let index = chance.below(all.len() as u64) as usize;
        let Some(driven) = all.get_mut(index) else {
            return;
        };
        for ring in &mut driven.rings {
            let at = chance.inside(8192);
            ring.offer_chain(&[(at, 64, false), (at + 4096, 4096, true)]);
        }
        driven.notify_all();
        match chance.below(4) {
            0 => driven.target.write(reg::STATUS, 0),
            1 => {
                let queue = chance.below(driven.rings.len() as u64);
                driven.target.write(reg::QUEUE_SEL, queue as u32);
                driven.target.write(reg::QUEUE_READY, 0);
            }
            2 => driven.begin(u64::MAX),
            _ => {
                // Another device meanwhile.
                if let Some(other) = pick(targets, chance) {
                    other.write(reg::STATUS, 0);
                }
            }
        }
        if chance.once_in(2) {
            driven.begin(u64::MAX);
        }
    }
}
