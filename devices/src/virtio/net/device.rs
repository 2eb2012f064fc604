//! The network device.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use serde::{Deserialize, Serialize};
use serde_json::json;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::io::{self, Iovecs, MAX_FRAME, Rx, RxTurn, Stopped};
use super::tap::Tap;
use super::vhost::Kernel;
use crate::GuestMemory;
use crate::virtio::guest_log::GuestLog;
use crate::virtio::queue::{Buffers, QueueError, drain, signal};
use crate::virtio::{Activation, DeviceError, InterruptKind, StateError, VirtioDevice};

pub(super) const F_CSUM: u64 = 1 << 0;
pub(super) const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
pub(super) const F_GUEST_TSO4: u64 = 1 << 7;
pub(super) const F_GUEST_TSO6: u64 = 1 << 8;
pub(super) const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
pub(super) const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;

pub(super) const OFFLOADS: u64 =
    F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6;

const QUEUE_SIZES: &[u16] = &[256, 256];
const RX: usize = 0;
const TX: usize = 1;
const TAP_TOKEN: u32 = 0;
const LINK_UP: u16 = 1;

/// How the guest sees the device.
#[derive(Clone, Debug, Default)]
pub struct NetOptions {
    /// The guest's address; without one, a random local one.
    pub mac: Option<[u8; 6]>,
    /// What the guest is told to use, in bytes.
    pub mtu: Option<u16>,
    /// Let the host kernel work on the queues where it can.
    pub vhost: bool,
    /// Offer the guest no offloads: frames have checksums and the size of the MTU.
    pub plain: bool,
}

/// What the device has done.
#[derive(Debug, Default, Serialize)]
pub(super) struct Metrics {
    pub rx_packets: u64,
    pub rx_bytes: u64,
    pub rx_starved: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    pub tx_dropped: u64,
    pub errors: u64,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    mac: [u8; 6],
    mtu: Option<u16>,
    link_up: bool,
}

/// A network device on a tap.
#[derive(Debug)]
pub struct Net {
    tap: Tap,
    mac: [u8; 6],
    mtu: Option<u16>,
    link_up: bool,
    want_vhost: bool,
    plain: bool,
    kernel: Option<Kernel>,
    queues: Vec<Queue>,
    activation: Option<Activation>,
    events: Option<Arc<[EventFd]>>,
    watching: bool,
    rx: Rx,
    buffers: Buffers,
    iovecs: Iovecs,
    pub(super) metrics: Metrics,
    log: GuestLog,
}

impl Net {
    /// A device on `tap`.
    pub fn new(tap: Tap, options: &NetOptions) -> Self {
        Self {
            want_vhost: options.vhost && tap.is_real(),
            plain: options.plain,
            tap,
            mac: options.mac.unwrap_or_else(random_mac),
            mtu: options.mtu,
            link_up: true,
            kernel: None,
            queues: Vec::new(),
            activation: None,
            events: None,
            watching: false,
            rx: Rx::default(),
            buffers: Buffers::default(),
            iovecs: Iovecs::default(),
            metrics: Metrics::default(),
            log: GuestLog::new("net"),
        }
    }

    /// The guest's address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Name of the tap.
    pub fn tap_name(&self) -> &str {
        self.tap.name()
    }

    /// True while the host kernel works on the queues.
    pub fn uses_vhost(&self) -> bool {
        self.kernel.as_ref().is_some_and(Kernel::is_running)
    }

    /// Plugs the cable in or pulls it, as the guest sees it.
    pub fn set_link(&mut self, up: bool) {
        if self.link_up != up {
            self.link_up = up;
            if let Some(activation) = &self.activation {
                activation.interrupt.trigger(InterruptKind::ConfigChange);
            }
        }
    }

    /// The first thing on the event loop: settles the tap and who works on the queues.
    pub(super) fn start(&mut self) {
        let Some(activation) = &self.activation else {
            return;
        };
        if let Err(e) = self.tap.set_offload(activation.features) {
            log::error!("net: tap {}: cannot set offloads: {e}", self.tap.name());
            activation.interrupt.fail();
            return;
        }
        let mem = activation.mem.clone();
        self.open_vhost(mem);
        self.start_kernel();
    }

    /// Opens vhost-net for guest memory `mem`, if it is wanted and not open yet. For those who make
    /// a VM whose device thread may not open files; else the device does it itself.
    pub fn open_vhost(&mut self, mem: GuestMemory) {
        if !self.want_vhost || self.kernel.is_some() {
            return;
        }
        match Kernel::open(mem) {
            Ok(kernel) => self.kernel = Some(kernel),
            Err(e) => {
                self.want_vhost = false;
                log::warn!(
                    "net: tap {}: vhost-net is not to be had ({e}), going on without it; \
                     load the vhost_net module to use it",
                    self.tap.name()
                );
            }
        }
    }

    fn start_kernel(&mut self) {
        let (Some(kernel), Some(activation), Some(events)) =
            (&mut self.kernel, &self.activation, &self.events)
        else {
            return;
        };
        if kernel.is_running() || !self.queues.iter().all(QueueT::ready) {
            return;
        }
        let started = kernel.start(
            &self.tap,
            &activation.mem,
            &self.queues,
            events,
            &activation.interrupt,
            activation.features,
        );
        if let Err(e) = started {
            log::warn!(
                "net: tap {}: vhost-net cannot take the queues ({e}), going on without it",
                self.tap.name()
            );
            self.want_vhost = false;
            self.kernel = None;
        }
    }

    fn stop_kernel(&mut self) {
        if let (Some(kernel), Some(activation)) = (&mut self.kernel, &self.activation) {
            kernel.stop(&activation.mem, &mut self.queues, &activation.interrupt);
        }
    }

    pub(super) fn receive(&mut self) {
        if self.uses_vhost() {
            return;
        }
        let (Some(activation), Some(queue)) = (&self.activation, self.queues.get_mut(RX)) else {
            return;
        };
        if !queue.ready() || activation.interrupt.needs_reset() {
            return;
        }
        let mem = activation.mem.memory();
        let features = activation.features;
        let frame = if features & (F_GUEST_TSO4 | F_GUEST_TSO6) != 0 {
            MAX_FRAME
        } else {
            let mtu = u64::from(self.mtu.unwrap_or(0)).max(1500);
            io::HEADER as u64 + 18 + mtu
        };
        let mut turn = RxTurn {
            queue,
            mem: &mem,
            tap: &self.tap,
            buffers: &mut self.buffers,
            iovecs: &mut self.iovecs,
            metrics: &mut self.metrics,
            log: &self.log,
            mergeable: features & F_MRG_RXBUF != 0,
            frame,
            used: false,
        };
        let result = self.rx.run(&mut turn);
        if turn.used {
            signal(turn.queue, &mem, &activation.interrupt);
        }
        self.after(RX, result.map(|stopped| stopped == Stopped::Budget));
    }

    pub(super) fn transmit(&mut self) {
        if self.uses_vhost() {
            return;
        }
        let (Some(activation), Some(queue)) = (&self.activation, self.queues.get_mut(TX)) else {
            return;
        };
        let mem = activation.mem.memory();
        let (tap, buffers, iovecs) = (&self.tap, &mut self.buffers, &mut self.iovecs);
        let (metrics, log) = (&mut self.metrics, &self.log);
        let result = drain(
            queue,
            &mem,
            &activation.interrupt,
            io::BUDGET,
            |mem, chain| {
                match buffers.fill(mem, chain, io::MAX_DESCRIPTORS) {
                    Ok(()) => io::transmit(tap, mem, buffers, iovecs, metrics),
                    Err(e) => {
                        metrics.errors += 1;
                        log.warn(format_args!("frame refused: {e}"));
                    }
                }
                Some(0)
            },
        );
        self.after(TX, result.map(|drained| drained.more));
    }

    /// Comes again for what a turn left, or gives up on a ring that makes no sense.
    fn after(&self, queue: usize, result: Result<bool, QueueError>) {
        match result {
            Ok(true) => {
                if let Some(event) = self.events.as_ref().and_then(|e| e.get(queue)) {
                    let _ = event.write(1);
                }
            }
            Ok(false) => {}
            Err(e) => {
                self.log.warn(format_args!("{e}"));
                if let Some(activation) = &self.activation {
                    activation.interrupt.fail();
                }
            }
        }
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn device_type(&self) -> u32 {
        1
    }

    fn queue_max_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let mtu = if self.mtu.is_some() { F_MTU } else { 0 };
        let offloads = match self.plain {
            true => 0,
            false => OFFLOADS,
        };
        F_MAC | F_MRG_RXBUF | F_STATUS | offloads | mtu
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        let (mac, rest) = config.split_at_mut(6);
        mac.copy_from_slice(&self.mac);
        let status = if self.link_up { LINK_UP } else { 0 };
        let words = [status, 1, self.mtu.unwrap_or(0)];
        for (to, word) in rest.chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        crate::virtio::read_config(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        self.queues = std::mem::take(&mut activation.queues);
        self.activation = Some(activation);
        Ok(())
    }

    fn on_activated(&mut self, ops: &mut EventOps) {
        self.start();
        if self.uses_vhost() {
            return;
        }
        // Edge-triggered: a guest without buffers must not keep the loop awake.
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        match ops.add(Events::with_data(&self.tap, TAP_TOKEN, set)) {
            Ok(()) => self.watching = true,
            Err(e) => {
                log::error!("net: tap {}: cannot watch it: {e}", self.tap.name());
                if let Some(activation) = &self.activation {
                    activation.interrupt.fail();
                }
            }
        }
    }

    fn handle_queue(&mut self, index: u16, _ops: &mut EventOps) {
        match usize::from(index) {
            RX => self.receive(),
            TX => self.transmit(),
            _ => {}
        }
    }

    fn handle_event(&mut self, token: u32, _set: EventSet, _ops: &mut EventOps) {
        if token == TAP_TOKEN {
            self.receive();
        }
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.stop_kernel();
        self.activation = None;
        self.rx.clear();
        self.buffers = Buffers::default();
        self.iovecs = Iovecs::default();
        std::mem::take(&mut self.queues)
    }

    fn on_deactivated(&mut self, ops: &mut EventOps) {
        if std::mem::take(&mut self.watching) {
            let _ = ops.remove(Events::empty(&self.tap));
        }
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn set_queue_events(&mut self, events: Arc<[EventFd]>) {
        self.events = Some(events);
    }

    fn kernel_reads_queue_events(&self) -> bool {
        self.uses_vhost()
    }

    fn quiesce(&mut self) {
        self.stop_kernel();
    }

    fn resume(&mut self) {
        let had_kernel = self.kernel.is_some();
        self.start_kernel();
        if had_kernel && !self.uses_vhost() {
            // The event loop has handed the queues' events over and does not watch the tap: only
            // a new start by the driver gets the device going again.
            if let Some(activation) = &self.activation {
                activation.interrupt.fail();
            }
        }
    }

    fn save(&self) -> serde_json::Value {
        json!(Saved {
            version: 1,
            mac: self.mac,
            mtu: self.mtu,
            link_up: self.link_up,
        })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let bad = |reason: String| StateError {
            device: "net",
            reason,
        };
        let saved = Saved::deserialize(state).map_err(|e| bad(e.to_string()))?;
        if saved.version != 1 {
            return Err(bad(format!("it has version {}, not 1", saved.version)));
        }
        self.mac = saved.mac;
        self.mtu = saved.mtu;
        self.link_up = saved.link_up;
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        json!({ "tap": self.tap.name(), "vhost": self.uses_vhost(), "counters": self.metrics })
    }
}

/// A random unicast address of the locally administered range.
fn random_mac() -> [u8; 6] {
    let mut mac = [0u8; 6];
    // SAFETY: pointer and length are those of the array. A short read cannot happen at this size;
    // if it could, the address would still be valid.
    unsafe { libc::getrandom(mac.as_mut_ptr().cast(), mac.len(), 0) };
    mac[0] = (mac[0] & 0xfc) | 2;
    mac
}
