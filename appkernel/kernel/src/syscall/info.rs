//! Calls that tell something: machine, time, users, limits.

use alloc::vec;

use appkernel_core::errno::Errno;
use appkernel_hal::{clock, cpu, frames, usercopy};

use super::{Call, Result, put, put_words};
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
        98 => put_words(c.arg(1), &[0; 18]).map(|()| 0),
        99 => sysinfo(c),
        100 => {
            if c.arg(0) != 0
                && let Err(e) = put_words(c.arg(0), &[0; 4])
            {
                return Some(Err(e));
            }
            Ok(clock::monotonic_ns() / clock::TICK_NS)
        }
        // All programs are root.
        102 | 104 | 107 | 108 => Ok(0),
        105 | 106 | 113 | 114 | 117 | 119 => identity(c),
        115 => Ok(0),
        118 | 120 => (0..3).try_for_each(|i| put(c.arg(i), &[0; 4])).map(|()| 0),
        201 => {
            let now = clock::realtime_ns() / SECOND;
            if c.arg(0) == 0 {
                Ok(now)
            } else {
                put_words(c.arg(0), &[now]).map(|()| now)
            }
        }
        204 => put(c.arg(2), &1u64.to_le_bytes()).map(|()| 8),
        228 => time(c.arg(0))
            .and_then(|t| put_words(c.arg(1), &[t / SECOND, t % SECOND]))
            .map(|()| 0),
        229 => {
            let known = time(c.arg(0));
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
        302 => prlimit(c),
        318 => random(c),
        _ => return None,
    })
}

fn uname(c: &Call<'_>) -> Result {
    // The interface is that of this Linux version, as far as it goes.
    let fields: [&[u8]; 6] = [
        b"Linux",
        b"bulkhead",
        b"6.12.0-bulkhead-app",
        b"#1 Bulkhead app kernel",
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
    let own = c.uint(0) == 0 || c.uint(0) == c.task.process;
    if !own {
        return Err(Errno::ESRCH);
    }
    if c.arg(2) != 0 {
        let new = [
            super::get_u64(c.arg(2))?,
            super::get_u64(c.arg(2).wrapping_add(8))?,
        ];
        // Limits are fixed: only what they are already can be set.
        if new != limit {
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

/// Becoming root is no change; becoming anybody else is not there yet.
fn identity(c: &Call<'_>) -> Result {
    let count = match c.number {
        105 | 106 => 1,
        113 | 114 => 2,
        _ => 3,
    };
    let fine = (0..count).all(|i| matches!(c.uint(i), 0 | u32::MAX));
    if fine { Ok(0) } else { Err(Errno::EPERM) }
}

fn time(id: u64) -> Result {
    match id {
        0 | 5 | 11 => Ok(clock::realtime_ns()),
        // Processor time is not counted yet.
        1 | 4 | 6 | 7 => Ok(clock::monotonic_ns()),
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
