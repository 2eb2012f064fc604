//! How a process that the daemon has started becomes a jailed worker.
//!
//! It is started by `exec` (nothing of the daemon's memory is in it), has one thread, and is root.
//! It enters the pod's cgroup and network namespace and makes the worker itself, process 1 of a
//! namespace, as a child of the daemon. The worker builds an empty root, whose only contents are
//! `/proc` of its own processes and the pod's shared directories, moves there, and gives up what it
//! can do, step by step:
//!
//! 1. Namespaces for mounts, IPC, host name, cgroups: made while it is root of the host, so that
//!    they belong to the host's user namespace and no right that it keeps counts there.
//! 2. A user namespace, as the last: from here on it is nobody to the host's kernel. User ids are
//!    the same inside and outside. That is on purpose: the worker serves files to its guest, whose
//!    owners are stored as they are (0 is 0), and container roots are overlays, which cannot be
//!    shifted as a whole. What protects the host is that rights in a user namespace of one's own
//!    reach files that one can see, and nothing but the pod's is in sight; above all,
//!    `open_by_handle_at`, which finds files by number past every jail, wants a right on the host.
//! 3. All capabilities but those that serving files takes ([`KEPT`]), for good.
//! 4. `no_new_privs` and a filter for the whole process ([`bulkhead_vmm::seccomp::confine_process`] for that of a VM).
//!
//! Mounts are made by the daemon, from outside ([`super::attach`]).

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, fchdir, pivot_root, sethostname};

use super::attach::{move_to, open_tree, restrict};
use super::channel::{Begin, Birth, Channel};

/// Capabilities that a worker keeps, in its user namespace: what it takes to serve files as the
/// guest's kernel, which decides who may do what, wants them.
pub const KEPT: [u32; 8] = [
    0,  // CAP_CHOWN
    1,  // CAP_DAC_OVERRIDE
    2,  // CAP_DAC_READ_SEARCH
    3,  // CAP_FOWNER
    4,  // CAP_FSETID
    6,  // CAP_SETGID: files made for a group
    7,  // CAP_SETUID: files made for a user
    31, // CAP_SETFCAP
];
/// Open files: twice what two shares can hold (`FsLimits`), and streams.
const NOFILE: u64 = 32 << 10;
/// Of the file system that is the empty root: a few directories.
const ROOT_OPTIONS: &str = "size=64k,nr_inodes=32,mode=0755";

/// Which of the two processes goes on.
#[derive(Debug)]
pub enum Side {
    /// The one that was started; nothing is left to do.
    Starter,
    /// The worker.
    Jailed,
}

/// What could not be done.
pub type Step = (&'static str, io::Error);

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Step {
    move |error| (what, error.into())
}

/// Makes the worker and jails it, with `confine` as the last step: its filter of system calls. To be
/// called with one thread.
///
/// # Errors
/// The host refuses a step; neither process may go on.
pub fn enter(
    begin: &Begin,
    netns: Option<OwnedFd>,
    daemon: &Channel,
    confine: impl FnOnce() -> io::Result<()>,
) -> Result<Side, Step> {
    fs::write(begin.cgroup.join("cgroup.procs"), "0").map_err(step("entering the pod's cgroup"))?;
    // The daemon is spared when memory is short; this is a pod.
    let _ = fs::write("/proc/self/oom_score_adj", "0");
    match netns {
        Some(netns) => setns(netns, CloneFlags::CLONE_NEWNET)
            .map_err(step("entering the pod's network namespace"))?,
        None => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(step("a network namespace"))?;
        }
    }
    let (mut above, mut below) = UnixStream::pair().map_err(step("a pair of sockets"))?;
    let pid = fork_into_new_pids().map_err(step("a namespace for processes"))?;
    if pid != 0 {
        drop(below);
        daemon
            .send(&Birth::Made { pid }, &[])
            .map_err(step("telling the daemon"))?;
        // Not before the daemon knows whom to wait for.
        above.write_all(&[1]).map_err(step("telling the worker"))?;
        map_users(pid, &mut above).map_err(step("mapping the worker's user ids"))?;
        return Ok(Side::Starter);
    }
    drop(above);
    below
        .read_exact(&mut [0])
        .map_err(step("waiting for its maker"))?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .map_err(step("namespaces"))?;
    empty_root(begin)?;
    sethostname("worker").map_err(step("a host name"))?;
    limit().map_err(step("limits"))?;
    unshare(CloneFlags::CLONE_NEWUSER).map_err(step(
        "a user namespace (is user.max_user_namespaces 0 on this host?)",
    ))?;
    ask_for_map(&mut below).map_err(step("waiting for user ids"))?;
    give_up_rights().map_err(step("giving up capabilities"))?;
    confine().map_err(step("seccomp"))?;
    Ok(Side::Jailed)
}

/// Goes on as process 1 of a new namespace, and gives 0 there: a child of our parent's, who can
/// wait for it. Here, gives its id.
fn fork_into_new_pids() -> io::Result<i32> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    // SAFETY: no stack is given, so the child goes on with a copy of this one, as after fork; this
    // process has a single thread, so no lock can be held by another.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::c_long::from(libc::CLONE_PARENT | libc::SIGCHLD),
            0,
            0,
            0,
            0,
        )
    };
    let pid = nix::errno::Errno::result(pid)?;
    i32::try_from(pid).map_err(io::Error::other)
}

/// On the host: every id is itself in the worker's namespace. Only who has rights on the host may
/// write that.
fn map_users(pid: i32, worker: &mut UnixStream) -> io::Result<()> {
    let mut byte = [0];
    worker.read_exact(&mut byte)?;
    // All but the last, which is no id.
    let all = format!("0 0 {}\n", u32::MAX);
    fs::write(format!("/proc/{pid}/uid_map"), &all)?;
    fs::write(format!("/proc/{pid}/gid_map"), &all)?;
    worker.write_all(&byte)
}

fn ask_for_map(starter: &mut UnixStream) -> io::Result<()> {
    starter.write_all(&[1])?;
    // The end instead of an answer: it has failed, and has told the daemon why.
    starter.read_exact(&mut [0])
}

/// Moves to a root in which there is nothing but `/proc` and the shares.
fn empty_root(begin: &Begin) -> Result<(), Step> {
    let none = None::<&str>;
    // What the host or the daemon mounts from now on does not come here, nor ours there.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(step("mounts of its own"))?;
    let shares = begin
        .shares
        .iter()
        .map(|name| {
            let tree = open_tree(&begin.dir.join(name))?;
            // Its own directory is for looking only: mount points in it are the daemon's, and
            // nobody in here may put something else in their place.
            restrict(&tree, libc::MOUNT_ATTR_RDONLY)?;
            Ok((Path::new("/").join(name), tree))
        })
        .collect::<io::Result<Vec<_>>>()
        .map_err(step("the pod's shared directories"))?;
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("worker"),
        &begin.dir,
        Some("tmpfs"),
        plain,
        Some(ROOT_OPTIONS),
    )
    .map_err(step("an empty root"))?;
    chdir(&begin.dir).map_err(step("the empty root"))?;
    let made = || -> io::Result<()> {
        fs::create_dir("proc")?;
        // Of its own processes only: nothing of the kernel's settings.
        let proc =
            |options: Option<&str>| mount(Some("proc"), "proc", Some("proc"), plain, options);
        proc(Some("subset=pid")).or_else(|_| proc(None))?;
        for (path, tree) in &shares {
            let name = path.strip_prefix("/").unwrap_or(path);
            fs::create_dir(name)?;
            move_to(tree, name)?;
        }
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | plain;
        mount(none, ".", none, read_only, none)?;
        // The old root on top of the new one, then away with it.
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let old = open("/", flags, Mode::empty())?;
        pivot_root(".", ".")?;
        fchdir(old.as_fd())?;
        umount2(".", MntFlags::MNT_DETACH)?;
        chdir("/")?;
        Ok(())
    };
    made().map_err(step("the empty root"))
}

fn limit() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let files = NOFILE.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
    // A core would hold the guest's memory.
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    Ok(())
}

/// `struct __user_cap_header_struct` and `__user_cap_data_struct` of version 3.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAP_VERSION: u32 = 0x2008_0522;
/// Where the kernel's list ends for sure.
const CAP_MOST: u32 = 64;

fn give_up_rights() -> io::Result<()> {
    let prctl = |option: libc::c_int, value: u32| -> io::Result<()> {
        // SAFETY: the options used here take numbers only.
        let result = unsafe { libc::prctl(option, libc::c_ulong::from(value), 0, 0, 0) };
        nix::errno::Errno::result(result)?;
        Ok(())
    };
    for cap in (0..CAP_MOST).filter(|cap| !KEPT.contains(cap)) {
        match prctl(libc::PR_CAPBSET_DROP, cap) {
            // Behind the last that the kernel knows.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            other => other?,
        }
    }
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    let mut data = [CapData::default(); 2];
    for cap in KEPT {
        let half = &mut data[cap as usize / 32];
        half.permitted |= 1 << (cap % 32);
    }
    for half in &mut data {
        half.effective = half.permitted;
    }
    let header = CapHeader {
        version: CAP_VERSION,
        pid: 0,
    };
    // SAFETY: header and data are laid out as version 3 of the call defines, for this thread, which
    // is the only one.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_serves_files_and_nothing_else() {
        const SYS_ADMIN: u32 = 21;
        const NET_ADMIN: u32 = 12;
        const SYS_PTRACE: u32 = 19;
        const MKNOD: u32 = 27;
        const SYS_RAWIO: u32 = 17;
        for never in [SYS_ADMIN, NET_ADMIN, SYS_PTRACE, MKNOD, SYS_RAWIO] {
            assert!(!KEPT.contains(&never));
        }
    }
}
