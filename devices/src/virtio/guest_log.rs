//! Log messages a guest can provoke, of which there must be a bounded number: a guest that floods
//! the host's log hides what others do and fills the disk.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// Messages one device may write in its life.
const BUDGET: u32 = 16;

/// A device's right to write to the log about its guest.
#[derive(Debug)]
pub(crate) struct GuestLog {
    device: &'static str,
    left: AtomicU32,
}

impl GuestLog {
    pub(crate) const fn new(device: &'static str) -> Self {
        Self {
            device,
            left: AtomicU32::new(BUDGET),
        }
    }

    /// Warns, unless the budget is used up.
    pub(crate) fn warn(&self, message: fmt::Arguments<'_>) {
        let left = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        match left {
            Ok(1) => log::warn!(
                "{}: {message} (last message of its kind; further ones are dropped)",
                self.device
            ),
            Ok(_) => log::warn!("{}: {message}", self.device),
            Err(_) => {}
        }
    }
}
