//! What is fuzzed (`src/bin/fuzz.rs`): everything that reads bytes of guests, of images, of programs, of
//! other processes, or of files that somebody else may have written.

mod daemon;
mod images;

use bulkhead_devices::fuzzing::{Target as DeviceTarget, drive};
use bulkhead_devices::virtio::fs::fuzz_fs;
use bulkhead_devices::virtio::vsock::fuzz_vsock;
use bulkhead_protocol::frame::Decoder;
use sha2::{Digest, Sha256};

/// One thing that reads bytes.
#[derive(Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Longest input in bytes.
    pub longest: usize,
    /// Reads an input; a panic is a finding.
    pub run: fn(&[u8]),
    /// Inputs that are right, or nearly so.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them. Those of devices take their input as what a driver does: accesses of registers and
/// configuration, rings and requests in memory, resets.
pub const TARGETS: &[Target] = &[
    device("legacy", |data| drive(DeviceTarget::Legacy, data)),
    device("rng", |data| drive(DeviceTarget::Rng, data)),
    device("blk", |data| drive(DeviceTarget::Blk, data)),
    device("balloon", |data| drive(DeviceTarget::Balloon, data)),
    device("mem", |data| drive(DeviceTarget::Mem, data)),
    device("net", |data| drive(DeviceTarget::Net, data)),
    device("vsock", fuzz_vsock),
    device("fs", fuzz_fs),
    target("ttrpc", 4096, ttrpc, no_seeds),
    target("kernel", 8192, images::kernel, images::kernel_seeds),
    target("image", 16384, images::image, images::image_seeds),
    target("config", 8192, daemon::config, daemon::config_seeds),
    target("state", 4096, daemon::state, daemon::state_seeds),
    target("spec", 8192, daemon::spec, daemon::spec_seeds),
    target("worker", 4096, daemon::report, daemon::report_seeds),
    target(
        "controller",
        4096,
        daemon::controller,
        daemon::controller_seeds,
    ),
    target("http", 4096, daemon::http, daemon::http_seeds),
    target("task", 4096, daemon::task, daemon::task_seeds),
    target(
        "wasm-cache",
        256,
        daemon::wasm_cache,
        daemon::wasm_cache_seeds,
    ),
    target("program", 4096, program, program_seeds),
];

const fn target(
    name: &'static str,
    longest: usize,
    run: fn(&[u8]),
    seeds: fn() -> Vec<Vec<u8>>,
) -> Target {
    Target {
        name,
        longest,
        run,
        seeds,
    }
}

const fn device(name: &'static str, run: fn(&[u8])) -> Target {
    target(name, 4096, run, no_seeds)
}

fn no_seeds() -> Vec<Vec<u8>> {
    vec![Vec::new(), vec![0; 64], vec![0xFF; 64]]
}

/// Name of an input.
pub fn hex(data: &[u8]) -> String {
    let digest = Sha256::digest(data);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Frames of the agent protocol, in pieces as a stream delivers them.
fn ttrpc(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else {
        return;
    };
    let mut decoder = Decoder::new(64 << 10);
    for chunk in data.chunks(usize::from(*piece).max(1)) {
        let mut rest = chunk;
        while !rest.is_empty() {
            let before = rest.len();
            if decoder.feed(&mut rest).is_none() && rest.len() == before {
                break;
            }
        }
    }
}

/// A program's file, as the app kernel reads it: header and table of segments.
fn program(data: &[u8]) {
    let Ok(header) = appkernel_core::elf::Header::parse(data) else {
        return;
    };
    let Ok(start) = usize::try_from(header.table_offset) else {
        return;
    };
    let table = data.get(start..).unwrap_or_default();
    let table = table.get(..header.table_bytes()).unwrap_or(table);
    if let Ok(segments) = appkernel_core::elf::Segments::parse(table) {
        let (low, high) = segments.extent();
        assert!(low <= high, "{low:#x} to {high:#x}");
        segments.table_address(&header);
    }
}

fn program_seeds() -> Vec<Vec<u8>> {
    vec![bulkhead_fixtures::tiny_guest::elf(
        bulkhead_fixtures::tiny_guest::Kind::Marker,
    )]
}
