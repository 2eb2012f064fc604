//! What a guest must not be able to do.

use super::*;

#[test]
fn only_single_names_lead_anywhere() {
    let mut test = Test::new();
    fs::create_dir(test.root().join("dir")).unwrap();
    fs::write(test.root().join("dir/inside"), b"x").unwrap();
    let dir = test.lookup(1, "dir").unwrap();
    for parent in [1, dir] {
        for name in [
            "..",
            ".",
            "",
            "../secret",
            "dir/inside",
            "/etc/passwd",
            "/",
            "a/..",
        ] {
            assert_eq!(test.lookup(parent, name), Err(libc::EINVAL), "{name}");
            let named = |head: &[u32]| [words32(head), z(name)].concat();
            assert_eq!(
                test.request(MKDIR, parent, &named(&[0o755, 0])),
                Err(libc::EINVAL)
            );
            assert_eq!(
                test.request(MKNOD, parent, &named(&[libc::S_IFREG | 0o644, 0, 0, 0])),
                Err(libc::EINVAL)
            );
            assert_eq!(
                test.create(parent, name, libc::O_RDWR, 0o600),
                Err(libc::EINVAL)
            );
            assert_eq!(test.request(UNLINK, parent, &z(name)), Err(libc::EINVAL));
            assert_eq!(test.request(RMDIR, parent, &z(name)), Err(libc::EINVAL));
            assert_eq!(
                test.request(SYMLINK, parent, &[z(name), z("target")].concat()),
                Err(libc::EINVAL)
            );
            let rename =
                |old: &str, new: &str| [words64(&[1]), words32(&[0, 0]), z(old), z(new)].concat();
            assert_eq!(
                test.request(RENAME2, parent, &rename(name, "n")),
                Err(libc::EINVAL)
            );
            assert_eq!(
                test.request(RENAME2, 1, &rename("dir", name)),
                Err(libc::EINVAL)
            );
            assert_eq!(
                test.request(LINK, parent, &[words64(&[dir]), z(name)].concat()),
                Err(libc::EINVAL)
            );
        }
    }
    // No end, nothing at all, or bytes behind the end.
    assert_eq!(test.request(LOOKUP, 1, b"dir"), Err(libc::EINVAL));
    assert_eq!(test.request(LOOKUP, 1, b""), Err(libc::EINVAL));
    assert_eq!(
        test.request(LOOKUP, 1, b"dir\0\0")
            .map(|entry| u64_at(&entry, 0)),
        Ok(dir)
    );
}

#[test]
fn links_are_the_guests_to_follow() {
    let mut test = Test::new();
    for (name, target) in [
        ("abs", "/etc/passwd"),
        ("up", "../secret"),
        ("dirlink", ".."),
        ("magic", "/proc/self/root"),
    ] {
        symlink(target, test.root().join(name)).unwrap();
        let node = test.lookup(1, name).unwrap();
        assert_eq!(
            test.request(READLINK, node, &[]).unwrap(),
            target.as_bytes()
        );
        assert_eq!(test.open(node, libc::O_RDONLY), Err(libc::ELOOP));
        assert_eq!(
            test.request(OPENDIR, node, &words32(&[0, 0])),
            Err(libc::ENOTDIR)
        );
        assert_eq!(test.lookup(node, "passwd"), Err(libc::ENOTDIR));
        assert_eq!(test.lookup(node, "secret"), Err(libc::ENOTDIR));
        // Creating over a link does not write through it, nor does any attribute change.
        assert_eq!(
            test.create(1, name, libc::O_RDWR | libc::O_CREAT, 0o600),
            Err(libc::ELOOP)
        );
        assert_eq!(
            test.setattr(node, 1, 0, 0o777, (0, 0)),
            Err(libc::EOPNOTSUPP)
        );
        assert_eq!(test.setattr(node, 1 << 3, 0, 0, (0, 0)), Err(libc::ELOOP));
        test.setattr(node, 1 << 1 | 1 << 2 | 1 << 5, 0, 0, (77, 78))
            .unwrap();
        let link = fs::symlink_metadata(test.root().join(name)).unwrap();
        assert_eq!((link.uid(), link.gid(), link.mtime()), (77, 78, 1_000_000));
    }
    assert_eq!(fs::read(test.dir.path().join("secret")).unwrap(), b"secret");
    assert_eq!(fs::metadata("/etc/passwd").unwrap().uid(), 0);
    test.request(SYMLINK, 1, &[z("made"), z("/etc/shadow")].concat())
        .unwrap();
    assert_eq!(
        fs::read_link(test.root().join("made")).unwrap(),
        Path::new("/etc/shadow")
    );
}

#[test]
fn a_directory_swapped_for_a_link_is_not_followed() {
    let mut test = Test::new();
    fs::create_dir(test.root().join("dir")).unwrap();
    fs::write(test.root().join("dir/f"), b"x").unwrap();
    let dir = test.lookup(1, "dir").unwrap();
    // The host (or another guest with the same volume) swaps it before it was opened.
    fs::rename(test.root().join("dir"), test.root().join("old")).unwrap();
    symlink("..", test.root().join("dir")).unwrap();
    assert_eq!(test.lookup(dir, "secret"), Err(libc::ESTALE));
    fs::remove_file(test.root().join("dir")).unwrap();
    fs::create_dir(test.root().join("dir")).unwrap();
    assert_eq!(test.lookup(dir, "f"), Err(libc::ESTALE));
    // Found again under its new name it works.
    assert_eq!(test.lookup(1, "old"), Ok(dir));
    test.lookup(dir, "f").unwrap();
}

#[test]
fn special_files_are_never_opened() {
    let mut test = Test::new();
    assert_eq!(
        test.request(
            MKNOD,
            1,
            &[words32(&[libc::S_IFIFO | 0o666, 0, 0, 0]), z("fifo")].concat()
        )
        .map(drop),
        Ok(())
    );
    assert_eq!(
        test.request(
            MKNOD,
            1,
            &[words32(&[libc::S_IFSOCK | 0o666, 0, 0, 0]), z("sock")].concat()
        )
        .map(drop),
        Ok(())
    );
    assert!(
        fs::metadata(test.root().join("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        let body = [words32(&[kind | 0o666, 0x103, 0, 0]), z("dev")].concat();
        assert_eq!(test.request(MKNOD, 1, &body), Err(libc::EPERM));
    }
    assert_eq!(
        test.request(
            MKNOD,
            1,
            &[words32(&[libc::S_IFDIR | 0o777, 0, 0, 0]), z("d")].concat()
        ),
        Err(libc::EINVAL)
    );
    for name in ["fifo", "sock"] {
        let node = test.lookup(1, name).unwrap();
        assert_eq!(test.open(node, libc::O_RDONLY), Err(libc::ENXIO));
        assert_eq!(test.open(node, libc::O_RDWR), Err(libc::ENXIO));
        assert_eq!(test.setattr(node, 1 << 3, 0, 0, (0, 0)), Err(libc::ENXIO));
    }
    let mut allowed = Test::with(|config| config.device_nodes = true);
    let body = [words32(&[libc::S_IFCHR | 0o666, 0x103, 0, 0]), z("null")].concat();
    match allowed.as_user((5, 6), MKNOD, 1, &body) {
        Ok(_) => {
            let made = fs::metadata(allowed.root().join("null")).unwrap();
            assert!(made.file_type().is_char_device());
            assert_eq!(
                (made.rdev(), made.uid(), made.gid()),
                (libc::makedev(1, 3), 5, 6)
            );
            let node = allowed.lookup(1, "null").unwrap();
            assert_eq!(allowed.open(node, libc::O_RDWR), Err(libc::ENXIO));
        }
        // A test machine whose containers may not make nodes.
        Err(error) => assert_eq!(error, libc::EPERM),
    }
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let mut test = Test::with(|config| config.read_only = true);
    fs::write(test.root().join("f"), b"data").unwrap();
    fs::create_dir(test.root().join("d")).unwrap();
    let file = test.lookup(1, "f").unwrap();
    let handle = test.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(test.read(file, handle, 0, 100).unwrap(), b"data");
    for flags in [
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDONLY | libc::O_TRUNC,
        libc::O_ACCMODE,
    ] {
        assert_eq!(test.open(file, flags), Err(libc::EROFS), "{flags:#x}");
    }
    let before = fs::metadata(test.root().join("f")).unwrap();
    assert_eq!(
        test.write(file, handle, 0, b"x", libc::O_RDWR),
        Err(libc::EROFS)
    );
    assert_eq!(test.create(1, "new", libc::O_RDWR, 0o600), Err(libc::EROFS));
    assert_eq!(test.create(1, "f", libc::O_RDONLY, 0o600), Err(libc::EROFS));
    for valid in [1, 1 << 1, 1 << 3, 1 << 5, 1 << 4 | 1 << 7] {
        assert_eq!(
            test.setattr(file, valid, 0, 0o777, (1, 1)),
            Err(libc::EROFS)
        );
    }
    let named = |head: &[u32], name: &str| [words32(head), z(name)].concat();
    let rename = [words64(&[1]), words32(&[0, 0]), z("f"), z("g")].concat();
    let refused: [(u32, u64, Vec<u8>); 12] = [
        (MKDIR, 1, named(&[0o755, 0], "n")),
        (MKNOD, 1, named(&[libc::S_IFREG, 0, 0, 0], "n")),
        (MKNOD, 1, named(&[libc::S_IFCHR, 0, 0, 0], "n")),
        (UNLINK, 1, z("f")),
        (RMDIR, 1, z("d")),
        (SYMLINK, 1, [z("l"), z("t")].concat()),
        (LINK, 1, [words64(&[file]), z("l")].concat()),
        (RENAME2, 1, rename),
        (
            FALLOCATE,
            file,
            [words64(&[handle, 0, 100]), words32(&[0, 0])].concat(),
        ),
        (
            COPY_FILE_RANGE,
            file,
            words64(&[handle, 0, file, handle, 0, 1, 0]),
        ),
        (
            SETXATTR,
            file,
            [words32(&[1, 0]), z("user.a"), b"v".to_vec()].concat(),
        ),
        (REMOVEXATTR, file, z("user.a")),
    ];
    for (opcode, node, body) in refused {
        assert_eq!(
            test.request(opcode, node, &body),
            Err(libc::EROFS),
            "opcode {opcode}"
        );
    }
    let after = fs::metadata(test.root().join("f")).unwrap();
    assert_eq!(
        (before.mtime(), before.mode(), before.len()),
        (after.mtime(), after.mode(), after.len())
    );
    assert_eq!(fs::read_dir(test.root()).unwrap().count(), 2);
}

#[test]
fn limits_hold() {
    let mut test = Test::with(|config| {
        config.limits = FsLimits {
            nodes: 50,
            node_fds: 8,
            handles: 5,
        }
    });
    for i in 0..100 {
        fs::create_dir(test.root().join(format!("d{i:03}"))).unwrap();
        fs::write(test.root().join(format!("d{i:03}/f")), format!("{i}")).unwrap();
    }
    let mut known = Vec::new();
    for i in 0..100 {
        match test.lookup(1, &format!("d{i:03}")) {
            Ok(node) => known.push(node),
            Err(error) => assert_eq!(error, libc::ENFILE),
        }
    }
    assert_eq!(known.len(), 49);
    // The listing is whole nevertheless.
    let listed = test.list(1, true, 65_536);
    assert_eq!(listed.len(), 102);
    assert_eq!(listed.iter().filter(|(_, id)| *id > 1).count(), 49);
    for (_, id) in listed.iter().filter(|(_, id)| *id > 1) {
        test.forget(*id, 1);
    }
    // Few descriptors, all usable: those of the least recently used are opened again.
    for node in known.drain(15..) {
        test.forget(node, 1);
    }
    assert_eq!(test.client.fs.counters().nodes, 16);
    for _ in 0..2 {
        for (i, dir) in known.iter().copied().enumerate() {
            let file = test.lookup(dir, "f").unwrap();
            let handle = test.open(file, libc::O_RDONLY).unwrap();
            assert_eq!(
                test.read(file, handle, 0, 10).unwrap(),
                format!("{i}").as_bytes()
            );
            test.request(RELEASE, file, &[words64(&[handle]), vec![0; 16]].concat())
                .unwrap();
            assert!(test.client.fs.counters().node_fds <= 8);
        }
    }
    let file = test.lookup(known[0], "f").unwrap();
    let opened: Vec<_> = (0..8).map(|_| test.open(file, libc::O_RDONLY)).collect();
    assert_eq!(opened.iter().filter(|handle| handle.is_ok()).count(), 5);
    assert!(
        opened[5..]
            .iter()
            .all(|handle| *handle == Err(libc::ENFILE))
    );
    // Removing without forgetting ends at twice the budget; the files go all the same.
    for (i, dir) in known.iter().copied().enumerate() {
        let _ = test.lookup(dir, "f");
        test.request(UNLINK, dir, &z("f")).unwrap();
        assert!(!test.root().join(format!("d{i:03}/f")).exists());
        assert!(test.client.fs.counters().node_fds <= 16);
    }
    assert!(test.client.fs.counters().limit_hits > 0);
}

#[test]
fn unknown_nodes_handles_and_operations() {
    let mut test = Test::new();
    for node in [0, 2, 77, u64::MAX] {
        assert_eq!(test.getattr(node), Err(libc::ESTALE));
        assert_eq!(test.lookup(node, "a"), Err(libc::ESTALE));
        assert_eq!(test.open(node, 0), Err(libc::ESTALE));
        assert_eq!(test.read(node, 1, 0, 10), Err(libc::EBADF));
        test.forget(node, u64::MAX);
    }
    test.forget(1, u64::MAX);
    test.getattr(1).unwrap();
    for opcode in [
        0,
        7,
        19,
        31,
        34,
        36 + 1,
        40,
        48,
        49,
        50,
        52,
        54,
        4096,
        u32::MAX,
    ] {
        assert_eq!(
            test.request(opcode, 1, &[0; 64]),
            Err(libc::ENOSYS),
            "opcode {opcode}"
        );
    }
    assert_eq!(test.request(DESTROY, 1, &[]), Ok(Vec::new()));
    test.getattr(1).unwrap();
}

#[test]
fn messages_that_lie_about_their_length() {
    let mut test = Test::new();
    let good = test.client.message(GETATTR, 1, (0, 0), &[0; 16]);
    let error = |answer: Option<Vec<u8>>| {
        answer.map(|answer| {
            if answer.is_empty() {
                1
            } else {
                -u32_at(&answer, 4).cast_signed()
            }
        })
    };
    for len in [0u32, 39, 57, 4096, 1 << 20, (1 << 20) + 4097, u32::MAX] {
        let mut bad = good.clone();
        bad[..4].copy_from_slice(&len.to_le_bytes());
        assert_eq!(
            error(test.client.raw(&bad, &[], 4096)),
            Some(libc::EINVAL),
            "{len}"
        );
    }
    // Less than a header, no room for an answer, or only room: nothing to say.
    assert_eq!(error(test.client.raw(&good[..39], &[], 4096)), Some(1));
    assert_eq!(error(test.client.raw(&good, &[], 15)), Some(1));
    assert_eq!(error(test.client.raw(&good, &[], 0)), Some(1));
    assert_eq!(error(test.client.raw(&[], &[], 4096)), Some(1));
    // An answer that does not fit becomes an error.
    assert_eq!(error(test.client.raw(&good, &[], 20)), Some(libc::EINVAL));
    // Pieces of any size are the same message.
    assert_eq!(
        error(test.client.raw(&good, &[1, 2, 3, 41, 50], 4096)),
        Some(0)
    );
    // Buffers larger than any request.
    let parts: Vec<_> = (0..20).map(|_| (0x10_0000, 0x40_0000, false)).collect();
    test.client.requests.add(&parts).unwrap();
    test.client.fs.work();
    assert_eq!(
        test.client.requests.take_used().map(|(_, len)| len),
        Some(0)
    );
    assert_eq!(test.client.fs.counters().panics, 0);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 150, ..Default::default() })]
    #[test]
    fn random_requests_never_panic(data in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..3000)) {
        fuzz_fs(&data);
    }
}

#[test]
fn an_upper_layer_is_the_guests_but_not_its_place() {
    let mut test = Test::with(|config| config.upper_layers = true);
    for dir in ["upper-1/fs", "upper-1/work", "2/fs"] {
        fs::create_dir_all(test.root().join(dir)).unwrap();
    }
    fs::write(test.root().join("upper-1/fs/f"), b"x").unwrap();
    let holder = test.lookup(1, "upper-1").unwrap();
    let layer = test.lookup(holder, "fs").unwrap();
    let work = test.lookup(holder, "work").unwrap();
    let file = test.lookup(layer, "f").unwrap();
    let rename = |to: u64, old: &str, new: &str, flags: u32| {
        [words64(&[to]), words32(&[flags, 0]), z(old), z(new)].concat()
    };
    let named = |head: &[u32], name: &str| [words32(head), z(name)].concat();
    // Nothing is exchanged, added or taken away where the host looks for the layer.
    for parent in [1, holder] {
        let refused = [
            (MKDIR, named(&[0o755, 0], "n")),
            (MKNOD, named(&[libc::S_IFREG, 0, 0, 0], "n")),
            (MKNOD, named(&[libc::S_IFCHR, 0, 0, 0], "n")),
            (SYMLINK, [z("l"), z("/etc")].concat()),
            (LINK, [words64(&[file]), z("l")].concat()),
            (RMDIR, z("work")),
            (RENAME2, rename(layer, "work", "n", 0)),
            (RENAME2, rename(parent, "fs", "n", 0)),
        ];
        for (opcode, body) in refused {
            assert_eq!(
                test.request(opcode, parent, &body),
                Err(libc::EPERM),
                "opcode {opcode}"
            );
        }
        assert_eq!(
            test.create(parent, "n", libc::O_RDWR, 0o600),
            Err(libc::EPERM)
        );
        let into = rename(parent, "f", "layer.erofs", 0);
        assert_eq!(test.request(RENAME2, layer, &into), Err(libc::EPERM));
    }
    // Below, and in other roots, all goes on as usual, and what overlays need goes, too.
    assert!(
        test.request(RENAME2, layer, &rename(work, "f", "f", 0))
            .is_ok()
    );
    let other = test.lookup(1, "2").unwrap();
    assert!(test.request(MKDIR, other, &named(&[0o755, 0], "n")).is_ok());
    let device = named(&[libc::S_IFCHR | 0o600, 0x103, 0, 0], "null");
    assert_eq!(test.request(MKNOD, layer, &device), Err(libc::EPERM));
    let whiteout = named(&[libc::S_IFCHR, 0, 0, 0], "gone");
    match test.request(MKNOD, layer, &whiteout) {
        Ok(_) => {
            let made = fs::metadata(test.root().join("upper-1/fs/gone")).unwrap();
            assert!(made.file_type().is_char_device() && made.rdev() == 0);
        }
        // A test machine whose containers may not make nodes.
        Err(error) => assert_eq!(error, libc::EPERM),
    }
    let set = |name: &str| [words32(&[1, 0]), z(name), b"y".to_vec()].concat();
    for name in ["trusted.other", "security.selinux", "trusted.overlay"] {
        let answer = test.request(SETXATTR, layer, &set(name));
        assert_eq!(answer, Err(libc::EOPNOTSUPP), "{name}");
    }
    let answer = test.request(SETXATTR, layer, &set("trusted.overlay.opaque"));
    // Not every file system of a test machine has such attributes.
    assert!(
        answer.is_ok() || matches!(answer, Err(libc::EOPNOTSUPP | libc::EPERM)),
        "{answer:?}"
    );
    let mut plain = Test::new();
    let file = plain.create(1, "f", libc::O_RDWR, 0o600).unwrap().0;
    let answer = plain.request(SETXATTR, file, &set("trusted.overlay.opaque"));
    assert_eq!(answer, Err(libc::EOPNOTSUPP));
}

#[test]
fn what_is_in_a_fixed_top_is_the_hosts_choice() {
    let mut test = Test::with(|config| config.fixed_top = true);
    fs::create_dir(test.root().join("7")).unwrap();
    fs::write(test.root().join("7/f"), b"x").unwrap();
    let place = test.lookup(1, "7").unwrap();
    let file = test.lookup(place, "f").unwrap();
    let rename =
        |to: u64, old: &str, new: &str| [words64(&[to]), words32(&[0, 0]), z(old), z(new)].concat();
    let named = |head: &[u32], name: &str| [words32(head), z(name)].concat();
    // A volume is about to be mounted to the next number: no link waits there, and none takes the
    // place of one that is there.
    let refused = [
        (1, SYMLINK, [z("8"), z("/etc")].concat()),
        (1, MKDIR, named(&[0o755, 0], "8")),
        (1, MKNOD, named(&[libc::S_IFREG, 0, 0, 0], "8")),
        (1, LINK, [words64(&[file]), z("8")].concat()),
        (1, RMDIR, z("7")),
        (1, RENAME2, rename(1, "7", "8")),
        (1, RENAME2, rename(place, "7", "moved")),
        (place, RENAME2, rename(1, "f", "8")),
    ];
    for (parent, opcode, body) in refused {
        assert_eq!(
            test.request(opcode, parent, &body),
            Err(libc::EPERM),
            "opcode {opcode} in {parent}"
        );
    }
    assert_eq!(fs::read_dir(test.root()).unwrap().count(), 1);
    // Below it all is the guest's.
    test.request(SYMLINK, place, &[z("l"), z("/etc")].concat())
        .unwrap();
    test.request(MKDIR, place, &named(&[0o755, 0], "d"))
        .unwrap();
}
