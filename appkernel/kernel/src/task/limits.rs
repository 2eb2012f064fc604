//! Limits of a process (setrlimit).

use appkernel_core::errno::Errno;
use serde_json::Value;

use crate::fs::file::MAX_FILES;
use crate::mm::STACK_BYTES;

/// Resources, as setrlimit has them, by number.
const NAMES: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];
/// Largest file.
pub const FILE_SIZE: usize = 1;
/// Of a stack; shown, the kernel's own is what counts.
const STACK: usize = 3;
const CORE: usize = 4;
/// Processes of a user.
pub const PROCESSES: usize = 6;
/// How important a process may make itself: 20 less its nice value.
pub const NICE: usize = 13;
/// Its real-time priority.
pub const REAL_TIME_PRIORITY: usize = 14;
/// Bytes of memory that stay.
pub const LOCKED: usize = 8;
/// Numbers of open files.
pub const FILES: usize = 7;

/// The limits: soft and hard of each resource.
#[derive(Clone, Copy, Debug)]
pub struct Limits([[u64; 2]; NAMES.len()]);

impl Default for Limits {
    fn default() -> Self {
        let mut all = [[u64::MAX; 2]; NAMES.len()];
        all[STACK] = [STACK_BYTES, u64::MAX];
        all[CORE] = [0, u64::MAX];
        all[NICE] = [0; 2];
        all[REAL_TIME_PRIORITY] = [0; 2];
        all[FILES] = [MAX_FILES as u64; 2];
        Self(all)
    }
}

impl Limits {
    /// Soft and hard limit of a resource.
    ///
    /// # Errors
    /// `EINVAL`: there is no such resource.
    pub fn get(&self, resource: usize) -> Result<[u64; 2], Errno> {
        self.0.get(resource).copied().ok_or(Errno::EINVAL)
    }

    /// What counts of a resource that there is.
    pub fn soft(&self, resource: usize) -> u64 {
        self.get(resource).map_or(u64::MAX, |limit| limit[0])
    }

    /// Sets a limit.
    ///
    /// # Errors
    /// `EINVAL`: no such resource, or soft above hard; `EPERM`: raised without the right to, or more
    /// files than there can be.
    pub fn set(&mut self, resource: usize, new: [u64; 2], privileged: bool) -> Result<(), Errno> {
        let old = self.get(resource)?;
        if new[0] > new[1] {
            return Err(Errno::EINVAL);
        }
        let too_many = resource == FILES && new[1] > MAX_FILES as u64;
        if new[1] > old[1] && (!privileged || too_many) {
            return Err(Errno::EPERM);
        }
        if let Some(slot) = self.0.get_mut(resource) {
            *slot = new;
        }
        Ok(())
    }

    /// Those of an OCI process; what it does not name, or names wrongly, stays.
    pub fn of_spec(process: &Value) -> Self {
        let mut limits = Self::default();
        let wanted = process["rlimits"].as_array().map(alloc::vec::Vec::as_slice);
        for one in wanted.unwrap_or_default() {
            let name = one["type"].as_str().unwrap_or_default();
            let name = name.strip_prefix("RLIMIT_").unwrap_or(name);
            let Some(resource) = NAMES.iter().position(|n| *n == name) else {
                continue;
            };
            let most = if resource == FILES {
                MAX_FILES as u64
            } else {
                u64::MAX
            };
            let side = |which: &str| one[which].as_u64().map(|n| n.min(most));
            if let (Some(soft), Some(hard)) = (side("soft"), side("hard")) {
                let _ = limits.set(resource, [soft, hard], true);
            }
        }
        limits
    }
}
