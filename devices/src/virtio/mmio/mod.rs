//! The virtio-mmio transport (virtio 1.2, 4.2; modern interface only).
//!
//! One [`MmioTransport`] carries one device. vCPU threads reach it as a [`BusDevice`], the event
//! loop as an [`EventSubscriber`]; both take one lock around the registers and the device. Three
//! registers are served without it, because the guest touches them while a request may be in
//! progress: `QueueNotify`, `InterruptStatus` and `InterruptACK`.

mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, EventSubscriber, Events};
use serde_json::json;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use self::registers::{Registers, feature, feature_word, reg, set_half, status};
pub use self::state::{STATE_VERSION, TransportState};
use super::device::TOKEN_LIMIT;
use super::guest_log::GuestLog;
use super::queue::QueueSaved;
use super::{Activation, Interrupt, StateError, VirtioDevice};
use crate::GuestMemory;
use crate::bus::BusDevice;

/// Token of the event that says the device was activated or deactivated.
const LIFECYCLE: u32 = TOKEN_LIMIT;
/// Token of queue 0's event; the others follow.
const FIRST_QUEUE: u32 = TOKEN_LIMIT + 1;

/// A device behind virtio-mmio registers.
pub struct MmioTransport {
    mem: GuestMemory,
    interrupt: Interrupt,
    queue_events: Arc<[EventFd]>,
    lifecycle: EventFd,
    name: &'static str,
    device_type: u32,
    log: GuestLog,
    inner: Mutex<Inner>,
}

struct Inner {
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    /// The device has the queues.
    active: bool,
    /// The event loop has told the device so.
    known_to_loop: bool,
    /// Activate once the event loop has finished the previous life of the device.
    pending: bool,
    /// Queue events are not watched by the loop: the kernel reads them.
    offloaded: bool,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("name", &self.name)
            .field("interrupt", &self.interrupt)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind registers. Nothing happens until the guest's driver sets it up.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(
        mem: GuestMemory,
        mut device: Box<dyn VirtioDevice>,
        interrupt: Interrupt,
    ) -> io::Result<Arc<Self>> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let queue_events: Arc<[EventFd]> = device
            .queue_max_sizes()
            .iter()
            .map(|_| event())
            .collect::<io::Result<Vec<_>>>()?
            .into();
        device.set_queue_events(Arc::clone(&queue_events));
        Ok(Arc::new(Self {
            mem,
            interrupt,
            queue_events,
            lifecycle: event()?,
            name: device.name(),
            device_type: device.device_type(),
            log: GuestLog::new(device.name()),
            inner: Mutex::new(Inner {
                registers: Registers::new(device.queue_max_sizes()),
                device,
                active: false,
                known_to_loop: false,
                pending: false,
                offloaded: false,
            }),
        }))
    }

    /// The device's short name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The device id (virtio 1.2, section 5).
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// One event per queue: to be registered as ioeventfd on `QueueNotify` (offset 0x50, 4 bytes)
    /// with the queue's index as datamatch. Without that, the trapped write does the same.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    /// The interrupt of the device.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Runs `f` on the device, with no request in progress meanwhile.
    pub fn with_device<R>(&self, f: impl FnOnce(&mut dyn VirtioDevice) -> R) -> R {
        f(self.lock().device.as_mut())
    }

    /// After a pause: lets the device look at all its queues.
    pub fn kick_all(&self) {
        let mut inner = self.lock();
        inner.device.resume();
        if inner.active {
            for event in &*self.queue_events {
                let _ = event.write(1);
            }
        }
    }

    /// State for `save`. The event loop must be paused.
    pub fn save(&self) -> TransportState {
        let mut inner = self.lock();
        inner.device.quiesce();
        TransportState {
            version: STATE_VERSION,
            device_type: self.device_type,
            status: inner.registers.status,
            needs_reset: self.interrupt.needs_reset(),
            device_features_sel: inner.registers.device_features_sel,
            driver_features_sel: inner.registers.driver_features_sel,
            driver_features: inner.registers.driver_features,
            queue_sel: inner.registers.queue_sel,
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.config_generation(),
            queues: inner.queues(),
            device: inner.device.save(),
        }
    }

    /// Takes back what [`Self::save`] gave, into a transport the guest has not touched, and
    /// activates the device again if it was. [`Self::kick_all`] then starts it.
    ///
    /// # Errors
    /// When the state does not fit the device or guest memory. The transport is then as new.
    pub fn restore(&self, state: &TransportState) -> Result<(), StateError> {
        let mut inner = self.lock();
        let result = self.restore_locked(&mut inner, state);
        if result.is_err() {
            self.reset(&mut inner);
        }
        result
    }

    fn restore_locked(&self, inner: &mut Inner, state: &TransportState) -> Result<(), StateError> {
        let bad = |reason: String| StateError {
            device: self.name,
            reason,
        };
        if state.version != STATE_VERSION {
            return Err(bad(format!(
                "it has version {}, this program reads {STATE_VERSION}",
                state.version
            )));
        }
        if state.device_type != self.device_type {
            return Err(bad(format!(
                "it is of device type {}, not {}",
                state.device_type, self.device_type
            )));
        }
        let registers = &inner.registers;
        if registers.status != 0 || inner.active || inner.pending {
            return Err(bad("the guest already uses this device".to_owned()));
        }
        if state.queues.len() != registers.max_sizes().len() {
            return Err(bad(format!(
                "it has {} queues instead of {}",
                state.queues.len(),
                registers.max_sizes().len()
            )));
        }
        for (index, (queue, max)) in state.queues.iter().zip(registers.max_sizes()).enumerate() {
            if queue.size > *max || !queue.size.is_power_of_two() {
                return Err(bad(format!(
                    "queue {index} has {} entries; a power of two up to {max} is possible",
                    queue.size
                )));
            }
        }
        let offered = inner.device.features() | feature::ALL;
        if state.driver_features & !offered != 0 {
            return Err(bad(format!(
                "it uses features this device lacks: {:#x}",
                state.driver_features & !offered
            )));
        }
        let known = status::ORDER.iter().fold(status::FAILED, |a, b| a | b);
        if state.status & !known != 0 {
            return Err(bad(format!("its status {:#x} is unknown", state.status)));
        }
        inner.device.restore(&state.device)?;
        let registers = &mut inner.registers;
        registers.status = state.status;
        registers.device_features_sel = state.device_features_sel;
        registers.driver_features_sel = state.driver_features_sel;
        registers.driver_features = state.driver_features;
        registers.queue_sel = state.queue_sel;
        registers.queues.clone_from(&state.queues);
        if registers.has(status::DRIVER_OK) && !registers.has(status::FAILED) && !state.needs_reset
        {
            self.activate(inner).map_err(bad)?;
        }
        self.interrupt.restore_needs_reset(state.needs_reset);
        self.interrupt
            .restore_config_generation(state.config_generation);
        self.interrupt.restore_status(state.interrupt_status);
        Ok(())
    }

    /// Status, features, queues and counters, for `inspect`.
    pub fn describe(&self) -> serde_json::Value {
        let inner = self.lock();
        let offered = inner.device.features() | feature::ALL;
        let queues: Vec<_> = inner
            .queues()
            .iter()
            .zip(inner.registers.max_sizes())
            .map(|(q, max)| {
                json!({
                    "size": q.size, "max_size": max, "ready": q.ready,
                    "desc_table": format!("{:#x}", q.desc_table),
                    "avail_ring": format!("{:#x}", q.avail_ring),
                    "used_ring": format!("{:#x}", q.used_ring),
                    "next_avail": q.next_avail, "next_used": q.next_used,
                })
            })
            .collect();
        json!({
            "device": self.name,
            "device_type": self.device_type,
            "active": inner.active,
            "status": format!("{:#x}", self.status(&inner)),
            "features_offered": format!("{offered:#x}"),
            "features_accepted": format!("{:#x}", inner.registers.driver_features),
            "interrupts": self.interrupt.count(),
            "interrupt_status": self.interrupt.status(),
            "config_generation": self.interrupt.config_generation(),
            "queues": queues,
            "metrics": inner.device.metrics(),
        })
    }

    /// A handler that panicked leaves the lock poisoned; its VM is being ended then, and what is
    /// still running must not panic in turn.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self, inner: &Inner) -> u32 {
        let needs_reset = if self.interrupt.needs_reset() {
            status::NEEDS_RESET
        } else {
            0
        };
        inner.registers.status | needs_reset
    }

    fn read_register(&self, offset: u64) -> u32 {
        // Without the lock: a file system request may hold it for long.
        match offset {
            reg::MAGIC_VALUE => return registers::MAGIC,
            reg::VERSION => return registers::VERSION,
            reg::DEVICE_ID => return self.device_type,
            reg::VENDOR_ID => return registers::VENDOR,
            reg::INTERRUPT_STATUS => return self.interrupt.status(),
            reg::CONFIG_GENERATION => return self.interrupt.config_generation(),
            // No shared memory region exists: length and base read as all ones.
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => return u32::MAX,
            _ => {}
        }
        let inner = self.lock();
        let registers = &inner.registers;
        match offset {
            reg::DEVICE_FEATURES => feature_word(
                inner.device.features() | feature::ALL,
                registers.device_features_sel,
            ),
            reg::QUEUE_NUM_MAX => registers.selected_max(),
            reg::QUEUE_READY => registers.selected().map_or(0, |q| u32::from(q.ready)),
            reg::STATUS => self.status(&inner),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            reg::QUEUE_NOTIFY => {
                // The event is non-blocking: a full counter is an event that is pending anyway.
                if let Some(event) = self.queue_events.get(value as usize) {
                    let _ = event.write(1);
                }
                return;
            }
            reg::INTERRUPT_ACK => return self.interrupt.acknowledge(value),
            _ => {}
        }
        let mut guard = self.lock();
        let inner = &mut *guard;
        let registers = &mut inner.registers;
        match offset {
            reg::STATUS => self.write_status(inner, value),
            reg::DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            reg::QUEUE_SEL => registers.queue_sel = value,
            reg::DRIVER_FEATURES if registers.features_writable() => {
                if registers.driver_features_sel < 2 {
                    let high = registers.driver_features_sel == 1;
                    set_half(&mut registers.driver_features, high, value);
                } else if value != 0 {
                    self.log.warn(format_args!(
                        "the driver accepts features beyond bit 63, which are not offered"
                    ));
                }
            }
            _ if registers.queues_writable() => self.write_queue(registers, offset, value),
            _ => self.log.warn(format_args!(
                "write of {value:#x} to register {offset:#x} ignored in status {:#x}",
                registers.status
            )),
        }
    }

    fn write_queue(&self, registers: &mut Registers, offset: u64, value: u32) {
        let max = registers.selected_max();
        let Some(queue) = registers.selected_mut() else {
            return;
        };
        if offset == reg::QUEUE_READY {
            queue.ready = value == 1;
            return;
        }
        // A queue that is ready keeps its set-up (4.2.2.2).
        if queue.ready {
            return;
        }
        match offset {
            reg::QUEUE_NUM => match u16::try_from(value) {
                Ok(size) if value <= max && size.is_power_of_two() => queue.size = size,
                _ => self.log.warn(format_args!(
                    "queue size {value} ignored: not a power of two up to {max}"
                )),
            },
            reg::QUEUE_DESC_LOW => set_half(&mut queue.desc_table, false, value),
            reg::QUEUE_DESC_HIGH => set_half(&mut queue.desc_table, true, value),
            reg::QUEUE_DRIVER_LOW => set_half(&mut queue.avail_ring, false, value),
            reg::QUEUE_DRIVER_HIGH => set_half(&mut queue.avail_ring, true, value),
            reg::QUEUE_DEVICE_LOW => set_half(&mut queue.used_ring, false, value),
            reg::QUEUE_DEVICE_HIGH => set_half(&mut queue.used_ring, true, value),
            _ => {}
        }
    }

    /// The status register only ever gains bits, in the order of the specification; 0 resets.
    fn write_status(&self, inner: &mut Inner, value: u32) {
        if value == 0 {
            return self.reset(inner);
        }
        let current = inner.registers.status;
        // Drivers write back what they read, with a bit more.
        let wanted = value & !status::NEEDS_RESET;
        let known = status::ORDER.iter().fold(status::FAILED, |a, b| a | b);
        if wanted & !known != 0 || current & !wanted != 0 || current & status::FAILED != 0 {
            self.log.warn(format_args!(
                "status {value:#x} ignored in status {current:#x}: bits cannot be taken back or are unknown"
            ));
            return;
        }
        if wanted & status::FAILED != 0 {
            self.log
                .warn(format_args!("the driver has given up on the device"));
            inner.registers.status |= status::FAILED;
            self.deactivate(inner);
            return;
        }
        let mut needed = 0;
        for bit in status::ORDER {
            if wanted & !inner.registers.status & bit != 0 {
                if !inner.registers.has(needed) {
                    self.log.warn(format_args!(
                        "status {value:#x} ignored in status {current:#x}: a step is missing"
                    ));
                    return;
                }
                if bit == status::FEATURES_OK && !self.features_acceptable(inner) {
                    return;
                }
                inner.registers.status |= bit;
                if bit == status::DRIVER_OK {
                    self.driver_ok(inner);
                }
            }
            needed |= bit;
        }
    }

    fn features_acceptable(&self, inner: &Inner) -> bool {
        let accepted = inner.registers.driver_features;
        let unknown = accepted & !(inner.device.features() | feature::ALL);
        if unknown != 0 || accepted & feature::VERSION_1 == 0 {
            self.log.warn(format_args!(
                "FEATURES_OK refused: the driver accepts {accepted:#x}, of which {unknown:#x} is not offered; VERSION_1 is required"
            ));
            return false;
        }
        true
    }

    fn driver_ok(&self, inner: &mut Inner) {
        if inner.known_to_loop {
            // The loop still has descriptors of the device's previous life; it activates the
            // device when it has let go of them.
            inner.pending = true;
            let _ = self.lifecycle.write(1);
        } else if let Err(reason) = self.activate(inner) {
            self.refuse(&reason);
        }
    }

    fn refuse(&self, reason: &str) {
        self.log.warn(format_args!("cannot be activated: {reason}"));
        self.interrupt.fail();
    }

    fn activate(&self, inner: &mut Inner) -> Result<(), String> {
        let features = inner.registers.driver_features;
        let event_idx = features & feature::RING_EVENT_IDX != 0;
        let queues = {
            let mem = self.mem.memory();
            inner
                .registers
                .queues
                .iter()
                .zip(inner.registers.max_sizes())
                .enumerate()
                .map(|(index, (queue, max))| {
                    queue
                        .build(*max, event_idx, &mem)
                        .map_err(|e| format!("queue {index}: {e}"))
                })
                .collect::<Result<Vec<_>, _>>()?
        };
        let activation = Activation {
            mem: self.mem.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features,
        };
        inner
            .device
            .activate(activation)
            .map_err(|e| e.to_string())?;
        inner.active = true;
        let _ = self.lifecycle.write(1);
        Ok(())
    }

    fn deactivate(&self, inner: &mut Inner) {
        inner.pending = false;
        if inner.active {
            drop(inner.device.deactivate());
            inner.active = false;
            self.interrupt.set_always_used(false);
            let _ = self.lifecycle.write(1);
        }
    }

    fn reset(&self, inner: &mut Inner) {
        self.deactivate(inner);
        inner.registers.reset();
        self.interrupt.restore_needs_reset(false);
        self.interrupt.restore_status(0);
    }

    /// Brings the event loop's view of the device up to date, in order: the end of its previous
    /// life, then the start of the present one.
    fn synchronise(&self, inner: &mut Inner, ops: &mut EventOps) {
        if inner.known_to_loop && !inner.active {
            inner.device.on_deactivated(ops);
            inner.known_to_loop = false;
            if inner.offloaded {
                self.watch_queues(ops);
                inner.offloaded = false;
            }
        }
        if inner.pending {
            inner.pending = false;
            if let Err(reason) = self.activate(inner) {
                self.refuse(&reason);
            }
        }
        if inner.active && !inner.known_to_loop {
            inner.device.on_activated(ops);
            inner.known_to_loop = true;
            if inner.device.kernel_reads_queue_events() {
                for event in &*self.queue_events {
                    let _ = ops.remove(Events::empty(event));
                    // The loop may have taken a notification that came before: once more, for the
                    // kernel.
                    let _ = event.write(1);
                }
                inner.offloaded = true;
            } else {
                // Notifications may have come (and been dropped) before the device was ready.
                for index in 0..self.queue_events.len() {
                    inner.device.handle_queue(index as u16, ops);
                }
            }
        }
    }

    fn watch_queues(&self, ops: &mut EventOps) {
        for (event, token) in self.queue_events.iter().zip(FIRST_QUEUE..) {
            if let Err(e) = ops.add(Events::with_data(event, token, EventSet::IN)) {
                log::error!("{}: cannot watch a queue's event: {e}", self.name);
                self.interrupt.fail();
            }
        }
    }
}

impl Inner {
    fn queues(&self) -> Vec<QueueSaved> {
        if self.active {
            let mut saved: Vec<_> = self.device.queues().iter().map(QueueSaved::of).collect();
            // A device that hands out fewer queues than it has leaves the others as set up.
            saved.extend_from_slice(self.registers.queues.get(saved.len()..).unwrap_or(&[]));
            saved
        } else {
            self.registers.queues.clone()
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            self.lock().device.read_config(offset, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            // Registers are 32 bits wide, aligned (4.2.2.2); anything else reads as zero.
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            let mut inner = self.lock();
            if inner.registers.has(status::DRIVER) && !inner.registers.has(status::FAILED) {
                inner.device.write_config(offset, data);
            }
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

impl EventSubscriber for MmioTransport {
    fn process(&self, events: Events, ops: &mut EventOps) {
        let token = events.data();
        let queue = token.checked_sub(FIRST_QUEUE);
        // Clear the event before looking at the queue, so that a notification that comes while
        // we look is not lost.
        if let Some(queue) = queue {
            if let Some(event) = self.queue_events.get(queue as usize) {
                let _ = event.read();
            }
        } else if token == LIFECYCLE {
            let _ = self.lifecycle.read();
        }
        let mut guard = self.lock();
        let inner = &mut *guard;
        self.synchronise(inner, ops);
        if !inner.active || self.interrupt.needs_reset() {
            return;
        }
        match queue {
            Some(queue) => inner.device.handle_queue(queue as u16, ops),
            None if token < TOKEN_LIMIT => {
                inner.device.handle_event(token, events.event_set(), ops);
            }
            None => {}
        }
    }

    fn init(&self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::with_data(&self.lifecycle, LIFECYCLE, EventSet::IN)) {
            log::error!("{}: cannot watch its events: {e}", self.name);
            self.interrupt.fail();
        }
        self.watch_queues(ops);
        self.synchronise(&mut self.lock(), ops);
    }
}
