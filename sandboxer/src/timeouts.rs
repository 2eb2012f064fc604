//! Every time-out of the host side, in one place.
//!
//! The values are generous on hardware; under software emulation everything is 20 to 50 times
//! slower, so they are scaled by what the CPU says it is. `BULKHEAD_TIMEOUT_FACTOR` overrides.

use std::sync::OnceLock;
use std::time::Duration;

/// From the first instruction until the agent answers.
pub fn boot() -> Duration {
    scaled(Duration::from_secs(10))
}

/// One call to the agent that does not wait for the program.
pub fn call() -> Duration {
    scaled(Duration::from_secs(10))
}

/// Until the guest has taken a signal for a process: more means that it hangs.
pub fn signal() -> Duration {
    scaled(Duration::from_secs(3))
}

/// One attempt to connect to a port of the guest.
pub fn connect() -> Duration {
    scaled(Duration::from_secs(2))
}

/// Figures of one pod, for a request that asks all of them.
pub fn figures() -> Duration {
    scaled(Duration::from_secs(1))
}

/// From asking the guest to shut down until it has.
pub fn shutdown() -> Duration {
    scaled(Duration::from_secs(2))
}

/// One request over a debug socket that is answered at once.
pub fn debug() -> Duration {
    scaled(Duration::from_secs(5))
}

/// Output that the guest still passes on after its program has ended.
pub fn drain() -> Duration {
    scaled(Duration::from_secs(5))
}

/// How much slower than hardware this machine is taken to be.
pub fn factor() -> u32 {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    *FACTOR.get_or_init(|| {
        std::env::var("BULKHEAD_TIMEOUT_FACTOR")
            .ok()
            .and_then(|v| v.parse().ok())
            .filter(|f| (1..=1000).contains(f))
            .unwrap_or_else(detect)
    })
}

fn scaled(base: Duration) -> Duration {
    base.saturating_mul(factor())
}

/// CPUID: the hypervisor bit, and the name the hypervisor gives itself.
fn detect() -> u32 {
    use std::arch::x86_64::__cpuid;
    // CPUID exists on every x86-64 CPU.
    let under_hypervisor = __cpuid(1).ecx & (1 << 31) != 0;
    if !under_hypervisor {
        return 1;
    }
    let leaf = __cpuid(0x4000_0000);
    let mut name = Vec::with_capacity(12);
    for register in [leaf.ebx, leaf.ecx, leaf.edx] {
        name.extend_from_slice(&register.to_le_bytes());
    }
    // QEMU's software CPU; nested hardware virtualisation is only a few times slower.
    if name == b"TCGTCGTCGTCG" { 30 } else { 5 }
}
