//! Local APIC (timer) and IOAPIC (device interrupts) at their usual addresses.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::cpu;
use crate::mmio::Mmio;
use crate::trap::{IRQ_BASE, SPURIOUS, TIMER};

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
const EOI: u64 = 0xb0;
const SPURIOUS_VECTOR: u64 = 0xf0;
const LVT_TIMER: u64 = 0x320;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3e0;
const LVT_LINT0: u64 = 0x350;
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0xb;
/// KVM's (and QEMU's) APIC timer counts nanoseconds.
const TICK_NS: u32 = 10_000_000;
const SHORTEST_NS: u32 = 20_000;

fn lapic() -> Option<Mmio> {
    Mmio::new(LAPIC, 0x1000, 0)
}

/// Switches the local APIC on and starts the timer: 100 ticks a second.
pub fn init() {
    let Some(lapic) = lapic() else { return };
    // SAFETY: masks all of the old interrupt controllers, which were never given vectors: what they
    // deliver would look like exceptions.
    unsafe {
        cpu::outb(0x21, 0xff);
        cpu::outb(0xa1, 0xff);
    }
    lapic.write(LVT_LINT0, MASKED);
    // SAFETY: sets the enable bit, the address stays.
    unsafe {
        let base = cpu::rdmsr(cpu::msr::APIC_BASE);
        cpu::wrmsr(cpu::msr::APIC_BASE, base | 1 << 11);
    }
    lapic.write(SPURIOUS_VECTOR, 0x100 | u32::from(SPURIOUS));
    lapic.write(TIMER_DIVIDE, DIVIDE_BY_1);
    lapic.write(LVT_TIMER, PERIODIC | u32::from(TIMER));
    lapic.write(TIMER_INITIAL, TICK_NS);
}

/// Makes the next tick come after so many nanoseconds, at most as late as usual; the one after it
/// is then as far away. It is a write that costs little, but not nothing: only for a change.
pub fn next_tick(ns: u64) {
    let wanted = ns.clamp(SHORTEST_NS.into(), TICK_NS.into()) as u32;
    // A full tick that runs already is left alone; so are all where ticks are the only clock.
    if !crate::clock::is_precise() || wanted == TICK_NS && PERIOD.load(Ordering::Relaxed) == TICK_NS
    {
        return;
    }
    PERIOD.store(wanted, Ordering::Relaxed);
    if let Some(lapic) = lapic() {
        lapic.write(TIMER_INITIAL, wanted);
    }
}

/// For a CPU with nothing to do: makes the next tick come after so many nanoseconds, which may be
/// seconds (as many as the timer counts), so that an idle guest costs its host next to nothing.
/// Whoever goes on then asks for the [`next_tick`] in time.
pub fn rest(ns: u64) {
    let wanted = u32::try_from(ns).unwrap_or(u32::MAX).max(SHORTEST_NS);
    if !crate::clock::is_precise() {
        return;
    }
    PERIOD.store(wanted, Ordering::Relaxed);
    if let Some(lapic) = lapic() {
        lapic.write(TIMER_INITIAL, wanted);
    }
}

static PERIOD: AtomicU32 = AtomicU32::new(TICK_NS);

/// The interrupt is handled.
pub fn end_of_interrupt() {
    if let Some(lapic) = lapic() {
        lapic.write(EOI, 0);
    }
}

/// Lets the interrupts of IOAPIC pin `pin` through to this CPU (edge triggered).
pub fn enable_pin(pin: u8) {
    let Some(ioapic) = Mmio::new(IOAPIC, 0x1000, 0) else {
        return;
    };
    if pin >= 24 {
        return;
    }
    let register = 0x10 + u32::from(pin) * 2;
    ioapic.write(0, register + 1);
    ioapic.write(0x10, 0);
    ioapic.write(0, register);
    ioapic.write(0x10, u32::from(IRQ_BASE + pin));
}
