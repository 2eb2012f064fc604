//! Advances the engines' epoch while some program executes, and sleeps otherwise.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use crate::config::TICK_MS;

#[derive(Default)]
struct Shared {
    /// Programs that execute right now; those that wait for something do not count.
    executing: AtomicUsize,
    parked: AtomicBool,
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    /// Whose clock this is.
    engines: Mutex<Vec<wasmtime::Engine>>,
    /// Ticks so far, for tests.
    ticks: AtomicUsize,
}

impl Shared {
    fn engines(&self) -> std::sync::MutexGuard<'_, Vec<wasmtime::Engine>> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tick(&self) {
        for engine in self.engines().iter() {
            engine.increment_epoch();
        }
    }

    fn run(&self) {
        while !self.stop.load(Ordering::SeqCst) {
            if self.executing.load(Ordering::SeqCst) > 0 {
                std::thread::sleep(Duration::from_millis(TICK_MS));
                self.tick();
                self.ticks.fetch_add(1, Ordering::Relaxed);
            } else {
                self.park();
            }
        }
    }

    /// Sleeps until something executes.
    fn park(&self) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Announce first, then look: whoever enters either sees us parked or is seen here.
        self.parked.store(true, Ordering::SeqCst);
        while self.executing.load(Ordering::SeqCst) == 0 && !self.stop.load(Ordering::SeqCst) {
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.parked.store(false, Ordering::SeqCst);
    }

    fn enter(&self) {
        self.executing.fetch_add(1, Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) {
            self.kick();
        }
    }

    fn leave(&self) {
        self.executing.fetch_sub(1, Ordering::SeqCst);
    }

    fn kick(&self) {
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.wake.notify_all();
    }
}

/// The engines' clock. Its thread ends when this is dropped.
pub(crate) struct Ticker(Arc<Shared>);

impl Ticker {
    pub(crate) fn start(engine: wasmtime::Engine) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.engines().push(engine);
        let own = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("wasm-ticker".into())
            .stack_size(128 << 10)
            .spawn(move || own.run())?;
        Ok(Self(shared))
    }

    /// The clock of another engine, too.
    pub(crate) fn add(&self, engine: &wasmtime::Engine) {
        let mut engines = self.0.engines();
        if !engines.iter().any(|e| wasmtime::Engine::same(e, engine)) {
            engines.push(engine.clone());
        }
    }

    /// Advances it now.
    pub(crate) fn tick(&self) {
        self.0.tick();
    }

    /// Runs `future`, counted as executing only while it is polled.
    pub(crate) fn count<F: Future>(&self, future: F) -> Counted<F> {
        Counted {
            shared: Arc::clone(&self.0),
            future: Box::pin(future),
        }
    }

    #[cfg(test)]
    pub(crate) fn ticks(&self) -> usize {
        self.0.ticks.load(Ordering::Relaxed)
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.0.kick();
    }
}

/// See [`Ticker::count`].
pub(crate) struct Counted<F> {
    shared: Arc<Shared>,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for Counted<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        /// Leaves even if a host function panics.
        struct Leave<'a>(&'a Shared);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.leave();
            }
        }
        let this = &mut *self;
        this.shared.enter();
        let _leave = Leave(&this.shared);
        this.future.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_while_something_executes_and_not_otherwise() {
        let engine = wasmtime::Engine::default();
        let ticker = Ticker::start(engine).expect("thread");
        std::thread::sleep(Duration::from_millis(5 * TICK_MS));
        assert_eq!(ticker.ticks(), 0, "nothing executes");
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut busy = ticker.count(async {
            let begin = std::time::Instant::now();
            while ticker.ticks() < 3 {
                assert!(begin.elapsed() < Duration::from_secs(60), "does not tick");
                std::thread::yield_now();
            }
            std::future::pending::<()>().await;
        });
        // Polled once it executes; then it waits, and waiting costs nothing.
        assert!(Pin::new(&mut busy).poll(&mut cx).is_pending());
        std::thread::sleep(Duration::from_millis(5 * TICK_MS));
        let after = ticker.ticks();
        std::thread::sleep(Duration::from_millis(5 * TICK_MS));
        assert_eq!(ticker.ticks(), after, "it only waits");
    }
}
