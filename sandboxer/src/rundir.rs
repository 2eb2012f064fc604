//! One directory per running VM: its state, its debug socket, its share.
//!
//! The owner holds a lock on `<dir>/lock` as long as it lives. The kernel lets go of it however
//! the owner dies, so that whoever can take the lock of an existing directory knows that its VM
//! is gone and removes what is left. Mounts need no care: they are made in a private mount
//! namespace, which ends with its process.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::fsutil;

/// Version of `state.json`.
pub const STATE_VERSION: u32 = 1;

/// What other processes may know about a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// Random, 8 hex digits.
    pub id: String,
    /// Name given by the user; may be empty.
    pub name: String,
    /// Another name of any length: the id that containerd gave to a pod.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub alias: String,
    /// Kind of sandbox: `microvm` or `app`.
    pub kind: String,
    /// `run` (a container inside), `boot` (a bare kernel) or `pod` (containers of containerd's).
    pub mode: String,
    /// Image or kernel, for people.
    pub image: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// `creating`, `booting`, `running`, `stopping`.
    pub state: String,
    /// Process that owns the VM.
    pub pid: u32,
    /// Start of that process in clock ticks since boot: tells it from a later one of the same id.
    pub pid_start: u64,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory.
    pub memory_mib: u64,
    /// Directories elsewhere that belong to this VM; each ends in its id.
    #[serde(default)]
    pub scratch: Vec<PathBuf>,
    /// The container's OCI spec, which `exec` starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<serde_json::Value>,
    /// A pod's containers: id and bundle.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub containers: BTreeMap<String, PathBuf>,
}

/// Why a VM's directory cannot be made or found.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// No such VM.
    #[error("{0}: no running VM has this id or name{1}; see vmmctl ps")]
    Unknown(String, String),
    /// More than one.
    #[error("{0}: is short for {1}; give more of the id")]
    Ambiguous(String, String),
    /// The name is in use.
    #[error("name {0}: already in use by VM {1}; choose another or stop it first")]
    NameTaken(String, String),
    /// The name cannot be one.
    #[error(
        "name {0:?}: use letters, digits, '.', '_' and '-', at most 63 characters, not starting with '-' or '.'"
    )]
    BadName(String),
    /// The host refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

impl RunDirError {
    /// A word for programs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unknown(..) => "vm_unknown",
            Self::Ambiguous(..) => "vm_ambiguous",
            Self::NameTaken(..) => "name_in_use",
            Self::BadName(_) => "bad_name",
            Self::Io { .. } => "run_directory",
        }
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> RunDirError {
    let what = what.into();
    move |source| RunDirError::Io { what, source }
}

/// Directory of all VMs of this user.
pub fn root() -> PathBuf {
    if let Some(dir) = std::env::var_os("BULKHEAD_RUN").filter(|d| !d.is_empty()) {
        return dir.into();
    }
    if nix::unistd::geteuid().is_root() {
        return "/run/bulkhead".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        Some(dir) => PathBuf::from(dir).join("bulkhead"),
        None => std::env::temp_dir().join(format!("bulkhead-{}", nix::unistd::geteuid())),
    }
}

/// The directory of a VM of this process. Removed when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    state: State,
    _lock: File,
}

impl RunDir {
    /// Makes the directory of a new VM below `root`, filling in id, process and time of `state`.
    ///
    /// # Errors
    /// The name is taken or the directory cannot be made.
    pub fn create(root: &Path, mut state: State) -> Result<Self, RunDirError> {
        check_name(&state.name)?;
        let vms = root.join("vms");
        private_dir(&vms).map_err(io_error(format!(
            "{} (choose another place with BULKHEAD_RUN)",
            vms.display()
        )))?;
        // Creation and clean-up exclude each other, so that a directory without its lock is not
        // taken for a dead one, and two VMs cannot get one name.
        let _exclusive = fsutil::lock(&root.join("lock"), true)
            .map_err(io_error(format!("locking {}", root.display())))?;
        if !state.name.is_empty()
            && let Some(other) = list(root)
                .into_iter()
                .find(|vm| vm.alive && vm.state.name == state.name)
        {
            return Err(RunDirError::NameTaken(state.name, other.state.id));
        }
        let (id, path) = loop {
            let id = random_id().map_err(io_error("/dev/urandom"))?;
            let path = vms.join(&id);
            match std::fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => break (id, path),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(io_error(path.display().to_string())(e)),
            }
        };
        let lock = fsutil::lock(&path.join("lock"), true)
            .map_err(io_error(format!("locking {}", path.display())))?;
        state.version = STATE_VERSION;
        state.id = id;
        state.pid = std::process::id();
        state.pid_start = process_start(state.pid).unwrap_or(0);
        state.created_ms = now_ms();
        let dir = Self {
            path,
            state,
            _lock: lock,
        };
        dir.save()?;
        Ok(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The VM's id.
    pub fn id(&self) -> &str {
        &self.state.id
    }

    /// What is written down.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Changes what is written down.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn update(&mut self, change: impl FnOnce(&mut State)) -> Result<(), RunDirError> {
        change(&mut self.state);
        self.save()
    }

    fn save(&self) -> Result<(), RunDirError> {
        let path = self.path.join("state.json");
        let json = serde_json::to_vec(&self.state)
            .map_err(|e| io_error(path.display().to_string())(e.into()))?;
        fsutil::write_atomically(&path, &json, 0o600).map_err(io_error(path.display().to_string()))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        remove(&self.path, Some(&self.state));
    }
}

fn remove(path: &Path, state: Option<&State>) {
    for scratch in state.iter().flat_map(|s| &s.scratch) {
        // Only what is named after the VM: a damaged file must not make us remove anything else.
        if state.is_some_and(|s| scratch.file_name() == Some(s.id.as_ref()) && !s.id.is_empty()) {
            let _ = fsutil::remove_dir(scratch);
        }
    }
    fsutil::remove_at_last(path.to_owned(), fsutil::remove_dir);
}

/// A VM as found in the directory.
#[derive(Debug, Clone)]
pub struct Found {
    /// What it wrote down.
    pub state: State,
    /// Its directory.
    pub path: PathBuf,
    /// Whether its process lives.
    pub alive: bool,
}

/// All VMs, oldest first. Unreadable directories are left out.
pub fn list(root: &Path) -> Vec<Found> {
    let mut found: Vec<Found> = std::fs::read_dir(root.join("vms"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            let data = std::fs::read(path.join("state.json")).ok()?;
            let state: State = serde_json::from_slice(&data).ok()?;
            let alive = is_locked(&path);
            (state.version == STATE_VERSION).then_some(Found { state, path, alive })
        })
        .collect();
    found.sort_by(|a, b| (a.state.created_ms, &a.state.id).cmp(&(b.state.created_ms, &b.state.id)));
    found
}

/// True when another process (or this one) holds the VM's lock.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::options()
        .read(true)
        .write(true)
        .open(path.join("lock"))
    else {
        return false;
    };
    // Shared, so that two who look do not take each other for the owner.
    matches!(
        file.try_lock_shared(),
        Err(std::fs::TryLockError::WouldBlock)
    )
}

/// Finds a running VM by name, id or the beginning of an id.
///
/// # Errors
/// None or several are meant.
pub fn find(root: &Path, wanted: &str) -> Result<Found, RunDirError> {
    let all: Vec<Found> = list(root).into_iter().filter(|vm| vm.alive).collect();
    if let Some(exact) = all.iter().find(|vm| {
        let names = [&vm.state.name, &vm.state.id, &vm.state.alias];
        names.into_iter().any(|name| name == wanted)
    }) {
        return Ok(exact.clone());
    }
    let matching: Vec<&Found> = all
        .iter()
        .filter(|vm| {
            !wanted.is_empty()
                && (vm.state.id.starts_with(wanted) || vm.state.alias.starts_with(wanted))
        })
        .collect();
    match matching.as_slice() {
        [one] => Ok((*one).clone()),
        [] => {
            let names = all
                .iter()
                .flat_map(|vm| [vm.state.id.as_str(), vm.state.name.as_str()])
                .filter(|n| !n.is_empty());
            let hint = crate::hint::nearest(wanted, names)
                .map(|n| format!(" (did you mean {n}?)"))
                .unwrap_or_default();
            Err(RunDirError::Unknown(wanted.to_owned(), hint))
        }
        several => {
            let ids: Vec<&str> = several.iter().map(|vm| vm.state.id.as_str()).collect();
            Err(RunDirError::Ambiguous(wanted.to_owned(), ids.join(", ")))
        }
    }
}

/// Removes what VMs of dead processes left; says which. Called by every command.
pub fn clean_stale(root: &Path) -> Vec<String> {
    let vms = root.join("vms");
    let Ok(entries) = std::fs::read_dir(&vms) else {
        return Vec::new();
    };
    let dirs: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| !is_locked(p))
        .collect();
    if dirs.is_empty() {
        return Vec::new();
    }
    // Somebody else may be creating or cleaning right now: leave it to them.
    let Ok(_exclusive) = fsutil::lock(&root.join("lock"), false) else {
        return Vec::new();
    };
    let mut removed = Vec::new();
    for path in dirs.into_iter().filter(|p| !is_locked(p)) {
        let state = std::fs::read(path.join("state.json"))
            .ok()
            .and_then(|d| serde_json::from_slice::<State>(&d).ok());
        remove(&path, state.as_ref());
        removed.push(
            path.file_name()
                .map(|n| n.to_string_lossy().into_owned())
                .unwrap_or_default(),
        );
    }
    removed
}

fn check_name(name: &str) -> Result<(), RunDirError> {
    let good = name.len() <= 63
        && !name.starts_with(['-', '.'])
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if good {
        Ok(())
    } else {
        Err(RunDirError::BadName(name.chars().take(80).collect()))
    }
}

/// Makes a directory for us alone and refuses one that somebody else prepared.
fn private_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)?;
    let meta = std::fs::symlink_metadata(path)?;
    if meta.uid() != nix::unistd::geteuid().as_raw() || !meta.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "belongs to another user",
        ));
    }
    Ok(())
}

fn random_id() -> io::Result<String> {
    use std::io::Read;
    let mut bytes = [0u8; 4];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:08x}", u32::from_le_bytes(bytes)))
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Field 22 of `/proc/PID/stat`: start of a process in clock ticks since boot.
pub(crate) fn process_start(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold spaces and parentheses.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str) -> State {
        State {
            version: 0,
            id: String::new(),
            name: name.into(),
            kind: "microvm".into(),
            mode: "run".into(),
            image: "busybox".into(),
            command: vec!["sh".into()],
            state: "creating".into(),
            pid: 0,
            pid_start: 0,
            created_ms: 0,
            cpus: 1,
            memory_mib: 128,
            ..State::default()
        }
    }

    #[test]
    fn directories_come_and_go() {
        let root = tempfile::tempdir().expect("tempdir");
        let mut dir = RunDir::create(root.path(), state("web")).expect("created");
        dir.update(|s| s.state = "running".into()).expect("updated");
        let all = list(root.path());
        assert_eq!(
            (all.len(), all[0].alive, all[0].state.state.as_str()),
            (1, true, "running")
        );
        assert!(all[0].state.pid_start > 0);
        assert!(clean_stale(root.path()).is_empty());
        assert_eq!(
            find(root.path(), "web").expect("by name").state.id,
            dir.id()
        );
        assert_eq!(
            find(root.path(), &dir.id()[..4])
                .expect("by prefix")
                .state
                .id,
            dir.id()
        );
        dir.update(|s| s.alias = format!("{:064}", 7))
            .expect("updated");
        for of_alias in [format!("{:064}", 7), "0".repeat(20)] {
            let found = find(root.path(), &of_alias).expect("by another name");
            assert_eq!(found.state.id, dir.id());
        }
        let unknown = find(root.path(), "wob").expect_err("unknown").to_string();
        assert!(unknown.contains("did you mean web"), "{unknown}");
        let taken = RunDir::create(root.path(), state("web")).expect_err("taken");
        assert_eq!(taken.kind(), "name_in_use");
        assert_eq!(
            RunDir::create(root.path(), state("../x"))
                .expect_err("bad")
                .kind(),
            "bad_name"
        );
        let path = dir.path().to_owned();
        drop(dir);
        assert!(!path.exists() && list(root.path()).is_empty());
    }

    #[test]
    fn the_dead_are_cleaned_and_nothing_else() {
        let root = tempfile::tempdir().expect("tempdir");
        let other = tempfile::tempdir().expect("tempdir");
        let living = RunDir::create(root.path(), state("living")).expect("created");
        // As a killed process leaves it: a directory whose lock nobody holds.
        let dead = root.path().join("vms/deadbeef");
        std::fs::create_dir_all(dead.join("share/rootfs/x")).expect("mkdir");
        let scratch = other.path().join("deadbeef");
        std::fs::create_dir(&scratch).expect("mkdir");
        let keep = other.path().join("keep");
        std::fs::create_dir(&keep).expect("mkdir");
        let mut left = state("dead");
        left.version = STATE_VERSION;
        left.id = "deadbeef".into();
        left.scratch = vec![scratch.clone(), keep.clone()];
        std::fs::write(
            dead.join("state.json"),
            serde_json::to_vec(&left).expect("json"),
        )
        .expect("write");
        std::fs::write(dead.join("lock"), "").expect("write");
        assert!(find(root.path(), "dead").is_err(), "a dead VM is not found");
        assert_eq!(clean_stale(root.path()), ["deadbeef"]);
        assert!(!dead.exists() && !scratch.exists() && keep.exists() && living.path().exists());
    }
}
