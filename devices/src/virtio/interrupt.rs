//! How a device interrupts the guest: the `InterruptStatus` register and an eventfd.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Why the guest is interrupted (virtio 1.2, 4.2.2, `InterruptStatus` bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptKind {
    /// The device has used a buffer in at least one of its queues.
    UsedBuffer,
    /// The device's configuration space has changed.
    ConfigChange,
}

impl InterruptKind {
    const fn bit(self) -> u32 {
        match self {
            Self::UsedBuffer => 1,
            Self::ConfigChange => 2,
        }
    }
}

/// A device's interrupt line. Cheap to clone; all clones share one status register.
///
/// The eventfd is what the VMM registers as an irqfd. The status register is read and
/// acknowledged by vCPU threads without any device lock, so that a busy device (a file system
/// request in progress) cannot stall the guest's interrupt handler.
#[derive(Clone, Debug)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    count: Arc<AtomicU64>,
    event: Arc<EventFd>,
}

impl Interrupt {
    /// Makes a line with nothing pending.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            status: Arc::new(AtomicU32::new(0)),
            count: Arc::new(AtomicU64::new(0)),
            event: Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?),
        })
    }

    /// Sets the status bit and raises the line.
    pub fn trigger(&self, kind: InterruptKind) {
        self.status.fetch_or(kind.bit(), Ordering::SeqCst);
        self.count.fetch_add(1, Ordering::Relaxed);
        // An eventfd write fails only when the counter is about to overflow, and then the line is
        // already raised.
        let _ = self.event.write(1);
    }

    /// The `InterruptStatus` register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The guest wrote `InterruptACK`: clears those bits.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Sets the whole status register (restore, reset). Raises the line if anything is pending.
    pub fn restore_status(&self, status: u32) {
        self.status.store(status & 3, Ordering::SeqCst);
        if status & 3 != 0 {
            let _ = self.event.write(1);
        }
    }

    /// Interrupts raised since the line was made.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// The eventfd to register as an irqfd.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}
