//! Starting a further process in a container, by ourselves.
//!
//! Not by libcontainer 0.7, because its tenant builder leaves the container's seccomp profile out
//! of the process it starts and does not join the container's user namespace.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use bulkhead_protocol::rpc::Code;
use libcontainer::capabilities;
use libcontainer::oci_spec::runtime::{LinuxSeccomp, Process};
use libcontainer::syscall::syscall::create_syscall;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::{Failure, payload};

/// The job.
#[derive(Debug, Serialize, Deserialize)]
pub struct Exec {
    /// The container's first process.
    pub init: i32,
    /// The process to start.
    pub process: Process,
    /// The container's cgroup.
    pub cgroup: Option<PathBuf>,
    /// The container's seccomp profile.
    pub seccomp: Option<LinuxSeccomp>,
}

/// Namespaces a process may be in, as /proc names them.
const NAMESPACES: [(&str, CloneFlags); 8] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("mnt", CloneFlags::CLONE_NEWNS),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("net", CloneFlags::CLONE_NEWNET),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("time", CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)),
];

fn step<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> Result<T, Failure> {
    result.map_err(|error| Failure::internal(format!("exec: {what}: {error}")))
}

/// Does it. Gives the pid of the process, which runs its program, and the master of its terminal.
pub fn run(job: Exec) -> Result<(i32, Option<OwnedFd>), Failure> {
    let process = &job.process;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Failure {
            code: Code::InvalidArgument,
            message: "exec: process.args is empty".to_owned(),
        });
    }
    // A pidfd cannot come to mean another process.
    let pidfd = step("find the container's process", pidfd_open(job.init))?;
    let namespaces = step(
        "look at the container's namespaces",
        foreign_namespaces(job.init),
    )?;
    // Before /proc and /sys/fs/cgroup are the container's. The new process joins by this: the
    // helper stays out, so that it is not seen, frozen or killed with the container.
    let cgroup = match &job.cgroup {
        None => None,
        Some(path) => Some(step(
            "open the container's cgroup",
            File::options().write(true).open(path.join("cgroup.procs")),
        )?),
    };
    if let Some(score) = process.oom_score_adj() {
        step(
            "set the oom score",
            std::fs::write("/proc/self/oom_score_adj", score.to_string()),
        )?;
    }
    // Processes of the container must not look into us while we are half inside.
    // SAFETY: prctl(PR_SET_DUMPABLE) takes no pointers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    // SAFETY: setns takes a descriptor, which is open, and flags.
    let joined = unsafe { libc::setns(pidfd.as_raw_fd(), namespaces.bits()) };
    step("join the container's namespaces", Errno::result(joined))?;
    let in_user_namespace = namespaces.contains(CloneFlags::CLONE_NEWUSER);

    let terminal = if process.terminal().unwrap_or(false) {
        Some(step("open a terminal in the container", open_terminal())?)
    } else {
        None
    };
    let (mut errors, error_pipe) = step(
        "make a pipe",
        nix::unistd::pipe2(OFlag::O_CLOEXEC).map(|(r, w)| (File::from(r), File::from(w))),
    )?;
    // CLONE_PARENT: a child of the agent, not of this helper. One thread, so this is a fork.
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
    if pid == 0 {
        let terminal = terminal.as_ref().map(|t| t.slave.as_fd().as_raw_fd());
        let failure = child(&job, cgroup, terminal, in_user_namespace);
        let _ = (&error_pipe)
            .write_all(format!("{} {}", failure.code as i32, failure.message).as_bytes());
        // SAFETY: ends this forked process without running its parent's exit handlers.
        unsafe { libc::_exit(127) }
    }
    let pid = step(
        "fork",
        if pid < 0 {
            Err(Errno::last())
        } else {
            i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)
        },
    )?;
    drop(error_pipe);
    // Ends empty when the program is executed.
    let mut message = String::new();
    step("read the result", errors.read_to_string(&mut message))?;
    if let Some((code, message)) = message.split_once(' ') {
        return Err(Failure {
            code: code
                .parse::<i32>()
                .ok()
                .and_then(|c| Code::try_from(c).ok())
                .unwrap_or(Code::Internal),
            message: message.to_owned(),
        });
    }
    Ok((pid, terminal.map(|t| t.master)))
}

/// In the new process, up to its program. Returns only on failure.
fn child(
    job: &Exec,
    cgroup: Option<File>,
    terminal: Option<RawFd>,
    in_user_namespace: bool,
) -> Failure {
    if let Some(mut cgroup) = cgroup
        && let Err(failure) = step("join the container's cgroup", cgroup.write_all(b"0"))
    {
        return failure;
    }
    match prepare_and_execute(job, terminal, in_user_namespace) {
        Ok(message) => Failure {
            code: payload::code_of(&message),
            message,
        },
        Err(failure) => failure,
    }
}

fn prepare_and_execute(
    job: &Exec,
    terminal: Option<RawFd>,
    in_user_namespace: bool,
) -> Result<String, Failure> {
    let process = &job.process;
    let syscall = create_syscall();
    let user = process.user();
    let empty = Vec::new();
    let args = process.args().as_ref().unwrap_or(&empty);
    let env = process.env().as_ref().unwrap_or(&empty);

    step("start a session", nix::unistd::setsid())?;
    if let Some(slave) = terminal {
        step("set up the terminal", attach_terminal(slave, user.uid()))?;
    }
    for rlimit in process.rlimits().iter().flatten() {
        step("set a resource limit", syscall.set_rlimit(rlimit))?;
    }
    let umask = user.umask().unwrap_or(0o022);
    nix::sys::stat::umask(Mode::from_bits_truncate(umask));

    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        step("set no_new_privs", nix::sys::prctl::set_no_new_privs())?;
    } else {
        // Without no_new_privs only a privileged process may load a filter.
        load_seccomp(job)?;
    }
    // As root first: the directory may be closed to the user. If that is what root cannot do
    // (a file system that squashes root), the user tries below.
    let entered = std::env::set_current_dir(process.cwd());
    if in_user_namespace {
        // Root of the container's user namespace, before dropping to the user.
        step("become root of the user namespace", set_ids(0, 0))?;
    }
    set_groups(user.additional_gids().as_deref().unwrap_or_default())?;
    step("change user", set_ids(user.uid(), user.gid()))?;
    step(
        "reset capabilities",
        capabilities::reset_effective(syscall.as_ref()),
    )?;
    if let Some(caps) = process.capabilities() {
        step(
            "drop capabilities",
            capabilities::drop_privileges(caps, syscall.as_ref()),
        )?;
    }
    if entered.is_err() {
        std::env::set_current_dir(process.cwd()).map_err(|error| Failure {
            code: Code::FailedPrecondition,
            message: format!(
                "exec: working directory {:?}: {error}",
                process.cwd().display()
            ),
        })?;
    }
    // A directory outside the container's root shows as "(unreachable)...".
    let inside = std::env::current_dir().is_ok_and(|d| d.is_absolute());
    if !inside {
        return Err(Failure::internal(
            "exec: the working directory is outside of the container",
        ));
    }
    let path = match payload::find(args.first().map_or("", String::as_str), env) {
        Ok(path) => path,
        Err(message) => return Ok(message),
    };
    if no_new_privileges {
        load_seccomp(job)?;
    }
    Ok(payload::execute(&path, args, Some(env)))
}

fn load_seccomp(job: &Exec) -> Result<(), Failure> {
    let Some(seccomp) = &job.seccomp else {
        return Ok(());
    };
    #[cfg(feature = "seccomp")]
    {
        let notify = step(
            "load the seccomp profile",
            libcontainer::seccomp::initialize_seccomp(seccomp),
        )?;
        if notify.is_some() {
            return Err(Failure::internal(
                "exec: seccomp profiles with SCMP_ACT_NOTIFY are not supported here",
            ));
        }
        Ok(())
    }
    #[cfg(not(feature = "seccomp"))]
    {
        let _ = seccomp;
        Err(Failure::internal(
            "exec: this agent is built without seccomp; leave the profile out",
        ))
    }
}

fn set_groups(groups: &[u32]) -> Result<(), Failure> {
    // SAFETY: the pointer and length are of one slice of gid_t.
    let result = unsafe { libc::setgroups(groups.len(), groups.as_ptr()) };
    match Errno::result(result) {
        // A user namespace made without privilege denies it; then there are none to leave.
        Err(Errno::EPERM) if groups.is_empty() => Ok(()),
        other => step("set the groups", other).map(drop),
    }
}

/// Changes user and group, keeping the permitted capabilities until they are dropped by name.
fn set_ids(uid: u32, gid: u32) -> nix::Result<()> {
    nix::sys::prctl::set_keepcaps(true)?;
    let (user, group) = (
        nix::unistd::Uid::from_raw(uid),
        nix::unistd::Gid::from_raw(gid),
    );
    nix::unistd::setresgid(group, group, group)?;
    nix::unistd::setresuid(user, user, user)?;
    nix::sys::prctl::set_keepcaps(false)
}

fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open takes a pid and flags.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = Errno::result(fd)?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The namespaces of `pid` that are not ours.
fn foreign_namespaces(pid: i32) -> std::io::Result<CloneFlags> {
    let mut flags = CloneFlags::empty();
    for (name, flag) in NAMESPACES {
        let ours = std::fs::read_link(format!("/proc/self/ns/{name}"));
        let theirs = std::fs::read_link(format!("/proc/{pid}/ns/{name}"));
        match (ours, theirs) {
            (Ok(ours), Ok(theirs)) if ours == theirs => {}
            (Ok(_), Ok(_)) => flags |= flag,
            // A kernel without this kind of namespace.
            (Err(_), Err(_)) => {}
            (_, Err(error)) | (Err(error), _) => return Err(error),
        }
    }
    Ok(flags)
}

struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

/// A terminal of the container's own devpts, so that its name means something there.
fn open_terminal() -> std::io::Result<Terminal> {
    const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;
    const PTMX: (u64, u64) = (5, 2);

    let master: OwnedFd = nix::fcntl::open(
        Path::new("/dev/pts/ptmx"),
        OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW,
        Mode::empty(),
    )?;
    // The container may have mounted something else there: a terminal it holds the other end of.
    let file_system = nix::sys::statfs::fstatfs(&master)?;
    let stat = nix::sys::stat::fstat(&master)?;
    let device = (
        nix::sys::stat::major(stat.st_rdev),
        nix::sys::stat::minor(stat.st_rdev),
    );
    if file_system.filesystem_type().0 != DEVPTS_SUPER_MAGIC || device != PTMX {
        return Err(std::io::Error::other(
            "/dev/pts/ptmx of the container is not a terminal multiplexer",
        ));
    }
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which lives through the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })?;
    // By descriptor: no path to be exchanged.
    // SAFETY: TIOCGPTPEER takes open flags and returns a descriptor.
    let slave = Errno::result(unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER,
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        )
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    Ok(Terminal { master, slave })
}

fn attach_terminal(slave: RawFd, uid: u32) -> std::io::Result<()> {
    for fd in 0..3 {
        // SAFETY: dup2 takes two descriptors; the first is open.
        Errno::result(unsafe { libc::dup2(slave, fd) })?;
    }
    // SAFETY: TIOCSCTTY takes an int; descriptor 0 is the terminal.
    Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
    // The user may open its terminal by name. Best effort: a read-only devpts is no reason to
    // fail.
    // SAFETY: fchown takes a descriptor and ids; -1 leaves the group.
    unsafe { libc::fchown(0, uid, libc::gid_t::MAX) };
    Ok(())
}
