//! The device around the file operations.

use super::*;
use crate::testing::with_event_ops;

#[test]
fn init_agrees_on_big_requests_and_no_locks() {
    let mut test = Test::new();
    let out = test.init();
    assert_eq!((u32_at(&out, 0), u32_at(&out, 4)), (7, 33));
    let flags = u32_at(&out, 12);
    // POSIX_LOCKS and FLOCK_LOCKS stay within the guest; no writeback unless configured.
    assert_eq!(flags & (1 << 1 | 1 << 10 | 1 << 16), 0);
    // BIG_WRITES, AUTO_INVAL_DATA, DO_READDIRPLUS, MAX_PAGES, HANDLE_KILLPRIV_V2.
    for bit in [5, 12, 13, 22, 28] {
        assert_ne!(flags & 1 << bit, 0, "bit {bit}");
    }
    assert_eq!(u32_at(&out, 20), 1 << 20, "max_write");
    assert_eq!(u16::from_le_bytes([out[28], out[29]]), 256, "max_pages");
    assert_eq!(test.request(SETLKW, 1, &[0; 48]), Err(libc::ENOSYS));
    assert_eq!(test.request(FLUSH, 1, &[0; 24]), Err(libc::ENOSYS));
    assert_eq!(test.request(IOCTL, 1, &[0; 32]), Err(libc::ENOTTY));
    assert_eq!(test.request(STATFS, 1, &[]).unwrap().len(), 80);
    // Mounting over and over fills the log only so far.
    let refused = (0..100).filter(|_| {
        test.request(INIT, 1, &[words32(&[7, 33, 0, 0]), vec![0; 48]].concat())
            .is_err()
    });
    assert!(refused.count() > 20);
}

#[test]
fn caching_modes() {
    let timeouts = |entry: &[u8]| (u64_at(entry, 16), u64_at(entry, 24));
    let flags =
        |test: &mut Test, node| u32_at(&test.request(OPEN, node, &words32(&[0, 0])).unwrap(), 8);
    for (caching, seconds, first, second, missing) in [
        (Caching::Never, 0, 1, 1, Err(libc::ENOENT)),
        (Caching::Auto, 1, 0, 2, Err(libc::ENOENT)),
        (Caching::Always, 86_400, 2, 2, Ok(0)),
    ] {
        let mut test = Test::with(|config| config.caching = caching);
        fs::write(test.root().join("f"), b"1").unwrap();
        let entry = test.request(LOOKUP, 1, &z("f")).unwrap();
        assert_eq!(timeouts(&entry), (seconds, seconds));
        let node = u64_at(&entry, 0);
        assert_eq!(flags(&mut test, node), first, "{caching:?}");
        assert_eq!(flags(&mut test, node), second, "{caching:?}");
        if caching == Caching::Auto {
            // Changed on the host: what the guest has cached is not used.
            fs::write(test.root().join("f"), b"22").unwrap();
            assert_eq!(flags(&mut test, node), 0);
        }
        assert_eq!(test.lookup(1, "missing"), missing);
    }
    let mut writeback = Test::with(|config| config.writeback = true);
    assert_ne!(u32_at(&writeback.init(), 12) & 1 << 16, 0);
    let (node, handle) = writeback
        .create(1, "f", libc::O_WRONLY | libc::O_APPEND, 0o600)
        .unwrap();
    writeback
        .write(node, handle, 10, b"x", libc::O_WRONLY | libc::O_APPEND)
        .unwrap();
    assert_eq!(writeback.read(node, handle, 10, 10).unwrap(), b"x");
}

#[test]
fn state_round_trip_keeps_files_open() {
    let mut test = Test::new();
    fs::create_dir(test.root().join("dir")).unwrap();
    fs::write(test.root().join("dir/weird \u{e9}\n"), b"content").unwrap();
    let dir = test.lookup(1, "dir").unwrap();
    let file = test.lookup(dir, "weird \u{e9}\n").unwrap();
    let handle = test.open(file, libc::O_RDWR).unwrap();
    let (gone, gone_handle) = test.create(1, "gone", libc::O_RDWR, 0o600).unwrap();
    test.request(UNLINK, 1, &z("gone")).unwrap();
    let listing = u64_at(&test.request(OPENDIR, dir, &words32(&[0, 0])).unwrap(), 0);
    let state = test.client.fs.save();

    let mut copy = Fs::new(Test::config(&test.dir, |_| {})).unwrap();
    copy.restore(&state).unwrap();
    let mut again = copy.save();
    // The removed file and its handle are not there any more.
    let without: Vec<_> = state["handles"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|h| h["id"] != gone_handle)
        .cloned()
        .collect();
    again["handles"] = without.clone().into();
    let mut expected = state.clone();
    expected["handles"] = without.into();
    assert_eq!(again, expected);
    test.client = Client::new(copy).unwrap();
    assert_eq!(test.read(file, handle, 0, 100).unwrap(), b"content");
    test.write(file, handle, 0, b"C", 0).unwrap();
    assert_eq!(test.lookup(dir, "weird \u{e9}\n"), Ok(file));
    assert_eq!(test.getattr(gone), Err(libc::ESTALE));
    assert_eq!(test.read(gone, gone_handle, 0, 1), Err(libc::EBADF));
    let body = [
        words64(&[listing, 0]),
        words32(&[4096, 0]),
        words64(&[0, 0]),
    ]
    .concat();
    assert!(!test.request(READDIRPLUS, dir, &body).unwrap().is_empty());
    let (new, _) = test.create(1, "new", libc::O_RDWR, 0o600).unwrap();
    assert!(new > gone);
    test.forget(file, 2);
    test.request(RELEASE, file, &[words64(&[handle]), vec![0; 16]].concat())
        .unwrap();
    test.forget(file, 1);
    assert_eq!(test.getattr(file), Err(libc::ESTALE));

    for (change, with) in [
        ("version", "2"),
        ("tag", "\"other\""),
        (
            "nodes",
            "[{\"id\":5,\"parent\":1,\"name\":\"../x\",\"kind\":0,\"lookups\":1}]",
        ),
    ] {
        let mut bad = state.clone();
        bad[change] = serde_json::from_str(with).unwrap();
        assert!(
            Fs::new(Test::config(&test.dir, |_| {}))
                .unwrap()
                .restore(&bad)
                .is_err(),
            "{change}"
        );
    }
}

#[test]
fn reset_forgets_everything() {
    let mut test = Test::new();
    let (file, _) = test.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(test.client.fs.deactivate().len(), 2);
    let held = |test: &Test| {
        let counters = test.client.fs.counters();
        (counters.nodes, counters.node_fds, counters.handles)
    };
    // A vCPU's thread may not close files: they are left to the event loop.
    assert_eq!(held(&test), (2, 0, 1));
    with_event_ops(|ops| test.client.fs.on_deactivated(ops));
    assert_eq!(held(&test), (1, 0, 0));
    let fs = Fs::new(Test::config(&test.dir, |_| {})).unwrap();
    test.client = Client::new(fs).unwrap();
    test.init();
    assert_eq!(test.getattr(file), Err(libc::ESTALE));
}

#[test]
fn configuration() {
    let dir = tempfile::tempdir().unwrap();
    let fs = Fs::new(FsConfig::new("tag", dir.path()).unwrap()).unwrap();
    let mut config = [0xff; 44];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..4], b"tag\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    fs.read_config(u64::MAX, &mut config);
    for tag in [String::new(), "x".repeat(37), "a\0b".to_owned()] {
        assert!(Fs::new(FsConfig::new(tag, dir.path()).unwrap()).is_err());
    }
    let error = FsConfig::new("tag", &dir.path().join("missing")).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
    fs::write(dir.path().join("file"), b"").unwrap();
    assert!(FsConfig::new("tag", &dir.path().join("file")).is_err());
}
