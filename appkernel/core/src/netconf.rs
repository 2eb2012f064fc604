//! Addresses and routes of a network interface, as the host names them.

use alloc::string::String;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The address.
    pub ip: IpAddr,
    /// Bits of it that name the network.
    pub prefix: u8,
}

fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()) << 96,
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

fn mask(prefix: u8) -> u128 {
    u128::MAX
        .checked_shl(128 - u32::from(prefix.min(128)))
        .unwrap_or(0)
}

impl Network {
    /// Everything, of one family.
    pub fn all(v6: bool) -> Self {
        Self {
            ip: if v6 {
                IpAddr::V6(Ipv6Addr::UNSPECIFIED)
            } else {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED)
            },
            prefix: 0,
        }
    }

    /// Reads `address/prefix`; without a prefix, the address alone.
    pub fn parse(text: &str) -> Option<Self> {
        let (ip, prefix) = text.split_once('/').unwrap_or((text, ""));
        let ip: IpAddr = ip.parse().ok()?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        let prefix = match text.contains('/') {
            true => prefix.parse().ok()?,
            false => most,
        };
        (prefix <= most).then_some(Self { ip, prefix })
    }

    /// Whether an address is of this network.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.ip.is_ipv4() == ip.is_ipv4() && (bits(self.ip) ^ bits(ip)) & mask(self.prefix) == 0
    }

    /// The same with the bits behind the prefix cleared.
    pub fn base(&self) -> Self {
        let bits = bits(self.ip) & mask(self.prefix);
        Self {
            ip: match self.ip {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits((bits >> 96) as u32)),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(bits)),
            },
            prefix: self.prefix,
        }
    }

    /// The network's mask, of IPv4.
    pub fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits((mask(self.prefix) >> 96) as u32)
    }

    /// The network's broadcast address, if it can have one.
    pub fn broadcast(&self) -> Option<Ipv4Addr> {
        match self.ip {
            IpAddr::V4(ip) if self.prefix < 31 => {
                Some(Ipv4Addr::from_bits(ip.to_bits() | !self.mask().to_bits()))
            }
            _ => None,
        }
    }
}

/// Reads `aa:bb:cc:dd:ee:ff`.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for slot in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2)?;
        *slot = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// A route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub to: Network,
    /// By whom; nobody: on the link.
    pub gateway: Option<IpAddr>,
    /// Address that packets come from.
    pub source: Option<IpAddr>,
    /// Lower ones win.
    pub metric: u32,
}

/// What an interface has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes and packets that came, and that went.
    pub received: (u64, u64),
    /// As above.
    pub sent: (u64, u64),
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Number.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Largest packet.
    pub mtu: u32,
    /// It is the machine's own.
    pub loopback: bool,
    /// Own addresses.
    pub addresses: Vec<Network>,
    /// Routes besides those that come with the addresses.
    pub routes: Vec<Route>,
    /// What it has done.
    pub counters: Counters,
}

/// Names of interfaces are shorter.
pub const NAME_SIZE: usize = 16;

impl Link {
    /// The loopback.
    pub fn loopback() -> Self {
        let local = |ip, prefix| Network { ip, prefix };
        Self {
            index: 1,
            name: String::from("lo"),
            mtu: 65536,
            loopback: true,
            addresses: alloc::vec![
                local(IpAddr::V4(Ipv4Addr::LOCALHOST), 8),
                local(IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
            ],
            ..Self::default()
        }
    }

    /// Flags as ioctl and netlink have them.
    pub fn flags(&self) -> u32 {
        const UP: u32 = 1;
        const BROADCAST: u32 = 2;
        const LOOPBACK: u32 = 8;
        const RUNNING: u32 = 0x40;
        const MULTICAST: u32 = 0x1000;
        const LOWER_UP: u32 = 0x10000;
        UP | RUNNING
            | LOWER_UP
            | if self.loopback {
                LOOPBACK
            } else {
                BROADCAST | MULTICAST
            }
    }

    /// Whether an address is its own.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|a| a.ip == ip)
    }

    /// Routes to connected networks, then the others.
    pub fn all_routes(&self) -> Vec<Route> {
        let connected = self.addresses.iter().map(|a| Route {
            to: a.base(),
            gateway: None,
            source: Some(a.ip),
            metric: 0,
        });
        connected.chain(self.routes.iter().copied()).collect()
    }

    /// The route to an address: the longest prefix, then the lowest metric.
    pub fn route(&self, to: IpAddr) -> Option<Route> {
        let fitting = self.all_routes().into_iter().filter(|r| r.to.contains(to));
        fitting.min_by_key(|r| (u8::MAX - r.to.prefix, r.metric))
    }

    /// The own address for packets to `to`.
    pub fn source(&self, to: IpAddr) -> Option<IpAddr> {
        let route = self.route(to)?;
        if let Some(source) = route.source.filter(|ip| self.has(*ip)) {
            return Some(source);
        }
        let next = route.gateway.unwrap_or(to);
        let same = |a: &&Network| a.ip.is_ipv4() == to.is_ipv4();
        let own = self.addresses.iter().filter(same);
        let near = own
            .clone()
            .find(|a| a.contains(next) && !is_link_local(a.ip));
        near.or_else(|| own.clone().find(|a| !is_link_local(a.ip)))
            .or_else(|| own.clone().next())
            .map(|a| a.ip)
    }

    /// The address of the link itself that is made of the hardware address.
    pub fn link_local(&self) -> Network {
        let m = self.mac.map(u16::from);
        let ip = Ipv6Addr::new(
            0xfe80,
            0,
            0,
            0,
            (m[0] ^ 2) << 8 | m[1],
            m[2] << 8 | 0xff,
            0xfe00 | m[3],
            m[4] << 8 | m[5],
        );
        Network {
            ip: IpAddr::V6(ip),
            prefix: 64,
        }
    }
}

/// Whether an address is good on one link only.
pub fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use std::prelude::v1::*;
    use std::vec;

    use super::*;

    fn net(text: &str) -> Network {
        Network::parse(text).unwrap()
    }

    #[test]
    fn networks_are_parsed_and_bad_ones_refused() {
        assert!(net("10.1.2.3/24").contains("10.1.2.255".parse().unwrap()));
        assert!(!net("10.1.2.3/24").contains("10.1.3.1".parse().unwrap()));
        assert!(!net("0.0.0.0/0").contains("::1".parse().unwrap()));
        assert_eq!(net("fd00::5/64").base(), net("fd00::/64"));
        assert_eq!(net("fd00::1").prefix, 128);
        assert_eq!(
            net("10.1.2.3/30").broadcast().unwrap().to_string(),
            "10.1.2.3"
        );
        assert_eq!(net("10.1.2.3/20").mask().to_string(), "255.255.240.0");
        for bad in ["", "10.0.0.1/33", "fd00::/129", "x/8", "10.0.0.1/", "1/2/3"] {
            assert!(Network::parse(bad).is_none(), "{bad}");
        }
        assert_eq!(parse_mac("02:00:00:00:00:fF"), Some([2, 0, 0, 0, 0, 255]));
        for bad in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "0:0:0:0:0:0"] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_longest_route_wins() {
        let mut link = Link {
            index: 2,
            name: "eth0".into(),
            mac: [2, 0xb7, 1, 2, 3, 4],
            mtu: 1500,
            addresses: vec![net("10.0.0.2/24"), net("fd00::2/64")],
            ..Link::default()
        };
        link.addresses.push(link.link_local());
        let route = |to, gateway: Option<&str>| Route {
            to: net(to),
            gateway: gateway.map(|g| g.parse().unwrap()),
            source: None,
            metric: 0,
        };
        link.routes = vec![
            route("0.0.0.0/0", Some("10.0.0.1")),
            route("10.9.0.0/16", Some("10.0.0.9")),
            route("::/0", Some("fe80::1")),
        ];
        let by = |to: &str| link.route(to.parse().unwrap()).unwrap().gateway;
        assert_eq!(by("10.0.0.7"), None);
        assert_eq!(by("10.9.1.1"), Some("10.0.0.9".parse().unwrap()));
        assert_eq!(by("1.1.1.1"), Some("10.0.0.1".parse().unwrap()));
        let from = |to: &str| link.source(to.parse().unwrap()).unwrap().to_string();
        assert_eq!(from("1.1.1.1"), "10.0.0.2");
        // The gateway is of the link, the packets are not.
        assert_eq!(from("2001:db8::1"), "fd00::2");
        assert_eq!(from("fe80::9"), "fe80::b7:1ff:fe02:304");
        link.routes.clear();
        assert_eq!(link.route("1.1.1.1".parse().unwrap()), None);
    }
}
