//! Containers by runc, without a daemon: what an image's programs do on the host's kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// As root of a container usually has them (those of containerd).
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A root file system from which containers are started, one after the other.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    spec: Value,
}

/// Version of runc, or why it cannot be used.
///
/// # Errors
/// It is not installed.
pub fn version() -> Result<String> {
    let output = Command::new("runc").arg("--version").output();
    let output = output.context("runc is not installed")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .lines()
        .next()
        .and_then(|l| l.split_whitespace().last());
    Ok(version.unwrap_or("unknown").to_owned())
}

impl Bundle {
    /// Prepares containers in `dir`, an empty directory, with `rootfs` as their (writable) root and
    /// with these directories of the host, read-only, at places of the container.
    ///
    /// # Errors
    /// runc is missing or the bundle cannot be written.
    pub fn new(dir: &Path, rootfs: &Path, binds: &[(&Path, &str)]) -> Result<Self> {
        let status = Command::new("runc").arg("spec").current_dir(dir).status();
        let status = status.context("runc is not installed")?;
        if !status.success() {
            bail!("runc spec: {status}");
        }
        let mut spec: Value = serde_json::from_slice(&fs::read(dir.join("config.json"))?)?;
        spec["root"] = json!({"path": rootfs, "readonly": false});
        spec["process"]["terminal"] = false.into();
        spec["process"]["rlimits"] = json!([]);
        spec["process"]["noNewPrivileges"] = false.into();
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(CAPABILITIES);
        }
        let mounts = spec["mounts"]
            .as_array_mut()
            .context("mounts of runc's spec")?;
        for (from, to) in binds {
            mounts.push(json!({
                "destination": to, "source": from, "type": "bind", "options": ["rbind", "ro"],
            }));
        }
        Ok(Self {
            dir: dir.to_owned(),
            spec,
        })
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// runc cannot be started.
    pub fn run(&self, program: &[&str]) -> Result<Output> {
        let mut spec = self.spec.clone();
        spec["process"]["args"] = json!(program);
        fs::write(self.dir.join("config.json"), serde_json::to_vec(&spec)?)?;
        let name = format!("bulkhead-test-{}", std::process::id());
        let output = Command::new("runc")
            .arg("--root")
            .arg(self.dir.join("state"))
            .args(["run", &name])
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .output();
        output.context("runc run")
    }
}
