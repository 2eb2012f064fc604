//! Time: KVM's clock page where there is one, else the timer's ticks.

use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use crate::{cpu, direct, frames};

const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const CLOCKSOURCE2: u32 = 1 << 3;
/// Nanoseconds of a tick.
pub const TICK_NS: u64 = 10_000_000;

/// In the page that programs see: KVM's clock, its wall clock, our wall clock, whether there is any.
const WALL_AT: u64 = 64;
const OWN_WALL_AT: u64 = 128;
const USABLE_AT: u64 = 136;

static PAGE: AtomicU64 = AtomicU64::new(0);
static SHARED: AtomicU64 = AtomicU64::new(0);
static WALL: AtomicU64 = AtomicU64::new(0);
static TICKS: AtomicU64 = AtomicU64::new(0);

/// Asks KVM for its clock.
pub fn init() {
    if let Some(page) = frames::allocate_zeroed() {
        SHARED.store(page, Ordering::Relaxed);
        ask(page);
    }
}

/// The frame of the page that programs may read, if there is one: `vdso` says what is in it.
pub fn shared_page() -> Option<u64> {
    Some(SHARED.load(Ordering::Relaxed)).filter(|page| *page != 0)
}

fn ask(page: u64) {
    let signature = __cpuid(0x4000_0000);
    if (signature.ebx, signature.ecx) != (0x4b4d_564b, 0x564b_4d56) {
        return;
    }
    if __cpuid(0x4000_0001).eax & CLOCKSOURCE2 == 0 {
        return;
    }
    // SAFETY: the registers exist by the feature bit; KVM writes into a frame that is kept for ever.
    let wall_ns = unsafe {
        cpu::wrmsr(KVM_WALL_CLOCK, page + WALL_AT);
        let wall = direct(page + WALL_AT).cast::<u32>();
        let seconds = u64::from(wall.add(1).read_volatile());
        let ns = u64::from(wall.add(2).read_volatile());
        cpu::wrmsr(KVM_SYSTEM_TIME, page | 1);
        direct(page + USABLE_AT).cast::<u32>().write_volatile(1);
        seconds * 1_000_000_000 + ns
    };
    PAGE.store(page, Ordering::Relaxed);
    set_wall(wall_ns);
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
    set_wall(ns.wrapping_sub(monotonic_ns()));
}

/// Sets what is added to monotonic time for the day's, here and where programs look.
fn set_wall(ns: u64) {
    WALL.store(ns, Ordering::Relaxed);
    if let Some(page) = shared_page() {
        // SAFETY: within the frame that is kept for ever, at a place of ours; programs only read it,
        // a whole aligned word at once.
        unsafe {
            direct(page + OWN_WALL_AT).cast::<u64>().write_volatile(ns);
        }
    }
}
