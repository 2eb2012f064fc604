//! The cases, by what they attack.

mod agent;
pub mod honest;
mod machine;
mod requests;
mod rings;
mod streams;
mod transport;

use crate::chance::Chance;
use crate::device::Target;

/// Runs a case; `false` if there is none of this name.
pub fn run(name: &str, targets: &[Target], chance: &mut Chance, rounds: u64) -> bool {
    match name {
        "registers" => transport::registers(targets, chance, rounds),
        "setup" => transport::setup(targets, chance, rounds),
        "storm" => transport::storm(targets, chance, rounds),
        "chains" => rings::chains(targets, chance, rounds),
        "races" => rings::races(targets, chance, rounds),
        "resets" => rings::resets(targets, chance, rounds),
        "fuse" => requests::fuse(targets, chance, rounds),
        "vsock" => requests::vsock(targets, chance, rounds),
        "streams" => streams::reset(targets, chance, rounds),
        "agent" => agent::lies(targets, chance, rounds),
        "block" => requests::block(targets, chance, rounds),
        "net" => requests::net(targets, chance, rounds),
        "balloon" => requests::balloon(targets, chance, rounds),
        "mem" => requests::mem(targets, chance, rounds),
        "ports" => machine::ports(chance, rounds),
        "memory" => machine::memory(chance, rounds),
        "msrs" => machine::msrs(chance, rounds),
        "init" => machine::init(),
        "escape" => requests::escape(targets, chance),
        _ => return false,
    }
    true
}
