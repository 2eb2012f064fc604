//! Benchmarks: each prints a table and writes `target/bench/NAME.json`.

pub mod appkernel;
pub mod boot;
pub mod crun;
pub mod fs;
pub mod pods;
pub mod report;
pub mod wasm;
pub mod wasm_beside;
pub mod wasm_idle;
pub mod wasm_isolated;
pub mod wasm_soak;
