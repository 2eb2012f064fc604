//! Timers of processes: interval timers (setitimer) and those of timer_create. They are looked at by
//! the kernel's own thread, never by the interrupt, which may come while locks are held.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_hal::clock;
use appkernel_hal::sync::Mutex;

use crate::signal::{self, Info, Signal, code};
use crate::task;

/// Timers of timer_create that a process may have.
const MAX_TIMERS: usize = 256;

/// What a timer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Time since the machine's start.
    Monotonic,
    /// The day's time.
    Day,
    /// Processor time of the process.
    Process,
    /// Processor time of a thread.
    Thread(u32),
}

/// Which timer of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// `ITIMER_*`.
    Interval(u32),
    /// Of timer_create, by number.
    Made(u32),
}

/// What a timer does.
#[derive(Clone, Copy, Debug)]
pub struct Effect {
    /// `None`: nothing.
    pub signal: Option<Signal>,
    /// To this thread only.
    pub thread: Option<u32>,
    /// What the handler is told.
    pub value: u64,
}

#[derive(Clone, Copy, Debug)]
struct Alarm {
    process: u32,
    which: Which,
    clock: Clock,
    /// When it is due, by its clock; 0: not running.
    next: u64,
    /// How often again (0: not).
    interval: u64,
    effect: Effect,
    overrun: u32,
}

static ALL: Mutex<Vec<Alarm>> = Mutex::new(Vec::new());

/// How late a timer may be: at least so long programs run before the next look, so that a timer that
/// is always due leaves them the processor.
const SLACK_NS: u64 = 200_000;

/// Counts how often a timer was set.
static CHANGES: AtomicU64 = AtomicU64::new(0);

/// How often a timer was set: `next` gives something else then.
pub fn changes() -> u64 {
    CHANGES.load(Ordering::Relaxed)
}

/// A timer was set: whoever looks after them has to look again.
fn changed() {
    CHANGES.fetch_add(1, Ordering::Relaxed);
    task::wake(task::AGENT);
}

fn now(clock: Clock, process: u32) -> u64 {
    match clock {
        Clock::Monotonic => clock::monotonic_ns(),
        Clock::Day => clock::realtime_ns(),
        Clock::Process => task::process_cpu_ns(process),
        Clock::Thread(id) => task::find(id).map_or(0, |t| t.cpu_ns.load(Ordering::Relaxed)),
    }
}

impl Alarm {
    fn left(&self) -> (u64, u64) {
        if self.next == 0 {
            return (0, self.interval);
        }
        let now = now(self.clock, self.process);
        (self.next.saturating_sub(now).max(1), self.interval)
    }
}

fn with<T>(process: u32, which: Which, f: impl FnOnce(&mut Alarm) -> T) -> Option<T> {
    let mut all = ALL.lock();
    let found = all
        .iter_mut()
        .find(|a| (a.process, a.which) == (process, which));
    found.map(f)
}

/// Sets the real interval timer of a process; gives what was left and the interval of the old one.
pub fn set(process: u32, ns: u64, interval: u64) -> (u64, u64) {
    set_interval(process, 0, ns, interval)
}

/// Sets an interval timer; gives what was left and the interval of the old one.
pub fn set_interval(process: u32, which: u32, ns: u64, interval: u64) -> (u64, u64) {
    let (clock, signal) = match which {
        0 => (Clock::Monotonic, Signal::ALRM),
        1 => (Clock::Process, Signal::VTALRM),
        _ => (Clock::Process, Signal::PROF),
    };
    task::charge();
    let old = get_interval(process, which);
    let which = Which::Interval(which);
    let next = now(clock, process).saturating_add(ns);
    let mut all = ALL.lock();
    all.retain(|a| (a.process, a.which) != (process, which));
    if ns > 0 {
        all.push(Alarm {
            process,
            which,
            clock,
            next,
            interval,
            effect: Effect {
                signal: Some(signal),
                thread: None,
                value: 0,
            },
            overrun: 0,
        });
    }
    drop(all);
    changed();
    old
}

/// What is left of an interval timer of a process, and its interval.
pub fn get_interval(process: u32, which: u32) -> (u64, u64) {
    let found = with(process, Which::Interval(which), |a| *a);
    found.map_or((0, 0), |a| a.left())
}

/// Makes a timer (timer_create); it does not run yet.
///
/// # Errors
/// `EAGAIN`: there are too many.
pub fn make(process: u32, clock: Clock, effect: impl FnOnce(u32) -> Effect) -> Result<u32, Errno> {
    let mut all = ALL.lock();
    let taken = |id: u32| {
        all.iter()
            .any(|a| (a.process, a.which) == (process, Which::Made(id)))
    };
    let id = (0..MAX_TIMERS as u32)
        .find(|id| !taken(*id))
        .ok_or(Errno::EAGAIN)?;
    all.push(Alarm {
        process,
        which: Which::Made(id),
        clock,
        next: 0,
        interval: 0,
        effect: effect(id),
        overrun: 0,
    });
    Ok(id)
}

/// Sets a timer that was made, `ns` from now or, if `absolute`, when its clock shows that.
///
/// # Errors
/// `EINVAL`: there is no such timer.
pub fn arm(
    process: u32,
    id: u32,
    ns: u64,
    absolute: bool,
    interval: u64,
) -> Result<(u64, u64), Errno> {
    task::charge();
    let found = with(process, Which::Made(id), |a| *a).ok_or(Errno::EINVAL)?;
    let old = found.left();
    let next = match (ns, absolute) {
        (0, _) => 0,
        (ns, true) => ns,
        (ns, false) => now(found.clock, process).saturating_add(ns),
    };
    with(process, Which::Made(id), |a| {
        (a.next, a.interval, a.overrun) = (next, interval, 0);
    });
    changed();
    Ok(old)
}

/// What is left of a timer that was made, and its interval.
///
/// # Errors
/// `EINVAL`: there is no such timer.
pub fn left(process: u32, id: u32) -> Result<(u64, u64), Errno> {
    let found = with(process, Which::Made(id), |a| *a);
    found.map(|a| a.left()).ok_or(Errno::EINVAL)
}

/// How often it was due again before the last signal was sent.
///
/// # Errors
/// `EINVAL`: there is no such timer.
pub fn overrun(process: u32, id: u32) -> Result<u32, Errno> {
    with(process, Which::Made(id), |a| a.overrun).ok_or(Errno::EINVAL)
}

/// Takes a timer away.
///
/// # Errors
/// `EINVAL`: there is no such timer.
pub fn remove(process: u32, id: u32) -> Result<(), Errno> {
    with(process, Which::Made(id), |_| ()).ok_or(Errno::EINVAL)?;
    ALL.lock()
        .retain(|a| (a.process, a.which) != (process, Which::Made(id)));
    Ok(())
}

/// The process has ended.
pub fn forget(process: u32) {
    ALL.lock().retain(|a| a.process != process);
}

/// The process has another program: timers that were made are gone.
pub fn forget_made(process: u32) {
    ALL.lock()
        .retain(|a| a.process != process || matches!(a.which, Which::Interval(_)));
}

/// When to look for those that are due, by the monotonic clock.
pub fn next() -> Option<u64> {
    let soonest = clock::monotonic_ns().saturating_add(SLACK_NS);
    let all = ALL.lock().clone();
    let running = all.iter().filter(|a| a.next != 0);
    let due = running.map(|a| match a.clock {
        Clock::Monotonic => a.next,
        Clock::Day => {
            let left = a.next.saturating_sub(clock::realtime_ns());
            clock::monotonic_ns().saturating_add(left)
        }
        // At the earliest: if it has the processor until then.
        _ => {
            let left = a.next.saturating_sub(now(a.clock, a.process));
            clock::monotonic_ns().saturating_add(left.max(1_000_000))
        }
    });
    due.min().map(|at| at.max(soonest))
}

/// Sends the signals of those that are due.
pub fn run() {
    task::charge();
    let mut due = Vec::new();
    let times: Vec<(u64, Alarm)> = ALL
        .lock()
        .clone()
        .into_iter()
        .map(|a| (now(a.clock, a.process), a))
        .collect();
    for (now, alarm) in times {
        if alarm.next == 0 || alarm.next > now {
            continue;
        }
        let missed = (now - alarm.next).checked_div(alarm.interval).unwrap_or(0);
        let next = match alarm.interval {
            0 => 0,
            interval => alarm
                .next
                .saturating_add(interval.saturating_mul(missed + 1)),
        };
        let overrun = u32::try_from(missed)
            .unwrap_or(u32::MAX)
            .min(i32::MAX as u32);
        with(alarm.process, alarm.which, |a| {
            (a.next, a.overrun) = (next, overrun);
        });
        due.push((alarm, overrun));
    }
    // An interval timer that is not to come again is gone.
    ALL.lock()
        .retain(|a| a.next != 0 || matches!(a.which, Which::Made(_)));
    for (alarm, overrun) in due {
        let Some(signal) = alarm.effect.signal else {
            continue;
        };
        let info = match alarm.which {
            Which::Interval(_) => Info {
                code: code::KERNEL,
                ..Info::default()
            },
            Which::Made(id) => Info {
                code: code::TIMER,
                id,
                uid: overrun,
                value: alarm.effect.value,
                ..Info::default()
            },
        };
        match alarm.effect.thread.and_then(task::find) {
            Some(thread) => signal::send(&thread, signal, info),
            None => {
                signal::send_process(alarm.process, signal, info);
            }
        }
    }
}
