//! A guest kernel that keeps no rule. It is given one case by its command line
//! (`hostile.case=NAME hostile.seed=N hostile.rounds=N`), does its worst to the devices that the
//! line names, then tries whether a device that is reset still serves an honest driver, says
//! `hostile: NAME done` on the serial port and resets the machine. tests/e2e/hostile.rs runs it
//! beside a neighbour.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod access;
#[cfg(target_os = "none")]
mod cases;
#[cfg(target_os = "none")]
mod chance;
#[cfg(target_os = "none")]
mod device;
#[cfg(target_os = "none")]
mod ring;
#[cfg(target_os = "none")]
mod start;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!(
        "This is the host build of a guest; `appkernel/build --hostile` makes the one to boot."
    );
    std::process::exit(2);
}
