//! Interval timers of processes. They are looked at by the kernel's own thread, never by the
//! interrupt, which may come while locks are held.

use alloc::vec::Vec;

use appkernel_hal::clock;
use appkernel_hal::sync::Mutex;

use crate::signal::{self, Info, Signal, code};
use crate::task;

/// A timer: the process, when it is due (monotonic), and how often again (0: not).
#[derive(Clone, Copy)]
struct Alarm {
    process: u32,
    next: u64,
    interval: u64,
}

static ALL: Mutex<Vec<Alarm>> = Mutex::new(Vec::new());

/// Sets the timer of a process; gives what was left and the interval of the old one.
pub fn set(process: u32, ns: u64, interval: u64) -> (u64, u64) {
    let old = get(process);
    let mut all = ALL.lock();
    all.retain(|a| a.process != process);
    if ns > 0 {
        all.push(Alarm {
            process,
            next: clock::monotonic_ns().saturating_add(ns),
            interval,
        });
    }
    drop(all);
    task::wake(task::AGENT);
    old
}

/// What is left of the timer of a process, and its interval.
pub fn get(process: u32) -> (u64, u64) {
    let all = ALL.lock();
    let own = all.iter().find(|a| a.process == process);
    own.map_or((0, 0), |a| {
        (
            a.next.saturating_sub(clock::monotonic_ns()).max(1),
            a.interval,
        )
    })
}

/// The process has ended.
pub fn forget(process: u32) {
    ALL.lock().retain(|a| a.process != process);
}

/// When the next one is due.
pub fn next() -> Option<u64> {
    ALL.lock().iter().map(|a| a.next).min()
}

/// Sends the signals of those that are due.
pub fn run() {
    let now = clock::monotonic_ns();
    let mut due = Vec::new();
    ALL.lock().retain_mut(|alarm| {
        if alarm.next > now {
            return true;
        }
        due.push(alarm.process);
        alarm.next = now.saturating_add(alarm.interval);
        alarm.interval > 0
    });
    for process in due {
        let info = Info {
            code: code::KERNEL,
            ..Info::default()
        };
        signal::send_process(process, Signal::ALRM, info);
    }
}
