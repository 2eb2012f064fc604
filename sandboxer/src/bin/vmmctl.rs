//! `vmmctl`: see [`bulkhead_sandboxer::vmmctl`].

fn main() -> std::process::ExitCode {
    bulkhead_sandboxer::vmmctl::main()
}
