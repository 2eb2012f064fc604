//! `vmmctl wasm`: see [`bulkhead_sandboxer::vmmctl::wasm_main`].

fn main() -> std::process::ExitCode {
    bulkhead_sandboxer::vmmctl::wasm_main()
}
