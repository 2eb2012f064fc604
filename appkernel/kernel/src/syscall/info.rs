//! Calls that tell something: machine, time, users, limits.

use alloc::vec;
use core::sync::atomic::Ordering;

use appkernel_core::errno::Errno;
use appkernel_hal::{clock, cpu, frames, usercopy};

use super::{Call, Result, put, put_words};
use crate::fs::proc_text::{RELEASE, VERSION};
use crate::mm::STACK_BYTES;
use crate::task;

const SECOND: u64 = 1_000_000_000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        63 => uname(c),
        96 => {
            let now = clock::realtime_ns();
            let time = [now / SECOND, now % SECOND / 1000];
            if c.arg(0) == 0 {
                Ok(0)
            } else {
                put_words(c.arg(0), &time).map(|()| 0)
            }
        }
        97 => limit(c.uint(0))
            .and_then(|l| put_words(c.arg(1), &l))
            .map(|()| 0),
        98 => {
            let us = cpu_ns(c) / 1000;
            let mut words = [0; 18];
            if c.int(0) != -1 {
                words[0] = us / 1_000_000;
                words[1] = us % 1_000_000;
            }
            put_words(c.arg(1), &words).map(|()| 0)
        }
        99 => sysinfo(c),
        100 => {
            if c.arg(0) != 0
                && let Err(e) = put_words(c.arg(0), &[cpu_ns(c) / clock::TICK_NS, 0, 0, 0])
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
        204 => put(c.arg(2), &1u64.to_le_bytes()).map(|()| 8),
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
        160 => {
            let raise = |limit: [u64; 2]| -> Result {
                let hard = super::get_u64(c.arg(1).wrapping_add(8))?;
                if hard > limit[1] {
                    Err(Errno::EPERM)
                } else {
                    Ok(0)
                }
            };
            limit(c.uint(0)).and_then(raise)
        }
        302 => prlimit(c),
        318 => random(c),
        _ => return None,
    })
}

/// Nanoseconds that the caller's process had the CPU.
fn cpu_ns(c: &Call<'_>) -> u64 {
    task::charge();
    task::process_cpu_ns(c.task.process)
}

fn uname(c: &Call<'_>) -> Result {
    let hostname = c.task.container.hostname.lock().clone();
    let hostname = hostname.get(..hostname.len().min(64)).unwrap_or_default();
    let fields: [&[u8]; 6] = [
        b"Linux",
        hostname,
        RELEASE.as_bytes(),
        VERSION.as_bytes(),
        b"x86_64",
        b"(none)",
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

fn limit(resource: u32) -> Result<[u64; 2]> {
    const STACK: u32 = 3;
    const CORE: u32 = 4;
    const FILES: u32 = 7;
    match resource {
        STACK => Ok([STACK_BYTES, STACK_BYTES]),
        CORE => Ok([0, 0]),
        FILES => Ok([crate::fs::file::MAX_FILES as u64; 2]),
        0..=15 => Ok([u64::MAX; 2]),
        _ => Err(Errno::EINVAL),
    }
}

fn prlimit(c: &Call<'_>) -> Result {
    let limit = limit(c.uint(1))?;
    let own = c.uint(0) == 0 || c.task.container.id(c.uint(0)) == c.task.process;
    if !own {
        return Err(Errno::ESRCH);
    }
    if c.arg(2) != 0 {
        let new = [
            super::get_u64(c.arg(2))?,
            super::get_u64(c.arg(2).wrapping_add(8))?,
        ];
        // Limits are fixed: lower ones are taken and not heeded, higher ones refused.
        if new[0] > new[1] {
            return Err(Errno::EINVAL);
        }
        if new[1] > limit[1] {
            return Err(Errno::EPERM);
        }
    }
    if c.arg(3) != 0 {
        put_words(c.arg(3), &limit)?;
    }
    Ok(0)
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
    let mut bytes = vec![0; count];
    cpu::random(&mut bytes);
    usercopy::write(c.arg(0), &bytes).map_err(|_| Errno::EFAULT)?;
    Ok(count as u64)
}
