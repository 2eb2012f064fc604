//! The memory device seen by a driver.

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::device::{ACK, BLOCK, ERROR, NACK};
use super::*;
use crate::testing::{Guest, MEMORY, READ, WRITE};
use crate::virtio::VirtioDevice;

const AT: u64 = 0x1_0000_0000;
const BLOCKS: u64 = 8;
const FEATURES: u64 = 2;

struct Setup {
    guest: Guest,
    mem: Mem,
    done: usize,
}

fn setup() -> Setup {
    let ranges = [
        (GuestAddress(0), MEMORY as usize),
        (GuestAddress(AT), (BLOCKS * BLOCK) as usize),
    ];
    let guest = Guest::with_memory(1, 32, GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let mut mem = Mem::new(AT, BLOCKS * BLOCK).unwrap();
    mem.activate(guest.activation(FEATURES)).unwrap();
    Setup {
        guest,
        mem,
        done: 0,
    }
}

impl Setup {
    /// One request; answer and state.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        self.guest.write(0x1000, &request);
        self.guest
            .add(0, &[(0x1000, 24, READ), (0x2000, 10, WRITE)]);
        self.mem.work();
        let used = self.guest.used(0);
        assert_eq!(used[self.done % 32].1, 10);
        self.done += 1;
        let answer = self.guest.read(0x2000, 10);
        let word = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
        (word(0), word(8))
    }

    fn config(&self, word: u64) -> u64 {
        let mut data = [0; 8];
        self.mem.read_config(word * 8, &mut data);
        u64::from_le_bytes(data)
    }
}

#[test]
fn the_guest_plugs_what_is_wanted_and_no_more() {
    let mut s = setup();
    assert_eq!(
        [0, 2, 3, 4, 5, 6].map(|w| s.config(w)),
        [BLOCK, AT, BLOCKS * BLOCK, 0, 0, 0]
    );
    assert_eq!(s.ask(0, AT, 1).0, ERROR, "nothing is usable yet");
    s.mem.request(3 * BLOCK - 5);
    assert_eq!(s.guest.interrupt.status() & 2, 2);
    assert_eq!([4, 5, 6].map(|w| s.config(w)), [3 * BLOCK, 0, 3 * BLOCK]);
    assert_eq!(s.ask(0, AT, 2).0, ACK);
    assert_eq!(s.ask(0, AT + BLOCK, 1).0, ERROR, "plugged already");
    assert_eq!(s.ask(0, AT + 2 * BLOCK, 1).0, ACK);
    assert_eq!(s.mem.plugged_bytes(), 3 * BLOCK);
    assert_eq!(s.ask(3, AT, 3), (ACK, 0));
    s.mem.request(2 * BLOCK);
    assert_eq!(s.ask(1, AT + BLOCK, 1).0, ACK);
    assert_eq!(s.ask(3, AT, 3), (ACK, 2));
    assert_eq!(s.ask(3, AT + BLOCK, 1), (ACK, 1));
    assert_eq!(
        s.ask(0, AT + BLOCK, 1).0,
        NACK,
        "the host has changed its mind"
    );
    for (address, count) in [
        (AT + 3 * BLOCK, 1),
        (AT, 0),
        (AT, 4),
        (AT + 1, 1),
        (0, 1),
        (u64::MAX, 1),
        (u64::MAX - BLOCK + 1, u16::MAX),
    ] {
        for kind in [0, 1, 3] {
            assert_eq!(s.ask(kind, address, count).0, ERROR, "{kind} {address:#x}");
        }
    }
    assert_eq!(s.ask(9, AT, 1).0, ERROR);
    assert_eq!(s.ask(2, 0, 0).0, ACK);
    assert_eq!(s.mem.plugged_bytes(), 0);
    s.mem.request(u64::MAX);
    assert_eq!(s.mem.requested_bytes(), BLOCKS * BLOCK);
}

#[test]
fn what_is_unplugged_reads_as_zeroes() {
    let mut s = setup();
    s.mem.request(2 * BLOCK);
    assert_eq!(s.ask(0, AT, 2).0, ACK);
    s.guest.write(AT, b"secret");
    s.guest.write(AT + BLOCK, b"other");
    assert_eq!(s.ask(1, AT, 1).0, ACK);
    assert_eq!(s.guest.read(AT, 6), [0; 6]);
    assert_eq!(s.guest.read(AT + BLOCK, 5), *b"other");
    assert_eq!(s.mem.metrics.released_bytes, BLOCK);
}

#[test]
fn state_survives_a_reset_and_a_restore() {
    let mut s = setup();
    s.mem.request(5 * BLOCK);
    assert_eq!(s.ask(0, AT, 2).0, ACK);
    assert_eq!(s.ask(0, AT + 3 * BLOCK, 1).0, ACK);
    s.mem.deactivate();
    assert_eq!(s.mem.plugged_bytes(), 3 * BLOCK);
    let state = s.mem.save();
    let mut again = Mem::new(AT, BLOCKS * BLOCK).unwrap();
    again.restore(&state).unwrap();
    assert_eq!(again.save(), state);
    assert_eq!(again.plugged_bytes(), 3 * BLOCK);
    assert!(Mem::new(AT, BLOCK).unwrap().restore(&state).is_err());
    for (key, value) in [
        ("version", serde_json::json!(2)),
        ("usable", serde_json::json!(9)),
        ("requested", serde_json::json!(6)),
        ("plugged", serde_json::json!([[0, 2], [1, 1]])),
        ("plugged", serde_json::json!([[4, 2]])),
        ("plugged", serde_json::json!([[u64::MAX, 2]])),
    ] {
        let mut bad = state.clone();
        bad[key] = value;
        assert!(again.restore(&bad).is_err(), "{key}");
    }
    let plain = s.guest.activation(0);
    assert!(s.mem.activate(plain).is_err());
}

#[test]
fn ranges_are_of_whole_blocks() {
    for (address, bytes) in [
        (1, BLOCK),
        (0, 0),
        (0, BLOCK + 1),
        (u64::MAX - BLOCK + 1, BLOCK),
    ] {
        assert!(Mem::new(address, bytes).is_err());
    }
}

proptest! {
    /// Whatever is asked for: never more than is wanted at that time, and the count is right.
    #[test]
    fn the_bound_holds(steps in proptest::collection::vec((0u16..5, 0u64..10, 0u16..10, 0u64..10), 1..60)) {
        let mut s = setup();
        for (kind, block, count, wanted) in steps {
            if kind == 4 {
                s.mem.request(wanted * BLOCK);
                continue;
            }
            let before = s.mem.plugged_bytes();
            s.ask(kind, AT + block * BLOCK, count);
            let after = s.mem.plugged_bytes();
            prop_assert!(after <= before || after <= s.mem.requested_bytes());
            let mut seen = 0;
            for block in 0..s.config(4) / BLOCK {
                seen += u64::from(s.ask(3, AT + block * BLOCK, 1) == (ACK, 0));
            }
            prop_assert_eq!(seen * BLOCK, after);
        }
    }

    #[test]
    fn hostile_rings(noise in crate::testing::noise()) {
        let mut s = setup();
        s.mem.request(4 * BLOCK);
        s.guest.scribble(&noise);
        for _ in 0..4 {
            s.mem.work();
        }
        prop_assert!(s.mem.plugged_bytes() <= 4 * BLOCK);
    }
}
