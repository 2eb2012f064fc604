//! A GDB server for the guest kernel: `target remote` shows each vCPU as a thread.
//!
//! All-stop mode: when one vCPU hits a breakpoint, all are parked. Devices go on.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::num::NonZeroUsize;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use gdbstub::common::{Signal, Tid};
use gdbstub::conn::{Connection, ConnectionExt};
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug, kvm_regs, kvm_sregs,
};
use vm_memory::{Bytes, GuestAddress};

use crate::error::VmError;
use crate::vm::{self, Vm};

/// Linux' text mapping: lets breakpoints be set before the kernel has made its page tables.
const KERNEL_MAP: u64 = 0xFFFF_FFFF_8000_0000;
const INT3: u8 = 0xCC;
/// The CPU has four breakpoint registers.
const HW_BREAKPOINTS: usize = 4;
/// How often to look whether the VM has ended or GDB says something, while the guest runs.
const POLL: Duration = Duration::from_millis(20);

/// Where a debugger may connect, and where vCPUs report that they hit something.
#[derive(Debug)]
pub(crate) struct Debugger {
    listener: Listener,
    stops: Receiver<u8>,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Debugger {
    /// Opens the port (`127.0.0.1:1234`) or socket (a path).
    pub(crate) fn listen(address: &str, stops: Receiver<u8>) -> Result<Self, VmError> {
        let listener = if address.contains('/') {
            let path = Path::new(address);
            UnixListener::bind(path).map(|l| Listener::Unix(l, path.into()))
        } else {
            TcpListener::bind(address).map(Listener::Tcp)
        };
        let listener = listener.map_err(VmError::host(format!(
            "gdb address {address} (give a free HOST:PORT or a socket path)"
        )))?;
        Ok(Self { listener, stops })
    }

    /// Waits for GDB and serves it until it detaches, kills, or the VM ends.
    pub(crate) fn serve(self, vm: &Vm) -> Result<(), VmError> {
        let stream: Box<dyn Stream> = match &self.listener {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().map_err(VmError::host("gdb connection"))?;
                // Packets are small and answered one by one.
                let _ = stream.set_nodelay(true);
                Box::new(stream)
            }
            Listener::Unix(listener, _) => {
                let (stream, _) = listener.accept().map_err(VmError::host("gdb connection"))?;
                Box::new(stream)
            }
        };
        let mut target = Guest {
            vm,
            stops: self.stops,
            started: false,
            software: BTreeMap::new(),
            hardware: Vec::new(),
            step: None,
            named: BTreeSet::new(),
            only_named: false,
        };
        let gdb = GdbStub::new(Conn {
            stream,
            peeked: None,
        });
        let outcome = gdb.run_blocking::<Loop<'_>>(&mut target);
        match outcome {
            Ok(DisconnectReason::Kill) => {
                vm.stop();
                Ok(())
            }
            Ok(_) => target.detach(),
            Err(error) => {
                let detached = target.detach();
                log::warn!("VM {}: gdb session ended: {error}", vm.id());
                detached
            }
        }
    }
}

trait Stream: Read + Write + Send {
    /// Reads what is there without waiting.
    fn try_read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>>;
}

macro_rules! stream {
    ($type:ty) => {
        impl Stream for $type {
            fn try_read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
                self.set_nonblocking(true)?;
                let result = Read::read(self, buffer);
                self.set_nonblocking(false)?;
                match result {
                    Ok(n) => Ok(Some(n)),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                    Err(e) => Err(e),
                }
            }
        }
    };
}
stream!(std::net::TcpStream);
stream!(std::os::unix::net::UnixStream);

struct Conn {
    stream: Box<dyn Stream>,
    peeked: Option<u8>,
}

impl Connection for Conn {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.stream.write_all(&[byte])
    }

    fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        self.stream.write_all(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl ConnectionExt for Conn {
    fn read(&mut self) -> io::Result<u8> {
        if let Some(byte) = self.peeked.take() {
            return Ok(byte);
        }
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        if self.peeked.is_none() {
            let mut byte = [0];
            match self.stream.try_read(&mut byte)? {
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(_) => self.peeked = Some(byte[0]),
                None => {}
            }
        }
        Ok(self.peeked)
    }
}

/// The VM as gdbstub sees it.
struct Guest<'a> {
    vm: &'a Vm,
    stops: Receiver<u8>,
    started: bool,
    /// Software breakpoints: address and the byte the INT3 replaced.
    software: BTreeMap<u64, u8>,
    hardware: Vec<u64>,
    /// The vCPU that shall run one instruction only.
    step: Option<u8>,
    /// The vCPUs GDB named in its last request to go on.
    named: BTreeSet<u8>,
    /// Whether the others shall stand still: GDB's scheduler locking. It also asks for this when
    /// it steps a vCPU over a breakpoint it has taken out for the moment.
    only_named: bool,
}

fn tid(vcpu: u8) -> Tid {
    NonZeroUsize::new(usize::from(vcpu) + 1).unwrap_or(NonZeroUsize::MIN)
}

fn vcpu_of(tid: Tid) -> u8 {
    u8::try_from(tid.get() - 1).unwrap_or(u8::MAX)
}

impl Guest<'_> {
    fn on_vcpu<R: Send + 'static>(
        &self,
        vcpu: u8,
        job: impl FnOnce(&mut kvm_ioctls::VcpuFd) -> R + Send + 'static,
    ) -> Result<R, VmError> {
        let vcpus = self.vm.vcpus();
        let vcpu = vcpus
            .get(usize::from(vcpu))
            .ok_or_else(|| VmError::NotRunning(format!("there is no vCPU {vcpu}")))?;
        vcpu.call(job)
    }

    fn registers(&self, vcpu: u8) -> Result<(kvm_regs, kvm_sregs), VmError> {
        let (regs, sregs) = self.on_vcpu(vcpu, |fd| (fd.get_regs(), fd.get_sregs()))?;
        Ok((
            regs.map_err(VmError::kvm("KVM_GET_REGS"))?,
            sregs.map_err(VmError::kvm("KVM_GET_SREGS"))?,
        ))
    }

    /// Guest physical address behind a virtual one, as `vcpu` sees it now.
    fn translate(&self, vcpu: u8, address: u64) -> Result<Option<u64>, VmError> {
        let found = self.on_vcpu(vcpu, move |fd| fd.translate_gva(address))?;
        Ok(match found {
            Ok(found) if found.valid != 0 => Some(found.physical_address),
            _ if address >= KERNEL_MAP => Some(address - KERNEL_MAP),
            _ => None,
        })
    }

    /// Calls `each` with (guest physical address, range in the buffer) page by page; returns how
    /// many bytes could be reached.
    fn pages(
        &self,
        vcpu: u8,
        start: u64,
        len: usize,
        mut each: impl FnMut(GuestAddress, std::ops::Range<usize>) -> bool,
    ) -> Result<usize, VmError> {
        let mut done = 0;
        while done < len {
            let address = start.wrapping_add(done as u64);
            let in_page = (4096 - (address & 0xFFF) as usize).min(len - done);
            let Some(physical) = self.translate(vcpu, address)? else {
                break;
            };
            if !vm::in_memory(&self.vm.memory, physical)
                || !each(GuestAddress(physical), done..done + in_page)
            {
                break;
            }
            done += in_page;
        }
        Ok(done)
    }

    fn arm(&self, vcpu: u8, stepping: bool) -> Result<(), VmError> {
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP,
            ..Default::default()
        };
        if stepping {
            // Without this a slow debugger never gets past one instruction: there always is a timer
            // interrupt to be taken first.
            debug.control |= KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        }
        if !self.hardware.is_empty() {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            // DR7: bit 10 is always set; two enable bits for each register.
            debug.arch.debugreg[7] = 0x400;
            for (index, address) in self.hardware.iter().enumerate().take(HW_BREAKPOINTS) {
                debug.arch.debugreg[index] = *address;
                debug.arch.debugreg[7] |= 2 << (index * 2);
            }
        }
        self.on_vcpu(vcpu, move |fd| fd.set_guest_debug(&debug))?
            .map_err(VmError::kvm("KVM_SET_GUEST_DEBUG"))
    }

    fn run(&mut self) -> Result<(), VmError> {
        // Armed before the first instruction too: the vCPUs are parked.
        for vcpu in 0..self.vm.vcpu_count {
            self.arm(vcpu, self.step == Some(vcpu))?;
        }
        if !self.started {
            // The other vCPUs wait for the first one to start them, named or not.
            self.started = true;
            return self.vm.start();
        }
        for vcpu in self.vm.vcpus().iter() {
            if !self.only_named || self.named.contains(&vcpu.index) {
                vcpu.resume();
            }
        }
        Ok(())
    }

    /// Takes all breakpoints out and lets the guest run.
    fn detach(&mut self) -> Result<(), VmError> {
        if self.vm.exit_reason().is_some() {
            return Ok(());
        }
        self.vm.park();
        for (address, original) in std::mem::take(&mut self.software) {
            self.poke(address, original)?;
        }
        self.hardware.clear();
        self.step = None;
        for vcpu in 0..self.vm.vcpu_count {
            self.on_vcpu(vcpu, |fd| fd.set_guest_debug(&kvm_guest_debug::default()))?
                .map_err(VmError::kvm("KVM_SET_GUEST_DEBUG"))?;
        }
        if self.started {
            for vcpu in self.vm.vcpus().iter() {
                vcpu.resume();
            }
            Ok(())
        } else {
            self.vm.start()
        }
    }

    /// Replaces one byte of guest code; returns the old one.
    fn poke(&self, address: u64, byte: u8) -> Result<Option<u8>, VmError> {
        let mut old = None;
        let memory = self.vm.memory.mmap();
        self.pages(0, address, 1, |at, _| {
            old = memory.read_obj::<u8>(at).ok();
            old.is_some() && memory.write_obj(byte, at).is_ok()
        })?;
        Ok(old)
    }
}

impl Target for Guest<'_> {
    type Arch = X86_64_SSE;
    type Error = VmError;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Guest<'_> {
    fn read_registers(&mut self, out: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let (regs, sregs) = self.registers(vcpu_of(tid)).map_err(TargetError::Fatal)?;
        out.regs = [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ];
        out.rip = regs.rip;
        // The upper half is reserved and zero.
        out.eflags = regs.rflags as u32;
        out.segments.cs = u32::from(sregs.cs.selector);
        out.segments.ss = u32::from(sregs.ss.selector);
        out.segments.ds = u32::from(sregs.ds.selector);
        out.segments.es = u32::from(sregs.es.selector);
        out.segments.fs = u32::from(sregs.fs.selector);
        out.segments.gs = u32::from(sregs.gs.selector);
        Ok(())
    }

    fn write_registers(&mut self, new: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let (mut regs, _) = self.registers(vcpu_of(tid)).map_err(TargetError::Fatal)?;
        [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ] = new.regs;
        regs.rip = new.rip;
        regs.rflags = u64::from(new.eflags);
        self.on_vcpu(vcpu_of(tid), move |fd| fd.set_regs(&regs))
            .map_err(TargetError::Fatal)?
            .map_err(|_| TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let memory = self.vm.memory.mmap();
        let mut buffer = vec![0; data.len()];
        let done = self
            .pages(vcpu_of(tid), start, data.len(), |at, range| {
                memory.read_slice(&mut buffer[range], at).is_ok()
            })
            .map_err(TargetError::Fatal)?;
        data[..done].copy_from_slice(&buffer[..done]);
        // GDB shall see the code, not our traps.
        for (address, original) in self
            .software
            .range(start..start.saturating_add(done as u64))
        {
            data[(address - start) as usize] = *original;
        }
        if done == 0 && !data.is_empty() {
            return Err(TargetError::NonFatal);
        }
        Ok(done)
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let memory = self.vm.memory.mmap();
        let done = self
            .pages(vcpu_of(tid), start, data.len(), |at, range| {
                memory.write_slice(&data[range], at).is_ok()
            })
            .map_err(TargetError::Fatal)?;
        if done < data.len() {
            return Err(TargetError::NonFatal);
        }
        Ok(())
    }

    fn list_active_threads(&mut self, register: &mut dyn FnMut(Tid)) -> Result<(), VmError> {
        (0..self.vm.vcpu_count).for_each(|vcpu| register(tid(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Guest<'_> {
    fn resume(&mut self) -> Result<(), VmError> {
        self.run()
    }

    fn clear_resume_actions(&mut self) -> Result<(), VmError> {
        self.step = None;
        self.named.clear();
        self.only_named = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), VmError> {
        self.named.insert(vcpu_of(tid));
        Ok(())
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Guest<'_> {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), VmError> {
        self.step = Some(vcpu_of(tid));
        self.named.insert(vcpu_of(tid));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Guest<'_> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), VmError> {
        self.only_named = true;
        Ok(())
    }
}

impl Breakpoints for Guest<'_> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest<'_> {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        if self.software.contains_key(&address) {
            return Ok(true);
        }
        let old = self.poke(address, INT3).map_err(TargetError::Fatal)?;
        Ok(old.is_some_and(|old| self.software.insert(address, old).is_none()))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let Some(original) = self.software.remove(&address) else {
            return Ok(false);
        };
        let put_back = self.poke(address, original).map_err(TargetError::Fatal)?;
        Ok(put_back.is_some())
    }
}

impl HwBreakpoint for Guest<'_> {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        if self.hardware.len() >= HW_BREAKPOINTS {
            return Ok(false);
        }
        self.hardware.push(address);
        Ok(true)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let before = self.hardware.len();
        self.hardware.retain(|a| *a != address);
        Ok(self.hardware.len() < before)
    }
}

struct Loop<'a>(std::marker::PhantomData<&'a ()>);

impl<'a> BlockingEventLoop for Loop<'a> {
    type Target = Guest<'a>;
    type Connection = Conn;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut Guest<'a>,
        conn: &mut Conn,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<VmError, io::Error>> {
        loop {
            match target.stops.recv_timeout(POLL) {
                Ok(vcpu) => {
                    target.vm.park();
                    // Others that hit something meanwhile stop at the same place again.
                    while target.stops.try_recv().is_ok() {}
                    let (regs, _) = target
                        .registers(vcpu)
                        .map_err(WaitForStopReasonError::Target)?;
                    let reason = if target.software.contains_key(&regs.rip) {
                        MultiThreadStopReason::SwBreak(tid(vcpu))
                    } else if target.hardware.contains(&regs.rip) {
                        MultiThreadStopReason::HwBreak(tid(vcpu))
                    } else {
                        MultiThreadStopReason::SignalWithThread {
                            tid: tid(vcpu),
                            signal: Signal::SIGTRAP,
                        }
                    };
                    return Ok(Event::TargetStopped(reason));
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if let Some(exit) = target.vm.exit_reason() {
                let reason = if exit.is_orderly() {
                    MultiThreadStopReason::Exited(0)
                } else {
                    MultiThreadStopReason::Terminated(Signal::SIGABRT)
                };
                return Ok(Event::TargetStopped(reason));
            }
            if conn
                .peek()
                .map_err(WaitForStopReasonError::Connection)?
                .is_some()
            {
                let byte = conn.read().map_err(WaitForStopReasonError::Connection)?;
                return Ok(Event::IncomingData(byte));
            }
        }
    }

    fn on_interrupt(target: &mut Guest<'a>) -> Result<Option<Self::StopReason>, VmError> {
        target.vm.park();
        Ok(Some(MultiThreadStopReason::Signal(Signal::SIGINT)))
    }
}
