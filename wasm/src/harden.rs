//! Seccomp filters, for threads that run programs and for the compiler's process.
//!
//! A program reaches the kernel through host functions only: files below its directories, sockets,
//! clocks, waiting. What none of them needs, and what would matter to somebody who broke out of
//! the compiled code, is refused on these threads: starting programs, other processes' memory,
//! mounts, namespaces, modules, tracing. Violations are errors, not signals: a filter inside one
//! address space contains mistakes, and a thread that is killed while it holds a lock would take
//! the neighbours with it.

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Refused whatever their arguments.
const REFUSED: [libc::c_long; 50] = [
    // Programs and processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_pidfd_send_signal,
    // The file system's shape, and files by handle, which ignore directories.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    // Namespaces and identity.
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    // The kernel itself.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
];

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
        REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    // Packets below the transport layer, and netlink, belong to the node.
    let other_family = |allowed: &[libc::c_int]| {
        allowed
            .iter()
            .map(|family| {
                SeccompCondition::new(
                    0,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::Ne,
                    u64::from(family.unsigned_abs()),
                )
            })
            .collect::<Result<Vec<_>, _>>()
    };
    rules.insert(
        libc::SYS_socket,
        vec![SeccompRule::new(other_family(&[
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_UNIX,
        ])?)?],
    );
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
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
