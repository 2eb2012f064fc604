//! `sandboxer`: see [`bulkhead_sandboxer::daemon`].

fn main() -> std::process::ExitCode {
    bulkhead_sandboxer::daemon::main()
}
