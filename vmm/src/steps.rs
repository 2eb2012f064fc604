//! Counting a guest's instructions up to the first of its first program, by single steps of KVM.
//!
//! Slow (an exit for each instruction), so only for looking at a kernel that does little before.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug};

/// Addresses from here on are kernels' (canonical, upper half).
const KERNEL_HALF: u64 = 1 << 63;
/// A kernel runs below this only before it has its own page tables, and programs always do.
const USER_HALF_END: u64 = 1 << 47;

/// What was counted; shared by the vCPU and whoever wants to know.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    so_far: AtomicU64,
    /// The count when the first program began, plus one; 0 before.
    at_user: AtomicU64,
}

impl Counted {
    /// Instructions before the first of a program, if it came to one.
    pub(crate) fn before_user(&self) -> Option<u64> {
        self.at_user.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Instructions that were counted.
    pub(crate) fn so_far(&self) -> u64 {
        self.so_far.load(Ordering::Relaxed)
    }
}

/// The vCPU's side: it is told of each step.
#[derive(Debug)]
pub(crate) struct Steps {
    counted: Arc<Counted>,
    last: u64,
    was_in_kernel: bool,
}

/// What KVM is told so that it leaves the guest after each instruction. Interrupts come as ever:
/// a kernel that waits for a device gets no further without.
pub(crate) fn stepping() -> kvm_guest_debug {
    kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
        ..Default::default()
    }
}

impl Steps {
    pub(crate) fn new(counted: Arc<Counted>) -> Self {
        Self {
            counted,
            last: 0,
            was_in_kernel: false,
        }
    }

    /// One step ended before the instruction at `pc`; whether the first program begins there, and
    /// there is nothing more to count.
    pub(crate) fn step(&mut self, pc: u64) -> bool {
        if self.was_in_kernel && pc < USER_HALF_END {
            let count = self.counted.so_far();
            self.counted.at_user.store(count + 1, Ordering::Relaxed);
            return true;
        }
        self.was_in_kernel |= pc >= KERNEL_HALF;
        // Each round of a repeated instruction (`rep movs`) is a step, but no further instruction.
        if pc != self.last {
            self.last = pc;
            self.counted.so_far.fetch_add(1, Ordering::Relaxed);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_up_to_the_first_program_and_repeats_once() {
        let counted = Arc::new(Counted::default());
        let mut steps = Steps::new(Arc::clone(&counted));
        let boot = [0x10_0000, 0x10_0003, 0xffff_ffff_8010_0000];
        let kernel = [0xffff_ffff_8010_0004; 3];
        for pc in boot.into_iter().chain(kernel) {
            assert!(!steps.step(pc));
        }
        assert_eq!(
            (counted.so_far(), counted.before_user()),
            (4, None),
            "low addresses before the kernel has its tables are its own"
        );
        assert!(steps.step(0x40_1000));
        assert_eq!(counted.before_user(), Some(4));
    }
}
