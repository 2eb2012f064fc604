//! Connections of the host to the guest that the guest takes, and then forgets.

use crate::cases::honest::{get, put};
use crate::cases::requests::packet;
use crate::chance::Chance;
use crate::device::{Target, id, reg};
use crate::ring::Ring;

/// Queues (virtio 1.2, 5.10.2).
pub const RECEIVE: u32 = 0;
pub const TRANSMIT: u32 = 1;
/// Operations of packets (virtio 1.2, 5.10.6).
pub const REQUEST: u8 = 1;
pub const RESPONSE: u16 = 2;
pub const DATA: u16 = 5;
/// Room for a packet that arrives.
const ROOM: u32 = 4096;

/// Takes every connection, sends a little, and resets the device while connections are open.
pub fn reset(targets: &[Target], chance: &mut Chance, rounds: u64) {
    let Some(target) = targets.iter().find(|target| target.id == id::VSOCK) else {
        return;
    };
    let mut rings = [Ring::new(), Ring::new(), Ring::new()];
    let mut taken = 0u64;
    for _ in 0..rounds {
        target.write(reg::STATUS, 0);
        for ring in &mut rings {
            ring.clear();
        }
        let _ = target.begin(!(3 << 28));
        for (index, ring) in (0..).zip(&rings) {
            let _ = target.queue(index, ring);
        }
        target.finish();
        let [receive, transmit, _] = &mut rings;
        let (at, reply) = (chance.arena(), chance.arena() + u64::from(ROOM));
        for _ in 0..1 + chance.below(8) {
            receive.offer_chain(&[(at, ROOM, true)]);
            target.notify(RECEIVE);
            if !super::honest::wait(receive, 400_000_000) {
                break;
            }
            let mut header = [0; 44];
            get(at, &mut header);
            if header[30] != REQUEST {
                continue;
            }
            taken += 1;
            let port = |from: usize| {
                let bytes = [
                    header[from],
                    header[from + 1],
                    header[from + 2],
                    header[from + 3],
                ];
                u32::from_le_bytes(bytes)
            };
            let (host, guest) = (port(16), port(20));
            put(reply, &packet(3, 2, guest, host, 0, 1, RESPONSE));
            transmit.offer_chain(&[(reply, 44, false)]);
            target.notify(TRANSMIT);
            super::honest::wait(transmit, 400_000_000);
            put(reply, &packet(3, 2, guest, host, 100, 1, DATA));
            transmit.offer_chain(&[(reply, 144, false)]);
            target.notify(TRANSMIT);
            super::honest::wait(transmit, 400_000_000);
        }
    }
    crate::start::say(format_args!("took {taken} connections"));
}
