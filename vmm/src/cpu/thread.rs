//! The thread that runs one vCPU, and how others talk to it.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use kvm_bindings::{kvm_guest_debug, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::error::VmError;
use crate::layout;
use crate::seccomp;
use crate::steps::Steps;
use crate::vm::{ExitSlot, VmExit};

/// Enough for device code that runs on behalf of a register access.
const STACK_BYTES: usize = 256 << 10;

/// Work for a vCPU thread while its vCPU is stopped between two entries.
type Job = Box<dyn FnOnce(&mut VcpuFd) + Send>;

/// What a vCPU thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Run,
    Pause,
    Stop,
}

struct Control {
    target: Target,
    parked: bool,
    ended: bool,
    jobs: VecDeque<Job>,
}

/// Exits of one vCPU that came to user space, by kind.
#[derive(Debug, Default)]
pub(crate) struct ExitCounters {
    pub(crate) io_in: AtomicU64,
    pub(crate) io_out: AtomicU64,
    pub(crate) mmio_read: AtomicU64,
    pub(crate) mmio_write: AtomicU64,
    pub(crate) interrupted: AtomicU64,
    pub(crate) other: AtomicU64,
}

/// The part of a vCPU that its thread and others share.
pub(crate) struct VcpuShared {
    control: Mutex<Control>,
    changed: Condvar,
    /// Set with every change of `control`, so that the thread need not lock after each exit.
    attention: AtomicBool,
    pub(crate) exits: ExitCounters,
}

impl std::fmt::Debug for VcpuShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuShared").finish_non_exhaustive()
    }
}

impl VcpuShared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        // A panic while holding the lock leaves nothing half done here.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything a vCPU thread needs of its VM.
#[derive(Clone, Debug)]
pub(crate) struct VcpuEnv {
    pub(crate) pio: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) exit: Arc<ExitSlot>,
    /// Set when the guest pulls the reset line or switches itself off.
    pub(crate) reset: Arc<AtomicBool>,
    /// Called with each byte written to [`layout::BOOT_MARK_PORT`].
    pub(crate) marks: Arc<crate::stats::Marks>,
    /// Debug stops are handed to the debugger's thread.
    pub(crate) debug_stops: Option<mpsc::Sender<u8>>,
    /// Whether the thread is held to the system calls of its role.
    pub(crate) confined: bool,
    /// Where instructions are counted, if they are.
    pub(crate) counted: Option<Arc<crate::steps::Counted>>,
}

/// A vCPU and its thread.
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    pub(crate) shared: Arc<VcpuShared>,
    /// Gives back what its end closes: the thread itself may not close files.
    thread: Option<JoinHandle<Runner>>,
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpu")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl Vcpu {
    /// Starts the thread; the vCPU is paused.
    pub(crate) fn spawn(vm_id: &str, index: u8, fd: VcpuFd, env: VcpuEnv) -> Result<Self, VmError> {
        install_kick_handler().map_err(VmError::host("installing the vCPU kick signal"))?;
        let shared = Arc::new(VcpuShared {
            control: Mutex::new(Control {
                target: Target::Pause,
                parked: false,
                ended: false,
                jobs: VecDeque::new(),
            }),
            changed: Condvar::new(),
            attention: AtomicBool::new(true),
            exits: ExitCounters::default(),
        });
        let of_thread = Arc::clone(&shared);
        // Thread names have 15 bytes: the number first, as much of the id as fits.
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}:{vm_id}"))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let mut runner = Runner::new(index, fd, env, Arc::clone(&of_thread));
                let body = AssertUnwindSafe(|| runner.run());
                // The wall around this vCPU: a bug that panics ends this VM, not the daemon.
                if let Err(panic) = catch_unwind(body) {
                    runner.env.exit.set(VmExit::Error(format!(
                        "internal error on vCPU {index}: {}",
                        panic_text(panic.as_ref())
                    )));
                }
                KVM_RUN.with(|cell| cell.set(ptr::null_mut()));
                let mut control = of_thread.lock();
                control.ended = true;
                control.parked = true;
                control.jobs.clear();
                of_thread.changed.notify_all();
                drop(control);
                runner
            })
            .map_err(VmError::host(format!(
                "starting the thread of vCPU {index}"
            )))?;
        Ok(Self {
            index,
            shared,
            thread: Some(thread),
        })
    }

    fn set(&self, target: Target) {
        let mut control = self.shared.lock();
        if control.target != Target::Stop {
            control.target = target;
        }
        self.shared.attention.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
        drop(control);
        self.kick();
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // SAFETY: the thread has not been joined, so its id is valid; the signal's handler
            // does nothing but set a flag.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }

    pub(crate) fn resume(&self) {
        self.set(Target::Run);
    }

    /// Asks to pause; [`Self::wait_parked`] waits for it.
    pub(crate) fn request_pause(&self) {
        self.set(Target::Pause);
    }

    pub(crate) fn wait_parked(&self) {
        let mut control = self.shared.lock();
        while !control.parked {
            control = self
                .shared
                .changed
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn request_stop(&self) {
        self.set(Target::Stop);
    }

    pub(crate) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Runs `job` on the vCPU's thread between two guest entries and returns its result.
    pub(crate) fn call<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut VcpuFd) -> R + Send + 'static,
    ) -> Result<R, VmError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        {
            let mut control = self.shared.lock();
            if control.ended {
                return Err(VmError::NotRunning(format!(
                    "vCPU {} has ended with its VM",
                    self.index
                )));
            }
            control.jobs.push_back(Box::new(move |fd| {
                let _ = sender.send(job(fd));
            }));
            self.shared.attention.store(true, Ordering::SeqCst);
            self.shared.changed.notify_all();
        }
        self.kick();
        receiver
            .recv()
            .map_err(|_| VmError::NotRunning(format!("vCPU {} ended with its VM", self.index)))
    }
}

/// The text of a caught panic.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".into())
}

thread_local! {
    /// The `kvm_run` page of the vCPU that this thread runs, for the signal handler.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 2
}

extern "C" fn on_kick(_: libc::c_int) {
    KVM_RUN.with(|cell| {
        let run = cell.get();
        if !run.is_null() {
            // SAFETY: the pointer is set by this very thread while the mapping lives, and
            // cleared before it goes. KVM reads the byte on its next entry: this closes the race
            // between looking at `attention` and entering the guest.
            unsafe { ptr::addr_of_mut!((*run).immediate_exit).write_volatile(1) };
        }
    });
}

fn install_kick_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is a valid value; the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
        libc::sigemptyset(&mut action.sa_mask);
        if libc::sigaction(kick_signal(), &action, ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The loop of a vCPU thread.
struct Runner {
    index: u8,
    fd: VcpuFd,
    env: VcpuEnv,
    shared: Arc<VcpuShared>,
    steps: Option<Steps>,
    /// While steps are counted: the last exit was an access that KVM has not completed.
    unfinished: bool,
}

impl Runner {
    fn new(index: u8, mut fd: VcpuFd, env: VcpuEnv, shared: Arc<VcpuShared>) -> Self {
        let run: *mut kvm_run = fd.get_kvm_run();
        KVM_RUN.with(|cell| cell.set(run));
        // Those of the others say nothing about the way to the first program.
        let counted = env.counted.clone().filter(|_| index == 0);
        Self {
            index,
            fd,
            env,
            shared,
            steps: counted.map(Steps::new),
            unfinished: false,
        }
    }

    fn run(&mut self) {
        if self.env.confined
            && let Err(error) = seccomp::enter(seccomp::Role::Vcpu)
        {
            self.env.exit.set(VmExit::Error(format!(
                "vCPU {} cannot be confined by seccomp: {error}; --no-seccomp goes without",
                self.index
            )));
        }
        loop {
            if self.shared.attention.load(Ordering::SeqCst) && !self.attend() {
                return;
            }
            // A look at a thread-local: costs nothing beside an exit.
            let broken = seccomp::breach().map(VmExit::Error);
            if let Some(exit) = broken.or_else(|| self.enter()) {
                self.env.exit.set(exit);
                // Wait to be stopped: whoever waits for the VM stops all its vCPUs.
                let mut control = self.shared.lock();
                if control.target == Target::Run {
                    control.target = Target::Pause;
                }
                self.shared.attention.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Obeys `control`; returns false when the thread shall end.
    fn attend(&mut self) -> bool {
        // Finish an I/O instruction whose result is already in place, so that the registers are
        // whole: KVM does that on entry and leaves at once.
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        let mut control = self.shared.lock();
        loop {
            self.shared.attention.store(false, Ordering::SeqCst);
            if let Some(job) = control.jobs.pop_front() {
                drop(control);
                job(&mut self.fd);
                control = self.shared.lock();
                continue;
            }
            match control.target {
                Target::Stop => return false,
                Target::Run => break,
                Target::Pause => {
                    control.parked = true;
                    self.shared.changed.notify_all();
                    control = self
                        .shared
                        .changed
                        .wait(control)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
        control.parked = false;
        drop(control);
        self.fd.set_kvm_immediate_exit(0);
        // A kick between the check above and here has set `attention`, which the loop looks at
        // after the next exit; make sure that exit comes at once.
        if self.shared.attention.load(Ordering::SeqCst) {
            self.fd.set_kvm_immediate_exit(1);
        }
        true
    }

    /// Enters the guest once and handles what made it leave.
    fn enter(&mut self) -> Option<VmExit> {
        let count = |counter: &AtomicU64| {
            counter.fetch_add(1, Ordering::Relaxed);
        };
        if self.steps.is_some() && !self.go_on_stepping() {
            return None;
        }
        let exits = &self.shared.exits;
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&exits.io_in);
                self.unfinished = true;
                // All our ports are one byte wide. A wide or repeated access reads the same port.
                for byte in data.chunks_mut(1) {
                    self.env.pio.read(u64::from(port), byte);
                }
                None
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&exits.io_out);
                self.unfinished = true;
                if port == layout::BOOT_MARK_PORT {
                    if let Some(mark) = data.first() {
                        self.env.marks.record(*mark);
                    }
                    return None;
                }
                for byte in data.chunks(1) {
                    self.env.pio.write(u64::from(port), byte);
                }
                if self.env.reset.swap(false, Ordering::SeqCst) {
                    return Some(VmExit::Reset);
                }
                None
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&exits.mmio_read);
                self.unfinished = true;
                self.env.mmio.read(address, data);
                None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&exits.mmio_write);
                self.unfinished = true;
                self.env.mmio.write(address, data);
                None
            }
            Ok(VcpuExit::Shutdown) => {
                count(&exits.other);
                let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
                Some(VmExit::TripleFault {
                    vcpu: self.index,
                    rip,
                })
            }
            Ok(VcpuExit::SystemEvent(..)) => {
                count(&exits.other);
                Some(VmExit::Reset)
            }
            Ok(VcpuExit::Debug(stop)) if self.steps.is_some() => {
                count(&exits.other);
                self.count_step(stop.pc)
            }
            Ok(VcpuExit::Debug(_)) => {
                count(&exits.other);
                self.stop_for_debugger();
                None
            }
            Ok(VcpuExit::Hlt | VcpuExit::Intr) => {
                count(&exits.other);
                None
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                count(&exits.other);
                Some(VmExit::Error(format!(
                    "the CPU refused to enter the guest on vCPU {} (hardware reason {reason:#x})",
                    self.index
                )))
            }
            Ok(VcpuExit::InternalError) => {
                count(&exits.other);
                let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
                Some(VmExit::Error(format!(
                    "KVM could not emulate the guest's instruction at {rip:#x} on vCPU {}",
                    self.index
                )))
            }
            Ok(other) => {
                count(&exits.other);
                Some(VmExit::Error(format!(
                    "vCPU {} left the guest for a reason that nothing here asked for: {other:?}",
                    self.index
                )))
            }
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => {
                    count(&exits.interrupted);
                    self.fd.set_kvm_immediate_exit(0);
                    None
                }
                errno => Some(VmExit::Error(format!(
                    "KVM_RUN failed on vCPU {}: {}",
                    self.index,
                    io::Error::from_raw_os_error(errno)
                ))),
            },
        }
    }

    /// KVM forgets to stop after an instruction that it, or we, did for the guest: completes that,
    /// and asks for the next step. False if completing it was a step by itself.
    fn go_on_stepping(&mut self) -> bool {
        let mut step = None;
        if std::mem::take(&mut self.unfinished) {
            self.fd.set_kvm_immediate_exit(1);
            if let Ok(VcpuExit::Debug(stop)) = self.fd.run() {
                step = Some(stop.pc);
            }
            self.fd.set_kvm_immediate_exit(0);
        }
        if let Err(error) = self.fd.set_guest_debug(&crate::steps::stepping()) {
            log::warn!("vCPU {}: single steps: {error}", self.index);
        }
        if let Some(pc) = step
            && let Some(exit) = self.count_step(pc)
        {
            self.env.exit.set(exit);
        }
        step.is_none()
    }

    /// Counts a step; with the first program there is nothing more to count.
    fn count_step(&mut self, pc: u64) -> Option<VmExit> {
        let done = self.steps.as_mut().is_some_and(|steps| steps.step(pc));
        if !done {
            return None;
        }
        self.steps = None;
        self.env.marks.add("first instruction of a program");
        let error = self.fd.set_guest_debug(&kvm_guest_debug::default()).err()?;
        Some(VmExit::Error(format!(
            "single steps on vCPU {} cannot be ended: {error}",
            self.index
        )))
    }

    /// Parks this vCPU and tells the debugger.
    fn stop_for_debugger(&self) {
        if let Some(stops) = &self.env.debug_stops {
            let mut control = self.shared.lock();
            if control.target == Target::Run {
                control.target = Target::Pause;
            }
            self.shared.attention.store(true, Ordering::SeqCst);
            drop(control);
            let _ = stops.send(self.index);
        }
    }
}
