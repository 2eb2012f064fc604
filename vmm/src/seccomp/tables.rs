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
