//! The network device seen by a driver; a socket pair is the cable.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use proptest::{prop_assert, proptest};
use vmm_sys_util::eventfd::EventFd;

use super::device::{F_GUEST_TSO4, F_HOST_TSO4, F_MRG_RXBUF, OFFLOADS};
use super::io::{BUDGET, HEADER};
use super::*;
use crate::testing::{Guest, READ, WRITE};
use crate::virtio::VirtioDevice;

fn cable() -> (Tap, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    (Tap::from_socket(OwnedFd::from(near)), far)
}

fn setup(features: u64, size: u16) -> (Guest, Net, UnixDatagram, Vec<EventFd>) {
    let (tap, far) = cable();
    let mut net = Net::new(tap, &NetOptions::default());
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let events = vec![event(), event()];
    let clones: Vec<_> = events.iter().map(|e| e.try_clone().unwrap()).collect();
    net.set_queue_events(clones.into());
    let guest = Guest::new(2, size);
    net.activate(guest.activation(features)).unwrap();
    net.start();
    (guest, net, far, events)
}

fn frame(fill: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.resize(HEADER + len, fill);
    frame
}

#[test]
fn sends_frames_from_many_pieces() {
    let (mut guest, mut net, far, _events) = setup(0, 16);
    guest.write(0x1000, &frame(7, 100));
    guest.add(
        1,
        &[(0x1000, 5, READ), (0x1005, 7, READ), (0x100c, 100, READ)],
    );
    net.transmit();
    let mut got = [0; 200];
    assert_eq!(far.recv(&mut got).unwrap(), 112);
    assert_eq!(&got[..112], frame(7, 100));
    assert_eq!(guest.used(1), [(0, 0)]);
    assert_eq!((net.metrics.tx_packets, net.metrics.tx_bytes), (1, 100));
    // Without a frame, and too long for one.
    guest.add(1, &[(0x1000, 12, READ)]);
    guest.add(1, &[(0x1000, 0x1_0000, READ), (0x1000, 0x1000, READ)]);
    guest.add(1, &[(0x1000, 100, WRITE)]);
    net.transmit();
    assert!(far.recv(&mut got).is_err());
    assert_eq!(guest.used(1).len(), 4);
    assert_eq!(net.metrics.errors, 3);
}

#[test]
fn a_full_cable_drops_and_never_blocks() {
    let (mut guest, mut net, far, events) = setup(0, 512);
    guest.write(0x1000, &frame(7, 1000));
    for _ in 0..500 {
        guest.add(1, &[(0x1000, 1012, READ)]);
    }
    let mut turns = 0;
    loop {
        net.transmit();
        turns += 1;
        if events[1].read().is_err() {
            break;
        }
    }
    assert_eq!(guest.used(1).len(), 500);
    assert!(turns >= 500 / BUDGET, "{turns}");
    assert!(net.metrics.tx_dropped > 0);
    drop(far);
}

#[test]
fn receives_into_one_buffer_each() {
    let (mut guest, mut net, far, _events) = setup(0, 16);
    far.send(&frame(1, 60)).unwrap();
    net.receive();
    assert!(guest.used(0).is_empty(), "no room yet");
    assert_eq!(net.metrics.rx_starved, 1);
    for n in 0..3u64 {
        let at = 0x2000 + n * 0x1000;
        guest.add(0, &[(at, 11, WRITE), (at + 11, 1600, WRITE)]);
    }
    net.receive();
    assert_eq!(guest.used(0), [(0, 72)]);
    let mut expected = frame(1, 60);
    expected[10] = 1;
    assert_eq!(guest.read(0x2000, 72), expected);
    assert_eq!(guest.interrupt.status(), 1);
    far.send(&frame(2, 60)).unwrap();
    far.send(&frame(3, 60)).unwrap();
    far.send(&frame(4, 60)).unwrap();
    net.receive();
    assert_eq!(guest.used(0).len(), 3);
    assert_eq!(net.queues()[0].state().next_avail, 3);
    guest.add(0, &[(0x6000, 1612, WRITE)]);
    net.receive();
    assert_eq!(guest.used(0).len(), 4);
    assert_eq!(net.metrics.rx_packets, 4);
}

#[test]
fn large_frames_span_buffers() {
    let (mut guest, mut net, far, _events) = setup(F_MRG_RXBUF | F_GUEST_TSO4, 64);
    for n in 0..40u64 {
        guest.add(0, &[(0x2000 + n * 0x800, 2048, WRITE)]);
    }
    let data: Vec<u8> = (0..60_000u32).map(|n| (n % 251) as u8).collect();
    let mut sent = vec![0; HEADER];
    sent.extend(&data);
    far.send(&sent).unwrap();
    far.send(&frame(9, 10)).unwrap();
    net.receive();
    let used = guest.used(0);
    // 60,012 bytes are 29 whole buffers and a bit; then no room for another frame of any length.
    assert_eq!(used.len(), 30);
    assert_eq!(used[29].1, 60_012 - 29 * 2048);
    assert_eq!(guest.read(0x2000 + 10, 2), [30, 0]);
    assert_eq!(guest.read(0x2000 + 12, 60_000), data);
    // What was looked at but not used is still the driver's.
    assert_eq!(net.queues()[0].state().next_avail, 30);
    for n in 0..24u64 {
        guest.add(0, &[(0x2000 + n * 0x800, 2048, WRITE)]);
    }
    net.receive();
    assert_eq!(guest.used(0).len(), 31);
    assert_eq!(guest.used(0)[30].1, 22);
}

#[test]
fn a_small_ring_gets_what_fits() {
    let (mut guest, mut net, far, _events) = setup(F_MRG_RXBUF | F_GUEST_TSO4, 4);
    for n in 0..4u64 {
        guest.add(0, &[(0x2000 + n * 0x800, 2048, WRITE)]);
    }
    far.send(&frame(5, 3000)).unwrap();
    net.receive();
    assert_eq!(guest.used(0), [(0, 2048), (1, 964)]);
}

#[test]
fn refused_buffers_go_back_empty() {
    let (mut guest, mut net, far, _events) = setup(F_MRG_RXBUF, 16);
    guest.add(0, &[(0x2000, 512, WRITE)]);
    guest.add(0, &[(0xffff_ffff_0000, 2048, WRITE)]);
    guest.add(0, &[(0x3000, 4, WRITE)]);
    guest.add(0, &[(0x4000, 2048, WRITE)]);
    far.send(&frame(5, 1000)).unwrap();
    net.receive();
    // The parts of the frame are neighbours.
    assert_eq!(guest.used(0), [(1, 0), (2, 0), (0, 512), (3, 500)]);
    assert_eq!(guest.read(0x2000 + 10, 2), [2, 0]);
}

#[test]
fn a_turn_of_receiving_ends() {
    let (mut guest, mut net, far, events) = setup(0, 256);
    for _ in 0..200 {
        guest.add(0, &[(0x2000, 1700, WRITE)]);
    }
    let mut sent = 0;
    while sent < 100 && far.send(&frame(1, 60)).is_ok() {
        sent += 1;
    }
    net.receive();
    assert_eq!(guest.used(0).len(), sent.min(BUDGET));
    if sent >= BUDGET {
        assert!(events[0].read().is_ok(), "calls itself");
        net.receive();
        assert_eq!(guest.used(0).len(), sent);
    }
}

#[test]
fn a_ring_that_lies_needs_a_reset() {
    let (mut guest, mut net, _far, _events) = setup(0, 16);
    guest.set_avail_index(0, 1000);
    net.receive();
    assert!(guest.interrupt.needs_reset());
}

#[test]
fn configuration_and_link() {
    let (tap, _far) = cable();
    let options = NetOptions {
        mac: Some([2, 1, 2, 3, 4, 5]),
        mtu: Some(9000),
        vhost: true,
        plain: false,
    };
    let mut net = Net::new(tap, &options);
    let guest = Guest::new(2, 16);
    net.activate(guest.activation(0)).unwrap();
    let config = |net: &Net| {
        let mut config = [0xff; 14];
        net.read_config(0, &mut config);
        config
    };
    assert_eq!(
        config(&net),
        [2, 1, 2, 3, 4, 5, 1, 0, 1, 0, 0x28, 0x23, 0, 0]
    );
    net.set_link(false);
    assert_eq!(config(&net)[6], 0);
    assert_eq!(guest.interrupt.status(), 2);
    assert_eq!(net.features() & 1 << 3, 1 << 3);
    assert_eq!(net.features() & F_HOST_TSO4, F_HOST_TSO4);
    let plain = NetOptions {
        plain: true,
        ..NetOptions::default()
    };
    let plain = Net::new(cable().0, &plain).features();
    assert_eq!(plain & (OFFLOADS | F_MRG_RXBUF), F_MRG_RXBUF);

    let state = net.save();
    let (tap, _far) = cable();
    let mut other = Net::new(tap, &NetOptions::default());
    assert_eq!(other.mac()[0] & 3, 2, "local, not multicast");
    other.restore(&state).unwrap();
    assert_eq!(other.save(), state);
    assert_eq!(config(&other), config(&net));
    assert!(other.restore(&serde_json::json!({ "version": 1 })).is_err());
}

#[test]
fn names_are_checked() {
    for name in ["", "a-name-much-too-long", "a/b", "a\0b"] {
        // Where there is no /dev/net/tun, that is said instead.
        let error = Tap::open(name).unwrap_err();
        assert!(
            matches!(error, TapError::Name(_) | TapError::Host { .. }),
            "{error}"
        );
    }
    let (near, _far) = UnixDatagram::pair().unwrap();
    assert!(Tap::from_fd(near.into()).is_err(), "not a tap");
}

proptest! {
    #[test]
    fn hostile_rings(noise in crate::testing::noise(), mergeable: bool, large: bool) {
        let features = [0, F_MRG_RXBUF][usize::from(mergeable)] | [0, F_GUEST_TSO4][usize::from(large)];
        let (mut guest, mut net, far, _events) = setup(features, 16);
        guest.scribble(&noise);
        for len in [60, 1500, 5000] {
            let _ = far.send(&frame(1, len));
            net.receive();
            net.transmit();
            let mut sink = vec![0; 70_000];
            while far.recv(&mut sink).is_ok() {}
        }
        prop_assert!(guest.used(0).len() <= 16);
    }
}
