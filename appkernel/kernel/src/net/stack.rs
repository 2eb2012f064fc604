//! The protocols on the network device: smoltcp, driven by a thread of the kernel.
//!
//! The thread alone receives and sends packets; calls of programs fill and empty the buffers of
//! connections and let the thread run. Who holds `STACK` may take a socket's state, never the other
//! way round.

mod icmp;
mod tcp;
mod udp;

use alloc::sync::Weak;
use alloc::vec::Vec;
use core::net::IpAddr;
use core::sync::atomic::{AtomicBool, Ordering};

use appkernel_core::netconf::{Counters, Link, Network};
use appkernel_core::packet;
use appkernel_hal::sync::Mutex;
use appkernel_hal::{clock, cpu, frames};
use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, Route as SmolRoute, SocketSet,
};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use super::Socket;
use super::device::Device;
use crate::{log, task};

pub use icmp::{open as open_icmp, send as send_icmp};
pub use tcp::{
    all as connections, close, connect, drained, listen, room, send, set_no_delay, shut_down,
};
pub use udp::{close as close_udp, open as open_udp, send as send_udp};

/// Frames that are taken at once: others run in between.
const BUDGET: usize = 64;
/// A share of the memory that buffers of connections may have.
const MEMORY_SHARE: usize = 8;
/// The interface's addresses of smoltcp.
const MAX_ADDRESSES: usize = 8;

struct Stack {
    device: Device,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<tcp::Connection>,
    ports: Vec<udp::Port>,
    icmp: Option<icmp::Icmp>,
    listeners: Vec<Weak<Socket>>,
}

static STACK: Mutex<Option<Stack>> = Mutex::new(None);
/// There is something for the thread to do.
static WORK: AtomicBool = AtomicBool::new(false);
/// The device has interrupted.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn now() -> Instant {
    Instant::from_micros((clock::monotonic_ns() / 1000).cast_signed())
}

fn cidr(network: &Network) -> IpCidr {
    IpCidr::new(IpAddress::from(network.ip), network.prefix)
}

fn interface(device: &mut Device) -> Interface {
    let mac = HardwareAddress::Ethernet(EthernetAddress(device.mac));
    let mut config = Config::new(mac);
    let mut seed = [0; 8];
    cpu::random(&mut seed);
    config.random_seed = u64::from_le_bytes(seed);
    Interface::new(config, device, now())
}

/// Starts the protocols on a device, and their thread.
pub fn start(mut device: Device) {
    let interface = interface(&mut device);
    *STACK.lock() = Some(Stack {
        device,
        interface,
        sockets: SocketSet::new(Vec::new()),
        connections: Vec::new(),
        ports: Vec::new(),
        icmp: None,
        listeners: Vec::new(),
    });
    if task::kernel_thread(b"network", run).is_none() {
        *STACK.lock() = None;
        log!("network: no memory for its thread");
    }
}

/// The longest packet that the device has room for.
pub fn largest() -> usize {
    STACK.lock().as_ref().map_or(0, |s| s.device.largest)
}

/// What the device has moved.
pub fn counters() -> Counters {
    let stack = STACK.lock();
    stack
        .as_ref()
        .map_or_else(Counters::default, |s| s.device.counters())
}

/// Takes over addresses, routes and the largest packet.
pub fn apply(link: &Link) {
    let mut stack = STACK.lock();
    let Some(stack) = stack.as_mut() else { return };
    if stack.device.mtu != link.mtu as usize {
        stack.device.mtu = link.mtu as usize;
        stack.interface = interface(&mut stack.device);
    }
    let mut own: Vec<IpCidr> = link.addresses.iter().map(cidr).collect();
    let mut routes = Vec::new();
    for route in &link.routes {
        match route.gateway {
            Some(gateway) => routes.push(SmolRoute {
                cidr: cidr(&route.to),
                via_router: gateway.into(),
                preferred_until: None,
                expires_at: None,
            }),
            // smoltcp knows networks on the link by own addresses in them only: it gets one that
            // nobody has.
            None => own.push(nobody_of(&route.to)),
        }
    }
    // smoltcp panics on others.
    own.retain(|a| a.address().is_unicast() || a.address().is_unspecified());
    stack.interface.update_ip_addrs(|addresses| {
        addresses.clear();
        for one in own.into_iter().take(MAX_ADDRESSES) {
            let _ = addresses.push(one);
        }
    });
    stack.interface.routes_mut().update(|table| {
        table.clear();
        for route in routes {
            let _ = table.push(route);
        }
    });
    WORK.store(true, Ordering::Relaxed);
    task::wake(task::NETWORK);
}

/// An address of the network that no machine can have: its first, or the neighbour of a single one.
fn nobody_of(network: &Network) -> IpCidr {
    let (prefix, flip) = match (network.ip, network.prefix) {
        (IpAddr::V4(_), 32) => (31, true),
        (IpAddr::V6(_), 128) => (127, true),
        (_, prefix) => (prefix, false),
    };
    let base = network.base().ip;
    let ip = match base {
        _ if !flip => base,
        IpAddr::V4(ip) => IpAddr::V4(core::net::Ipv4Addr::from_bits(ip.to_bits() ^ 1)),
        IpAddr::V6(ip) => IpAddr::V6(core::net::Ipv6Addr::from_bits(ip.to_bits() ^ 1)),
    };
    IpCidr::new(IpAddress::from(ip), prefix)
}

/// The device has interrupted.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
    WORK.store(true, Ordering::Relaxed);
}

/// Lets the thread run now. No lock may be held.
fn go() {
    WORK.store(true, Ordering::Relaxed);
    task::hand_over(task::NETWORK);
}

/// The thread.
extern "C" fn run() -> ! {
    /// Shortest sleep: the timer's.
    const TICK_NS: u64 = 1_000_000;
    loop {
        let (more, next) = turn();
        if more {
            task::yield_now();
            continue;
        }
        let next = next.map(|at| at.max(clock::monotonic_ns() + TICK_NS));
        let _ = task::wait_until(task::NETWORK, next, || {
            WORK.swap(false, Ordering::Relaxed).then_some(())
        });
    }
}

/// Moves packets; whether there are more, and when to look again.
fn turn() -> (bool, Option<u64>) {
    let mut stack = STACK.lock();
    let Some(stack) = stack.as_mut() else {
        return (false, None);
    };
    if INTERRUPTED.swap(false, Ordering::Relaxed) {
        stack.device.acknowledge();
    }
    let moved = stack.turn();
    let next = stack.interface.poll_at(now(), &stack.sockets);
    let next = next.map(|at| at.total_micros().cast_unsigned().saturating_mul(1000));
    let next = next.into_iter().chain(stack.deadline()).min();
    if moved {
        task::wake(task::FILES);
    }
    (stack.device.has_work(), next)
}

impl Stack {
    fn turn(&mut self) -> bool {
        let now = now();
        let mut moved = false;
        self.device.collect();
        for _ in 0..BUDGET {
            let Some(frame) = self.device.fetch() else {
                break;
            };
            if let Some(ends) = packet::opens(frame) {
                moved = true;
                if !self.opening(&ends) {
                    self.device.done();
                    continue;
                }
            } else if let Some(ends) = packet::refused(frame) {
                moved |= udp::refused(&ends);
            }
            let result =
                self.interface
                    .poll_ingress_single(now, &mut self.device, &mut self.sockets);
            if result == PollIngressSingleResult::None {
                // No room for an answer: it stays for later.
                break;
            }
            self.device.done();
            moved |= result == PollIngressSingleResult::SocketStateChanged;
            moved |= self.receive_udp();
            moved |= self.receive_icmp();
        }
        moved |= self.look();
        self.interface.poll_maintenance(now);
        while self.device.collect()
            && self
                .interface
                .poll_egress(now, &mut self.device, &mut self.sockets)
                == PollResult::SocketStateChanged
        {
            moved = true;
        }
        self.device.flush();
        // What was sent may have ended something, or made room.
        moved |= self.look();
        moved
    }

    /// Whether there is memory for so many more bytes of buffers.
    fn has_room_for(&self, bytes: usize) -> bool {
        let held = self.connections.len() * tcp::BYTES + self.ports.len() * udp::BYTES;
        let (total, _) = frames::statistics();
        !frames::is_scarce() && held + bytes <= total * 4096 / MEMORY_SHARE
    }
}
