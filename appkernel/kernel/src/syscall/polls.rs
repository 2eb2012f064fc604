//! Waiting for files and for time.

use alloc::vec;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_hal::clock;

use super::events::timer_deadline;
use super::{Call, Result, get_timespec, get_u64, put, put_words};
use crate::fs::file::Ready;
use crate::signal::Signal;
use crate::task;

const IN: u16 = 1;
const OUT: u16 = 4;
const ERROR: u16 = 8;
const READ_NORMAL: u16 = 0x40;
const WRITE_NORMAL: u16 = 0x100;
const READ_HUP: u16 = 0x2000;
const HUP: u16 = 0x10;
const INVALID: u16 = 0x20;
const REALTIME: u64 = 0;
const CLOCKS: u64 = 12;
/// How late a timer may be that somebody waits for among files (as Linux' slack of timers).
const TIMER_SLACK_NS: u64 = 50_000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        7 => {
            let ms = c.int(2);
            let ns = (ms >= 0).then(|| u64::from(ms.cast_unsigned()) * 1_000_000);
            poll(c, ns, None)
        }
        271 => timeout(c.arg(2)).and_then(|ns| poll(c, ns, mask(c.arg(3))?)),
        23 => timeval(c.arg(4)).and_then(|ns| select(c, ns, None)),
        270 => timeout(c.arg(4)).and_then(|ns| {
            let mask = match c.arg(5) {
                0 => None,
                at => mask(get_u64(at)?)?,
            };
            select(c, ns, mask)
        }),
        35 => get_timespec(c.arg(0))
            .and_then(|ns| pause(Some(clock::monotonic_ns().saturating_add(ns)), c.arg(1))),
        230 => clock_nanosleep(c),
        34 => pause(None, 0),
        _ => return None,
    })
}

fn timeout(at: u64) -> Result<Option<u64>> {
    if at == 0 {
        Ok(None)
    } else {
        get_timespec(at).map(Some)
    }
}

fn timeval(at: u64) -> Result<Option<u64>> {
    if at == 0 {
        return Ok(None);
    }
    let (seconds, us) = (get_u64(at)?, get_u64(at.wrapping_add(8))?);
    if seconds > i64::MAX.cast_unsigned() || us > i64::MAX.cast_unsigned() {
        return Err(Errno::EINVAL);
    }
    Ok(Some(
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(us.saturating_mul(1000)),
    ))
}

fn mask(at: u64) -> Result<Option<u64>> {
    if at == 0 {
        Ok(None)
    } else {
        get_u64(at).map(Some)
    }
}

/// Waits until `ready` gives something or the time is over (then 0). `timer` is when a timer among
/// the files expires.
pub fn wait_for_files(
    c: &Call<'_>,
    ns: Option<u64>,
    mask: Option<u64>,
    timer: impl Fn() -> Option<u64>,
    mut ready: impl FnMut() -> Option<u64>,
) -> Result {
    if let Some(value) = ready() {
        return Ok(value);
    }
    if ns == Some(0) {
        return Ok(0);
    }
    if let Some(mask) = mask {
        let mut pending = c.task.pending.lock();
        pending.saved_mask = Some(pending.mask);
        pending.mask = mask & !(Signal::KILL.bit() | Signal::STOP.bit());
    }
    let deadline = ns.map(|ns| clock::monotonic_ns().saturating_add(ns));
    loop {
        // One that is due already and that nobody asked for, or one that comes without end, must not
        // keep this call from sleeping.
        let soonest = clock::monotonic_ns().saturating_add(TIMER_SLACK_NS);
        let timer = timer().map(|at| at.max(soonest));
        let next = deadline.into_iter().chain(timer).min();
        match task::wait_until(task::FILES, next, &mut ready) {
            Err(Errno::ETIMEDOUT) => {
                if let Some(value) = ready() {
                    return Ok(value);
                }
                if deadline.is_some_and(|at| clock::monotonic_ns() >= at) {
                    return Ok(0);
                }
            }
            other => return other,
        }
    }
}

fn poll(c: &Call<'_>, ns: Option<u64>, mask: Option<u64>) -> Result {
    let count = c.arg(1);
    if count > crate::fs::file::MAX_FILES as u64 {
        return Err(Errno::EINVAL);
    }
    let mut bytes = vec![0; count as usize * 8];
    appkernel_hal::usercopy::read(&mut bytes, c.arg(0)).map_err(|_| Errno::EFAULT)?;
    let files = c.task.files();
    let numbers: Vec<i32> = bytes
        .chunks_exact(8)
        .map(|e| i32::from_le_bytes([e[0], e[1], e[2], e[3]]))
        .collect();
    let timer = || {
        let open = numbers.iter().filter_map(|fd| files.lock().get(*fd).ok());
        open.filter_map(|file| timer_deadline(&file)).min()
    };
    let result = wait_for_files(c, ns, mask, timer, || {
        let mut ready = 0;
        for entry in bytes.chunks_exact_mut(8) {
            let fd = i32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            let wanted = u16::from_le_bytes([entry[4], entry[5]]);
            let got = if fd < 0 {
                0
            } else {
                state(&files, fd) & (wanted | HUP | INVALID | ERROR)
            };
            entry[6..8].copy_from_slice(&got.to_le_bytes());
            ready += u64::from(got != 0);
        }
        (ready > 0).then_some(ready)
    })?;
    put(c.arg(0), &bytes)?;
    Ok(result)
}

fn state(files: &appkernel_hal::sync::Mutex<crate::fs::file::Files>, fd: i32) -> u16 {
    let Ok(file) = files.lock().get(fd) else {
        return INVALID;
    };
    bits(file.ready())
}

/// Readiness as poll and epoll have it.
pub fn bits(ready: Ready) -> u16 {
    let mut state = 0;
    for (is, bits) in [
        (ready.readable, IN | READ_NORMAL),
        (ready.writable, OUT | WRITE_NORMAL),
        (ready.hung_up, HUP),
        (ready.ended, READ_HUP | IN),
        (ready.error, ERROR),
    ] {
        if is {
            state |= bits;
        }
    }
    state
}

fn select(c: &Call<'_>, ns: Option<u64>, mask: Option<u64>) -> Result {
    let count = c.int(0);
    let count = usize::try_from(count)
        .ok()
        .filter(|n| *n <= crate::fs::file::MAX_FILES)
        .ok_or(Errno::EINVAL)?;
    let words = count.div_ceil(64);
    let mut sets: Vec<Option<Vec<u64>>> = Vec::new();
    for i in 1..4 {
        let at = c.arg(i);
        let mut set = None;
        if at != 0 {
            let read: Result<Vec<u64>> = (0..words as u64)
                .map(|w| get_u64(at.wrapping_add(w * 8)))
                .collect();
            set = Some(read?);
        }
        sets.push(set);
    }
    let files = c.task.files();
    for fd in 0..count {
        let asked = sets
            .iter()
            .flatten()
            .any(|s| s.get(fd / 64).is_some_and(|w| w >> (fd % 64) & 1 != 0));
        if asked && files.lock().get(fd as i32).is_err() {
            return Err(Errno::EBADF);
        }
    }
    let mut results: Vec<Option<Vec<u64>>> = Vec::new();
    let timer = || {
        let open = (0..count).filter_map(|fd| files.lock().get(fd as i32).ok());
        open.filter_map(|file| timer_deadline(&file)).min()
    };
    let ready = wait_for_files(c, ns, mask, timer, || {
        let mut ready = 0;
        results = sets
            .iter()
            .map(|s| s.as_ref().map(|s| vec![0; s.len()]))
            .collect();
        for fd in 0..count {
            for ((set, result), bits) in
                sets.iter()
                    .zip(&mut results)
                    .zip([IN | HUP | ERROR, OUT | ERROR, 0])
            {
                let (Some(set), Some(result)) = (set, result) else {
                    continue;
                };
                let bit = 1 << (fd % 64);
                if set.get(fd / 64).is_some_and(|w| w & bit != 0)
                    && state(&files, fd as i32) & bits != 0
                {
                    if let Some(word) = result.get_mut(fd / 64) {
                        *word |= bit;
                    }
                    ready += 1;
                }
            }
        }
        (ready > 0).then_some(ready)
    })?;
    for (i, result) in results.iter().enumerate() {
        if let Some(result) = result {
            put_words(c.arg(i + 1), result)?;
        }
    }
    Ok(ready)
}

/// Sleeps until a time, or for ever; what is left goes to `rest` if a signal comes.
fn pause(deadline: Option<u64>, rest: u64) -> Result {
    match task::wait_until(task::TIME, deadline, || None::<u64>) {
        Err(Errno::ETIMEDOUT) => Ok(0),
        Err(Errno::EINTR) if rest != 0 => {
            let left = deadline.unwrap_or(0).saturating_sub(clock::monotonic_ns());
            put_words(rest, &[left / 1_000_000_000, left % 1_000_000_000])?;
            Err(Errno::EINTR)
        }
        other => other,
    }
}

fn clock_nanosleep(c: &Call<'_>) -> Result {
    const ABSOLUTE: u32 = 1;
    if c.arg(0) >= CLOCKS {
        return Err(Errno::EINVAL);
    }
    let ns = get_timespec(c.arg(2))?;
    let now = clock::monotonic_ns();
    if c.uint(1) & ABSOLUTE == 0 {
        return pause(Some(now.saturating_add(ns)), c.arg(3));
    }
    let offset = if c.arg(0) == REALTIME {
        clock::realtime_ns().saturating_sub(now)
    } else {
        0
    };
    pause(Some(ns.saturating_sub(offset)), 0)
}
