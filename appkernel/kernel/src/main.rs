//! The app kernel: a small kernel that runs Linux programs in a VM. docs/appkernel.md says what
//! works.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod agent;
#[cfg(target_os = "none")]
mod alarms;
#[cfg(target_os = "none")]
mod container;
#[cfg(target_os = "none")]
mod exec;
#[cfg(target_os = "none")]
mod fs;
#[cfg(target_os = "none")]
mod log;
#[cfg(target_os = "none")]
mod mm;
#[cfg(target_os = "none")]
mod net;
#[cfg(target_os = "none")]
mod signal;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
mod syscall;
#[cfg(target_os = "none")]
mod task;
#[cfg(target_os = "none")]
mod traps;
#[cfg(target_os = "none")]
mod vdso;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("This is the host build of a kernel; `appkernel/build` makes the one to boot.");
    std::process::exit(2);
}
