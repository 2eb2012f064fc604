//! Files: only what is mounted, read-only where it says so, and no way out.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use bulkhead_wasm::{ContainerConfig, Mount};

use crate::support::*;

/// Opens `path` below the first preopened directory with these flags and exits with the errno of
/// `path_open`, or, if it can be opened, copies the first bytes to standard output and exits 0.
fn opener(path: &str, oflags: u32, rights: u64) -> ContainerConfig {
    container(&format!(
        r#"(module
          (import "wasi_snapshot_preview1" "path_open"
            (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_read"
            (func $read (param i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_write"
            (func $write (param i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
          (memory (export "memory") 1)
          (data (i32.const 1024) "{path}")
          (func (export "_start") (local $errno i32)
            (local.set $errno (call $open (i32.const 3) (i32.const 1) (i32.const 1024)
              (i32.const {length}) (i32.const {oflags}) (i64.const {rights}) (i64.const 0)
              (i32.const 0) (i32.const 512)))
            (if (local.get $errno) (then (call $exit (local.get $errno))))
            (i32.store (i32.const 0) (i32.const 4096))
            (i32.store (i32.const 4) (i32.const 100))
            (if (i32.eqz (call $read (i32.load (i32.const 512)) (i32.const 0) (i32.const 1)
                (i32.const 4)))
              (then (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1)
                (i32.const 8)))))))"#,
        length = path.len(),
    ))
}

const READ: u64 = 2;
const WRITE: u64 = 64;
const CREATE: u32 = 1;
const ERRNO_NOENT: u8 = 44;
const ERRNO_PERM: u8 = 63;
const ERRNO_ROFS: u8 = 69;

fn in_dir(host: &Path, read_only: bool, mut config: ContainerConfig) -> (u8, String) {
    config.mounts = vec![Mount {
        host: host.to_owned(),
        guest: "/data".into(),
        read_only,
    }];
    let (exit, text) = run_output(config);
    assert_eq!(exit.message, None, "{exit:?}");
    (exit.code, text)
}

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("tempdir");
    fs::create_dir_all(dir.path().join("inside/sub")).expect("mkdir");
    fs::write(dir.path().join("secret"), "SECRET").expect("write");
    let inside = dir.path().join("inside");
    fs::write(inside.join("file"), "content").expect("write");
    symlink("../secret", inside.join("relative")).expect("symlink");
    symlink(dir.path().join("secret"), inside.join("absolute")).expect("symlink");
    symlink("..", inside.join("up")).expect("symlink");
    symlink("/proc/self/root/etc/passwd", inside.join("magic")).expect("symlink");
    symlink("file", inside.join("good")).expect("symlink");
    symlink("loop", inside.join("loop")).expect("symlink");
    dir
}

#[test]
fn mounted_files_are_read() {
    let dir = tree();
    let inside = dir.path().join("inside");
    for path in ["file", "sub/../file", "good", "./file"] {
        assert_eq!(
            in_dir(&inside, true, opener(path, 0, READ)),
            (0, "content".into()),
            "{path}"
        );
    }
    assert_eq!(
        in_dir(&inside, true, opener("missing", 0, READ)).0,
        ERRNO_NOENT
    );
}

#[test]
fn there_is_no_way_out() {
    let dir = tree();
    let inside = dir.path().join("inside");
    for path in [
        "..",
        "../secret",
        "sub/../../secret",
        "relative",
        "absolute",
        "up/secret",
        "magic",
        "/etc/passwd",
        "sub/../../inside/../secret",
        "loop",
    ] {
        let (code, text) = in_dir(&inside, false, opener(path, 0, READ));
        assert_ne!(code, 0, "{path}");
        assert_eq!(text, "", "{path}");
        let (code, _) = in_dir(&inside, false, opener(path, CREATE, READ | WRITE));
        assert_ne!(code, 0, "{path}");
    }
    // Nothing mounted, nothing there: descriptor 3 does not exist.
    assert_ne!(run(opener("file", 0, READ)).code, 0);
    assert_eq!(
        fs::read_to_string(dir.path().join("secret")).expect("read"),
        "SECRET"
    );
}

/// A rename between two states must never let a look-up escape.
#[test]
fn no_way_out_while_links_change() {
    let dir = tree();
    let inside = dir.path().join("inside");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (a, b) = (inside.join("sub"), inside.join("swap"));
            symlink("..", &b).expect("symlink");
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                let here = nix::fcntl::AT_FDCWD;
                nix::fcntl::renameat2(here, &a, here, &b, flags).expect("exchange");
            }
        });
        for _ in 0..300 {
            let (code, text) = in_dir(&inside, false, opener("sub/secret", 0, READ));
            assert_ne!(code, 0);
            assert_eq!(text, "");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn read_only_is_read_only() {
    let dir = tree();
    let inside = dir.path().join("inside");
    let (code, _) = in_dir(&inside, true, opener("new", CREATE, READ | WRITE));
    assert!([ERRNO_PERM, ERRNO_ROFS].contains(&code), "errno {code}");
    let (code, _) = in_dir(&inside, true, opener("file", 0, READ | WRITE));
    assert!([ERRNO_PERM, ERRNO_ROFS].contains(&code), "errno {code}");
    assert!(!inside.join("new").exists());
    let (code, _) = in_dir(&inside, false, opener("new", CREATE, READ | WRITE));
    assert_eq!(code, 0);
    assert!(inside.join("new").exists());
}

#[test]
fn bad_mounts_are_refused_before_the_start() {
    let dir = tree();
    let create = |host: &str, guest: &str| {
        let mut config = container(&exit(0));
        config.mounts = vec![Mount {
            host: dir.path().join(host),
            guest: guest.into(),
            read_only: false,
        }];
        pod().create(config).expect_err("refused").to_string()
    };
    assert!(create("nope", "/x").contains("No such file"));
    assert!(create("secret", "/x").contains("directories"));
    assert!(create("inside", "x").contains("absolute"));
}
