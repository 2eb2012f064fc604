//! Where the parts under test are, and how long anything may take.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Longest time anything waits for a guest. Emulated hosts are 20 to 50 times slower than
/// hardware, and busy at that.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The cache directory of the project.
///
/// # Errors
/// When neither `BULKHEAD_CACHE` nor `HOME` is set.
pub fn cache() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("BULKHEAD_CACHE") {
        return Ok(dir.into());
    }
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(&std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("bulkhead"))
}

fn current(name: &str) -> Result<PathBuf> {
    let path = cache()?.join("current").join(name);
    if !path.exists() {
        bail!("{} is missing: run `just guest`", path.display());
    }
    Ok(path.canonicalize()?)
}

/// Our guest kernel, PVH.
///
/// # Errors
/// When it is not built.
pub fn vmlinux() -> Result<PathBuf> {
    current("vmlinux")
}

/// Our guest kernel as bzImage.
///
/// # Errors
/// When it is not built.
pub fn bzimage() -> Result<PathBuf> {
    current("bzImage")
}

/// `vmmctl` of this build: beside the running test program.
///
/// # Errors
/// When it is not built.
pub fn vmmctl() -> Result<PathBuf> {
    built("vmmctl")
}

/// A program of this build: beside the running test program.
///
/// # Errors
/// When it is not built.
pub fn built(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let path = exe
        .ancestors()
        .skip(1)
        .take(3)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("no {name} near {}: run `just build`", exe.display()))?;
    Ok(path)
}

/// Whether this process runs where VMs can run.
pub fn has_kvm() -> bool {
    bulkhead_vmm::kvm_check(bulkhead_vmm::Probe::Quick).usable()
}
