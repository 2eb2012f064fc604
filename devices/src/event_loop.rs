//! The thread that runs a VM's devices.
//!
//! One [`EventLoop`] is one thread that sleeps in `epoll_wait` until a device has something to do.
//! A panic in a device ends the loop and is reported; it never ends the process.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};

use event_manager::{EventManager, EventSubscriber, RemoteEndpoint, SubscriberOps};

type Subscriber = Arc<dyn EventSubscriber + Send + Sync>;

/// Events taken from the kernel at once; more wait for the next turn.
const EVENTS_PER_TURN: usize = 32;

/// Called on the loop's thread when it ends by a panic or an error of `epoll`.
pub type OnFailure = Box<dyn Fn(String) + Send>;

/// How to run a loop.
pub struct EventLoopOptions {
    /// Name of the thread (the kernel keeps 15 bytes).
    pub name: String,
    /// Stack of the thread in bytes. Memory is used only as far as the stack is.
    pub stack_size: usize,
    /// Called first on the new thread, for what belongs to a role: a seccomp filter, a cgroup.
    /// An error of it is what [`EventLoop::spawn_with`] returns.
    pub on_start: Option<Box<dyn FnOnce() -> io::Result<()> + Send>>,
    /// Called on the loop's thread after each turn; what it says ends the loop as a failure.
    pub after_turn: fn() -> Option<String>,
    /// Called on the loop's thread when the loop fails.
    pub on_failure: OnFailure,
}

impl Default for EventLoopOptions {
    fn default() -> Self {
        Self {
            name: "devices".to_owned(),
            stack_size: 256 << 10,
            on_start: None,
            after_turn: || None,
            on_failure: Box::new(|message| log::error!("device loop: {message}")),
        }
    }
}

impl std::fmt::Debug for EventLoopOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoopOptions")
            .field("name", &self.name)
            .field("stack_size", &self.stack_size)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Control {
    pause: bool,
    parked: bool,
    stop: bool,
    ended: bool,
    attach: Vec<(Subscriber, Sender<()>)>,
}

#[derive(Default)]
struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Control>) -> MutexGuard<'a, Control> {
        self.changed
            .wait(guard)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that runs devices. Dropping it stops the thread.
pub struct EventLoop {
    shared: Arc<Shared>,
    endpoint: RemoteEndpoint<Subscriber>,
    thread: Mutex<Option<JoinHandle<()>>>,
    thread_id: ThreadId,
    tid: i32,
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop")
            .field("tid", &self.tid)
            .finish_non_exhaustive()
    }
}

impl EventLoop {
    /// Starts a loop with defaults; failures are logged.
    ///
    /// # Errors
    /// When the process is out of threads or file descriptors.
    pub fn spawn(name: &str) -> io::Result<Self> {
        Self::spawn_with(EventLoopOptions {
            name: name.to_owned(),
            ..EventLoopOptions::default()
        })
    }

    /// Starts a loop.
    ///
    /// # Errors
    /// When the process is out of threads or file descriptors, or `on_start` failed.
    pub fn spawn_with(options: EventLoopOptions) -> io::Result<Self> {
        let manager = EventManager::<Subscriber>::new_with_capacity(EVENTS_PER_TURN)
            .map_err(io::Error::other)?;
        let endpoint = manager.remote_endpoint();
        let shared = Arc::new(Shared::default());
        let (started, start) = channel();
        let thread = {
            let shared = Arc::clone(&shared);
            let (on_start, on_failure) = (options.on_start, options.on_failure);
            let after_turn = options.after_turn;
            thread::Builder::new()
                .name(options.name)
                .stack_size(options.stack_size)
                .spawn(move || {
                    // SAFETY: gettid has no arguments and cannot fail.
                    let tid = unsafe { libc::gettid() };
                    let ready = on_start.map_or(Ok(()), |f| f());
                    let go = ready.is_ok();
                    let _ = started.send(ready.map(|()| tid));
                    if go {
                        thread_main(manager, &shared, after_turn, &on_failure);
                    }
                })?
        };
        let thread_id = thread.thread().id();
        match start.recv() {
            Ok(Ok(tid)) => Ok(Self {
                shared,
                endpoint,
                thread: Mutex::new(Some(thread)),
                thread_id,
                tid,
            }),
            Ok(Err(e)) => {
                let _ = thread.join();
                Err(e)
            }
            Err(_) => Err(io::Error::other("the device loop's thread did not start")),
        }
    }

    /// The kernel's id of the thread.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Lets the loop run a device; returns when its events are watched. Also works while paused.
    ///
    /// # Errors
    /// When the loop has ended.
    pub fn attach<S: EventSubscriber + Send + Sync + 'static>(
        &self,
        subscriber: Arc<S>,
    ) -> io::Result<()> {
        let (done, wait) = channel();
        let gone = || io::Error::other("the device loop has ended");
        {
            let mut control = self.shared.lock();
            if control.ended || control.stop {
                return Err(gone());
            }
            control.attach.push((subscriber, done));
        }
        self.wake();
        wait.recv().map_err(|_| gone())
    }

    /// Returns when no handler runs; none will until [`Self::resume`]. Not to be called from a
    /// handler.
    pub fn pause(&self) {
        let mut control = self.shared.lock();
        control.pause = true;
        self.wake();
        while !control.parked && !control.ended {
            control = self.shared.wait(control);
        }
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&self) {
        self.shared.lock().pause = false;
        self.shared.changed.notify_all();
    }

    /// Ends the loop and waits for its thread. From a handler or `on_failure` it does not wait.
    pub fn stop(&self) {
        self.shared.lock().stop = true;
        self.wake();
        if thread::current().id() == self.thread_id {
            return;
        }
        let handle = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(handle) = handle {
            // The thread catches panics of devices; one in `on_failure` is the caller's own.
            let _ = handle.join();
        }
    }

    /// True when the loop has been stopped or has failed.
    pub fn has_ended(&self) -> bool {
        self.shared.lock().ended
    }

    fn wake(&self) {
        self.shared.changed.notify_all();
        // Fails only when the counter is full, and then the loop is about to wake up anyway.
        let _ = self.endpoint.kick();
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop();
    }
}

fn thread_main(
    mut manager: EventManager<Subscriber>,
    shared: &Shared,
    after_turn: fn() -> Option<String>,
    on_failure: &dyn Fn(String),
) {
    let result = catch_unwind(AssertUnwindSafe(|| run(&mut manager, shared, after_turn)));
    {
        let mut control = shared.lock();
        control.ended = true;
        // Whoever waits for an answer gets the end of the channel.
        control.attach.clear();
    }
    shared.changed.notify_all();
    let message = match result {
        Ok(Ok(None)) => return,
        Ok(Ok(Some(reason))) => reason,
        Ok(Err(e)) => format!("waiting for events failed: {e}"),
        Err(panic) => format!("a device panicked: {}", panic_message(panic.as_ref())),
    };
    on_failure(message);
}

/// Until it is stopped (`None`), or `after_turn` has something to say.
fn run(
    manager: &mut EventManager<Subscriber>,
    shared: &Shared,
    after_turn: fn() -> Option<String>,
) -> event_manager::Result<Option<String>> {
    loop {
        let mut control = shared.lock();
        loop {
            let attach = std::mem::take(&mut control.attach);
            if !attach.is_empty() {
                drop(control);
                for (subscriber, done) in attach {
                    manager.add_subscriber(subscriber);
                    let _ = done.send(());
                }
                if let Some(reason) = after_turn() {
                    return Ok(Some(reason));
                }
                control = shared.lock();
                continue;
            }
            if control.stop {
                return Ok(None);
            }
            if !control.pause {
                control.parked = false;
                break;
            }
            control.parked = true;
            shared.changed.notify_all();
            control = shared.wait(control);
        }
        drop(control);
        manager.run()?;
        if let Some(reason) = after_turn() {
            return Ok(Some(reason));
        }
    }
}

/// The text of a panic, if it has one.
fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use event_manager::{EventOps, EventSet, Events};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    struct Probe {
        event: EventFd,
        handled: AtomicU32,
        done: Mutex<Sender<u32>>,
        panic: bool,
    }

    impl EventSubscriber for Probe {
        fn process(&self, _: Events, _: &mut EventOps) {
            let _ = self.event.read();
            assert!(!self.panic, "probe panics");
            let n = self.handled.fetch_add(1, Ordering::SeqCst) + 1;
            let _ = self.done.lock().unwrap().send(n);
        }

        fn init(&self, ops: &mut EventOps) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }
    }

    fn probe(panic: bool) -> (Arc<Probe>, std::sync::mpsc::Receiver<u32>) {
        let (done, rx) = channel();
        let probe = Probe {
            event: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            handled: AtomicU32::new(0),
            done: Mutex::new(done),
            panic,
        };
        (Arc::new(probe), rx)
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn runs_pauses_resumes_and_stops() {
        let event_loop = EventLoop::spawn("test").unwrap();
        let (probe, rx) = probe(false);
        event_loop.attach(Arc::clone(&probe)).unwrap();
        probe.event.write(1).unwrap();
        assert_eq!(rx.recv_timeout(LONG), Ok(1));

        event_loop.pause();
        event_loop.pause();
        probe.event.write(1).unwrap();
        // The thread is parked: nothing can change the counter now.
        assert_eq!(probe.handled.load(Ordering::SeqCst), 1);
        // Attaching works while paused.
        let (other, other_rx) = self::probe(false);
        event_loop.attach(Arc::clone(&other)).unwrap();
        event_loop.resume();
        assert_eq!(rx.recv_timeout(LONG), Ok(2));
        other.event.write(1).unwrap();
        assert_eq!(other_rx.recv_timeout(LONG), Ok(1));

        event_loop.pause();
        event_loop.stop();
        event_loop.stop();
        assert!(event_loop.has_ended());
        assert!(event_loop.attach(probe).is_err());
        event_loop.pause();
    }

    #[test]
    fn a_panic_is_reported_and_contained() {
        let (failed, failures) = channel();
        let event_loop = EventLoop::spawn_with(EventLoopOptions {
            on_failure: Box::new(move |message| failed.send(message).unwrap()),
            ..EventLoopOptions::default()
        })
        .unwrap();
        let (probe, _rx) = probe(true);
        event_loop.attach(Arc::clone(&probe)).unwrap();
        probe.event.write(1).unwrap();
        let message = failures.recv_timeout(LONG).unwrap();
        assert!(message.contains("probe panics"), "{message}");
        // Nobody waits for ever on a loop that is gone.
        event_loop.pause();
        assert!(event_loop.attach(probe).is_err());
    }

    #[test]
    fn a_failing_start_hook_is_the_result() {
        let result = EventLoop::spawn_with(EventLoopOptions {
            on_start: Some(Box::new(|| Err(io::Error::other("no filter")))),
            ..EventLoopOptions::default()
        });
        assert_eq!(result.unwrap_err().to_string(), "no filter");
    }

    #[test]
    fn an_idle_loop_does_not_wake_up() {
        let event_loop = EventLoop::spawn("idle").unwrap();
        let (probe, rx) = probe(false);
        event_loop.attach(Arc::clone(&probe)).unwrap();
        probe.event.write(1).unwrap();
        assert_eq!(rx.recv_timeout(LONG), Ok(1));
        let path = format!("/proc/self/task/{}/status", event_loop.tid());
        let switches = || -> u64 {
            std::fs::read_to_string(&path)
                .unwrap()
                .lines()
                .filter_map(|l| l.strip_prefix("voluntary_ctxt_switches:"))
                .map(|v| v.trim().parse::<u64>().unwrap())
                .sum()
        };
        // It may still be on its way back into epoll_wait: wait until it sleeps.
        let asleep = || {
            std::fs::read_to_string(&path)
                .unwrap()
                .contains("State:\tS")
        };
        while !asleep() {
            thread::yield_now();
        }
        let before = switches();
        // The length of the observation, not a wait for something to happen.
        assert!(rx.recv_timeout(Duration::from_millis(300)).is_err());
        assert_eq!(switches(), before);
    }
}
