//! A FUSE client in miniature for tests, and the entry point of the fuzz target.

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::config::FsConfig;
use super::device::Fs;
use super::sys;
use crate::GuestMemory;
use crate::virtio::driver_side::{DriverQueue, Part};
use crate::virtio::{Activation, Interrupt, VirtioDevice};

const MEM_SIZE: usize = 8 << 20;
const IN_AT: u64 = 1 << 20;
const OUT_AT: u64 = 4 << 20;

/// A guest that sends one request after the other.
#[derive(Debug)]
pub(super) struct Client {
    pub mem: GuestMemory,
    pub fs: Fs,
    pub hiprio: DriverQueue,
    pub requests: DriverQueue,
    pub interrupt: Interrupt,
    unique: u64,
}

impl Client {
    pub(super) fn new(fs: Fs) -> Option<Self> {
        let mem =
            GuestMemory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEM_SIZE)]).ok()?);
        let mut client = Self {
            hiprio: DriverQueue::new(&mem, 0x1_0000, 128),
            requests: DriverQueue::new(&mem, 0x2_0000, 1024),
            interrupt: Interrupt::new().ok()?,
            mem,
            fs,
            unique: 0,
        };
        super::creds::prepare_thread();
        client.activate()?;
        Some(client)
    }

    pub(super) fn activate(&mut self) -> Option<()> {
        self.fs
            .activate(Activation {
                mem: self.mem.clone(),
                queues: vec![
                    self.hiprio.device_side(true),
                    self.requests.device_side(true),
                ],
                interrupt: self.interrupt.clone(),
                features: 0,
            })
            .ok()
    }

    /// Sends raw bytes cut at `cuts`, with room for `out` bytes of answer; returns the answer.
    pub(super) fn raw(&mut self, bytes: &[u8], cuts: &[usize], out: u32) -> Option<Vec<u8>> {
        self.mem
            .memory()
            .write_slice(bytes, GuestAddress(IN_AT))
            .ok()?;
        let mut parts: Vec<Part> = Vec::new();
        let mut from = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            let to = cut.clamp(from, bytes.len());
            parts.push((IN_AT + from as u64, (to - from) as u32, false));
            from = to;
        }
        if out > 0 {
            parts.push((OUT_AT, out, true));
        }
        self.requests.add(&parts)?;
        self.fs.work();
        let (_, len) = self.requests.take_used()?;
        let mut answer = vec![0; (len.min(out)) as usize];
        self.mem
            .memory()
            .read_slice(&mut answer, GuestAddress(OUT_AT))
            .ok()?;
        Some(answer)
    }

    /// A whole FUSE message: header and body.
    pub(super) fn message(
        &mut self,
        opcode: u32,
        node: u64,
        user: (u32, u32),
        body: &[u8],
    ) -> Vec<u8> {
        self.unique += 2;
        let mut bytes = Vec::with_capacity(40 + body.len());
        bytes.extend_from_slice(&(40 + body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&opcode.to_le_bytes());
        bytes.extend_from_slice(&self.unique.to_le_bytes());
        bytes.extend_from_slice(&node.to_le_bytes());
        bytes.extend_from_slice(&user.0.to_le_bytes());
        bytes.extend_from_slice(&user.1.to_le_bytes());
        bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(body);
        bytes
    }
}

/// Makes a share of a fresh directory below the system's temporary directory and calls `f` with
/// the directory's path; the directory is removed afterwards.
fn with_directory(f: impl FnOnce(&std::path::Path)) {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "fuzz-fs-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let path = std::env::temp_dir().join(name);
    if std::fs::create_dir(&path).is_ok() {
        f(&path);
        let _ = std::fs::remove_dir_all(&path);
    }
}

/// Feeds a share with what `data` says: well-formed requests with random arguments, and messages
/// of any bytes. Must never panic; nothing outside the share may change.
#[doc(hidden)]
pub fn fuzz_fs(data: &[u8]) {
    with_directory(|path| {
        let root = path.join("root");
        let _ = std::fs::create_dir_all(root.join("dir/sub"));
        let _ = std::fs::write(root.join("file"), [7u8; 5000]);
        let _ = std::os::unix::fs::symlink("/etc/passwd", root.join("link"));
        let _ = std::fs::write(path.join("outside"), b"untouched");
        let Ok(fd) = sys::open_root(&root) else {
            return;
        };
        let mut config = FsConfig::from_fd("fuzz", fd);
        config.limits.nodes = 64;
        config.limits.node_fds = 4;
        config.limits.handles = 8;
        let Ok(fs) = Fs::new(config) else { return };
        let Some(mut client) = Client::new(fs) else {
            return;
        };
        run(&mut client, data);
        let panics = client.fs.counters().panics;
        drop(client);
        assert_eq!(panics, 0, "a request ran into a bug");
        assert_eq!(
            std::fs::read(path.join("outside")).ok().as_deref(),
            Some(&b"untouched"[..])
        );
    });
}

fn run(client: &mut Client, data: &[u8]) {
    const NAMES: [&[u8]; 12] = [
        b"file\0",
        b"dir\0",
        b"sub\0",
        b"link\0",
        b"..\0",
        b".\0",
        b"../outside\0",
        b"new\0",
        b"",
        b"\0",
        b"x",
        b"user.a\0v",
    ];
    let mut rest = data;
    let mut last_node = 1;
    let mut last_handle = 0u64;
    while let Some((kind, tail)) = rest.split_first_chunk::<8>() {
        rest = tail;
        let [what, opcode, node, name, a, b, size, cut] = *kind;
        let node = match node % 4 {
            0 => 1,
            1 => last_node,
            2 => u64::from(node / 4),
            _ => u64::MAX - u64::from(node),
        };
        let n = usize::from(size).min(rest.len());
        let (bytes, tail) = rest.split_at(n);
        rest = tail;
        let mut body = Vec::new();
        if what & 1 == 1 {
            // Fixed parts of most requests begin with a handle or flags.
            body.extend_from_slice(
                &if what & 2 == 2 {
                    last_handle
                } else {
                    u64::from(a)
                }
                .to_le_bytes(),
            );
            body.extend_from_slice(&u64::from(b).to_le_bytes());
            body.extend_from_slice(&u32::from(size).to_le_bytes());
        }
        if what & 4 == 4 {
            body.extend_from_slice(bytes);
        }
        if what & 8 == 8 {
            body.extend_from_slice(NAMES[usize::from(name) % NAMES.len()]);
            if what & 16 == 16 {
                body.extend_from_slice(NAMES[usize::from(a) % NAMES.len()]);
            }
        }
        let user = if what & 32 == 32 {
            (u32::from(a), u32::from(b))
        } else {
            (0, 0)
        };
        let mut message = client.message(u32::from(opcode % 54), node, user, &body);
        if what & 64 == 64 {
            // A lie about the length.
            message[0] = message[0].wrapping_add(b);
            message[2] = a & 0x1f;
        }
        if what & 128 == 128 {
            message.truncate(usize::from(cut));
        }
        let out = [0, 15, 16, 80, 160, 4096, 70_000][usize::from(cut) % 7];
        let Some(answer) = client.raw(&message, &[40, usize::from(cut)], out) else {
            continue;
        };
        let number = |at: usize| {
            answer
                .get(at..)
                .and_then(|rest| rest.first_chunk::<8>())
                .map(|raw| u64::from_le_bytes(*raw))
        };
        if let (Some(true), Some(value)) =
            (answer.get(4..8).map(|error| error == [0; 4]), number(16))
        {
            match opcode % 54 {
                1 | 6 | 8 | 9 | 13 => last_node = value,
                14 | 27 => last_handle = value,
                35 | 51 => (last_node, last_handle) = (value, number(16 + 128).unwrap_or(0)),
                _ => {}
            }
        }
    }
}
