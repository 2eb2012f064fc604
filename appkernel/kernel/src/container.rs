//! What the programs of one container share: their view of files, names and numbers.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_core::fair::Share;
use appkernel_hal::sync::Mutex;

use crate::fs::node::Node;
use crate::fs::{dev, memory, proc};

/// Bits of a task's number that its programs see; the rest is the container's number.
const PID_BITS: u32 = 22;
/// Largest number of a process.
const PID_MAX: u32 = (1 << PID_BITS) - 1;
/// Containers of one kernel, at most.
pub const MAX_CONTAINERS: u32 = 1 << (32 - PID_BITS);

/// The number of a task as its container's programs see it.
pub const fn visible(id: u32) -> u32 {
    id & PID_MAX
}

/// Who made a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Whoever started the container: programs cannot change it.
    Host,
    /// A program.
    Program,
    /// A program, and it goes if nobody uses it until it is asked for again.
    Expiring,
}

/// A file system at a place.
#[derive(Clone)]
pub struct Mount {
    /// Canonical path.
    pub at: Vec<u8>,
    pub root: Node,
    pub read_only: bool,
    pub origin: Origin,
    /// It stays read-only, as what it shows is.
    pub fixed_read_only: bool,
    /// For /proc/mounts: source, type, options.
    pub shown: (String, String, String),
}

/// What a container has of memory, in pages.
#[derive(Debug)]
pub struct Charge {
    /// What it may have.
    most: AtomicU64,
    /// A number that it does not have more than: what was counted last, and each page since.
    seen: AtomicU64,
    /// Pages of files in memory.
    files: AtomicU64,
}

impl Default for Charge {
    fn default() -> Self {
        Self {
            most: AtomicU64::new(u64::MAX),
            seen: AtomicU64::new(0),
            files: AtomicU64::new(0),
        }
    }
}

impl Charge {
    /// Sets what it may have; counted anew at the next page.
    pub fn limit(&self, most: u64) {
        self.most.store(most, Ordering::Relaxed);
        self.seen.store(u64::MAX >> 1, Ordering::Relaxed);
    }

    /// What it may have, if that is limited.
    pub fn most(&self) -> Option<u64> {
        let most = self.most.load(Ordering::Relaxed);
        (most != u64::MAX).then_some(most)
    }

    /// So many pages more.
    pub fn add(&self, pages: u64) {
        self.seen.fetch_add(pages, Ordering::Relaxed);
    }

    /// One page more of files in memory, if they may have it.
    pub fn add_to_files(&self) -> bool {
        if self.in_files() >= self.most.load(Ordering::Relaxed) {
            return false;
        }
        self.files.fetch_add(1, Ordering::Relaxed);
        self.add(1);
        true
    }

    /// Pages of files in memory were freed.
    pub fn take_from_files(&self, pages: u64) {
        self.files.fetch_sub(pages, Ordering::Relaxed);
    }

    /// Pages of files in memory.
    pub fn in_files(&self) -> u64 {
        self.files.load(Ordering::Relaxed)
    }

    /// It was counted.
    pub fn counted(&self, pages: u64) {
        self.seen.store(pages, Ordering::Relaxed);
    }

    /// Whether it may have more than it may: whoever asks counts then.
    pub fn is_over(&self) -> bool {
        let (seen, most) = self.figures();
        seen > most
    }

    /// What was counted last, with what came since, and what it may have.
    pub fn figures(&self) -> (u64, u64) {
        let most = self.most.load(Ordering::Relaxed);
        (self.seen.load(Ordering::Relaxed), most)
    }
}

/// A container.
pub struct Container {
    /// Upper bits of its tasks' numbers.
    pub number: u32,
    pub name: String,
    pub hostname: Mutex<Vec<u8>>,
    pub domainname: Mutex<Vec<u8>>,
    mounts: Mutex<Vec<Mount>>,
    next: AtomicU32,
    /// Nanoseconds its programs had the CPU.
    pub cpu_ns: AtomicU64,
    /// Its part of the CPU.
    pub share: Mutex<Share>,
    /// Its memory.
    pub charge: Arc<Charge>,
    /// Tasks it may have.
    pub pids_max: AtomicU64,
    /// Programs that were ended for lack of memory.
    pub oom_kills: AtomicU64,
    /// Its System V objects.
    pub ipc: Mutex<crate::syscall::sysv::Ipc>,
}

impl Container {
    /// A container with a root and nothing else.
    pub fn new(number: u32, name: &str, root: Node, read_only: bool) -> Self {
        let root = Mount {
            at: b"/".to_vec(),
            root,
            read_only,
            origin: Origin::Host,
            fixed_read_only: read_only,
            shown: (
                String::from("share"),
                String::from("virtiofs"),
                String::from("relatime"),
            ),
        };
        Self {
            number,
            name: String::from(name),
            hostname: Mutex::new(b"bulkhead".to_vec()),
            domainname: Mutex::new(b"(none)".to_vec()),
            mounts: Mutex::new(alloc::vec![root]),
            next: AtomicU32::new(1),
            cpu_ns: AtomicU64::new(0),
            share: Mutex::default(),
            charge: Arc::default(),
            pids_max: AtomicU64::new(u64::MAX),
            oom_kills: AtomicU64::new(0),
            ipc: Mutex::default(),
        }
    }

    /// The root of what is mounted at a canonical path, and whether it cannot be written.
    pub fn mount_at(&self, path: &[u8]) -> Option<(Node, bool)> {
        let mounts = self.mounts.lock();
        // The last one hides those before it.
        let mount = mounts.iter().rev().find(|m| m.at == path)?;
        Some((mount.root.clone(), mount.read_only))
    }

    /// Whether the mount that a canonical path is on cannot be written.
    pub fn is_read_only(&self, path: &[u8]) -> bool {
        let mounts = self.mounts.lock();
        let holds = |m: &&Mount| {
            m.at == b"/"
                || path
                    .strip_prefix(&m.at[..])
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        // The longest that fits; of several at one place the last.
        let mount = mounts.iter().filter(holds).max_by_key(|m| m.at.len());
        path.starts_with(b"/") && mount.is_some_and(|m| m.read_only)
    }

    /// Mounts something.
    pub fn mount(&self, mount: Mount) {
        self.mounts.lock().push(mount);
    }

    /// The last mount at a place, if a program made it.
    fn own<T>(&self, path: &[u8], f: impl FnOnce(&mut Vec<Mount>, usize) -> T) -> Result<T, Errno> {
        let mut mounts = self.mounts.lock();
        let at = mounts.iter().rposition(|m| m.at == path);
        let at = at.ok_or(Errno::EINVAL)?;
        match mounts.get(at).map(|m| m.origin) {
            Some(Origin::Host) => Err(Errno::EPERM),
            _ => Ok(f(&mut mounts, at)),
        }
    }

    /// Makes a program's mount read-only or writable.
    ///
    /// # Errors
    /// `EINVAL`: nothing is mounted there; `EPERM`: no program mounted it.
    pub fn remount(&self, path: &[u8], read_only: bool) -> Result<u64, Errno> {
        self.own(path, |mounts, at| {
            if let Some(mount) = mounts.get_mut(at) {
                mount.read_only = read_only || mount.fixed_read_only;
            }
            0
        })
    }

    /// Marks a program's mount; whether it was not marked before.
    pub fn expire(&self, path: &[u8]) -> bool {
        self.own(path, |mounts, at| {
            mounts.get_mut(at).is_some_and(|mount| {
                core::mem::replace(&mut mount.origin, Origin::Expiring) != Origin::Expiring
            })
        })
        .unwrap_or(false)
    }

    /// Takes a program's mount away.
    ///
    /// # Errors
    /// As `remount`; `EBUSY`: something is mounted in it.
    pub fn unmount(&self, path: &[u8]) -> Result<u64, Errno> {
        let gone = self.own(path, |mounts, at| {
            let inside = |m: &Mount| {
                m.at.strip_prefix(path)
                    .is_some_and(|rest| rest.starts_with(b"/"))
            };
            let later = mounts.get(at + 1..).unwrap_or_default();
            if later.iter().any(inside) {
                return Err(Errno::EBUSY);
            }
            Ok(mounts.remove(at))
        })??;
        drop(gone);
        Ok(0)
    }

    /// All mounts, for /proc/mounts.
    pub fn mounts(&self) -> Vec<Mount> {
        self.mounts.lock().clone()
    }

    /// Names of mounts directly in a directory, which must be seen there.
    pub fn mounted_names(&self, directory: &[u8]) -> Vec<Vec<u8>> {
        let prefix = if directory == b"/" { b"" } else { directory };
        let mounts = self.mounts.lock();
        let names = mounts.iter().filter_map(|m| {
            let name = m.at.strip_prefix(prefix)?.strip_prefix(b"/")?;
            (!name.is_empty() && !name.contains(&b'/')).then(|| name.to_vec())
        });
        names.collect()
    }

    /// What every container has: /proc, /sys, /dev, /dev/pts, /dev/shm.
    pub fn mount_usual(&self) {
        let new = |bytes, mode| memory::new_for(&self.charge, Some(bytes), mode);
        let dev = new(64 << 10, 0o755);
        dev::populate(&dev);
        let pts = new(64 << 10, 0o755);
        let shm = new(64 << 20, 0o1777);
        for (at, root, kind) in [
            ("/proc", Node::Proc(proc::Entry::root()), "proc"),
            ("/sys", Node::Proc(proc::Entry::sys()), "sysfs"),
            (
                "/sys/fs/cgroup",
                Node::Proc(proc::Entry::cgroup()),
                "cgroup2",
            ),
            ("/dev", Node::Memory(dev), "tmpfs"),
            ("/dev/pts", Node::Memory(pts), "devpts"),
            ("/dev/shm", Node::Memory(shm), "tmpfs"),
        ] {
            self.mount(Mount {
                at: at.as_bytes().to_vec(),
                root,
                read_only: false,
                origin: Origin::Host,
                fixed_read_only: false,
                shown: (
                    String::from(kind),
                    String::from(kind),
                    String::from("nosuid"),
                ),
            });
        }
    }

    /// A number for a new task, which `taken` does not know yet.
    pub fn new_id(&self, taken: impl Fn(u32) -> bool) -> u32 {
        loop {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            if next >= PID_MAX {
                // Low numbers are not given out again soon, as on Linux.
                self.next.store(300, Ordering::Relaxed);
            }
            let id = self.id(next);
            if next > 0 && !taken(id) {
                return id;
            }
        }
    }

    /// The task's number from the one that programs see.
    pub fn id(&self, visible: u32) -> u32 {
        self.number << PID_BITS | visible & PID_MAX
    }

    /// Whether a task is one of it.
    pub fn has(&self, id: u32) -> bool {
        id >> PID_BITS == self.number
    }

    /// Makes what is mounted go: files in memory are freed.
    pub fn unmount_all(&self) {
        let mounts = core::mem::take(&mut *self.mounts.lock());
        drop(mounts);
    }
}

/// The containers that are there, by number.
static ALL: Mutex<Vec<Arc<Container>>> = Mutex::new(Vec::new());

/// Makes a container of a free number.
///
/// # Errors
/// `EAGAIN` if there are too many.
pub fn make(name: &str, root: Node, read_only: bool) -> Result<Arc<Container>, Errno> {
    let mut all = ALL.lock();
    // Zero is the kernel's own, and that of a first program named on the command line.
    let number = (1..MAX_CONTAINERS)
        .find(|n| all.iter().all(|c| c.number != *n))
        .ok_or(Errno::EAGAIN)?;
    let container = Arc::new(Container::new(number, name, root, read_only));
    all.push(Arc::clone(&container));
    Ok(container)
}

/// Forgets a container whose tasks have all ended.
pub fn remove(container: &Arc<Container>) {
    ALL.lock().retain(|c| !Arc::ptr_eq(c, container));
    container.unmount_all();
}
