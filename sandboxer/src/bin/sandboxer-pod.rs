//! `sandboxer-pod`: see [`bulkhead_sandboxer::daemon::program`].

fn main() -> std::process::ExitCode {
    bulkhead_sandboxer::daemon::program::pod_main()
}
