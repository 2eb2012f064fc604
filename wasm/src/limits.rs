//! What a pod and a container may take, and what they have.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use wasmtime::ResourceLimiter;

use crate::config::TABLE_ELEMENT_BYTES;

/// Bytes that may be in use at a time, shared by all that draw from it.
#[derive(Debug)]
pub struct Budget {
    limit: AtomicU64,
    used: AtomicU64,
    peak: AtomicU64,
    /// How often something was refused.
    refused: AtomicU64,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self {
            limit: AtomicU64::new(limit),
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Takes `bytes`, or nothing.
    fn take(&self, bytes: u64) -> bool {
        let limit = self.limit();
        let taken = self
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                used.checked_add(bytes).filter(|sum| *sum <= limit)
            });
        match taken {
            Ok(before) => {
                self.peak
                    .fetch_max(before.saturating_add(bytes), Ordering::Relaxed);
                true
            }
            Err(_) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    fn give_back(&self, bytes: u64) {
        let _ = self
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                Some(used.saturating_sub(bytes))
            });
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// Most bytes that were in use.
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// How often something was refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Acquire)
    }

    /// Another limit, from now on. What is in use beyond it stays in use.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Release);
    }
}

/// Counters of one container, shared with whoever asks for its statistics.
#[derive(Debug)]
pub(crate) struct Usage {
    pub(crate) container: Budget,
    pub(crate) pod: Arc<Budget>,
    pub(crate) instances: AtomicUsize,
    /// Something was refused for lack of memory.
    pub(crate) out_of_memory: AtomicBool,
}

impl Usage {
    pub(crate) fn new(container: u64, pod: Arc<Budget>) -> Self {
        Self {
            container: Budget::new(container),
            pod,
            instances: AtomicUsize::new(0),
            out_of_memory: AtomicBool::new(false),
        }
    }

    /// Another limit of the container, in bytes. The pod's, which is the sum of its containers', is
    /// moved by as much.
    pub(crate) fn set_limit(&self, limit: u64) {
        let before = self.container.limit();
        let pod = self.pod.limit();
        if before != u64::MAX && pod != u64::MAX && limit != u64::MAX {
            let others = pod.saturating_sub(before);
            self.pod.set_limit(others.saturating_add(limit));
        }
        self.container.set_limit(limit);
    }

    fn take(&self, bytes: u64) -> bool {
        if self.container.take(bytes) {
            if self.pod.take(bytes) {
                return true;
            }
            self.container.give_back(bytes);
        }
        self.out_of_memory.store(true, Ordering::Release);
        false
    }

    fn give_back(&self, bytes: u64) {
        self.container.give_back(bytes);
        self.pod.give_back(bytes);
    }
}

/// The limits of one store; what it took is given back when it goes.
#[derive(Debug)]
pub(crate) struct StoreLimits {
    usage: Arc<Usage>,
    held: u64,
    /// Of a growth that may still fail.
    pending: u64,
}

impl StoreLimits {
    pub(crate) fn new(usage: Arc<Usage>) -> Self {
        usage.instances.fetch_add(1, Ordering::Relaxed);
        Self {
            usage,
            held: 0,
            pending: 0,
        }
    }

    fn grow(&mut self, bytes: u64) -> bool {
        self.pending = 0;
        if !self.usage.take(bytes) {
            return false;
        }
        self.held = self.held.saturating_add(bytes);
        self.pending = bytes;
        true
    }

    fn undo(&mut self) {
        self.usage.give_back(self.pending);
        self.held = self.held.saturating_sub(self.pending);
        self.pending = 0;
    }
}

impl Drop for StoreLimits {
    fn drop(&mut self) {
        self.usage.give_back(self.held);
        self.usage.instances.fetch_sub(1, Ordering::Relaxed);
    }
}

fn difference(current: usize, desired: usize) -> u64 {
    u64::try_from(desired.saturating_sub(current)).unwrap_or(u64::MAX)
}

impl ResourceLimiter for StoreLimits {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // Beyond what the program itself declares as its maximum is no lack of memory.
        if maximum.is_some_and(|max| desired > max) {
            return Ok(false);
        }
        Ok(self.grow(difference(current, desired)))
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.undo();
        Ok(())
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|max| desired > max) {
            return Ok(false);
        }
        let bytes = difference(current, desired).saturating_mul(TABLE_ELEMENT_BYTES);
        Ok(self.grow(bytes))
    }

    fn table_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.undo();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_never_exceeded_and_comes_back() {
        let pod = Arc::new(Budget::new(100));
        let usage = Arc::new(Usage::new(1000, Arc::clone(&pod)));
        let mut one = StoreLimits::new(Arc::clone(&usage));
        let mut two = StoreLimits::new(Arc::clone(&usage));
        assert!(one.memory_growing(0, 60, None).expect("no error"));
        assert!(!two.memory_growing(0, 60, None).expect("no error"));
        assert!(two.memory_growing(0, 40, None).expect("no error"));
        assert_eq!((pod.used(), usage.container.used()), (100, 100));
        drop(one);
        assert_eq!((pod.used(), pod.peak(), pod.refused()), (40, 100, 1));
        assert!(usage.out_of_memory.load(Ordering::Acquire));
        assert!(two.memory_growing(40, 100, None).expect("no error"));
        two.memory_grow_failed(wasmtime::Error::msg("no pages"))
            .expect("no error");
        assert_eq!(pod.used(), 40);
        drop(two);
        assert_eq!(
            (pod.used(), usage.instances.load(Ordering::Relaxed)),
            (0, 0)
        );
    }

    #[test]
    fn limits_can_be_moved() {
        let pod = Arc::new(Budget::new(150));
        let usage = Arc::new(Usage::new(100, Arc::clone(&pod)));
        let mut store = StoreLimits::new(Arc::clone(&usage));
        assert!(store.memory_growing(0, 80, None).expect("no error"));
        assert!(!store.memory_growing(80, 160, None).expect("no error"));
        usage.set_limit(200);
        assert_eq!(pod.limit(), 250);
        assert!(store.memory_growing(80, 160, None).expect("no error"));
        // Less than there is: no more.
        usage.set_limit(50);
        assert_eq!(pod.limit(), 100);
        assert!(!store.memory_growing(160, 161, None).expect("no error"));
        assert_eq!(usage.container.used(), 160);
    }

    #[test]
    fn absurd_sizes_do_not_wrap() {
        let usage = Arc::new(Usage::new(u64::MAX, Arc::new(Budget::new(u64::MAX))));
        let mut store = StoreLimits::new(usage);
        assert!(store.memory_growing(0, 10, None).expect("no error"));
        assert!(!store.table_growing(0, usize::MAX, None).expect("no error"));
        assert!(!store.memory_growing(0, 11, Some(10)).expect("no error"));
    }
}
