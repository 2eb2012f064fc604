//! The pod's cgroup on the host. Kubelet makes it; a client of CRI that is no kubelet counts on the
//! runtime to make it, and containerd reads the pod's statistics there.

use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// Makes the cgroup `parent` of CRI's configuration if it is not there. Gives the directories that
/// were made, outermost first, for [`remove`].
pub fn ensure(parent: &str) -> Vec<PathBuf> {
    let mut made = Vec::new();
    let plain = parent.starts_with('/')
        && parent.len() < 1024
        && Path::new(parent)
            .components()
            .skip(1)
            .all(|c| matches!(c, std::path::Component::Normal(_)));
    if !plain || !Path::new(ROOT).join("cgroup.controllers").exists() {
        return made;
    }
    let mut path = PathBuf::from(ROOT);
    for part in Path::new(parent).components().skip(1) {
        path.push(part);
        match std::fs::create_dir(&path) {
            Ok(()) => made.push(path.clone()),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                tracing::warn!(%error, cgroup = %path.display(), "cannot be made");
                break;
            }
        }
    }
    made
}

/// Removes cgroups that were made; those that others use by now stay.
pub fn remove(made: &[PathBuf]) {
    for path in made.iter().rev().filter(|p| p.starts_with(ROOT)) {
        if std::fs::remove_dir(path).is_err() {
            return;
        }
    }
}
