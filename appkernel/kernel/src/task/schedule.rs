//! Who runs: choosing, sleeping, waking.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_hal::context::{self, Context};
use appkernel_hal::sync::Mutex;
use appkernel_hal::{apic, clock, cpu};

use super::ready::Next;
use super::{Channel, NEVER, SCHEDULER, State, Task, current, find, with};

/// Starts the first task.
pub fn start(task: Arc<Task>) -> ! {
    SINCE.store(clock::monotonic_ns(), Ordering::Relaxed);
    let context: *const Context = task.context.get();
    let root = task.root.load(Ordering::Relaxed);
    drop(task);
    // SAFETY: the task is in the table, which keeps its context in place.
    unsafe { context::start(context, root) }
}

/// When the running task got the CPU.
static SINCE: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds that any task had it.
static BUSY: AtomicU64 = AtomicU64::new(0);

/// Nanoseconds that the CPU was not idle.
pub fn busy_ns() -> u64 {
    BUSY.load(Ordering::Relaxed)
}

/// Counts the time since the last call for the running task.
pub fn charge() {
    let now = clock::monotonic_ns();
    let spent = now.saturating_sub(SINCE.swap(now, Ordering::Relaxed));
    BUSY.fetch_add(spent, Ordering::Relaxed);
    with(|s| {
        s.running.cpu_ns.fetch_add(spent, Ordering::Relaxed);
        let container = &s.running.container;
        container.cpu_ns.fetch_add(spent, Ordering::Relaxed);
        container.share.lock().spend(now, spent);
    });
}

/// Lets others run; returns when this task is chosen again.
pub(super) fn schedule() {
    charge();
    let dead: Vec<Arc<Task>> = with(|s| {
        let current = s.current;
        let ids: Vec<u32> = s.dead.extract_if(.., |id| *id != current).collect();
        ids.iter()
            .filter_map(|id| s.tasks.remove(id))
            .map(|(task, _)| task)
            .collect()
    });
    drop(dead);
    // Nobody could run for a while, and the tick was put off.
    let mut rests = false;
    let mut idled = false;
    let (previous, next, root) = loop {
        let now = clock::monotonic_ns();
        let choice = with(|s| {
            // A number of a task that is gone is nobody's turn.
            let (id, task) = loop {
                let id = match s.ready.pop(now) {
                    Next::Task(id) => id,
                    Next::After(time) => return Err(Some(time)),
                    Next::Nobody => return Err(None),
                };
                if let Some((task, _)) = s.tasks.get(&id) {
                    break (id, Arc::clone(task));
                }
            };
            let left = task.container.share.lock().left_ns();
            let to = (task.context.get(), task.root.load(Ordering::Relaxed));
            s.current = id;
            let previous = core::mem::replace(&mut s.running, task);
            Ok((previous, to.0, to.1, left))
        });
        match choice {
            Ok((previous, next, root, left)) => {
                let from = previous.context.get();
                // The table of tasks has it still, also one that ended.
                drop(previous);
                let left = left.unwrap_or(u64::MAX);
                if rests || left < clock::TICK_NS {
                    apic::next_tick(next_timer(now).min(left));
                }
                break (from, next, root);
            }
            // Nobody can run: the next interrupt may change that, or the next period of somebody.
            Err(time) => {
                let period = time.map_or(u64::MAX, |time| time.saturating_sub(now));
                // Not at once: a program that waits for a moment, as servers do, would pay twice.
                if idled {
                    apic::rest(next_timer(now).min(period));
                    rests = true;
                } else if time.is_some() {
                    apic::next_tick(next_timer(now).min(period));
                }
                cpu::idle();
                idled = true;
                SINCE.store(clock::monotonic_ns(), Ordering::Relaxed);
            }
        }
    };
    if previous != next {
        // SAFETY: both contexts are kept in place by the table of tasks (an ended one by `dead`
        // until somebody else runs); `previous` is the running one. No lock is held.
        unsafe { context::switch(previous, next, root) };
    }
}

/// The end of a time slice.
pub fn yield_now() {
    charge();
    let now = clock::monotonic_ns();
    let alone = with(|s| {
        let container = &s.running.container;
        if s.ready.is_empty() && container.share.lock().waits_until(now).is_none() {
            return true;
        }
        s.ready.push_back(s.current, container);
        false
    });
    if !alone {
        schedule();
    }
}

/// In the middle of a long call, with no lock held: lets interrupts in and others run when the time
/// slice is over.
///
/// # Errors
/// `EINTR`: the task has to end.
pub fn breathe() -> Result<(), Errno> {
    let since = SINCE.load(Ordering::Relaxed);
    if clock::monotonic_ns().saturating_sub(since) >= clock::TICK_NS
        && !appkernel_hal::sync::any_taken()
    {
        cpu::take_interrupts();
        charge();
        yield_now();
    }
    if super::is_ending() {
        return Err(Errno::EINTR);
    }
    Ok(())
}

/// Sleeps until somebody calls `wake` with the same channel. No lock may be held.
pub fn sleep(channel: Channel) {
    with(|s| {
        let id = s.current;
        if let Some((_, state)) = s.tasks.get_mut(&id) {
            *state = State::Sleeping(channel);
        }
    });
    schedule();
}

/// Sleeps until `ready` gives something; `EINTR` if a signal comes first.
pub fn wait_for<T>(channel: Channel, mut ready: impl FnMut() -> Option<T>) -> Result<T, Errno> {
    loop {
        if let Some(value) = ready() {
            return Ok(value);
        }
        if current().pending.lock().deliverable() {
            return Err(Errno::EINTR);
        }
        sleep(channel);
    }
}

/// As `wait_for`, with a point of monotonic time after which it gives up: `ETIMEDOUT`.
pub fn wait_until<T>(
    channel: Channel,
    deadline_ns: Option<u64>,
    mut ready: impl FnMut() -> Option<T>,
) -> Result<T, Errno> {
    let Some(deadline) = deadline_ns else {
        return wait_for(channel, ready);
    };
    let id = current().id;
    TIMERS.lock().push((deadline, id));
    apic::next_tick(next_timer(clock::monotonic_ns()));
    let result = wait_for(channel, || match ready() {
        Some(value) => Some(Ok(value)),
        None if clock::monotonic_ns() >= deadline => Some(Err(Errno::ETIMEDOUT)),
        None => None,
    });
    TIMERS
        .lock()
        .retain(|(at, of)| (*at, *of) != (deadline, id));
    result?
}

/// Nanoseconds until the first timer is due.
fn next_timer(now: u64) -> u64 {
    let timers = TIMERS.lock();
    let next = timers.iter().map(|(at, _)| at.saturating_sub(now)).min();
    next.unwrap_or(u64::MAX)
}

static TIMERS: Mutex<Vec<(u64, u32)>> = Mutex::new(Vec::new());

/// Wakes tasks whose time has come; called by the timer. The timer may come while the kernel idles
/// or a program runs, so no lock is held then.
pub fn wake_sleepers() {
    let now = clock::monotonic_ns();
    let due: Vec<u32> = TIMERS
        .lock()
        .iter()
        .filter(|(at, _)| *at <= now)
        .map(|(_, id)| *id)
        .collect();
    for id in due {
        wake_task(id);
    }
    let timers = TIMERS.lock();
    let later = timers.iter().filter(|(at, _)| *at > now);
    let next = later.map(|(at, _)| at - now).min().unwrap_or(u64::MAX);
    drop(timers);
    apic::next_tick(next);
}

/// Wakes one task, whatever it waits for; it will look again.
pub fn wake_task(id: u32) {
    with(|s| {
        if let Some((task, state @ State::Sleeping(_))) = s.tasks.get_mut(&id)
            && *state != State::Sleeping(NEVER)
        {
            *state = State::Ready;
            s.ready.push_back(id, &task.container);
        }
    });
}

/// Wakes all that sleep on the channel. An interrupt may come before there is any task.
pub fn wake(channel: Channel) {
    if let Some(s) = SCHEDULER.lock().as_mut() {
        for (id, (task, state)) in &mut s.tasks {
            if *state == State::Sleeping(channel) {
                *state = State::Ready;
                s.ready.push_back(*id, &task.container);
            }
        }
    }
}

/// Wakes all that sleep on the channel and lets them run at once; the running task goes on right
/// after them. No lock may be held.
pub fn hand_over(channel: Channel) {
    let any = with(|s| {
        let mut woken = Vec::new();
        for (id, (task, state)) in &mut s.tasks {
            if *state == State::Sleeping(channel) {
                *state = State::Ready;
                woken.push((*id, Arc::clone(&task.container)));
            }
        }
        if woken.is_empty() {
            return false;
        }
        s.ready.push_front(s.current, &s.running.container);
        for (id, container) in woken {
            s.ready.push_front(id, &container);
        }
        true
    });
    if any {
        schedule();
    }
}

/// Lets a task run that waits to be started.
pub fn begin(id: u32) {
    with(|s| {
        if let Some((task, state)) = s.tasks.get_mut(&id)
            && *state == State::Sleeping(NEVER)
        {
            *state = State::Ready;
            s.ready.push_back(id, &task.container);
        }
    });
}

/// Stops the running task until a signal lets it go on or ends it.
pub fn stop() {
    // A signal that came a moment ago may have ended the stop, or the process.
    let me = current();
    if !me.links.lock().is_stopped || me.pending.lock().ending.is_some() {
        return;
    }
    drop(me);
    with(|s| {
        let id = s.current;
        if let Some((_, state)) = s.tasks.get_mut(&id) {
            *state = State::Stopped;
        }
    });
    schedule();
}

/// Lets a stopped task go on.
pub fn go_on(id: u32) {
    with(|s| {
        if let Some((task, state @ State::Stopped)) = s.tasks.get_mut(&id) {
            *state = State::Ready;
            s.ready.push_back(id, &task.container);
        }
    });
}

/// Sleeps until the child of a vfork has its own memory or ended.
pub fn wait_vfork(child: u32) {
    let Some(task) = find(child) else { return };
    let channel = core::ptr::from_ref(&task.vfork) as Channel;
    // A child that is ended before it has memory of its own wakes too; and whoever has to end waits
    // for nobody.
    while *task.vfork.lock() && !super::is_ending() {
        sleep(channel);
    }
}
