//! Requests whose rings are right and whose content lies.

use alloc::vec::Vec;

use crate::cases::honest::{get, put, wait};
use crate::chance::Chance;
use crate::device::{Target, id, reg};
use crate::ring::Ring;

/// Cycles that a lying request is given before the next one comes.
const SHORT: u64 = 40_000_000;
/// Content of the file beside the share, which no guest may see.
const SECRET: &[u8] = b"BULKHEAD-SECRET";
/// Where requests and answers lie in the arena.
const ANSWER: u64 = 1 << 20;

/// A device with one ring in use for requests.
struct Requests {
    target: Target,
    rings: Vec<Ring>,
    queue: usize,
}

impl Requests {
    fn new(targets: &[Target], id: u32, queue: usize) -> Option<Self> {
        let target = *targets.iter().find(|target| target.id == id)?;
        let rings = (0..target.queues()).map(|_| Ring::new()).collect();
        let mut requests = Self {
            target,
            rings,
            queue,
        };
        requests.begin();
        Some(requests)
    }

    fn begin(&mut self) {
        self.target.write(reg::STATUS, 0);
        for ring in &mut self.rings {
            ring.clear();
        }
        // Without indirect tables and event indices: every notification is for a chain.
        let _ = self.target.begin(!(3 << 28));
        for (index, ring) in self.rings.iter().enumerate() {
            let _ = self.target.queue(index as u32, ring);
        }
        self.target.finish();
    }

    /// Sends `request` in a few pieces, with room for `answer` bytes in a few others.
    fn send(&mut self, chance: &mut Chance, request: &[u8], answer: u32) {
        if self.target.is_broken() {
            self.begin();
        }
        put(chance.arena(), request);
        let mut parts = Vec::new();
        let mut cut = |chance: &mut Chance, mut at: u64, mut left: u32, writes| {
            while left > 0 {
                let part = if parts.len() < 12 && chance.once_in(3) {
                    1 + chance.below(left.into()) as u32
                } else {
                    left
                };
                parts.push((at, part, writes));
                at += u64::from(part);
                left -= part;
            }
        };
        cut(chance, chance.arena(), request.len() as u32, false);
        cut(chance, chance.arena() + ANSWER, answer, true);
        let Some(ring) = self.rings.get_mut(self.queue) else {
            return;
        };
        ring.offer_chain(&parts);
        self.target.notify(self.queue as u32);
        wait(ring, SHORT);
    }
}

/// `fuse_in_header`.
pub fn fuse_header(len: u32, opcode: u32, unique: u64, node: u64) -> [u8; 40] {
    let mut header = [0; 40];
    header[..4].copy_from_slice(&len.to_le_bytes());
    header[4..8].copy_from_slice(&opcode.to_le_bytes());
    header[8..16].copy_from_slice(&unique.to_le_bytes());
    header[16..24].copy_from_slice(&node.to_le_bytes());
    header
}

/// Names that lead elsewhere, or nowhere.
const NAMES: [&[u8]; 14] = [
    b"..\0",
    b".\0",
    b"../secret\0",
    b"/\0",
    b"/etc/shadow\0",
    b"inside\0",
    b"inside/../../secret\0",
    b"\0",
    b"no end",
    b"link\0",
    b"a\0b\0",
    b"..\0..\0",
    b"/proc/self/mem\0",
    &[b'x'; 300],
];

fn fuse_begin(targets: &[Target], chance: &mut Chance) -> Option<Requests> {
    let mut fs = Requests::new(targets, id::FS, 1)?;
    let mut init = [0; 64];
    init[..4].copy_from_slice(&7u32.to_le_bytes());
    init[4..8].copy_from_slice(&38u32.to_le_bytes());
    let mut request = fuse_header(104, 26, 1, 0).to_vec();
    request.extend(init);
    fs.send(chance, &request, 256);
    Some(fs)
}

/// FUSE requests of every operation with node ids, handles, sizes and names of any kind.
pub fn fuse(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let Some(mut fs) = fuse_begin(targets, chance) else {
        return;
    };
    for _ in 0..rounds {
        let opcode = match chance.below(16) {
            0 => chance.bits() as u32,
            1 => 4096,
            _ => 1 + chance.below(53) as u32,
        };
        let node = match chance.below(4) {
            0 => chance.number(),
            _ => chance.below(6),
        };
        let mut body = Vec::new();
        for _ in 0..chance.below(12) {
            let number = if chance.once_in(2) {
                chance.below(4)
            } else {
                chance.number()
            };
            body.extend((number as u32).to_le_bytes());
        }
        if chance.once_in(2) {
            body.extend(chance.one_of(&NAMES));
            body.extend(chance.one_of(&NAMES));
        }
        let whole = 40 + body.len() as u32;
        let len = match chance.below(6) {
            0 => chance.length(),
            _ => whole,
        };
        let mut request = fuse_header(len, opcode, chance.bits(), node).to_vec();
        request.extend(body);
        if chance.once_in(16) {
            request.truncate(chance.below(40) as usize);
        }
        let room = chance.one_of(&[0, 1, 15, 16, 17, 100, 160, 4096, 70000]);
        fs.send(chance, &request, room);
    }
}

/// Names, links and handles that would lead out of the shared directory. What is read is looked
/// through for the content of a file beside it.
pub fn escape(targets: &[Target], chance: &mut Chance) {
    let Some(mut fs) = fuse_begin(targets, chance) else {
        return;
    };
    let mut seen = 0;
    let mut call = |chance: &mut Chance, opcode, node, body: &[u8]| {
        let mut request = fuse_header(40 + body.len() as u32, opcode, 2, node).to_vec();
        request.extend(body);
        put(chance.arena() + ANSWER, &[0; 8192]);
        fs.send(chance, &request, 8192);
        let mut answer = alloc::vec![0; 8192];
        get(chance.arena() + ANSWER, &mut answer);
        if answer.windows(SECRET.len()).any(|bytes| bytes == SECRET) {
            crate::start::say(format_args!("ESCAPED by operation {opcode}"));
        }
        let word = |at: usize| {
            answer.get(at..at + 8).map_or(0, |bytes| {
                bytes
                    .iter()
                    .rev()
                    .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
            })
        };
        // Error of the answer, and the first word after the header (a node or a handle).
        let failed = answer.get(4..8).is_none_or(|error| error != [0; 4]);
        seen += 1;
        (!failed).then(|| word(16))
    };
    // Links of the guest's own making, to where the secret is.
    for target in [
        "../secret",
        "/proc/1/cwd/etc/shadow",
        "/proc/self/fd/3",
        "inside/../../secret",
    ] {
        call(chance, 10, 1, b"link\0");
        let names = [b"link\0", target.as_bytes(), b"\0"].concat();
        call(chance, 6, 1, &names);
        try_all(&mut call, chance);
    }
    for name in NAMES {
        // Rename and hard link something to and from such names.
        for opcode in [12, 45, 13] {
            let mut body = 1u64.to_le_bytes().to_vec();
            if opcode == 45 {
                body.extend([0; 8]);
            }
            body.extend(name);
            body.extend(b"moved\0");
            call(chance, opcode, 1, &body);
        }
    }
    try_all(&mut call, chance);
    crate::start::say(format_args!("{seen} requests"));
}

/// Looks every name up, opens what is found and reads it.
fn try_all(
    call: &mut impl FnMut(&mut Chance, u32, u64, &[u8]) -> Option<u64>,
    chance: &mut Chance,
) {
    for name in NAMES {
        let node = call(chance, 1, 1, name);
        for node in node.into_iter().chain([1, 2, 3]) {
            let handle = call(chance, 14, node, &[0; 8]).unwrap_or(0);
            let mut read = [0; 40];
            read[..8].copy_from_slice(&handle.to_le_bytes());
            read[16..20].copy_from_slice(&4096u32.to_le_bytes());
            call(chance, 15, node, &read);
            call(chance, 5, node, &[]);
            // From a node that is no directory, or a link.
            call(chance, 1, node, b"..\0");
            call(chance, 1, node, b"secret\0");
        }
    }
}

/// A packet's header: from, to, ports, bytes, type and operation, with credit of 64 KiB.
pub fn packet(
    from: u64,
    to: u64,
    from_port: u32,
    to_port: u32,
    len: u32,
    kind: u16,
    op: u16,
) -> [u8; 44] {
    let mut header = [0; 44];
    header[..8].copy_from_slice(&from.to_le_bytes());
    header[8..16].copy_from_slice(&to.to_le_bytes());
    header[16..20].copy_from_slice(&from_port.to_le_bytes());
    header[20..24].copy_from_slice(&to_port.to_le_bytes());
    header[24..28].copy_from_slice(&len.to_le_bytes());
    header[28..30].copy_from_slice(&kind.to_le_bytes());
    header[30..32].copy_from_slice(&op.to_le_bytes());
    header[36..40].copy_from_slice(&65536u32.to_le_bytes());
    header
}

/// Packets with forged ends, operations and credit; answers have little room or none.
pub fn vsock(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let Some(mut vsock) = Requests::new(targets, id::VSOCK, 1) else {
        return;
    };
    for _ in 0..rounds {
        let mut header = packet(
            if chance.once_in(4) {
                chance.number()
            } else {
                3
            },
            if chance.once_in(4) {
                chance.number()
            } else {
                2
            },
            if chance.once_in(4) {
                chance.bits() as u32
            } else {
                chance.below(40) as u32
            },
            if chance.once_in(4) {
                chance.bits() as u32
            } else {
                1024 + chance.below(4) as u32
            },
            if chance.once_in(3) {
                chance.length()
            } else {
                chance.below(200) as u32
            },
            if chance.once_in(8) {
                chance.bits() as u16
            } else {
                1
            },
            if chance.once_in(8) {
                chance.bits() as u16
            } else {
                chance.below(9) as u16
            },
        );
        let (flags, alloc, forwarded) = (chance.number(), chance.number(), chance.number());
        header[32..36].copy_from_slice(&(flags as u32).to_le_bytes());
        header[36..40].copy_from_slice(&(alloc as u32).to_le_bytes());
        header[40..44].copy_from_slice(&(forwarded as u32).to_le_bytes());
        let mut request = header.to_vec();
        request.resize(44 + chance.below(300) as usize, 0x55);
        if chance.once_in(16) {
            request.truncate(chance.below(44) as usize);
        }
        let room = chance.one_of(&[1, 43, 44, 45, 4096]);
        let at = chance.inside(4096);
        if let Some(receive) = vsock.rings.first_mut() {
            receive.offer_chain(&[(at, room, true)]);
        }
        vsock.target.notify(0);
        vsock.send(chance, &request, 0);
    }
}

/// Disk requests of every kind, beyond the end, in halves, without a place for the status.
pub fn block(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let Some(mut disk) = Requests::new(targets, id::BLOCK, 0) else {
        return;
    };
    for _ in 0..rounds {
        let kind = match chance.below(8) {
            0 => chance.bits() as u32,
            // Not WRITE or anything that changes the first sector: the honest driver reads it.
            _ => chance.one_of(&[0, 4, 8, 11, 13, 1]),
        };
        let sector = match chance.below(3) {
            0 => 8 + chance.below(2048),
            _ => 8 + chance.number() % (u64::MAX - 8),
        };
        let mut request = kind.to_le_bytes().to_vec();
        request.extend((chance.number() as u32).to_le_bytes());
        request.extend(sector.to_le_bytes());
        if matches!(kind, 11 | 13) {
            for _ in 0..chance.below(20) {
                let sector = 8 + chance.number() % (u64::MAX - 8);
                request.extend(sector.to_le_bytes());
                request.extend((chance.number() as u32).to_le_bytes());
                request.extend((chance.number() as u32).to_le_bytes());
            }
        } else if kind == 1 {
            request.resize(16 + chance.below(2000) as usize, 0xaa);
        }
        if chance.once_in(16) {
            request.truncate(chance.below(16) as usize);
        }
        let room = chance.one_of(&[0, 1, 2, 20, 21, 511, 513, 4097, 65537]);
        disk.send(chance, &request, room);
    }
}

/// Frames whose offload header lies, of no bytes and of many.
pub fn net(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let Some(mut net) = Requests::new(targets, id::NET, 1) else {
        return;
    };
    for _ in 0..rounds {
        let mut frame = [0; 12].to_vec();
        for part in frame.chunks_mut(2) {
            let value = chance.number() as u16;
            part.copy_from_slice(&value.to_le_bytes());
        }
        if chance.once_in(2) {
            // Flags and kind of segmentation that exist.
            frame[0] = chance.below(8) as u8;
            frame[1] = chance.one_of(&[0, 1, 3, 4, 5, 0x80, 0x81]);
        }
        let len = chance.one_of(&[0, 1, 13, 14, 60, 1514, 9000, 65535, 70000]);
        let mut body = alloc::vec![0; len];
        let known = body.len().min(60);
        chance.fill(&mut body[..known]);
        if let Some(kind) = body.get_mut(12..14) {
            kind.copy_from_slice(&chance.one_of(&[[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0]]));
        }
        frame.extend(body);
        if chance.once_in(16) {
            frame.truncate(chance.below(12) as usize);
        }
        let room = chance.one_of(&[1, 11, 12, 13, 1514]);
        let at = chance.inside(2048);
        if let Some(receive) = net.rings.first_mut() {
            receive.offer_chain(&[(at, room, true)]);
        }
        net.target.notify(0);
        net.send(chance, &frame, 0);
    }
}

/// Pages given away that are not there, given twice, in lists cut in the middle; ranges reported
/// free that are no memory.
pub fn balloon(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let Some(mut balloon) = Requests::new(targets, id::BALLOON, 0) else {
        return;
    };
    for _ in 0..rounds {
        let mut request = Vec::new();
        for _ in 0..chance.below(300) {
            request.extend(((chance.address() >> 12) as u32).to_le_bytes());
        }
        request.truncate(request.len() - request.len().min(chance.below(4) as usize));
        // Inflate, deflate, and whatever queues follow, where parts are ranges of memory.
        let queues = balloon.rings.len().max(1) as u64;
        balloon.queue = chance.below(queues) as usize;
        if balloon.queue < 2 {
            balloon.send(chance, &request, 0);
            continue;
        }
        let parts: Vec<_> = (0..1 + chance.below(16))
            .map(|_| (chance.address(), chance.length(), true))
            .collect();
        if balloon.target.is_broken() {
            balloon.begin();
        }
        let queue = balloon.queue;
        if let Some(ring) = balloon.rings.get_mut(queue) {
            ring.offer_chain(&parts);
            balloon.target.notify(queue as u32);
            wait(ring, SHORT);
        }
    }
}

/// Blocks plugged that are not offered, plugged twice, given back unasked, at addresses and in numbers
/// that lead out of the range.
pub fn mem(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let Some(mut mem) = Requests::new(targets, id::MEM, 0) else {
        return;
    };
    let config = |word: u64| {
        let half = |at| u64::from(mem.target.read(reg::CONFIG + at));
        half(word * 8) | half(word * 8 + 4) << 32
    };
    let (block, start, size) = (config(0).max(1), config(2), config(3));
    for _ in 0..rounds {
        let address = if chance.once_in(8) {
            chance.address()
        } else {
            start.wrapping_add(chance.below(size / block + 2).wrapping_mul(block))
        };
        let count = chance.one_of(&[0, 1, 1, 1, 2, 16, 0x7fff, 0xffff]) as u16;
        let mut request = Vec::new();
        request.extend((chance.below(5) as u16).to_le_bytes());
        request.extend([0; 6]);
        request.extend(address.to_le_bytes());
        request.extend(count.to_le_bytes());
        request.extend([0; 6]);
        if chance.once_in(16) {
            request.truncate(chance.below(24) as usize);
        }
        let room = chance.one_of(&[10, 10, 10, 16, 2, 0]);
        mem.send(chance, &request, room);
    }
}
