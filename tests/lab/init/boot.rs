// SPDX-License-Identifier: Apache-2.0
//! From the initramfs to a complete Linux host: root, shares, modules, file systems, limits.

use crate::sys::{self, MS_BIND, MS_MOVE, MS_NODEV, MS_NOSUID, MS_RDONLY, MS_REC, MS_SHARED};
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// A directory of the host, given to us as a virtiofs device.
pub struct Share {
    pub tag: String,
    pub path: String,
    pub read_only: bool,
}

/// The first mounts, enough to find the control port.
pub fn early() -> io::Result<()> {
    for dir in ["/dev", "/proc", "/sys", "/lower", "/rw", "/new"] {
        fs::create_dir_all(dir)?;
    }
    sys::do_mount("dev", "/dev", "devtmpfs", MS_NOSUID, "")?;
    sys::do_mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV, "")?;
    sys::do_mount("sys", "/sys", "sysfs", MS_NOSUID | MS_NODEV, "")
}

/// Loads the modules of the initramfs in the order of its list, `file parameters...` a line.
///
/// One after the other: two threads used more CPU time, presumably because every module patches
/// kernel text, for which the CPUs wait for each other (see ../README.md for what was measured).
pub fn modules(log: &mut dyn FnMut(&str)) -> io::Result<()> {
    for line in fs::read_to_string("/modules/order")?.lines() {
        let (name, params) = line.split_once(' ').unwrap_or((line, ""));
        let path = format!("/modules/{name}");
        if let Err(e) = File::open(path).and_then(|f| sys::load_module(&f, params)) {
            log(&format!("module {name}: {e}"));
        }
    }
    Ok(())
}

/// The root: Debian's tree from the host, read-only, below a tmpfs that takes every change.
pub fn root() -> io::Result<()> {
    sys::do_mount("root", "/lower", "virtiofs", MS_RDONLY, "")?;
    sys::do_mount("tmpfs", "/rw", "tmpfs", 0, "mode=0755,size=75%")?;
    for dir in ["/rw/upper", "/rw/work"] {
        fs::create_dir(dir)?;
    }
    let opts = "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work";
    sys::do_mount("overlay", "/new", "overlay", 0, opts)?;
    for dir in ["/dev", "/proc", "/sys"] {
        let to = format!("/new{dir}");
        fs::create_dir_all(&to)?;
        sys::do_mount(dir, &to, "", MS_MOVE, "")?;
    }
    fs::remove_dir_all("/modules")?; // the initramfs is memory
    std::env::set_current_dir("/new")?;
    sys::do_mount(".", "/", "", MS_MOVE, "")?;
    sys::do_chroot(".")?;
    std::env::set_current_dir("/")?;
    // What systemd does too; runc and CNI count on propagation from the host's mounts.
    sys::do_mount("", "/", "", MS_REC | MS_SHARED, "")
}

/// Kernel file systems, scratch space and the host's directories at their own paths.
pub fn mounts(shares: &[Share], modules_dir: &str) -> io::Result<()> {
    // Scratch is tmpfs: fast, and overlayfs does not accept an overlay as its upper layer.
    let scratch = "mode=0755,size=75%";
    let table = [
        ("tmpfs", "/run", "tmpfs", scratch),
        ("tmpfs", "/tmp", "tmpfs", "mode=1777,size=75%"),
        ("tmpfs", "/var/tmp", "tmpfs", "mode=1777,size=75%"),
        ("tmpfs", "/var/lib/containerd", "tmpfs", scratch),
        ("tmpfs", "/var/lib/bulkhead", "tmpfs", scratch),
        ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
        (
            "devpts",
            "/dev/pts",
            "devpts",
            "gid=5,mode=620,ptmxmode=666",
        ),
        ("mqueue", "/dev/mqueue", "mqueue", ""),
        ("hugetlbfs", "/dev/hugepages", "hugetlbfs", ""),
        (
            "cgroup2",
            "/sys/fs/cgroup",
            "cgroup2",
            "nsdelegate,memory_recursiveprot",
        ),
        ("debugfs", "/sys/kernel/debug", "debugfs", ""),
        ("tracefs", "/sys/kernel/tracing", "tracefs", ""),
        ("bpf", "/sys/fs/bpf", "bpf", "mode=700"),
        ("securityfs", "/sys/kernel/security", "securityfs", ""),
    ];
    for (src, dst, fstype, opts) in table {
        // In sysfs the directories exist, or the kernel lacks that file system.
        if !dst.starts_with("/sys") {
            fs::create_dir_all(dst)?;
        } else if !Path::new(dst).is_dir() {
            continue;
        }
        sys::do_mount(src, dst, fstype, 0, opts)?;
    }
    for share in shares {
        fs::create_dir_all(&share.path)?;
        let flags = if share.read_only { MS_RDONLY } else { 0 };
        sys::do_mount(&share.tag, &share.path, "virtiofs", flags, "")?;
    }
    if !modules_dir.is_empty() {
        fs::create_dir_all("/usr/lib/modules")?;
        sys::do_mount(modules_dir, "/usr/lib/modules", "", MS_BIND, "")?;
    }
    Ok(())
}

/// Device nodes, cgroup controllers, sysctls, limits, names: as on a well set-up node.
pub fn settings(log: &mut dyn FnMut(&str)) {
    sys::raise_limits();
    sys::set_hostname("lab");
    if let Err(e) = sys::loopback_up() {
        log(&format!("loopback: {e}"));
    }
    for (link, to) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(to, link);
    }
    let mut put = |path: &str, value: &str| {
        if let Err(e) = fs::write(path, value) {
            log(&format!("{path}: {e}"));
        }
    };
    // No processes may sit in the root group once controllers are delegated to children of it,
    // except that the real root is exempt from this rule; so the list can be enabled right here.
    if let Ok(list) = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        for name in list.split_whitespace() {
            put("/sys/fs/cgroup/cgroup.subtree_control", &format!("+{name}"));
        }
    }
    put("/proc/sys/vm/max_map_count", "1048576");
    put("/proc/sys/fs/inotify/max_user_instances", "8192");
    put("/proc/sys/fs/inotify/max_user_watches", "524288");
    put("/proc/sys/net/ipv4/ip_forward", "1");
    put("/proc/sys/kernel/pid_max", "4194304");
    put("/etc/hostname", "lab\n");
    put("/etc/hosts", "127.0.0.1 localhost lab\n::1 localhost\n");
    if let Ok(id) = fs::read_to_string("/proc/sys/kernel/random/uuid") {
        put("/etc/machine-id", &id.replace('-', ""));
    }
}
