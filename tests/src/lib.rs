//! What end-to-end tests and benchmarks share: where things are, and how to measure a process.

pub mod bench;
pub mod calls;
pub mod cri;
pub mod demo;
pub mod env;
pub mod fuzz;
pub mod process;
pub mod runc;
pub mod screen;
pub mod terminal;
pub mod wasm;
