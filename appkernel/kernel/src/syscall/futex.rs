//! Futexes: waiting for a number in memory to change.

use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_hal::clock;
use appkernel_hal::sync::Mutex;

use super::{Call, Result, get, get_timespec, put};
use crate::container::visible;
use crate::task;

/// Who waits: address space, address, task.
static WAITERS: Mutex<Vec<(usize, u64, u32)>> = Mutex::new(Vec::new());

/// What tells one futex from others: memory that processes share goes by its frame, other memory by
/// the address space, which threads share.
fn key(task: &task::Task, address: u64) -> (usize, u64) {
    let mm = task.mm();
    let frame = mm.lock().shared_frame(address).unwrap_or(None);
    match frame {
        Some(frame) => (0, frame + address % appkernel_hal::PAGE),
        None => (alloc::sync::Arc::as_ptr(&mm) as usize, address),
    }
}

/// Wakes those that wait at an address of the running task's memory.
pub fn wake_at(address: u64, count: u32) -> u64 {
    let wanted = key(&task::current(), address);
    let mut woken = Vec::new();
    WAITERS.lock().retain(|(of, at, id)| {
        let hit = (*of, *at) == wanted && woken.len() < count as usize;
        if hit {
            woken.push(*id);
        }
        !hit
    });
    for id in &woken {
        task::wake_task(*id);
    }
    woken.len() as u64
}

/// Locks that a thread's list of them may have, as Linux has it: the list may be a ring.
const MAX_ROBUST: usize = 2048;

/// Gives what a thread held when it ended to those who wait for it, as its list at `head` says:
/// `struct robust_list_head` of get_robust_list(2). All of it is the program's, and may be anything.
pub fn let_go(head: u64) {
    let Ok([next, offset, pending]) = word(head).and_then(|next| {
        let [offset, pending] = [word(head.wrapping_add(8))?, word(head.wrapping_add(16))?];
        Ok([next, offset, pending])
    }) else {
        return;
    };
    /// The first bit of an entry is not of the address: the lock inherits priorities.
    const ADDRESS: u64 = !1;
    let (pending, mut entry) = (pending & ADDRESS, next & ADDRESS);
    for _ in 0..MAX_ROBUST {
        if entry == head {
            break;
        }
        let following = word(entry);
        if entry != pending {
            owner_died(entry.wrapping_add(offset), false);
        }
        let Ok(following) = following else { break };
        entry = following & ADDRESS;
    }
    // What it was about to take, or had just left.
    if pending != 0 {
        owner_died(pending.wrapping_add(offset), true);
    }
}

fn word(at: u64) -> Result<u64> {
    get(at).map(u64::from_le_bytes)
}

/// Marks one lock, if it is the ending thread's.
fn owner_died(at: u64, pending: bool) {
    const WAITERS_BIT: u32 = 0x8000_0000;
    const OWNER_DIED: u32 = 0x4000_0000;
    const OWNER: u32 = 0x3fff_ffff;
    let Ok(value) = get(at).map(u32::from_le_bytes) else {
        return;
    };
    let own = visible(task::current().id);
    if value & OWNER == own {
        let marked = value & WAITERS_BIT | OWNER_DIED;
        if !at.is_multiple_of(4) || put(at, &marked.to_le_bytes()).is_err() {
            return;
        }
        if value & WAITERS_BIT != 0 {
            wake_at(at, 1);
        }
    } else if pending && value & OWNER == 0 {
        // Left, and nobody woken yet.
        wake_at(at, 1);
    }
}

/// Moves waiters to another address, after waking some.
fn requeue(c: &Call<'_>, compare: Option<u32>) -> Result {
    let (wake, most, to) = (c.uint(2), c.uint(3), c.arg(4));
    if !to.is_multiple_of(4) {
        return Err(Errno::EINVAL);
    }
    if let Some(value) = compare
        && u32::from_le_bytes(get(c.arg(0))?) != value
    {
        return Err(Errno::EAGAIN);
    }
    let woken = wake_at(c.arg(0), wake);
    let (from, to) = (key(c.task, c.arg(0)), key(c.task, to));
    let mut moved = 0;
    for waiter in WAITERS.lock().iter_mut() {
        if (waiter.0, waiter.1) == from && moved < most {
            (waiter.0, waiter.1) = to;
            moved += 1;
        }
    }
    Ok(woken + u64::from(moved))
}

/// futex(2): wait and wake, private or not.
pub fn futex(c: &Call<'_>) -> Result {
    const REALTIME: u32 = 256;
    let address = c.arg(0);
    if !address.is_multiple_of(4) {
        return Err(Errno::EINVAL);
    }
    match c.uint(1) & 0x7f {
        operation @ (0 | 9) => {
            let deadline = match c.arg(3) {
                0 => None,
                at => {
                    let ns = get_timespec(at)?;
                    let now = clock::monotonic_ns();
                    Some(match (operation, c.uint(1) & REALTIME) {
                        (0, _) => now.saturating_add(ns),
                        (_, 0) => ns,
                        _ => ns.saturating_sub(clock::realtime_ns().saturating_sub(now)),
                    })
                }
            };
            if u32::from_le_bytes(get(address)?) != c.uint(2) {
                return Err(Errno::EAGAIN);
            }
            let (of, at) = key(c.task, address);
            let id = c.task.id;
            WAITERS.lock().push((of, at, id));
            let result = task::wait_until(task::TIME + 1, deadline, || {
                // It may have been moved to another address; it is gone when it was woken.
                let waiting = WAITERS.lock().iter().any(|w| w.2 == id);
                (!waiting).then_some(0)
            });
            WAITERS.lock().retain(|w| w.2 != id);
            result
        }
        1 | 10 => Ok(wake_at(address, c.uint(2))),
        3 => requeue(c, None),
        4 => requeue(c, Some(c.arg(5) as u32)),
        _ => Err(Errno::ENOSYS),
    }
}
