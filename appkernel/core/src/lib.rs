//! The parts of the app kernel that are plain logic. They run in the kernel and are tested on the
//! host; there is no `unsafe` here.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod bytes;
pub mod capabilities;
pub mod cmdline;
pub mod elf;
pub mod errno;
pub mod fair;
pub mod frames;
pub mod fuse;
pub mod icmp;
pub mod locks;
pub mod netconf;
pub mod netlink;
pub mod packet;
pub mod syscalls;
pub mod sysv;
pub mod terminal;
pub mod trace;
pub mod vdso;
pub mod virtio_mmio;
pub mod vma;
pub mod vsock;
pub mod watch;
pub mod xattr;
