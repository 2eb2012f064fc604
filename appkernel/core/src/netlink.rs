//! rtnetlink: what programs ask about interfaces, addresses and routes (rtnetlink(7)).

use alloc::vec::Vec;
use core::net::IpAddr;

use crate::errno::Errno;
use crate::netconf::{Link, Network, Route, is_link_local};

/// Kinds of messages.
mod kind {
    pub const ERROR: u16 = 2;
    pub const DONE: u16 = 3;
    pub const NEWLINK: u16 = 16;
    pub const GETLINK: u16 = 18;
    pub const NEWADDR: u16 = 20;
    pub const GETADDR: u16 = 22;
    pub const NEWROUTE: u16 = 24;
    pub const GETROUTE: u16 = 26;
    pub const GETNEIGH: u16 = 30;
    pub const GETRULE: u16 = 34;
}
const REQUEST: u16 = 1;
const MULTI: u16 = 2;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const HEADER: usize = 16;
/// Bytes of one answer, about: programs read with buffers of a page.
const ANSWER: usize = 3500;
/// Requests in one message.
const MAX_REQUESTS: usize = 64;
const INET: u8 = 2;
const INET6: u8 = 10;

fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { INET } else { INET6 }
}

/// A message under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, to: (u32, u32)) -> Self {
        let mut bytes = Vec::with_capacity(64);
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(to.0.to_le_bytes());
        bytes.extend(to.1.to_le_bytes());
        Self(bytes)
    }

    fn body(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn add(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend(((value.len() + 4) as u16).to_le_bytes());
        self.0.extend(kind.to_le_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn ip(self, kind: u16, ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => self.add(kind, &ip.octets()),
            IpAddr::V6(ip) => self.add(kind, &ip.octets()),
        }
    }

    fn word(self, kind: u16, value: u32) -> Self {
        self.add(kind, &value.to_le_bytes())
    }

    fn finish(mut self) -> Vec<u8> {
        let len = (self.0.len() as u32).to_le_bytes();
        for (slot, byte) in self.0.iter_mut().zip(len) {
            *slot = byte;
        }
        self.0
    }
}

fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn link(to: (u32, u32), flags: u16, link: &Link) -> Vec<u8> {
    const ETHER: u16 = 1;
    const LOOPBACK: u16 = 772;
    let device = if link.loopback { LOOPBACK } else { ETHER };
    let mut body = [0; 16];
    body[2..4].copy_from_slice(&device.to_le_bytes());
    body[4..8].copy_from_slice(&link.index.to_le_bytes());
    body[8..12].copy_from_slice(&link.flags().to_le_bytes());
    let broadcast = if link.loopback { [0; 6] } else { [0xff; 6] };
    let c = link.counters;
    let mut stats = alloc::vec![c.received.1, c.sent.1, c.received.0, c.sent.0];
    stats.resize(24, 0);
    let wide: Vec<u8> = stats.iter().flat_map(|n| n.to_le_bytes()).collect();
    let narrow: Vec<u8> = stats
        .iter()
        .flat_map(|n| (*n as u32).to_le_bytes())
        .collect();
    Message::new(kind::NEWLINK, flags, to)
        .body(&body)
        .add(3, &text(&link.name))
        .word(13, 1000)
        // State: up; the loopback's is not known, as in Linux.
        .add(16, &[if link.loopback { 0 } else { 6 }])
        .add(17, &[0])
        .word(4, link.mtu)
        .word(27, 0)
        .add(6, &text("noqueue"))
        .add(1, &link.mac)
        .add(2, &broadcast)
        .add(23, &wide)
        .add(7, &narrow)
        .finish()
}

fn scope(link: &Link, ip: IpAddr) -> u8 {
    if link.loopback {
        254
    } else if is_link_local(ip) && ip.is_ipv6() {
        253
    } else {
        0
    }
}

fn address(to: (u32, u32), flags: u16, link: &Link, own: &Network) -> Vec<u8> {
    const PERMANENT: u8 = 0x80;
    let mut body = [0; 8];
    body[0] = family(own.ip);
    body[1] = own.prefix;
    body[2] = PERMANENT;
    body[3] = scope(link, own.ip);
    body[4..].copy_from_slice(&link.index.to_le_bytes());
    let mut message = Message::new(kind::NEWADDR, flags, to)
        .body(&body)
        .ip(1, own.ip);
    if own.ip.is_ipv4() {
        message = message.ip(2, own.ip);
        if let Some(broadcast) = own.broadcast().filter(|_| !link.loopback) {
            message = message.ip(4, IpAddr::V4(broadcast));
        }
        message = message.add(3, &text(&link.name));
    }
    let mut times = [0xff; 16];
    times[8..].fill(0);
    message.word(8, PERMANENT.into()).add(6, &times).finish()
}

fn route(to: (u32, u32), flags: u16, link: &Link, route: &Route) -> Vec<u8> {
    const MAIN: u8 = 254;
    const STATIC: u8 = 4;
    const KERNEL: u8 = 2;
    const LINK: u8 = 253;
    let connected = route.gateway.is_none() && route.source.is_some();
    let v6 = route.to.ip.is_ipv6();
    let body = [
        family(route.to.ip),
        route.to.prefix,
        0,
        0,
        MAIN,
        if connected { KERNEL } else { STATIC },
        if route.gateway.is_none() && !v6 {
            LINK
        } else {
            0
        },
        1,
        0,
        0,
        0,
        0,
    ];
    let mut message = Message::new(kind::NEWROUTE, flags, to)
        .body(&body)
        .word(15, MAIN.into());
    if route.to.prefix > 0 {
        message = message.ip(1, route.to.ip);
    }
    if let Some(gateway) = route.gateway {
        message = message.ip(5, gateway);
    }
    message = message.word(4, link.index);
    if let Some(source) = route.source.filter(|_| !v6) {
        message = message.ip(7, source);
    }
    let metric = if v6 && route.metric == 0 {
        1024
    } else {
        route.metric
    };
    if metric > 0 {
        message = message.word(6, metric);
    }
    message.finish()
}

/// The attribute of a kind in a request's attributes.
fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some((head, _)) = rest.split_first_chunk::<4>() {
        let len = usize::from(u16::from_le_bytes([head[0], head[1]]));
        let value = rest.get(4..len)?;
        // The upper bits are flags.
        if u16::from_le_bytes([head[2], head[3]]) & 0x3fff == wanted {
            return Some(value);
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
    None
}

fn to_ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(four.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(Into::into)
}

struct Request<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    /// What follows the header.
    body: &'a [u8],
    whole: &'a [u8],
}

fn next<'a>(bytes: &mut &'a [u8]) -> Option<Request<'a>> {
    let rest = *bytes;
    let head = rest.first_chunk::<HEADER>()?;
    let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let whole = rest.get(..len)?;
    let body = whole.get(HEADER..)?;
    *bytes = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some(Request {
        kind: u16::from_le_bytes([head[4], head[5]]),
        flags: u16::from_le_bytes([head[6], head[7]]),
        sequence: u32::from_le_bytes([head[8], head[9], head[10], head[11]]),
        body,
        whole,
    })
}

/// All that a request asks for: messages, or the error.
fn find(request: &Request<'_>, links: &[Link], to: (u32, u32)) -> Result<Vec<Vec<u8>>, Errno> {
    let of = request.body.first().copied().unwrap_or(0);
    let dump = request.flags & DUMP != 0;
    let flags = if dump { MULTI } else { 0 };
    let wanted = |ip: IpAddr| of == 0 || of == family(ip);
    let mut found = Vec::new();
    match request.kind {
        kind::GETLINK if dump => {
            // Of bridges there are none; who names another family means all links (`ip -6 addr`).
            const BRIDGE: u8 = 7;
            if of == BRIDGE {
                return Ok(found);
            }
            found.extend(links.iter().map(|l| link(to, flags, l)));
        }
        kind::GETLINK => {
            let index = request.body.get(4..8).and_then(|b| b.try_into().ok());
            let index = index.map_or(0, u32::from_le_bytes);
            let attributes = request.body.get(16..).unwrap_or_default();
            let name = attribute(attributes, 3).map(|n| n.strip_suffix(&[0]).unwrap_or(n));
            let same = |l: &&Link| match name {
                Some(name) if index == 0 => l.name.as_bytes() == name,
                _ => l.index == index,
            };
            let one = links.iter().find(same).ok_or(Errno::ENODEV)?;
            found.push(link(to, flags, one));
        }
        kind::GETADDR if dump => {
            for l in links {
                let own = l.addresses.iter().filter(|a| wanted(a.ip));
                found.extend(own.map(|a| address(to, flags, l, a)));
            }
        }
        kind::GETROUTE if dump => {
            for l in links.iter().filter(|l| !l.loopback) {
                let routes = l.all_routes();
                let routes = routes.iter().filter(|r| wanted(r.to.ip));
                found.extend(routes.map(|r| route(to, flags, l, r)));
            }
        }
        kind::GETROUTE => {
            let attributes = request.body.get(12..).unwrap_or_default();
            let target = attribute(attributes, 1)
                .and_then(to_ip)
                .ok_or(Errno::EINVAL)?;
            let best = links.iter().find_map(|l| {
                let best = l.route(target)?;
                let source = l.source(target);
                Some((l, Route { source, ..best }))
            });
            let (l, best) = best.ok_or(Errno::ENETUNREACH)?;
            let prefix = if target.is_ipv4() { 32 } else { 128 };
            let to_one = Network { ip: target, prefix };
            found.push(route(to, flags, l, &Route { to: to_one, ..best }));
        }
        // There is nothing of that to list.
        kind::GETNEIGH | kind::GETRULE if dump => {}
        // Nothing is changed by programs: the host has set the network up.
        16..=127 if request.kind & 3 != 2 => return Err(Errno::EPERM),
        _ => return Err(Errno::EOPNOTSUPP),
    }
    Ok(found)
}

fn verdict(request: &Request<'_>, to: (u32, u32), error: i32) -> Vec<u8> {
    let message = Message::new(kind::ERROR, 0, to).body(&error.wrapping_neg().to_le_bytes());
    // All of a request that went wrong, the header of one that did not.
    let echo = if error == 0 {
        request.whole.get(..HEADER).unwrap_or_default()
    } else {
        request.whole
    };
    message.body(echo).finish()
}

/// The answers to what a program of that port sent, each a packet.
pub fn answer(bytes: &[u8], port: u32, links: &[Link]) -> Vec<Vec<u8>> {
    let mut rest = bytes;
    let mut packets: Vec<Vec<u8>> = Vec::new();
    for _ in 0..MAX_REQUESTS {
        let Some(request) = next(&mut rest) else {
            break;
        };
        if request.flags & REQUEST == 0 {
            continue;
        }
        let to = (request.sequence, port);
        match find(&request, links, to) {
            Err(e) => packets.push(verdict(&request, to, e.0)),
            Ok(found) => {
                let mut packet = Vec::new();
                for message in found {
                    if packet.len() + message.len() > ANSWER {
                        packets.push(core::mem::take(&mut packet));
                    }
                    packet.extend(message);
                }
                if !packet.is_empty() {
                    packets.push(packet);
                }
                if request.flags & DUMP != 0 {
                    let done = Message::new(kind::DONE, MULTI, to).body(&[0; 4]);
                    packets.push(done.finish());
                } else if request.flags & ACK != 0 {
                    packets.push(verdict(&request, to, 0));
                }
            }
        }
    }
    packets
}

#[cfg(test)]
mod tests {
    use std::prelude::v1::*;
    use std::vec;

    use super::*;

    fn links() -> Vec<Link> {
        let eth = Link {
            index: 2,
            name: "eth0".into(),
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1450,
            addresses: vec![
                Network::parse("10.0.0.2/24").unwrap(),
                Network::parse("fd00::2/64").unwrap(),
            ],
            routes: vec![Route {
                to: Network::all(false),
                gateway: Some("10.0.0.1".parse().unwrap()),
                source: None,
                metric: 0,
            }],
            ..Link::default()
        };
        vec![Link::loopback(), eth]
    }

    fn request(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + body.len()) as u32).to_le_bytes().to_vec();
        bytes.extend(kind.to_le_bytes());
        bytes.extend((flags | REQUEST).to_le_bytes());
        bytes.extend(7u32.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(body);
        bytes
    }

    /// Kinds and bodies of the messages, whose headers must be right.
    fn messages(packets: &[Vec<u8>]) -> Vec<(u16, Vec<u8>)> {
        let mut all = Vec::new();
        for packet in packets {
            let mut rest = packet.as_slice();
            while !rest.is_empty() {
                let m = next(&mut rest).expect("a whole message");
                assert_eq!(
                    (m.sequence, &m.whole[12..16]),
                    (7, &99u32.to_le_bytes()[..])
                );
                all.push((m.kind, m.body.to_vec()));
            }
        }
        all
    }

    fn ask(kind: u16, flags: u16, body: &[u8]) -> Vec<(u16, Vec<u8>)> {
        messages(&answer(&request(kind, flags, body), 99, &links()))
    }

    #[test]
    fn links_addresses_and_routes_are_listed() {
        let links = ask(kind::GETLINK, DUMP, &[0; 16]);
        let kinds: Vec<u16> = links.iter().map(|m| m.0).collect();
        assert_eq!(kinds, [kind::NEWLINK, kind::NEWLINK, kind::DONE]);
        assert_eq!(attribute(&links[1].1[16..], 3), Some(&b"eth0\0"[..]));
        assert_eq!(
            attribute(&links[1].1[16..], 1),
            Some(&[2, 0, 0, 0, 0, 9][..])
        );

        let of_family = |family| ask(kind::GETLINK, DUMP, &[family; 1]).len();
        assert_eq!([INET, 10, 7].map(of_family), [3, 3, 1]);

        let all = ask(kind::GETADDR, DUMP, &[0]);
        assert_eq!(all.len(), 5);
        let four = ask(kind::GETADDR, DUMP, &[INET, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(four.len(), 3);
        assert_eq!(attribute(&four[1].1[8..], 2), Some(&[10, 0, 0, 2][..]));
        assert_eq!(attribute(&four[1].1[8..], 4), Some(&[10, 0, 0, 255][..]));

        let routes = ask(kind::GETROUTE, DUMP, &[INET]);
        assert_eq!(routes.len(), 3);
        assert_eq!(attribute(&routes[1].1[12..], 5), Some(&[10, 0, 0, 1][..]));
    }

    #[test]
    fn one_link_or_route_is_found_or_refused() {
        let mut body = vec![0; 16];
        body[4] = 2;
        let one = ask(kind::GETLINK, ACK, &body);
        assert_eq!((one[0].0, one[1].0), (kind::NEWLINK, kind::ERROR));
        assert_eq!(one[1].1[..4], [0; 4]);
        body[4] = 9;
        let none = ask(kind::GETLINK, 0, &body);
        assert_eq!(none[0].0, kind::ERROR);
        assert_eq!(none[0].1[..4], (-Errno::ENODEV.0).to_le_bytes());

        let mut body = vec![0; 12];
        body.extend([8, 0, 1, 0, 8, 8, 8, 8]);
        let one = ask(kind::GETROUTE, 0, &body);
        assert_eq!(attribute(&one[0].1[12..], 5), Some(&[10, 0, 0, 1][..]));
        let change = ask(kind::NEWADDR, ACK, &[0; 8]);
        assert_eq!(change[0].1[..4], (-Errno::EPERM.0).to_le_bytes());
    }

    #[test]
    fn no_request_is_too_strange() {
        let links = links();
        let mut state = 3u32;
        for i in 0..3000usize {
            let mut bytes: Vec<u8> = (0..i % 80)
                .map(|_| {
                    state = state.wrapping_mul(1_103_515_245).wrapping_add(12345);
                    (state >> 16) as u8
                })
                .collect();
            if bytes.len() > 8 {
                let len = bytes.len() as u32;
                bytes[..4].copy_from_slice(&len.to_le_bytes());
                bytes[4..6].copy_from_slice(&(16 + (i % 20) as u16).to_le_bytes());
                bytes[6] |= 1;
            }
            let _ = answer(&bytes, 1, &links);
        }
    }
}
