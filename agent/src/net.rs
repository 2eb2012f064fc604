//! Interfaces, addresses, routes and neighbours, by rtnetlink.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use bulkhead_protocol::sandbox::{Interface, Neighbour, Route};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

use crate::error::{Context, Error, Result};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const IFF_UP: u32 = 1;

/// One rtnetlink message being built.
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A message of `kind` with the fixed part `body`.
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend_from_slice(&1u32.to_ne_bytes()); // sequence
        bytes.extend_from_slice(&0u32.to_ne_bytes()); // port
        bytes.extend_from_slice(body);
        Self { bytes }
    }

    /// Adds an attribute.
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        // Values here are addresses, numbers and interface names: far below 64 KiB.
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(0).to_ne_bytes();
        for (slot, byte) in self.bytes.iter_mut().zip(length) {
            *slot = byte;
        }
        self.bytes
    }
}

struct Netlink {
    fd: OwnedFd,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { fd })
    }

    /// Sends a message and waits for the kernel's verdict, which comes at once.
    fn request(&self, message: Message) -> io::Result<()> {
        send(self.fd.as_raw_fd(), &message.finish(), MsgFlags::empty())?;
        let mut buffer = [0; 8192];
        let n = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let reply = buffer.get(..n).unwrap_or_default();
        // nlmsghdr is 16 bytes; an acknowledgement is NLMSG_ERROR with an error of 0.
        let kind = reply.get(4..6).and_then(|b| b.try_into().ok());
        let code = reply.get(16..20).and_then(|b| b.try_into().ok());
        match (kind.map(u16::from_ne_bytes), code.map(i32::from_ne_bytes)) {
            (Some(2), Some(0)) => Ok(()),
            (Some(2), Some(code)) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            _ => Err(io::Error::other("unexpected answer of rtnetlink")),
        }
    }
}

fn link_body(index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut body = vec![0; 4]; // family, padding, type
    body.extend_from_slice(&index.to_ne_bytes());
    body.extend_from_slice(&flags.to_ne_bytes());
    body.extend_from_slice(&change.to_ne_bytes());
    body
}

fn set_link(
    netlink: &Netlink,
    index: u32,
    up: bool,
    attributes: &[(u16, &[u8])],
) -> io::Result<()> {
    let flags = if up { IFF_UP } else { 0 };
    let mut message = Message::new(libc::RTM_NEWLINK, 0, &link_body(index, flags, IFF_UP));
    for (kind, value) in attributes {
        message.attribute(*kind, value);
    }
    netlink.request(message)
}

fn index_of(name: &str) -> Result<u32> {
    nix::net::if_::if_nametoindex(name)
        .context(|| format!("find network interface {name:?} in the guest"))
}

/// Brings the loopback up.
pub fn loopback_up() -> io::Result<()> {
    let netlink = Netlink::open()?;
    let index = nix::net::if_::if_nametoindex("lo")?;
    set_link(&netlink, index, true, &[])
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    let family = match address {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    u8::try_from(family).unwrap_or(0)
}

fn parse_address(text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| Error::Invalid(format!("{text:?} is not an IP address")))
}

/// `address/prefix`; without a prefix, the address alone.
fn parse_network(text: &str) -> Result<(IpAddr, u8)> {
    let (address, prefix) = match text.split_once('/') {
        Some((a, p)) => (parse_address(a)?, p.parse::<u8>().ok()),
        None => {
            let a = parse_address(text)?;
            (a, Some(if a.is_ipv4() { 32 } else { 128 }))
        }
    };
    let most = if address.is_ipv4() { 32 } else { 128 };
    match prefix {
        Some(prefix) if prefix <= most => Ok((address, prefix)),
        _ => Err(Error::Invalid(format!(
            "{text:?} is not an address with a prefix length"
        ))),
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bad = || {
        Error::Invalid(format!(
            "{text:?} is not a hardware address aa:bb:cc:dd:ee:ff"
        ))
    };
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for slot in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
        *slot = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    if parts.next().is_some() {
        return Err(bad());
    }
    Ok(mac)
}

/// The name of the interface with this hardware address.
fn by_mac(mac: &str) -> Result<String> {
    let wanted = parse_mac(mac)?;
    for entry in std::fs::read_dir("/sys/class/net")
        .context(|| "list network interfaces".to_owned())?
        .flatten()
    {
        let there = std::fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if parse_mac(there.trim()).is_ok_and(|m| m == wanted) {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Err(Error::NotFound(format!(
        "no network interface in the guest has the address {mac}; is the device attached?"
    )))
}

/// What is there already is as wanted.
fn or_exists(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Sets up the network as the host says.
pub fn configure(
    interfaces: &[Interface],
    routes: &[Route],
    neighbours: &[Neighbour],
) -> Result<()> {
    if interfaces.is_empty() && routes.is_empty() && neighbours.is_empty() {
        return Ok(());
    }
    let netlink = Netlink::open().context(|| "open rtnetlink".to_owned())?;
    for interface in interfaces {
        configure_interface(&netlink, interface)?;
    }
    for route in routes {
        add_route(&netlink, route)?;
    }
    for neighbour in neighbours {
        add_neighbour(&netlink, neighbour)?;
    }
    Ok(())
}

fn configure_interface(netlink: &Netlink, interface: &Interface) -> Result<()> {
    let found = match (interface.device_mac.as_str(), interface.mac.as_str()) {
        ("", "") => interface.name.clone(),
        ("", mac) => by_mac(mac)?,
        (present, _) => by_mac(present)?,
    };
    let index = index_of(&found)?;
    let what = |step: &str| format!("network interface {found}: {step}");
    if !interface.name.is_empty() && interface.name != found {
        if interface.name.len() >= libc::IFNAMSIZ || interface.name.contains('/') {
            return Err(Error::Invalid(format!(
                "{:?} is no name for a network interface",
                interface.name
            )));
        }
        let mut name = interface.name.clone().into_bytes();
        name.push(0);
        // Only an interface that is down can be renamed.
        set_link(netlink, index, false, &[(libc::IFLA_IFNAME, &name)])
            .context(|| what("rename"))?;
    }
    if !interface.device_mac.is_empty() && interface.device_mac != interface.mac {
        let mac = parse_mac(&interface.mac)?;
        set_link(netlink, index, false, &[(libc::IFLA_ADDRESS, &mac)])
            .context(|| what("set the hardware address"))?;
    }
    if interface.mtu > 0 {
        let mtu = interface.mtu.to_ne_bytes();
        set_link(netlink, index, false, &[(libc::IFLA_MTU, &mtu)])
            .context(|| what("set the MTU"))?;
    }
    set_link(netlink, index, true, &[]).context(|| what("bring up"))?;
    for text in &interface.addresses {
        let (address, prefix) = parse_network(text)?;
        // The peer would have to answer before the address is usable: no need on our links.
        let flags = if address.is_ipv6() {
            u8::try_from(libc::IFA_F_NODAD).unwrap_or(0)
        } else {
            0
        };
        let mut body = vec![family(address), prefix, flags, libc::RT_SCOPE_UNIVERSE];
        body.extend_from_slice(&index.to_ne_bytes());
        let mut message = Message::new(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body);
        message.attribute(libc::IFA_LOCAL, &octets(address));
        message.attribute(libc::IFA_ADDRESS, &octets(address));
        if let IpAddr::V4(v4) = address
            && prefix < 31
        {
            let broadcast = u32::from(v4) | (u32::MAX.checked_shr(prefix.into()).unwrap_or(0));
            message.attribute(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
        }
        or_exists(netlink.request(message)).context(|| what(&format!("add address {text}")))?;
    }
    Ok(())
}

fn add_route(netlink: &Netlink, route: &Route) -> Result<()> {
    let gateway = match route.gateway.as_str() {
        "" => None,
        text => Some(parse_address(text)?),
    };
    let destination = match route.destination.as_str() {
        "" | "default" => None,
        text => Some(parse_network(text)?),
    };
    let family = family(
        destination
            .map(|(a, _)| a)
            .or(gateway)
            .unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)),
    );
    let scope = match (route.scope, gateway) {
        (0, None) => libc::RT_SCOPE_LINK,
        (n, _) => {
            u8::try_from(n).map_err(|_| Error::Invalid(format!("route scope {n} is over 255")))?
        }
    };
    let body = [
        family,
        destination.map_or(0, |(_, prefix)| prefix),
        0, // source prefix
        0, // TOS
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        scope,
        libc::RTN_UNICAST,
        0,
        0,
        0,
        0, // flags
    ];
    let mut message = Message::new(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body);
    if let Some((address, _)) = destination {
        message.attribute(libc::RTA_DST, &octets(address));
    }
    if let Some(gateway) = gateway {
        message.attribute(libc::RTA_GATEWAY, &octets(gateway));
    }
    if !route.interface.is_empty() {
        message.attribute(libc::RTA_OIF, &index_of(&route.interface)?.to_ne_bytes());
    }
    if !route.source.is_empty() {
        message.attribute(libc::RTA_PREFSRC, &octets(parse_address(&route.source)?));
    }
    if route.metric > 0 {
        message.attribute(libc::RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    or_exists(netlink.request(message)).context(|| {
        format!(
            "add route {:?} via {:?} on {:?}",
            route.destination, route.gateway, route.interface
        )
    })
}

fn add_neighbour(netlink: &Netlink, neighbour: &Neighbour) -> Result<()> {
    const NUD_PERMANENT: u16 = 0x80;

    let address = parse_address(&neighbour.address)?;
    let mut body = vec![family(address), 0, 0, 0];
    body.extend_from_slice(&index_of(&neighbour.interface)?.to_ne_bytes());
    body.extend_from_slice(&NUD_PERMANENT.to_ne_bytes());
    body.extend_from_slice(&[0, 0]);
    let mut message = Message::new(libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &body);
    message.attribute(libc::NDA_DST, &octets(address));
    message.attribute(libc::NDA_LLADDR, &parse_mac(&neighbour.mac)?);
    or_exists(netlink.request(message)).context(|| format!("add neighbour {}", neighbour.address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed() {
        assert_eq!(
            parse_network("10.1.2.3/24").unwrap(),
            ("10.1.2.3".parse().unwrap(), 24)
        );
        assert_eq!(parse_network("fd00::1").unwrap().1, 128);
        for bad in ["", "10.0.0.1/33", "fd00::/129", "x/8", "10.0.0.1/", "1/2/3"] {
            assert!(parse_network(bad).is_err(), "{bad}");
        }
        assert_eq!(
            parse_mac("02:00:00:00:00:fF").unwrap(),
            [2, 0, 0, 0, 0, 255]
        );
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "0:0:0:0:0:0",
            "zz:00:00:00:00:00",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn messages_are_laid_out_as_netlink_wants() {
        let mut message = Message::new(16, 0, &[1, 2, 3, 4]);
        message.attribute(3, b"lo\0");
        let bytes = message.finish();
        assert_eq!(bytes.len(), 16 + 4 + 8);
        assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().unwrap()), 28);
        assert_eq!(u16::from_ne_bytes(bytes[20..22].try_into().unwrap()), 7);
        assert_eq!(bytes[27], 0);
    }
}
