//! Calls on signals.

use appkernel_core::errno::Errno;
use appkernel_hal::trap::Frame;

use super::{Call, Result, get, get_u64, put, put_words};
use crate::signal::{self, Action, Info, Signal, code};
use crate::task;

const KEPT: u64 = (1 << 8) | (1 << 18);

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        13 => action(c),
        14 => mask(c),
        62 => kill(c),
        127 => {
            // Not in one expression: the copy may bring a page, which may end this task.
            let waiting = c.task.pending.lock().waiting();
            put_words(c.arg(0), &[waiting]).map(|()| 0)
        }
        130 => suspend(c),
        128 => timed_wait(c),
        131 => alternate_stack(c),
        200 => one(c, None, c.int(0), c.arg(1)),
        234 => one(c, Some(c.int(0)), c.int(1), c.arg(2)),
        129 => queue(c, c.int(0), None, c.arg(1), c.arg(2)),
        297 => queue(c, c.int(0), Some(c.int(1)), c.arg(2), c.arg(3)),
        _ => return None,
    })
}

fn action(c: &Call<'_>) -> Result {
    let signal = Signal::parse(c.arg(0))?;
    if c.arg(3) != 8 {
        return Err(Errno::EINVAL);
    }
    let new = match c.arg(1) {
        0 => None,
        at => {
            if signal == Signal::KILL || signal == Signal::STOP {
                return Err(Errno::EINVAL);
            }
            let bytes: [u8; 32] = get(at)?;
            let word = |i: usize| {
                bytes[i * 8..i * 8 + 8]
                    .try_into()
                    .map_or(0, u64::from_le_bytes)
            };
            Some(Action {
                handler: word(0),
                flags: word(1),
                restorer: word(2),
                mask: word(3) & !KEPT,
            })
        }
    };
    let handlers = c.task.handlers();
    let old = handlers.lock().get(signal);
    if let Some(new) = new {
        handlers.lock().set(signal, new);
    }
    if c.arg(2) != 0 {
        put_words(c.arg(2), &[old.handler, old.flags, old.restorer, old.mask])?;
    }
    Ok(0)
}

fn mask(c: &Call<'_>) -> Result {
    if c.arg(3) != 8 {
        return Err(Errno::EINVAL);
    }
    let given = match c.arg(1) {
        0 => None,
        at => Some(get_u64(at)? & !KEPT),
    };
    let old = {
        let mut pending = c.task.pending.lock();
        let old = pending.mask;
        if let Some(set) = given {
            pending.mask = match c.uint(0) {
                0 => old | set,
                1 => old & !set,
                2 => set,
                _ => return Err(Errno::EINVAL),
            };
        }
        old
    };
    let now = c.task.pending.lock().mask;
    signal::adopt(c.task, old & !now);
    if c.arg(2) != 0 {
        put(c.arg(2), &old.to_le_bytes())?;
    }
    Ok(0)
}

fn suspend(c: &Call<'_>) -> Result {
    let mask = get_u64(c.arg(0))? & !KEPT;
    {
        let mut pending = c.task.pending.lock();
        pending.saved_mask = Some(pending.mask);
        pending.mask = mask;
    }
    task::wait_for(task::TIME, || None::<u64>)
}

/// Where a signal of the caller comes from.
fn sender(c: &Call<'_>, code: i32) -> Info {
    Info {
        code,
        id: c.task.process,
        uid: c.task.credentials.lock().uid,
        ..Info::default()
    }
}

/// Whether the caller may send signals to a task.
pub(super) fn permitted(c: &Call<'_>, to: &task::Task) -> bool {
    let own = c.task.credentials.lock().clone();
    if own.is_root() || to.process == c.task.process {
        return true;
    }
    let other = to.credentials.lock();
    [own.uid, own.euid]
        .iter()
        .any(|id| *id == other.uid || *id == other.suid)
}

/// A signal to a process, with what the caller says of it at `info`, if it does.
pub(super) fn to_process(c: &Call<'_>, to: &task::Task, number: u64, info: u64) -> Result {
    if info != 0 {
        let process = crate::container::visible(to.process).cast_signed();
        let given: [u8; 4] = get(info)?;
        if u64::from(u32::from_le_bytes(given)) != number {
            return Err(Errno::EINVAL);
        }
        return queue(c, process, None, number, info);
    }
    if !permitted(c, to) {
        return Err(Errno::EPERM);
    }
    if number != 0 {
        signal::send_process(to.process, Signal::parse(number)?, sender(c, code::USER));
    }
    Ok(0)
}

/// rt_sigqueueinfo and rt_tgsigqueueinfo: a signal with what the caller says of it.
fn queue(c: &Call<'_>, process: i32, thread: Option<i32>, number: u64, info: u64) -> Result {
    let raw: [u8; 32] = get(info)?;
    let int = |at: usize| {
        let bytes = raw.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, i32::from_le_bytes)
    };
    let code = int(8);
    match (process, thread) {
        (..=0, None) => return Err(Errno::ESRCH),
        (..=0, _) | (_, Some(..=0)) => return Err(Errno::EINVAL),
        _ => {}
    }
    let id = |id: i32| c.task.container.id(id.unsigned_abs());
    let task = task::find(id(thread.unwrap_or(process)));
    let task = task
        // Without a thread: the process that one of this number belongs to.
        .filter(|t| thread.is_none() || t.process == id(process))
        .ok_or(Errno::ESRCH)?;
    // Only to itself may a process say that the kernel sent it, or kill.
    if (code >= 0 || code == code::TKILL) && task.process != c.task.process || !permitted(c, &task)
    {
        return Err(Errno::EPERM);
    }
    let info = Info {
        code,
        id: c.task.container.id(int(16).cast_unsigned()),
        uid: int(20).cast_unsigned(),
        value: get_u64(info.wrapping_add(24))?,
        address: 0,
    };
    if number != 0 {
        let signal = Signal::parse(number)?;
        match thread {
            Some(_) => signal::send(&task, signal, info),
            None => {
                signal::send_process(task.process, signal, info);
            }
        }
    }
    Ok(0)
}

fn one(c: &Call<'_>, process: Option<i32>, id: i32, number: u64) -> Result {
    if id <= 0 || process.is_some_and(|id| id <= 0) {
        return Err(Errno::EINVAL);
    }
    let own = |id: i32| c.task.container.id(id.unsigned_abs());
    let task = task::find(own(id))
        .filter(|t| process.is_none_or(|process| t.process == own(process)))
        .ok_or(Errno::ESRCH)?;
    if !permitted(c, &task) {
        return Err(Errno::EPERM);
    }
    if number != 0 {
        signal::send(&task, Signal::parse(number)?, sender(c, code::TKILL));
    }
    Ok(0)
}

fn kill(c: &Call<'_>) -> Result {
    let (who, number) = (c.int(0), c.arg(1));
    let signal = if number == 0 {
        None
    } else {
        Some(Signal::parse(number)?)
    };
    let container = &c.task.container;
    let group = match who {
        0 => Some(c.task.links.lock().group),
        ..=-2 => Some(container.id(who.unsigned_abs())),
        _ => None,
    };
    let one = container.id(who.unsigned_abs());
    let mut result = Err(Errno::ESRCH);
    let mut processes = alloc::vec::Vec::new();
    for task in task::living() {
        let process = task.process;
        let hit = container.has(process)
            && match (who, group) {
                (-1, _) => process != container.id(1) && process != c.task.process,
                (_, Some(group)) => task.links.lock().group == group,
                _ => process == one || task.id == one,
            };
        if !hit || processes.contains(&process) {
            continue;
        }
        processes.push(process);
        if !permitted(c, &task) {
            result = result.or(Err(Errno::EPERM));
            continue;
        }
        result = Ok(0);
        if let Some(signal) = signal {
            signal::send_process(process, signal, sender(c, code::USER));
        }
    }
    if result.is_err() && who > 0 && task::is_zombie(one) {
        return Ok(0);
    }
    result
}

/// rt_sigtimedwait(2).
fn timed_wait(c: &Call<'_>) -> Result {
    let set = get_u64(c.arg(0))? & !KEPT;
    let deadline = match c.arg(2) {
        0 => None,
        at => Some(appkernel_hal::clock::monotonic_ns().saturating_add(super::get_timespec(at)?)),
    };
    signal::adopt(c.task, set);
    c.task.pending.lock().awaited = set;
    let take = || c.task.pending.lock().take(set);
    let found = task::wait_until(task::TIME, deadline, take);
    c.task.pending.lock().awaited = 0;
    let (signal, info) = match found {
        Err(Errno::ETIMEDOUT) => return Err(Errno::EAGAIN),
        other => other?,
    };
    if c.arg(1) != 0 {
        let mut words = [0; 16];
        for (slot, word) in words.iter_mut().zip(signal::siginfo(signal, &info)) {
            *slot = word;
        }
        put_words(c.arg(1), &words)?;
    }
    Ok(signal.0.into())
}

/// sigaltstack(2).
fn alternate_stack(c: &Call<'_>) -> Result {
    const DISABLE: u64 = 2;
    const SMALLEST: u64 = 2048;
    let rsp = c.task.frame().rsp;
    let old = c.task.pending.lock().stack;
    if c.arg(0) != 0 {
        let (start, flags, len) = (
            get_u64(c.arg(0))?,
            get_u64(c.arg(0).wrapping_add(8))? & 0xffff_ffff,
            get_u64(c.arg(0).wrapping_add(16))?,
        );
        const KNOWN: u64 = DISABLE | 1 | 1 << 31;
        if flags & !KNOWN != 0 {
            return Err(Errno::EINVAL);
        }
        if signal::stack_flags(old, rsp) == 1 {
            return Err(Errno::EPERM);
        }
        let new = if flags & DISABLE != 0 {
            (0, 0)
        } else if len < SMALLEST {
            return Err(Errno::ENOMEM);
        } else {
            (start, len)
        };
        c.task.pending.lock().stack = new;
    }
    if c.arg(1) != 0 {
        let flags = signal::stack_flags(old, rsp);
        put_words(c.arg(1), &[old.0, flags.into(), old.1])?;
    }
    Ok(0)
}

/// Back from a handler.
pub fn sigreturn(c: &Call<'_>, frame: &mut Frame) -> Result<()> {
    if signal::leave(c.task, frame).is_err() {
        task::end_process(c.task.process, Signal::SEGV.0.into());
    }
    Ok(())
}
