//! A FUSE client's requests by hand, and what the tests share.

mod device;
mod files;
mod inside;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use tempfile::TempDir;

use super::fuzz::Client;
use super::fuzz::fuzz_fs;
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
const TMPFILE: u32 = 51;

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
