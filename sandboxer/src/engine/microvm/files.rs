//! Where the guest kernel and the guest image are.

use std::path::{Path, PathBuf};

use crate::engine::EngineError;

/// Kernel and root image of a guest.
#[derive(Debug, Clone)]
pub struct GuestFiles {
    /// ELF `vmlinux` or `bzImage`.
    pub kernel: PathBuf,
    /// erofs image with the agent.
    pub image: PathBuf,
}

/// Where packages install them.
const INSTALLED: &str = "/usr/share/bulkhead";

impl GuestFiles {
    /// Takes what is given, else what the environment names, else what is installed, else what a
    /// build in this user's cache made.
    ///
    /// # Errors
    /// Nothing is there.
    pub fn find(kernel: Option<&Path>, image: Option<&Path>) -> Result<Self, EngineError> {
        Ok(Self {
            kernel: find_kernel(kernel)?,
            image: find(
                image,
                "BULKHEAD_IMAGE",
                "rootfs.erofs",
                "guest image",
                "image",
            )?,
        })
    }
}

/// The app kernel, which is a guest by itself: looked for in the same places.
///
/// # Errors
/// It is not there.
pub fn find_app_kernel(kernel: Option<&Path>) -> Result<PathBuf, EngineError> {
    find(
        kernel,
        "BULKHEAD_APPKERNEL",
        "appkernel",
        "app kernel",
        "kernel",
    )
}

/// The agent, for containers without a guest: looked for in the same places.
///
/// # Errors
/// It is not there.
pub fn find_agent(agent: Option<&Path>) -> Result<PathBuf, EngineError> {
    find(agent, "BULKHEAD_AGENT", "agent", "agent", "agent")
}

/// The kernel alone.
///
/// # Errors
/// Nothing is there.
pub fn find_kernel(kernel: Option<&Path>) -> Result<PathBuf, EngineError> {
    find(
        kernel,
        "BULKHEAD_KERNEL",
        "vmlinux",
        "guest kernel",
        "kernel",
    )
}

fn find(
    given: Option<&Path>,
    variable: &'static str,
    name: &str,
    what: &'static str,
    flag: &'static str,
) -> Result<PathBuf, EngineError> {
    // What is named must be there; the VMM says precisely what is wrong with it.
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    if let Some(path) = std::env::var_os(variable).filter(|v| !v.is_empty()) {
        return Ok(path.into());
    }
    let places = [
        Some(PathBuf::from(INSTALLED)),
        cache().map(|c| c.join("current")),
    ];
    let candidates: Vec<PathBuf> = places
        .into_iter()
        .flatten()
        .map(|dir| dir.join(name))
        .collect();
    candidates
        .iter()
        .find(|p| p.exists())
        .cloned()
        .ok_or_else(|| EngineError::NoGuest {
            what,
            looked: candidates
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(" and "),
            flag,
            variable,
        })
}

fn cache() -> Option<PathBuf> {
    match std::env::var_os("BULKHEAD_CACHE").filter(|d| !d.is_empty()) {
        Some(dir) => Some(dir.into()),
        None => std::env::home_dir().map(|home| home.join(".cache/bulkhead")),
    }
}
