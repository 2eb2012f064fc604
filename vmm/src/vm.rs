//! A virtual machine from creation to its end.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_devices::virtio::vsock::VsockHandle;
use kvm_bindings::{CpuId, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde_json::json;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, Loaded};
use crate::config::{DiskConfig, VmConfig};
use crate::cpu::thread::{Vcpu, VcpuEnv};
use crate::cpu::{cpuid, regs, state};
use crate::error::VmError;
use crate::kvm_check;
use crate::layout;
use crate::memory::VmMemory;
use crate::seccomp;
use crate::stats::{KvmStats, Marks, VcpuExits, VmStats};
use crate::wiring::Devices;

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// The guest asked for a reboot or power-off: the orderly end.
    Reset,
    /// We stopped it.
    Stopped,
    /// The guest's CPU gave up (fault while handling a fault while handling a fault).
    TripleFault {
        /// The vCPU.
        vcpu: u8,
        /// Where it stood, if KVM still knows.
        rip: u64,
    },
    /// The guest kernel reported a panic on its console.
    GuestPanic {
        /// The panic's message.
        message: String,
    },
    /// The VMM or KVM cannot go on with this VM.
    Error(String),
}

impl VmExit {
    /// Whether the VM ended the way it should.
    pub fn is_orderly(&self) -> bool {
        matches!(self, Self::Reset | Self::Stopped)
    }
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reset => f.write_str("the guest shut down"),
            Self::Stopped => f.write_str("the VM was stopped"),
            Self::TripleFault { vcpu, rip } => write!(
                f,
                "the guest crashed with a triple fault on vCPU {vcpu} (rip {rip:#x}): the kernel \
                 may not fit this machine type, or the image is damaged"
            ),
            Self::GuestPanic { message } => write!(f, "the guest kernel panicked: {message}"),
            Self::Error(message) => f.write_str(message),
        }
    }
}

/// The first reason to end, and those who wait for it.
#[derive(Debug)]
pub(crate) struct ExitSlot {
    exit: Mutex<Option<VmExit>>,
    changed: Condvar,
    event: EventFd,
}

impl ExitSlot {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            exit: Mutex::new(None),
            changed: Condvar::new(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Sets the reason unless there is one already.
    pub(crate) fn set(&self, exit: VmExit) {
        let mut slot = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(exit);
            self.changed.notify_all();
            let _ = self.event.write(1);
        }
    }

    fn get(&self) -> Option<VmExit> {
        self.exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn wait(&self, timeout: Option<Duration>) -> Option<VmExit> {
        let slot = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        match timeout {
            None => self
                .changed
                .wait_while(slot, |exit| exit.is_none())
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            Some(timeout) => self
                .changed
                .wait_timeout_while(slot, timeout, |exit| exit.is_none())
                .unwrap_or_else(PoisonError::into_inner)
                .0
                .clone(),
        }
    }
}

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Created,
    Running,
    Paused,
    Ended,
}

/// One virtual machine. Dropping it stops it and gives back everything it holds.
#[derive(Debug)]
pub struct Vm {
    // Order matters on drop: threads end before what they use.
    vcpus: Mutex<Vec<Vcpu>>,
    pub(crate) devices: Devices,
    pub(crate) exit: Arc<ExitSlot>,
    phase: Mutex<Phase>,
    marks: Arc<Marks>,
    counted: Option<Arc<crate::steps::Counted>>,
    kvm_vm_stats: Option<KvmStats>,
    kvm_vcpu_stats: Mutex<Vec<KvmStats>>,
    pub(crate) loaded: Option<Loaded>,
    pub(crate) cmdline: String,
    pub(crate) msr_list: Vec<u32>,
    pub(crate) vm_fd: Arc<VmFd>,
    pub(crate) memory: VmMemory,
    pub(crate) id: String,
    /// That it was made with.
    pub(crate) vcpu_count: u8,
    /// For those that come later.
    cpus: CpuPlan,
    cpu_env: VcpuEnv,
    /// Ends of the parts of the room for memory that the guest's CPUs reach.
    pub(crate) room_parts: Mutex<Vec<u64>>,
    debugger: Mutex<Option<crate::gdb::Debugger>>,
    /// Where the core of a crash goes; taken by the one who writes it.
    crash_core: Mutex<Option<PathBuf>>,
}

/// What every vCPU of a VM is made from.
#[derive(Debug)]
pub(crate) struct CpuPlan {
    supported: CpuId,
    most: u8,
    tsc_deadline: bool,
}

impl CpuPlan {
    fn make(&self, vm_fd: &VmFd, index: u8) -> Result<VcpuFd, VmError> {
        let fd = vm_fd
            .create_vcpu(u64::from(index))
            .map_err(VmError::kvm("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&cpuid::for_vcpu(
            &self.supported,
            index,
            self.most,
            self.tsc_deadline,
        ))
        .map_err(VmError::kvm("KVM_SET_CPUID2"))?;
        Ok(fd)
    }
}

/// A VM whose vCPUs have no state yet: what creation and restore share.
pub(crate) struct Frame {
    pub(crate) kvm: Kvm,
    pub(crate) vm_fd: Arc<VmFd>,
    pub(crate) vcpu_fds: Vec<VcpuFd>,
    pub(crate) cpus: CpuPlan,
    pub(crate) memory: VmMemory,
    pub(crate) marks: Arc<Marks>,
}

impl Frame {
    /// Opens KVM, maps memory, makes the interrupt controller and the vCPUs.
    pub(crate) fn new(config: &VmConfig, memory: Option<VmMemory>) -> Result<Self, VmError> {
        let marks = Arc::new(Marks::new());
        marks.add("start");
        config.validate()?;
        let kvm = kvm_check::open_checked(config.kvm.as_ref(), config.allow_emulated_kvm)?;
        let vm_fd = Arc::new(create_vm(&kvm)?);
        marks.add("kvm ready");
        let memory = match (memory, &config.memory) {
            (Some(memory), _) => memory,
            (None, Some(file)) => {
                let file = file.try_clone().map_err(VmError::host("guest memory"))?;
                VmMemory::over(file, config.memory_mib)?
            }
            (None, None) => {
                VmMemory::with_room(config.memory_mib, config.room_mib, config.hugepages)?
            }
        };
        map_memory(&vm_fd, &memory)?;
        // Intel needs these pages for real mode; AMD ignores them.
        let _ = vm_fd.set_identity_map_address(layout::KVM_IDENTITY_MAP_ADDR);
        vm_fd
            .set_tss_address(layout::KVM_TSS_ADDR)
            .map_err(VmError::kvm("KVM_SET_TSS_ADDR"))?;
        vm_fd
            .create_irq_chip()
            .map_err(VmError::kvm("KVM_CREATE_IRQCHIP"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        if !tsc_deadline {
            // Linux calibrates its timer against the PIT only where the LAPIC takes no TSC
            // deadlines.
            vm_fd
                .create_pit2(kvm_pit_config {
                    flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY,
                    ..Default::default()
                })
                .map_err(VmError::kvm("KVM_CREATE_PIT2"))?;
        }
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(VmError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let cpus = CpuPlan {
            supported,
            most: config.most_vcpus(),
            tsc_deadline,
        };
        let mut vcpu_fds = Vec::with_capacity(usize::from(config.vcpus));
        for index in 0..config.vcpus {
            vcpu_fds.push(cpus.make(&vm_fd, index)?);
        }
        marks.add("vCPUs made");
        Ok(Self {
            kvm,
            vm_fd,
            vcpu_fds,
            cpus,
            memory,
            marks,
        })
    }

    /// Attaches devices and starts the (paused) threads.
    pub(crate) fn finish(
        self,
        config: VmConfig,
        devices: Devices,
        exit: Arc<ExitSlot>,
        loaded: Option<Loaded>,
        cmdline: String,
    ) -> Result<Vm, VmError> {
        let kvm_vm_stats = KvmStats::open(self.vm_fd.as_raw_fd());
        let kvm_vcpu_stats = self
            .vcpu_fds
            .iter()
            .filter_map(|fd| KvmStats::open(fd.as_raw_fd()))
            .collect();
        let (debug_stops, debug_receiver) = match config.gdb {
            Some(_) => {
                let (sender, receiver) = std::sync::mpsc::channel();
                (Some(sender), Some(receiver))
            }
            None => (None, None),
        };
        let counted = match (config.count_instructions, self.vcpu_fds.first()) {
            (true, Some(first)) => {
                first
                    .set_guest_debug(&crate::steps::stepping())
                    .map_err(VmError::kvm("KVM_SET_GUEST_DEBUG"))?;
                Some(Arc::new(crate::steps::Counted::default()))
            }
            _ => None,
        };
        let env = VcpuEnv {
            pio: Arc::clone(&devices.pio),
            mmio: Arc::clone(&devices.mmio),
            exit: Arc::clone(&exit),
            reset: Arc::clone(&devices.reset),
            marks: Arc::clone(&self.marks),
            debug_stops,
            confined: config.seccomp,
            counted: counted.clone(),
        };
        let mut vcpus = Vec::with_capacity(self.vcpu_fds.len());
        let count = config.vcpus;
        for (index, fd) in (0..count).zip(self.vcpu_fds) {
            vcpus.push(Vcpu::spawn(&config.id, index, fd, env.clone())?);
        }
        let debugger = match (config.gdb, debug_receiver) {
            (Some(address), Some(stops)) => Some(crate::gdb::Debugger::listen(&address, stops)?),
            _ => None,
        };
        self.marks.add("devices ready");
        let cpu_env = VcpuEnv {
            debug_stops: None,
            ..env
        };
        Ok(Vm {
            vcpus: Mutex::new(vcpus),
            devices,
            exit,
            phase: Mutex::new(Phase::Created),
            marks: self.marks,
            counted,
            kvm_vm_stats,
            kvm_vcpu_stats: Mutex::new(kvm_vcpu_stats),
            loaded,
            cmdline,
            msr_list: state::msr_list(&self.kvm)?,
            vm_fd: self.vm_fd,
            memory: self.memory,
            id: config.id,
            vcpu_count: count,
            cpus: self.cpus,
            cpu_env,
            room_parts: Mutex::default(),
            debugger: Mutex::new(debugger),
            crash_core: Mutex::new(config.crash_core),
        })
    }
}

impl Vm {
    /// Builds a VM up to the point where its first instruction could run.
    ///
    /// # Errors
    /// When the configuration cannot be, a file is missing or wrong, or the host lacks something.
    /// Nothing is left behind.
    pub fn create(mut config: VmConfig) -> Result<Self, VmError> {
        let frame = Frame::new(&config, None)?;
        let exit = Arc::new(ExitSlot::new().map_err(VmError::host("exit event"))?);
        let devices = Devices::new(&mut config, &frame.vm_fd, &frame.memory, &exit)?;
        let cmdline = devices.cmdline(&config);
        let loaded = boot::load(&frame.memory, &config, &cmdline, &devices.places())?;
        frame.marks.add("kernel loaded");
        for (index, fd) in frame.vcpu_fds.iter().enumerate() {
            regs::set_common_state(fd)?;
            if index == 0 {
                regs::set_boot_state(fd, loaded.entry)?;
            }
        }
        frame.finish(config, devices, exit, Some(loaded), cmdline)
    }

    pub(crate) fn vcpus(&self) -> MutexGuard<'_, Vec<Vcpu>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Runs the first instruction; with `gdb` configured, waits for the debugger first.
    ///
    /// # Errors
    /// When the VM was started before or the debugger's connection fails.
    pub fn start(self: &Vm) -> Result<(), VmError> {
        let mut phase = self.phase();
        if *phase != Phase::Created {
            return Err(VmError::NotRunning(format!(
                "VM {} was started before",
                self.id
            )));
        }
        // One that goes on from saved state has requests under way, and a guest to which time has
        // passed.
        let goes_on = self.loaded.is_none();
        match goes_on {
            true => self.devices.resume(),
            false => self.devices.start(),
        }
        *phase = Phase::Running;
        self.marks.add("first instruction");
        for vcpu in self.vcpus().iter() {
            if goes_on {
                let _ = vcpu.call(|fd| fd.kvmclock_ctrl().is_ok());
            }
            vcpu.resume();
        }
        Ok(())
    }

    /// Hands the VM to a debugger if one was configured; blocks until the debugger detaches or
    /// the VM ends. Call it from a thread of its own, instead of [`Self::start`].
    ///
    /// # Errors
    /// When the connection fails.
    pub fn debug(&self) -> Result<(), VmError> {
        let debugger = self
            .debugger
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match debugger {
            Some(debugger) => debugger.serve(self),
            None => self.start(),
        }
    }

    /// Makes more vCPUs, until there are `count` of them or as many as the guest knows of; gives how
    /// many there are. The guest brings them online itself, once it is asked to. Their threads are
    /// children of the caller's.
    ///
    /// # Errors
    /// When the VM has ended or KVM refuses; those made by then stay.
    pub fn grow_vcpus(&self, count: u8) -> Result<u8, VmError> {
        let phase = self.phase();
        if *phase == Phase::Ended {
            return Err(VmError::NotRunning(format!("VM {} has ended", self.id)));
        }
        let mut vcpus = self.vcpus();
        let made = |vcpus: &Vec<Vcpu>| u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
        while made(&vcpus) < count.min(self.cpus.most) {
            let index = made(&vcpus);
            let fd = self.cpus.make(&self.vm_fd, index)?;
            regs::set_common_state(&fd)?;
            let stats = KvmStats::open(fd.as_raw_fd());
            let vcpu = Vcpu::spawn(&self.id, index, fd, self.cpu_env.clone())?;
            if *phase == Phase::Running {
                vcpu.resume();
            }
            vcpus.push(vcpu);
            let all = self.kvm_vcpu_stats.lock();
            all.unwrap_or_else(PoisonError::into_inner).extend(stats);
        }
        Ok(made(&vcpus))
    }

    /// Stops all vCPUs between two instructions and the devices between two requests.
    ///
    /// # Errors
    /// When the VM is not running.
    pub fn pause(&self) -> Result<(), VmError> {
        let mut phase = self.phase();
        match *phase {
            Phase::Paused => return Ok(()),
            Phase::Running => {}
            Phase::Created | Phase::Ended => {
                return Err(VmError::NotRunning(format!(
                    "VM {} is not running",
                    self.id
                )));
            }
        }
        self.park();
        self.devices.pause();
        *phase = Phase::Paused;
        Ok(())
    }

    /// Parks the vCPUs only (for the debugger).
    pub(crate) fn park(&self) {
        let vcpus = self.vcpus();
        for vcpu in vcpus.iter() {
            vcpu.request_pause();
        }
        for vcpu in vcpus.iter() {
            vcpu.wait_parked();
        }
    }

    /// Lets a paused VM go on.
    ///
    /// # Errors
    /// When the VM is not paused.
    pub fn resume(&self) -> Result<(), VmError> {
        let mut phase = self.phase();
        match *phase {
            Phase::Running => return Ok(()),
            Phase::Paused => {}
            Phase::Created | Phase::Ended => {
                return Err(VmError::NotRunning(format!("VM {} is not paused", self.id)));
            }
        }
        self.devices.resume();
        for vcpu in self.vcpus().iter() {
            // Tells the guest's watchdogs that time has passed. Fails on guests without kvmclock.
            let _ = vcpu.call(|fd| fd.kvmclock_ctrl().is_ok());
            vcpu.resume();
        }
        *phase = Phase::Running;
        Ok(())
    }

    /// Ends the VM at once: all its threads are gone when this returns.
    pub fn stop(&self) {
        self.exit.set(VmExit::Stopped);
        self.keep_crash();
        let mut phase = self.phase();
        if *phase == Phase::Ended {
            return;
        }
        let mut vcpus = self.vcpus();
        for vcpu in vcpus.iter() {
            vcpu.request_stop();
        }
        for vcpu in vcpus.iter_mut() {
            vcpu.join();
        }
        self.devices.stop();
        *phase = Phase::Ended;
    }

    /// Waits for the VM to end, stops what is left of it and says why it ended.
    pub fn wait(&self) -> VmExit {
        let _ = self.exit.wait(None);
        self.stop();
        self.exit_reason().unwrap_or(VmExit::Stopped)
    }

    /// Writes the core of a guest that has crashed, while its vCPUs are still there.
    fn keep_crash(&self) {
        let path = self.crash_core.lock().ok().and_then(|mut path| path.take());
        let crashed = matches!(
            self.exit_reason(),
            Some(VmExit::GuestPanic { .. } | VmExit::TripleFault { .. })
        );
        if let Some(path) = path.filter(|_| crashed && *self.phase() != Phase::Ended) {
            match crate::dump::write_core(self, &path) {
                Ok(()) => log::warn!("VM {}: crashed; core in {}", self.id, path.display()),
                Err(error) => log::warn!("VM {}: crashed; no core: {error}", self.id),
            }
        }
    }

    /// Like [`Self::wait`], for at most `timeout`; `None` if the VM goes on.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<VmExit> {
        self.exit.wait(Some(timeout))?;
        Some(self.wait())
    }

    /// Why the VM ended, if it has. A reset after a kernel panic is reported as the panic.
    pub fn exit_reason(&self) -> Option<VmExit> {
        let exit = self.exit.get()?;
        if matches!(exit, VmExit::Reset | VmExit::TripleFault { .. })
            && let Some(message) = panic_message(&self.devices.serial.tail())
        {
            return Some(VmExit::GuestPanic { message });
        }
        Some(exit)
    }

    /// Readable once the VM has ended (or cannot go on); then call [`Self::wait`].
    pub fn exit_event(&self) -> &EventFd {
        &self.exit.event
    }

    /// Streams to and from the guest, if the VM has a vsock device.
    pub fn vsock(&self) -> Option<VsockHandle> {
        self.devices.vsock.clone()
    }

    /// Types on the guest's serial console.
    pub fn console_input(&self, data: &[u8]) {
        self.devices.serial.enqueue_input(data);
    }

    /// The last 64 KiB of the guest's console.
    pub fn console_tail(&self) -> Vec<u8> {
        self.devices.serial.tail()
    }

    /// Adds a stage to the boot timeline.
    pub fn mark(&self, stage: &str) {
        self.marks.add(stage);
    }

    /// Tries, on the VM's first thread of this role, what no role may: to make a network socket.
    /// Where seccomp holds, the call is refused and the VM ends; the result is what the call said.
    /// For those who want to see the wall.
    ///
    /// # Errors
    /// When there is no such thread.
    pub fn try_forbidden_call(&self, role: seccomp::Role) -> Result<std::io::Result<()>, VmError> {
        let attempt = || std::net::UdpSocket::bind("127.0.0.1:0").map(drop);
        if role == seccomp::Role::Vcpu {
            let vcpus = self.vcpus();
            let first = vcpus
                .first()
                .ok_or_else(|| VmError::NotRunning("no vCPU".into()))?;
            return first.call(move |_| attempt());
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        self.devices.run_on(role, move || {
            let _ = sender.send(attempt());
        })?;
        receiver
            .recv()
            .map_err(|_| VmError::NotRunning("the device thread has ended".into()))
    }

    /// Puts a disk into one of the spare slots of a running VM.
    ///
    /// # Errors
    /// When the slot does not exist or is taken, or the file cannot be opened.
    pub fn attach_disk(&self, slot: usize, disk: DiskConfig) -> Result<(), VmError> {
        self.devices.attach_disk(slot, disk)
    }

    /// Takes the disk out of a spare slot; what the guest still asks of it fails. An empty slot
    /// stays empty.
    ///
    /// # Errors
    /// When the slot does not exist.
    pub fn detach_disk(&self, slot: usize) -> Result<(), VmError> {
        self.devices.detach_disk(slot)
    }

    /// Counters as of now.
    pub fn stats(&self) -> VmStats {
        use std::sync::atomic::Ordering::Relaxed;
        let vcpus = self
            .vcpus()
            .iter()
            .map(|vcpu| {
                let exits = &vcpu.shared.exits;
                VcpuExits {
                    io_in: exits.io_in.load(Relaxed),
                    io_out: exits.io_out.load(Relaxed),
                    mmio_read: exits.mmio_read.load(Relaxed),
                    mmio_write: exits.mmio_write.load(Relaxed),
                    interrupted: exits.interrupted.load(Relaxed),
                    other: exits.other.load(Relaxed),
                }
            })
            .collect();
        let mut kvm_vm = BTreeMap::new();
        if let Some(stats) = &self.kvm_vm_stats
            && let Err(error) = stats.add_to(&mut kvm_vm)
        {
            log::debug!("VM {}: reading KVM's statistics: {error}", self.id);
        }
        let mut kvm_vcpus = BTreeMap::new();
        let of_vcpus = self.kvm_vcpu_stats.lock();
        for stats in of_vcpus.unwrap_or_else(PoisonError::into_inner).iter() {
            if let Err(error) = stats.add_to(&mut kvm_vcpus) {
                log::debug!("VM {}: reading KVM's statistics: {error}", self.id);
            }
        }
        VmStats {
            vcpus,
            kvm_vm,
            kvm_vcpus,
            timeline: self.marks.timeline(),
            instructions_to_user: self.counted.as_ref().and_then(|c| c.before_user()),
            devices: self.devices.metrics(),
            memory_resident_bytes: resident_bytes(&self.memory),
        }
    }

    /// Configuration, memory map, devices and queues, for a person or a tool.
    pub fn inspect(&self) -> serde_json::Value {
        let phase = *self.phase();
        let memory: Vec<_> = self
            .memory
            .mmap()
            .iter()
            .map(|region| {
                json!({
                    "start": format!("{:#x}", region.start_addr().0),
                    "bytes": region.len(),
                })
            })
            .collect();
        json!({
            "id": self.id,
            "state": match phase {
                Phase::Created => "created",
                Phase::Running => "running",
                Phase::Paused => "paused",
                Phase::Ended => "ended",
            },
            "vcpus": self.vcpus().len(),
            "max_vcpus": self.cpus.most,
            "memory_bytes": self.memory.size(),
            "memory_room_bytes": self.memory.room().map_or(0, |(_, bytes)| bytes),
            "memory_added_bytes": self.added_memory().map_or(0, |(_, has)| has),
            "memory_resident_bytes": resident_bytes(&self.memory),
            "memory_map": memory,
            "kernel": self.loaded.map(|loaded| json!({
                "entry": format!("{:x?}", loaded.entry),
                "start": format!("{:#x}", loaded.kernel.0),
                "end": format!("{:#x}", loaded.kernel.1),
            })),
            "initramfs": self.loaded.and_then(|l| l.initramfs).map(|(start, end)| json!({
                "start": format!("{start:#x}"),
                "end": format!("{end:#x}"),
            })),
            "cmdline": self.cmdline,
            "devices": self.devices.describe(),
            "timeline": self.marks.timeline(),
        })
    }

    /// Registers of every vCPU, as text by name. Running vCPUs are interrupted for a moment.
    ///
    /// # Errors
    /// When the VM has ended.
    pub fn registers(&self) -> Result<serde_json::Value, VmError> {
        let mut all = Vec::new();
        for vcpu in self.vcpus().iter() {
            let (regs, sregs) = vcpu.call(|fd| (fd.get_regs(), fd.get_sregs()))?;
            let regs = regs.map_err(VmError::kvm("KVM_GET_REGS"))?;
            let sregs = sregs.map_err(VmError::kvm("KVM_GET_SREGS"))?;
            let hex = |value: u64| format!("{value:#018x}");
            all.push(json!({
                "vcpu": vcpu.index,
                "rip": hex(regs.rip), "rflags": hex(regs.rflags),
                "rax": hex(regs.rax), "rbx": hex(regs.rbx), "rcx": hex(regs.rcx),
                "rdx": hex(regs.rdx), "rsi": hex(regs.rsi), "rdi": hex(regs.rdi),
                "rsp": hex(regs.rsp), "rbp": hex(regs.rbp), "r8": hex(regs.r8),
                "r9": hex(regs.r9), "r10": hex(regs.r10), "r11": hex(regs.r11),
                "r12": hex(regs.r12), "r13": hex(regs.r13), "r14": hex(regs.r14),
                "r15": hex(regs.r15),
                "cr0": hex(sregs.cr0), "cr2": hex(sregs.cr2), "cr3": hex(sregs.cr3),
                "cr4": hex(sregs.cr4), "efer": hex(sregs.efer),
            }));
        }
        Ok(json!(all))
    }

    /// Writes an ELF core of the guest (memory and registers) that `gdb` reads (`crash` has not been
    /// tried). A running VM is paused meanwhile.
    ///
    /// # Errors
    /// When the file cannot be written; a partial one is removed.
    pub fn dump_core(&self, path: &Path) -> Result<(), VmError> {
        let running = *self.phase() == Phase::Running;
        if running {
            self.pause()?;
        }
        let result = crate::dump::write_core(self, path);
        if running {
            self.resume()?;
        }
        result
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    // KVM_CREATE_VM is interrupted by any signal on a busy host.
    loop {
        match kvm.create_vm() {
            Ok(vm) => return Ok(vm),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(VmError::kvm("KVM_CREATE_VM")(error)),
        }
    }
}

fn map_memory(vm_fd: &VmFd, memory: &VmMemory) -> Result<(), VmError> {
    let room = memory.room().map(|(start, _)| start);
    let at_boot = memory
        .mmap()
        .iter()
        .filter(|r| Some(r.start_addr().0) != room);
    for (slot, region) in (0u32..).zip(at_boot) {
        let address = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|e| VmError::Memory(e.to_string()))?;
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: address as u64,
            flags: 0,
        };
        // SAFETY: the range is a mapping owned by `memory`, which the `Vm` keeps until after the
        // vCPUs and the VM descriptor are gone.
        unsafe { vm_fd.set_user_memory_region(region) }
            .map_err(VmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Bytes of guest memory that the host has given: blocks of the memfd.
fn resident_bytes(memory: &VmMemory) -> u64 {
    use std::os::unix::fs::MetadataExt;
    memory.file().metadata().map_or(0, |m| m.blocks() * 512)
}

/// Finds the message of a Linux panic in the last console output.
fn panic_message(console: &[u8]) -> Option<String> {
    const SIGN: &str = "Kernel panic - not syncing: ";
    let text = String::from_utf8_lossy(console);
    let at = text.rfind(SIGN)?;
    let line = text[at + SIGN.len()..].lines().next()?.trim();
    // The guest writes this: keep it short and printable.
    Some(line.chars().filter(|c| !c.is_control()).take(200).collect())
}

/// Whether `address` lies in guest memory (for the debugger).
pub(crate) fn in_memory(memory: &VmMemory, address: u64) -> bool {
    memory.mmap().address_in_range(GuestAddress(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found_and_cleaned() {
        let console =
            b"[ 0.1] ok\n[ 0.2] Kernel panic - not syncing: VFS: Unable\x1b to mount\r\nmore";
        assert_eq!(panic_message(console).unwrap(), "VFS: Unable to mount");
        assert_eq!(panic_message(b"all is well"), None);
    }

    #[test]
    fn the_first_reason_wins() {
        let slot = ExitSlot::new().unwrap();
        slot.set(VmExit::Reset);
        slot.set(VmExit::Stopped);
        assert_eq!(slot.get(), Some(VmExit::Reset));
        assert_eq!(slot.wait(Some(Duration::ZERO)), Some(VmExit::Reset));
    }
}
