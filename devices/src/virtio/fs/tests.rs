use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use tempfile::TempDir;

use super::fuzz::Client;
use super::*;
use crate::virtio::VirtioDevice;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const REMOVEXATTR: u32 = 24;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const SETLKW: u32 = 33;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const IOCTL: u32 = 39;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;

struct Test {
    dir: TempDir,
    client: Client,
}

type Reply = Result<Vec<u8>, i32>;

fn words32(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn words64(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn z(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

impl Test {
    fn with(change: impl FnOnce(&mut FsConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::write(dir.path().join("secret"), b"secret").unwrap();
        let client = Client::new(Fs::new(Self::config(&dir, change)).unwrap()).unwrap();
        let mut test = Self { dir, client };
        test.init();
        test
    }

    fn config(dir: &TempDir, change: impl FnOnce(&mut FsConfig)) -> FsConfig {
        let mut config = FsConfig::new("share", &dir.path().join("root")).unwrap();
        change(&mut config);
        config
    }

    fn new() -> Self {
        Self::with(|_| {})
    }

    fn init(&mut self) -> Vec<u8> {
        // All flags a guest may have, with the extension.
        let body = [
            words32(&[7, 38, 131_072, u32::MAX]),
            words32(&[u32::MAX]),
            vec![0; 44],
        ]
        .concat();
        self.request(INIT, 1, &body).unwrap()
    }

    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("root")
    }

    fn as_user(&mut self, user: (u32, u32), opcode: u32, node: u64, body: &[u8]) -> Reply {
        let message = self.client.message(opcode, node, user, body);
        let answer = self.client.raw(&message, &[40], 70_000).unwrap();
        assert_eq!(u32_at(&answer, 0) as usize, answer.len());
        assert_eq!(answer[8..16], message[8..16]);
        match u32_at(&answer, 4).cast_signed() {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Reply {
        self.as_user((0, 0), opcode, node, body)
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.request(LOOKUP, parent, &z(name))
            .map(|entry| u64_at(&entry, 0))
    }

    fn forget(&mut self, node: u64, count: u64) {
        let message = self
            .client
            .message(FORGET, node, (0, 0), &words64(&[count]));
        assert!(self.client.raw(&message, &[], 0).unwrap().is_empty());
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.request(OPEN, node, &words32(&[flags.cast_unsigned(), 0]))
            .map(|out| u64_at(&out, 0))
    }

    fn read(&mut self, node: u64, handle: u64, at: u64, size: u32) -> Reply {
        let body = [
            words64(&[handle, at]),
            words32(&[size, 0]),
            words64(&[0, 0]),
        ]
        .concat();
        self.request(READ, node, &body)
    }

    fn write(
        &mut self,
        node: u64,
        handle: u64,
        at: u64,
        data: &[u8],
        flags: i32,
    ) -> Result<u32, i32> {
        let head = [
            words64(&[handle, at]),
            words32(&[data.len() as u32, 0]),
            words64(&[0]),
            words32(&[flags.cast_unsigned(), 0]),
        ];
        self.request(WRITE, node, &[head.concat(), data.to_vec()].concat())
            .map(|out| u32_at(&out, 0))
    }

    fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(u64, u64), i32> {
        let body = [words32(&[flags.cast_unsigned(), mode, 0, 0]), z(name)].concat();
        self.request(CREATE, parent, &body)
            .map(|out| (u64_at(&out, 0), u64_at(&out, 128)))
    }

    fn setattr(&mut self, node: u64, valid: u32, size: u64, mode: u32, owner: (u32, u32)) -> Reply {
        let body = [
            words32(&[valid, 0]),
            words64(&[0, size, 0, 0, 1_000_000, 0]),
            words32(&[0, 5, 0, mode, 0, owner.0, owner.1, 0]),
        ];
        self.request(SETATTR, node, &body.concat())
    }

    fn getattr(&mut self, node: u64) -> Reply {
        self.request(GETATTR, node, &words64(&[0, 0]))
    }

    /// Names (and node ids) of a directory, read in pieces of `size` bytes.
    fn list(&mut self, node: u64, plus: bool, size: u32) -> Vec<(String, u64)> {
        let handle = u64_at(&self.request(OPENDIR, node, &words32(&[0, 0])).unwrap(), 0);
        let (mut names, mut at) = (Vec::new(), 0);
        loop {
            let body = [
                words64(&[handle, at]),
                words32(&[size, 0]),
                words64(&[0, 0]),
            ]
            .concat();
            let out = self
                .request(if plus { READDIRPLUS } else { READDIR }, node, &body)
                .unwrap();
            if out.is_empty() {
                break;
            }
            assert!(out.len() <= size as usize);
            let mut rest = &out[..];
            while !rest.is_empty() {
                let (entry, dirent) = rest.split_at(if plus { 128 } else { 0 });
                let len = u32_at(dirent, 16) as usize;
                at = u64_at(dirent, 8);
                let id = if plus { u64_at(entry, 0) } else { 0 };
                names.push((
                    String::from_utf8(dirent[24..24 + len].to_vec()).unwrap(),
                    id,
                ));
                rest = &dirent[(24 + len).next_multiple_of(8)..];
            }
        }
        self.request(
            29 - 1 + 1,
            node,
            &[words64(&[handle]), vec![0; 16]].concat(),
        )
        .unwrap();
        names
    }
}

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
        51,
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
    let counters = test.client.fs.counters();
    assert_eq!(
        (counters.nodes, counters.node_fds, counters.handles),
        (1, 0, 0)
    );
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

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 150, ..Default::default() })]
    #[test]
    fn random_requests_never_panic(data in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..3000)) {
        fuzz_fs(&data);
    }
}
