//! The filters of a whole process that runs one VM, or the wasm programs of one pod, and nothing
//! else.
//!
//! Threads that the guest reaches have the tables of their roles besides. These hold for the
//! others too, which an attacker who can write our memory would use instead: those that make the
//! VM, answer the daemon, serve `vmmctl`. There is a table of what such a process may ask for; what
//! leads out of a jail kills it, as it is one VM, and nobody else's lock is in it; what is neither is
//! answered as by a kernel that does not know it, for which C libraries are prepared.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{Rule, build, tables};

/// Refused whatever their arguments.
const REFUSED: &[c_long] = &[
    // Programs and other processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
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
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    // Namespaces and identity.
    libc::SYS_setns,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
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
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_personality,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
];

/// Refused besides where there is a VM: new sockets, as those of a worker are given to it.
const NO_SOCKETS: &[c_long] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
];

/// Flags of `clone` and `unshare` that make namespaces.
const NAMESPACES: [libc::c_int; 8] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    // CLONE_NEWTIME, which clone(2) takes for part of the signal, so that only unshare makes one.
    0x80,
];

/// Holds every thread that the caller starts from now on, and the caller, to what a process of one
/// VM does; with it, no program and no mount gives it privileges any more.
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn confine_process() -> io::Result<()> {
    confine(NO_SOCKETS, tables::VM_PROCESS)
}

/// The same for a process that runs the wasm programs of one pod.
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn confine_wasm_process() -> io::Result<()> {
    confine(&[], tables::WASM_PROCESS)
}

fn confine(refused: &[c_long], table: &[Rule]) -> io::Result<()> {
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    for filter in [refusing(refused), without_clone3(), build(table, unknown)] {
        let filter = filter.map_err(|e| io::Error::other(e.to_string()))?;
        seccompiler::apply_filter(&filter).map_err(io::Error::other)?;
    }
    Ok(())
}

fn has_bit(arg: u8, bit: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    let op = SeccompCmpOp::MaskedEq(bit);
    SeccompRule::new(vec![SeccompCondition::new(
        arg,
        SeccompCmpArgLen::Dword,
        op,
        bit,
    )?])
}

fn refusing(more: &[c_long]) -> Result<BpfProgram, seccompiler::BackendError> {
    let all = REFUSED.iter().chain(more);
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        all.map(|call| (*call, Vec::new())).collect();
    let namespaces = |bits: &[libc::c_int]| {
        bits.iter()
            .map(|bit| has_bit(0, u64::from(bit.unsigned_abs())))
            .collect::<Result<Vec<_>, _>>()
    };
    rules.insert(libc::SYS_unshare, namespaces(&NAMESPACES)?);
    let [clone @ .., _] = NAMESPACES;
    rules.insert(libc::SYS_clone, namespaces(&clone)?);
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// A filter cannot look into the arguments of `clone3`: the C library does without it.
fn without_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        TargetArch::x86_64,
    )?
    .try_into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp::Role;

    #[test]
    fn a_process_may_do_what_its_threads_may_and_nothing_that_kills() {
        for (table, refused) in [
            (tables::VM_PROCESS, NO_SOCKETS),
            (tables::WASM_PROCESS, &[][..]),
        ] {
            let mut calls: Vec<c_long> = table.iter().map(|rule| rule.call).collect();
            for call in &calls {
                assert!(!REFUSED.contains(call) && !refused.contains(call), "{call}");
            }
            calls.sort_unstable();
            calls.dedup();
            assert_eq!(calls.len(), table.len(), "a call is named twice");
        }
        let has = |call| tables::VM_PROCESS.iter().any(|rule| rule.call == call);
        for role in [Role::Vcpu, Role::Devices, Role::Files] {
            for rule in role.table() {
                assert!(has(rule.call), "{role:?}: {}", rule.call);
            }
        }
    }

    #[test]
    fn nothing_that_a_role_needs_is_refused() {
        for role in [Role::Vcpu, Role::Devices, Role::Files] {
            for rule in role.table() {
                for refused in [REFUSED, NO_SOCKETS] {
                    assert!(!refused.contains(&rule.call), "{role:?}: {}", rule.call);
                }
            }
        }
    }

    /// In a process of its own, since a filter is for good: this test program itself, once more.
    #[test]
    fn threads_go_on_and_programs_are_fatal() {
        const AGAIN: &str = "BULKHEAD_TEST_CONFINED";
        if std::env::var_os(AGAIN).is_some() {
            confine_process().expect("filters");
            // By clone instead of clone3.
            let sum = std::thread::spawn(|| 2 + 3).join().expect("thread");
            assert_eq!(sum, 5);
            // SAFETY: changes this thread's attributes only.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_FS) }, 0);
            // In no table.
            let refused = std::env::current_dir().expect_err("getcwd");
            assert_eq!(refused.raw_os_error(), Some(libc::ENOSYS));
            println!("still here");
            // SAFETY: makes a namespace for this thread, if it may.
            unsafe { libc::unshare(libc::CLONE_NEWUSER) };
            println!("not here");
            return;
        }
        use std::os::unix::process::ExitStatusExt;
        let output = std::process::Command::new(std::env::current_exe().expect("own path"))
            .args([
                "--exact",
                "--nocapture",
                "--test-threads=1",
                "seccomp::process::tests::threads_go_on_and_programs_are_fatal",
            ])
            .env(AGAIN, "1")
            .output()
            .expect("runs");
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{said}");
        assert!(
            said.contains("still here") && !said.contains("not here"),
            "{said}"
        );
    }
}
