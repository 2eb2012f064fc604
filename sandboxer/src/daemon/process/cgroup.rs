//! The cgroup (v2) of a pod of ordinary containers: `bulkhead-<pod>` below the one that kubelet has
//! made for it. Its agent makes those of the containers in it.

use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::engine::EngineError;

const ROOT: &str = "/sys/fs/cgroup";
/// Parent of pods for which CRI names none.
const DEFAULT_PARENT: &str = "bulkhead";
/// Time for killed processes to go.
const EMPTY_TIME: Duration = Duration::from_secs(10);
/// Cgroups in cgroups that are removed; containers can make their own.
const MAX_DEPTH: usize = 64;

/// What CRI names as the parent, as a path: absolute, or a slice of systemd's.
pub fn expand(parent: &str) -> PathBuf {
    let relative = parent.trim_start_matches('/');
    let plain = relative.len() < 1024
        && Path::new(relative)
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
    if relative.is_empty() || !plain {
        return DEFAULT_PARENT.into();
    }
    let Some(name) = relative
        .strip_suffix(".slice")
        .filter(|_| !parent.starts_with('/') && !relative.contains('/'))
    else {
        return relative.into();
    };
    // a-b.slice is in a.slice.
    let mut path = PathBuf::new();
    for (end, _) in name.match_indices('-').chain([(name.len(), "")]) {
        if let Some(part) = name.get(..end).filter(|p| !p.is_empty()) {
            path.push(format!("{part}.slice"));
        }
    }
    path
}

/// A pod's cgroup.
#[derive(Debug)]
pub struct PodCgroup {
    path: PathBuf,
}

impl PodCgroup {
    /// That of a pod, be it there or not.
    pub fn of(parent: &Path, id: &str) -> Self {
        Self {
            path: Path::new(ROOT).join(parent).join(format!("bulkhead-{id}")),
        }
    }

    /// Makes it, with all the controllers that there are.
    ///
    /// # Errors
    /// This host has no cgroup v2, or its cgroups are not ours to make.
    pub fn create(parent: &Path, id: &str) -> Result<Self, EngineError> {
        let controllers = Path::new(ROOT).join("cgroup.controllers");
        let controllers = std::fs::read_to_string(&controllers).map_err(EngineError::io(
            "processes of pods need cgroups of version 2 at /sys/fs/cgroup",
        ))?;
        let cgroup = Self::of(parent, id);
        let failed = || EngineError::io(format!("cgroup {}", cgroup.path.display()));
        std::fs::create_dir_all(&cgroup.path).map_err(failed())?;
        let mut above = PathBuf::from(ROOT);
        enable(&above, &controllers);
        for part in parent.components() {
            above.push(part);
            enable(&above, &controllers);
        }
        Ok(cgroup)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Kills what is in it and removes it. Blocks until that has gone, but not for ever.
    pub fn remove(&self) {
        if !self.path.exists() {
            return;
        }
        let shown = self.path.display();
        if let Err(error) = std::fs::write(self.path.join("cgroup.kill"), "1") {
            tracing::warn!(%error, cgroup = %shown, "its processes cannot be killed");
        }
        let deadline = Instant::now() + EMPTY_TIME;
        loop {
            remove_below(&self.path, 0);
            match std::fs::remove_dir(&self.path) {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                Err(error) if Instant::now() > deadline => {
                    tracing::warn!(%error, cgroup = %shown, "cannot be removed");
                    return;
                }
                Err(_) => self.emptied(),
            }
        }
        // If it is the one we made for those without a wish.
        if let Some(parent) = self.path.parent()
            && parent == Path::new(ROOT).join(DEFAULT_PARENT)
        {
            let _ = std::fs::remove_dir(parent);
        }
    }

    /// Waits for a change of "populated", or a moment.
    fn emptied(&self) {
        let Ok(mut file) = std::fs::File::open(self.path.join("cgroup.events")) else {
            return;
        };
        let mut text = String::new();
        let _ = io::Read::read_to_string(&mut file, &mut text);
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        let _ = poll(&mut fds, PollTimeout::from(20u8));
    }
}

/// Best effort: a controller may be in use elsewhere.
fn enable(cgroup: &Path, controllers: &str) {
    for controller in controllers.split_whitespace() {
        let _ = std::fs::write(
            cgroup.join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
}

/// Removes the empty cgroups below one.
fn remove_below(path: &Path, depth: usize) {
    if depth > MAX_DEPTH {
        return;
    }
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_below(&entry.path(), depth + 1);
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_paths() {
        for (parent, path) in [
            ("", "bulkhead"),
            ("/", "bulkhead"),
            ("/kubepods/pod1", "kubepods/pod1"),
            ("../x", "bulkhead"),
            ("/a/../../b", "bulkhead"),
            ("a.slice", "a.slice"),
            ("a-b-c.slice", "a.slice/a-b.slice/a-b-c.slice"),
            ("/x/a-b.slice", "x/a-b.slice"),
            ("-.slice", "-.slice"),
        ] {
            assert_eq!(expand(parent), Path::new(path), "{parent}");
        }
    }
}
