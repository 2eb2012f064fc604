use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use super::harness::{CID, Guest, from_guest};
use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::stream::{FULL_BUFFER, FULL_BUFFER_STREAMS};
use super::*;
use crate::virtio::VirtioDevice;

type Outcome = std::io::Result<UnixStream>;

fn guest() -> Guest {
    Guest::new().unwrap()
}

fn op(header: &Header) -> Op {
    Op::from_u16(header.op).unwrap()
}

fn ops(packets: &[(Header, Vec<u8>)]) -> Vec<Op> {
    packets.iter().map(|(header, _)| op(header)).collect()
}

fn start(guest: &Guest, port: u32) -> (Connecting, Receiver<Outcome>) {
    let (sender, receiver) = channel();
    let attempt = guest
        .device()
        .handle()
        .start_connect(port, move |outcome| drop(sender.send(outcome)))
        .unwrap();
    (attempt, receiver)
}

/// Connects the host to `port` of the guest; gives the stream and the host's port.
fn connected(guest: &mut Guest, port: u32) -> (UnixStream, u32) {
    let (_attempt, outcome) = start(guest, port);
    let packets = guest.receive();
    assert_eq!(ops(&packets), [Op::Request]);
    let request = packets[0].0;
    assert_eq!(
        (request.src_cid, request.dst_cid, request.dst_port),
        (2, u64::from(CID), port)
    );
    assert!(request.buf_alloc > 0);
    guest.send(&from_guest(Op::Response, port, request.src_port), b"");
    let stream = outcome.try_recv().unwrap().unwrap();
    (stream, request.src_port)
}

/// Lets the guest connect to `port` of the host.
fn accepted(guest: &mut Guest, listener: &VsockListener, guest_port: u32) -> UnixStream {
    guest.send(&from_guest(Op::Request, guest_port, listener.port()), b"");
    let packets = guest.receive();
    assert_eq!(ops(&packets), [Op::Response]);
    listener.accept().unwrap()
}

fn data(packets: &[(Header, Vec<u8>)]) -> Vec<u8> {
    packets
        .iter()
        .filter(|(header, _)| op(header) == Op::Data)
        .flat_map(|(_, bytes)| bytes.clone())
        .collect()
}

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect()
}

#[test]
fn host_connects_talks_and_closes() {
    let mut guest = guest();
    let (mut stream, port) = connected(&mut guest, 1024);
    stream.write_all(b"hello").unwrap();
    let packets = guest.receive();
    assert_eq!(data(&packets), b"hello");
    guest.send(&from_guest(Op::Data, 1024, port), b"world");
    let mut buffer = [0; 5];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"world");

    // Half close: the guest learns that no more comes, and can still answer.
    stream.shutdown(Shutdown::Write).unwrap();
    let packets = guest.receive();
    assert_eq!(ops(&packets), [Op::Shutdown]);
    assert_eq!(packets[0].0.flags, SHUTDOWN_SEND);
    guest.send(&from_guest(Op::Data, 1024, port), b"late answer");
    let mut buffer = [0; 11];
    stream.read_exact(&mut buffer).unwrap();

    // The guest closes: end of file here, a reset there, and nothing is left.
    let mut close = from_guest(Op::Shutdown, 1024, port);
    close.flags = SHUTDOWN_BOTH;
    guest.send(&close, b"");
    assert_eq!(stream.read(&mut buffer).unwrap(), 0);
    assert_eq!(ops(&guest.receive()), [Op::Reset]);
    let metrics = guest.device().counters();
    assert_eq!(
        (
            metrics.streams,
            metrics.streams_opened,
            metrics.malformed,
            metrics.resets
        ),
        (0, 1, 0, 0)
    );
}

#[test]
fn host_closes_first_and_all_data_arrives() {
    let mut guest = guest();
    let (mut stream, port) = connected(&mut guest, 5);
    let sent = pattern(100_000, 1);
    stream.write_all(&sent).unwrap();
    drop(stream);
    let packets = guest.receive();
    assert_eq!(data(&packets), sent);
    let last = packets.last().unwrap().0;
    assert_eq!((op(&last), last.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    // What the guest still sends is thrown away, and does not stop it.
    for _ in 0..100 {
        guest.send(&from_guest(Op::Data, 5, port), &[0; 60_000]);
    }
    assert!(
        ops(&guest.receive())
            .iter()
            .all(|op| *op == Op::CreditUpdate)
    );
    guest.send(&from_guest(Op::Reset, 5, port), b"");
    assert_eq!(guest.receive(), []);
    let metrics = guest.device().counters();
    assert_eq!(
        (metrics.streams, metrics.resets, metrics.malformed),
        (0, 0, 0)
    );
}

#[test]
fn guest_half_closes() {
    let mut guest = guest();
    let (mut stream, port) = connected(&mut guest, 5);
    guest.send(&from_guest(Op::Data, 5, port), b"bye");
    let mut shutdown = from_guest(Op::Shutdown, 5, port);
    shutdown.flags = SHUTDOWN_SEND;
    guest.send(&shutdown, b"");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"bye");
    stream.write_all(b"still here").unwrap();
    assert_eq!(data(&guest.receive()), b"still here");
    shutdown.flags = SHUTDOWN_RECEIVE;
    guest.send(&shutdown, b"");
    // Both halves are down: that is a close.
    assert_eq!(ops(&guest.receive()), [Op::Reset]);
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
}

#[test]
fn guest_stops_receiving() {
    let mut guest = guest();
    let (mut stream, port) = connected(&mut guest, 5);
    let mut shutdown = from_guest(Op::Shutdown, 5, port);
    shutdown.flags = SHUTDOWN_RECEIVE;
    guest.send(&shutdown, b"");
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    guest.send(&from_guest(Op::Data, 5, port), b"ok");
    let mut buffer = [0; 2];
    stream.read_exact(&mut buffer).unwrap();
    drop(stream);
    let packets = guest.receive();
    assert_eq!(
        packets.last().map(|(header, _)| (op(header), header.flags)),
        Some((Op::Shutdown, SHUTDOWN_BOTH))
    );
}

#[test]
fn refusals_and_cancelled_attempts() {
    let mut guest = guest();
    let (attempt, outcome) = start(&guest, 77);
    let request = guest.receive()[0].0;
    guest.send(&from_guest(Op::Reset, 77, request.src_port), b"");
    let error = outcome.try_recv().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert!(error.to_string().contains("77"));
    drop(attempt);

    // Given up before the device looked: the guest never hears of it.
    let (attempt, outcome) = start(&guest, 78);
    drop(attempt);
    assert_eq!(guest.receive(), []);
    assert_eq!(outcome.try_recv().unwrap_err(), TryRecvError::Disconnected);
    // Given up later: a reset, and an answer that comes too late is answered by a reset.
    let (attempt, outcome) = start(&guest, 79);
    let request = guest.receive()[0].0;
    drop(attempt);
    assert_eq!(ops(&guest.receive()), [Op::Reset]);
    guest.send(&from_guest(Op::Response, 79, request.src_port), b"");
    assert_eq!(ops(&guest.receive()), [Op::Reset]);
    assert_eq!(outcome.try_recv().unwrap_err(), TryRecvError::Disconnected);

    let handle = guest.device().handle();
    let error = handle.connect(80, Duration::from_millis(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!(guest.device().counters().streams, 0);
    drop(guest);
    assert_eq!(
        handle
            .connect(80, Duration::from_secs(9))
            .unwrap_err()
            .kind(),
        ErrorKind::NotConnected
    );
    assert_eq!(
        handle.listen(80).unwrap_err().kind(),
        ErrorKind::NotConnected
    );
}

#[test]
fn the_end_of_the_vm_ends_attempts_that_the_guest_has_seen() {
    let mut guest = guest();
    let handle = guest.device().handle();
    // One the guest has been told of and does not answer, one that the device has not looked at.
    let (_told, told) = start(&guest, 1024);
    assert_eq!(ops(&guest.receive()), [Op::Request]);
    let (_unseen, unseen) = start(&guest, 1025);
    let (given_up, silent) = start(&guest, 1026);
    drop(given_up);
    handle.close();
    for outcome in [told, unseen] {
        let error = outcome.try_recv().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotConnected);
        assert_eq!(outcome.try_recv().unwrap_err(), TryRecvError::Disconnected);
    }
    assert_eq!(silent.try_recv().unwrap_err(), TryRecvError::Disconnected);
    let late = handle.connect(1024, Duration::from_secs(60));
    assert_eq!(late.unwrap_err().kind(), ErrorKind::NotConnected);
}

#[test]
fn blocking_connect_from_another_thread() {
    let mut guest = guest();
    let handle = guest.device().handle();
    let client = std::thread::spawn(move || {
        let mut stream = handle.connect(1024, Duration::from_secs(60)).unwrap();
        stream.write_all(b"ping").unwrap();
        let mut buffer = [0; 4];
        stream.read_exact(&mut buffer).unwrap();
        buffer
    });
    let mut received = Vec::new();
    let mut port = 0;
    while received.len() < 4 {
        let packets = guest.receive();
        if packets.is_empty() {
            guest.wait();
        }
        for (header, bytes) in packets {
            if op(&header) == Op::Request {
                port = header.src_port;
                guest.send(&from_guest(Op::Response, 1024, port), b"");
            }
            received.extend(bytes);
        }
    }
    assert_eq!(received, b"ping");
    guest.send(&from_guest(Op::Data, 1024, port), b"pong");
    assert_eq!(&client.join().unwrap(), b"pong");
}

#[test]
fn a_stream_that_was_brought_is_joined() {
    let mut guest = guest();
    let (mut near, far) = UnixStream::pair().unwrap();
    let (sender, outcome) = channel();
    let attempt = guest
        .device()
        .handle()
        .start_connect_over(1024, far, move |outcome| drop(sender.send(outcome)))
        .unwrap();
    let port = guest.receive()[0].0.src_port;
    guest.send(&from_guest(Op::Response, 1024, port), b"");
    // What the caller is given is the device's end once more: dropping it ends nothing.
    drop(outcome.recv().unwrap().unwrap());
    drop(attempt);
    guest.send(&from_guest(Op::Data, 1024, port), b"from the guest");
    let mut buffer = [0; 14];
    near.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"from the guest");
    near.write_all(b"answer").unwrap();
    assert_eq!(data(&guest.receive()), b"answer");
    // Refused, it is closed.
    let (mut near, far) = UnixStream::pair().unwrap();
    let attempt = guest
        .device()
        .handle()
        .start_connect_over(7, far, drop)
        .unwrap();
    let port = guest.receive()[0].0.src_port;
    guest.send(&from_guest(Op::Reset, 7, port), b"");
    drop(attempt);
    assert_eq!(near.read(&mut buffer).unwrap(), 0);
}

#[test]
fn guest_connects_to_listeners_only() {
    let mut guest = guest();
    let handle = guest.device().handle();
    guest.send(&from_guest(Op::Request, 40, 2000), b"");
    assert_eq!(ops(&guest.receive()), [Op::Reset]);

    let listener = handle.listen(2000).unwrap();
    assert_eq!(
        handle.listen(2000).unwrap_err().kind(),
        ErrorKind::AddrInUse
    );
    listener.set_nonblocking(true);
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    let mut stream = accepted(&mut guest, &listener, 40);
    guest.send(&from_guest(Op::Data, 40, 2000), b"from the guest");
    let mut buffer = [0; 14];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"from the guest");
    stream.write_all(b"answer").unwrap();
    assert_eq!(data(&guest.receive()), b"answer");

    // A second request on the same ports breaks the protocol.
    guest.send(&from_guest(Op::Request, 40, 2000), b"");
    assert_eq!(ops(&guest.receive()), [Op::Reset]);
    assert_eq!(stream.read(&mut buffer).unwrap(), 0);

    // Only so many wait to be accepted.
    for port in 0..200 {
        guest.send(&from_guest(Op::Request, port, 2000), b"");
    }
    let packets = guest.receive();
    assert_eq!(
        packets
            .iter()
            .filter(|(header, _)| op(header) == Op::Response)
            .count(),
        handle::MAX_BACKLOG
    );
    assert_eq!(packets.len(), 200);
    // Those nobody took are closed with the listener.
    drop(listener);
    let packets = guest.receive();
    assert_eq!(
        packets
            .iter()
            .filter(|(header, _)| header.flags == SHUTDOWN_BOTH)
            .count(),
        handle::MAX_BACKLOG
    );
    guest.send(&from_guest(Op::Request, 4000, 2000), b"");
    assert_eq!(ops(&guest.receive()), [Op::Reset]);

    let listener = handle.listen(2000).unwrap();
    drop(guest);
    assert_eq!(
        listener.accept().unwrap_err().kind(),
        ErrorKind::NotConnected
    );
    assert_eq!(
        listener.accept().unwrap_err().kind(),
        ErrorKind::NotConnected
    );
}

#[test]
fn the_guests_credit_is_respected() {
    let mut guest = guest();
    let (mut stream, port) = connected(&mut guest, 5);
    let mut credit = from_guest(Op::CreditUpdate, 5, port);
    credit.buf_alloc = 100;
    guest.send(&credit, b"");
    let sent = pattern(5000, 2);
    stream.write_all(&sent).unwrap();
    let packets = guest.receive();
    assert_eq!(ops(&packets), [Op::Data, Op::CreditRequest]);
    let mut got = data(&packets);
    assert_eq!(got.len(), 100);
    // Nothing more until the guest says so, and no flood of requests.
    stream.write_all(b"").unwrap();
    assert_eq!(guest.receive(), []);
    while got.len() < sent.len() {
        credit.fwd_cnt = got.len() as u32;
        credit.buf_alloc = 1700;
        guest.send(&credit, b"");
        let now = data(&guest.receive());
        assert!(!now.is_empty() && now.len() <= 1700);
        got.extend(now);
    }
    assert_eq!(got, sent);
}

#[test]
fn a_slow_reader_holds_the_guest_back_and_loses_nothing() {
    let mut guest = guest();
    let (mut stream, port) = connected(&mut guest, 5);
    let sent = pattern(3_000_000, 3);
    let mut got = Vec::new();
    let (mut told, mut at) = (0u32, 0usize);
    let mut buffer = vec![0; 100_000];
    while got.len() < sent.len() {
        // The guest sends all it may.
        loop {
            let free = FULL_BUFFER as usize - (at - told as usize);
            let n = free.min(65_536).min(sent.len() - at);
            if n == 0 {
                break;
            }
            guest.send(&from_guest(Op::Data, 5, port), &sent[at..at + n]);
            at += n;
        }
        let n = stream.read(&mut buffer).unwrap();
        got.extend_from_slice(&buffer[..n]);
        for (header, _) in guest.receive() {
            assert_eq!(op(&header), Op::CreditUpdate);
            told = header.fwd_cnt;
        }
    }
    assert!(got == sent);

    // More than was allowed: only this stream dies.
    let (mut other, _) = connected(&mut guest, 6);
    let mut reset = false;
    for _ in 0..40 {
        guest.send(&from_guest(Op::Data, 5, port), &[1; 65_536]);
        reset |= ops(&guest.receive()).contains(&Op::Reset);
    }
    assert!(reset);
    other.write_all(b"alive").unwrap();
    assert_eq!(data(&guest.receive()), b"alive");
}

#[test]
fn what_the_guest_sent_before_closing_reaches_a_slow_reader() {
    for close in [Op::Shutdown, Op::Reset] {
        let mut guest = guest();
        let (mut stream, port) = connected(&mut guest, 5);
        let sent = pattern(FULL_BUFFER as usize, 4);
        for part in sent.chunks(65_536) {
            guest.send(&from_guest(Op::Data, 5, port), part);
        }
        let mut header = from_guest(close, 5, port);
        header.flags = SHUTDOWN_BOTH;
        guest.send(&header, b"");
        // The ports can be used again at once.
        if close == Op::Shutdown {
            assert!(ops(&guest.receive()).contains(&Op::Reset));
        }
        let mut got = Vec::new();
        let mut buffer = [0; 50_000];
        loop {
            let n = stream.read(&mut buffer).unwrap();
            if n == 0 {
                break;
            }
            got.extend_from_slice(&buffer[..n]);
            guest.settle();
        }
        assert!(got == sent);
        guest.settle();
        assert_eq!(guest.device().counters().streams, 0);
    }
}

#[test]
fn many_streams_at_once_each_get_their_share() {
    const COUNT: u32 = 200;
    let mut guest = guest();
    let handle = guest.device().handle();
    let listener = handle.listen(9).unwrap();
    let mut streams: Vec<_> = (0..COUNT)
        .map(|port| accepted(&mut guest, &listener, port))
        .collect();
    for (stream, seed) in streams.iter_mut().zip(0..) {
        stream.write_all(&pattern(100_000, seed)).unwrap();
    }
    // Buffers go round: nobody is through before everybody had a turn.
    let mut got = vec![Vec::new(); COUNT as usize];
    let mut all_served = false;
    loop {
        guest.settle();
        let packets = guest.take();
        if packets.is_empty() {
            break;
        }
        for (header, bytes) in packets {
            got[header.dst_port as usize].extend(bytes);
        }
        all_served |= got.iter().all(|bytes| !bytes.is_empty());
        assert!(all_served || got.iter().all(|bytes| bytes.len() < 100_000));
        guest.fill_rx();
        guest.notify(0);
    }
    for (bytes, seed) in got.iter().zip(0..) {
        assert!(*bytes == pattern(100_000, seed));
    }
    assert!(streams.len() > FULL_BUFFER_STREAMS);
    drop(streams);
    assert_eq!(
        guest
            .receive()
            .iter()
            .filter(|(header, _)| header.flags == SHUTDOWN_BOTH)
            .count(),
        COUNT as usize
    );
}

#[test]
fn the_number_of_streams_is_bounded() {
    let mut guest = guest();
    let mut pending: Vec<_> = (0..mux::MAX_STREAMS as u32)
        .map(|port| start(&guest, port))
        .collect();
    assert_eq!(guest.receive().len(), mux::MAX_STREAMS);
    let (_extra, outcome) = start(&guest, 5000);
    guest.settle();
    assert_eq!(
        outcome.try_recv().unwrap().unwrap_err().kind(),
        ErrorKind::QuotaExceeded
    );
    // A stream that only waits for the guest's last word makes room.
    let (_attempt, outcome) = pending.swap_remove(0);
    guest.send(&from_guest(Op::Response, 0, 0x4000_0000), b"");
    drop(outcome.try_recv().unwrap().unwrap());
    assert_eq!(ops(&guest.receive()), [Op::Shutdown, Op::Shutdown]);
    let (_extra, _outcome) = start(&guest, 5000);
    let mut got = ops(&guest.receive());
    got.sort_by_key(|op| *op == Op::Request);
    assert_eq!(got, [Op::Reset, Op::Request]);
}

#[test]
fn lies_in_headers() {
    let mut guest = guest();
    let (mut stream, port) = connected(&mut guest, 5);
    let good = from_guest(Op::Data, 5, port);
    // Other addresses than the guest's and the host's: nobody to answer.
    for (src, dst) in [(4, 2), (3, 3), (3, 1), (u64::MAX, 2), (3 | 1 << 32, 2)] {
        guest.send(
            &Header {
                src_cid: src,
                dst_cid: dst,
                ..good
            },
            b"x",
        );
    }
    assert_eq!(guest.receive(), []);
    // Not a header.
    guest.send_raw(&[], &[]);
    guest.send_raw(&[0xff; 43], &[7]);
    assert_eq!(guest.receive(), []);
    assert_eq!(guest.device().counters().malformed, 7);
    // Unknown stream, unknown type, unknown operation: reset.
    guest.send(&from_guest(Op::Data, 6, port), b"x");
    guest.send(
        &Header {
            socket_type: 2,
            src_port: 6,
            ..good
        },
        b"",
    );
    guest.send(
        &Header {
            op: 99,
            src_port: 6,
            ..good
        },
        b"",
    );
    assert_eq!(ops(&guest.receive()), [Op::Reset; 3]);
    // A reset of an unknown stream is not answered.
    guest.send(&from_guest(Op::Reset, 6, port), b"");
    assert_eq!(guest.receive(), []);
    // A header cut into pieces is fine.
    let mut bytes = Header { len: 3, ..good }.encode().to_vec();
    bytes.extend_from_slice(b"abcdef");
    guest.send_raw(&bytes, &[1, 1, 20, 45]);
    let mut buffer = [0; 3];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"abc");
    // More length than bytes.
    for len in [1, 70_000, u32::MAX] {
        let (mut stream, port) = connected(&mut guest, 8);
        guest.send_raw(
            &Header {
                len,
                ..from_guest(Op::Data, 8, port)
            }
            .encode(),
            &[],
        );
        assert_eq!(ops(&guest.receive()), [Op::Reset]);
        assert_eq!(stream.read(&mut buffer).unwrap(), 0);
    }
    guest.send(&good, b"ok");
    stream.read_exact(&mut buffer[..2]).unwrap();
}

#[test]
fn a_guest_that_never_gives_buffers_is_held_back() {
    let mut guest = Guest::inactive(Vsock::new(CID).unwrap()).unwrap();
    guest.activate().unwrap();
    for _ in 0..1000 {
        guest.send(&from_guest(Op::Data, 6, 6), b"x");
    }
    let held = guest.device().counters().tx_packets;
    assert_eq!(held, mux::MAX_RESETS as u64);
    guest.fill_rx();
    guest.notify(0);
    // What waited in the transmit queue (two descriptors each) follows.
    assert_eq!(guest.receive().len(), mux::MAX_RESETS + 128);
}

#[test]
fn tiny_and_readable_receive_buffers_are_given_back() {
    let mut guest = Guest::inactive(Vsock::new(CID).unwrap()).unwrap();
    let bad: [&[(u64, u32, bool)]; 4] = [
        &[(0x10_0000, 44, true)],
        &[(0x10_0000, 4096, false)],
        &[(0xffff_f000, 4096, true)],
        &[(0x10_0000, 0, true)],
    ];
    for parts in bad {
        guest.rx.add(parts).unwrap();
    }
    // Header and payload over several pieces.
    guest
        .rx
        .add(&[
            (0x10_0000, 10, true),
            (0x20_0000, 40, true),
            (0x30_0000, 3, true),
        ])
        .unwrap();
    guest.activate().unwrap();
    let (_attempt, _outcome) = start(&guest, 1);
    guest.settle();
    let lens: Vec<_> = std::iter::from_fn(|| guest.rx.take_used())
        .map(|(_, len)| len)
        .collect();
    assert_eq!(lens, [0, 0, 0, 0, 44]);
}

#[test]
fn device_reset_ends_streams_and_keeps_listeners() {
    let mut guest = guest();
    let (mut stream, _) = connected(&mut guest, 5);
    let listener = guest.device().handle().listen(9).unwrap();
    let (_attempt, outcome) = start(&guest, 6);
    guest.settle();
    guest.reset().unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(
        outcome.try_recv().unwrap().unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    assert!(guest.device().queues().is_empty());
    // An attempt made now waits for the driver.
    let (_attempt, outcome) = start(&guest, 7);
    guest.settle();
    guest.fill_rx();
    guest.activate().unwrap();
    let packets = guest.receive();
    assert_eq!(ops(&packets), [Op::Request]);
    guest.send(&from_guest(Op::Response, 7, packets[0].0.src_port), b"");
    outcome.try_recv().unwrap().unwrap();
    guest.receive();
    accepted(&mut guest, &listener, 50);
}

#[test]
fn state_round_trip_tells_the_guest() {
    let mut original = guest();
    let (_stream, _) = connected(&mut original, 5);
    let state = original.device().save();
    let mut copy = Vsock::new(CID).unwrap();
    copy.restore(&state).unwrap();
    assert_eq!(copy.save(), state);
    let mut restored = Guest::with_device(copy).unwrap();
    restored.settle();
    assert_eq!(restored.event.take_used().map(|(_, len)| len), Some(4));
    assert_eq!(restored.device().counters().streams, 0);
    // The original goes on.
    assert_eq!(original.device().counters().streams, 1);

    for bad in [
        "null",
        "{}",
        r#"{"version":2,"guest_cid":3}"#,
        r#"{"version":1}"#,
    ] {
        let value = serde_json::from_str(bad).unwrap();
        let error = Vsock::new(CID).unwrap().restore(&value).unwrap_err();
        assert!(error.to_string().contains("vsock"));
    }
}

#[test]
fn configuration_space() {
    let device = Vsock::new(0x1234).unwrap();
    let mut bytes = [0xff; 8];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes, [0x34, 0x12, 0, 0, 0, 0, 0, 0]);
    let mut bytes = [0xff; 4];
    device.read_config(6, &mut bytes);
    assert_eq!(bytes, [0; 4]);
    device.read_config(u64::MAX, &mut bytes[..1]);
    for cid in [0, 1, 2, u32::MAX] {
        assert!(Vsock::new(cid).is_err());
    }
}

#[test]
fn bulk_transfer_both_ways() {
    const TOTAL: usize = 32 << 20;
    let mut guest = guest();
    let (stream, port) = connected(&mut guest, 5);
    let mut writer = stream.try_clone().unwrap();
    let chunk = pattern(1 << 20, 9);
    let expect = chunk.clone();
    let sender = std::thread::spawn(move || {
        for _ in 0..TOTAL / chunk.len() {
            writer.write_all(&chunk).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = 0;
    let mut done = false;
    while !done {
        let packets = guest.receive();
        if packets.is_empty() {
            guest.wait();
        }
        for (header, bytes) in packets {
            done |= op(&header) == Op::Shutdown;
            for byte in bytes {
                assert_eq!(byte, expect[got % expect.len()]);
                got += 1;
            }
        }
        let mut credit = from_guest(Op::CreditUpdate, 5, port);
        credit.fwd_cnt = got as u32;
        guest.send(&credit, b"");
    }
    assert_eq!(got, TOTAL);
    sender.join().unwrap();
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 200, ..Default::default() })]
    #[test]
    fn random_packets_never_panic(data in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..2000)) {
        fuzz_vsock(&data);
    }
}
