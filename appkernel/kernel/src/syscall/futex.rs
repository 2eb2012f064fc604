//! Futexes: waiting for a number in memory to change.

use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_hal::clock;
use appkernel_hal::sync::Mutex;

use super::{Call, Result, get, get_timespec};
use crate::task;

/// Who waits: address space, address, task.
static WAITERS: Mutex<Vec<(usize, u64, u32)>> = Mutex::new(Vec::new());

/// Threads share their memory, so its address tells them apart from others.
fn space(task: &task::Task) -> usize {
    alloc::sync::Arc::as_ptr(&task.mm()) as usize
}

/// Wakes those that wait at an address of the running task's memory.
pub fn wake_at(address: u64, count: u32) -> u64 {
    let space = space(&task::current());
    let mut woken = Vec::new();
    WAITERS.lock().retain(|(of, at, id)| {
        let hit = (*of, *at) == (space, address) && woken.len() < count as usize;
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
            let me = (space(c.task), address, c.task.id);
            WAITERS.lock().push(me);
            let result = task::wait_until(task::TIME + 1, deadline, || {
                let waiting = WAITERS.lock().contains(&me);
                (!waiting).then_some(0)
            });
            WAITERS.lock().retain(|w| *w != me);
            result
        }
        1 | 10 => Ok(wake_at(address, c.uint(2))),
        _ => Err(Errno::ENOSYS),
    }
}
