//! How many CPUs and how much memory a pod's VM has as the limits of its containers change, and
//! which share of the host's CPUs.
//!
//! A VM boots with what the pod's limits ask for, knows of more CPUs, and is given those when
//! the limits grow. What the pod said at its start stays the measure: only the difference counts that
//! each container's limit has made since, so that it does not matter which containers there are yet.

use std::collections::HashMap;

use serde_json::Value;

use crate::daemon::cgroup::CpuShare;

/// Memory is added in pieces of this size: what a guest's driver can take of it.
const PIECE: u64 = 8 << 20;

/// Why a VM does not grow so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "its memory limits have grown by {} MiB, this pod's VM can grow by {} MiB: make the pod anew, and \
     raise microvm.grow_memory_mib (VMs of bulkhead-app never grow)",
    wanted >> 20,
    room >> 20
)]
pub struct TooMuch {
    wanted: u64,
    room: u64,
}

/// Memory of a VM beyond what it was booted with.
#[derive(Debug)]
pub struct Memory {
    /// That it can be given.
    room: u64,
    /// Limits of containers in bytes: as made, and now.
    limits: HashMap<String, (u64, u64)>,
    /// That it was asked to take.
    pub requested: u64,
}

/// The memory limit that OCI resources name, in bytes; `None`: they name none.
fn memory_limit(resources: &Value) -> Option<u64> {
    let limit = resources["memory"]["limit"].as_i64().filter(|l| *l > 0)?;
    u64::try_from(limit).ok()
}

impl Memory {
    /// Of a VM with room for `room` bytes.
    pub fn new(room: u64) -> Self {
        Self {
            room,
            limits: HashMap::new(),
            requested: 0,
        }
    }

    /// A container is made.
    pub fn add(&mut self, container: &str, resources: &Value) {
        if let Some(limit) = memory_limit(resources) {
            self.limits.insert(container.to_owned(), (limit, limit));
        }
    }

    /// A container has gone.
    pub fn remove(&mut self, container: &str) {
        self.limits.remove(container);
    }

    /// The limits of a container change. Gives the bytes that the VM should have beyond those of
    /// its boot. `None`: that makes no difference.
    ///
    /// # Errors
    /// It cannot have so many; then nothing has changed.
    pub fn update(&mut self, container: &str, resources: &Value) -> Result<Option<u64>, TooMuch> {
        let (Some(limit), Some((_, now))) =
            (memory_limit(resources), self.limits.get_mut(container))
        else {
            return Ok(None);
        };
        let before = std::mem::replace(now, limit);
        let wanted = self.wanted();
        if wanted > self.room {
            self.set_back(container, Some(before));
            return Err(TooMuch {
                wanted,
                room: self.room,
            });
        }
        Ok((wanted != self.requested).then_some(wanted))
    }

    /// The limit of a container, as it is known.
    pub fn now(&self, container: &str) -> Option<u64> {
        self.limits.get(container).map(|(_, now)| *now)
    }

    /// What was to change has not.
    pub fn set_back(&mut self, container: &str, limit: Option<u64>) {
        if let (Some((_, now)), Some(limit)) = (self.limits.get_mut(container), limit) {
            *now = limit;
        }
    }

    fn wanted(&self) -> u64 {
        let grown: i128 = self
            .limits
            .values()
            .map(|(made, now)| i128::from(*now) - i128::from(*made))
            .sum();
        let grown = u64::try_from(grown.max(0)).unwrap_or(u64::MAX / 2);
        // The guest's kernel keeps a page in 64 for what describes them.
        let with_tables = grown.saturating_add(grown / 64).min(u64::MAX / 2);
        with_tables.next_multiple_of(PIECE)
    }
}

/// CPUs of a VM.
#[derive(Debug)]
pub struct Cpus {
    /// That it was booted with.
    boot: u8,
    /// That it can have.
    most: u8,
    /// What the pod asked for at its start, in thousandths of a CPU; `None`: no limit.
    asked: Option<i64>,
    /// The share that came of it.
    share: CpuShare,
    /// Limits of containers, in thousandths: as made, and now.
    limits: HashMap<String, (i64, i64)>,
    /// Online in the guest.
    pub online: u8,
}

/// What a change comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// CPUs to have online.
    pub online: u8,
    /// CPUs that the limits ask for: it may be more.
    pub wanted: u64,
    /// The share of the host's.
    pub share: CpuShare,
}

/// The CPU limit that OCI resources name, in thousandths of a CPU; `None`: they name none.
pub fn limit(resources: &Value) -> Option<i64> {
    let cpu = &resources["cpu"];
    let quota = cpu["quota"].as_i64().filter(|q| *q > 0)?;
    let period = cpu["period"].as_i64().filter(|p| *p > 0).unwrap_or(100_000);
    Some(quota.saturating_mul(1000) / period)
}

impl Cpus {
    /// Of a VM that has `boot` of `most`; `share` is the pod's.
    pub fn new(boot: u8, most: u8, share: CpuShare) -> Self {
        let asked = share.max.map(|(quota, period)| {
            i64::try_from(quota.saturating_mul(1000) / period.max(1)).unwrap_or(i64::MAX)
        });
        Self {
            boot,
            most: most.max(boot),
            asked,
            share,
            limits: HashMap::new(),
            online: boot,
        }
    }

    /// A container is made.
    pub fn add(&mut self, container: &str, resources: &Value) {
        if let Some(limit) = limit(resources) {
            self.limits.insert(container.to_owned(), (limit, limit));
        }
    }

    /// A container has gone; what it was given in the meantime goes, too.
    pub fn remove(&mut self, container: &str) -> Option<Change> {
        let (made, now) = self.limits.remove(container)?;
        (made != now).then(|| self.change())
    }

    /// The limits of a container change. `None`: that makes no difference.
    pub fn update(&mut self, container: &str, resources: &Value) -> Option<Change> {
        let limit = limit(resources)?;
        let (_, now) = self.limits.get_mut(container)?;
        if *now == limit {
            return None;
        }
        *now = limit;
        Some(self.change())
    }

    /// The limit of a container, as it is known, in thousandths of a CPU.
    pub fn now(&self, container: &str) -> Option<i64> {
        self.limits.get(container).map(|(_, now)| *now)
    }

    /// What was to change has not.
    pub fn set_back(&mut self, container: &str, limit: Option<i64>) {
        if let (Some((_, now)), Some(limit)) = (self.limits.get_mut(container), limit) {
            *now = limit;
        }
    }

    fn change(&self) -> Change {
        let grown =
            |sum: i64, (made, now): &(i64, i64)| sum.saturating_add(now.saturating_sub(*made));
        let grown = self.limits.values().fold(0, grown);
        // A pod without a limit has all of its CPUs.
        let Some(asked) = self.asked else {
            return Change {
                online: self.boot,
                wanted: self.boot.into(),
                share: self.share,
            };
        };
        let milli = asked.saturating_add(grown).max(1);
        let milli = u64::try_from(milli).unwrap_or(1);
        let wanted = milli.div_ceil(1000);
        let online = u8::try_from(wanted).unwrap_or(u8::MAX);
        let share = CpuShare {
            max: self.share.max.map(|(_, period)| {
                let quota = (milli.saturating_mul(period) / 1000).clamp(1000, 10_000 * period);
                (quota, period)
            }),
            ..self.share
        };
        Change {
            // Never fewer than at the boot: limits are kept by cgroups, not by taking CPUs away.
            online: online.clamp(self.boot, self.most),
            wanted,
            share,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cpu(milli: i64) -> Value {
        json!({"cpu": {"quota": milli * 100, "period": 100_000}})
    }

    fn share(milli: u64) -> CpuShare {
        CpuShare {
            max: Some((milli * 100, 100_000)),
            weight: 50,
        }
    }

    #[test]
    fn a_pod_grows_and_shrinks_with_its_containers() {
        let mut cpus = Cpus::new(1, 4, share(750));
        cpus.add("a", &cpu(500));
        cpus.add("b", &cpu(250));
        cpus.add("unlimited", &json!({}));
        assert_eq!(cpus.update("a", &cpu(500)), None);
        assert_eq!(cpus.update("unlimited", &cpu(500)), None);
        assert_eq!(cpus.update("a", &json!({"memory": {"limit": 5}})), None);
        let change = |online, wanted, milli| {
            Some(Change {
                online,
                wanted,
                share: share(milli),
            })
        };
        assert_eq!(cpus.update("a", &cpu(1500)), change(2, 2, 1750));
        assert_eq!(cpus.update("b", &cpu(5000)), change(4, 7, 6500));
        let before = cpus.now("a");
        assert_eq!(cpus.update("a", &cpu(1)), change(4, 6, 5001));
        cpus.set_back("a", before);
        assert_eq!(cpus.remove("b"), change(2, 2, 1750));
        assert_eq!(cpus.update("a", &cpu(100)), change(1, 1, 350));
        assert_eq!(cpus.remove("b"), None);
        assert_eq!(cpus.remove("unlimited"), None);
    }

    #[test]
    fn memory_grows_by_what_limits_grow() {
        let limit = |mib: u64| json!({"memory": {"limit": mib << 20}});
        let mut memory = Memory::new(512 << 20);
        memory.add("a", &limit(100));
        memory.add("b", &limit(50));
        memory.add("unlimited", &json!({}));
        assert_eq!(memory.update("a", &limit(100)), Ok(None));
        assert_eq!(memory.update("a", &json!({"cpu": {}})), Ok(None));
        assert_eq!(memory.update("unlimited", &limit(100)), Ok(None));
        // 100 MiB and a 64th of that, in pieces of eight.
        assert_eq!(memory.update("a", &limit(200)), Ok(Some(104 << 20)));
        memory.requested = 104 << 20;
        assert_eq!(memory.update("b", &limit(40)), Ok(Some(96 << 20)));
        let too_much = memory.update("b", &limit(1000)).expect_err("too much");
        assert!(too_much.to_string().contains("512 MiB"), "{too_much}");
        assert_eq!(memory.now("b"), Some(40 << 20));
        assert_eq!(memory.update("a", &limit(10)), Ok(Some(0)));
        memory.remove("a");
        assert_eq!(memory.now("a"), None);
        assert!(memory.update("b", &limit(1 << 40)).is_err());
        assert!(Memory::new(0).update("b", &limit(5)).is_ok());
    }

    #[test]
    fn what_has_no_limit_stays() {
        let none = CpuShare {
            max: None,
            weight: 100,
        };
        let mut cpus = Cpus::new(2, 4, none);
        cpus.add("a", &cpu(500));
        let change = cpus.update("a", &cpu(4000)).expect("changed");
        assert_eq!((change.online, change.share), (2, none));
    }

    #[test]
    fn any_numbers_are_answered() {
        assert_eq!(limit(&json!({"cpu": {"quota": -1, "period": 1}})), None);
        assert_eq!(limit(&json!({"cpu": {"quota": 5000}})), Some(50));
        let odd = json!({"cpu": {"quota": i64::MAX, "period": 1}});
        assert_eq!(limit(&odd), Some(i64::MAX));
        let mut cpus = Cpus::new(1, 32, share(1));
        cpus.add("a", &cpu(1));
        cpus.add("b", &cpu(1));
        cpus.update("a", &odd);
        let change = cpus.update("b", &odd).expect("changed");
        assert_eq!(change.online, 32);
    }
}
