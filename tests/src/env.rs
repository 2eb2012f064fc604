//! Where the parts under test are, and how long anything may take.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Longest time anything waits for a guest. Emulated hosts are 20 to 50 times slower than
/// hardware, and busy at that.
pub const PATIENCE: Duration = Duration::from_secs(300);

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

/// Says that a test cannot run here, and why, also to the one who counts: `BULKHEAD_SKIPS` names a
/// file that gets a line.
///
/// # Panics
/// When that file cannot be written: a skip must not go unnoticed.
pub fn skip(test: &str, why: &dyn std::fmt::Display) {
    eprintln!("SKIPPED {test}: {why}");
    if let Some(path) = std::env::var_os("BULKHEAD_SKIPS") {
        let file = fs::File::options().create(true).append(true).open(path);
        file.and_then(|mut file| writeln!(file, "{test}: {why}"))
            .expect("the list of skipped tests");
    }
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

/// The image with the agent.
///
/// # Errors
/// When it is not built.
pub fn guest_image() -> Result<PathBuf> {
    current("rootfs.erofs")
}

/// The app kernel.
///
/// # Errors
/// When it is not built.
pub fn app_kernel() -> Result<PathBuf> {
    let path = cache()?.join("current/appkernel");
    if !path.exists() {
        bail!("{} is missing: run `just appkernel`", path.display());
    }
    Ok(path.canonicalize()?)
}

/// The programs of `tests/guest`.
///
/// # Errors
/// When they are not built.
pub fn guest_programs() -> Result<PathBuf> {
    let path = cache()?.join("current/guest-programs");
    if !path.exists() {
        bail!("{} is missing: run tests/guest/build", path.display());
    }
    Ok(path.canonicalize()?)
}

/// The guest kernel that keeps no rule (tests/hostile).
///
/// # Errors
/// When it is not built.
pub fn hostile_guest() -> Result<PathBuf> {
    current("hostile")
}

/// The running kernel of this host and the directory of its modules: a distribution's kernel.
///
/// # Errors
/// When there is none to be found.
pub fn host_kernel() -> Result<(PathBuf, PathBuf)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let release = release.trim();
    // The lab's own kernel is in the cache, that of a host where its package puts it.
    let lab = fs::read_dir(cache()?.join("lab"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .map(|dir| (dir.join("vmlinux"), dir.join("lib/modules").join(release)));
    let host = (
        Path::new("/boot").join(format!("vmlinuz-{release}")),
        Path::new("/lib/modules").join(release),
    );
    lab.chain([host])
        .find(|(kernel, modules)| kernel.exists() && modules.join("modules.dep").exists())
        .with_context(|| format!("no kernel image or no modules of {release} are on this host"))
}

/// The agent that is in the guest image.
///
/// # Errors
/// When it is not built.
pub fn agent() -> Result<PathBuf> {
    current("agent")
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
