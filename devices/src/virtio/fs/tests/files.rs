//! What a guest can do with files.

use super::*;

#[test]
fn files_are_read_and_written() {
    let mut test = Test::new();
    let (node, handle) = test.create(1, "a", libc::O_RDWR, 0o640).unwrap();
    let data: Vec<u8> = (0..200_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
    for (i, part) in data.chunks(60_000).enumerate() {
        assert_eq!(
            test.write(node, handle, i as u64 * 60_000, part, libc::O_RDWR),
            Ok(part.len() as u32)
        );
    }
    assert_eq!(fs::read(test.root().join("a")).unwrap(), data);
    assert_eq!(
        test.read(node, handle, 100_000, 65_536).unwrap(),
        data[100_000..165_536]
    );
    assert_eq!(
        test.read(node, handle, 199_999, 65_536).unwrap(),
        data[199_999..]
    );
    assert!(test.read(node, handle, 1 << 40, 4096).unwrap().is_empty());
    assert_eq!(test.read(node, handle, u64::MAX, 4096), Err(libc::EINVAL));
    assert_eq!(
        test.write(node, handle, u64::MAX - 2, b"abc", 0),
        Err(libc::EINVAL)
    );
    test.request(FSYNC, node, &[words64(&[handle]), vec![0; 8]].concat())
        .unwrap();

    // Appending goes to the end whatever the offset, and follows fcntl.
    assert_eq!(
        test.write(node, handle, 0, b"end", libc::O_RDWR | libc::O_APPEND),
        Ok(3)
    );
    assert_eq!(test.write(node, handle, 0, b"start", libc::O_RDWR), Ok(5));
    let now = fs::read(test.root().join("a")).unwrap();
    assert_eq!(
        (now.len(), &now[..5], &now[200_000..]),
        (200_003, &b"start"[..], &b"end"[..])
    );

    // Handles belong to their file and end with release.
    assert_eq!(test.read(1, handle, 0, 10), Err(libc::EBADF));
    let release = [words64(&[handle]), vec![0; 16]].concat();
    assert_eq!(test.request(RELEASE, 1, &release), Err(libc::EBADF));
    test.request(RELEASE, node, &release).unwrap();
    assert_eq!(test.read(node, handle, 0, 10), Err(libc::EBADF));
    let metrics = test.client.fs.counters();
    assert_eq!((metrics.handles, metrics.written_bytes), (0, 200_008));
}

#[test]
fn sparse_files_allocation_and_copies() {
    let mut test = Test::new();
    let (node, handle) = test.create(1, "a", libc::O_RDWR, 0o600).unwrap();
    test.request(
        FALLOCATE,
        node,
        &[words64(&[handle, 0, 8192]), words32(&[0, 0])].concat(),
    )
    .unwrap();
    assert_eq!(fs::metadata(test.root().join("a")).unwrap().len(), 8192);
    test.write(node, handle, 0, b"0123456789", 0).unwrap();
    let (other, to) = test.create(1, "b", libc::O_RDWR, 0o600).unwrap();
    let out = test
        .request(
            COPY_FILE_RANGE,
            node,
            &words64(&[handle, 2, other, to, 1, 5, 0]),
        )
        .unwrap();
    assert_eq!(u32_at(&out, 0), 5);
    assert_eq!(fs::read(test.root().join("b")).unwrap(), b"\x0023456");
    assert_eq!(
        test.request(
            COPY_FILE_RANGE,
            node,
            &words64(&[handle, 2, other, 99, 1, 5, 0])
        ),
        Err(libc::EBADF)
    );
    assert_eq!(
        test.request(COPY_FILE_RANGE, node, &words64(&[handle])),
        Err(libc::EINVAL)
    );
    let hole = |whence| [words64(&[handle, 0]), words32(&[whence, 0])].concat();
    assert_eq!(
        u64_at(
            &test
                .request(LSEEK, node, &hole(libc::SEEK_DATA.cast_unsigned()))
                .unwrap(),
            0
        ),
        0
    );
    assert_eq!(test.request(LSEEK, node, &hole(0)), Err(libc::EINVAL));
}

#[test]
fn owners_modes_and_times() {
    let mut test = Test::new();
    fs::set_permissions(test.root(), fs::Permissions::from_mode(0o700)).unwrap();
    let body = [words32(&[0o2755, 0]), z("d")].concat();
    // The guest's kernel has checked permissions; here only the owner matters.
    let entry = test.as_user((1000, 1001), MKDIR, 1, &body).unwrap();
    let dir = u64_at(&entry, 0);
    let body = [
        words32(&[(libc::O_RDWR | libc::O_CREAT).cast_unsigned(), 0o4755, 0, 0]),
        z("f"),
    ]
    .concat();
    let entry = test.as_user((2000, 2001), CREATE, dir, &body).unwrap();
    let file = u64_at(&entry, 0);
    let made = fs::metadata(test.root().join("d")).unwrap();
    assert_eq!((made.uid(), made.gid()), (1000, 1001));
    let made = fs::metadata(test.root().join("d/f")).unwrap();
    assert_eq!((made.uid(), made.mode() & 0o7777), (2000, 0o4755));
    assert_eq!(
        test.as_user(
            (u32::MAX, 0),
            MKDIR,
            1,
            &[words32(&[0o755, 0]), z("e")].concat()
        ),
        Err(libc::EINVAL)
    );
    // The thread is the daemon again.
    fs::write(test.root().join("mine"), b"").unwrap();
    assert_eq!(fs::metadata(test.root().join("mine")).unwrap().uid(), 0);

    // A write with WRITE_KILL_PRIV drops the set-user-id bit, one without keeps it.
    let handle = u64_at(&entry, 128);
    test.write(file, handle, 0, b"x", libc::O_RDWR).unwrap();
    assert_eq!(
        fs::metadata(test.root().join("d/f")).unwrap().mode() & 0o7777,
        0o4755
    );
    let head = [
        words64(&[handle, 0]),
        words32(&[1, 4]),
        words64(&[0]),
        words32(&[2, 0]),
        b"y".to_vec(),
    ]
    .concat();
    test.request(WRITE, file, &head).unwrap();
    assert_eq!(
        fs::metadata(test.root().join("d/f")).unwrap().mode() & 0o7777,
        0o755
    );

    let attr = test
        .setattr(
            file,
            1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5,
            3,
            0o6711,
            (5, 6),
        )
        .unwrap();
    assert_eq!(u64_at(&attr, 16 + 8), 3, "size");
    let made = fs::metadata(test.root().join("d/f")).unwrap();
    assert_eq!(
        (
            made.uid(),
            made.gid(),
            made.len(),
            made.mtime(),
            made.mtime_nsec()
        ),
        (5, 6, 3, 1_000_000, 5)
    );
    assert_eq!(
        test.setattr(file, 1 << 3, u64::MAX, 0, (0, 0)),
        Err(libc::EINVAL)
    );
    assert_eq!(test.setattr(dir, 1 << 3, 0, 0, (0, 0)), Err(libc::EISDIR));
}

#[test]
fn removed_files_live_until_forgotten() {
    let mut test = Test::new();
    let (file, handle) = test.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    test.write(file, handle, 0, b"data", 0).unwrap();
    fs::write(test.root().join("g"), b"other").unwrap();
    let other = test.lookup(1, "g").unwrap();
    test.request(UNLINK, 1, &z("f")).unwrap();
    assert_eq!(u64_at(&test.getattr(file).unwrap(), 16 + 8), 4);
    assert_eq!(test.read(file, handle, 0, 10).unwrap(), b"data");
    // A new file of the same name is another one, even if the number is used again.
    let (again, _) = test.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    assert_ne!(again, file);
    // Renaming over a file removes it too.
    let rename = [words64(&[1]), words32(&[0, 0]), z("f"), z("g")].concat();
    test.request(RENAME2, 1, &rename).unwrap();
    assert_eq!(u64_at(&test.getattr(other).unwrap(), 16 + 8), 5);
    assert_eq!(test.lookup(1, "g"), Ok(again));
    let before = test.client.fs.counters();
    test.forget(other, 1);
    test.forget(file, 1);
    test.request(RELEASE, file, &[words64(&[handle]), vec![0; 16]].concat())
        .unwrap();
    let after = test.client.fs.counters();
    assert_eq!(before.nodes - after.nodes, 2);
    assert_eq!(before.node_fds - after.node_fds, 2);
    assert_eq!(test.getattr(file), Err(libc::ESTALE));
}

#[test]
fn files_without_a_name() {
    let mut test = Test::new();
    let flags = (libc::O_RDWR | libc::O_TMPFILE).cast_unsigned();
    let body = [words32(&[flags, 0o640, 0, 0]), z("#1")].concat();
    let out = match test.as_user((7, 8), TMPFILE, 1, &body) {
        Ok(out) => out,
        // A temporary directory whose file system has no such files.
        Err(error) => {
            assert_eq!(error, libc::EOPNOTSUPP);
            return;
        }
    };
    let (node, handle) = (u64_at(&out, 0), u64_at(&out, 128));
    assert_eq!(test.write(node, handle, 0, b"data", 0), Ok(4));
    assert_eq!(fs::read_dir(test.root()).unwrap().count(), 0);
    test.getattr(node).unwrap();
    test.request(LINK, 1, &[words64(&[node]), z("named")].concat())
        .unwrap();
    let made = fs::metadata(test.root().join("named")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.len()), (7, 8, 4));
    assert_eq!(test.lookup(1, "named"), Ok(node));
    test.request(RELEASE, node, &[words64(&[handle]), vec![0; 16]].concat())
        .unwrap();
    test.forget(node, 3);
    assert_eq!(test.client.fs.counters().nodes, 1);
    assert_eq!(test.request(TMPFILE, 1, &[0; 3]), Err(libc::EINVAL));
    assert_eq!(test.request(TMPFILE, 99, &body), Err(libc::ESTALE));
    let mut read_only = Test::with(|config| config.read_only = true);
    assert_eq!(read_only.request(TMPFILE, 1, &body), Err(libc::EROFS));
}

#[test]
fn renames_move_what_is_below() {
    let mut test = Test::new();
    fs::create_dir_all(test.root().join("a/b")).unwrap();
    fs::create_dir(test.root().join("c")).unwrap();
    fs::write(test.root().join("a/b/f"), b"deep").unwrap();
    let a = test.lookup(1, "a").unwrap();
    let b = test.lookup(a, "b").unwrap();
    let c = test.lookup(1, "c").unwrap();
    let file = test.lookup(b, "f").unwrap();
    let rename = |to: u64, flags: u32, old: &str, new: &str| {
        [words64(&[to]), words32(&[flags, 0]), z(old), z(new)].concat()
    };
    test.request(RENAME2, a, &rename(c, 0, "b", "moved"))
        .unwrap();
    // The guest forgets where it came from; nothing of the path was open.
    test.forget(a, 1);
    let handle = test.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(test.read(file, handle, 0, 10).unwrap(), b"deep");
    test.request(RENAME2, 1, &rename(c, libc::RENAME_EXCHANGE, "a", "moved"))
        .unwrap();
    assert_eq!(test.lookup(1, "a"), Ok(b));
    assert_eq!(test.lookup(b, "f"), Ok(file));
    assert_eq!(
        test.request(RENAME2, 1, &rename(1, libc::RENAME_NOREPLACE, "a", "c")),
        Err(libc::EEXIST)
    );
    assert_eq!(
        test.request(RENAME2, 1, &rename(1, libc::RENAME_WHITEOUT, "a", "w")),
        Err(libc::EINVAL)
    );
    // Hard links: one node, any of its names.
    test.request(LINK, 1, &[words64(&[file]), z("second")].concat())
        .unwrap();
    assert_eq!(test.lookup(1, "second"), Ok(file));
    test.request(UNLINK, b, &z("f")).unwrap();
    assert_eq!(fs::metadata(test.root().join("second")).unwrap().nlink(), 1);
    test.getattr(file).unwrap();
}

#[test]
fn large_directories_are_listed_whole() {
    const COUNT: usize = 3000;
    for size in [4096, 65_536] {
        let mut test = Test::new();
        for i in 0..COUNT {
            fs::write(
                test.root().join(format!("file-with-a-longer-name-{i}")),
                b"",
            )
            .unwrap();
        }
        for plus in [false, true] {
            let mut names = test.list(1, plus, size);
            assert_eq!(
                names
                    .iter()
                    .filter(|(name, id)| (name == "." || name == "..") && *id == 0)
                    .count(),
                2
            );
            names.retain(|(name, _)| name != "." && name != "..");
            names.sort();
            names.dedup_by(|a, b| a.0 == b.0);
            assert_eq!(names.len(), COUNT);
            assert!(names.iter().all(|(_, id)| (*id > 1) == plus));
            if plus {
                // Every entry counts as a lookup, and none needed a descriptor.
                let counters = test.client.fs.counters();
                assert_eq!((counters.nodes, counters.node_fds), (COUNT as u64 + 1, 0));
                for (_, id) in names {
                    test.forget(id, 1);
                }
                assert_eq!(test.client.fs.counters().nodes, 1);
            }
        }
    }
}

#[test]
fn directory_reading_errors() {
    let mut test = Test::new();
    fs::create_dir(test.root().join("d")).unwrap();
    let dir = test.lookup(1, "d").unwrap();
    let handle = u64_at(&test.request(OPENDIR, dir, &words32(&[0, 0])).unwrap(), 0);
    let body = |handle: u64, at: u64, size: u32| {
        [
            words64(&[handle, at]),
            words32(&[size, 0]),
            words64(&[0, 0]),
        ]
        .concat()
    };
    assert_eq!(
        test.request(READDIRPLUS, dir, &body(handle + 1, 0, 4096)),
        Err(libc::EBADF)
    );
    assert_eq!(
        test.request(READDIRPLUS, dir, &body(handle, u64::MAX, 4096)),
        Err(libc::EINVAL)
    );
    assert_eq!(
        test.request(READDIR, dir, &body(handle, 0, 10)),
        Err(libc::EINVAL)
    );
    assert_eq!(
        test.request(READDIR, dir, &body(handle, 0, 80_000)),
        Err(libc::EINVAL)
    );
    let (file, opened) = test.create(dir, "f", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(
        test.request(READDIR, file, &body(opened, 0, 4096)),
        Err(libc::ENOTDIR)
    );
    assert_eq!(test.open(dir, libc::O_RDONLY), Err(libc::EISDIR));
}

#[test]
fn extended_attributes() {
    let mut test = Test::new();
    let (file, _) = test.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    let set = |name: &str, value: &[u8]| {
        [words32(&[value.len() as u32, 0]), z(name), value.to_vec()].concat()
    };
    match test.request(SETXATTR, file, &set("user.a", b"value")) {
        Ok(_) => {}
        // A temporary directory without attributes.
        Err(error) => {
            assert_eq!(error, libc::EOPNOTSUPP);
            return;
        }
    }
    let get = |name: &str, size: u32| [words32(&[size, 0]), z(name)].concat();
    assert_eq!(
        test.request(GETXATTR, file, &get("user.a", 100)).unwrap(),
        b"value"
    );
    assert_eq!(
        u32_at(&test.request(GETXATTR, file, &get("user.a", 0)).unwrap(), 0),
        5
    );
    assert_eq!(
        test.request(GETXATTR, file, &get("user.a", 2)),
        Err(libc::ERANGE)
    );
    // A size nobody should allocate.
    assert_eq!(
        test.request(GETXATTR, file, &get("user.a", u32::MAX))
            .unwrap(),
        b"value"
    );
    assert_eq!(
        test.request(LISTXATTR, file, &words32(&[u32::MAX, 0]))
            .unwrap(),
        b"user.a\0"
    );
    assert_eq!(
        u32_at(
            &test.request(LISTXATTR, file, &words32(&[0, 0])).unwrap(),
            0
        ),
        7
    );
    assert_eq!(
        test.request(LISTXATTR, file, &words32(&[3, 0])),
        Err(libc::ERANGE)
    );
    for name in [
        "trusted.overlay.opaque",
        "security.selinux",
        "security.ima",
        "other",
    ] {
        assert_eq!(
            test.request(SETXATTR, file, &set(name, b"y")),
            Err(libc::EOPNOTSUPP)
        );
        assert_eq!(
            test.request(REMOVEXATTR, file, &z(name)),
            Err(libc::EOPNOTSUPP)
        );
        assert_eq!(
            test.request(GETXATTR, file, &get(name, 10)),
            Err(libc::ENODATA)
        );
    }
    test.request(REMOVEXATTR, file, &z("user.a")).unwrap();
    // Sizes that do not match what follows.
    assert_eq!(
        test.request(
            SETXATTR,
            file,
            &[words32(&[9, 0]), z("user.b"), b"v".to_vec()].concat()
        ),
        Err(libc::EINVAL)
    );
    assert_eq!(
        test.request(
            SETXATTR,
            file,
            &[words32(&[9, 0]), b"user.b".to_vec()].concat()
        ),
        Err(libc::EINVAL)
    );
    let mut off = Test::with(|config| config.xattrs = false);
    assert_eq!(
        off.request(GETXATTR, 1, &get("user.a", 10)),
        Err(libc::ENOSYS)
    );
}

#[test]
fn a_file_stays_itself_when_overlayfs_copies_it_up() {
    let mut test = Test::new();
    let dir = test.dir.path().to_owned();
    // Layers on different file systems: the numbers change on copy-up.
    let layers = tempfile::tempdir_in("/dev/shm").unwrap();
    for name in ["lower", "upper", "work"] {
        let base = if name == "lower" { layers.path() } else { &dir };
        fs::create_dir(base.join(name)).unwrap();
    }
    fs::write(layers.path().join("lower/f"), b"lower").unwrap();
    fs::create_dir(test.root().join("overlay")).unwrap();
    let target = test.root().join("overlay");
    let options = format!(
        "lowerdir={},upperdir={},workdir={},xino=off",
        layers.path().join("lower").display(),
        dir.join("upper").display(),
        dir.join("work").display(),
    );
    let mounted = nix::mount::mount(
        Some("overlay"),
        &target,
        Some("overlay"),
        nix::mount::MsFlags::empty(),
        Some(options.as_str()),
    );
    if let Err(error) = mounted {
        eprintln!("overlayfs cannot be mounted here ({error}): copy-up is not tested");
        return;
    }
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mount = test.lookup(1, "overlay").unwrap();
        let file = test.lookup(mount, "f").unwrap();
        let reader = test.open(file, libc::O_RDONLY).unwrap();
        let writer = test.open(file, libc::O_RDWR).unwrap();
        test.write(file, writer, 0, b"UPPER", 0).unwrap();
        assert_eq!(test.lookup(mount, "f"), Ok(file));
        test.getattr(file).unwrap();
        assert_eq!(test.read(file, writer, 0, 10).unwrap(), b"UPPER");
        test.request(RELEASE, file, &[words64(&[reader]), vec![0; 16]].concat())
            .unwrap();
        test.request(RELEASE, file, &[words64(&[writer]), vec![0; 16]].concat())
            .unwrap();
        test.forget(file, 2);
        test.forget(mount, 1);
        assert_eq!(test.client.fs.counters().nodes, 1);
    }));
    nix::mount::umount(&target).unwrap();
    result.unwrap();
}
