//! Signals: what waits, what they do, and the detour of a program through its handler.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_hal::trap::{Frame, SYSCALL};
use appkernel_hal::{USER_END, cpu, usercopy};

use crate::container::visible;
use crate::exec::Image;
use crate::syscall;
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
    pub const CONT: Self = Self(18);
    pub const STOP: Self = Self(19);
    pub const TTIN: Self = Self(21);
    pub const WINCH: Self = Self(28);
    pub const HUP: Self = Self(1);
    pub const XFSZ: Self = Self(25);
    pub const ALRM: Self = Self(14);
    pub const VTALRM: Self = Self(26);
    pub const PROF: Self = Self(27);

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

    /// Does nothing unless handled: child, continue, urgent data, window size.
    fn is_ignored_by_default(self) -> bool {
        matches!(self.0, 17 | 18 | 23 | 28)
    }

    /// Stops the process unless handled.
    fn stops(self) -> bool {
        matches!(self.0, 19..=22)
    }

    /// Cannot be handled, blocked or ignored.
    fn is_forced(self) -> bool {
        self == Self::KILL || self == Self::STOP
    }
}

/// What a handler is told of a signal.
#[derive(Clone, Copy, Debug, Default)]
pub struct Info {
    pub code: i32,
    /// Who sent it, and its user.
    pub id: u32,
    pub uid: u32,
    /// Exit status of a child, or the value that was sent with it.
    pub value: u64,
    /// Where a fault was.
    pub address: u64,
}

/// Where a signal comes from.
pub mod code {
    pub const USER: i32 = 0;
    pub const KERNEL: i32 = 0x80;
    pub const TKILL: i32 = -6;
    pub const TIMER: i32 = -2;
    pub const EXITED: i32 = 1;
    pub const KILLED: i32 = 2;
    pub const STOPPED: i32 = 5;
    pub const CONTINUED: i32 = 6;
}

const IGNORE: u64 = 1;
/// Flags of an action.
mod flag {
    pub const NOCLDSTOP: u64 = 1;
    pub const NOCLDWAIT: u64 = 2;
    pub const SIGINFO: u64 = 4;
    pub const ONSTACK: u64 = 0x0800_0000;
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

    /// Sets of signals that are ignored, and that have handlers.
    pub fn sets(&self) -> (u64, u64) {
        let (mut ignored, mut caught) = (0, 0);
        for (number, action) in self.0.iter().enumerate().skip(1) {
            match action.handler {
                0 => {}
                IGNORE => ignored |= Signal(number as u8).bit(),
                _ => caught |= Signal(number as u8).bit(),
            }
        }
        (ignored, caught)
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
    infos: Vec<(Signal, Info)>,
    /// Blocked signals.
    pub mask: u64,
    /// The thread has to end, with this status.
    pub ending: Option<i32>,
    /// Another program, which another thread wants to run in this one's place (execve).
    pub next: Option<Box<Image>>,
    /// Mask to go back to after a call that changed it while it waited.
    pub saved_mask: Option<u64>,
    /// Alternate stack: start, bytes.
    pub stack: (u64, u64),
    /// Signals that the thread waits for now (sigwait), blocked or not.
    pub awaited: u64,
}

/// Real-time signals that wait for a thread, at most.
const MAX_QUEUED: usize = 128;
/// First real-time signal: these are queued.
const REAL_TIME: u8 = 32;

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
        self.ending.is_some() || self.next.is_some() || self.set & !self.mask != 0
    }

    /// Signals that wait.
    pub fn waiting(&self) -> u64 {
        self.set
    }

    fn add(&mut self, signal: Signal, info: Info) {
        if (self.set & signal.bit() == 0 || signal.0 >= REAL_TIME) && self.infos.len() < MAX_QUEUED
        {
            self.infos.push((signal, info));
        }
        self.set |= signal.bit();
    }

    /// Takes the first of these signals that waits.
    pub fn take(&mut self, wanted: u64) -> Option<(Signal, Info)> {
        let ready = self.set & wanted;
        if ready == 0 {
            return None;
        }
        let signal = Signal(ready.trailing_zeros() as u8 + 1);
        let at = self.infos.iter().position(|(s, _)| *s == signal);
        let info = at.map_or(Info::default(), |at| self.infos.remove(at).1);
        if self.infos.iter().all(|(s, _)| *s != signal) {
            self.set &= !signal.bit();
        }
        Some((signal, info))
    }

    /// Whether the thread would take a signal that is sent to its process.
    fn wants(&self, signal: Signal) -> bool {
        (self.mask & !self.awaited) & signal.bit() == 0
    }

    /// Gives up those of `set` that were sent to the process and wait here because nobody wanted them.
    fn give_up(&mut self, set: u64) -> Vec<(Signal, Info)> {
        let set = set & self.mask & !self.awaited;
        let of_process = |(signal, info): &mut (Signal, Info)| {
            signal.bit() & set != 0 && info.code != code::TKILL
        };
        let given: Vec<_> = self.infos.extract_if(.., of_process).collect();
        for (signal, _) in &given {
            if self.infos.iter().all(|(s, _)| s != signal) {
                self.set &= !signal.bit();
            }
        }
        given
    }

    fn forget(&mut self, set: u64) {
        self.set &= !set;
        self.infos.retain(|(s, _)| s.bit() & set == 0);
    }
}

/// A thread wants signals of `set` now: those that were sent to its process when nobody wanted them
/// wait at another thread.
pub fn adopt(task: &Task, set: u64) {
    // The threads of a process share these.
    if set == 0 || Arc::strong_count(&task.links) == 1 {
        return;
    }
    for other in task::living() {
        if other.process == task.process && other.id != task.id {
            let given = other.pending.lock().give_up(set);
            for (signal, info) in given {
                task.pending.lock().add(signal, info);
            }
        }
    }
}

/// Sends a signal to a thread.
pub fn send(task: &Task, signal: Signal, info: Info) {
    let stops = signal.stops();
    if signal == Signal::CONT || stops {
        for thread in task::living() {
            if thread.process == task.process {
                let other = if stops { Signal::CONT.bit() } else { STOPS };
                thread.pending.lock().forget(other);
            }
        }
    }
    if signal == Signal::CONT {
        continue_process(task.process);
    }
    let action = task.handlers().lock().get(signal);
    let default = action.handler == 0;
    // The first process of a container is deaf to what it does not handle, except from outside.
    let deaf = default
        && visible(task.process) == 1
        && task.container.number != 0
        && !(signal.is_forced() && info.id == 0);
    if signal == Signal::KILL {
        // At once and for all threads, whatever they do or wait for: one that is stopped, or waits
        // for what does not come, never takes a signal out of those that wait.
        if !deaf {
            task::end_process(task.process, signal.0.into());
        }
        return;
    }
    let ignored = action.handler == IGNORE || default && signal.is_ignored_by_default();
    let wakes = {
        let mut pending = task.pending.lock();
        // A blocked signal waits even if it is ignored: somebody may wait for it.
        let blocked = pending.mask & signal.bit() != 0;
        if deaf || ignored && !blocked && !signal.is_forced() {
            return;
        }
        pending.add(signal, info);
        if signal.is_forced() {
            pending.mask &= !signal.bit();
        }
        pending.deliverable() || blocked
    };
    if wakes {
        task::wake_task(task.id);
        // Another thread may read it from a file.
        if Arc::strong_count(&task.links) > 1 {
            task::wake(task::FILES);
        }
    }
}

const STOPS: u64 = 0b1111 << 18;

/// Sends a signal to a process: to a thread that takes it, if there is one.
pub fn send_process(process: u32, signal: Signal, info: Info) -> bool {
    let threads: Vec<_> = task::living()
        .into_iter()
        .filter(|t| t.process == process)
        .collect();
    let willing = threads.iter().find(|t| t.pending.lock().wants(signal));
    match willing.or(threads.first()) {
        Some(task) => {
            send(task, signal, info);
            true
        }
        None => false,
    }
}

/// Tells a process that a child ended. Whether it does not care: then nobody waits for the child.
pub fn child_ended(parent: &Task, child: u32, status: i32) -> bool {
    let action = parent.handlers().lock().get(Signal::CHLD);
    let (code, value) = if status & 0x7f == 0 {
        (code::EXITED, status >> 8)
    } else {
        (code::KILLED, status & 0x7f)
    };
    let info = Info {
        code,
        id: child,
        value: value as u64,
        ..Info::default()
    };
    send_process(parent.process, Signal::CHLD, info);
    action.handler == IGNORE || action.flags & flag::NOCLDWAIT != 0
}

fn tell_parent(task: &Task, code: i32, signal: Signal) {
    let parent = task.links.lock().parent;
    let Some(parent) = task::find(parent).filter(|_| parent != 0) else {
        return;
    };
    if parent.handlers().lock().get(Signal::CHLD).flags & flag::NOCLDSTOP == 0 {
        let info = Info {
            code,
            id: task.process,
            value: signal.0.into(),
            ..Info::default()
        };
        send_process(parent.process, Signal::CHLD, info);
    }
    task::wake(task::CHILD + parent.process as usize);
}

fn continue_process(process: u32) {
    let mut was_stopped = None;
    for thread in task::living() {
        if thread.process != process {
            continue;
        }
        let stopped = {
            let mut links = thread.links.lock();
            core::mem::take(&mut links.is_stopped)
        };
        if stopped {
            let mut links = thread.links.lock();
            links.stopped = None;
            links.continued = true;
            drop(links);
            was_stopped = Some(Arc::clone(&thread));
        }
        task::go_on(thread.id);
    }
    if let Some(task) = was_stopped {
        tell_parent(&task, code::CONTINUED, Signal::CONT);
    }
}

/// Stops the running process.
fn stop_process(task: &Task, signal: Signal) {
    {
        let mut links = task.links.lock();
        links.stopped = Some(signal.0);
        links.is_stopped = true;
        links.continued = false;
    }
    tell_parent(task, code::STOPPED, signal);
}

/// The program did something it may not; `code` says what, as a handler is told.
pub fn fault((signal, code): (Signal, i32), frame: &Frame, address: u64) {
    let task = task::current();
    let action = task.handlers().lock().get(signal);
    let mut pending = task.pending.lock();
    // Blocked or ignored, it would happen again for ever: the program ends, as on Linux.
    if action.handler <= IGNORE || pending.mask & signal.bit() != 0 {
        drop(pending);
        crate::log!(
            "process {} ended by signal {}: exception {} at {:#x}, address {address:#x}",
            visible(task.process),
            signal.0,
            frame.vector,
            frame.rip
        );
        task::end_process(task.process, signal.0.into());
        return;
    }
    let info = Info {
        code,
        address,
        ..Info::default()
    };
    pending.add(signal, info);
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

/// On the way back to the program: ends it, stops it, or makes it run a handler first.
pub fn deliver(frame: &mut Frame) {
    let mut was_stopped = false;
    loop {
        let (ending, signal, stopped, replaced) = {
            let task = task::current();
            let stopped = task.links.lock().is_stopped;
            let mut pending = task.pending.lock();
            let replaced = pending.next.is_some();
            let wanted = if stopped || replaced {
                0
            } else {
                !pending.mask
            };
            let signal = pending.take(wanted);
            if signal.is_none()
                && let Some(mask) = pending.saved_mask.take()
            {
                pending.mask = mask;
                // What the old mask lets through is next.
                if pending.set & !pending.mask != 0 {
                    continue;
                }
            }
            (pending.ending, signal, stopped, replaced)
        };
        if let Some(status) = ending {
            // Nothing is held here: the stack is never unwound.
            task::exit_thread(status);
        }
        if replaced {
            let task = task::current();
            if syscall::take_over(&task, frame) {
                was_stopped = false;
            }
            continue;
        }
        if stopped {
            was_stopped = true;
            task::stop();
            continue;
        }
        let Some((signal, info)) = signal else {
            // A stop by itself is nothing that a program notices.
            restart(frame, was_stopped);
            return;
        };
        let task = task::current();
        let action = task.handlers().lock().get(signal);
        match action.handler {
            0 if signal.is_ignored_by_default() => {}
            0 if signal.stops() => stop_process(&task, signal),
            0 => task::end_process(task.process, signal.0.into()),
            IGNORE => {}
            _ => {
                restart(frame, action.flags & flag::RESTART != 0);
                was_stopped = false;
                if enter(&task, frame, signal, info, action).is_err() {
                    // No room for it on its stack: that is a fault, which may be handled on another.
                    if signal == Signal::SEGV {
                        task::end_process(task.process, Signal::SEGV.0.into());
                    } else {
                        fault((Signal::SEGV, code::KERNEL), frame, 0);
                    }
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
    let restartable = !matches!(
        frame.code,
        7 | 23 | 34 | 35 | 65 | 69 | 70 | 128 | 130 | 202 | 220 | 230 | 232 | 281 | 270 | 271
    );
    if interrupted && wanted && restartable {
        frame.rax = frame.code;
        frame.rip -= 2;
    }
}

fn enter(
    task: &Task,
    frame: &mut Frame,
    signal: Signal,
    info: Info,
    action: Action,
) -> Result<(), Errno> {
    if action.flags & flag::RESTORER == 0 || action.handler >= USER_END {
        return Err(Errno::EFAULT);
    }
    let (stack, old_mask) = {
        let pending = task.pending.lock();
        (pending.stack, pending.saved_mask.unwrap_or(pending.mask))
    };
    let context = task.own_context();
    let vectors = context.read_vectors();
    let on_stack = on_stack(stack, frame.rsp);
    let top = if action.flags & flag::ONSTACK != 0 && stack.1 > 0 && !on_stack {
        stack.0.saturating_add(stack.1)
    } else {
        // The stack pointer is the program's and may be anything.
        frame.rsp.wrapping_sub(RED_ZONE)
    };
    let vectors_at = top.wrapping_sub(vectors.len() as u64) & !63;
    let at = (vectors_at.wrapping_sub(layout::BYTES as u64) & !15).wrapping_sub(8);
    let mut bytes = vec![0; layout::BYTES];
    let mut put = |offset: usize, value: u64| {
        if let Some(slot) = bytes.get_mut(offset..offset + 8) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
    };
    put(0, action.restorer);
    put(layout::CONTEXT + 16, stack.0);
    put(layout::CONTEXT + 24, stack_flags(stack, frame.rsp).into());
    put(layout::CONTEXT + 32, stack.1);
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
    for (i, word) in siginfo(signal, &info).into_iter().enumerate() {
        put(layout::INFO + i * 8, word);
    }
    usercopy::write(vectors_at, &vectors).map_err(|_| Errno::EFAULT)?;
    usercopy::write(at, &bytes).map_err(|_| Errno::EFAULT)?;
    // Nothing can fail any more.
    {
        let mut pending = task.pending.lock();
        pending.saved_mask = None;
        pending.mask |= action.mask;
        if action.flags & flag::NODEFER == 0 {
            pending.mask |= signal.bit();
        }
    }
    if action.flags & flag::RESETHAND != 0 {
        // The rest of the action is kept.
        let reset = Action {
            handler: 0,
            ..action
        };
        task.handlers().lock().set(signal, reset);
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
    Ok(())
}

fn on_stack(stack: (u64, u64), rsp: u64) -> bool {
    stack.1 > 0 && rsp > stack.0 && rsp <= stack.0.saturating_add(stack.1)
}

/// `ss_flags` of the alternate stack.
pub fn stack_flags(stack: (u64, u64), rsp: u64) -> u32 {
    match stack.1 {
        0 => 2,
        _ => on_stack(stack, rsp).into(),
    }
}

/// The first words of a `siginfo`.
pub fn siginfo(signal: Signal, info: &Info) -> [u64; 4] {
    let number = u64::from(signal.0);
    let code = u64::from(info.code.cast_unsigned());
    let sender = u64::from(visible(info.id)) | u64::from(info.uid) << 32;
    match signal {
        Signal::ILL | Signal::FPE | Signal::SEGV | Signal::BUS | Signal::TRAP if info.code > 0 => {
            [number, code, info.address, 0]
        }
        _ => [number, code, sender, info.value],
    }
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
