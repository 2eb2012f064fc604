//! Entry point of the fuzz target.

use std::io::{Read, Write};

use super::harness::{Guest, from_guest};
use super::packet::{HEADER_LEN, Op};

/// Feeds one device with what `data` says: packets with any header, cut into any buffers, between
/// host reads and writes. Must never panic, whatever the bytes.
#[doc(hidden)]
pub fn fuzz_vsock(data: &[u8]) {
    let Some(mut guest) = Guest::new() else {
        return;
    };
    let handle = guest.device().handle();
    let Ok(listener) = handle.listen(7) else {
        return;
    };
    listener.set_nonblocking(true);
    let mut attempts = Vec::new();
    let (sender, receiver) = std::sync::mpsc::channel();
    let mut streams = Vec::new();
    let mut rest = data;
    while let Some((&kind, tail)) = rest.split_first() {
        rest = tail;
        let mut take = |n: usize| {
            let (now, later) = rest.split_at(n.min(rest.len()));
            rest = later;
            now
        };
        match kind % 8 {
            // A packet that is nearly right: known ports, a random operation, credit and length.
            0..=3 => {
                let Some(bytes) = take(12).first_chunk::<12>().copied() else {
                    break;
                };
                let mut header = from_guest(Op::Data, u32::from(bytes[0] % 4), 7);
                if bytes[1] & 1 == 1 {
                    header.dst_port = 0x4000_0000 + u32::from(bytes[1] >> 6);
                    header.src_port = 9;
                }
                header.flags = u32::from(bytes[2] & 7);
                header.buf_alloc = u32::from_le_bytes([bytes[3], bytes[4], 0, bytes[5] & 0x81]);
                header.fwd_cnt = u32::from_le_bytes([bytes[6], bytes[7], 0, bytes[5] & 0x80]);
                let payload = vec![kind; usize::from(bytes[8]) * 64];
                header.len = payload.len() as u32 + u32::from(bytes[9] == 255);
                let mut raw = header.encode().to_vec();
                raw[30] = bytes[10] % 10;
                raw.extend_from_slice(&payload);
                guest.send_raw(&raw, &[usize::from(bytes[11])]);
            }
            // Any bytes at all.
            4 => {
                let n = take(1).first().copied().unwrap_or(0);
                let cut = usize::from(n) % (HEADER_LEN + 8);
                let bytes = take(usize::from(n)).to_vec();
                guest.send_raw(&bytes, &[cut]);
            }
            5 => {
                let sender = sender.clone();
                let done = move |outcome| {
                    let _ = sender.send(outcome);
                };
                if let Ok(attempt) = handle.start_connect(9, done) {
                    attempts.push(attempt);
                }
                guest.settle();
            }
            6 => {
                let n = take(1).first().copied().unwrap_or(0);
                if n & 1 == 1 {
                    attempts.pop();
                }
                if n & 2 == 2 && !streams.is_empty() {
                    streams.swap_remove(usize::from(n >> 2) % streams.len());
                }
                if n & 0xc0 == 0xc0 {
                    guest.take();
                    guest.fill_rx();
                    guest.notify(0);
                }
                guest.settle();
            }
            _ => {
                streams.extend(listener.accept());
                streams.extend(receiver.try_iter().flatten());
                for stream in &mut streams {
                    let _ = stream.set_nonblocking(true);
                    let _ = stream.write(&[kind; 5000]);
                    let _ = stream.read(&mut [0; 3000]);
                }
                guest.settle();
            }
        }
    }
    guest.settle();
}
