//! The process that holds a PID namespace for the containers that share it: its PID 1.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use super::Failure;

/// Makes it. Gives its pid here; it runs until it is killed, and with it goes all that is in its
/// namespace.
pub fn run() -> Result<(i32, Option<OwnedFd>), Failure> {
    let failed =
        |what: &str, error: Errno| Failure::internal(format!("pid namespace: {what}: {error}"));
    unshare(CloneFlags::CLONE_NEWPID).map_err(|e| failed("unshare", e))?;
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
        hold();
    }
    let pid = Errno::result(pid).map_err(|e| failed("fork", e))?;
    let pid = i32::try_from(pid).map_err(|_| failed("fork", Errno::EOVERFLOW))?;
    Ok((pid, None))
}

/// Reaps what is left to PID 1, for ever.
fn hold() -> ! {
    // SAFETY: these calls take numbers only. Ignoring SIGCHLD makes the kernel reap our children;
    // nothing of this copy uses a descriptor any more.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        // Privileged neighbours aside, nobody looks into us.
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        libc::close_range(0, libc::c_uint::MAX, 0);
    }
    loop {
        // SAFETY: waits for a signal; takes nothing.
        unsafe { libc::pause() };
    }
}
