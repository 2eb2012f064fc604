//! Calls that tell something: machine, time, users, limits.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use appkernel_core::errno::Errno;
use appkernel_hal::sync::Mutex;
use appkernel_hal::{clock, cpu, frames, usercopy};

use super::{Call, Result, get, put, put_words};
use crate::fs::proc_text::{RELEASE, VERSION};
use crate::task::{self, Task};

const SECOND: u64 = 1_000_000_000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        63 => uname(c),
        159 => adjust(c.arg(0)),
        305 if c.arg(0) != 0 => Err(Errno::EOPNOTSUPP),
        305 => adjust(c.arg(1)),
        96 => {
            let now = clock::realtime_ns();
            let time = [now / SECOND, now % SECOND / 1000];
            // The time zone is always that of the day's time itself.
            if c.arg(1) != 0
                && let Err(e) = put_words(c.arg(1), &[0])
            {
                return Some(Err(e));
            }
            if c.arg(0) == 0 {
                Ok(0)
            } else {
                put_words(c.arg(0), &time).map(|()| 0)
            }
        }
        98 if !(-1..=1).contains(&c.int(0)) => Err(Errno::EINVAL),
        98 => {
            let used = match c.int(0) {
                -1 => c.task.links.lock().children,
                thread => used(c, thread == 1),
            };
            put_words(c.arg(1), &super::processes::usage(used)).map(|()| 0)
        }
        99 => sysinfo(c),
        100 => {
            let children = c.task.links.lock().children.cpu_ns / clock::TICK_NS;
            let own = cpu_ns(c) / clock::TICK_NS;
            if c.arg(0) != 0
                && let Err(e) = put_words(c.arg(0), &[own, 0, children, 0])
            {
                return Some(Err(e));
            }
            Ok(clock::monotonic_ns() / clock::TICK_NS)
        }
        201 => {
            let now = clock::realtime_ns() / SECOND;
            if c.arg(0) == 0 {
                Ok(now)
            } else {
                put_words(c.arg(0), &[now]).map(|()| now)
            }
        }
        228 => time(c, c.arg(0))
            .and_then(|t| put_words(c.arg(1), &[t / SECOND, t % SECOND]))
            .map(|()| 0),
        229 => {
            let known = time(c, c.arg(0));
            known
                .and_then(|_| {
                    if c.arg(1) == 0 {
                        Ok(())
                    } else {
                        put_words(c.arg(1), &[0, 1])
                    }
                })
                .map(|()| 0)
        }
        97 => limits(c, c.task, c.uint(0), 0, c.arg(1)),
        160 => limits(c, c.task, c.uint(0), c.arg(1), 0),
        302 => prlimit(c),
        318 => random(c),
        170 => set_name(c, &c.task.container.hostname),
        171 => set_name(c, &c.task.container.domainname),
        _ => return None,
    })
}

/// adjtimex(2) and clock_adjtime(2): the clock is the host's, so it can be looked at only. As for a
/// kernel whose clock nobody keeps, the answer is TIME_ERROR.
fn adjust(at: u64) -> Result {
    const BYTES: usize = 208;
    const TIME_ERROR: u64 = 5;
    /// STA_UNSYNC
    const STATUS: u64 = 0x40;
    /// Microseconds: NTP_PHASE_LIMIT.
    const MAX_ERROR: u64 = 16_000_000;
    let mut timex: [u8; BYTES] = get(at)?;
    let modes = timex.first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
    if modes != 0 {
        return Err(Errno::EPERM);
    }
    let now = clock::realtime_ns();
    timex.fill(0);
    let words = [
        (24, MAX_ERROR),
        (32, MAX_ERROR),
        (40, STATUS),
        (48, 2),
        (56, 1),
        // 500 parts in a million, scaled by 2^16.
        (64, 500 << 16),
        (72, now / SECOND),
        (80, now % SECOND / 1000),
        // Microseconds of a tick of the 100 in a second.
        (88, 10_000),
    ];
    for (place, word) in words {
        if let Some(part) = timex.get_mut(place..place + 8) {
            part.copy_from_slice(&word.to_le_bytes());
        }
    }
    put(at, &timex)?;
    Ok(TIME_ERROR)
}

/// Nanoseconds that the caller's process had the CPU.
fn cpu_ns(c: &Call<'_>) -> u64 {
    task::charge();
    task::process_cpu_ns(c.task.process)
}

/// What the caller's process, or only its thread, has used.
fn used(c: &Call<'_>, thread: bool) -> task::Used {
    let all = cpu_ns(c);
    let cpu_ns = if thread {
        c.task.cpu_ns.load(Ordering::Relaxed)
    } else {
        all
    };
    let pages = c.task.mm().lock().resident() as u64;
    let most = c.task.links.lock().used.pages;
    task::Used {
        cpu_ns,
        pages: pages.max(most),
    }
}

/// sethostname and setdomainname: of the container.
fn set_name(c: &Call<'_>, name: &Mutex<Vec<u8>>) -> Result {
    if !c.task.credentials.lock().is_root() {
        return Err(Errno::EPERM);
    }
    let len = usize::try_from(c.int(1)).ok().filter(|len| *len <= 64);
    let mut bytes = vec![0; len.ok_or(Errno::EINVAL)?];
    usercopy::read(&mut bytes, c.arg(0)).map_err(|_| Errno::EFAULT)?;
    *name.lock() = bytes;
    Ok(0)
}

fn uname(c: &Call<'_>) -> Result {
    let hostname = c.task.container.hostname.lock().clone();
    let hostname = hostname.get(..hostname.len().min(64)).unwrap_or_default();
    let domainname = c.task.container.domainname.lock().clone();
    let fields: [&[u8]; 6] = [
        b"Linux",
        hostname,
        RELEASE.as_bytes(),
        VERSION.as_bytes(),
        b"x86_64",
        domainname
            .get(..domainname.len().min(64))
            .unwrap_or_default(),
    ];
    let mut bytes = vec![0; 65 * 6];
    for (slot, field) in bytes.chunks_exact_mut(65).zip(fields) {
        for (to, from) in slot.iter_mut().zip(field) {
            *to = *from;
        }
    }
    put(c.arg(0), &bytes)?;
    Ok(0)
}

/// Sets the limit at `new` of a process, and puts the old one to `old`; either may be zero.
fn limits(c: &Call<'_>, of: &Task, resource: u32, new: u64, old: u64) -> Result {
    let resource = resource as usize;
    let before = of.limits.lock().get(resource)?;
    if new != 0 {
        let new = [super::get_u64(new)?, super::get_u64(new.wrapping_add(8))?];
        let privileged = c.task.credentials.lock().is_root();
        of.limits.lock().set(resource, new, privileged)?;
        if resource == task::limits::FILES {
            of.files().lock().set_limit(new[0]);
        }
    }
    if old != 0 {
        put_words(old, &before)?;
    }
    Ok(0)
}

fn prlimit(c: &Call<'_>) -> Result {
    if c.uint(0) == 0 {
        return limits(c, c.task, c.uint(1), c.arg(2), c.arg(3));
    }
    let other = task::find(c.task.container.id(c.uint(0))).ok_or(Errno::ESRCH)?;
    {
        // One after the other: they may be the same task's.
        let own = c.task.credentials.lock().uid;
        let theirs = other.credentials.lock().uid;
        if own != theirs && !c.task.credentials.lock().is_root() {
            return Err(Errno::EPERM);
        }
    }
    limits(c, &other, c.uint(1), c.arg(2), c.arg(3))
}

fn sysinfo(c: &Call<'_>) -> Result {
    let (total, free) = frames::statistics();
    let processes = task::count().min(u16::MAX.into()) as u64;
    let words = [
        clock::monotonic_ns() / SECOND,
        0,
        0,
        0,
        total as u64 * 4096,
        free as u64 * 4096,
        0,
        0,
        0,
        0,
        processes,
        0,
        0,
        1,
    ];
    put_words(c.arg(0), &words)?;
    Ok(0)
}

fn time(c: &Call<'_>, id: u64) -> Result {
    match id {
        0 | 5 | 11 => Ok(clock::realtime_ns()),
        1 | 4 | 6 | 7 => Ok(clock::monotonic_ns()),
        2 => Ok(cpu_ns(c)),
        3 => {
            task::charge();
            Ok(c.task.cpu_ns.load(Ordering::Relaxed))
        }
        _ => Err(Errno::EINVAL),
    }
}

fn random(c: &Call<'_>) -> Result {
    let count = c.arg(1).min(1 << 20) as usize;
    if c.uint(2) & !7 != 0 {
        return Err(Errno::EINVAL);
    }
    let mut done = 0;
    let mut bytes = vec![0; count.min(4096)];
    while done < count {
        let len = bytes.len().min(count - done);
        let piece = bytes.get_mut(..len).unwrap_or_default();
        cpu::random(piece);
        match usercopy::write(c.arg(0).wrapping_add(done as u64), piece) {
            Ok(()) => done += len,
            Err(_) if done == 0 => return Err(Errno::EFAULT),
            Err(_) => break,
        }
    }
    Ok(done as u64)
}
