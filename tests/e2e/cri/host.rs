//! What pods could leave on their host.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bulkhead_tests::cri::containerd::Node;

/// How much of everything there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub counts: BTreeMap<&'static str, usize>,
}

/// Entries of a directory and of all below it.
fn tree(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| {
            1 + e
                .file_type()
                .map_or(0, |t| if t.is_dir() { tree(&e.path()) } else { 0 })
        })
        .sum()
}

fn directories(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| 1 + directories(&e.path()))
        .sum()
}

impl Host {
    /// As of now.
    pub fn now(node: &Node) -> Result<Self> {
        let pid = node.sandboxer_pid();
        let entries = |dir: String| fs::read_dir(dir).map_or(0, Iterator::count);
        // Those of VMs that are kept to be copied come with the shapes of pods, and stay.
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten()
            .filter(|fd| {
                fs::read_link(fd.path())
                    .is_ok_and(|to| !to.to_string_lossy().contains("bulkhead-template"))
            })
            .count();
        let lines = |file: String| fs::read_to_string(file).map_or(0, |t| t.lines().count());
        let counts = BTreeMap::from([
            ("descriptors", descriptors),
            ("threads", bulkhead_tests::process::threads(pid)?),
            (
                "mounts of the sandboxer",
                lines(format!("/proc/{pid}/mounts")),
            ),
            ("mounts", lines("/proc/self/mounts".into())),
            ("links", entries("/sys/class/net".into())),
            ("network namespaces", entries("/run/netns".into())),
            ("files and sockets", tree(Path::new("/run/bulkhead"))),
            (
                "keepers",
                lines("/sys/fs/cgroup/bulkhead-keepers/cgroup.procs".into()),
            ),
            ("cgroups", directories(Path::new("/sys/fs/cgroup"))),
        ]);
        Ok(Self { counts })
    }

    /// What there is once nothing has changed for some seconds.
    pub fn settled(node: &Node) -> Result<Self> {
        let mut last = Self::now(node)?;
        let mut same = 0;
        for _ in 0..300 {
            if same > 40 {
                return Ok(last);
            }
            std::thread::sleep(Duration::from_millis(100));
            node.templates_made()?;
            let now = Self::now(node)?;
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
        bail!("what is there changes all the time: {last:?}");
    }

    /// Waits until there is what there was.
    pub fn as_before(&self, node: &Node) -> Result<Self> {
        node.templates_made()?;
        let mut now = Self::now(node)?;
        for _ in 0..200 {
            if now == *self {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_millis(100));
            now = Self::now(node)?;
        }
        let left: Vec<String> = self
            .counts
            .iter()
            .filter(|(what, count)| now.counts.get(*what) != Some(*count))
            .map(|(what, count)| format!("{what}: {count} became {:?}", now.counts.get(what)))
            .collect();
        ensure!(left.is_empty(), "left: {}", left.join(", "));
        Ok(now)
    }
}
