//! Ports, addresses and processor registers.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

use appkernel_hal::direct;

use crate::access;
use crate::chance::{ARENA, Chance};

/// Keyboard controller's command port: writes of 0xfe reset the machine.
const RESET_PORT: u16 = 0x64;
/// ACPI sleep control: writes may power off.
const SLEEP_PORT: u16 = 0x600;
/// Serial port: what is written there is read by the test.
const SERIAL: core::ops::Range<u16> = 0x3f8..0x400;

/// Any width at any port, single and by string instructions of many bytes.
pub fn ports(chance: &mut Chance, rounds: u64) {
    let from = direct(chance.arena());
    for round in 0..rounds {
        let port = if round < 0x1_0000 && chance.once_in(2) {
            chance.below(0x700) as u16
        } else {
            chance.bits() as u16
        };
        let ends = (RESET_PORT - 3..=RESET_PORT).contains(&port)
            || (SLEEP_PORT - 3..SLEEP_PORT + 2).contains(&port)
            || SERIAL.contains(&port)
            || (SERIAL.start - 3..SERIAL.start).contains(&port);
        let value = chance.number() as u32;
        let count = chance.below(300);
        // SAFETY: string instructions read and write the arena, which is the devices' anyway; the
        // ports whose writes end the machine or speak to the test are only read.
        unsafe {
            match (chance.below(10), ends) {
                (0, _) => asm!("in al, dx", in("dx") port, out("al") _, options(nostack)),
                (1, _) => asm!("in ax, dx", in("dx") port, out("ax") _, options(nostack)),
                (2, _) => asm!("in eax, dx", in("dx") port, out("eax") _, options(nostack)),
                (3, _) => asm!("rep insb", in("dx") port, inout("rcx") count => _,
                    inout("rdi") from => _, options(nostack)),
                (4, _) => asm!("rep insd", in("dx") port, inout("rcx") count => _,
                    inout("rdi") from => _, options(nostack)),
                (_, true) => {}
                (5, _) => asm!("out dx, al", in("dx") port, in("al") value as u8, options(nostack)),
                (6, _) => {
                    asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nostack))
                }
                (7, _) => asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)),
                (8, _) => asm!("rep outsb", in("dx") port, inout("rcx") count => _,
                    inout("rsi") from => _, options(nostack)),
                _ => asm!("rep outsd", in("dx") port, inout("rcx") count => _,
                    inout("rsi") from => _, options(nostack)),
            }
        }
    }
}

/// Reads and writes of any width where there is no memory, also over its end.
pub fn memory(chance: &mut Chance, rounds: u64) {
    let end = chance.arena() + ARENA;
    for _ in 0..rounds {
        let address = match chance.below(5) {
            0 => end - 4,
            1 => end + chance.below(0xc000_0000 - end - 8),
            // Not the interrupt controllers: `init` is what they can do to this guest.
            2 => 0xfec0_1000 + chance.below(0x1f_e000),
            3 => 0xfef0_0000 + chance.below(0xb_0000),
            _ => 0xd010_0000 + chance.below(0x2000_0000),
        };
        // SAFETY: none of it is memory of this guest but the arena's last bytes.
        unsafe { access::anyhow(direct(address), chance) };
    }
}

/// Reads a register, or goes on after the fault.
fn read_msr(register: u32) {
    // SAFETY: a fault goes on behind the instruction (`kernel_trap`).
    unsafe {
        asm!("2: rdmsr", "3:", ".pushsection .extable, \"a\"", ".quad 2b, 3b", ".popsection",
            in("ecx") register, out("eax") _, out("edx") _, options(nostack));
    }
}

/// Writes a register, or goes on after the fault.
fn write_msr(register: u32, value: u64) {
    // SAFETY: as above; the caller leaves out what this code stands on.
    unsafe {
        asm!("2: wrmsr", "3:", ".pushsection .extable, \"a\"", ".quad 2b, 3b", ".popsection",
            in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack));
    }
}

/// All leaves of CPUID, model-specific registers known and unknown.
pub fn msrs(chance: &mut Chance, rounds: u64) {
    for leaf in (0..0x40)
        .chain(0x4000_0000..0x4000_0020)
        .chain(0x8000_0000..0x8000_0040)
    {
        for part in 0..4 {
            let _ = __cpuid_count(leaf, part);
        }
    }
    for _ in 0..rounds {
        let base = chance.one_of(&[
            0,
            0x100,
            0x400,
            0x800,
            0x4000_0000,
            0x4b56_4d00,
            0xc000_0080,
            0xc001_0000,
        ]);
        let register = base + chance.below(0x200) as u32;
        read_msr(register);
        // What the code runs on: APIC, EFER to SFMASK, bases of segments.
        let own = register == 0x1b || (0xc000_0080..=0xc000_0104).contains(&register);
        if !own {
            // KVM's own registers take addresses that it writes to.
            let value = if chance.once_in(2) {
                chance.address() | 1
            } else {
                chance.number()
            };
            write_msr(register, value);
        }
    }
}

/// Sends INIT to this very processor: it goes on where no firmware is.
pub fn init() {
    let controller = direct(0xfee0_0000);
    // SAFETY: the local APIC's command register; nothing of this guest runs afterwards.
    unsafe {
        controller.add(0x310).cast::<u32>().write_volatile(0);
        controller.add(0x300).cast::<u32>().write_volatile(0x4500);
    }
    for _ in 0..1_000_000 {
        core::hint::spin_loop();
    }
    crate::start::say(format_args!("INIT was not taken"));
}
