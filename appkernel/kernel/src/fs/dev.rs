//! Devices the kernel makes itself, and the /dev of a container.

use alloc::format;
use alloc::sync::Arc;

use super::memory;
use super::node::{Owner, kind};

/// A device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Null,
    Zero,
    Full,
    Random,
}

/// What a device number leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    Device(Device),
    /// The machine's console.
    Console,
    /// The terminal of the process.
    Tty,
    /// Makes terminals.
    Ptmx,
    /// The other end of one.
    Pts(u32),
}

/// A device number as in `st_rdev`.
pub const fn number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

impl Special {
    /// By number, as in Linux.
    pub fn of(rdev: u32) -> Option<Self> {
        let (major, minor) = (rdev >> 8 & 0xfff, rdev & 0xff | rdev >> 12 & 0xfff00);
        Some(match (major, minor) {
            (1, 3) => Self::Device(Device::Null),
            (1, 5) => Self::Device(Device::Zero),
            (1, 7) => Self::Device(Device::Full),
            (1, 8 | 9) => Self::Device(Device::Random),
            (5, 0) => Self::Tty,
            (5, 1) => Self::Console,
            (5, 2) => Self::Ptmx,
            (136, minor) => Self::Pts(minor),
            _ => return None,
        })
    }
}

impl Device {
    /// Its number.
    pub fn number(self) -> u32 {
        match self {
            Self::Null => number(1, 3),
            Self::Zero => number(1, 5),
            Self::Full => number(1, 7),
            Self::Random => number(1, 9),
        }
    }
}

/// Fills a file system with what containers find in /dev.
pub fn populate(dev: &Arc<memory::Node>) {
    let owner = Owner::default();
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
        ("ptmx", 5, 2),
    ] {
        let mode = kind::CHARACTER | 0o666;
        // Only a name that is there already, or no memory, stands against it.
        let _ = dev.make(name.as_bytes(), mode, number(major, minor), &[], owner);
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("core", "/proc/kcore"),
    ] {
        let mode = kind::LINK | 0o777;
        let _ = dev.make(name.as_bytes(), mode, 0, target.as_bytes(), owner);
    }
    for name in ["pts", "shm", "mqueue"] {
        let _ = dev.make(name.as_bytes(), kind::DIRECTORY | 0o755, 0, &[], owner);
    }
}

/// Shows a terminal under /dev/pts.
pub fn add_terminal(pts: &Arc<memory::Node>, minor: u32, owner: Owner) {
    let mode = kind::CHARACTER | 0o620;
    let name = format!("{minor}");
    let _ = pts.make(name.as_bytes(), mode, number(136, minor), &[], owner);
}
