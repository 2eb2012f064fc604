//! Interval timers and timers of timer_create.

use appkernel_core::errno::Errno;

use super::{Call, Result, get, get_timespec, get_u64, put, put_words};
use crate::alarms::{self, Clock, Effect};
use crate::signal::Signal;
use crate::task;

const SECOND: u64 = 1_000_000_000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        36 => interval(c),
        37 => {
            let (left, _) = alarms::set(c.task.process, u64::from(c.uint(0)) * SECOND, 0);
            Ok(left.div_ceil(SECOND))
        }
        38 => set_interval(c),
        222 => create(c),
        223 => set(c),
        224 => alarms::left(c.task.process, c.uint(0)).and_then(|left| put_times(c.arg(1), left)),
        225 => alarms::overrun(c.task.process, c.uint(0)).map(u64::from),
        226 => alarms::remove(c.task.process, c.uint(0)).map(|()| 0),
        _ => return None,
    })
}

fn put_interval(at: u64, (left, interval): (u64, u64)) -> Result {
    if at == 0 {
        return Ok(0);
    }
    let us = |ns: u64| ns % SECOND / 1000;
    let words = [interval / SECOND, us(interval), left / SECOND, us(left)];
    put_words(at, &words).map(|()| 0)
}

fn interval(c: &Call<'_>) -> Result {
    if c.uint(0) > 2 {
        return Err(Errno::EINVAL);
    }
    let left = alarms::get_interval(c.task.process, c.uint(0));
    if c.arg(1) == 0 {
        return Err(Errno::EFAULT);
    }
    put_interval(c.arg(1), left)
}

fn set_interval(c: &Call<'_>) -> Result {
    let time = |at: u64| -> Result {
        let (seconds, us) = (get_u64(at)?, get_u64(at.wrapping_add(8))?);
        if us >= 1_000_000 || seconds > i64::MAX.cast_unsigned() {
            return Err(Errno::EINVAL);
        }
        Ok(seconds.saturating_mul(SECOND).saturating_add(us * 1000))
    };
    let (interval, value) = match c.arg(1) {
        0 => (0, 0),
        at => (time(at)?, time(at.wrapping_add(16))?),
    };
    if c.uint(0) > 2 {
        return Err(Errno::EINVAL);
    }
    let old = alarms::set_interval(c.task.process, c.uint(0), value, interval);
    put_interval(c.arg(2), old)
}

/// timer_create(2).
fn create(c: &Call<'_>) -> Result {
    const NOTIFY_SIGNAL: i32 = 0;
    const NOTIFY_NONE: i32 = 1;
    /// For the kernel a signal: the C library makes the thread.
    const NOTIFY_THREAD: i32 = 2;
    const NOTIFY_THREAD_ID: i32 = 4;
    let clock = match c.uint(0) {
        0 | 8 | 11 => Clock::Day,
        1 | 7 | 9 => Clock::Monotonic,
        2 => Clock::Process,
        3 => Clock::Thread(c.task.id),
        _ => return Err(Errno::EINVAL),
    };
    let mut effect = Effect {
        signal: Some(Signal::ALRM),
        thread: None,
        value: 0,
    };
    if c.arg(1) != 0 {
        let raw: [u8; 24] = get(c.arg(1))?;
        let int = |at: usize| {
            let bytes = raw.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map_or(0, i32::from_le_bytes)
        };
        effect.value = get_u64(c.arg(1))?;
        let notify = int(12);
        effect.signal = match notify {
            NOTIFY_NONE => None,
            NOTIFY_SIGNAL | NOTIFY_THREAD | NOTIFY_THREAD_ID => Some(Signal::parse(int(8) as u64)?),
            _ => return Err(Errno::EINVAL),
        };
        if notify == NOTIFY_THREAD_ID {
            let id = c.task.container.id(int(16).cast_unsigned());
            let thread = task::find(id).filter(|t| t.process == c.task.process);
            effect.thread = Some(thread.ok_or(Errno::EINVAL)?.id);
        }
    }
    let given = c.arg(1) != 0;
    let id = alarms::make(c.task.process, clock, |id| {
        if !given {
            effect.value = id.into();
        }
        effect
    })?;
    put(c.arg(2), &id.to_le_bytes()).inspect_err(|_| {
        let _ = alarms::remove(c.task.process, id);
    })?;
    Ok(0)
}

/// timer_settime(2).
fn set(c: &Call<'_>) -> Result {
    const ABSOLUTE: u32 = 1;
    let (id, process) = (c.uint(0), c.task.process);
    if c.arg(2) == 0 {
        return Err(Errno::EINVAL);
    }
    let interval = get_timespec(c.arg(2))?;
    let value = get_timespec(c.arg(2).wrapping_add(16))?;
    let absolute = c.uint(1) & ABSOLUTE != 0;
    let old = alarms::arm(process, id, value, absolute, interval)?;
    if c.arg(3) != 0 {
        put_times(c.arg(3), old)?;
    }
    Ok(0)
}

fn put_times(at: u64, (left, interval): (u64, u64)) -> Result {
    let words = [
        interval / SECOND,
        interval % SECOND,
        left / SECOND,
        left % SECOND,
    ];
    put_words(at, &words).map(|()| 0)
}
