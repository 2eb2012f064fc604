//! What each role may ask of the kernel, and why. Found by tracing the end-to-end tests and by
//! reading the code for what they do not reach; what is missing ends a VM, what is too much is a
//! hole.

use super::Rule;

/// `_IO(KVMIO, number)` and its kin, as linux/kvm.h has them.
const KVM_RUN: u64 = 0xae80;
const VCPU_IOCTLS: &[u64] = &[
    KVM_RUN,
    0x8090_ae81, // GET_REGS
    0x4090_ae82, // SET_REGS
    0x8138_ae83, // GET_SREGS
    0x4138_ae84, // SET_SREGS
    0xc018_ae85, // TRANSLATE
    0xc008_ae88, // GET_MSRS
    0x4008_ae89, // SET_MSRS
    0x81a0_ae8c, // GET_FPU
    0x41a0_ae8d, // SET_FPU
    0x8400_ae8e, // GET_LAPIC
    0x4400_ae8f, // SET_LAPIC
    0x4008_ae90, // SET_CPUID2
    0xc008_ae91, // GET_CPUID2
    0x8004_ae98, // GET_MP_STATE
    0x4004_ae99, // SET_MP_STATE
    0x4048_ae9b, // SET_GUEST_DEBUG
    0x8040_ae9f, // GET_VCPU_EVENTS
    0x4040_aea0, // SET_VCPU_EVENTS
    0x8080_aea1, // GET_DEBUGREGS
    0x4080_aea2, // SET_DEBUGREGS
    0xaea2,      // SET_TSC_KHZ
    0xaea3,      // GET_TSC_KHZ
    0x9000_aea4, // GET_XSAVE
    0x5000_aea5, // SET_XSAVE
    0x8188_aea6, // GET_XCRS
    0x4188_aea7, // SET_XCRS
    0xaead,      // KVMCLOCK_CTRL
    0x9000_aecf, // GET_XSAVE2
    // A driver's reset stops vhost-net before the driver goes on: its memory is its own again.
    0x4008_af30, // VHOST_NET_SET_BACKEND
    0xc008_af12, // VHOST_GET_VRING_BASE
];

/// Of taps, vhost-net, sockets and disks.
const DEVICE_IOCTLS: &[u64] = &[
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x5421,      // FIONBIO
    0x8008_af00, // VHOST_GET_FEATURES
    0x4008_af00, // VHOST_SET_FEATURES
    0xaf02,      // VHOST_RESET_OWNER
    0x4008_af03, // VHOST_SET_MEM_TABLE
    0x4008_af10, // VHOST_SET_VRING_NUM
    0x4028_af11, // VHOST_SET_VRING_ADDR
    0x4008_af12, // VHOST_SET_VRING_BASE
    0xc008_af12, // VHOST_GET_VRING_BASE
    0x4008_af20, // VHOST_SET_VRING_KICK
    0x4008_af21, // VHOST_SET_VRING_CALL
    0x4008_af22, // VHOST_SET_VRING_ERR
    0x4008_af30, // VHOST_NET_SET_BACKEND
    0x1277,      // BLKDISCARD
    0x127f,      // BLKZEROOUT
];

/// Duplicate a descriptor, look at its flags, set its flags. No owner, no lease, no lock.
const FCNTL: &[u64] = &[
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_GETFD as u64,
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
];

const EXEC: u64 = libc::PROT_EXEC as u64;

/// Of every thread: memory, locks, time, its end.
macro_rules! common {
    ($($own:expr),* $(,)?) => {
        &[
            Rule::without(libc::SYS_mmap, 2, EXEC, "memory; none that holds code"),
            Rule::without(libc::SYS_mprotect, 2, EXEC, "memory; none that holds code"),
            Rule::any(libc::SYS_munmap, "memory"),
            Rule::any(libc::SYS_brk, "memory"),
            Rule::any(libc::SYS_madvise, "memory given back; the balloon's too"),
            Rule::any(libc::SYS_futex, "locks"),
            Rule::any(libc::SYS_clock_gettime, "time, where the vDSO has no clock"),
            Rule::any(libc::SYS_write, "events, the console, logs"),
            Rule::any(libc::SYS_rt_sigreturn, "after a kick, and after a refused call"),
            Rule::any(libc::SYS_sigaltstack, "the thread's end"),
            Rule::any(libc::SYS_exit, "the thread's end"),
            $($own,)*
        ]
    };
}

pub(super) const VCPU: &[Rule] = common![Rule::one_of(
    libc::SYS_ioctl,
    1,
    VCPU_IOCTLS,
    "the guest, its registers, the end of vhost-net"
)];

pub(super) const DEVICES: &[Rule] = common![
    Rule::any(libc::SYS_epoll_wait, "waiting for events"),
    Rule::any(libc::SYS_epoll_ctl, "which events"),
    Rule::any(libc::SYS_read, "events"),
    Rule::any(libc::SYS_readv, "frames, streams"),
    Rule::any(libc::SYS_writev, "frames, logs"),
    Rule::any(libc::SYS_sendmsg, "streams of vsock"),
    Rule::any(libc::SYS_recvfrom, "streams of vsock"),
    Rule::any(libc::SYS_sendto, "streams of vsock"),
    Rule::any(libc::SYS_shutdown, "streams of vsock"),
    Rule::one_of(
        libc::SYS_socketpair,
        0,
        &[libc::AF_UNIX as u64],
        "a new stream of vsock"
    ),
    Rule::any(libc::SYS_eventfd2, "a new stream of vsock"),
    Rule::any(libc::SYS_close, "a stream that has ended"),
    Rule::one_of(libc::SYS_fcntl, 1, FCNTL, "descriptors handed on"),
    Rule::one_of(libc::SYS_ioctl, 1, DEVICE_IOCTLS, "taps, vhost-net, disks"),
    Rule::any(libc::SYS_preadv, "disks"),
    Rule::any(libc::SYS_pwritev, "disks"),
    Rule::any(libc::SYS_pread64, "disks"),
    Rule::any(libc::SYS_pwrite64, "disks"),
    Rule::any(libc::SYS_fsync, "flush of a disk"),
    Rule::any(libc::SYS_fdatasync, "flush of a disk"),
    Rule::any(libc::SYS_fallocate, "discard on a disk; the balloon"),
    Rule::any(
        libc::SYS_io_uring_enter,
        "disks; the ring was made before and can only read and write"
    ),
    Rule::any(libc::SYS_getrandom, "the guest's entropy"),
    Rule::any(libc::SYS_mremap, "memory"),
    Rule::any(libc::SYS_sched_yield, "channels between threads"),
];

pub(super) const FILES: &[Rule] = common![
    Rule::any(libc::SYS_epoll_wait, "waiting for events"),
    Rule::any(libc::SYS_epoll_ctl, "which events"),
    Rule::any(libc::SYS_read, "events"),
    Rule::any(libc::SYS_writev, "logs"),
    Rule::any(libc::SYS_openat, "files below the share"),
    Rule::any(libc::SYS_close, "files"),
    Rule::one_of(libc::SYS_fcntl, 1, FCNTL, "descriptors and their flags"),
    Rule::any(libc::SYS_statx, "attributes"),
    Rule::any(libc::SYS_newfstatat, "attributes"),
    Rule::any(libc::SYS_fstat, "attributes"),
    Rule::any(libc::SYS_fstatfs, "sizes of file systems"),
    Rule::any(libc::SYS_preadv, "reading"),
    Rule::any(libc::SYS_pwritev, "writing"),
    Rule::any(libc::SYS_preadv2, "reading"),
    Rule::any(libc::SYS_pwritev2, "writing"),
    Rule::any(libc::SYS_pread64, "reading"),
    Rule::any(libc::SYS_pwrite64, "writing"),
    Rule::any(libc::SYS_copy_file_range, "copying"),
    Rule::any(libc::SYS_lseek, "holes; the place in a directory"),
    Rule::any(libc::SYS_getdents64, "directories"),
    Rule::any(libc::SYS_readlinkat, "symlinks"),
    Rule::any(libc::SYS_mkdirat, "new names"),
    Rule::any(libc::SYS_mknodat, "new names"),
    Rule::any(libc::SYS_symlinkat, "new names"),
    Rule::any(libc::SYS_linkat, "new names"),
    Rule::any(libc::SYS_renameat, "new names, by the C library"),
    Rule::any(libc::SYS_renameat2, "new names"),
    Rule::any(libc::SYS_unlinkat, "names that go"),
    Rule::any(libc::SYS_fchmodat, "attributes"),
    Rule::any(libc::SYS_fchmodat2, "attributes, by newer C libraries"),
    Rule::any(libc::SYS_fchownat, "attributes"),
    Rule::any(libc::SYS_utimensat, "attributes"),
    Rule::any(libc::SYS_ftruncate, "sizes"),
    Rule::any(libc::SYS_fallocate, "sizes"),
    Rule::any(libc::SYS_fsync, "fsync"),
    Rule::any(libc::SYS_fdatasync, "fdatasync"),
    Rule::any(libc::SYS_getxattr, "extended attributes"),
    Rule::any(libc::SYS_setxattr, "extended attributes"),
    Rule::any(libc::SYS_listxattr, "extended attributes"),
    Rule::any(libc::SYS_removexattr, "extended attributes"),
    Rule::any(libc::SYS_setfsuid, "new files belong to the guest's user"),
    Rule::any(libc::SYS_setfsgid, "new files belong to the guest's user"),
    Rule::any(
        libc::SYS_capget,
        "keeping what permission checks need meanwhile"
    ),
    Rule::any(
        libc::SYS_capset,
        "keeping what permission checks need meanwhile"
    ),
    Rule::any(libc::SYS_geteuid, "whether files can be given away"),
    Rule::any(
        libc::SYS_getrandom,
        "tables that a guest cannot fill by collisions"
    ),
    Rule::any(libc::SYS_mremap, "memory"),
    Rule::any(libc::SYS_sched_yield, "channels between threads"),
];

/// Of a whole process in a jail, for all its threads: to be a program of the C library's and of
/// Rust's with threads. Where a guest's input is, the tables above hold besides.
macro_rules! process {
    ($($own:expr),* $(,)?) => {
        &[
            Rule::any(libc::SYS_mmap, "memory"),
            Rule::any(libc::SYS_mprotect, "memory; stacks of threads"),
            Rule::any(libc::SYS_munmap, "memory"),
            Rule::any(libc::SYS_mremap, "memory"),
            Rule::any(libc::SYS_madvise, "memory"),
            Rule::any(libc::SYS_brk, "memory"),
            Rule::any(libc::SYS_memfd_create, "memory that has a descriptor"),
            Rule::any(libc::SYS_mincore, "whether memory is there"),
            Rule::any(libc::SYS_membarrier, "memory, between threads"),
            // Without flags of namespaces, see `process`.
            Rule::any(libc::SYS_clone, "threads"),
            Rule::any(libc::SYS_clone3, "threads; answered so that `clone` is used"),
            Rule::any(libc::SYS_set_robust_list, "threads"),
            Rule::any(libc::SYS_rseq, "threads"),
            Rule::any(libc::SYS_set_tid_address, "threads"),
            Rule::any(libc::SYS_gettid, "threads"),
            Rule::any(libc::SYS_getpid, "its own number"),
            Rule::any(libc::SYS_tgkill, "a kick of its own threads; abort"),
            Rule::any(libc::SYS_futex, "locks"),
            Rule::any(libc::SYS_sched_yield, "locks"),
            Rule::any(libc::SYS_sched_getaffinity, "how many processors there are"),
            Rule::any(libc::SYS_getcpu, "locks of the C library"),
            Rule::any(libc::SYS_prctl, "names of threads"),
            Rule::any(libc::SYS_seccomp, "more filters"),
            Rule::any(libc::SYS_exit, "a thread's end"),
            Rule::any(libc::SYS_exit_group, "its end"),
            Rule::any(libc::SYS_rt_sigaction, "handlers"),
            Rule::any(libc::SYS_rt_sigprocmask, "handlers"),
            Rule::any(libc::SYS_rt_sigreturn, "handlers"),
            Rule::any(libc::SYS_sigaltstack, "handlers"),
            Rule::any(libc::SYS_restart_syscall, "after being stopped"),
            Rule::any(libc::SYS_clock_gettime, "time"),
            Rule::any(libc::SYS_clock_getres, "time"),
            Rule::any(libc::SYS_gettimeofday, "time"),
            Rule::any(libc::SYS_clock_nanosleep, "time"),
            Rule::any(libc::SYS_nanosleep, "time"),
            Rule::any(libc::SYS_getrandom, "seeds of tables"),
            Rule::any(libc::SYS_uname, "which kernel this is"),
            Rule::any(libc::SYS_sysinfo, "memory of the host"),
            Rule::any(libc::SYS_prlimit64, "its limits"),
            Rule::any(libc::SYS_getuid, "who it is"),
            Rule::any(libc::SYS_geteuid, "who it is"),
            Rule::any(libc::SYS_getgid, "who it is"),
            Rule::any(libc::SYS_getegid, "who it is"),
            Rule::any(libc::SYS_capget, "its rights"),
            Rule::any(libc::SYS_capset, "fewer rights"),
            Rule::any(libc::SYS_setfsuid, "whose new files are"),
            Rule::any(libc::SYS_setfsgid, "whose new files are"),
            Rule::any(libc::SYS_setgroups, "whose new files are"),
            Rule::any(libc::SYS_read, "descriptors"),
            Rule::any(libc::SYS_write, "descriptors"),
            Rule::any(libc::SYS_readv, "descriptors"),
            Rule::any(libc::SYS_writev, "descriptors"),
            Rule::any(libc::SYS_pread64, "files"),
            Rule::any(libc::SYS_pwrite64, "files"),
            Rule::any(libc::SYS_preadv, "files"),
            Rule::any(libc::SYS_pwritev, "files"),
            Rule::any(libc::SYS_preadv2, "files"),
            Rule::any(libc::SYS_pwritev2, "files"),
            Rule::any(libc::SYS_lseek, "files"),
            Rule::any(libc::SYS_close, "descriptors"),
            Rule::any(libc::SYS_dup, "descriptors"),
            Rule::any(libc::SYS_fcntl, "descriptors"),
            Rule::any(libc::SYS_ioctl, "descriptors"),
            Rule::any(libc::SYS_openat, "files of the jail"),
            Rule::any(libc::SYS_openat2, "files of the jail"),
            Rule::any(libc::SYS_fstat, "files of the jail"),
            Rule::any(libc::SYS_newfstatat, "files of the jail"),
            Rule::any(libc::SYS_statx, "files of the jail"),
            Rule::any(libc::SYS_fstatfs, "files of the jail"),
            Rule::any(libc::SYS_readlinkat, "files of the jail"),
            Rule::any(libc::SYS_readlink, "files of the jail"),
            Rule::any(libc::SYS_getdents64, "files of the jail"),
            Rule::any(libc::SYS_mkdirat, "files of the jail"),
            Rule::any(libc::SYS_symlinkat, "files of the jail"),
            Rule::any(libc::SYS_linkat, "files of the jail"),
            Rule::any(libc::SYS_unlinkat, "files of the jail"),
            Rule::any(libc::SYS_renameat, "files of the jail"),
            Rule::any(libc::SYS_renameat2, "files of the jail"),
            Rule::any(libc::SYS_fchmodat, "files of the jail"),
            Rule::any(libc::SYS_fchmodat2, "files of the jail"),
            Rule::any(libc::SYS_utimensat, "files of the jail"),
            Rule::any(libc::SYS_ftruncate, "files of the jail"),
            Rule::any(libc::SYS_fallocate, "files of the jail"),
            Rule::any(libc::SYS_fsync, "files of the jail"),
            Rule::any(libc::SYS_fdatasync, "files of the jail"),
            Rule::any(libc::SYS_poll, "waiting"),
            Rule::any(libc::SYS_ppoll, "waiting"),
            Rule::any(libc::SYS_epoll_create1, "waiting"),
            Rule::any(libc::SYS_epoll_ctl, "waiting"),
            Rule::any(libc::SYS_epoll_wait, "waiting"),
            Rule::any(libc::SYS_epoll_pwait, "waiting"),
            Rule::any(libc::SYS_eventfd2, "waiting"),
            Rule::any(libc::SYS_sendmsg, "streams, and the daemon"),
            Rule::any(libc::SYS_recvmsg, "streams, and the daemon"),
            Rule::any(libc::SYS_sendto, "streams"),
            Rule::any(libc::SYS_recvfrom, "streams"),
            Rule::any(libc::SYS_shutdown, "streams"),
            Rule::any(libc::SYS_socketpair, "streams"),
            Rule::any(libc::SYS_accept4, "connections"),
            $($own,)*
        ]
    };
}

/// Of a process with a VM.
pub(super) const VM_PROCESS: &[Rule] = process![
    Rule::any(libc::SYS_timerfd_create, "the VM's timers"),
    Rule::any(libc::SYS_timerfd_settime, "the VM's timers"),
    Rule::any(libc::SYS_mbind, "the guest's memory"),
    Rule::any(libc::SYS_unshare, "a umask of the thread's own"),
    Rule::any(libc::SYS_umask, "modes as the guest wants them"),
    Rule::any(libc::SYS_mknodat, "files of the guest"),
    Rule::any(libc::SYS_fchownat, "files of the guest"),
    Rule::any(libc::SYS_copy_file_range, "files of the guest"),
    Rule::any(libc::SYS_getxattr, "files of the guest"),
    Rule::any(libc::SYS_setxattr, "files of the guest"),
    Rule::any(libc::SYS_listxattr, "files of the guest"),
    Rule::any(libc::SYS_removexattr, "files of the guest"),
    Rule::any(libc::SYS_io_uring_setup, "disks"),
    Rule::any(libc::SYS_io_uring_register, "disks"),
    Rule::any(libc::SYS_io_uring_enter, "disks"),
];

/// Of a process with wasm programs.
pub(super) const WASM_PROCESS: &[Rule] = process![
    Rule::any(libc::SYS_socket, "sockets of programs"),
    Rule::any(libc::SYS_bind, "sockets of programs"),
    Rule::any(libc::SYS_listen, "sockets of programs"),
    Rule::any(libc::SYS_connect, "sockets of programs"),
    Rule::any(libc::SYS_getsockname, "sockets of programs"),
    Rule::any(libc::SYS_getpeername, "sockets of programs"),
    Rule::any(libc::SYS_getsockopt, "sockets of programs"),
    Rule::any(libc::SYS_setsockopt, "sockets of programs"),
    Rule::any(libc::SYS_recvmmsg, "names, asked of several servers"),
    Rule::any(libc::SYS_sendmmsg, "names, asked of several servers"),
    Rule::any(libc::SYS_fadvise64, "advice that programs give"),
    Rule::any(libc::SYS_faccessat2, "files of programs"),
];
