//! Seccomp filters, for threads that run programs and for the compiler's process.
//!
//! A program reaches the kernel through host functions only: files below its directories, sockets,
//! clocks, waiting. What none of them needs is refused on these threads, to somebody who broke out of
//! the compiled code, too: starting programs, other processes' memory, mounts, namespaces, other
//! users, modules, tracing. Violations are errors, not signals: a filter inside one address space
//! contains mistakes, and a thread that is killed while it holds a lock would take the neighbours
//! with it.

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// A call that threads of programs may make, and what for.
struct Rule(libc::c_long, &'static str);

/// All that they may. Found by tracing the end-to-end tests and by reading the host functions for
/// what those do not reach.
const ALLOWED: [Rule; 97] = [
    Rule(
        libc::SYS_mmap,
        "memory; a thread's stack; images of programs",
    ),
    Rule(libc::SYS_mprotect, "memory that grows; a thread's guard"),
    Rule(libc::SYS_munmap, "memory"),
    Rule(libc::SYS_mremap, "memory"),
    Rule(libc::SYS_madvise, "memory that is reset"),
    Rule(libc::SYS_brk, "memory"),
    Rule(libc::SYS_mincore, "which memory was touched"),
    Rule(libc::SYS_membarrier, "memory, between threads"),
    Rule(libc::SYS_clone, "threads that wait for disks"),
    Rule(libc::SYS_clone3, "the same"),
    Rule(libc::SYS_set_robust_list, "a thread's start"),
    Rule(libc::SYS_rseq, "a thread's start"),
    Rule(libc::SYS_set_tid_address, "a thread's start"),
    Rule(libc::SYS_prctl, "names of threads"),
    Rule(libc::SYS_gettid, "a thread's number, for its stack"),
    Rule(libc::SYS_getpid, "abort, of this process"),
    Rule(libc::SYS_tgkill, "abort, of this process"),
    Rule(libc::SYS_exit, "a thread's end"),
    Rule(libc::SYS_exit_group, "abort"),
    Rule(libc::SYS_futex, "locks"),
    Rule(libc::SYS_sched_yield, "locks"),
    Rule(
        libc::SYS_sched_getaffinity,
        "a thread's stack; how many processors there are",
    ),
    Rule(libc::SYS_getcpu, "locks"),
    Rule(libc::SYS_rt_sigaction, "handlers of traps"),
    Rule(libc::SYS_rt_sigprocmask, "a thread's start and end"),
    Rule(libc::SYS_rt_sigreturn, "after a trap"),
    Rule(libc::SYS_sigaltstack, "handlers of traps"),
    Rule(libc::SYS_restart_syscall, "a wait that was stopped"),
    Rule(libc::SYS_clock_gettime, "clocks of programs"),
    Rule(libc::SYS_clock_getres, "clocks of programs"),
    Rule(libc::SYS_gettimeofday, "clocks of programs"),
    Rule(libc::SYS_clock_nanosleep, "programs that sleep"),
    Rule(libc::SYS_nanosleep, "programs that sleep"),
    Rule(libc::SYS_getrandom, "random numbers of programs"),
    Rule(libc::SYS_uname, "which kernel this is"),
    Rule(libc::SYS_sysinfo, "memory of the host, for the allocator"),
    Rule(libc::SYS_getrusage, "CPU time that was used"),
    Rule(libc::SYS_prlimit64, "how large a stack may be"),
    Rule(libc::SYS_getuid, "whose files these are"),
    Rule(libc::SYS_geteuid, "whose files these are"),
    Rule(libc::SYS_getgid, "whose files these are"),
    Rule(libc::SYS_getegid, "whose files these are"),
    Rule(libc::SYS_capget, "whose files these are"),
    Rule(libc::SYS_read, "streams and files"),
    Rule(libc::SYS_write, "streams and files"),
    Rule(libc::SYS_readv, "streams and files"),
    Rule(libc::SYS_writev, "streams and files"),
    Rule(libc::SYS_pread64, "files"),
    Rule(libc::SYS_pwrite64, "files"),
    Rule(libc::SYS_preadv, "files"),
    Rule(libc::SYS_pwritev, "files"),
    Rule(libc::SYS_preadv2, "files"),
    Rule(libc::SYS_pwritev2, "files"),
    Rule(libc::SYS_lseek, "files"),
    Rule(libc::SYS_close, "streams and files"),
    Rule(libc::SYS_dup, "streams and files"),
    Rule(libc::SYS_fcntl, "flags of streams and files"),
    Rule(
        libc::SYS_ioctl,
        "sockets that do not block; whether a stream is a terminal",
    ),
    Rule(
        libc::SYS_openat,
        "files; streams opened once more; the host's own, as the time zone",
    ),
    Rule(libc::SYS_openat2, "files below their directory"),
    Rule(libc::SYS_fstat, "files"),
    Rule(libc::SYS_newfstatat, "files"),
    Rule(libc::SYS_statx, "files"),
    Rule(libc::SYS_fstatfs, "files"),
    Rule(libc::SYS_readlinkat, "links"),
    Rule(libc::SYS_readlink, "links of its own descriptors"),
    Rule(libc::SYS_getdents64, "directories"),
    Rule(libc::SYS_mkdirat, "directories"),
    Rule(libc::SYS_symlinkat, "links"),
    Rule(libc::SYS_linkat, "links"),
    Rule(libc::SYS_unlinkat, "files that go"),
    Rule(libc::SYS_renameat, "files"),
    Rule(libc::SYS_renameat2, "files"),
    Rule(libc::SYS_utimensat, "times of files"),
    Rule(libc::SYS_ftruncate, "files"),
    Rule(libc::SYS_fallocate, "files"),
    Rule(libc::SYS_fadvise64, "advice that programs give"),
    Rule(libc::SYS_faccessat2, "files"),
    Rule(libc::SYS_fsync, "files"),
    Rule(libc::SYS_fdatasync, "files"),
    Rule(libc::SYS_poll, "waiting for streams"),
    Rule(libc::SYS_ppoll, "waiting for streams"),
    Rule(libc::SYS_epoll_create1, "a runtime for each thread"),
    Rule(libc::SYS_epoll_ctl, "waiting for streams and sockets"),
    Rule(libc::SYS_epoll_wait, "waiting for streams and sockets"),
    Rule(libc::SYS_epoll_pwait, "waiting for streams and sockets"),
    Rule(libc::SYS_eventfd2, "a runtime for each thread"),
    // Of which family: see `build`.
    Rule(libc::SYS_socketpair, "signals within the runtime"),
    Rule(libc::SYS_bind, "sockets"),
    Rule(libc::SYS_listen, "sockets"),
    Rule(libc::SYS_connect, "sockets"),
    Rule(libc::SYS_accept4, "sockets"),
    Rule(libc::SYS_shutdown, "sockets"),
    Rule(libc::SYS_sendto, "sockets; streams that are sockets"),
    Rule(libc::SYS_recvfrom, "sockets; streams that are sockets"),
    Rule(libc::SYS_sendmsg, "sockets"),
    Rule(libc::SYS_recvmsg, "sockets"),
];
/// What is asked about a socket.
const OF_SOCKETS: [libc::c_long; 6] = [
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
];

/// What threads of programs may call, each with what for.
pub fn thread_table() -> impl Iterator<Item = (libc::c_long, &'static str)> {
    let of_sockets = OF_SOCKETS.iter().map(|call| (*call, "sockets"));
    let socket = std::iter::once((libc::SYS_socket, "sockets of IP and of this host"));
    let allowed = ALLOWED.iter().map(|rule| (rule.0, rule.1));
    allowed.chain(of_sockets).chain(socket)
}

/// Loads the filter on the calling thread; its children inherit it. A pod does it on its threads
/// ([`crate::PodConfig::harden`]).
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn harden_thread() -> io::Result<()> {
    static FILTER: OnceLock<Result<BpfProgram, String>> = OnceLock::new();
    let filter = FILTER.get_or_init(|| build().map_err(|e| e.to_string()));
    let filter = filter.as_ref().map_err(|e| io::Error::other(e.clone()))?;
    seccompiler::apply_filter(filter).map_err(io::Error::other)
}

fn build() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        thread_table().map(|(call, _)| (call, Vec::new())).collect();
    // Packets below the transport layer, and netlink, belong to the node.
    let family = |family: libc::c_int| {
        SeccompCondition::new(
            0,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::Eq,
            u64::from(family.unsigned_abs()),
        )
        .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    rules.insert(
        libc::SYS_socket,
        vec![
            family(libc::AF_INET)?,
            family(libc::AF_INET6)?,
            family(libc::AF_UNIX)?,
        ],
    );
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// What computing with threads takes: memory, threads, and the descriptors that are there.
const COMPUTING: [libc::c_long; 34] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mprotect,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_set_tid_address,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
/// Whose files the compiler could open, could it open files.
const NOBODY: u32 = 65_534;

/// Takes everything from this process but computing and writing to what it has open; it ends with
/// the thread that has started it. To be called with one thread, at the beginning.
///
/// # Errors
/// The kernel refuses a step.
pub(crate) fn confine_compiler(memory_bytes: u64, cpu: Duration) -> io::Result<()> {
    use nix::sys::{prctl, signal::Signal};
    use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};
    // When the host is short of memory, this goes first, and not the daemon.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    for (limit, most) in [
        // What is allocated; not the program's own text, nor the file that the result goes to.
        (Resource::RLIMIT_DATA, memory_bytes),
        (Resource::RLIMIT_CPU, cpu.as_secs()),
        // A core would show what the host compiles, and would be large.
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_NOFILE, 16),
        // Machine code is some five times as large as WebAssembly.
        (Resource::RLIMIT_FSIZE, memory_bytes.saturating_mul(2)),
    ] {
        setrlimit(limit, most, most)?;
    }
    if geteuid().is_root() {
        setgroups(&[])?;
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        setresgid(group, group, group)?;
        setresuid(user, user, user)?;
    }
    prctl::set_name(c"wasm-compiler")?;
    prctl::set_dumpable(false)?;
    // After the ids, whose change takes it back.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    prctl::set_no_new_privs()?;
    let filter = compiler_filters().map_err(io::Error::other)?;
    for filter in &filter {
        seccompiler::apply_filter(filter).map_err(io::Error::other)?;
    }
    Ok(())
}

fn compiler_filters() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    // All that is looked at is an `int`, or has its flags in the lower half.
    let argument = |op, value| {
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, op, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        COMPUTING.iter().map(|call| (*call, Vec::new())).collect();
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    rules.insert(
        libc::SYS_clone,
        vec![argument(SeccompCmpOp::MaskedEq(thread), thread)?],
    );
    // Names of threads, and of memory.
    rules.insert(
        libc::SYS_prctl,
        [libc::PR_SET_NAME, libc::PR_SET_VMA]
            .iter()
            .map(|option| argument(SeccompCmpOp::Eq, u64::from(option.unsigned_abs())))
            .collect::<Result<_, _>>()?,
    );
    // Its own abort.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![argument(SeccompCmpOp::Eq, own)?]);
    let denied = |errno: libc::c_int| SeccompAction::Errno(errno.unsigned_abs());
    // What it says about flags cannot be looked at: without it, `clone` is used.
    let newer: BTreeMap<i64, Vec<SeccompRule>> =
        [(libc::SYS_clone3, Vec::new())].into_iter().collect();
    let arch = TargetArch::x86_64;
    rules.insert(libc::SYS_clone3, Vec::new());
    let only = SeccompFilter::new(rules, denied(libc::EPERM), SeccompAction::Allow, arch)?;
    let newer = SeccompFilter::new(newer, SeccompAction::Allow, denied(libc::ENOSYS), arch)?;
    // The first one would not let the second one be loaded.
    Ok([newer.try_into()?, only.try_into()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_each_call_once_and_nothing_that_leads_out() {
        let mut calls: Vec<libc::c_long> = thread_table().map(|(call, _)| call).collect();
        let count = calls.len();
        calls.sort_unstable();
        calls.dedup();
        assert_eq!(calls.len(), count, "a call is named twice");
        assert!(thread_table().all(|(_, why)| !why.is_empty()));
        for call in [
            libc::SYS_execve,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_kill,
            libc::SYS_mount,
            libc::SYS_open_by_handle_at,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_setfsuid,
            libc::SYS_setgroups,
            libc::SYS_capset,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_keyctl,
        ] {
            assert!(!calls.contains(&call), "{call}");
        }
    }

    #[test]
    fn refuses_what_no_program_needs_on_this_thread_only() {
        let refused = std::thread::spawn(|| {
            harden_thread().expect("loads");
            // Inherited by a child.
            std::thread::spawn(|| {
                let exec = std::process::Command::new("/bin/true").status();
                let unshare = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS);
                let netlink = nix::sys::socket::socket(
                    nix::sys::socket::AddressFamily::Netlink,
                    nix::sys::socket::SockType::Raw,
                    nix::sys::socket::SockFlag::empty(),
                    None,
                );
                let tcp = std::net::TcpListener::bind("127.0.0.1:0");
                let file = std::fs::read("/proc/self/comm");
                (
                    exec.is_err(),
                    unshare == Err(nix::errno::Errno::EPERM),
                    netlink.err() == Some(nix::errno::Errno::EPERM),
                    tcp.is_ok() && file.is_ok(),
                )
            })
            .join()
            .expect("no panic")
        })
        .join()
        .expect("no panic");
        assert_eq!(refused, (true, true, true, true));
        assert!(
            std::process::Command::new("/bin/true").status().is_ok(),
            "other threads are free"
        );
    }

    /// In a process of its own: what is given up is given up for good.
    #[test]
    fn the_compiler_can_compute_and_write_and_nothing_else() {
        const ALONE: &str = "BULKHEAD_TEST_CONFINED";
        if std::env::var_os(ALONE).is_none() {
            let name = "harden::tests::the_compiler_can_compute_and_write_and_nothing_else";
            let alone = std::process::Command::new(std::env::current_exe().expect("this program"))
                .args([name, "--exact", "--nocapture", "--test-threads=1"])
                .env(ALONE, "1")
                .output()
                .expect("starts");
            let text = String::from_utf8_lossy(&alone.stdout);
            assert!(alone.status.success(), "{text}");
            assert!(text.contains("1 passed"), "{text}");
            return;
        }
        let mut open = tempfile::tempfile().expect("a file");
        confine_compiler(64 << 20, Duration::from_secs(60)).expect("confined");
        std::io::Write::write_all(&mut open, b"code").expect("written");
        let thread = std::thread::spawn(|| vec![1u8; 1 << 20].len());
        assert_eq!(thread.join().expect("no panic"), 1 << 20);
        let eperm = |e: io::Error| e.raw_os_error() == Some(libc::EPERM);
        assert!(std::fs::read("/proc/self/comm").is_err_and(eperm));
        assert!(std::fs::File::create("/tmp/x").is_err_and(eperm));
        assert!(std::net::TcpListener::bind("127.0.0.1:0").is_err_and(eperm));
        assert!(std::process::Command::new("/bin/true").status().is_err());
        let parent = nix::unistd::Pid::from_raw(1);
        assert_eq!(
            nix::sys::signal::kill(parent, None),
            Err(nix::errno::Errno::EPERM)
        );
        let mut much = Vec::<u8>::new();
        assert!(much.try_reserve_exact(64 << 20).is_err());
    }
}
