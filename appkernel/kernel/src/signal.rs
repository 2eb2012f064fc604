//! Signals: what waits, what they do, and the detour of a program through its handler.

use alloc::vec;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_hal::trap::{Frame, SYSCALL};
use appkernel_hal::{USER_END, cpu, usercopy};

use crate::task::{self, Task};

/// A signal's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal(pub u8);

impl Signal {
    pub const ILL: Self = Self(4);
    pub const TRAP: Self = Self(5);
    pub const BUS: Self = Self(7);
    pub const FPE: Self = Self(8);
    pub const KILL: Self = Self(9);
    pub const SEGV: Self = Self(11);
    pub const PIPE: Self = Self(13);
    pub const CHLD: Self = Self(17);
    pub const STOP: Self = Self(19);

    /// Its bit in a mask.
    pub fn bit(self) -> u64 {
        1 << (u32::from(self.0).wrapping_sub(1) & 63)
    }

    /// A signal from a program's number.
    pub fn parse(number: u64) -> Result<Self, Errno> {
        match number {
            1..=64 => Ok(Self(number as u8)),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Does nothing unless handled: child, urgent data, window size; continue; and, as nothing can
    /// be stopped yet, the stop signals of a terminal.
    fn is_ignored_by_default(self) -> bool {
        matches!(self.0, 17 | 18 | 20..=23 | 28)
    }
}

const IGNORE: u64 = 1;
/// Flags of an action.
mod flag {
    pub const SIGINFO: u64 = 4;
    pub const RESTART: u64 = 0x1000_0000;
    pub const NODEFER: u64 = 0x4000_0000;
    pub const RESETHAND: u64 = 0x8000_0000;
    pub const RESTORER: u64 = 0x0400_0000;
}

/// What a signal does: the kernel's `struct sigaction`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Action {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// What the signals of a process do.
#[derive(Clone, Debug, Default)]
pub struct Handlers(Vec<Action>);

impl Handlers {
    /// The action of a signal.
    pub fn get(&self, signal: Signal) -> Action {
        self.0
            .get(usize::from(signal.0))
            .copied()
            .unwrap_or_default()
    }

    /// Sets it.
    pub fn set(&mut self, signal: Signal, action: Action) {
        self.0.resize(65, Action::default());
        if let Some(slot) = self.0.get_mut(usize::from(signal.0)) {
            *slot = action;
        }
    }

    /// Handlers are gone with the program that had them; what was ignored still is.
    pub fn reset(&mut self) {
        for action in &mut self.0 {
            if action.handler != IGNORE {
                *action = Action::default();
            }
        }
    }
}

/// What waits for a thread.
#[derive(Debug, Default)]
pub struct Pending {
    set: u64,
    /// Blocked signals.
    pub mask: u64,
    /// The thread has to end, with this status.
    pub ending: Option<i32>,
    /// Mask to go back to after a call that changed it while it waited.
    pub saved_mask: Option<u64>,
}

impl Pending {
    /// Of a new thread.
    pub fn with_mask(mask: u64) -> Self {
        Self {
            mask,
            ..Self::default()
        }
    }

    /// Whether a system call has to give way.
    pub fn deliverable(&self) -> bool {
        self.ending.is_some() || self.set & !self.mask != 0
    }

    /// Signals that wait.
    pub fn waiting(&self) -> u64 {
        self.set
    }
}

/// Sends a signal to a thread.
pub fn send(task: &Task, signal: Signal) {
    let action = task.handlers().lock().get(signal);
    let ignored = action.handler == IGNORE || action.handler == 0 && signal.is_ignored_by_default();
    if ignored && signal != Signal::KILL && signal != Signal::STOP {
        return;
    }
    let wakes = {
        let mut pending = task.pending.lock();
        pending.set |= signal.bit();
        if signal == Signal::KILL {
            pending.mask &= !signal.bit();
        }
        pending.deliverable()
    };
    if wakes {
        task::wake_task(task.id);
    }
}

/// The program did something it may not.
pub fn fault(signal: Signal, frame: &Frame, address: u64) {
    let task = task::current();
    let action = task.handlers().lock().get(signal);
    let mut pending = task.pending.lock();
    // Blocked or ignored, it would happen again for ever: the program ends, as on Linux.
    if action.handler <= IGNORE || pending.mask & signal.bit() != 0 {
        drop(pending);
        crate::log!(
            "process {} ended by signal {}: exception {} at {:#x}, address {address:#x}",
            task.process,
            signal.0,
            frame.vector,
            frame.rip
        );
        task::end_process(task.process, signal.0.into());
        return;
    }
    pending.set |= signal.bit();
}

/// A mistake in this many bytes below a program's stack pointer is its own (System V ABI).
const RED_ZONE: u64 = 128;
/// Bytes of the parts of a signal frame, as Linux has them.
mod layout {
    /// Return address, then `struct ucontext`.
    pub const CONTEXT: usize = 8;
    /// In it: registers.
    pub const REGISTERS: usize = CONTEXT + 40;
    pub const MASK: usize = REGISTERS + 256;
    /// `siginfo` behind it.
    pub const INFO: usize = MASK + 8;
    pub const BYTES: usize = INFO + 128;
}

/// On the way back to the program: ends it, or makes it run a handler first.
pub fn deliver(frame: &mut Frame) {
    loop {
        let (ending, signal) = {
            let task = task::current();
            let mut pending = task.pending.lock();
            let ready = pending.set & !pending.mask;
            let signal = (ready != 0).then(|| Signal(ready.trailing_zeros() as u8 + 1));
            if let Some(signal) = signal {
                pending.set &= !signal.bit();
            } else if let Some(mask) = pending.saved_mask.take() {
                pending.mask = mask;
            }
            (pending.ending, signal)
        };
        if let Some(status) = ending {
            // Nothing is held here: the stack is never unwound.
            task::exit_thread(status);
        }
        let Some(signal) = signal else { return };
        let task = task::current();
        let action = task.handlers().lock().get(signal);
        match action.handler {
            0 if signal.is_ignored_by_default() => {}
            0 => task::end_process(task.process, signal.0.into()),
            IGNORE => {}
            _ => {
                restart(frame, action.flags & flag::RESTART != 0);
                if enter(&task, frame, signal, action).is_err() {
                    task::end_process(task.process, Signal::SEGV.0.into());
                }
            }
        }
    }
}

/// A call that was interrupted is made again after the handler, if that is wanted.
fn restart(frame: &mut Frame, wanted: bool) {
    let interrupted =
        frame.vector == SYSCALL && frame.rax == u64::from(Errno::EINTR.0 as u32).wrapping_neg();
    // Waits that are never restarted have their own numbers: poll, select, nanosleep, pause, futex.
    let restartable = !matches!(frame.code, 7 | 23 | 34 | 35 | 130 | 202 | 230 | 270 | 271);
    if interrupted && wanted && restartable {
        frame.rax = frame.code;
        frame.rip -= 2;
    }
}

fn enter(task: &Task, frame: &mut Frame, signal: Signal, action: Action) -> Result<(), Errno> {
    if action.flags & flag::RESTORER == 0 {
        return Err(Errno::EFAULT);
    }
    let old_mask = {
        let mut pending = task.pending.lock();
        let old = pending.saved_mask.take().unwrap_or(pending.mask);
        pending.mask |= action.mask;
        if action.flags & flag::NODEFER == 0 {
            pending.mask |= signal.bit();
        }
        old
    };
    let context = task.own_context();
    let vectors = context.read_vectors();
    let vectors_at = (frame.rsp - RED_ZONE - vectors.len() as u64) & !63;
    let at = ((vectors_at - layout::BYTES as u64) & !15) - 8;
    let mut bytes = vec![0; layout::BYTES];
    let mut put = |offset: usize, value: u64| {
        if let Some(slot) = bytes.get_mut(offset..offset + 8) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
    };
    put(0, action.restorer);
    let f = &*frame;
    let registers = [
        f.r8,
        f.r9,
        f.r10,
        f.r11,
        f.r12,
        f.r13,
        f.r14,
        f.r15,
        f.rdi,
        f.rsi,
        f.rbp,
        f.rbx,
        f.rdx,
        f.rax,
        f.rcx,
        f.rsp,
        f.rip,
        f.rflags,
        f.cs | f.ss << 48,
        f.code,
        f.vector,
        old_mask,
        cpu::read_cr2(),
        vectors_at,
    ];
    for (i, value) in registers.into_iter().enumerate() {
        put(layout::REGISTERS + i * 8, value);
    }
    put(layout::MASK, old_mask);
    put(layout::INFO, signal.0.into());
    if f.vector != SYSCALL {
        put(layout::INFO + 16, cpu::read_cr2());
    }
    usercopy::write(vectors_at, &vectors).map_err(|_| Errno::EFAULT)?;
    usercopy::write(at, &bytes).map_err(|_| Errno::EFAULT)?;
    if action.flags & flag::RESETHAND != 0 {
        task.handlers().lock().set(signal, Action::default());
    }
    let info = at + layout::INFO as u64;
    let siginfo = action.flags & flag::SIGINFO != 0;
    frame.rdi = signal.0.into();
    frame.rsi = if siginfo { info } else { 0 };
    frame.rdx = at + layout::CONTEXT as u64;
    frame.rax = 0;
    frame.rip = action.handler;
    frame.rsp = at;
    frame.rflags &= !0x400;
    // All registers by iretq: the handler's address may be anything.
    frame.vector = 0;
    if frame.rip >= USER_END {
        return Err(Errno::EFAULT);
    }
    Ok(())
}

/// Back from a handler: takes the registers the program (or the handler) left on its stack. They are
/// the program's to choose, but not its privilege.
pub fn leave(task: &Task, frame: &mut Frame) -> Result<(), Errno> {
    let fault = |_| Errno::EFAULT;
    // The return address was popped.
    let at = frame.rsp.wrapping_sub(8);
    let mut bytes = [0u8; layout::BYTES];
    usercopy::read(&mut bytes, at).map_err(fault)?;
    let get = |offset: usize| {
        let word = bytes
            .get(offset..offset + 8)
            .and_then(|b| b.try_into().ok());
        word.map_or(0, u64::from_le_bytes)
    };
    let register = |i: usize| get(layout::REGISTERS + i * 8);
    let vectors_at = register(23);
    let context = task.own_context();
    let mut vectors = context.read_vectors();
    if vectors_at != 0 {
        usercopy::read(&mut vectors, vectors_at).map_err(fault)?;
        context.write_vectors(&vectors);
    }
    const FLAGS: u64 = 0x4_0cd5;
    *frame = Frame {
        r8: register(0),
        r9: register(1),
        r10: register(2),
        r11: register(3),
        r12: register(4),
        r13: register(5),
        r14: register(6),
        r15: register(7),
        rdi: register(8),
        rsi: register(9),
        rbp: register(10),
        rbx: register(11),
        rdx: register(12),
        rax: register(13),
        rcx: register(14),
        rsp: register(15),
        rip: register(16),
        rflags: (register(17) & FLAGS) | 0x202,
        cs: cpu::USER_CODE.into(),
        ss: cpu::USER_DATA.into(),
        vector: 0,
        code: 0,
    };
    if frame.rip >= USER_END {
        return Err(Errno::EFAULT);
    }
    task.pending.lock().mask = get(layout::MASK) & !(Signal::KILL.bit() | Signal::STOP.bit());
    Ok(())
}
