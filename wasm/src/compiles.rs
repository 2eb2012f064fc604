//! Who compiles, and who waits: a program is compiled once however many ask for it at a time, and
//! only some at a time are, of the large ones a single one.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::cache::Sha;
use crate::config::{COMPILES, LARGE_PROGRAM_BYTES};

/// Compilations that are under way.
#[derive(Debug, Default)]
pub(crate) struct Compiles {
    /// And whether they are large.
    running: Mutex<HashMap<Sha, bool>>,
    less: Condvar,
}

/// Allows to compile, until it is dropped.
#[derive(Debug)]
pub(crate) struct Permit<'a> {
    compiles: &'a Compiles,
    digest: Sha,
}

impl Compiles {
    /// Waits until this program may be compiled. By then it may have been.
    pub(crate) fn enter(&self, digest: &Sha, size: u64) -> Permit<'_> {
        let large = size >= LARGE_PROGRAM_BYTES;
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut running = self
            .less
            .wait_while(running, |running| {
                running.contains_key(digest)
                    || running.len() >= COMPILES
                    || large && running.values().any(|large| *large)
            })
            .unwrap_or_else(PoisonError::into_inner);
        running.insert(*digest, large);
        Permit {
            compiles: self,
            digest: *digest,
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut running = self
            .compiles
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        running.remove(&self.digest);
        drop(running);
        self.compiles.less.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_of_a_kind_and_few_at_a_time() {
        let compiles = Compiles::default();
        let (now, most, large) = (
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        let same = [const { AtomicUsize::new(0) }; 5];
        std::thread::scope(|scope| {
            for n in 0..15usize {
                let (compiles, now, most, large, same) = (&compiles, &now, &most, &large, &same);
                scope.spawn(move || {
                    let kind = n % same.len();
                    let size = if kind < 2 { LARGE_PROGRAM_BYTES } else { 100 };
                    for _ in 0..100 {
                        let _permit = compiles.enter(&[kind as u8; 32], size);
                        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        assert_eq!(same[kind].fetch_add(1, Ordering::SeqCst), 0);
                        if kind < 2 {
                            assert_eq!(large.fetch_add(1, Ordering::SeqCst), 0);
                        }
                        std::thread::yield_now();
                        if kind < 2 {
                            large.fetch_sub(1, Ordering::SeqCst);
                        }
                        same[kind].fetch_sub(1, Ordering::SeqCst);
                        now.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!((1..=COMPILES).contains(&most.load(Ordering::SeqCst)));
    }
}
