//! Programs of ours (`tests/guest/parity`, C and Rust) on three kernels: the host's (by runc), that of
//! the Linux microVM, and the app kernel. All three must agree.

use std::process::{Command, Stdio};

use bulkhead_sandboxer::image::{Silent, Store};
use bulkhead_tests::env;
use bulkhead_tests::runc::Bundle;

use super::App;

/// Each program, what it writes, and how it ends.
const ALL: &str = r#"
for program in /p/parity/*; do
    echo "=== $program"
    timeout -s KILL 100 "$program" 2>&1
    echo "=== ended: $?"
done
"#;

#[test]
fn programs_do_the_same_on_the_host_in_the_microvm_and_on_the_app_kernel() {
    let app = App::new("busybox");
    let programs = env::guest_programs().unwrap();
    let bind = format!("{}:/p:ro", programs.display());
    let in_a_vm = |options: &[&str]| {
        let output = app
            .vmmctl()
            .args(["run", "--memory", "128M", "--user", "0:0", "-v", &bind])
            .args(options)
            .arg(&app.image)
            .args(["--", "sh", "-c", ALL])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    };
    let dir = app.dir.path().join("bundle");
    std::fs::create_dir(&dir).unwrap();
    let store = Store::open(&app.dir.path().join("for-runc")).unwrap();
    let rootfs = store.get(&app.image, &mut Silent).unwrap().rootfs;
    let bundle = Bundle::new(&dir, &rootfs, &[(&programs, "/p")]).unwrap();
    let host = bundle.run(&["sh", "-c", ALL]).unwrap();
    let errors = String::from_utf8_lossy(&host.stderr).into_owned();
    let host = String::from_utf8_lossy(&host.stdout).into_owned();
    let count = std::fs::read_dir(programs.join("parity")).unwrap().count();
    assert_eq!(
        host.matches("=== ended: 0\n").count(),
        count,
        "the programs themselves are wrong: {host}{errors}"
    );
    for options in [&["--sandbox", "app"][..], &[]] {
        let (output, errors) = in_a_vm(options);
        let differ = differences(&host, &output);
        assert!(differ.is_empty(), "{options:?}: {differ}{errors}");
    }
}

/// Lines that are not the same, as `diff` shows them; the host's first.
fn differences(host: &str, other: &str) -> String {
    if host == other {
        return String::new();
    }
    let dir = tempfile::tempdir().unwrap();
    let files = ["host", "guest"].map(|name| dir.path().join(name));
    std::fs::write(&files[0], host).unwrap();
    std::fs::write(&files[1], other).unwrap();
    let diff = Command::new("diff")
        .args(["-U", "1"])
        .args(&files)
        .output()
        .unwrap();
    String::from_utf8_lossy(&diff.stdout).into_owned()
}
