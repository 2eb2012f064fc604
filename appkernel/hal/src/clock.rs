//! Time: KVM's clock page where there is one, else the timer's ticks.

use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use crate::{cpu, direct, frames};

const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const CLOCKSOURCE2: u32 = 1 << 3;
/// Nanoseconds of a tick.
pub const TICK_NS: u64 = 10_000_000;

static PAGE: AtomicU64 = AtomicU64::new(0);
static WALL: AtomicU64 = AtomicU64::new(0);
static TICKS: AtomicU64 = AtomicU64::new(0);

/// Asks KVM for its clock.
pub fn init() {
    let signature = __cpuid(0x4000_0000);
    if (signature.ebx, signature.ecx) != (0x4b4d_564b, 0x564b_4d56) {
        return;
    }
    if __cpuid(0x4000_0001).eax & CLOCKSOURCE2 == 0 {
        return;
    }
    let Some(page) = frames::allocate_zeroed() else {
        return;
    };
    // SAFETY: the registers exist by the feature bit; KVM writes into a frame that is kept for ever.
    unsafe {
        cpu::wrmsr(KVM_WALL_CLOCK, page + 64);
        let wall = direct(page + 64).cast::<u32>();
        let seconds = u64::from(wall.add(1).read_volatile());
        let ns = u64::from(wall.add(2).read_volatile());
        WALL.store(seconds * 1_000_000_000 + ns, Ordering::Relaxed);
        cpu::wrmsr(KVM_SYSTEM_TIME, page | 1);
    }
    PAGE.store(page, Ordering::Relaxed);
}

/// Whether time is known between ticks: then they need not be equally long.
pub fn is_precise() -> bool {
    PAGE.load(Ordering::Relaxed) != 0
}

/// The timer ticked.
pub fn tick() {
    TICKS.fetch_add(1, Ordering::Relaxed);
}

/// Nanoseconds since the machine started; never goes back.
pub fn monotonic_ns() -> u64 {
    let page = PAGE.load(Ordering::Relaxed);
    if page == 0 {
        return TICKS.load(Ordering::Relaxed) * TICK_NS;
    }
    let at = direct(page);
    loop {
        // SAFETY: the clock page, which KVM changes only while this CPU does not run (one CPU);
        // an odd version would be a change in progress.
        unsafe {
            let version = at.cast::<u32>().read_volatile();
            fence(Ordering::Acquire);
            let stamp = at.add(8).cast::<u64>().read_volatile();
            let base = at.add(16).cast::<u64>().read_volatile();
            let factor = at.add(24).cast::<u32>().read_volatile();
            let shift = at.add(28).cast::<i8>().read_volatile();
            fence(Ordering::Acquire);
            if version & 1 != 0 || version != at.cast::<u32>().read_volatile() {
                continue;
            }
            let delta = cpu::tsc().saturating_sub(stamp);
            let delta = if shift >= 0 {
                delta << (shift & 63)
            } else {
                delta >> (shift.unsigned_abs() & 63)
            };
            let scaled = (u128::from(delta) * u128::from(factor)) >> 32;
            return base.wrapping_add(scaled as u64);
        }
    }
}

/// Nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    WALL.load(Ordering::Relaxed).wrapping_add(monotonic_ns())
}

/// Sets the wall clock: nanoseconds since 1970, as of now.
pub fn set_realtime_ns(ns: u64) {
    WALL.store(ns.wrapping_sub(monotonic_ns()), Ordering::Relaxed);
}
