//! Filters of system calls for the threads that a guest's input reaches.
//!
//! Each role has a table of what it needs, with the reason, and arguments where they matter.
//! Everything else is refused with `EPERM`, and the VM whose thread tried it ends: whoever made
//! our code do what it never does has broken it. The neighbours go on. The thread is not killed,
//! as it may hold a lock that others wait for.
//!
//! A filter holds for one thread, and threads share memory: it takes files, sockets, programs and
//! other processes out of reach, not the neighbours' memory. See `docs/threat-model.md`.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::sync::OnceLock;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

mod process;
mod tables;

pub use process::{confine_process, confine_wasm_process};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs a virtual CPU.
    Vcpu,
    /// Runs all devices but file systems.
    Devices,
    /// Serves shared directories.
    Files,
}

/// Which arguments a call is allowed with.
#[derive(Clone, Copy, Debug)]
enum Args {
    /// Any.
    Any,
    /// The argument of this number (from 0) has one of these values.
    OneOf(u8, &'static [u64]),
    /// The argument of this number has none of these bits.
    Without(u8, u64),
}

/// A call that a role may make.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    call: c_long,
    args: Args,
    /// What for.
    pub why: &'static str,
}

impl Rule {
    const fn any(call: c_long, why: &'static str) -> Self {
        let args = Args::Any;
        Self { call, args, why }
    }

    const fn one_of(call: c_long, arg: u8, values: &'static [u64], why: &'static str) -> Self {
        let args = Args::OneOf(arg, values);
        Self { call, args, why }
    }

    const fn without(call: c_long, arg: u8, bits: u64, why: &'static str) -> Self {
        let args = Args::Without(arg, bits);
        Self { call, args, why }
    }

    fn rules(&self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let condition = |arg, op, value| {
            let condition = SeccompCondition::new(arg, SeccompCmpArgLen::Dword, op, value)?;
            SeccompRule::new(vec![condition])
        };
        match self.args {
            Args::Any => Ok(Vec::new()),
            Args::OneOf(arg, values) => values
                .iter()
                .map(|value| condition(arg, SeccompCmpOp::Eq, *value))
                .collect(),
            Args::Without(arg, bits) => Ok(vec![condition(arg, SeccompCmpOp::MaskedEq(bits), 0)?]),
        }
    }
}

impl Role {
    /// The calls of this role.
    pub fn table(self) -> &'static [Rule] {
        match self {
            Self::Vcpu => tables::VCPU,
            Self::Devices => tables::DEVICES,
            Self::Files => tables::FILES,
        }
    }

    fn filter(self) -> io::Result<&'static BpfProgram> {
        static FILTERS: [OnceLock<Result<BpfProgram, String>>; 3] = [const { OnceLock::new() }; 3];
        let filter = FILTERS[self as usize].get_or_init(|| {
            build(self.table(), SeccompAction::Trap).map_err(|error| error.to_string())
        });
        filter
            .as_ref()
            .map_err(|error| io::Error::other(error.clone()))
    }
}

/// A table for people: calls, each with what for.
pub type Table = Vec<(c_long, &'static str)>;

/// All tables, by what they are for.
pub fn tables() -> [(&'static str, Table); 5] {
    let of = |rules: &[Rule]| rules.iter().map(|rule| (rule.call, rule.why)).collect();
    [
        ("vcpu", of(tables::VCPU)),
        ("devices", of(tables::DEVICES)),
        ("files", of(tables::FILES)),
        ("process of a VM", of(tables::VM_PROCESS)),
        ("process of wasm programs", of(tables::WASM_PROCESS)),
    ]
}

/// A filter that lets a table's calls pass and does `otherwise` with others.
fn build(
    table: &[Rule],
    otherwise: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = table
        .iter()
        .map(|rule| Ok((rule.call, rule.rules()?)))
        .collect::<Result<BTreeMap<_, _>, seccompiler::BackendError>>()?;
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Holds the calling thread to the table of its role, for good.
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn enter(role: Role) -> io::Result<()> {
    let filter = role.filter()?;
    install_handler()?;
    seccompiler::apply_filter(filter).map_err(io::Error::other)
}

thread_local! {
    /// The first call that this thread was refused.
    static REFUSED: Cell<Option<i64>> = const { Cell::new(None) };
}

/// Whether the calling thread has tried what its role does not allow: what to say about it.
pub fn breach() -> Option<String> {
    REFUSED.with(Cell::get).map(|call| {
        format!(
            "a thread tried system call {call}, which it never needs and was refused: it may have \
             been broken into by the guest; please report it with what the guest did"
        )
    })
}

/// What glibc's allocator looks up, once in the life of a process and on whatever thread it is: how
/// memory is given back when the top of an arena is freed, and how many arenas there may be. It does
/// without an answer.
const ASKED_BY_THE_ALLOCATOR: [&CStr; 2] = [
    c"/proc/sys/vm/overcommit_memory",
    c"/sys/devices/system/cpu/online",
];

/// Whether a refused call is one of the C library's own, which says nothing about the guest. It stays
/// refused. `path`: the second argument.
fn asked_by_the_c_library(call: i64, path: i64) -> bool {
    let is = |wanted: &CStr| {
        // SAFETY: openat(2)'s second argument is a string that ends with a zero, and no byte after
        // the first that differs is looked at. A thread that was broken into may give a wrong
        // pointer; then it does here what it could do by itself, end the process by a fault.
        unsafe { libc::strcmp(path as usize as *const libc::c_char, wanted.as_ptr()) == 0 }
    };
    match call {
        libc::SYS_openat => path != 0 && ASKED_BY_THE_ALLOCATOR.into_iter().any(is),
        // Older versions count the processors so.
        libc::SYS_sched_getaffinity => true,
        // Every signal is blocked when a thread ends, and the answer is not looked at. Handlers here
        // need no more of a thread than its stack, which stays until somebody has waited for it.
        libc::SYS_rt_sigprocmask => true,
        _ => false,
    }
}

/// The kernel calls this instead of doing what was asked.
extern "C" fn on_refused(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext_t to handlers with SA_SIGINFO, which is this thread's
    // alone while the handler runs.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // seccomp(2), SECCOMP_RET_TRAP: the registers are as before the call, whose number is in RAX;
    // what stands there when the handler returns is the call's result.
    let rax = &mut registers[libc::REG_RAX as usize];
    let call = *rax;
    if call == libc::SYS_restart_syscall {
        // How the kernel goes on with a wait when the process was stopped (SIGSTOP, a debugger).
        // Everybody who waits goes on by himself after this.
        *rax = -i64::from(libc::EINTR);
        return;
    }
    *rax = -i64::from(libc::EPERM);
    if asked_by_the_c_library(call, registers[libc::REG_RSI as usize]) {
        return;
    }
    REFUSED.with(|refused| {
        if refused.get().is_none() {
            refused.set(Some(call));
        }
    });
}

fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let error = INSTALLED.get_or_init(|| {
        // SAFETY: an all-zero sigaction is a valid value; the handler touches registers of its own
        // context and a thread-local without a destructor only.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_refused as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            let done = libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut());
            (done < 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(0))
        }
    });
    error.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_short_and_name_each_call_once() {
        for (role, most) in [(Role::Vcpu, 12), (Role::Devices, 40), (Role::Files, 60)] {
            let table = role.table();
            assert!(table.len() <= most, "{role:?}: {} calls", table.len());
            let mut calls: Vec<c_long> = table.iter().map(|rule| rule.call).collect();
            calls.sort_unstable();
            calls.dedup();
            assert_eq!(calls.len(), table.len(), "{role:?} names a call twice");
            assert!(table.iter().all(|rule| !rule.why.is_empty()));
        }
    }

    #[test]
    fn no_role_runs_programs_or_opens_sockets_of_the_network() {
        for role in [Role::Vcpu, Role::Devices, Role::Files] {
            for call in [
                libc::SYS_execve,
                libc::SYS_execveat,
                libc::SYS_clone,
                libc::SYS_clone3,
                libc::SYS_fork,
                libc::SYS_ptrace,
                libc::SYS_socket,
                libc::SYS_connect,
                libc::SYS_bpf,
                libc::SYS_mount,
                libc::SYS_setns,
                libc::SYS_process_vm_writev,
                libc::SYS_kill,
            ] {
                assert!(
                    role.table().iter().all(|rule| rule.call != call),
                    "{role:?} {call}"
                );
            }
        }
    }

    #[test]
    fn what_a_threads_end_asks_is_refused_but_no_breach() {
        for role in [Role::Vcpu, Role::Devices, Role::Files] {
            let said = std::thread::spawn(move || {
                enter(role).expect("seccomp filters");
                // As the C library does at the end; nix does not tell how it went.
                let _ = nix::sys::signal::SigSet::all().thread_block();
                breach()
            })
            .join()
            .expect("no panic");
            assert_eq!(said, None, "{role:?}");
        }
    }

    #[test]
    fn what_the_allocator_asks_is_refused_but_no_breach() {
        for role in [Role::Vcpu, Role::Devices] {
            let seen = std::thread::spawn(move || {
                enter(role).expect("seccomp filters");
                // Too small for mappings of their own: when the last are freed, the arena shrinks.
                let blocks: Vec<Vec<u8>> = (0..64).map(|_| vec![1; 100 << 10]).collect();
                drop(blocks);
                let open = |path: &CStr| {
                    // SAFETY: a path that ends with a zero; the result is an error or a new file.
                    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY) };
                    (fd, std::io::Error::last_os_error().raw_os_error())
                };
                let asked = ASKED_BY_THE_ALLOCATOR.map(open);
                let quiet = breach();
                let other = open(c"/proc/sys/vm/overcommit_ratio");
                (asked, quiet, other, breach())
            })
            .join()
            .expect("no panic");
            let refused = (-1, Some(libc::EPERM));
            assert_eq!((seen.0, seen.1), ([refused; 2], None), "{role:?}");
            assert_eq!(seen.2, refused, "{role:?}");
            assert!(seen.3.is_some(), "{role:?}: other files are noticed");
        }
    }

    #[test]
    fn what_is_refused_fails_and_is_noticed_on_this_thread_only() {
        for role in [Role::Vcpu, Role::Devices, Role::Files] {
            let seen = std::thread::spawn(move || {
                enter(role).expect("seccomp filters");
                let before = breach();
                // What the tables allow still works, also with the arguments they allow.
                let kept = vec![1u8; 4 << 20];
                let socket = std::net::UdpSocket::bind("127.0.0.1:0").map_err(|e| e.raw_os_error());
                // SAFETY: a new anonymous mapping that nobody else knows of.
                let code = unsafe {
                    libc::mmap(
                        std::ptr::null_mut(),
                        4096,
                        libc::PROT_READ | libc::PROT_EXEC,
                        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                        -1,
                        0,
                    )
                };
                (
                    before,
                    kept.len(),
                    socket.err().flatten(),
                    code == libc::MAP_FAILED,
                    breach(),
                )
            })
            .join()
            .expect("no panic");
            let (before, kept, socket, no_code, after) = seen;
            assert_eq!((before, kept), (None, 4 << 20), "{role:?}");
            assert_eq!(socket, Some(libc::EPERM), "{role:?}");
            assert!(no_code, "{role:?}: memory of code");
            let said = after.expect("noticed");
            assert!(
                said.contains(&format!("call {},", libc::SYS_socket)),
                "{said}"
            );
        }
        assert_eq!(breach(), None);
        assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_ok());
    }
}
