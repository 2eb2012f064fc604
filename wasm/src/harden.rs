//! A seccomp filter for threads that run programs.
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
}
