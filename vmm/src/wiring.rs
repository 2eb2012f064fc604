//! Which devices a VM has, at which addresses and interrupt lines, on which threads.

use std::any::Any;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bulkhead_devices::GuestMemory;
use bulkhead_devices::event_loop::{EventLoop, EventLoopOptions};
use bulkhead_devices::legacy::{I8042, Rtc, Serial, Sleep, sleep};
use bulkhead_devices::virtio::balloon::Balloon;
use bulkhead_devices::virtio::blk::{Blk, Disk};
use bulkhead_devices::virtio::fs::{Caching, Fs, FsConfig, prepare_thread};
use bulkhead_devices::virtio::mem::Mem;
use bulkhead_devices::virtio::mmio::{MmioTransport, TransportState};
use bulkhead_devices::virtio::net::{Net, NetOptions, Tap};
use bulkhead_devices::virtio::rng::Rng;
use bulkhead_devices::virtio::vsock::{Vsock, VsockHandle};
use bulkhead_devices::virtio::{Interrupt, VirtioDevice};
use event_manager::{EventOps, EventSubscriber, Events};
use kvm_ioctls::{IoEventAddress, VmFd};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::VirtioPlace;
use crate::bus::Bus;
use crate::config::{Console, DiskConfig, DiskSource, VmConfig};
use crate::error::VmError;
use crate::layout;
use crate::memory::VmMemory;
use crate::seccomp;
use crate::vm::{ExitSlot, VmExit};

/// State of the devices that are not virtio.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LegacyState {
    serial: Value,
    rtc: Value,
    i8042: Value,
}

/// A virtio device at its place.
#[derive(Debug)]
struct Slot {
    transport: Arc<MmioTransport>,
    address: u64,
    irq: u32,
}

/// Work for a device thread, done when it is attached.
struct Once<F>(F);

impl<F: Fn()> EventSubscriber for Once<F> {
    fn process(&self, _: Events, _: &mut EventOps) {}

    fn init(&self, _: &mut EventOps) {
        (self.0)();
    }
}

/// All devices of a VM and the threads that run them.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(crate) pio: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) serial: Arc<Serial>,
    pub(crate) reset: Arc<AtomicBool>,
    pub(crate) vsock: Option<VsockHandle>,
    rtc: Arc<Rtc>,
    i8042: Arc<I8042>,
    slots: Vec<Slot>,
    /// Indices of the disk slots that may be filled later.
    spare_disks: Vec<usize>,
    /// Index of the device that adds memory.
    room: Option<usize>,
    loops: Vec<(seccomp::Role, EventLoop)>,
}

/// Which thread runs a device: file system requests may wait for the host's disk, and must not
/// hold up the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Io,
    Fs,
}

impl Devices {
    /// Makes all devices of `config` and connects them to the VM.
    pub(crate) fn new(
        config: &mut VmConfig,
        vm_fd: &VmFd,
        memory: &VmMemory,
        exit: &Arc<ExitSlot>,
    ) -> Result<Self, VmError> {
        let mut pio = Bus::default();
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let event = || event().map_err(VmError::host("device event"));

        let serial_irq = event()?;
        vm_fd
            .register_irqfd(&serial_irq, layout::SERIAL_IRQ)
            .map_err(VmError::kvm("KVM_IRQFD"))?;
        let sink: Box<dyn Write + Send> = match std::mem::take(&mut config.console) {
            Console::None => Box::new(io::sink()),
            Console::Writer(writer) => writer,
        };
        let serial = Arc::new(Serial::new(serial_irq, sink));
        pio.insert(u64::from(layout::SERIAL_PORT), 8, "serial", serial.clone());
        let rtc = Arc::new(Rtc::new());
        pio.insert(u64::from(layout::RTC_PORT), 2, "rtc", rtc.clone());
        let reset = Arc::new(AtomicBool::new(false));
        let i8042 = Arc::new(I8042::new(Arc::clone(&reset)));
        pio.insert(u64::from(layout::I8042_PORT), 5, "i8042", i8042.clone());
        let off = Sleep::new(Arc::clone(&reset), layout::ACPI_SLEEP_TYPE_OFF);
        pio.insert(
            u64::from(layout::ACPI_SLEEP_PORT),
            u64::from(sleep::LEN),
            "acpi-sleep",
            Arc::new(off),
        );

        let mut wiring = Wiring {
            vm_fd,
            mem: GuestMemory::new(memory.mmap().clone()),
            mmio: Bus::default(),
            slots: Vec::new(),
            roles: Vec::new(),
            spare_disks: Vec::new(),
            room: None,
        };
        let vsock = wiring.add_all(config, memory)?;

        let mut devices = Self {
            pio: Arc::new(pio),
            mmio: Arc::new(wiring.mmio),
            serial,
            reset,
            vsock,
            rtc,
            i8042,
            slots: wiring.slots,
            spare_disks: wiring.spare_disks,
            room: wiring.room,
            loops: Vec::new(),
        };
        devices.spawn_loops(config, &wiring.roles, exit)?;
        Ok(devices)
    }

    fn spawn_loops(
        &mut self,
        config: &VmConfig,
        roles: &[Role],
        exit: &Arc<ExitSlot>,
    ) -> Result<(), VmError> {
        for (role, name, filter) in [
            (Role::Io, "dev", seccomp::Role::Devices),
            (Role::Fs, "fs", seccomp::Role::Files),
        ] {
            if !roles.contains(&role) {
                continue;
            }
            let exit = Arc::clone(exit);
            let confined = config.seccomp;
            let event_loop = EventLoop::spawn_with(EventLoopOptions {
                name: format!("{name}:{}", config.id),
                on_start: Some(Box::new(move || {
                    if role == Role::Fs {
                        // What it gives up and keeps as a server of files, before it may no more.
                        prepare_thread();
                    }
                    if confined {
                        seccomp::enter(filter)?;
                    }
                    Ok(())
                })),
                after_turn: seccomp::breach,
                on_failure: Box::new(move |reason| {
                    exit.set(VmExit::Error(format!(
                        "internal error in a device: {reason}"
                    )));
                }),
                ..EventLoopOptions::default()
            })
            .map_err(VmError::host(
                "starting a device thread (with --no-seccomp it is not confined)",
            ))?;
            for (slot, of_slot) in self.slots.iter().zip(roles) {
                if *of_slot == role {
                    event_loop
                        .attach(Arc::clone(&slot.transport))
                        .map_err(VmError::host("attaching a device to its thread"))?;
                }
            }
            self.loops.push((filter, event_loop));
        }
        Ok(())
    }

    /// The kernel command line: defaults, devices, then what the caller adds.
    pub(crate) fn cmdline(&self, config: &VmConfig) -> String {
        let mut line = String::new();
        if !config.bare_cmdline {
            // i8042 reset is the orderly end; a panic resets at once and is found on the console.
            // The rest keeps an idle guest from waking up: no TSC watchdog, pressure accounting,
            // proactive compaction; VM statistics every ten seconds, managed neighbours every minute.
            line.push_str(
                "console=ttyS0 reboot=k panic=-1 8250.nr_uarts=1 tsc=reliable psi=0 \
                 sysctl.vm.compaction_proactiveness=0 sysctl.vm.stat_interval=10 \
                 sysctl.net.ipv4.neigh.default.interval_probe_time_ms=60000 \
                 sysctl.net.ipv6.neigh.default.interval_probe_time_ms=60000",
            );
        }
        if config.most_vcpus() > config.vcpus {
            // The others do not answer before they are made.
            let _ =
                std::fmt::Write::write_fmt(&mut line, format_args!(" maxcpus={}", config.vcpus));
        }
        if self.room.is_some() {
            // So that it can be given back, too.
            line.push_str(" memhp_default_state=online_movable");
        }
        for slot in &self.slots {
            let _ = std::fmt::Write::write_fmt(
                &mut line,
                format_args!(" virtio_mmio.device=4K@{:#x}:{}", slot.address, slot.irq),
            );
        }
        if !config.cmdline.is_empty() {
            line.push(' ');
            line.push_str(&config.cmdline);
        }
        line.trim().to_owned()
    }

    /// Where the virtio devices of this VM are.
    pub(crate) fn places(&self) -> Vec<VirtioPlace> {
        let place = |slot: &Slot| VirtioPlace {
            address: slot.address,
            irq: slot.irq,
        };
        self.slots.iter().map(place).collect()
    }

    pub(crate) fn start(&self) {
        for (_, event_loop) in &self.loops {
            event_loop.resume();
        }
    }

    pub(crate) fn pause(&self) {
        for (_, event_loop) in &self.loops {
            event_loop.pause();
        }
    }

    pub(crate) fn resume(&self) {
        for (_, event_loop) in &self.loops {
            event_loop.resume();
        }
        for slot in &self.slots {
            slot.transport.kick_all();
        }
    }

    pub(crate) fn stop(&self) {
        for (_, event_loop) in &self.loops {
            event_loop.stop();
        }
        if let Some(vsock) = &self.vsock {
            vsock.close();
        }
    }

    /// Runs `job` on the thread of a role.
    pub(crate) fn run_on(
        &self,
        role: seccomp::Role,
        job: impl Fn() + Send + Sync + 'static,
    ) -> Result<(), VmError> {
        let (_, event_loop) = self
            .loops
            .iter()
            .find(|(of, _)| *of == role)
            .ok_or_else(|| VmError::NotRunning(format!("this VM has no thread {role:?}")))?;
        event_loop
            .attach(Arc::new(Once(job)))
            .map_err(VmError::host("giving work to a device thread"))
    }

    /// The device of a slot that may be filled.
    fn spare_disk(&self, slot: usize) -> Result<&MmioTransport, VmError> {
        self.spare_disks
            .get(slot)
            .and_then(|index| self.slots.get(*index))
            .map(|slot| &*slot.transport)
            .ok_or_else(|| VmError::Config {
                what: "disk slot",
                reason: format!(
                    "{slot}: this VM has {} spare slots, numbered from 0",
                    self.spare_disks.len()
                ),
            })
    }

    pub(crate) fn detach_disk(&self, slot: usize) -> Result<(), VmError> {
        let disk = self.spare_disk(slot)?.with_device(|device| {
            (device as &mut dyn Any)
                .downcast_mut::<Blk>()
                .and_then(Blk::detach)
        });
        // Closed here, without the device's lock: a block device may be written back first.
        drop(disk);
        Ok(())
    }

    pub(crate) fn attach_disk(&self, slot: usize, disk: DiskConfig) -> Result<(), VmError> {
        let transport = self.spare_disk(slot)?;
        let disk = open_disk(disk)?;
        let attached = transport.with_device(|device| {
            (device as &mut dyn Any)
                .downcast_mut::<Blk>()
                .is_some_and(|blk| blk.attach(disk).is_ok())
        });
        if attached {
            Ok(())
        } else {
            Err(VmError::Config {
                what: "disk slot",
                reason: format!("{slot} is taken: choose another"),
            })
        }
    }

    /// Does something with the device that adds memory; `None`: there is none.
    pub(crate) fn with_room<R>(&self, work: impl FnOnce(&mut Mem) -> R) -> Option<R> {
        let slot = self.room.and_then(|index| self.slots.get(index))?;
        slot.transport
            .with_device(|device| (device as &mut dyn Any).downcast_mut::<Mem>().map(work))
    }

    pub(crate) fn describe(&self) -> Value {
        let mut all: Vec<Value> = self
            .pio
            .map()
            .map(|(name, start, len)| {
                json!({"name": name, "port": format!("{start:#x}"), "ports": len})
            })
            .collect();
        for slot in &self.slots {
            let mut value = slot.transport.describe();
            if let Some(object) = value.as_object_mut() {
                object.insert("address".into(), json!(format!("{:#x}", slot.address)));
                object.insert("irq".into(), json!(slot.irq));
                object.insert(
                    "interrupts".into(),
                    json!(slot.transport.interrupt().count()),
                );
            }
            all.push(value);
        }
        json!(all)
    }

    pub(crate) fn metrics(&self) -> BTreeMap<String, Value> {
        let (written, read) = self.serial.counters();
        let mut all = BTreeMap::new();
        all.insert(
            "serial".into(),
            json!({"bytes_out": written, "bytes_in": read}),
        );
        for (index, slot) in self.slots.iter().enumerate() {
            all.insert(
                format!("{}{index}", slot.transport.name()),
                slot.transport.with_device(|device| device.metrics()),
            );
        }
        all
    }

    pub(crate) fn save(&self) -> Vec<TransportState> {
        self.slots.iter().map(|s| s.transport.save()).collect()
    }

    pub(crate) fn save_legacy(&self) -> LegacyState {
        LegacyState {
            serial: self.serial.save(),
            rtc: self.rtc.save(),
            i8042: self.i8042.save(),
        }
    }

    pub(crate) fn restore(
        &self,
        states: &[TransportState],
        legacy: &LegacyState,
    ) -> Result<(), VmError> {
        if states.len() != self.slots.len() {
            return Err(VmError::State(format!(
                "the state has {} virtio devices, the configuration {}",
                states.len(),
                self.slots.len()
            )));
        }
        for (slot, state) in self.slots.iter().zip(states) {
            slot.transport.restore(state)?;
        }
        self.serial.restore(&legacy.serial)?;
        self.rtc.restore(&legacy.rtc)?;
        self.i8042.restore(&legacy.i8042)?;
        Ok(())
    }
}

fn open_disk(disk: DiskConfig) -> Result<Disk, VmError> {
    Ok(match disk.source {
        DiskSource::Path(path) => Disk::open(&path, disk.read_only, &disk.serial)?,
        DiskSource::File(file) => {
            Disk::from_file(file, Path::new("(open file)"), disk.read_only, &disk.serial)?
        }
        DiskSource::Joined(files) => Disk::joined(files, Path::new("(open files)"), &disk.serial)?,
    })
}

/// Gives each virtio device the next address and interrupt line.
struct Wiring<'a> {
    vm_fd: &'a VmFd,
    mem: GuestMemory,
    mmio: Bus,
    slots: Vec<Slot>,
    roles: Vec<Role>,
    spare_disks: Vec<usize>,
    room: Option<usize>,
}

impl Wiring<'_> {
    fn add_all(
        &mut self,
        config: &mut VmConfig,
        memory: &VmMemory,
    ) -> Result<Option<VsockHandle>, VmError> {
        for disk in config.disks.drain(..) {
            self.add(Role::Io, Box::new(Blk::new(open_disk(disk)?)))?;
        }
        for _ in 0..config.spare_disk_slots {
            self.spare_disks.push(self.slots.len());
            self.add(Role::Io, Box::new(Blk::spare()))?;
        }
        if config.rng {
            self.add(Role::Io, Box::new(Rng::new()))?;
        }
        if let Some((address, bytes)) = memory.room() {
            self.room = Some(self.slots.len());
            self.add(Role::Io, Box::new(Mem::new(address, bytes)?))?;
        }
        if config.balloon {
            let page = if config.hugepages { 2 << 20 } else { 4096 };
            self.add(Role::Io, Box::new(Balloon::with_host_page(page)))?;
        }
        for net in config.nets.drain(..) {
            let tap = match net.fd {
                Some(fd) => Tap::from_fd(fd)?,
                None => Tap::open(&net.tap)?,
            };
            let options = NetOptions {
                mac: net.mac,
                mtu: net.mtu,
                vhost: net.vhost,
                plain: net.plain,
            };
            let mut net = Net::new(tap, &options);
            net.open_vhost(self.mem.clone());
            self.add(Role::Io, Box::new(net))?;
        }
        for share in config.shares.drain(..) {
            let mut fs = FsConfig::new(share.tag, &share.root)?;
            fs.read_only = share.read_only;
            fs.caching = share.caching;
            fs.upper_layers = share.upper_layers;
            fs.fixed_top = share.fixed_top;
            fs.writeback = share.caching == Caching::Always;
            self.add(Role::Fs, Box::new(Fs::new(fs)?))?;
        }
        let mut handle = None;
        if let Some(cid) = config.vsock_cid {
            let vsock = Vsock::new(cid)?;
            handle = Some(vsock.handle());
            self.add(Role::Io, Box::new(vsock))?;
        }
        Ok(handle)
    }

    fn add(&mut self, role: Role, device: Box<dyn VirtioDevice>) -> Result<(), VmError> {
        let index = self.slots.len();
        let address = layout::VIRTIO_MMIO_START + index as u64 * layout::VIRTIO_MMIO_SIZE;
        // Past the last free line, lines are shared.
        let irq = layout::VIRTIO_IRQS[index % layout::VIRTIO_IRQS.len()];
        let interrupt = Interrupt::new().map_err(VmError::host("device interrupt"))?;
        self.vm_fd
            .register_irqfd(interrupt.event(), irq)
            .map_err(VmError::kvm("KVM_IRQFD"))?;
        let transport = MmioTransport::new(self.mem.clone(), device, interrupt)
            .map_err(VmError::host("device events"))?;
        let notify = IoEventAddress::Mmio(address + layout::VIRTIO_MMIO_NOTIFY);
        for (queue, event) in (0u32..).zip(transport.queue_events()) {
            self.vm_fd
                .register_ioevent(event, &notify, queue)
                .map_err(VmError::kvm("KVM_IOEVENTFD"))?;
        }
        self.mmio.insert(
            address,
            layout::VIRTIO_MMIO_SIZE,
            transport.name(),
            transport.clone(),
        );
        self.slots.push(Slot {
            transport,
            address,
            irq,
        });
        self.roles.push(role);
        Ok(())
    }
}
