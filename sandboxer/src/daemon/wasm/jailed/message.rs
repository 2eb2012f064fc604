//! What a keeper and the jailed process of its pod's programs say to each other, on a
//! [`crate::daemon::worker::channel::Channel`].
//!
//! The process is not trusted: it may have been broken into. What it says is believed of its own
//! programs only: that they have started, what they use, how they have ended.

use std::time::Duration;

use bulkhead_wasm::Stats;
use serde::{Deserialize, Serialize};

use crate::daemon::wasm::place::Ended;

/// The pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    /// Its id.
    pub id: String,
    /// Its programs may use the network that the process is in.
    pub network: bool,
    /// Its `resolv.conf`.
    pub resolv: String,
    /// Memory of all its programs together, in bytes.
    pub memory_bytes: Option<u64>,
    /// What code is made with, unless it is too large for that.
    pub inlining: bool,
}

/// From the keeper.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Order {
    /// Once, and first.
    Pod(Settings),
    /// Prepare a program. Descriptors: a file with its [`crate::daemon::wasm::place::ProgramWish`]
    /// as JSON (arguments and variables may be longer than a message), its code, and those of its
    /// standard streams that there are.
    Create {
        /// For the answer.
        ask: u64,
        /// What it is called from now on.
        program: u64,
        /// Its name in messages.
        name: String,
        /// Its code was made with functions inlined.
        inlined: bool,
        /// Which standard streams come along.
        streams: [bool; 3],
    },
    /// Start it.
    Start {
        /// For the answer.
        ask: u64,
        /// Which.
        program: u64,
    },
    /// Send it a signal.
    Signal {
        /// Which.
        program: u64,
        /// The signal.
        signal: i32,
    },
    /// Change its limit.
    MemoryLimit {
        /// Which.
        program: u64,
        /// In bytes; `None`: there is none.
        bytes: Option<u64>,
    },
    /// Change its share.
    CpuShare {
        /// Which.
        program: u64,
        /// In thousandths; `None`: there is none.
        milli: Option<u32>,
    },
    /// Tell what it uses.
    Stats {
        /// For the answer.
        ask: u64,
        /// Which.
        program: u64,
    },
    /// Forget it.
    Remove {
        /// Which.
        program: u64,
    },
}

/// Why something was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// It is the caller's fault.
    pub invalid: bool,
    /// For people.
    pub text: String,
}

/// What a program uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    cpu_us: u64,
    memory_bytes: u64,
    memory_peak_bytes: u64,
    memory_limit_bytes: u64,
    memory_refused: u64,
    instances: u64,
}

impl From<Stats> for Usage {
    fn from(stats: Stats) -> Self {
        Self {
            cpu_us: u64::try_from(stats.cpu.as_micros()).unwrap_or(u64::MAX),
            memory_bytes: stats.memory_bytes,
            memory_peak_bytes: stats.memory_peak_bytes,
            memory_limit_bytes: stats.memory_limit_bytes,
            memory_refused: stats.memory_refused,
            instances: stats.instances as u64,
        }
    }
}

impl From<Usage> for Stats {
    fn from(usage: Usage) -> Self {
        Self {
            cpu: Duration::from_micros(usage.cpu_us),
            memory_bytes: usage.memory_bytes,
            memory_peak_bytes: usage.memory_peak_bytes,
            memory_limit_bytes: usage.memory_limit_bytes,
            memory_refused: usage.memory_refused,
            instances: usize::try_from(usage.instances).unwrap_or(usize::MAX),
        }
    }
}

/// From the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// It takes programs.
    Ready,
    /// It cannot go on.
    Failed {
        /// Why.
        reason: String,
    },
    /// An answer.
    Done {
        /// To what.
        ask: u64,
        /// `None`: it is done.
        refused: Option<Refusal>,
    },
    /// An answer.
    Uses {
        /// To what.
        ask: u64,
        /// `None`: there is no such program.
        usage: Option<Usage>,
    },
    /// A program has ended.
    Ended {
        /// Which.
        program: u64,
        /// How.
        ended: Ended,
    },
}
