//! Being PID 1 of a guest: mounts, and the way down.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use crate::cgroup;
use crate::log::Level;
use crate::{error, warning};

/// Mounts a guest needs, in order: type, where, flags, data.
const MOUNTS: [(&str, &str, MsFlags, &str); 9] = {
    let strict = MsFlags::MS_NOSUID
        .union(MsFlags::MS_NODEV)
        .union(MsFlags::MS_NOEXEC);
    let device = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);
    let data = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
    [
        ("proc", "/proc", strict, ""),
        ("sysfs", "/sys", strict, ""),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755"),
        ("devpts", "/dev/pts", device, "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", data, "mode=1777"),
        ("mqueue", "/dev/mqueue", strict, ""),
        ("tmpfs", "/run", data, "mode=755"),
        ("tmpfs", "/tmp", data, "mode=1777"),
        ("cgroup2", cgroup::ROOT, strict, "nsdelegate"),
    ]
};

/// Mounts that a kernel may do without.
const OPTIONAL: [(&str, &str); 2] = [
    ("securityfs", "/sys/kernel/security"),
    ("bpf", "/sys/fs/bpf"),
];

/// Mounts what a guest needs. A mount that fails is logged: the host sees what is missing.
pub fn mount_all() {
    for (kind, target, flags, data) in MOUNTS {
        let _ = fs::create_dir_all(target);
        let data = Some(data).filter(|d| !d.is_empty());
        match mount(Some(kind), target, Some(kind), flags, data) {
            // The kernel has mounted /dev itself.
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(errno) => eprintln!("agent: mount {kind} on {target}: {errno}"),
        }
    }
    for (kind, target) in OPTIONAL {
        if Path::new(target).exists() {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            let _ = mount(Some(kind), target, Some(kind), flags, None::<&str>);
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
        ("/dev/ptmx", "pts/ptmx"),
    ] {
        if fs::symlink_metadata(link).is_err() {
            let _ = std::os::unix::fs::symlink(target, link);
        }
    }
    cgroup::set_up();
}

/// Takes `agent.KEY=VALUE` from the kernel's command line.
pub fn read_command_line() {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    for (key, value) in line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("agent.")?.split_once('='))
    {
        match (key, value) {
            ("log", "error") => crate::log::set_level(Level::Error),
            ("log", "warning" | "warn") => crate::log::set_level(Level::Warning),
            ("log", "info") => crate::log::set_level(Level::Info),
            ("log", "debug") => crate::log::set_level(Level::Debug),
            _ => warning!("unknown option agent.{key}={value}"),
        }
    }
}

/// Keeps an idle guest quiet: each of these wakes it, and every wake-up is an exit for the host.
/// Measured: 13 idle exits a second without, 2 with (kernel-config/README.md).
const QUIET: [(&str, &str); 4] = [
    ("vm/compaction_proactiveness", "0"),
    ("vm/stat_interval", "10"),
    ("net/ipv4/neigh/default/interval_probe_time_ms", "60000"),
    ("net/ipv6/neigh/default/interval_probe_time_ms", "60000"),
];

/// Sets [`QUIET`]. A kernel may lack any of them.
pub fn be_quiet() {
    for (name, value) in QUIET {
        let _ = fs::write(Path::new("/proc/sys").join(name), value);
    }
}

/// Raises what limits the agent and, by inheritance, containers that set no limits.
pub fn raise_limits() {
    use nix::sys::resource::{Resource, setrlimit};
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 1 << 20, 1 << 20);
    // The agent must be the last to be killed for lack of memory.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}

/// Goes down: what is on disks is written, then the machine resets, which ends the VM.
pub fn go_down() -> ! {
    nix::unistd::sync();
    for target in ["/run", "/tmp"] {
        crate::mounts::unmount_all(Path::new(target));
    }
    let Err(errno) = reboot(RebootMode::RB_AUTOBOOT);
    error!("reboot: {errno}");
    // Not reached on a machine; if the reset fails, the host's stop ends the VM.
    loop {
        nix::unistd::pause();
    }
}
