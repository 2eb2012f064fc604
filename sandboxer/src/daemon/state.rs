//! What is written down of a pod, so that a later process can clean up after this one and tell
//! containerd the truth.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::fsutil;

/// Version of the file's shape.
pub const VERSION: u32 = 1;
const FILE: &str = "state.json";
/// Largest state file that is read.
const MAX_FILE: u64 = 4 << 20;

/// A pod as written down.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct State {
    /// [`VERSION`].
    pub version: u32,
    /// Id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Network namespace; empty: none.
    pub netns: String,
    /// Process that runs it.
    pub pid: u32,
    /// When it was started: seconds, nanoseconds. `None`: it was not yet.
    pub started: Option<(i64, i32)>,
    /// The cgroup in which CRI wants it, as CRI says it.
    #[serde(default)]
    pub cgroup_parent: String,
    /// Cgroups that were made for it.
    pub cgroups: Vec<PathBuf>,
    /// Its containers.
    pub containers: Vec<String>,
}

impl State {
    /// Writes it into the pod's directory.
    ///
    /// # Errors
    /// What the host says.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        fsutil::write_atomically(&dir.join(FILE), &text, 0o600)
    }

    /// Reads it from a pod's directory.
    ///
    /// # Errors
    /// It is not there, or is of another version.
    pub fn read(dir: &Path) -> io::Result<Self> {
        use std::io::Read;
        let mut text = Vec::new();
        std::fs::File::open(dir.join(FILE))?
            .take(MAX_FILE)
            .read_to_end(&mut text)?;
        Self::parse(&text)
    }

    /// Reads a file's text.
    ///
    /// # Errors
    /// It is none of ours, or of another version.
    pub fn parse(text: &[u8]) -> io::Result<Self> {
        let state: Self = serde_json::from_slice(text)?;
        if state.version != VERSION {
            return Err(io::Error::other(format!(
                "state of version {}, this program knows {VERSION}",
                state.version
            )));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = State {
            version: VERSION,
            id: "p".into(),
            namespace: "k8s.io".into(),
            netns: "/run/netns/x".into(),
            pid: 7,
            started: Some((5, 6)),
            cgroup_parent: "/kubepods/x".into(),
            cgroups: Vec::new(),
            containers: vec!["c".into()],
        };
        state.write(dir.path()).expect("write");
        assert_eq!(State::read(dir.path()).expect("read"), state);
        let newer = State {
            version: VERSION + 1,
            ..state
        };
        newer.write(dir.path()).expect("write");
        assert!(State::read(dir.path()).is_err());
        std::fs::write(dir.path().join(FILE), "{").expect("write");
        assert!(State::read(dir.path()).is_err());
    }
}
