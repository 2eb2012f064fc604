//! When what was reached, for the host's time line.

use std::sync::{Mutex, PoisonError};

use bulkhead_protocol::sandbox::BootStage;

/// Stages that are kept.
const MAX: usize = 32;

static STAGES: Mutex<Vec<BootStage>> = Mutex::new(Vec::new());

/// The monotonic clock in ns; in a guest it starts with the kernel.
pub fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(0, |t| {
        u64::try_from(t.tv_sec()).unwrap_or(0) * 1_000_000_000
            + u64::try_from(t.tv_nsec()).unwrap_or(0)
    })
}

/// Notes that `name` is reached; the first time counts.
pub fn reached(name: &str) {
    let mut stages = STAGES.lock().unwrap_or_else(PoisonError::into_inner);
    if stages.len() < MAX && stages.iter().all(|s| s.name != name) {
        stages.push(BootStage {
            name: name.to_owned(),
            monotonic_ns: monotonic_ns(),
        });
    }
}

/// The stages in order.
pub fn stages() -> Vec<BootStage> {
    STAGES
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}
