//! The transport seen by a driver, with a device that notes what happens to it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::event_loop::EventLoop;
use crate::virtio::{DeviceError, InterruptKind};

const FEATURE: u64 = 1 << 5;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Activate(u64),
    OnActivated,
    Queue(u16),
    Deactivate,
    OnDeactivated,
}

struct Probe {
    seen: Sender<Seen>,
    queues: Vec<Queue>,
    config: [u8; 4],
    refuse: bool,
}

impl VirtioDevice for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }

    fn device_type(&self) -> u32 {
        42
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::super::read_config(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (0, Ok(config)) = (offset, data.try_into()) {
            self.config = config;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if self.refuse {
            return Err(DeviceError::BadSetup {
                device: "probe",
                reason: "told to refuse".to_owned(),
            });
        }
        let _ = self.seen.send(Seen::Activate(activation.features));
        self.queues = activation.queues;
        Ok(())
    }

    fn on_activated(&mut self, _: &mut EventOps) {
        let _ = self.seen.send(Seen::OnActivated);
    }

    fn handle_queue(&mut self, index: u16, _: &mut EventOps) {
        let _ = self.seen.send(Seen::Queue(index));
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let _ = self.seen.send(Seen::Deactivate);
        std::mem::take(&mut self.queues)
    }

    fn on_deactivated(&mut self, _: &mut EventOps) {
        let _ = self.seen.send(Seen::OnDeactivated);
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> serde_json::Value {
        json!({ "config": self.config })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        self.config = serde_json::from_value(state["config"].clone()).map_err(|e| StateError {
            device: "probe",
            reason: e.to_string(),
        })?;
        Ok(())
    }
}

fn memory() -> GuestMemory {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    GuestMemory::new(mem)
}

fn transport_with(refuse: bool) -> (Arc<MmioTransport>, Receiver<Seen>) {
    let (seen, rx) = channel();
    let probe = Probe {
        seen,
        queues: Vec::new(),
        config: [1, 2, 3, 4],
        refuse,
    };
    let interrupt = Interrupt::new().unwrap();
    let transport = MmioTransport::new(memory(), Box::new(probe), interrupt).unwrap();
    (transport, rx)
}

fn transport() -> (Arc<MmioTransport>, Receiver<Seen>) {
    transport_with(false)
}

fn get(t: &MmioTransport, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    t.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn set(t: &MmioTransport, offset: u64, value: u32) {
    t.write(offset, &value.to_le_bytes());
}

/// Up to and with FEATURES_OK.
fn negotiate(t: &MmioTransport, features: u64) {
    set(t, reg::STATUS, 0);
    set(t, reg::STATUS, 1);
    set(t, reg::STATUS, 3);
    for half in 0..2 {
        set(t, reg::DRIVER_FEATURES_SEL, half);
        set(t, reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
    }
    set(t, reg::STATUS, 0xb);
}

fn set_up_queue(t: &MmioTransport, index: u32, size: u32) {
    let base = 0x1000 * (index + 1);
    set(t, reg::QUEUE_SEL, index);
    set(t, reg::QUEUE_NUM, size);
    set(t, reg::QUEUE_DESC_LOW, base);
    set(t, reg::QUEUE_DESC_HIGH, 0);
    set(t, reg::QUEUE_DRIVER_LOW, base + 0x400);
    set(t, reg::QUEUE_DRIVER_HIGH, 0);
    set(t, reg::QUEUE_DEVICE_LOW, base + 0x800);
    set(t, reg::QUEUE_DEVICE_HIGH, 0);
    set(t, reg::QUEUE_READY, 1);
}

fn drive_ok(t: &MmioTransport) {
    negotiate(t, feature::ALL | FEATURE);
    assert_eq!(get(t, reg::STATUS), 0xb);
    set_up_queue(t, 0, 16);
    set_up_queue(t, 1, 4);
    set(t, reg::STATUS, 0xf);
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn identity_and_absent_things() {
    let (t, _rx) = transport();
    assert_eq!(get(&t, reg::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(get(&t, reg::VERSION), 2);
    assert_eq!(get(&t, reg::DEVICE_ID), 42);
    for offset in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(get(&t, offset), u32::MAX, "no shared memory");
    }
    assert_eq!(get(&t, 0xc0), 0, "no queue reset");
    set(&t, reg::QUEUE_SEL, 2);
    assert_eq!(get(&t, reg::QUEUE_NUM_MAX), 0);
    set(&t, reg::QUEUE_SEL, 1);
    assert_eq!(get(&t, reg::QUEUE_NUM_MAX), 8);
    // Registers answer aligned 32-bit accesses only.
    let mut byte = [0xff];
    t.read(reg::MAGIC_VALUE, &mut byte);
    assert_eq!(byte, [0]);
    assert_eq!(get(&t, 2), 0);
    // Configuration space answers any width, with zeros past its end.
    let mut config = [0xff; 8];
    t.read(0x102, &mut config);
    assert_eq!(config, [3, 4, 0, 0, 0, 0, 0, 0]);
    t.read(u64::MAX, &mut config);
    assert_eq!(config, [0; 8]);
}

#[test]
fn features_by_selector() {
    let (t, _rx) = transport();
    let offered = feature::ALL | FEATURE;
    for (selector, expected) in [(0, offered as u32), (1, (offered >> 32) as u32), (2, 0)] {
        set(&t, reg::DEVICE_FEATURES_SEL, selector);
        assert_eq!(get(&t, reg::DEVICE_FEATURES), expected);
    }
    // Not offered, or without VERSION_1: FEATURES_OK does not stick.
    negotiate(&t, feature::VERSION_1 | 1 << 40);
    assert_eq!(get(&t, reg::STATUS), 3);
    negotiate(&t, FEATURE);
    assert_eq!(get(&t, reg::STATUS), 3);
    negotiate(&t, feature::VERSION_1);
    assert_eq!(get(&t, reg::STATUS), 0xb);
}

#[test]
fn status_goes_forward_only() {
    let (t, rx) = transport();
    for nonsense in [2, 4, 8, 0xf0, 0x10, u32::MAX, 6] {
        set(&t, reg::STATUS, nonsense & !0x80);
        assert_eq!(get(&t, reg::STATUS), 0, "{nonsense:#x}");
    }
    drive_ok(&t);
    assert_eq!(get(&t, reg::STATUS), 0xf);
    assert_eq!(
        rx.try_recv(),
        Ok(Seen::Activate(feature::ALL | FEATURE)),
        "activated with the negotiated features"
    );
    set(&t, reg::STATUS, 3);
    assert_eq!(get(&t, reg::STATUS), 0xf, "bits cannot be taken back");
    set(&t, reg::STATUS, 0x8f);
    assert_eq!(get(&t, reg::STATUS), 0x8f);
    assert_eq!(rx.try_recv(), Ok(Seen::Deactivate));
    set(&t, reg::STATUS, 0);
    assert_eq!(get(&t, reg::STATUS), 0);
    assert!(rx.try_recv().is_err());
}

#[test]
fn queues_are_set_up_only_when_allowed() {
    let (t, _rx) = transport();
    set_up_queue(&t, 0, 16);
    assert_eq!(get(&t, reg::QUEUE_READY), 0, "too early");
    drive_ok(&t);
    set(&t, reg::QUEUE_SEL, 0);
    set(&t, reg::QUEUE_READY, 0);
    set(&t, reg::QUEUE_DESC_LOW, 0xdead_0000);
    assert_eq!(get(&t, reg::QUEUE_READY), 1, "too late");
    let queues = t.save().queues;
    assert_eq!(queues[0].desc_table, 0x1000);
    assert_eq!((queues[0].size, queues[1].size), (16, 4));
    set(&t, reg::STATUS, 0);
    assert_eq!(get(&t, reg::QUEUE_READY), 0);
    assert_eq!(t.save().queues[1].size, 8);
}

#[test]
fn bad_queues_need_a_reset_and_can_be_repaired() {
    let (t, rx) = transport();
    for (offset, value) in [
        (reg::QUEUE_DESC_LOW, 0x1001),
        (reg::QUEUE_DESC_LOW, 0xfff0),
        (reg::QUEUE_DRIVER_LOW, 0),
        (reg::QUEUE_DEVICE_HIGH, u32::MAX),
    ] {
        negotiate(&t, feature::VERSION_1);
        set_up_queue(&t, 0, 16);
        set(&t, reg::QUEUE_READY, 0);
        set(&t, offset, value);
        set(&t, reg::QUEUE_READY, 1);
        set(&t, reg::STATUS, 0xf);
        assert_eq!(get(&t, reg::STATUS), 0x4f, "{offset:#x} {value:#x}");
        assert_eq!(get(&t, reg::INTERRUPT_STATUS), 2);
        assert!(rx.try_recv().is_err(), "the device did not see it");
    }
    drive_ok(&t);
    assert_eq!(get(&t, reg::STATUS), 0xf);
    assert_eq!(get(&t, reg::INTERRUPT_STATUS), 0);

    let (t, _rx) = transport_with(true);
    drive_ok(&t);
    assert_eq!(get(&t, reg::STATUS), 0x4f);
}

#[test]
fn interrupts_do_not_take_the_device_lock() {
    let (t, _rx) = transport();
    let before = get(&t, reg::CONFIG_GENERATION);
    t.with_device(|_| {
        // The lock is held here: these would deadlock if they took it.
        t.interrupt().trigger(InterruptKind::UsedBuffer);
        t.interrupt().trigger(InterruptKind::ConfigChange);
        assert_eq!(get(&t, reg::INTERRUPT_STATUS), 3);
        set(&t, reg::INTERRUPT_ACK, 1);
        assert_eq!(get(&t, reg::INTERRUPT_STATUS), 2);
        assert_eq!(get(&t, reg::CONFIG_GENERATION), before + 1);
        set(&t, reg::QUEUE_NOTIFY, 1);
        set(&t, reg::QUEUE_NOTIFY, 77);
    });
    assert_eq!(t.queue_events()[1].read().unwrap(), 1);
}

#[test]
fn life_on_the_event_loop() {
    let (t, rx) = transport();
    let event_loop = EventLoop::spawn("test").unwrap();
    event_loop.attach(Arc::clone(&t)).unwrap();
    let next = || rx.recv_timeout(LONG).unwrap();
    // Queues are looked at once DRIVER_OK is set: notifications before it are dropped.
    drive_ok(&t);
    assert!(matches!(next(), Seen::Activate(_)));
    assert_eq!(next(), Seen::OnActivated);
    assert_eq!((next(), next()), (Seen::Queue(0), Seen::Queue(1)));
    set(&t, reg::QUEUE_NOTIFY, 1);
    assert_eq!(next(), Seen::Queue(1));
    // A reset and a new life before the loop has seen the end of the old one.
    event_loop.pause();
    set(&t, reg::STATUS, 0);
    assert_eq!(next(), Seen::Deactivate);
    drive_ok(&t);
    assert!(rx.try_recv().is_err(), "waits for the loop");
    event_loop.resume();
    assert_eq!(next(), Seen::OnDeactivated);
    assert!(matches!(next(), Seen::Activate(_)));
    assert_eq!(next(), Seen::OnActivated);
    assert_eq!((next(), next()), (Seen::Queue(0), Seen::Queue(1)));
    t.kick_all();
    let mut kicked = [next(), next()];
    kicked.sort_by_key(|s| format!("{s:?}"));
    assert_eq!(kicked, [Seen::Queue(0), Seen::Queue(1)]);
    event_loop.stop();
}

#[test]
fn save_and_restore() {
    let (t, _rx) = transport();
    drive_ok(&t);
    t.write(0x100, &[9, 9, 9, 9]);
    t.interrupt().trigger(InterruptKind::ConfigChange);
    t.with_device(|d| {
        let probe = (d as &mut dyn std::any::Any).downcast_mut::<Probe>();
        probe.unwrap().queues[0].set_next_avail(7);
    });
    let state = t.save();
    assert_eq!(state.queues[0].next_avail, 7);
    let text = serde_json::to_string(&state).unwrap();
    let state: TransportState = serde_json::from_str(&text).unwrap();

    let (other, rx) = transport();
    other.restore(&state).unwrap();
    assert!(matches!(rx.try_recv(), Ok(Seen::Activate(_))));
    assert_eq!(other.save(), state);
    assert!(
        other.interrupt().event().read().is_ok(),
        "the line is raised again"
    );
    assert_eq!(get(&other, 0x100), 0x0909_0909);
    assert_eq!(other.describe()["queues"][0]["next_avail"], 7);
    assert!(other.restore(&state).is_err(), "already in use");

    let break_with = |f: &dyn Fn(&mut TransportState)| {
        let (fresh, _rx) = transport();
        let mut bad = state.clone();
        f(&mut bad);
        assert!(fresh.restore(&bad).is_err());
        assert_eq!(get(&fresh, reg::STATUS), 0, "as new");
    };
    break_with(&|s| s.version = 9);
    break_with(&|s| s.device_type = 1);
    break_with(&|s| s.queues.truncate(1));
    break_with(&|s| s.queues[0].size = 3);
    break_with(&|s| s.queues[0].size = 32);
    break_with(&|s| s.queues[0].desc_table = u64::MAX - 15);
    break_with(&|s| s.driver_features |= 1 << 50);
    break_with(&|s| s.status = 0x1000);
    break_with(&|s| s.device = serde_json::Value::Null);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a guest writes, the transport stays in a state the specification knows.
    #[test]
    fn any_register_traffic(ops in proptest::collection::vec(
        (prop_oneof![0u64..0x110, any::<u64>()], any::<u32>(), 0usize..9, any::<bool>()), 0..200)
    ) {
        let (t, _rx) = transport();
        drive_ok(&t);
        for (offset, value, len, read) in ops {
            let offset = if len == 4 && offset < 0x100 { offset & !3 } else { offset };
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            if read {
                t.read(offset, &mut data[..len]);
            } else {
                t.write(offset, &data[..len]);
            }
            let status = get(&t, reg::STATUS);
            prop_assert!(status & !0xcf == 0);
            prop_assert!(status & 4 == 0 || status & 0xb == 0xb);
        }
        let _ = t.describe();
        let _ = t.save();
    }
}
