//! What the kernel tells about itself and its processes: /proc, and the little of /sys that programs
//! look for.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::{Attributes, DirEntry};
use appkernel_hal::{clock, cpu, frames};

use super::file::File;
use super::node::{Node, kind};
use super::proc_text as text;
use super::settings;
use crate::container::visible;
use crate::net::{self, interface};
use crate::task::{self, Task};

/// Kind of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    File,
    /// A file that takes what is written to it.
    Writable,
    Link,
    Directory,
}

use What::{Directory, Link, Writable};
const FILE: What = What::File;

/// All entries of /proc; directories are there by what is in them. `#` is a process of the container
/// or a thread, `$` a number of an open file.
const PROC: &[(&str, What)] = &[
    ("self", Link),
    ("thread-self", Link),
    ("mounts", Link),
    ("net", Link),
    ("cmdline", FILE),
    ("cpuinfo", FILE),
    ("devices", FILE),
    ("diskstats", FILE),
    ("filesystems", FILE),
    ("interrupts", FILE),
    ("loadavg", FILE),
    ("meminfo", FILE),
    ("partitions", FILE),
    ("stat", FILE),
    ("swaps", FILE),
    ("uptime", FILE),
    ("version", FILE),
    ("vmstat", FILE),
    ("sys/fs/file-max", FILE),
    ("sys/fs/file-nr", FILE),
    ("sys/fs/nr_open", FILE),
    ("sys/fs/pipe-max-size", FILE),
    ("sys/kernel/cap_last_cap", FILE),
    ("sys/kernel/hostname", FILE),
    ("sys/kernel/domainname", FILE),
    ("sys/kernel/msgmax", FILE),
    ("sys/kernel/msgmnb", FILE),
    ("sys/kernel/msgmni", FILE),
    ("sys/kernel/ngroups_max", FILE),
    ("sys/kernel/osrelease", FILE),
    ("sys/kernel/ostype", FILE),
    ("sys/kernel/overflowgid", FILE),
    ("sys/kernel/overflowuid", FILE),
    ("sys/kernel/pid_max", FILE),
    ("sys/kernel/random/boot_id", FILE),
    ("sys/kernel/random/entropy_avail", FILE),
    ("sys/kernel/random/uuid", FILE),
    ("sys/kernel/randomize_va_space", FILE),
    ("sys/kernel/sched_autogroup_enabled", FILE),
    ("sys/kernel/sem", FILE),
    ("sys/kernel/shmall", FILE),
    ("sys/kernel/shmmax", FILE),
    ("sys/kernel/shmmni", FILE),
    ("sys/kernel/tainted", FILE),
    ("sys/kernel/threads-max", FILE),
    ("sys/kernel/version", FILE),
    ("sys/net/core/somaxconn", FILE),
    ("sys/net/ipv4/ip_local_port_range", FILE),
    ("sys/net/ipv4/tcp_max_syn_backlog", FILE),
    ("sys/vm/max_map_count", FILE),
    ("sys/vm/mmap_min_addr", FILE),
    ("sys/vm/overcommit_memory", FILE),
    ("sys/vm/overcommit_ratio", FILE),
    ("sys/vm/swappiness", FILE),
    ("sysvipc/msg", FILE),
    ("sysvipc/sem", FILE),
    ("sysvipc/shm", FILE),
    ("#/auxv", FILE),
    ("#/cgroup", FILE),
    ("#/cmdline", FILE),
    ("#/comm", Writable),
    ("#/coredump_filter", FILE),
    ("#/cpuset", FILE),
    ("#/cwd", Link),
    ("#/environ", FILE),
    ("#/exe", Link),
    ("#/fd/$", Link),
    ("#/fd", Directory),
    ("#/fdinfo/$", FILE),
    ("#/fdinfo", Directory),
    ("#/gid_map", FILE),
    ("#/io", FILE),
    ("#/limits", FILE),
    ("#/loginuid", Writable),
    ("#/maps", FILE),
    ("#/mountinfo", FILE),
    ("#/mounts", FILE),
    ("#/net/if_inet6", FILE),
    ("#/net/dev", FILE),
    ("#/net/route", FILE),
    ("#/net/tcp", FILE),
    ("#/net/tcp6", FILE),
    ("#/net/udp", FILE),
    ("#/net/udp6", FILE),
    ("#/net/unix", FILE),
    ("#/ns/cgroup", Link),
    ("#/ns/ipc", Link),
    ("#/ns/mnt", Link),
    ("#/ns/net", Link),
    ("#/ns/pid", Link),
    ("#/ns/user", Link),
    ("#/ns/uts", Link),
    ("#/oom_adj", Writable),
    ("#/oom_score", FILE),
    ("#/oom_score_adj", Writable),
    ("#/personality", FILE),
    ("#/root", Link),
    ("#/schedstat", FILE),
    ("#/sessionid", FILE),
    ("#/setgroups", FILE),
    ("#/smaps", FILE),
    ("#/smaps_rollup", FILE),
    ("#/stat", FILE),
    ("#/statm", FILE),
    ("#/status", FILE),
    ("#/task/#/children", FILE),
    ("#/task/#/cmdline", FILE),
    ("#/task/#/comm", Writable),
    ("#/task/#/maps", FILE),
    ("#/task/#/schedstat", FILE),
    ("#/task/#/stat", FILE),
    ("#/task/#/status", FILE),
    ("#/task/#/wchan", FILE),
    ("#/timerslack_ns", FILE),
    ("#/uid_map", FILE),
    ("#/wchan", FILE),
];

/// All entries of /sys; `@` is a network interface.
const SYS: &[(&str, What)] = &[
    ("class/net/@/address", FILE),
    ("class/net/@/addr_len", FILE),
    ("class/net/@/carrier", FILE),
    ("class/net/@/flags", FILE),
    ("class/net/@/ifindex", FILE),
    ("class/net/@/mtu", FILE),
    ("class/net/@/operstate", FILE),
    ("class/net/@/speed", FILE),
    ("class/net/@/statistics/rx_bytes", FILE),
    ("class/net/@/statistics/rx_packets", FILE),
    ("class/net/@/statistics/tx_bytes", FILE),
    ("class/net/@/statistics/tx_packets", FILE),
    ("class/net/@/tx_queue_len", FILE),
    ("class/net/@/type", FILE),
    ("devices/system/cpu/online", FILE),
    ("devices/system/cpu/possible", FILE),
    ("devices/system/cpu/present", FILE),
    ("devices/system/cpu/cpu0/online", FILE),
    ("devices/system/node/online", FILE),
    ("fs/cgroup/cgroup.procs", FILE),
    ("fs/cgroup/cpu.max", FILE),
    ("fs/cgroup/cpu.stat", FILE),
    ("fs/cgroup/cpu.weight", FILE),
    ("fs/cgroup/memory.current", FILE),
    ("fs/cgroup/memory.events", FILE),
    ("fs/cgroup/memory.max", FILE),
    ("fs/cgroup/memory.stat", FILE),
    ("fs/cgroup/pids.current", FILE),
    ("fs/cgroup/pids.max", FILE),
    ("kernel/mm/transparent_hugepage/enabled", FILE),
];

const CGROUP: &str = "fs/cgroup";

/// Which tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tree {
    Proc,
    Sys,
}

impl Tree {
    /// All its entries.
    fn table(self) -> impl Iterator<Item = (&'static str, What)> {
        let (own, constant) = match self {
            Self::Proc => (PROC, settings::PROC),
            Self::Sys => (SYS, settings::SYS),
        };
        let constant = constant.iter().map(|(name, _)| (*name, FILE));
        own.iter().copied().chain(constant)
    }
}

/// A file, directory or link.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    tree: Tree,
    at: &'static str,
    /// Number of the task (the kernel's own), where it is about one.
    id: u32,
    /// Number of the open file, or of the interface.
    fd: u32,
}

/// What is behind `at` of a name of the table.
fn below(name: &'static str, at: &str) -> Option<(&'static str, usize)> {
    let rest = if at.is_empty() {
        name
    } else {
        name.strip_prefix(at)?.strip_prefix('/')?
    };
    let first = rest.split('/').next()?;
    let end = name.len() - rest.len() + first.len();
    (!first.is_empty()).then_some((first, end))
}

/// A number written as the kernel writes it: no sign, no leading zeros.
fn number(name: &[u8]) -> Option<u32> {
    let text = core::str::from_utf8(name).ok()?;
    let number: u32 = text.parse().ok()?;
    (format!("{number}") == text).then_some(number)
}

/// Whether a link stands for an open file that is more than a path: a pipe, a socket, a terminal.
pub fn is_open_file(node: &Node) -> bool {
    let Node::Proc(entry) = node else {
        return false;
    };
    entry.open_file().is_some_and(|file| !file.has_path())
}

impl Entry {
    /// Root of /proc.
    pub fn root() -> Self {
        Self {
            tree: Tree::Proc,
            at: "",
            id: 0,
            fd: 0,
        }
    }

    /// Root of /sys.
    pub fn sys() -> Self {
        Self {
            tree: Tree::Sys,
            ..Self::root()
        }
    }

    /// What a container has at /sys/fs/cgroup: its own.
    pub fn cgroup() -> Self {
        Self {
            at: CGROUP,
            ..Self::sys()
        }
    }

    /// Number of the file system.
    pub fn device(&self) -> u64 {
        match self.tree {
            Tree::Proc => 0x20,
            Tree::Sys => 0x21,
        }
    }

    /// Type of the file system.
    pub fn magic(&self) -> u64 {
        match self.tree {
            Tree::Proc => 0x9fa0,
            Tree::Sys if self.at.starts_with(CGROUP) => 0x6367_7270,
            Tree::Sys => 0x6265_6572,
        }
    }

    /// Number in it: made of what it is.
    pub fn number(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for byte in self.at.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        (hash ^ u64::from(self.id) << 20 ^ u64::from(self.fd)) >> 8 | 1
    }

    fn what(&self) -> What {
        let mut table = self.tree.table();
        let found = table.find(|(name, _)| *name == self.at);
        found.map_or(Directory, |(_, what)| what)
    }

    fn is_thread(&self) -> bool {
        self.at.starts_with("#/task/#")
    }

    fn task(&self) -> Option<Arc<Task>> {
        task::find(self.id)
    }

    /// The open file that it is a link to.
    pub fn open_file(&self) -> Option<Arc<File>> {
        if self.at != "#/fd/$" {
            return None;
        }
        self.task()?.file(self.fd.cast_signed()).ok()
    }

    /// Kind and permissions.
    pub fn mode(&self) -> u32 {
        match self.what() {
            What::File => kind::REGULAR | 0o444,
            Writable => kind::REGULAR | 0o644,
            Link => kind::LINK | 0o777,
            Directory => kind::DIRECTORY | 0o555,
        }
    }

    /// Attributes.
    pub fn attributes(&self) -> Attributes {
        let now = clock::realtime_ns();
        let (uid, gid) = self.task().map_or((0, 0), |task| {
            let credentials = task.credentials.lock();
            (credentials.euid, credentials.egid)
        });
        Attributes {
            ino: self.number(),
            mode: self.mode(),
            nlink: 1,
            uid,
            gid,
            block_size: 1024,
            times: [(now / 1_000_000_000, (now % 1_000_000_000) as u32); 3],
            ..Attributes::default()
        }
    }

    /// What has that name in it.
    pub fn lookup(&self, name: &[u8]) -> Result<Self, Errno> {
        let container = Arc::clone(&task::current().container);
        for (entry, _) in self.tree.table() {
            let Some((first, end)) = below(entry, self.at) else {
                continue;
            };
            let at = entry.get(..end).unwrap_or_default();
            let (mut id, mut fd) = (self.id, self.fd);
            match first {
                "#" => {
                    let Some(found) = number(name).map(|n| container.id(n)) else {
                        continue;
                    };
                    let Some(task) = task::find(found) else {
                        continue;
                    };
                    // Below `task` are the threads of the process only.
                    let wanted = if self.at.is_empty() {
                        task.process == found
                    } else {
                        self.task().is_some_and(|t| t.process == task.process)
                    };
                    if !wanted {
                        continue;
                    }
                    id = found;
                }
                "$" => {
                    let Some(n) = number(name) else { continue };
                    let there = self.task().is_some_and(|t| t.file(n.cast_signed()).is_ok());
                    if !there {
                        continue;
                    }
                    fd = n;
                }
                "@" => {
                    let links = interface::links();
                    let Some(link) = links.iter().find(|l| l.name.as_bytes() == name) else {
                        continue;
                    };
                    fd = link.index;
                }
                first if first.as_bytes() == name => {}
                _ => continue,
            }
            return Ok(Self {
                tree: self.tree,
                at,
                id,
                fd,
            });
        }
        Err(Errno::ENOENT)
    }

    /// What is in it.
    pub fn entries(&self) -> Vec<DirEntry> {
        let mut all: Vec<DirEntry> = Vec::new();
        let mut add = |name: String, entry: Self| {
            if all.iter().all(|e| e.name != name.as_bytes()) {
                all.push(DirEntry {
                    ino: entry.number(),
                    offset: 0,
                    kind: (entry.mode() >> 12) as u8,
                    name: name.into_bytes(),
                });
            }
        };
        add(String::from("."), *self);
        add(String::from(".."), *self);
        let container = Arc::clone(&task::current().container);
        for (entry, _) in self.tree.table() {
            let Some((first, end)) = below(entry, self.at) else {
                continue;
            };
            let at = entry.get(..end).unwrap_or_default();
            match first {
                "#" => {
                    let process = self
                        .task()
                        .filter(|_| !self.at.is_empty())
                        .map(|t| t.process);
                    for task in task::living() {
                        let wanted = match process {
                            None => task.process == task.id,
                            Some(process) => task.process == process,
                        };
                        if container.has(task.id) && wanted {
                            let entry = Self {
                                at,
                                id: task.id,
                                ..*self
                            };
                            add(format!("{}", visible(task.id)), entry);
                        }
                    }
                }
                "$" => {
                    let numbers = self
                        .task()
                        .map(|t| t.files().lock().numbers())
                        .unwrap_or_default();
                    for fd in numbers {
                        add(format!("{fd}"), Self { at, fd, ..*self });
                    }
                }
                "@" => {
                    for link in interface::links() {
                        let fd = link.index;
                        add(link.name, Self { at, fd, ..*self });
                    }
                }
                _ => add(String::from(first), Self { at, ..*self }),
            }
        }
        all
    }

    /// Where the link leads.
    pub fn read_link(&self) -> Result<Vec<u8>, Errno> {
        let me = task::current();
        Ok(match self.at {
            "self" => format!("{}", visible(me.process)).into_bytes(),
            "thread-self" => {
                format!("{}/task/{}", visible(me.process), visible(me.id)).into_bytes()
            }
            "mounts" => b"self/mounts".to_vec(),
            "net" => b"self/net".to_vec(),
            "#/root" => self.place(|p| match &p.root[..] {
                b"" => b"/".to_vec(),
                root => root.to_vec(),
            })?,
            "#/exe" => self.place(|p| p.exe.clone())?,
            "#/cwd" => self.place(|p| p.cwd.clone())?,
            "#/fd/$" => self.open_file().ok_or(Errno::ENOENT)?.name(),
            // Names only: there is nothing to enter.
            at => match at.strip_prefix("#/ns/") {
                Some(kind) => format!("{kind}:[{}]", self.namespace()).into_bytes(),
                None => return Err(Errno::EINVAL),
            },
        })
    }

    /// Number of a namespace: of the machine, or of the container.
    fn namespace(&self) -> u64 {
        const FIRST: u64 = 4_026_531_835;
        const OF_CONTAINERS: u64 = 4_026_532_000;
        match self.at {
            "#/ns/user" => FIRST + 2,
            "#/ns/net" => FIRST + 5,
            at => {
                let container = self.task().map_or(0, |t| t.container.number);
                OF_CONTAINERS + u64::from(container) * 8 + at.len() as u64 % 8
            }
        }
    }

    fn place<T>(&self, f: impl FnOnce(&task::Place) -> T) -> Result<T, Errno> {
        let task = self.task().ok_or(Errno::ENOENT)?;
        let place = task.place.lock();
        Ok(f(&place))
    }

    /// Reads its text, which is made anew.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<usize, Errno> {
        let text = self.text()?;
        let from = usize::try_from(offset).ok().and_then(|at| text.get(at..));
        let from = from.unwrap_or_default();
        let count = from.len().min(to.len());
        for (slot, byte) in to.iter_mut().zip(from) {
            *slot = *byte;
        }
        Ok(count)
    }

    /// All of its text.
    pub fn text(&self) -> Result<Vec<u8>, Errno> {
        let constant = match self.tree {
            Tree::Proc => settings::PROC,
            Tree::Sys => settings::SYS,
        };
        if let Some(text) = settings::find(constant, self.at) {
            return Ok(text.as_bytes().to_vec());
        }
        if self.at.starts_with('#') {
            let task = self.task().ok_or(Errno::ESRCH)?;
            if self.at == "#/fdinfo/$" {
                let file = task.file(self.fd.cast_signed())?;
                return Ok(text::of_file(&file).into_bytes());
            }
            let name = self.at.rsplit('/').next().unwrap_or_default();
            let name = if self.at.starts_with("#/net/") {
                self.at.get(2..).unwrap_or_default()
            } else {
                name
            };
            return text::of_task(name, &task, self.is_thread()).ok_or(Errno::EINVAL);
        }
        if let Some(name) = self.at.strip_prefix("class/net/@/") {
            let text = net::text::sys(name, self.fd).ok_or(Errno::ENODEV)?;
            return Ok(text.into_bytes());
        }
        text::of_machine(self.at).ok_or(Errno::EINVAL)
    }

    /// Whether it takes writes.
    pub fn may_write(&self) -> Result<(), Errno> {
        match self.what() {
            Writable => Ok(()),
            _ => Err(Errno::EACCES),
        }
    }

    /// Takes what a program writes to it.
    pub fn write(&self, from: &[u8]) -> Result<usize, Errno> {
        self.may_write()?;
        let task = self.task().ok_or(Errno::ESRCH)?;
        if self.at.ends_with("comm") {
            let name = from.strip_suffix(b"\n").unwrap_or(from);
            *task.name.lock() = name.iter().copied().take(15).collect();
        }
        if self.at.ends_with("oom_score_adj") {
            let text = core::str::from_utf8(from).map_err(|_| Errno::EINVAL)?;
            let wanted: i32 = text.trim().parse().map_err(|_| Errno::EINVAL)?;
            if !(-1000..=1000).contains(&wanted) {
                return Err(Errno::EINVAL);
            }
            let root = task::current().credentials.lock().is_root();
            let mut place = task.place.lock();
            if wanted < place.oom_score_adj && !root {
                return Err(Errno::EACCES);
            }
            place.oom_score_adj = wanted;
        }
        // The others change nothing here.
        Ok(from.len())
    }
}

/// Figures of the machine that more than one file shows.
pub(super) struct Machine {
    pub total_kib: u64,
    pub free_kib: u64,
    pub up_ns: u64,
}

pub(super) fn machine() -> Machine {
    let (total, free) = frames::statistics();
    Machine {
        total_kib: total as u64 * 4,
        free_kib: free as u64 * 4,
        up_ns: clock::monotonic_ns(),
    }
}

/// A random UUID.
pub(super) fn uuid() -> String {
    let mut bytes = [0u8; 16];
    cpu::random(&mut bytes);
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::new();
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text.push('\n');
    text
}
