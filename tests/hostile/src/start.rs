//! From the first instruction in Rust to the last.

use core::fmt::Write as _;
use core::panic::PanicInfo;

use alloc::vec::Vec;
use appkernel_core::cmdline::Options;
use appkernel_hal::trap::Frame;
use appkernel_hal::{boot, cpu, frames, heap, serial, trap};

use crate::cases;
use crate::chance::{ARENA, Chance};
use crate::device::Target;

#[global_allocator]
static HEAP: heap::Heap = heap::Heap::new();

/// Prints a line on the serial port.
pub fn say(text: core::fmt::Arguments<'_>) {
    let _ = writeln!(serial::Serial, "hostile: {text}");
}

/// Called by the entry code with the address of the start info.
#[unsafe(no_mangle)]
extern "C" fn kernel_main(start: u64) -> ! {
    trap::init();
    cpu::init();
    let mut info = match boot::info(start) {
        Ok(info) => info,
        Err(reason) => panic!("{reason}"),
    };
    let mut ram_end = 0;
    for range in &mut info.ram {
        if range.1 > ram_end && range.1 <= 0xc000_0000 {
            ram_end = range.1;
        }
    }
    // The arena is the devices' to write to: no ring and no heap in it.
    for range in &mut info.ram {
        range.1 = range.1.min(ram_end - ARENA);
    }
    frames::init(&info);
    boot::drop_identity_map();
    let value = |name: &str| {
        let mut words = info.cmdline.split_ascii_whitespace();
        words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    };
    let number = |name, otherwise| {
        value(name)
            .and_then(|text| text.parse().ok())
            .unwrap_or(otherwise)
    };
    let options = Options::parse(info.cmdline);
    let targets: Vec<_> = options.devices.iter().filter_map(Target::find).collect();
    let name = value("hostile.case").unwrap_or("");
    let rounds = number("hostile.rounds", 1000);
    let mut chance = Chance::new(number("hostile.seed", 1), ram_end);
    say(format_args!("{name}: {} devices", targets.len()));
    if !cases::run(name, &targets, &mut chance, rounds) {
        say(format_args!("no case {name:?}"));
    }
    for target in &targets {
        if !cases::honest::serves(*target, &mut chance) {
            say(format_args!(
                "{name}: the device of type {} serves nobody after a reset",
                target.id
            ));
        }
    }
    say(format_args!("{name} done"));
    cpu::reset()
}

/// Called by the entry code for exceptions. Those of instructions that are meant to fault go on
/// behind them.
#[unsafe(no_mangle)]
extern "C" fn kernel_trap(frame: &mut Frame) {
    match trap::fixup(frame.rip) {
        Some(next) => frame.rip = next,
        None => panic!(
            "exception {} ({:#x}) at {:#x}, address {:#x}",
            frame.vector,
            frame.code,
            frame.rip,
            cpu::read_cr2()
        ),
    }
}

/// There are no programs.
#[unsafe(no_mangle)]
extern "C" fn kernel_syscall(_frame: &mut Frame) {}

/// Nor tasks.
#[unsafe(no_mangle)]
extern "C" fn kernel_start_task(_frame: &mut Frame) {}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say(format_args!("{info}"));
    cpu::reset()
}
