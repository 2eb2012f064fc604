//! What comes in: exceptions and interrupts.

use core::sync::atomic::{AtomicU8, Ordering};

use appkernel_hal::trap::{Frame, IRQ_BASE, SPURIOUS, TIMER};
use appkernel_hal::{USER_END, apic, clock, cpu, trap};

use crate::mm::Access;
use crate::net::stack;
use crate::signal::{self, Signal, code};
use crate::{fs, log, task};

/// IOAPIC pin of the serial port.
pub const SERIAL_PIN: u8 = 4;
const PAGE_FAULT: u64 = 14;
/// In the error code of a page fault.
mod fault {
    pub const WRITE: u64 = 2;
    pub const FETCH: u64 = 16;
}

/// IOAPIC pin of the device that the agent listens to.
static AGENT_PIN: AtomicU8 = AtomicU8::new(u8::MAX);

/// Interrupts of this pin wake the agent.
pub fn wakes_agent(pin: u8) {
    AGENT_PIN.store(pin, Ordering::Relaxed);
}

/// IOAPIC pin of the network device.
static NETWORK_PIN: AtomicU8 = AtomicU8::new(u8::MAX);

/// Interrupts of this pin are packets.
pub fn wakes_network(pin: u8) {
    NETWORK_PIN.store(pin, Ordering::Relaxed);
}

/// Called by the entry code for everything but system calls.
#[unsafe(no_mangle)]
extern "C" fn kernel_trap(frame: &mut Frame) {
    let vector = frame.vector as u8;
    match vector {
        0..IRQ_BASE => exception(frame),
        TIMER => {
            clock::tick();
            apic::end_of_interrupt();
            task::wake_sleepers();
            if frame.from_user() {
                task::yield_now();
            }
        }
        SPURIOUS => {}
        _ => {
            let pin = vector.wrapping_sub(IRQ_BASE);
            apic::end_of_interrupt();
            if pin == SERIAL_PIN {
                fs::console::input();
            }
            if pin == AGENT_PIN.load(Ordering::Relaxed) {
                task::wake(task::AGENT);
            }
            if pin == NETWORK_PIN.load(Ordering::Relaxed) {
                stack::interrupt();
                if frame.from_user() {
                    task::hand_over(task::NETWORK);
                } else {
                    task::wake(task::NETWORK);
                }
            }
        }
    }
    if frame.from_user() {
        signal::deliver(frame);
    }
}

/// Called by the entry code before the first instruction of a new task: a signal that came before
/// that, SIGKILL for one, is no later than it.
#[unsafe(no_mangle)]
extern "C" fn kernel_start_task(frame: &mut Frame) {
    if frame.from_user() {
        signal::deliver(frame);
    }
}

/// What was tried, by the error code of a page fault.
fn access(frame: &Frame) -> Access {
    if frame.code & fault::FETCH != 0 {
        Access::Execute
    } else if frame.code & fault::WRITE != 0 {
        Access::Write
    } else {
        Access::Read
    }
}

fn exception(frame: &mut Frame) {
    let address = cpu::read_cr2();
    if frame.vector == PAGE_FAULT && (frame.from_user() || address < USER_END) {
        if address < USER_END && task::fault(address, access(frame)) {
            return;
        }
        if frame.from_user() && task::is_ending() {
            return;
        }
    }
    if frame.from_user() {
        // With what siginfo calls it: a division by zero, no such instruction, no alignment.
        let (signal, address) = match frame.vector {
            PAGE_FAULT => (task::fault_signal(address, access(frame)), address),
            0 => ((Signal::FPE, 1), frame.rip),
            16 | 19 => ((Signal::FPE, 7), frame.rip),
            1 => ((Signal::TRAP, 2), frame.rip),
            3 => ((Signal::TRAP, code::KERNEL), 0),
            6 => ((Signal::ILL, 2), frame.rip),
            17 => ((Signal::BUS, 1), 0),
            _ => ((Signal::SEGV, code::KERNEL), 0),
        };
        signal::fault(signal, frame, address);
        return;
    }
    if let Some(rip) = trap::fixup(frame.rip) {
        frame.rip = rip;
        return;
    }
    log!("registers: {frame:#x?}");
    panic!(
        "exception {} (code {:#x}) in the kernel at {:#x}, address {address:#x}",
        frame.vector, frame.code, frame.rip
    );
}
