//! Calls on priorities, policies and processors.

use alloc::sync::Arc;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;

use super::{Call, Result, get, get_u64, put, put_words};
use crate::task::limits::{NICE, REAL_TIME_PRIORITY};
use crate::task::{self, Scheduling, Task};

/// Children get none of it.
const RESET_ON_FORK: u32 = 0x4000_0000;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        140 => get_priority(c),
        141 => set_priority(c),
        142 => set(c, None, c.arg(1)),
        143 => get_parameter(c),
        144 => set(c, Some(c.int(1)), c.arg(2)),
        145 => of(c).map(|t| {
            let own = *t.scheduling.lock();
            let flag = if own.reset_on_fork { RESET_ON_FORK } else { 0 };
            (own.policy | flag).into()
        }),
        146 | 147 => {
            let found = Scheduling::priorities(c.uint(0)).ok_or(Errno::EINVAL);
            found.map(|(low, high)| if c.number == 146 { high } else { low }.into())
        }
        148 => round_robin(c),
        203 => set_affinity(c),
        204 => affinity(c),
        251 => set_io(c),
        252 => get_io(c),
        314 => set_attributes(c),
        315 => attributes(c),
        _ => return None,
    })
}

/// The task that the first argument names; 0 is the caller.
fn of(c: &Call<'_>) -> Result<Arc<Task>> {
    match c.int(0) {
        ..0 => Err(Errno::EINVAL),
        0 => Ok(task::current()),
        id => task::find(c.task.container.id(id.cast_unsigned())).ok_or(Errno::ESRCH),
    }
}

/// Whether the caller may change how another is scheduled.
fn permitted(c: &Call<'_>, other: &Task) -> bool {
    let own = c.task.credentials.lock().clone();
    let theirs = other.credentials.lock();
    own.is_root() || own.euid == theirs.uid || own.euid == theirs.euid
}

fn is_root(c: &Call<'_>) -> bool {
    c.task.credentials.lock().is_root()
}

/// The tasks that `which` and `who` name: a process, a group, a user's.
fn named(c: &Call<'_>, which: u32, who: i32, base: u32) -> Result<Vec<Arc<Task>>> {
    let container = &c.task.container;
    let own_uid = c.task.credentials.lock().uid;
    let own_group = c.task.links.lock().group;
    let id = container.id(who.cast_unsigned());
    let wanted = |t: &Arc<Task>| match which.wrapping_sub(base) {
        0 if who == 0 => t.id == c.task.id,
        0 => who > 0 && t.id == id,
        1 => t.links.lock().group == if who == 0 { own_group } else { id },
        _ => {
            let uid = if who == 0 {
                own_uid
            } else {
                who.cast_unsigned()
            };
            t.credentials.lock().uid == uid
        }
    };
    if !(base..base + 3).contains(&which) {
        return Err(Errno::EINVAL);
    }
    let all: Vec<_> = task::living()
        .into_iter()
        .filter(|t| container.has(t.id) && wanted(t))
        .collect();
    if all.is_empty() {
        return Err(Errno::ESRCH);
    }
    Ok(all)
}

fn get_priority(c: &Call<'_>) -> Result {
    let all = named(c, c.uint(0), c.int(1), 0)?;
    let best = all.iter().map(|t| t.scheduling.lock().nice).min();
    Ok((20 - best.unwrap_or(0)) as u64)
}

fn set_priority(c: &Call<'_>) -> Result {
    let nice = c.int(2).clamp(-20, 19);
    let mut result = Ok(0);
    for task in named(c, c.uint(0), c.int(1), 0)? {
        if !permitted(c, &task) {
            result = Err(Errno::EPERM);
            continue;
        }
        // Limits are in numbers that grow with importance: 20 - nice.
        let limit = task.limits.lock().soft(NICE).min(40) as i32;
        let mut own = task.scheduling.lock();
        if nice < own.nice && 20 - nice > limit && !is_root(c) {
            result = Err(Errno::EACCES);
            continue;
        }
        own.nice = nice;
    }
    result
}

/// Sets policy (if given) and priority of a task.
fn set(c: &Call<'_>, policy: Option<i32>, parameter: u64) -> Result {
    if c.int(0) < 0 || parameter == 0 || policy.is_some_and(|p| p < 0) {
        return Err(Errno::EINVAL);
    }
    let priority = u32::from_le_bytes(get(parameter)?);
    let other = of(c)?;
    let before = *other.scheduling.lock();
    let wanted = match policy {
        None => (before.policy, before.reset_on_fork),
        Some(bits) => {
            let bits = bits.cast_unsigned();
            (bits & !RESET_ON_FORK, bits & RESET_ON_FORK != 0)
        }
    };
    change(c, &other, wanted, priority, before.nice)
}

fn change(
    c: &Call<'_>,
    other: &Task,
    (policy, reset_on_fork): (u32, bool),
    priority: u32,
    nice: i32,
) -> Result {
    use task::policy::{DEADLINE, FIFO, IDLE, ROUND_ROBIN};
    let (low, high) = Scheduling::priorities(policy).ok_or(Errno::EINVAL)?;
    if !(low..=high).contains(&priority) || policy == DEADLINE {
        return Err(Errno::EINVAL);
    }
    let before = *other.scheduling.lock();
    if !is_root(c) {
        let limit = other.limits.lock().soft(REAL_TIME_PRIORITY);
        let real_time = matches!(policy, FIFO | ROUND_ROBIN);
        let raised = real_time && (policy != before.policy || priority > before.priority);
        if !permitted(c, other)
            || raised && u64::from(priority) > limit
            || before.policy == IDLE && policy != IDLE && before.nice < 0
            || before.reset_on_fork && !reset_on_fork
        {
            return Err(Errno::EPERM);
        }
    }
    *other.scheduling.lock() = Scheduling {
        policy,
        priority,
        nice,
        reset_on_fork,
        io: before.io,
    };
    Ok(0)
}

fn get_parameter(c: &Call<'_>) -> Result {
    if c.int(0) < 0 || c.arg(1) == 0 {
        return Err(Errno::EINVAL);
    }
    let priority = of(c)?.scheduling.lock().priority;
    put(c.arg(1), &priority.to_le_bytes()).map(|()| 0)
}

fn round_robin(c: &Call<'_>) -> Result {
    let own = *of(c)?.scheduling.lock();
    let ns = match own.policy {
        task::policy::FIFO => 0,
        task::policy::ROUND_ROBIN => 100_000_000,
        _ => appkernel_hal::clock::TICK_NS,
    };
    put_words(c.arg(1), &[0, ns]).map(|()| 0)
}

fn set_affinity(c: &Call<'_>) -> Result {
    let len = (c.uint(1) as usize).min(128);
    let mut mask = alloc::vec![0; len];
    appkernel_hal::usercopy::read(&mut mask, c.arg(2)).map_err(|_| Errno::EFAULT)?;
    let other = of(c).map_err(|_| Errno::ESRCH)?;
    if !permitted(c, &other) {
        return Err(Errno::EPERM);
    }
    // There is one processor, and every task runs there.
    match mask.first() {
        Some(first) if first & 1 != 0 => Ok(0),
        _ => Err(Errno::EINVAL),
    }
}

fn affinity(c: &Call<'_>) -> Result {
    if c.uint(1) < 8 || !c.uint(1).is_multiple_of(8) {
        return Err(Errno::EINVAL);
    }
    of(c).map_err(|_| Errno::ESRCH)?;
    put(c.arg(2), &1u64.to_le_bytes()).map(|()| 8)
}

fn set_io(c: &Call<'_>) -> Result {
    let value = c.uint(2);
    let (class, level) = (value >> 13, value & 0x1fff);
    match class {
        0 if level == 0 => {}
        1 if !is_root(c) => return Err(Errno::EPERM),
        1 | 2 if level < 8 => {}
        3 => {}
        _ => return Err(Errno::EINVAL),
    }
    for task in named(c, c.uint(0), c.int(1), 1)? {
        if !permitted(c, &task) {
            return Err(Errno::EPERM);
        }
        task.scheduling.lock().io = Some(value);
    }
    Ok(0)
}

fn get_io(c: &Call<'_>) -> Result {
    let all = named(c, c.uint(0), c.int(1), 1)?;
    let values = all.iter().map(|t| {
        let own = *t.scheduling.lock();
        match own.io {
            // Of one thread what was set; else what follows from the nice value.
            None if c.uint(0) == 1 => 0,
            None => (2 << 13) | ((own.nice + 20) as u32 / 5),
            Some(io) => io,
        }
    });
    Ok(values.min().unwrap_or(0).into())
}

/// Bytes of `struct sched_attr` without what newer kernels added.
const ATTRIBUTES: u32 = 48;

fn set_attributes(c: &Call<'_>) -> Result {
    let at = c.arg(1);
    if at == 0 || c.int(0) < 0 || c.uint(2) != 0 {
        return Err(Errno::EINVAL);
    }
    let word = |i: u64| -> Result<u32> { Ok(u32::from_le_bytes(get(at.wrapping_add(i))?)) };
    let size = word(0)?;
    if size != 0 && size < ATTRIBUTES || size > 4096 {
        put(at, &ATTRIBUTES.to_le_bytes())?;
        return Err(Errno::E2BIG);
    }
    let (policy, flags) = (word(4)?, get_u64(at.wrapping_add(8))?);
    let (nice, priority) = (word(16)?.cast_signed(), word(20)?);
    if flags & !0x7f != 0 {
        return Err(Errno::EINVAL);
    }
    let other = of(c)?;
    change(
        c,
        &other,
        (policy, flags & 1 != 0),
        priority,
        nice.clamp(-20, 19),
    )
}

fn attributes(c: &Call<'_>) -> Result {
    let size = c.uint(2);
    if c.arg(1) == 0 || !(ATTRIBUTES..=4096).contains(&size) || c.int(0) < 0 || c.uint(3) != 0 {
        return Err(Errno::EINVAL);
    }
    let own = *of(c)?.scheduling.lock();
    let words = [
        u64::from(ATTRIBUTES) | u64::from(own.policy) << 32,
        own.reset_on_fork.into(),
        u64::from(own.nice.cast_unsigned()) | u64::from(own.priority) << 32,
        0,
        0,
        0,
    ];
    put_words(c.arg(1), &words).map(|()| 0)
}
