//! A container's cgroup (v2): limits, freezing, killing, use.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use serde_json::Value;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Context, Error, Result};

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The cgroup of all containers, below the root.
const PARENT: &str = "containers";
/// Time to freeze all processes of a container.
const FREEZE_TIME: Duration = Duration::from_secs(20);
/// Longest file of the kernel's that is read, in bytes.
const MAX_FILE: usize = 4 << 20;

/// Whether this guest has cgroup v2.
pub fn available() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// The controllers this guest has.
pub fn controllers() -> Vec<String> {
    fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"))
        .unwrap_or_default()
        .split_whitespace()
        .map(ToOwned::to_owned)
        .collect()
}

/// Makes the parent of all containers' cgroups and lets it and them use all controllers. Best
/// effort: one may be in use elsewhere. Here, because libcontainer stumbles when two containers
/// are the first at once.
pub fn set_up() {
    let parent = Path::new(ROOT).join(PARENT);
    let controllers = controllers();
    let enable = |cgroup: &Path| {
        for controller in &controllers {
            let _ = fs::write(
                cgroup.join("cgroup.subtree_control"),
                format!("+{controller}"),
            );
        }
    };
    enable(Path::new(ROOT));
    if let Err(error) = fs::create_dir_all(&parent) {
        crate::warning!("make {}: {error}", parent.display());
        return;
    }
    enable(&parent);
}

/// A container's cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of container `id`.
    pub fn of(id: &str) -> Self {
        Self {
            path: Path::new(ROOT).join(PARENT).join(id),
        }
    }

    /// As an OCI `cgroupsPath`.
    pub fn oci_path(id: &str) -> String {
        format!("/{PARENT}/{id}")
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path.join("cgroup.procs").exists()
    }

    fn read(&self, file: &str) -> io::Result<String> {
        let text = fs::read_to_string(self.path.join(file))?;
        if text.len() > MAX_FILE {
            return Err(io::Error::other("too long"));
        }
        Ok(text)
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.path.join(file), value)
            .context(|| format!("write {value:?} to {file} of the container's cgroup"))
    }

    /// Its processes.
    pub fn pids(&self) -> Result<Vec<u32>> {
        Ok(self
            .read("cgroup.procs")
            .context(|| "read the container's cgroup".to_owned())?
            .lines()
            .filter_map(|line| line.parse().ok())
            .collect())
    }

    /// Kills all its processes.
    pub fn kill(&self) {
        if self.exists() {
            let _ = fs::write(self.path.join("cgroup.kill"), "1");
        }
    }

    /// Removes it. Its processes must have been killed; those that are still on their way out
    /// keep it for a moment.
    pub async fn remove(&self) {
        for _ in 0..200 {
            // Subgroups a container has made, deepest first.
            remove_children(&self.path, 0);
            match fs::remove_dir(&self.path) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => self.emptied().await,
                _ => return,
            }
        }
    }

    /// Waits for a change of "populated", or a moment at most.
    async fn emptied(&self) {
        let Ok(watch) = Watch::new(&self.path.join("cgroup.events")) else {
            return;
        };
        if watch.text().contains("populated 1") {
            let _ = tokio::time::timeout(Duration::from_millis(50), watch.changed()).await;
        }
        // Not populated but busy: the kernel still takes the dead ones away.
        tokio::task::yield_now().await;
    }

    /// Freezes or thaws, and waits until it is done.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let watch = Watch::new(&self.path.join("cgroup.events"))
            .context(|| "watch the container's cgroup".to_owned())?;
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        let wanted = if frozen { "frozen 1" } else { "frozen 0" };
        let done = async {
            while !watch.text().contains(wanted) {
                watch.changed().await?;
            }
            io::Result::Ok(())
        };
        match tokio::time::timeout(FREEZE_TIME, done).await {
            Ok(result) => result.context(|| "watch the container's cgroup".to_owned()),
            Err(_) => {
                if frozen {
                    let _ = self.write("cgroup.freeze", "0");
                }
                Err(Error::State(format!(
                    "the container's processes did not freeze within {FREEZE_TIME:?}; one hangs \
                     in the kernel"
                )))
            }
        }
    }

    /// Processes killed for lack of memory so far.
    pub fn oom_kills(&self) -> u64 {
        self.read("memory.events")
            .map(|t| flat(&t, "oom_kill"))
            .unwrap_or(0)
    }

    /// Watches for [`Cgroup::oom_kills`] to change.
    pub fn watch_oom(&self) -> io::Result<Watch> {
        Watch::new(&self.path.join("memory.events"))
    }

    /// Sets the limits of an OCI `linux.resources`.
    pub fn update(&self, resources: &Value) -> Result<()> {
        for (file, value) in limits(resources)? {
            self.write(&file, &value)?;
        }
        Ok(())
    }

    /// What it has used, as containerd wants it.
    pub fn metrics(&self) -> Metrics {
        let read = |file: &str| self.read(file).unwrap_or_default();
        let number = |file: &str| parse_max(read(file).trim());
        let cpu = read("cpu.stat");
        let memory = read("memory.stat");
        let events = read("memory.events");
        Metrics {
            pids: Some(PidsStat {
                current: number("pids.current"),
                limit: number("pids.max"),
            }),
            cpu: Some(CPUStat {
                usage_usec: flat(&cpu, "usage_usec"),
                user_usec: flat(&cpu, "user_usec"),
                system_usec: flat(&cpu, "system_usec"),
                nr_periods: flat(&cpu, "nr_periods"),
                nr_throttled: flat(&cpu, "nr_throttled"),
                throttled_usec: flat(&cpu, "throttled_usec"),
                nr_bursts: flat(&cpu, "nr_bursts"),
                burst_usec: flat(&cpu, "burst_usec"),
                psi: pressure(&read("cpu.pressure")),
            }),
            memory: Some(memory_stat(
                &memory,
                number,
                pressure(&read("memory.pressure")),
            )),
            io: Some(IOStat {
                usage: io_entries(&read("io.stat")),
                psi: pressure(&read("io.pressure")),
            }),
            memory_events: Some(MemoryEvents {
                low: flat(&events, "low"),
                high: flat(&events, "high"),
                max: flat(&events, "max"),
                oom: flat(&events, "oom"),
                oom_kill: flat(&events, "oom_kill"),
                oom_group_kill: flat(&events, "oom_group_kill"),
            }),
            ..Metrics::default()
        }
    }
}

/// Removes the empty cgroups below a cgroup.
pub fn remove_children(path: &Path, depth: usize) {
    // Bounded: a container can nest its cgroups deeply, and our stack is not endless. What is
    // left makes the removal fail and stays.
    if depth > 64 {
        return;
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_children(&entry.path(), depth + 1);
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn memory_stat(text: &str, number: impl Fn(&str) -> u64, psi: Option<PSIStats>) -> MemoryStat {
    let f = |name| flat(text, name);
    MemoryStat {
        anon: f("anon"),
        file: f("file"),
        kernel_stack: f("kernel_stack"),
        slab: f("slab"),
        sock: f("sock"),
        shmem: f("shmem"),
        file_mapped: f("file_mapped"),
        file_dirty: f("file_dirty"),
        file_writeback: f("file_writeback"),
        anon_thp: f("anon_thp"),
        inactive_anon: f("inactive_anon"),
        active_anon: f("active_anon"),
        inactive_file: f("inactive_file"),
        active_file: f("active_file"),
        unevictable: f("unevictable"),
        slab_reclaimable: f("slab_reclaimable"),
        slab_unreclaimable: f("slab_unreclaimable"),
        pgfault: f("pgfault"),
        pgmajfault: f("pgmajfault"),
        workingset_refault: f("workingset_refault_anon") + f("workingset_refault_file"),
        workingset_activate: f("workingset_activate_anon") + f("workingset_activate_file"),
        workingset_nodereclaim: f("workingset_nodereclaim"),
        pgrefill: f("pgrefill"),
        pgscan: f("pgscan"),
        pgsteal: f("pgsteal"),
        pgactivate: f("pgactivate"),
        pgdeactivate: f("pgdeactivate"),
        pglazyfree: f("pglazyfree"),
        pglazyfreed: f("pglazyfreed"),
        thp_fault_alloc: f("thp_fault_alloc"),
        thp_collapse_alloc: f("thp_collapse_alloc"),
        usage: number("memory.current"),
        usage_limit: number("memory.max"),
        swap_usage: number("memory.swap.current"),
        swap_limit: number("memory.swap.max"),
        max_usage: number("memory.peak"),
        swap_max_usage: number("memory.swap.peak"),
        psi,
    }
}

/// A file of the kernel's that can be waited on.
pub struct Watch {
    fd: AsyncFd<OwnedFd>,
}

impl Watch {
    fn new(path: &Path) -> io::Result<Self> {
        let file = fs::File::open(path)?;
        Ok(Self {
            fd: crate::transport::watch(file.into(), Interest::PRIORITY)?,
        })
    }

    /// Its text now. Reading it is what makes later changes be noticed.
    pub fn text(&self) -> String {
        let mut buffer = [0; 1024];
        match nix::sys::uio::pread(self.fd.get_ref(), &mut buffer, 0) {
            Ok(n) => String::from_utf8_lossy(buffer.get(..n).unwrap_or_default()).into_owned(),
            Err(_) => String::new(),
        }
    }

    /// Waits for it to change.
    pub async fn changed(&self) -> io::Result<()> {
        let mut ready = self.fd.ready(Interest::PRIORITY).await?;
        ready.clear_ready();
        Ok(())
    }
}

/// A value of a "key value" file; 0 when it is not there.
pub fn flat(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            let (k, v) = line.split_once(' ')?;
            (k == key).then(|| v.trim().parse().ok())?
        })
        .unwrap_or(0)
}

/// A number or "max".
fn parse_max(text: &str) -> u64 {
    if text == "max" {
        u64::MAX
    } else {
        text.parse().unwrap_or(0)
    }
}

fn io_entries(text: &str) -> Vec<IOEntry> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let mut entry = IOEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..IOEntry::default()
            };
            for word in words {
                let (key, value) = word.split_once('=')?;
                let value = value.parse().unwrap_or(0);
                match key {
                    "rbytes" => entry.rbytes = value,
                    "wbytes" => entry.wbytes = value,
                    "rios" => entry.rios = value,
                    "wios" => entry.wios = value,
                    _ => {}
                }
            }
            Some(entry)
        })
        .collect()
}

fn pressure(text: &str) -> Option<PSIStats> {
    let line = |kind: &str| {
        let line = text.lines().find(|l| l.starts_with(kind))?;
        let mut data = PSIData::default();
        for word in line.split_whitespace().skip(1) {
            let (key, value) = word.split_once('=')?;
            match key {
                "avg10" => data.avg10 = value.parse().ok()?,
                "avg60" => data.avg60 = value.parse().ok()?,
                "avg300" => data.avg300 = value.parse().ok()?,
                "total" => data.total = value.parse().ok()?,
                _ => {}
            }
        }
        Some(data)
    };
    let (some, full) = (line("some"), line("full"));
    (some.is_some() || full.is_some()).then_some(PSIStats { some, full })
}

/// OCI limits as files and values of cgroup v2, in the order to write them.
fn limits(resources: &Value) -> Result<Vec<(String, String)>> {
    let mut out: Vec<(String, String)> = Vec::new();
    let number = |v: &Value| v.as_i64();
    let max = |n: i64| {
        if n < 0 {
            "max".to_owned()
        } else {
            n.to_string()
        }
    };
    if let Some(memory) = resources.get("memory") {
        let limit = memory.get("limit").and_then(number).filter(|n| *n != 0);
        if let Some(limit) = limit {
            out.push(("memory.max".into(), max(limit)));
        }
        // OCI counts memory in swap's limit, cgroup v2 does not.
        if let Some(swap) = memory.get("swap").and_then(number).filter(|n| *n != 0) {
            let swap = match limit {
                _ if swap < 0 => -1,
                Some(limit) if limit > 0 && swap >= limit => swap - limit,
                _ => {
                    return Err(Error::Invalid(format!(
                        "memory.swap {swap} counts memory too: it needs memory.limit, no larger"
                    )));
                }
            };
            out.push(("memory.swap.max".into(), max(swap)));
        }
        if let Some(low) = memory.get("reservation").and_then(number)
            && low != 0
        {
            out.push(("memory.low".into(), max(low)));
        }
    }
    if let Some(cpu) = resources.get("cpu") {
        if let Some(shares) = cpu.get("shares").and_then(Value::as_u64)
            && shares != 0
        {
            // 2..=262144 onto 1..=10000, as everybody does it.
            let shares = shares.clamp(2, 262_144);
            let weight = 1 + (shares - 2) * 9999 / 262_142;
            out.push(("cpu.weight".into(), weight.to_string()));
        }
        let quota = cpu.get("quota").and_then(number).filter(|q| *q != 0);
        let period = cpu
            .get("period")
            .and_then(Value::as_u64)
            .filter(|p| *p != 0);
        match (quota, period) {
            (None, None) => {}
            (None, Some(period)) => out.push(("cpu.max".into(), format!("max {period}"))),
            (Some(quota), period) => out.push((
                "cpu.max".into(),
                format!("{} {}", max(quota), period.unwrap_or(100_000)),
            )),
        }
        for (key, file) in [("cpus", "cpuset.cpus"), ("mems", "cpuset.mems")] {
            if let Some(list) = cpu.get(key).and_then(Value::as_str)
                && !list.is_empty()
            {
                out.push((file.into(), list.to_owned()));
            }
        }
    }
    if let Some(limit) = resources.pointer("/pids/limit").and_then(number)
        && limit != 0
    {
        out.push(("pids.max".into(), max(limit)));
    }
    if let Some(weight) = resources.pointer("/blockIO/weight").and_then(Value::as_u64)
        && weight != 0
    {
        // 10..=1000 onto 1..=10000.
        let weight = 1 + (weight.clamp(10, 1000) - 10) * 9999 / 990;
        out.push(("io.weight".into(), format!("default {weight}")));
    }
    if let Some(unified) = resources.get("unified").and_then(Value::as_object) {
        for (file, value) in unified {
            let value = value.as_str().unwrap_or_default();
            let plain = file
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._".contains(&b));
            if !plain || !file.contains('.') || file.starts_with("cgroup.") {
                return Err(Error::Invalid(format!(
                    "linux.resources.unified: {file:?} is not a limit of cgroup v2"
                )));
            }
            out.push((file.clone(), value.to_owned()));
        }
    }
    Ok(out)
}

/// Takes the limits whose controllers this guest lacks out of an OCI `linux.resources`.
pub fn drop_missing(resources: &mut Value, controllers: &[String]) {
    let Some(map) = resources.as_object_mut() else {
        return;
    };
    let has = |name: &str| controllers.iter().any(|c| c == name);
    map.retain(|key, _| match key.as_str() {
        "memory" => has("memory"),
        "cpu" => has("cpu"),
        "pids" => has("pids"),
        "blockIO" => has("io"),
        "hugepageLimits" => has("hugetlb"),
        "unified" | "rdma" => !controllers.is_empty(),
        _ => true,
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_become_files() {
        let r = json!({
            "memory": {"limit": 1000, "swap": 1500, "reservation": 10},
            "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1"},
            "pids": {"limit": 7},
            "blockIO": {"weight": 1000},
            "unified": {"memory.high": "900"},
        });
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            limits(&r).unwrap(),
            [
                pair("memory.max", "1000"),
                pair("memory.swap.max", "500"),
                pair("memory.low", "10"),
                pair("cpu.weight", "39"),
                pair("cpu.max", "50000 100000"),
                pair("cpuset.cpus", "0-1"),
                pair("pids.max", "7"),
                pair("io.weight", "default 10000"),
                pair("memory.high", "900"),
            ]
        );
        let r = json!({"memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}});
        let all_max: Vec<_> = limits(&r).unwrap().into_iter().map(|(_, v)| v).collect();
        assert_eq!(all_max, ["max", "max", "max 100000", "max"]);
        for bad in [
            json!({"unified": {"../x": "1"}}),
            json!({"unified": {"cgroup.procs": "1"}}),
            json!({"memory": {"swap": 5}}),
        ] {
            assert!(limits(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn kernel_files_are_read() {
        assert_eq!(flat("a 1\nab 22\n", "ab"), 22);
        assert_eq!(flat("a 1\n", "b"), 0);
        let io = io_entries("254:0 rbytes=4096 wbytes=0 rios=1 wios=2 dbytes=0 dios=0\nbad\n");
        assert_eq!(
            (io.len(), io[0].major, io[0].rbytes, io[0].wios),
            (1, 254, 4096, 2)
        );
        let p = pressure("some avg10=1.50 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n").unwrap();
        assert_eq!(p.some.unwrap().total, 77);
        assert!((p.some.unwrap().avg10 - 1.5).abs() < 1e-9);
        assert_eq!(p.full.unwrap().total, 5);
        assert_eq!(parse_max("max"), u64::MAX);
    }
}
