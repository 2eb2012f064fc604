// SPDX-License-Identifier: Apache-2.0
//! The few system calls that std does not offer, each behind a safe function.
//!
//! This program is compiled by plain `rustc` against a static libc, without crates, so the
//! declarations are our own. They are those of x86_64 Linux.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

pub const MS_RDONLY: u64 = 1;
pub const MS_NOSUID: u64 = 2;
pub const MS_NODEV: u64 = 4;
pub const MS_BIND: u64 = 4096;
pub const MS_MOVE: u64 = 8192;
pub const MS_REC: u64 = 16384;
pub const MS_SHARED: u64 = 1 << 20;

pub const SIGKILL: i32 = 9;
pub const POLLIN: i16 = 1;
pub const POLLHUP: i16 = 16;
pub const POLLERR: i16 = 8;

const SYS_FINIT_MODULE: i64 = 313;
const TIOCSCTTY: u64 = 0x540E;
const TIOCSWINSZ: u64 = 0x5414;
const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGPTPEER: u64 = 0x5441;
const O_RDWR: i32 = 2;
const O_NOCTTY: i32 = 0o400;
const O_CLOEXEC: i32 = 0o2000000;
const F_SETPIPE_SZ: i32 = 1031;
const SIOCGIFFLAGS: u64 = 0x8913;
const SIOCSIFFLAGS: u64 = 0x8914;
const RB_POWER_OFF: i32 = 0x4321_fedc_u32 as i32;

#[repr(C)]
pub struct PollFd {
    pub fd: i32,
    pub events: i16,
    pub revents: i16,
}

#[repr(C)]
struct Rlimit {
    cur: u64,
    max: u64,
}

#[repr(C)]
struct Winsize {
    rows: u16,
    cols: u16,
    x: u16,
    y: u16,
}

#[repr(C)]
struct Timespec {
    sec: i64,
    nsec: i64,
}

#[repr(C)]
struct SchedParam {
    priority: i32,
}

#[repr(C)]
struct IfReq {
    name: [u8; 16],
    flags: i16,
    pad: [u8; 22],
}

unsafe extern "C" {
    fn mount(src: *const i8, dst: *const i8, fs: *const i8, flags: u64, data: *const i8) -> i32;
    fn chroot(path: *const i8) -> i32;
    fn syscall(nr: i64, ...) -> i64;
    fn ioctl(fd: i32, req: u64, ...) -> i32;
    fn open(path: *const i8, flags: i32, ...) -> i32;
    fn fcntl(fd: i32, cmd: i32, ...) -> i32;
    fn poll(fds: *mut PollFd, n: u64, timeout_ms: i32) -> i32;
    fn pipe2(fds: *mut i32, flags: i32) -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn kill(pid: i32, sig: i32) -> i32;
    fn setsid() -> i32;
    fn setrlimit(what: i32, lim: *const Rlimit) -> i32;
    fn prctl(option: i32, ...) -> i32;
    fn mlockall(flags: i32) -> i32;
    fn sched_setscheduler(pid: i32, policy: i32, param: *const SchedParam) -> i32;
    fn sethostname(name: *const u8, len: usize) -> i32;
    fn clock_settime(clock: i32, ts: *const Timespec) -> i32;
    fn socket(domain: i32, ty: i32, proto: i32) -> i32;
    fn reboot(cmd: i32) -> i32;
    fn sync();
}

fn c(s: &str) -> io::Result<CString> {
    CString::new(s).map_err(|_| io::Error::other("NUL byte in a path"))
}

fn check(ret: i64) -> io::Result<i64> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// mount(2); the error names source and target.
pub fn do_mount(src: &str, dst: &str, fs: &str, flags: u64, data: &str) -> io::Result<()> {
    let (s, d, f, o) = (c(src)?, c(dst)?, c(fs)?, c(data)?);
    // SAFETY: four NUL-terminated strings that outlive the call.
    let ret = unsafe { mount(s.as_ptr(), d.as_ptr(), f.as_ptr(), flags, o.as_ptr()) };
    check(ret.into())
        .map(|_| ())
        .map_err(|e| io::Error::other(format!("mount {fs} {src} on {dst}: {e}")))
}

pub fn do_chroot(path: &str) -> io::Result<()> {
    let p = c(path)?;
    // SAFETY: a NUL-terminated string that outlives the call.
    check(unsafe { chroot(p.as_ptr()) }.into()).map(|_| ())
}

/// Loads a kernel module; one that is already there is no error.
pub fn load_module(file: &File, params: &str) -> io::Result<()> {
    let params = c(params)?;
    // SAFETY: a valid file descriptor and a NUL-terminated string.
    let ret = unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), params.as_ptr(), 0i32) };
    match check(ret) {
        Err(e) if e.raw_os_error() == Some(17) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// A new pseudo-terminal: (master, slave).
pub fn open_pty() -> io::Result<(OwnedFd, OwnedFd)> {
    let path = c("/dev/ptmx")?;
    // SAFETY: a NUL-terminated path; the result is checked before it becomes an OwnedFd.
    let master = unsafe {
        let fd = check(open(path.as_ptr(), O_RDWR | O_NOCTTY | O_CLOEXEC).into())? as RawFd;
        OwnedFd::from_raw_fd(fd)
    };
    let zero = 0i32;
    // SAFETY: TIOCSPTLCK reads one int; TIOCGPTPEER takes open flags and returns a new fd.
    let slave = unsafe {
        check(ioctl(master.as_raw_fd(), TIOCSPTLCK, &raw const zero).into())?;
        let flags = O_RDWR | O_NOCTTY | O_CLOEXEC;
        OwnedFd::from_raw_fd(check(ioctl(master.as_raw_fd(), TIOCGPTPEER, flags).into())? as RawFd)
    };
    Ok((master, slave))
}

pub fn set_window(fd: RawFd, rows: u16, cols: u16) {
    let w = Winsize {
        rows,
        cols,
        x: 0,
        y: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize. A failure only leaves the old size.
    unsafe { ioctl(fd, TIOCSWINSZ, &raw const w) };
}

/// For `pre_exec`: a session of its own and, with a terminal as stdin, that as its controlling one.
pub fn new_session(tty: bool) -> io::Result<()> {
    // SAFETY: no pointers involved; both calls are async-signal-safe.
    unsafe {
        check(setsid().into())?;
        if tty {
            check(ioctl(0, TIOCSCTTY, 0i32).into())?;
        }
    }
    Ok(())
}

/// For `pre_exec`: undo the scheduling class of PID 1.
pub fn normal_scheduling() -> io::Result<()> {
    let p = SchedParam { priority: 0 };
    // SAFETY: one valid sched_param; SCHED_OTHER is 0.
    check(unsafe { sched_setscheduler(0, 0, &raw const p) }.into()).map(|_| ())
}

/// PID 1 must answer even when the command eats all CPU and memory, or a busy L1 looks hung.
pub fn favour_self() {
    let p = SchedParam { priority: 1 };
    // SAFETY: one valid sched_param, SCHED_RR is 2, MCL_CURRENT is 1. Both are best effort.
    unsafe {
        sched_setscheduler(0, 2, &raw const p);
        mlockall(1);
    }
}

pub fn raise_limits() {
    // RLIMIT_NOFILE 7, RLIMIT_MEMLOCK 8, RLIMIT_NPROC 6, RLIMIT_CORE 4
    for (what, cur, max) in [(7, 1 << 20, 1 << 20), (8, !0, !0), (6, !0, !0), (4, 0, !0)] {
        let lim = Rlimit { cur, max };
        // SAFETY: one valid rlimit; PID 1 has CAP_SYS_RESOURCE, a failure leaves the old limit.
        unsafe { setrlimit(what, &raw const lim) };
    }
}

pub fn name_thread(name: &str) {
    if let Ok(n) = c(name) {
        // SAFETY: PR_SET_NAME (15) reads a NUL-terminated string.
        unsafe { prctl(15, n.as_ptr()) };
    }
}

pub fn wait_readable(fds: &mut [PollFd], timeout_ms: i32) -> io::Result<()> {
    loop {
        // SAFETY: a valid slice with its length.
        match check(unsafe { poll(fds.as_mut_ptr(), fds.len() as u64, timeout_ms) }.into()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(|_| ()),
        }
    }
}

/// A close-on-exec pipe: (read end, write end).
pub fn new_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0i32; 2];
    // SAFETY: room for two descriptors, which are ours alone when the call succeeded.
    unsafe {
        check(pipe2(fds.as_mut_ptr(), O_CLOEXEC).into())?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

pub fn grow_pipe(fd: RawFd) {
    // SAFETY: F_SETPIPE_SZ takes an int; a failure leaves the default size.
    unsafe { fcntl(fd, F_SETPIPE_SZ, 1i32 << 20) };
}

/// Waits for any child: (pid, exit code as a shell would give it).
pub fn wait_any() -> io::Result<(i32, i32)> {
    let mut status = 0;
    loop {
        // SAFETY: a valid int to write to.
        match check(unsafe { waitpid(-1, &raw mut status, 0) }.into()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
            Ok(pid) => {
                let sig = status & 0x7f;
                let code = if sig == 0 {
                    (status >> 8) & 0xff
                } else {
                    128 + sig
                };
                return Ok((pid as i32, code));
            }
        }
    }
}

pub fn send_signal(pid: i32, sig: i32) {
    // SAFETY: no pointers. The target may be gone already, which is fine.
    unsafe { kill(pid, sig) };
}

pub fn set_hostname(name: &str) {
    // SAFETY: pointer and length of one string; cosmetic, so a failure is ignored.
    unsafe { sethostname(name.as_ptr(), name.len()) };
}

pub fn set_clock(nanos: i64) {
    let ts = Timespec {
        sec: nanos / 1_000_000_000,
        nsec: nanos % 1_000_000_000,
    };
    // SAFETY: CLOCK_REALTIME (0) and one valid timespec.
    unsafe { clock_settime(0, &raw const ts) };
}

pub fn loopback_up() -> io::Result<()> {
    let mut req = IfReq {
        name: [0; 16],
        flags: 0,
        pad: [0; 22],
    };
    req.name[..2].copy_from_slice(b"lo");
    // SAFETY: AF_INET 2, SOCK_DGRAM 2; the ioctls read and write one ifreq of full size.
    unsafe {
        let sock = OwnedFd::from_raw_fd(check(socket(2, 2, 0).into())? as RawFd);
        check(ioctl(sock.as_raw_fd(), SIOCGIFFLAGS, &raw mut req).into())?;
        req.flags |= 1;
        check(ioctl(sock.as_raw_fd(), SIOCSIFFLAGS, &raw mut req).into())?;
    }
    Ok(())
}

pub fn sync_all() {
    // SAFETY: no arguments.
    unsafe { sync() };
}

pub fn power_off() -> ! {
    loop {
        // SAFETY: no pointers; returns only on error.
        unsafe { reboot(RB_POWER_OFF) };
        std::thread::park();
    }
}
