//! What /proc/net and /sys/class/net show.

use alloc::format;
use alloc::string::String;
use core::net::{IpAddr, SocketAddr};

use appkernel_core::netconf::{Network, Route, is_link_local};

use super::{Kind, Phase, interface, named, stack};

/// Words of an address as /proc/net shows them: in the machine's order.
fn words(ip: IpAddr, v6: bool) -> String {
    let octets = match (ip, v6) {
        (IpAddr::V4(ip), false) => return format!("{:08X}", u32::from_le_bytes(ip.octets())),
        (IpAddr::V4(ip), true) => ip.to_ipv6_mapped().octets(),
        (IpAddr::V6(ip), _) => ip.octets(),
    };
    let words = octets.chunks_exact(4);
    words
        .filter_map(|w| w.try_into().ok())
        .map(|w| format!("{:08X}", u32::from_le_bytes(w)))
        .collect()
}

fn line(number: usize, local: SocketAddr, remote: SocketAddr, state: u8, v6: bool) -> String {
    let end = |at: SocketAddr| format!("{}:{:04X}", words(at.ip(), v6), at.port());
    format!(
        "{number:4}: {} {} {state:02X} 00000000:00000000 00:00000000 00000000     0        0 0 1 \
         0000000000000000 100 0 0 10 0\n",
        end(local),
        end(remote)
    )
}

/// Sockets of a kind: those of programs, and what is left of connections.
fn sockets(kind: Kind, v6: bool) -> String {
    const ESTABLISHED: u8 = 1;
    const CLOSED: u8 = 7;
    const LISTENING: u8 = 10;
    let mut text = String::from(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout \
         inode\n",
    );
    let mut number = 0;
    for socket in named() {
        if !socket.is_inet() || socket.kind != kind || socket.icmp.is_some() {
            continue;
        }
        let (local, remote) = socket.addresses();
        let state = socket.state.lock();
        let outside = kind == Kind::Stream && state.wire.is_some();
        let shown = match state.phase {
            Phase::Listening { .. } => LISTENING,
            Phase::Connected => ESTABLISHED,
            _ => CLOSED,
        };
        let Some(own) = local.socket().filter(|_| local.is_v6() == v6 && !outside) else {
            continue;
        };
        let none = SocketAddr::new(Network::all(own.is_ipv6()).ip, 0);
        let other = remote.and_then(|r| r.socket()).unwrap_or(none);
        text += &line(number, own, other, shown, v6);
        number += 1;
    }
    if kind == Kind::Stream {
        for c in stack::connections() {
            if c.local.is_ipv6() == v6 {
                text += &line(number, c.local, c.remote, c.state, v6);
                number += 1;
            }
        }
    }
    text
}

fn devices() -> String {
    let mut text = String::from(
        "Inter-|   Receive                                                |  Transmit\n face |bytes    \
         packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls \
         carrier compressed\n",
    );
    for link in interface::links() {
        let (received, sent) = (link.counters.received, link.counters.sent);
        text += &format!(
            "{:>6}: {:7} {:7}    0    0    0     0          0         0 {:8} {:7}    0    0    0     \
             0       0          0\n",
            link.name, received.0, received.1, sent.0, sent.1
        );
    }
    text
}

fn route(name: &str, route: &Route) -> String {
    const UP: u32 = 1;
    const GATEWAY: u32 = 2;
    const HOST: u32 = 4;
    let gateway = route.gateway.unwrap_or(Network::all(false).ip);
    let flags = UP
        | if route.gateway.is_some() { GATEWAY } else { 0 }
        | if route.to.prefix == 32 { HOST } else { 0 };
    format!(
        "{name}\t{}\t{}\t{flags:04X}\t0\t0\t{}\t{}\t0\t0\t0\n",
        words(route.to.ip, false),
        words(gateway, false),
        route.metric,
        words(IpAddr::V4(route.to.mask()), false)
    )
}

fn routes() -> String {
    let mut text = String::from(
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n",
    );
    if let Some(link) = interface::outer() {
        let all = link.all_routes();
        for one in all.iter().filter(|r| r.to.ip.is_ipv4()) {
            text += &route(&link.name, one);
        }
    }
    text
}

fn addresses_v6() -> String {
    let mut text = String::new();
    for link in interface::links() {
        for address in &link.addresses {
            let IpAddr::V6(ip) = address.ip else { continue };
            let scope = match () {
                () if link.loopback => 0x10,
                () if is_link_local(address.ip) => 0x20,
                () => 0,
            };
            text += &format!(
                "{:032x} {:02x} {:02x} {scope:02x} 80 {:>8}\n",
                ip.to_bits(),
                link.index,
                address.prefix,
                link.name
            );
        }
    }
    text
}

/// The text of a file below /proc/net.
pub fn proc(name: &str) -> Option<String> {
    Some(match name {
        "dev" => devices(),
        "if_inet6" => addresses_v6(),
        "route" => routes(),
        "tcp" => sockets(Kind::Stream, false),
        "tcp6" => sockets(Kind::Stream, true),
        "udp" => sockets(Kind::Datagram, false),
        "udp6" => sockets(Kind::Datagram, true),
        "unix" => String::from("Num       RefCount Protocol Flags    Type St Inode Path\n"),
        _ => return None,
    })
}

/// The text of a file of an interface in /sys/class/net.
pub fn sys(name: &str, index: u32) -> Option<String> {
    let link = interface::links().into_iter().find(|l| l.index == index)?;
    let (received, sent) = (link.counters.received, link.counters.sent);
    let number = match name {
        "address" => {
            let parts: alloc::vec::Vec<String> =
                link.mac.iter().map(|b| format!("{b:02x}")).collect();
            return Some(parts.join(":") + "\n");
        }
        "operstate" => {
            return Some(String::from(if link.loopback {
                "unknown\n"
            } else {
                "up\n"
            }));
        }
        "flags" => return Some(format!("{:#x}\n", link.flags() & 0xffff)),
        "addr_len" => 6,
        "carrier" => 1,
        "ifindex" => link.index.into(),
        "mtu" => link.mtu.into(),
        "speed" => 10_000,
        "tx_queue_len" => 1000,
        "type" if link.loopback => 772,
        "type" => 1,
        "statistics/rx_bytes" => received.0,
        "statistics/rx_packets" => received.1,
        "statistics/tx_bytes" => sent.0,
        "statistics/tx_packets" => sent.1,
        _ => return None,
    };
    Some(format!("{number}\n"))
}
