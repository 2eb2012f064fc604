//! Cgroups on the host.
//!
//! The pod's own: kubelet makes it; a client of CRI that is no kubelet counts on the runtime to
//! make it, and containerd reads the pod's statistics there. Our threads cannot enter it, since
//! they are the daemon's: memory is counted for whole processes only.
//!
//! So the threads of a pod's VM are counted, and held to the pod's share of CPU, in a *threaded*
//! cgroup below the daemon's own.

use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::proto::LinuxResources;

const ROOT: &str = "/sys/fs/cgroup";

/// The directories of the cgroup `parent` of CRI's configuration that are not there, outermost first,
/// for [`make`] and [`remove`]. They are to be written down before they are made, so that nothing is
/// left of a daemon that ends in between.
pub fn missing(parent: &str) -> Vec<PathBuf> {
    let mut missing = Vec::new();
    let plain = parent.starts_with('/')
        && parent.len() < 1024
        && Path::new(parent)
            .components()
            .skip(1)
            .all(|c| matches!(c, std::path::Component::Normal(_)));
    if !plain || !Path::new(ROOT).join("cgroup.controllers").exists() {
        return missing;
    }
    let mut path = PathBuf::from(ROOT);
    for part in Path::new(parent).components().skip(1) {
        path.push(part);
        if !path.exists() {
            missing.push(path.clone());
        }
    }
    missing
}

/// Makes them.
pub fn make(missing: &[PathBuf]) {
    for path in missing {
        match std::fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                tracing::warn!(%error, cgroup = %path.display(), "cannot be made");
                return;
            }
            _ => {}
        }
    }
}

/// Removes cgroups that were made; those that others use by now stay.
pub fn remove(made: &[PathBuf]) {
    for path in made.iter().rev().filter(|p| p.starts_with(ROOT)) {
        match std::fs::remove_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return,
            _ => {}
        }
    }
}

/// A CPU share as cgroup v2 has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuShare {
    /// Microseconds of CPU time in each period, and the period; `None`: no limit.
    pub max: Option<(u64, u64)>,
    /// 1 to 10,000; 100 is the usual.
    pub weight: u64,
}

/// Shortest and longest period of the kernel, in microseconds.
const PERIOD: std::ops::RangeInclusive<u64> = 1_000..=1_000_000;
/// Period of a sum of limits, in microseconds.
const COMMON_PERIOD: u64 = 100_000;
/// What the kernel takes as a quota of such a period: a millisecond, and what no host has.
const LEAST: u64 = 1_000;
const MOST: u64 = 10_000 * COMMON_PERIOD;

impl CpuShare {
    /// The sum of what CRI says about a pod: its containers' and its overhead's.
    pub fn of(parts: &[LinuxResources]) -> Self {
        let mut quota = 0u64;
        let mut shares = 0u64;
        for part in parts {
            let period = u64::try_from(part.cpu_period).unwrap_or(0);
            if part.cpu_quota > 0 && PERIOD.contains(&period) {
                let wanted = u64::try_from(part.cpu_quota).unwrap_or(0);
                let part = u128::from(wanted) * u128::from(COMMON_PERIOD) / u128::from(period);
                quota = quota.saturating_add(u64::try_from(part).unwrap_or(u64::MAX));
            }
            shares = shares.saturating_add(u64::try_from(part.cpu_shares).unwrap_or(0));
        }
        // A pod without a limit of its own has none, whatever its overhead.
        let limited = parts.first().is_some_and(|p| {
            p.cpu_quota > 0 && u64::try_from(p.cpu_period).is_ok_and(|us| PERIOD.contains(&us))
        });
        let weight = match shares {
            0 => 100,
            // As runc converts them: 2 to 262,144 become 1 to 10,000.
            n => 1 + (n.clamp(2, 262_144) - 2) * 9_999 / 262_142,
        };
        Self {
            max: limited.then_some((quota.clamp(LEAST, MOST), COMMON_PERIOD)),
            weight,
        }
    }
}

impl CpuShare {
    /// Holds a cgroup to it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set(self, cgroup: &Path) -> io::Result<()> {
        let max = match self.max {
            Some((quota, period)) => format!("{quota} {period}"),
            None => "max".to_owned(),
        };
        std::fs::write(cgroup.join("cpu.max"), max)?;
        std::fs::write(cgroup.join("cpu.weight"), self.weight.to_string())
    }
}

/// CPU time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Used {
    /// In programs; guests are programs.
    pub user: Duration,
    /// In the kernel.
    pub system: Duration,
}

/// How long threads have to end, once they were told.
const END_TIME: Duration = Duration::from_secs(5);

/// The threaded cgroup of one pod. Removed when dropped: that blocks until its threads have ended.
#[derive(Debug)]
pub struct Threads(PathBuf);

impl Threads {
    /// Makes it. `None` where cgroups are not of version 2, or not ours to make: a pod is of use
    /// without. Blocks.
    pub fn create(id: &str) -> Option<Self> {
        let own = own()?;
        let path = own.join(format!("bulkhead-{id}"));
        let made = match std::fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(()),
        };
        let threads = Self(path);
        let made = made
            .and_then(|()| threads.write("cgroup.type", "threaded"))
            // Allowed beside our own threads, as CPU is a threaded controller.
            .and_then(|()| std::fs::write(own.join("cgroup.subtree_control"), "+cpu"));
        match made {
            Ok(()) => Some(threads),
            Err(error) => {
                tracing::debug!(%error, cgroup = %threads.0.display(), "CPU is not accounted");
                None
            }
        }
    }

    fn write(&self, file: &str, text: &str) -> io::Result<()> {
        std::fs::write(self.0.join(file), text)
    }

    /// Puts the calling thread there; those it makes from now on are there too.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn enter(&self) -> io::Result<()> {
        self.entrance()()
    }

    /// The same as [`Self::enter`], for those who must not keep the cgroup.
    pub fn entrance(&self) -> impl Fn() -> io::Result<()> + Send + Sync + use<> {
        let list = self.0.join("cgroup.threads");
        // 0: the writer itself.
        move || std::fs::write(&list, "0")
    }

    /// Sets the share.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn limit(&self, share: CpuShare) -> io::Result<()> {
        share.set(&self.0)
    }

    /// What its threads have used.
    pub fn usage(&self) -> Option<Used> {
        let text = std::fs::read_to_string(self.0.join("cpu.stat")).ok()?;
        let field = |name: &str| -> Option<Duration> {
            let line = text.lines().find_map(|l| l.strip_prefix(name))?;
            Some(Duration::from_micros(line.trim().parse().ok()?))
        };
        Some(Used {
            user: field("user_usec ")?,
            system: field("system_usec ")?,
        })
    }
}

impl Threads {
    /// Waits until its threads have ended, which they were told; not for ever.
    fn wait_empty(&self) -> io::Result<()> {
        let mut events = std::fs::File::open(self.0.join("cgroup.events"))?;
        let end = Instant::now() + END_TIME;
        loop {
            let mut text = String::new();
            events.rewind()?;
            events.read_to_string(&mut text)?;
            let left = end.saturating_duration_since(Instant::now());
            if text.contains("populated 0") || left.is_zero() {
                return Ok(());
            }
            // The kernel tells of a change as of urgent data.
            let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            nix::poll::poll(&mut fds, left)?;
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let _ = self.wait_empty();
        if let Err(error) = std::fs::remove_dir(&self.0) {
            tracing::warn!(%error, cgroup = %self.0.display(), "cannot be removed");
        }
    }
}

/// Removes what an earlier process has left of a pod's threads.
pub fn clean_threads(id: &str) {
    if let Some(own) = own() {
        let _ = std::fs::remove_dir(own.join(format!("bulkhead-{id}")));
    }
}

/// The daemon's own cgroup.
fn own() -> Option<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|l| l.strip_prefix("0::/"))?;
    let own = Path::new(ROOT).join(path);
    own.join("cgroup.threads").exists().then_some(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        let part = |quota, period, shares| LinuxResources {
            cpu_quota: quota,
            cpu_period: period,
            cpu_shares: shares,
            memory_limit_in_bytes: 0,
        };
        let none = CpuShare {
            max: None,
            weight: 100,
        };
        assert_eq!(CpuShare::of(&[]), none);
        assert_eq!(
            CpuShare::of(&[part(-1, 0, 0), part(5_000, 100_000, 0)]),
            none
        );
        let both = CpuShare::of(&[part(50_000, 100_000, 512), part(100, 1_000, 512)]);
        assert_eq!(both.max, Some((60_000, 100_000)));
        assert_eq!(both.weight, 39);
        let least = CpuShare::of(&[part(1, 1_000_000, 2)]);
        assert_eq!((least.max, least.weight), (Some((1_000, 100_000)), 1));
        let most = CpuShare::of(&[part(i64::MAX, 1_000, i64::MAX)]);
        assert_eq!(most.weight, 10_000);
        assert_eq!(most.max, Some((MOST, COMMON_PERIOD)));
        assert_eq!(CpuShare::of(&[part(5, 0, 0)]).max, None);
    }
}
