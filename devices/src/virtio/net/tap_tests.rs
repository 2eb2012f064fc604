//! The network device on a real tap, in a network namespace of the test's own: a guest asks the
//! host for its hardware address and gets the answer. With enough rights only; without, opening a
//! tap has to say what is missing.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::device::{F_GUEST_CSUM, F_GUEST_TSO4, F_MRG_RXBUF};
use super::*;
use crate::testing::{Guest, READ, WRITE};
use crate::virtio::VirtioDevice;

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const HOST_IP: [u8; 4] = [10, 9, 8, 1];
const GUEST_IP: [u8; 4] = [10, 9, 8, 2];
const LONG: Duration = Duration::from_secs(20);
const BUFFERS: u64 = 40;

/// Runs `f` in a fresh network namespace; false if that is not allowed here.
fn in_own_namespace(f: impl FnOnce() + Send) -> bool {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: affects the calling thread only, which ends with this function.
            let ok = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
            if ok {
                f();
            }
            ok
        });
        thread.join().unwrap()
    })
}

fn configure(name: &str) {
    // SAFETY: plain socket and ioctl calls with an ifreq that lives through them.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        assert!(socket >= 0);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let mut address: libc::sockaddr_in = std::mem::zeroed();
        address.sin_family = libc::AF_INET as libc::sa_family_t;
        address.sin_addr.s_addr = u32::from_ne_bytes(HOST_IP);
        request.ifr_ifru.ifru_addr = *(&raw const address).cast::<libc::sockaddr>();
        assert_eq!(
            libc::ioctl(socket, libc::SIOCSIFADDR, &raw const request),
            0
        );
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        assert_eq!(
            libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request),
            0
        );
        libc::close(socket);
    }
}

fn arp(operation: u8) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend(GUEST_MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(GUEST_MAC);
    frame.extend(GUEST_IP);
    frame.extend([0; 6]);
    frame.extend(HOST_IP);
    frame
}

/// Sleeps until `fd` is readable.
fn wait(fd: i32) {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd for the duration of the call.
    let n = unsafe { libc::poll(&raw mut poll, 1, 1000) };
    assert!(n >= 0);
}

fn ask_for_the_hosts_address(vhost: bool) {
    let tap = Tap::open("bulkhead%d").unwrap();
    assert_eq!(tap.name(), "bulkhead0", "the kernel's choice");
    assert!(
        Tap::open("bulkhead0")
            .unwrap_err()
            .to_string()
            .contains("another process")
    );
    configure(tap.name());
    // A descriptor from somewhere else works as well.
    let fd = tap.file().try_clone().unwrap().into();
    let tap = Tap::from_fd(fd).unwrap();
    let watch = tap.as_raw_fd();

    let options = NetOptions {
        mac: Some(GUEST_MAC),
        mtu: None,
        vhost,
        plain: false,
    };
    let mut net = Net::new(tap, &options);
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let events = [event(), event()];
    let clones: Vec<_> = events.iter().map(|e| e.try_clone().unwrap()).collect();
    net.set_queue_events(clones.into());
    let mut guest = Guest::new(2, 64);
    let features = 1 << 32 | F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4;
    net.activate(guest.activation(features)).unwrap();
    net.start();
    assert!(!guest.interrupt.needs_reset());
    assert_eq!(
        net.uses_vhost(),
        vhost && Path::new("/dev/vhost-net").exists()
    );
    for n in 0..BUFFERS {
        guest.add(0, &[(0x1_0000 + n * 2048, 2048, WRITE)]);
    }
    guest.write(0x1000, &arp(1));
    guest.add(1, &[(0x1000, 12, READ), (0x100c, 42, READ)]);
    for event in &events {
        event.write(1).unwrap();
    }
    net.transmit();

    let answer = |guest: &Guest| {
        guest.used(0).iter().any(|(head, len)| {
            let frame = guest.read(0x1_0000 + u64::from(*head) * 2048, *len as usize);
            // To us, of type ARP, an answer, from the host's address.
            frame.len() >= 54
                && frame[10..12] == [1, 0]
                && frame[12..18] == GUEST_MAC
                && frame[24..26] == [8, 6]
                && frame[32..34] == [0, 2]
                && frame[40..44] == HOST_IP
        })
    };
    let start = Instant::now();
    while !answer(&guest) {
        assert!(start.elapsed() < LONG, "no answer");
        if net.uses_vhost() {
            wait(guest.interrupt.event().as_raw_fd());
            let _ = guest.interrupt.event().read();
        } else {
            wait(watch);
            net.receive();
        }
    }
    assert_eq!(guest.interrupt.status() & 1, 1);
    assert_eq!(guest.used(1).len(), 1);

    // Saved in the middle, the positions are exact, whoever worked on the queues.
    let check = |queues: &[virtio_queue::Queue], guest: &Guest| {
        let received = guest.used(0).len() as u16;
        assert_eq!(
            (queues[0].next_avail(), queues[0].next_used()),
            (received, received)
        );
        assert_eq!((queues[1].next_avail(), queues[1].next_used()), (1, 1));
    };
    net.quiesce();
    check(net.queues(), &guest);
    let had_kernel = vhost && Path::new("/dev/vhost-net").exists();
    net.resume();
    assert_eq!(net.uses_vhost(), had_kernel);
    let queues = net.deactivate();
    check(&queues, &guest);
    assert!(!net.uses_vhost());
}

#[test]
fn a_guest_reaches_the_host() {
    for vhost in [false, true] {
        let ran = in_own_namespace(|| ask_for_the_hosts_address(vhost));
        if !ran {
            let error = Tap::open("bulkhead%d").unwrap_err().to_string();
            assert!(
                error.contains("CAP_NET_ADMIN") || error.contains("tun module"),
                "{error}"
            );
        }
    }
}
