//! How a program wants to be scheduled. It is kept and given back; the scheduler gives all the same.

/// Policies.
pub mod policy {
    pub const OTHER: u32 = 0;
    pub const FIFO: u32 = 1;
    pub const ROUND_ROBIN: u32 = 2;
    pub const BATCH: u32 = 3;
    pub const IDLE: u32 = 5;
    /// Known, and always refused.
    pub const DEADLINE: u32 = 6;
}

/// What a program asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scheduling {
    pub policy: u32,
    /// Of real-time policies.
    pub priority: u32,
    pub nice: i32,
    /// Children get none of it.
    pub reset_on_fork: bool,
    /// Of its files: class and level, if it was ever set.
    pub io: Option<u32>,
}

impl Scheduling {
    /// What a child gets.
    pub fn inherited(&self) -> Self {
        if !self.reset_on_fork {
            return *self;
        }
        let real_time = matches!(self.policy, policy::FIFO | policy::ROUND_ROBIN);
        Self {
            policy: if real_time {
                policy::OTHER
            } else {
                self.policy
            },
            priority: 0,
            nice: if real_time { 0 } else { self.nice.max(0) },
            reset_on_fork: false,
            io: self.io,
        }
    }

    /// Smallest and largest priority of a policy, if it is one.
    pub fn priorities(of: u32) -> Option<(u32, u32)> {
        match of {
            policy::FIFO | policy::ROUND_ROBIN => Some((1, 99)),
            policy::OTHER | policy::BATCH | policy::IDLE | policy::DEADLINE => Some((0, 0)),
            _ => None,
        }
    }
}

/// What a program asked for by prctl and is given back.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Sent when the parent ends; 0 for none.
    pub death_signal: u32,
    pub no_new_privileges: bool,
    pub timer_slack_ns: u64,
    pub default_slack_ns: u64,
    /// As personality has it; of its flags only the one against random addresses has effect.
    pub persona: u32,
}

impl Default for Asked {
    fn default() -> Self {
        const USUAL_NS: u64 = 50_000;
        Self {
            death_signal: 0,
            no_new_privileges: false,
            timer_slack_ns: USUAL_NS,
            default_slack_ns: USUAL_NS,
            persona: 0,
        }
    }
}

impl Asked {
    /// What a child gets.
    pub fn inherited(&self) -> Self {
        Self {
            death_signal: 0,
            default_slack_ns: self.timer_slack_ns,
            ..*self
        }
    }
}
