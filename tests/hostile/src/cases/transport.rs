//! Registers of the virtio-mmio transport.

use crate::chance::Chance;
use crate::device::{QUEUES, Target, reg};

/// Reads and writes of any width at any offset.
pub fn registers(targets: &[Target], chance: &mut Chance, rounds: u64) {
    for _ in 0..rounds {
        if let Some(target) = pick(targets, chance) {
            target.poke(chance);
        }
    }
}

/// Setting up in any order, with queue sizes and addresses that cannot be.
pub fn setup(targets: &[Target], chance: &mut Chance, rounds: u64) {
    for _ in 0..rounds {
        let Some(target) = pick(targets, chance) else {
            return;
        };
        match chance.below(12) {
            0 => target.write(reg::STATUS, 0),
            1 => target.write(
                reg::STATUS,
                chance.one_of(&[1, 3, 11, 15, 4, 8, 64, 128, 0xff]),
            ),
            2 => {
                let _ = target.begin(chance.bits());
            }
            3 => {
                let _ = target.begin(u64::MAX);
            }
            4 => target.write(
                reg::QUEUE_SEL,
                chance.one_of(&[0, 1, 2, 3, 4, 255, 0xffff, u32::MAX]),
            ),
            5 => target.write(
                reg::QUEUE_NUM,
                chance.one_of(&[0, 1, 2, 3, 64, 255, 256, 1024, 32768, 65535, u32::MAX]),
            ),
            6..8 => {
                let register =
                    chance.one_of(&[reg::DESCRIPTORS, reg::DRIVER_AREA, reg::DEVICE_AREA]);
                let address = chance.address();
                target.write(register, address as u32);
                target.write(register + 4, (address >> 32) as u32);
            }
            8 => target.write(reg::QUEUE_READY, chance.one_of(&[0, 1, 2, u32::MAX])),
            9 => target.write(reg::STATUS, 15),
            10 => target.notify(chance.below(u64::from(QUEUES)) as u32),
            _ => _ = target.read(reg::CONFIG + (chance.below(64) & !3)),
        }
    }
}

/// Nothing but exits: notifications of queues that are there and that are not, acknowledgements,
/// reads of the configuration.
pub fn storm(targets: &[Target], chance: &mut Chance, rounds: u64) {
    for target in targets {
        let _ = target.begin(u64::MAX);
        target.finish();
    }
    for _ in 0..rounds {
        let Some(target) = pick(targets, chance) else {
            return;
        };
        // Many of one kind in a row: a device that answers each by work would fall behind.
        for _ in 0..16 {
            target.notify(chance.one_of(&[0, 1, 2, 3, 7, 0xffff, u32::MAX]));
        }
        target.write(reg::INTERRUPT_ACK, chance.bits() as u32);
        let _ = target.read(reg::INTERRUPT_STATUS);
        let _ = target.read(reg::CONFIG);
    }
}

/// Any of the devices.
pub fn pick(targets: &[Target], chance: &mut Chance) -> Option<Target> {
    (!targets.is_empty()).then(|| chance.one_of(targets))
}
