//! A peer that takes the host's connections as an agent does, and then lies in the protocol above
//! them: ttrpc frames on the control port, answer lines and output on the other.

use alloc::vec::Vec;

use crate::cases::honest::{get, put, wait};
use crate::cases::requests::packet;
use crate::cases::streams::{DATA, RECEIVE, REQUEST, RESPONSE, TRANSMIT};
use crate::chance::Chance;
use crate::device::{Target, id, reg};
use crate::ring::Ring;

/// Operations of packets (virtio 1.2, 5.10.6).
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u8 = 7;
/// The agent's port for streams; its other one takes calls.
const STREAM_PORT: u32 = 1025;
/// Room for a packet that arrives: its header and what is looked at.
const ROOM: u32 = 4096;
/// Bytes of one packet that is sent.
const PIECE: usize = 4096;
/// Cycles without a packet after which nobody seems to call any more.
const QUIET: u64 = 20_000_000_000;
/// Cycles that the device is given to take a packet.
const SHORT: u64 = 400_000_000;

/// Ends of a connection.
#[derive(Clone, Copy)]
struct Ends {
    host: u32,
    guest: u32,
}

/// The vsock device, used by its rules.
struct Line {
    target: Target,
    rings: [Ring; 3],
    /// Where packets that leave lie.
    reply: u64,
}

impl Line {
    fn send(&mut self, chance: &mut Chance, ends: Ends, op: u16, payload: &[u8]) {
        let mut bytes = packet(3, 2, ends.guest, ends.host, payload.len() as u32, 1, op).to_vec();
        if chance.once_in(50) {
            // Credit that nobody gave: more than all that the host has sent.
            bytes[40..44].copy_from_slice(&(chance.number() as u32).to_le_bytes());
        }
        if op == SHUTDOWN {
            bytes[32..36].copy_from_slice(&(1 + chance.below(3) as u32).to_le_bytes());
        }
        bytes.extend_from_slice(payload);
        put(self.reply, &bytes);
        let [_, transmit, _] = &mut self.rings;
        transmit.offer_chain(&[(self.reply, bytes.len() as u32, false)]);
        self.target.notify(TRANSMIT);
        wait(transmit, SHORT);
    }

    fn say(&mut self, chance: &mut Chance, ends: Ends, text: &[u8]) {
        for piece in text.chunks(PIECE) {
            self.send(chance, ends, DATA, piece);
        }
    }
}

/// A protobuf message of random fields, some of which hold such messages again.
fn message(chance: &mut Chance, depth: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..chance.below(6) {
        let field = if chance.once_in(8) {
            chance.bits() as u8
        } else {
            1 + chance.below(12) as u8
        };
        let wire = chance.one_of(&[0u8, 1, 2, 2, 2, 3, 5, 7]);
        bytes.push(field << 3 | wire);
        match wire {
            0 => varint(&mut bytes, chance.number()),
            2 => {
                let content = if depth > 0 {
                    message(chance, depth - 1)
                } else {
                    let mut content = alloc::vec![0; chance.below(40) as usize];
                    chance.fill(&mut content);
                    content
                };
                let length = if chance.once_in(10) {
                    chance.number()
                } else {
                    content.len() as u64
                };
                varint(&mut bytes, length);
                bytes.extend(content);
            }
            _ => bytes.extend(&chance.bits().to_le_bytes()[..if wire == 5 { 4 } else { 8 }]),
        }
    }
    bytes
}

fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn frame(length: u32, stream: u32, kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(length.to_be_bytes());
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, flags]);
    bytes.extend(payload);
    bytes
}

/// `rpc.Response` with a payload, or with a status.
fn response(chance: &mut Chance) -> Vec<u8> {
    let content = message(chance, 2);
    let mut bytes = alloc::vec![if chance.once_in(4) { 0x0a } else { 0x12 }];
    varint(&mut bytes, content.len() as u64);
    bytes.extend(content);
    bytes
}

/// What comes instead of the answer to a call, and whether the connection ends behind it.
fn answer(chance: &mut Chance, call: u32) -> (Vec<u8>, bool) {
    let response = response(chance);
    let length = response.len() as u32;
    let whole = frame(length, call, 2, 0, &response);
    let ends = !chance.once_in(4);
    match chance.below(12) {
        0 => (frame(length, chance.bits() as u32, 2, 0, &response), ends),
        1 => (frame(4 << 20, call, 2, 0, &response), ends),
        2 => (frame(u32::MAX, call, 2, 0, &response), ends),
        3 => {
            let mut noise = alloc::vec![0; chance.below(9000) as usize];
            chance.fill(&mut noise);
            (noise, ends)
        }
        4 => (
            whole[..chance.below(whole.len() as u64) as usize].to_vec(),
            ends,
        ),
        5 => ([whole.clone(), whole].concat(), false),
        // Calls of the guest to the host, and data of streams that there are none of.
        6 => (
            frame(
                length,
                call,
                chance.bits() as u8,
                chance.bits() as u8,
                &response,
            ),
            ends,
        ),
        7 => (whole.repeat(200), false),
        8 if chance.once_in(4) => (Vec::new(), false),
        _ => (whole, false),
    }
}

/// What comes instead of `ok` on a stream.
fn line(chance: &mut Chance) -> Vec<u8> {
    match chance.below(6) {
        0 => b"error ".iter().copied().chain([b'x'; 9000]).collect(),
        1 => b"maybe\n".to_vec(),
        2 => [0xff; 300].to_vec(),
        3 => b"error \xff\x1b[2J\n".to_vec(),
        // As much as the credit allows, and more.
        _ => b"ok\n".iter().copied().chain([b'o'; 200_000]).collect(),
    }
}

/// Takes every connection and answers `rounds` packets of data with lies.
pub fn lies(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let Some(target) = targets.iter().find(|target| target.id == id::VSOCK) else {
        return;
    };
    let rings = [Ring::new(), Ring::new(), Ring::new()];
    target.write(reg::STATUS, 0);
    let _ = target.begin(!(3 << 28));
    for (index, ring) in (0..).zip(&rings) {
        let _ = target.queue(index, ring);
    }
    target.finish();
    let at = chance.arena();
    let mut line_of = Line {
        target: *target,
        rings,
        reply: at + u64::from(ROOM),
    };
    let (mut taken, mut answered) = (0u64, 0u64);
    while answered < rounds {
        let [receive, ..] = &mut line_of.rings;
        receive.offer_chain(&[(at, ROOM, true)]);
        target.notify(RECEIVE);
        if !wait(receive, QUIET) {
            break;
        }
        let mut bytes = [0; 64];
        get(at, &mut bytes);
        let word = |from: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[from..from + 4]);
            word
        };
        let ends = Ends {
            host: u32::from_le_bytes(word(16)),
            guest: u32::from_le_bytes(word(20)),
        };
        match bytes[30] {
            REQUEST if chance.once_in(20) => line_of.send(chance, ends, RST, &[]),
            REQUEST => {
                taken += 1;
                line_of.send(chance, ends, RESPONSE, &[]);
            }
            op if u16::from(op) == DATA => {
                answered += 1;
                let (text, over) = if ends.guest == STREAM_PORT {
                    (line(chance), chance.once_in(2))
                } else {
                    // The number of the call, if a frame begins here.
                    answer(chance, u32::from_be_bytes(word(48)))
                };
                line_of.say(chance, ends, &text);
                if over {
                    let op = chance.one_of(&[RST, SHUTDOWN]);
                    line_of.send(chance, ends, op, &[]);
                }
            }
            op if u16::from(op) == SHUTDOWN => line_of.send(chance, ends, RST, &[]),
            CREDIT_REQUEST => line_of.send(chance, ends, CREDIT_UPDATE, &[]),
            _ => {}
        }
    }
    crate::start::say(format_args!(
        "took {taken} connections, told {answered} lies"
    ));
}
