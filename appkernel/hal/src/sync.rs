//! A lock for data of the kernel.

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Mutual exclusion. With one CPU and interrupts off in the kernel, a lock that is taken can only
/// have been taken by who wants it again, or by a task that sleeps with it: both are mistakes of
/// ours and end in a panic that says so, not in a hang.
#[derive(Debug, Default)]
pub struct Mutex<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

/// Locks that are taken now, by whomever: the running task, with one CPU.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// Whether any lock is taken: then nobody else may run.
pub fn any_taken() -> bool {
    TAKEN.load(Ordering::Relaxed) > 0
}

fn count(by: usize) {
    // One CPU, and interrupts that take locks have given them back when they return.
    TAKEN.store(
        TAKEN.load(Ordering::Relaxed).wrapping_add(by),
        Ordering::Relaxed,
    );
}

// SAFETY: the value is reached through the guard only, and there is one guard at a time.
unsafe impl<T: Send> Sync for Mutex<T> {}

impl<T> Mutex<T> {
    /// A free lock.
    pub const fn new(value: T) -> Self {
        Self {
            taken: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Takes the lock.
    #[track_caller]
    pub fn lock(&self) -> Guard<'_, T> {
        assert!(
            !self.taken.swap(true, Ordering::Acquire),
            "a lock was taken twice, or held while sleeping"
        );
        count(1);
        Guard { lock: self }
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<Guard<'_, T>> {
        let free = !self.taken.swap(true, Ordering::Acquire);
        // Not `then_some`: a guard that is made and dropped would free the lock of another.
        free.then(|| {
            count(1);
            Guard { lock: self }
        })
    }
}

/// The lock is free again when it is dropped.
#[derive(Debug)]
pub struct Guard<'a, T> {
    lock: &'a Mutex<T>,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard is the only way to the value while it lives.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard is the only way to the value while it lives.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        count(1usize.wrapping_neg());
        self.lock.taken.store(false, Ordering::Release);
    }
}
