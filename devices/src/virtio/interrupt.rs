//! How a device interrupts the guest: the `InterruptStatus` register and an eventfd.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

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
    shared: Arc<Shared>,
    event: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct Shared {
    status: AtomicU32,
    count: AtomicU64,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    always_used: AtomicBool,
}

impl Interrupt {
    /// Makes a line with nothing pending.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            shared: Arc::default(),
            event: Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?),
        })
    }

    /// Sets the status bit and raises the line. A configuration change also moves the
    /// configuration generation on, so change the configuration first, and do both under one lock.
    pub fn trigger(&self, kind: InterruptKind) {
        if kind == InterruptKind::ConfigChange {
            self.shared.generation.fetch_add(1, Ordering::SeqCst);
        }
        self.shared.status.fetch_or(kind.bit(), Ordering::SeqCst);
        self.shared.count.fetch_add(1, Ordering::Relaxed);
        // An eventfd write fails only when the counter is about to overflow, and then the line is
        // already raised.
        let _ = self.event.write(1);
    }

    /// The `InterruptStatus` register.
    pub fn status(&self) -> u32 {
        let used = u32::from(self.shared.always_used.load(Ordering::SeqCst));
        self.shared.status.load(Ordering::SeqCst) | used
    }

    /// The guest wrote `InterruptACK`: clears those bits.
    pub fn acknowledge(&self, bits: u32) {
        self.shared.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Sets the whole status register (restore, reset). Raises the line if anything is pending.
    pub fn restore_status(&self, status: u32) {
        self.shared.status.store(status & 3, Ordering::SeqCst);
        if status & 3 != 0 {
            let _ = self.event.write(1);
        }
    }

    /// The `ConfigGeneration` register: moves on with every configuration change.
    pub fn config_generation(&self) -> u32 {
        self.shared.generation.load(Ordering::SeqCst)
    }

    /// Sets the configuration generation (restore).
    pub fn restore_config_generation(&self, generation: u32) {
        self.shared.generation.store(generation, Ordering::SeqCst);
    }

    /// The device can do nothing more until the driver resets it (a ring that makes no sense, for
    /// example): shows `DEVICE_NEEDS_RESET` in the status register and tells the driver.
    pub fn fail(&self) {
        if !self.shared.needs_reset.swap(true, Ordering::SeqCst) {
            self.trigger(InterruptKind::ConfigChange);
        }
    }

    /// True from [`Self::fail`] to the next reset.
    pub fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::SeqCst)
    }

    /// Clears or sets the needs-reset mark without an interrupt (reset, restore).
    pub fn restore_needs_reset(&self, needs_reset: bool) {
        self.shared.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// While on, the status register always shows a used buffer. For devices whose queues the
    /// kernel works on (vhost): it raises the line without passing by the register. A look at
    /// queues with nothing new in them is harmless for a driver.
    pub fn set_always_used(&self, on: bool) {
        self.shared.always_used.store(on, Ordering::SeqCst);
    }

    /// Interrupts raised since the line was made.
    pub fn count(&self) -> u64 {
        self.shared.count.load(Ordering::Relaxed)
    }

    /// The eventfd to register as an irqfd.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}
