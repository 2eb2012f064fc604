//! Calls on signals.

use appkernel_core::errno::Errno;
use appkernel_hal::trap::Frame;

use super::{Call, Result, get, get_u64, put, put_words};
use crate::signal::{self, Action, Signal};
use crate::task;

const KEPT: u64 = (1 << 8) | (1 << 18);

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        13 => action(c),
        14 => mask(c),
        62 => kill(c),
        127 => put_words(c.arg(0), &[c.task.pending.lock().waiting()]).map(|()| 0),
        130 => suspend(c),
        131 => Ok(0),
        200 => one(c, c.int(0), c.arg(1)),
        234 => one(c, c.int(1), c.arg(2)),
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

fn one(c: &Call<'_>, id: i32, number: u64) -> Result {
    let task = u32::try_from(id)
        .ok()
        .and_then(task::find)
        .ok_or(Errno::ESRCH)?;
    if number != 0 {
        signal::send(&task, Signal::parse(number)?);
    }
    let _ = c;
    Ok(0)
}

fn kill(c: &Call<'_>) -> Result {
    let (who, number) = (c.int(0), c.arg(1));
    let signal = if number == 0 {
        None
    } else {
        Some(Signal::parse(number)?)
    };
    let group = match who {
        0 => Some(c.task.links.lock().group),
        ..=-2 => Some(who.unsigned_abs()),
        _ => None,
    };
    let mut found = false;
    let mut processes = alloc::vec::Vec::new();
    for task in task::living() {
        let process = task.process;
        let hit = match (who, group) {
            (-1, _) => process != 1 && process != c.task.process,
            (_, Some(group)) => task.links.lock().group == group,
            _ => process == who.unsigned_abs(),
        };
        if !hit || processes.contains(&process) {
            continue;
        }
        processes.push(process);
        found = true;
        if let Some(signal) = signal {
            signal::send(&task, signal);
        }
    }
    if found { Ok(0) } else { Err(Errno::ESRCH) }
}

/// Back from a handler.
pub fn sigreturn(c: &Call<'_>, frame: &mut Frame) -> Result<()> {
    if signal::leave(c.task, frame).is_err() {
        task::end_process(c.task.process, Signal::SEGV.0.into());
    }
    Ok(())
}
