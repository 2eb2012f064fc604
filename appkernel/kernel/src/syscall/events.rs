//! Files that stand for events: eventfd, timerfd, signalfd, epoll; and memory files.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::any::Any;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use appkernel_core::errno::Errno;
use appkernel_hal::clock;
use appkernel_hal::sync::Mutex;

use super::{Call, Result, get, get_timespec, get_u64, polls, put, put_words};
use crate::fs::file::{File, Kind, Object, Ready, flag};
use crate::fs::fuse::Change;
use crate::fs::memory::{self, seal};
use crate::fs::node::Node;
use crate::signal::{self, Signal};
use crate::task;

const NONBLOCK: u32 = 0o4000;
const CLOEXEC: u32 = 0o2_000_000;
/// Files that one epoll watches, at most.
const MAX_WATCHED: usize = 4096;
const MAX_EVENTS: usize = 1024;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        213 if c.int(0) <= 0 => Err(Errno::EINVAL),
        213 => insert(c, Arc::new(Epoll::default()), 0),
        291 if c.uint(0) & !CLOEXEC != 0 => Err(Errno::EINVAL),
        291 => insert(c, Arc::new(Epoll::default()), c.uint(0)),
        233 => control(c),
        232 => wait(c, ms(c.int(3)), 0),
        281 => wait(c, ms(c.int(3)), c.arg(4)),
        441 => match c.arg(3) {
            0 => wait(c, None, c.arg(4)),
            at => get_timespec(at).and_then(|ns| wait(c, Some(ns), c.arg(4))),
        },
        284 => event(c, 0),
        290 => event(c, c.uint(1)),
        283 => timer(c),
        286 => set_timer(c),
        287 => timer_left(c),
        282 => signals(c, 0),
        289 => signals(c, c.uint(3)),
        319 => memory_file(c),
        _ => return None,
    })
}

fn insert(c: &Call<'_>, object: Arc<dyn Object>, flags: u32) -> Result {
    let status = if flags & NONBLOCK != 0 {
        flag::NONBLOCK
    } else {
        0
    };
    let file = Arc::new(File::new(Kind::Object(object), status | 2));
    let fd = c
        .task
        .files()
        .lock()
        .insert(file, 0, flags & CLOEXEC != 0)?;
    Ok(fd as u64)
}

fn ms(timeout: i32) -> Option<u64> {
    (timeout >= 0).then(|| u64::from(timeout.cast_unsigned()) * 1_000_000)
}

/// A number that waits.
struct EventFd {
    count: Mutex<u64>,
    written: AtomicU64,
    one_by_one: bool,
}

fn event(c: &Call<'_>, flags: u32) -> Result {
    const SEMAPHORE: u32 = 1;
    if flags & !(SEMAPHORE | NONBLOCK | CLOEXEC) != 0 {
        return Err(Errno::EINVAL);
    }
    let event = EventFd {
        count: Mutex::new(c.uint(0).into()),
        written: AtomicU64::new(0),
        one_by_one: flags & SEMAPHORE != 0,
    };
    insert(c, Arc::new(event), flags)
}

/// Writes a number where a read wants it.
fn number(to: &mut [u8], value: u64) -> core::result::Result<usize, Errno> {
    let slot = to.get_mut(..8).ok_or(Errno::EINVAL)?;
    slot.copy_from_slice(&value.to_le_bytes());
    Ok(8)
}

impl Object for EventFd {
    fn read(&self, to: &mut [u8], wait: bool) -> core::result::Result<usize, Errno> {
        if to.len() < 8 {
            return Err(Errno::EINVAL);
        }
        let attempt = || {
            let mut count = self.count.lock();
            if *count == 0 {
                return None;
            }
            let taken = if self.one_by_one { 1 } else { *count };
            *count -= taken;
            Some(taken)
        };
        let value = if wait {
            task::wait_for(task::FILES, attempt)?
        } else {
            attempt().ok_or(Errno::EAGAIN)?
        };
        task::wake(task::FILES);
        number(to, value)
    }

    fn write(&self, from: &[u8], wait: bool) -> core::result::Result<usize, Errno> {
        let bytes: [u8; 8] = from
            .get(..8)
            .and_then(|b| b.try_into().ok())
            .ok_or(Errno::EINVAL)?;
        let value = u64::from_le_bytes(bytes);
        if value == u64::MAX {
            return Err(Errno::EINVAL);
        }
        let attempt = || {
            let mut count = self.count.lock();
            let new = count.checked_add(value).filter(|n| *n < u64::MAX)?;
            *count = new;
            self.written.fetch_add(1, Ordering::Relaxed);
            Some(())
        };
        if wait {
            task::wait_for(task::FILES, attempt)?;
        } else {
            attempt().ok_or(Errno::EAGAIN)?;
        }
        task::wake(task::FILES);
        Ok(8)
    }

    fn ready(&self) -> Ready {
        let count = *self.count.lock();
        Ready {
            readable: count > 0,
            writable: count < u64::MAX - 1,
            ..Ready::default()
        }
    }

    fn progress(&self) -> (u64, u64) {
        (self.written.load(Ordering::Relaxed), 0)
    }

    fn name(&self) -> String {
        String::from("anon_inode:[eventfd]")
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Clone, Copy, Default)]
struct Alarm {
    /// Monotonic time of the next expiration; 0: none.
    next: u64,
    interval: u64,
    /// How often it was set or read: each time it can expire anew.
    rounds: u64,
}

impl Alarm {
    /// Expirations up to now that were not read.
    fn waiting(&self) -> u64 {
        let now = clock::monotonic_ns();
        if self.next == 0 || self.next > now {
            return 0;
        }
        let more = (now - self.next).checked_div(self.interval).unwrap_or(0);
        more.saturating_add(1)
    }

    /// When the next one after `count` expirations comes; 0: never.
    fn after(&self, count: u64) -> u64 {
        match self.interval {
            _ if count == 0 => self.next,
            0 => 0,
            interval => self.next.saturating_add(interval.saturating_mul(count)),
        }
    }
}

/// A timer.
struct TimerFd {
    realtime: bool,
    alarm: Mutex<Alarm>,
}

fn timer(c: &Call<'_>) -> Result {
    if !matches!(c.uint(0), 0 | 1 | 7) || c.uint(1) & !(NONBLOCK | CLOEXEC) != 0 {
        return Err(Errno::EINVAL);
    }
    let timer = TimerFd {
        realtime: c.uint(0) == 0,
        alarm: Mutex::default(),
    };
    insert(c, Arc::new(timer), c.uint(1))
}

impl TimerFd {
    /// Takes the expirations so far.
    fn expired(&self) -> u64 {
        let mut alarm = self.alarm.lock();
        let count = alarm.waiting();
        alarm.next = alarm.after(count);
        alarm.rounds = alarm.rounds.wrapping_add(count.min(1));
        count
    }

    fn left(&self) -> [u64; 4] {
        const SECOND: u64 = 1_000_000_000;
        let alarm = *self.alarm.lock();
        let left = match alarm.next {
            0 => 0,
            next => next.saturating_sub(clock::monotonic_ns()).max(1),
        };
        [
            alarm.interval / SECOND,
            alarm.interval % SECOND,
            left / SECOND,
            left % SECOND,
        ]
    }

    /// When it expires; `None` if it does not, or has and nobody has read it.
    fn deadline(&self) -> Option<u64> {
        let alarm = *self.alarm.lock();
        (alarm.next != 0 && alarm.waiting() == 0).then_some(alarm.next)
    }
}

fn set_timer(c: &Call<'_>) -> Result {
    const ABSOLUTE: u32 = 1;
    const CANCEL_ON_SET: u32 = 2;
    if c.uint(1) & !(ABSOLUTE | CANCEL_ON_SET) != 0 {
        return Err(Errno::EINVAL);
    }
    let file = c.task.file(c.int(0))?;
    let timer = file.object::<TimerFd>().ok_or(Errno::EINVAL)?;
    let interval = get_timespec(c.arg(2))?;
    let value = get_timespec(c.arg(2).wrapping_add(16))?;
    let old = timer.left();
    let now = clock::monotonic_ns();
    let next = match (value, c.uint(1) & ABSOLUTE != 0) {
        (0, _) => 0,
        (value, false) => now.saturating_add(value),
        (value, true) if timer.realtime => {
            let offset = clock::realtime_ns().saturating_sub(now);
            value.saturating_sub(offset).max(1)
        }
        (value, true) => value,
    };
    let mut alarm = timer.alarm.lock();
    (alarm.next, alarm.interval) = (next, interval);
    alarm.rounds = alarm.rounds.wrapping_add(1);
    drop(alarm);
    if c.arg(3) != 0 {
        put_words(c.arg(3), &old)?;
    }
    task::wake(task::FILES);
    Ok(0)
}

fn timer_left(c: &Call<'_>) -> Result {
    let file = c.task.file(c.int(0))?;
    let timer = file.object::<TimerFd>().ok_or(Errno::EINVAL)?;
    put_words(c.arg(1), &timer.left())?;
    Ok(0)
}

impl Object for TimerFd {
    fn read(&self, to: &mut [u8], wait: bool) -> core::result::Result<usize, Errno> {
        if to.len() < 8 {
            return Err(Errno::EINVAL);
        }
        loop {
            let count = self.expired();
            if count > 0 {
                return number(to, count);
            }
            if !wait {
                return Err(Errno::EAGAIN);
            }
            let due = || {
                let next = self.alarm.lock().next;
                (next != 0 && next <= clock::monotonic_ns()).then_some(())
            };
            match task::wait_until(task::FILES, self.deadline(), due) {
                Ok(()) | Err(Errno::ETIMEDOUT) => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn ready(&self) -> Ready {
        let next = self.alarm.lock().next;
        Ready {
            readable: next != 0 && next <= clock::monotonic_ns(),
            ..Ready::default()
        }
    }

    fn progress(&self) -> (u64, u64) {
        (self.alarm.lock().rounds, 0)
    }

    fn name(&self) -> String {
        String::from("anon_inode:[timerfd]")
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// When a poll has to look again, because of timers.
pub fn timer_deadline(file: &File) -> Option<u64> {
    match (file.object::<TimerFd>(), file.object::<Epoll>()) {
        (Some(timer), _) => timer.deadline(),
        (None, Some(epoll)) => epoll.deadline(),
        _ => None,
    }
}

/// Signals that are read.
struct SignalFd(Mutex<u64>);

fn signals(c: &Call<'_>, flags: u32) -> Result {
    if c.arg(2) != 8 || flags & !(NONBLOCK | CLOEXEC) != 0 {
        return Err(Errno::EINVAL);
    }
    let mask = get_u64(c.arg(1))? & !(Signal::KILL.bit() | Signal::STOP.bit());
    if c.int(0) == -1 {
        return insert(c, Arc::new(SignalFd(Mutex::new(mask))), flags);
    }
    let file = c.task.file(c.int(0))?;
    let signals = file.object::<SignalFd>().ok_or(Errno::EINVAL)?;
    *signals.0.lock() = mask;
    Ok(c.arg(0))
}

impl Object for SignalFd {
    fn read(&self, to: &mut [u8], wait: bool) -> core::result::Result<usize, Errno> {
        const BYTES: usize = 128;
        if to.len() < BYTES {
            return Err(Errno::EINVAL);
        }
        let mask = *self.0.lock();
        let me = task::current();
        let take = || {
            signal::adopt(&me, mask);
            me.pending.lock().take(mask)
        };
        let mut next = Some(if wait {
            task::wait_for(task::FILES, take)?
        } else {
            take().ok_or(Errno::EAGAIN)?
        });
        let mut done = 0;
        while let Some((signal, info)) = next {
            let Some(slot) = to.get_mut(done..done + BYTES) else {
                break;
            };
            slot.fill(0);
            let words = signal::siginfo(signal, &info);
            let fields = [
                signal.0.into(),
                0,
                info.code.cast_unsigned(),
                words[2] as u32,
                info.uid,
            ];
            for (place, value) in slot.chunks_exact_mut(4).zip(fields) {
                place.copy_from_slice(&value.to_le_bytes());
            }
            if let Some(place) = slot.get_mut(40..44) {
                place.copy_from_slice(&(info.value as u32).to_le_bytes());
            }
            done += BYTES;
            next = if done + BYTES <= to.len() {
                take()
            } else {
                None
            };
        }
        Ok(done)
    }

    fn ready(&self) -> Ready {
        let mask = *self.0.lock();
        let me = task::current();
        signal::adopt(&me, mask);
        Ready {
            readable: me.pending.lock().waiting() & mask != 0,
            ..Ready::default()
        }
    }

    fn name(&self) -> String {
        String::from("anon_inode:[signalfd]")
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// What one epoll knows of a file.
struct Watch {
    file: Weak<File>,
    events: u32,
    data: u64,
    /// What was reported last, for edges; and whether it is off after one report.
    last: u32,
    progress: (u64, u64),
    off: bool,
}

/// Watches files, with the number of epolls that may be above it, and the file it has reported last.
/// Chains have an end: they are followed on the kernel's stack.
#[derive(Default)]
struct Epoll(
    Mutex<BTreeMap<(i32, usize), Watch>>,
    AtomicUsize,
    Mutex<(i32, usize)>,
);

/// Epolls within epolls, as Linux.
const MAX_NESTED: usize = 4;
/// Epolls that one epoll watches (Linux counts the ways from a file to the top instead).
const MAX_INNER: usize = 16;

const READABLE: u32 = 0x41;
const WRITABLE: u32 = 0x104;

/// Flags besides the events themselves.
mod epoll {
    pub const ONESHOT: u32 = 1 << 30;
    pub const EDGE: u32 = 1 << 31;
    /// Always reported: error, hang-up.
    pub const ALWAYS: u32 = 0x18;
}

fn control(c: &Call<'_>) -> Result {
    let file = c.task.file(c.int(0))?;
    let watched = c.task.file(c.int(2))?;
    let own = file.object::<Epoll>().ok_or(Errno::EINVAL)?;
    if let Some(inner) = watched.object::<Epoll>() {
        if Arc::ptr_eq(&file, &watched) {
            return Err(Errno::EINVAL);
        }
        if c.uint(1) == 1 {
            // Each look at the top looks at all below: their number must not multiply.
            let files = own.files();
            let epolls = files.iter().filter(|f| f.object::<Epoll>().is_some());
            if epolls.count() >= MAX_INNER {
                return Err(Errno::EINVAL);
            }
            let me = core::ptr::from_ref(own);
            let Some(below) = inner.depth(me, 0) else {
                return Err(Errno::ELOOP);
            };
            let above = own.1.load(Ordering::Relaxed);
            if below + 1 + above > MAX_NESTED {
                return Err(Errno::EINVAL);
            }
            inner.1.fetch_max(above + 1, Ordering::Relaxed);
            inner.push_down(above + 1);
        }
    }
    if watched.flags() & flag::PATH != 0 {
        return Err(Errno::EBADF);
    }
    if matches!(
        watched.kind,
        Kind::Regular(..) | Kind::Directory(..) | Kind::Device(_)
    ) {
        return Err(Errno::EPERM);
    }
    let (events, data) = if c.uint(1) == 2 {
        (0, 0)
    } else {
        let raw: [u8; 12] = get(c.arg(3))?;
        let (events, data) = raw.split_at(4);
        (
            events.try_into().map_or(0, u32::from_le_bytes),
            data.try_into().map_or(0, u64::from_le_bytes),
        )
    };
    let key = (c.int(2), Arc::as_ptr(&watched) as usize);
    let mut all = own.0.lock();
    all.retain(|_, watch| watch.file.strong_count() > 0);
    let watch = Watch {
        file: Arc::downgrade(&watched),
        events,
        data,
        last: 0,
        progress: (0, 0),
        off: false,
    };
    match c.uint(1) {
        1 if all.contains_key(&key) => return Err(Errno::EEXIST),
        1 if all.len() >= MAX_WATCHED => return Err(Errno::ENOSPC),
        1 => {
            all.insert(key, watch);
        }
        2 => {
            all.remove(&key).ok_or(Errno::ENOENT)?;
        }
        3 => *all.get_mut(&key).ok_or(Errno::ENOENT)? = watch,
        _ => return Err(Errno::EINVAL),
    }
    drop(all);
    task::wake(task::FILES);
    Ok(0)
}

impl Epoll {
    /// How many levels of epolls are below it; `None` if `top` is one of them, or there are more
    /// than may be.
    fn depth(&self, top: *const Self, level: usize) -> Option<usize> {
        if core::ptr::eq(self, top) || level > MAX_NESTED {
            return None;
        }
        let mut deepest = 0;
        for file in self.files() {
            if let Some(inner) = file.object::<Self>() {
                deepest = deepest.max(inner.depth(top, level + 1)? + 1);
            }
        }
        Some(deepest)
    }

    /// Tells those below how many are above them.
    fn push_down(&self, above: usize) {
        // The depth was checked: there are no rings.
        for file in self.files() {
            if let Some(inner) = file.object::<Self>()
                && above < MAX_NESTED
            {
                inner.1.fetch_max(above + 1, Ordering::Relaxed);
                inner.push_down(above + 1);
            }
        }
    }

    fn files(&self) -> Vec<Arc<File>> {
        let all = self.0.lock();
        all.values().filter_map(|w| w.file.upgrade()).collect()
    }

    fn deadline(&self) -> Option<u64> {
        self.files().iter().filter_map(|f| timer_deadline(f)).min()
    }

    /// Up to `most` events; with `take`, edges and one-shots are used up by it. Those that are
    /// reported go to the end of the line, so that none starves.
    fn collect(&self, most: usize, take: bool) -> Vec<(u32, u64)> {
        let mut found = Vec::new();
        let mut keys: Vec<_> = self.0.lock().keys().copied().collect();
        let last = *self.2.lock();
        let next = keys.partition_point(|key| *key <= last);
        keys.rotate_left(next);
        for key in keys {
            if found.len() >= most {
                break;
            }
            let known = self.0.lock().get(&key).map(|w| (w.file.upgrade(), w.off));
            // Without the lock: the file may be an epoll itself.
            let Some((Some(file), false)) = known else {
                continue;
            };
            let now = u32::from(polls::bits(file.ready()));
            let progress = file.progress();
            let mut all = self.0.lock();
            let Some(watch) = all.get_mut(&key) else {
                continue;
            };
            let ready = now & (watch.events | epoll::ALWAYS);
            let report = if watch.events & epoll::EDGE != 0 {
                // New since the last look: it became ready, or more came.
                let mut new = ready & !watch.last;
                if progress.0 != watch.progress.0 {
                    new |= ready & READABLE;
                }
                if progress.1 != watch.progress.1 {
                    new |= ready & WRITABLE;
                }
                new
            } else {
                ready
            };
            if take {
                watch.last = ready;
                watch.progress = progress;
            }
            if report != 0 {
                found.push((ready, watch.data));
                if take {
                    *self.2.lock() = key;
                }
                if take && watch.events & epoll::ONESHOT != 0 {
                    watch.off = true;
                }
            }
        }
        found
    }
}

impl Object for Epoll {
    fn ready(&self) -> Ready {
        Ready {
            readable: !self.collect(1, false).is_empty(),
            ..Ready::default()
        }
    }

    fn name(&self) -> String {
        String::from("anon_inode:[eventpoll]")
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn wait(c: &Call<'_>, ns: Option<u64>, mask_at: u64) -> Result {
    let file = c.task.file(c.int(0))?;
    let own = file.object::<Epoll>().ok_or(Errno::EINVAL)?;
    let most = usize::try_from(c.int(2))
        .ok()
        .filter(|n| *n > 0)
        .ok_or(Errno::EINVAL)?
        .min(MAX_EVENTS);
    let mask = match mask_at {
        0 => None,
        at => Some(get_u64(at)?),
    };
    let mut found = Vec::new();
    polls::wait_for_files(
        c,
        ns,
        mask,
        || own.deadline(),
        || {
            found = own.collect(most, true);
            (!found.is_empty()).then_some(1)
        },
    )?;
    let mut bytes = Vec::with_capacity(found.len() * 12);
    for (events, data) in &found {
        bytes.extend(events.to_le_bytes());
        bytes.extend(data.to_le_bytes());
    }
    put(c.arg(1), &bytes)?;
    Ok(found.len() as u64)
}

/// memfd_create(2).
fn memory_file(c: &Call<'_>) -> Result {
    const CLOSE: u32 = 1;
    const ALLOW_SEALING: u32 = 2;
    const HUGE: u32 = 4;
    const NO_EXEC_SEAL: u32 = 8;
    const EXEC: u32 = 0x10;
    let flags = c.uint(1);
    let known = CLOSE | ALLOW_SEALING | HUGE | NO_EXEC_SEAL | EXEC;
    let sizes = if flags & HUGE != 0 { 0x3f << 26 } else { 0 };
    if flags & !(known | sizes) != 0 || flags & (NO_EXEC_SEAL | EXEC) == NO_EXEC_SEAL | EXEC {
        return Err(Errno::EINVAL);
    }
    let name = super::get_string(c.arg(0), 250, Errno::EINVAL)?;
    if flags & HUGE != 0 {
        // There are no such pages.
        return Err(Errno::ENODEV);
    }
    let owner = c.task.credentials.lock().owner();
    let node = memory::anonymous(owner);
    if flags & NO_EXEC_SEAL != 0 {
        node.change(&Change {
            mode: Some(0o666),
            ..Change::default()
        })?;
        node.begin_seals(seal::EXEC);
    } else if flags & ALLOW_SEALING != 0 {
        node.begin_seals(0);
    }
    let node = Node::Memory(node);
    let path = [b"/memfd:".as_slice(), &name, b" (deleted)"].concat();
    let file = Arc::new(File::at(Kind::Regular(node, Some(0)), 2, path));
    let close = c.uint(1) & CLOSE != 0;
    let fd = c.task.files().lock().insert(file, 0, close)?;
    Ok(fd as u64)
}
