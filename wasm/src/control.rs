//! What is done to a running container from outside: ended, paused, held to a share of the CPU.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use wasmtime::UpdateDeadline;

/// Longest nap of a program that used up its share, so that it still hears of its end.
const LONGEST_NAP: Duration = Duration::from_millis(100);
/// A program may run ahead of its share by this much, as it may with `cpu.max`.
const BURST: Duration = Duration::from_millis(100);

/// CPU time of the threads that work for one container.
#[derive(Debug, Default)]
pub(crate) struct CpuMeter {
    finished_ns: AtomicU64,
    live: Mutex<Vec<(libc::pid_t, u64)>>,
}

fn clock_ns(clock: libc::clockid_t) -> Option<u64> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec, which is ours; a wrong clock is an error.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    (result == 0).then(|| {
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(nanoseconds)
    })
}

/// The CPU clock of another thread of this process (clock_getcpuclockid(3) for threads).
fn thread_clock(tid: libc::pid_t) -> libc::clockid_t {
    (!tid << 3) | 6
}

impl CpuMeter {
    /// The calling thread works for the container until the result is dropped.
    pub(crate) fn attach(self: &Arc<Self>) -> Attached {
        let tid = nix::unistd::gettid().as_raw();
        let base = clock_ns(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or(0);
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((tid, base));
        Attached {
            meter: Arc::clone(self),
            tid,
        }
    }

    /// CPU time so far.
    pub(crate) fn used(&self) -> Duration {
        let live: u64 = self
            .live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .filter_map(|(tid, base)| Some(clock_ns(thread_clock(*tid))?.saturating_sub(*base)))
            .fold(0, u64::saturating_add);
        Duration::from_nanos(
            self.finished_ns
                .load(Ordering::Relaxed)
                .saturating_add(live),
        )
    }
}

/// See [`CpuMeter::attach`].
#[derive(Debug)]
pub(crate) struct Attached {
    meter: Arc<CpuMeter>,
    tid: libc::pid_t,
}

impl Drop for Attached {
    fn drop(&mut self) {
        let now = clock_ns(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or(0);
        let mut live = self
            .meter
            .live
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = live.iter().position(|(tid, _)| *tid == self.tid) {
            let (_, base) = live.swap_remove(at);
            self.meter
                .finished_ns
                .fetch_add(now.saturating_sub(base), Ordering::Relaxed);
        }
    }
}

/// Shared by a container's owner and its threads.
#[derive(Debug)]
pub(crate) struct Control {
    /// Number of the signal that ends it; 0 while it may run.
    signal: AtomicU32,
    paused: AtomicBool,
    changed: Notify,
    /// It is a server, which can finish what it does.
    serving: AtomicBool,
    /// A server is asked to finish what it does and to take no more.
    draining: AtomicBool,
    pub(crate) cpu: Arc<CpuMeter>,
    /// Thousandths of a CPU; 0 is no limit.
    cpu_milli: AtomicU32,
    /// From when, and from which CPU time, the share is counted.
    base: Mutex<(Instant, Duration)>,
}

impl Control {
    pub(crate) fn new(cpu_milli: Option<u32>) -> Self {
        Self {
            signal: AtomicU32::new(0),
            paused: AtomicBool::new(false),
            changed: Notify::new(),
            serving: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            cpu: Arc::new(CpuMeter::default()),
            cpu_milli: AtomicU32::new(cpu_milli.unwrap_or(0)),
            base: Mutex::new((Instant::now(), Duration::ZERO)),
        }
    }

    /// Another share of the CPU, counted from now on.
    pub(crate) fn set_share(&self, cpu_milli: Option<u32>) {
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        *base = (Instant::now(), self.cpu.used());
        self.cpu_milli
            .store(cpu_milli.unwrap_or(0), Ordering::Release);
    }

    /// Ends the program by `signal`. The caller advances the epoch.
    pub(crate) fn kill(&self, signal: u32) {
        let _ = self
            .signal
            .compare_exchange(0, signal, Ordering::AcqRel, Ordering::Acquire);
        self.changed.notify_waiters();
    }

    /// Asks a server to finish; ends anything else, and a server that is asked again.
    pub(crate) fn terminate(&self, signal: u32) {
        if self.serving.load(Ordering::Acquire) && !self.draining.swap(true, Ordering::AcqRel) {
            self.changed.notify_waiters();
        } else {
            self.kill(signal);
        }
    }

    pub(crate) fn serve(&self) {
        self.serving.store(true, Ordering::Release);
    }

    pub(crate) fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
        self.changed.notify_waiters();
    }

    pub(crate) fn signal(&self) -> Option<u32> {
        match self.signal.load(Ordering::Acquire) {
            0 => None,
            n => Some(n),
        }
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    async fn until(&self, done: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if done(self) {
                return;
            }
            changed.await;
        }
    }

    /// Waits for the program's end by a signal.
    pub(crate) async fn killed(&self) -> u32 {
        self.until(|c| c.signal().is_some()).await;
        self.signal().unwrap_or(9)
    }

    /// Waits for the wish to finish.
    pub(crate) async fn draining(&self) {
        self.until(|c| c.draining.load(Ordering::Acquire) || c.signal().is_some())
            .await;
    }

    /// Waits while paused.
    pub(crate) async fn runnable(&self) {
        self.until(|c| !c.is_paused() || c.signal().is_some()).await;
    }

    /// How long the program must wait to be back at its share. What it leaves unused is not saved
    /// up beyond a burst.
    fn ahead(&self) -> Option<Duration> {
        let milli = self.cpu_milli.load(Ordering::Acquire);
        if milli == 0 {
            return None;
        }
        let used = self.cpu.used();
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        let share = base.0.elapsed().saturating_mul(milli).checked_div(1000)?;
        let spent = used.saturating_sub(base.1);
        if spent.saturating_add(BURST) < share {
            *base = (Instant::now(), used);
            return None;
        }
        let ahead = spent.saturating_sub(share).saturating_sub(BURST);
        if ahead.is_zero() {
            return None;
        }
        // At a share of s, time t of CPU takes t/s.
        let nap = ahead.saturating_mul(1000).checked_div(milli)?;
        Some(nap.min(LONGEST_NAP))
    }

    /// Called on the program's thread at each tick, and at once after a change.
    pub(crate) fn tick(self: &Arc<Self>) -> UpdateDeadline {
        if self.signal().is_some() {
            return UpdateDeadline::Interrupt;
        }
        if self.is_paused() {
            let control = Arc::clone(self);
            return UpdateDeadline::YieldCustom(
                1,
                Box::pin(async move { control.runnable().await }),
            );
        }
        if let Some(nap) = self.ahead() {
            let control = Arc::clone(self);
            return UpdateDeadline::YieldCustom(
                1,
                Box::pin(async move {
                    tokio::select! {
                        _ = control.killed() => {}
                        () = tokio::time::sleep(nap) => {}
                    }
                }),
            );
        }
        UpdateDeadline::Yield(1)
    }
}
