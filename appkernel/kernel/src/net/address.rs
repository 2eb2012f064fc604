//! Addresses of sockets, as programs write them.

use alloc::vec::Vec;

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

use appkernel_core::errno::Errno;

use super::{family, interface};

/// An address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Address {
    #[default]
    None,
    /// A unix socket's path.
    Path(Vec<u8>),
    /// A unix socket's name that is no path.
    Abstract(Vec<u8>),
    /// IPv4 is mapped into IPv6; `v6` is how the program wrote it.
    Inet { ip: [u8; 16], port: u16, v6: bool },
    /// A netlink socket's number.
    Netlink(u32),
}

const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

fn four(ip: &[u8; 16]) -> bool {
    ip.starts_with(&MAPPED)
}

fn any(ip: &[u8; 16]) -> bool {
    *ip == [0; 16] || *ip == mapped([0; 4])
}

fn mapped(ip: [u8; 4]) -> [u8; 16] {
    let mut all = [0; 16];
    all[..12].copy_from_slice(&MAPPED);
    all[12..].copy_from_slice(&ip);
    all
}

impl Address {
    /// Reads a `sockaddr`.
    pub fn parse(bytes: &[u8]) -> Result<Self, Errno> {
        let (kind, rest) = bytes.split_at_checked(2).ok_or(Errno::EINVAL)?;
        let take = |at: usize, len: usize| rest.get(at..at + len).ok_or(Errno::EINVAL);
        match u16::from_le_bytes([kind[0], kind[1]]) {
            0 => Ok(Self::None),
            family::UNIX => match rest {
                [] => Ok(Self::None),
                [0, name @ ..] => Ok(Self::Abstract(name.to_vec())),
                path => {
                    let end = path.iter().position(|b| *b == 0).unwrap_or(path.len());
                    Ok(Self::Path(path.get(..end).unwrap_or_default().to_vec()))
                }
            },
            family::INET => {
                let port = take(0, 2)?;
                let ip: [u8; 4] = take(2, 4)?.try_into().map_err(|_| Errno::EINVAL)?;
                Ok(Self::Inet {
                    ip: mapped(ip),
                    port: u16::from_be_bytes([port[0], port[1]]),
                    v6: false,
                })
            }
            family::INET6 => {
                let port = take(0, 2)?;
                let ip: [u8; 16] = take(6, 16)?.try_into().map_err(|_| Errno::EINVAL)?;
                Ok(Self::Inet {
                    ip,
                    port: u16::from_be_bytes([port[0], port[1]]),
                    v6: true,
                })
            }
            family::NETLINK => {
                let port: [u8; 4] = take(2, 4)?.try_into().map_err(|_| Errno::EINVAL)?;
                Ok(Self::Netlink(u32::from_le_bytes(port)))
            }
            _ => Err(Errno::EAFNOSUPPORT),
        }
    }

    /// As a `sockaddr` of a family.
    pub fn encode(&self, of: u16) -> Vec<u8> {
        let mut bytes = of.to_le_bytes().to_vec();
        match self {
            Self::None if of == family::UNIX => {}
            Self::None if of == family::NETLINK => bytes.resize(12, 0),
            Self::None => bytes.resize(if of == family::INET { 16 } else { 28 }, 0),
            Self::Netlink(port) => {
                bytes.extend([0; 2]);
                bytes.extend(port.to_le_bytes());
                bytes.extend([0; 4]);
            }
            Self::Path(path) => {
                bytes.extend(path);
                bytes.push(0);
            }
            Self::Abstract(name) => {
                bytes.push(0);
                bytes.extend(name);
            }
            Self::Inet { ip, port, .. } => {
                bytes.extend(port.to_be_bytes());
                if of == family::INET {
                    bytes.extend(ip.iter().skip(12));
                    bytes.resize(16, 0);
                } else {
                    bytes.extend([0; 4]);
                    bytes.extend(ip);
                    bytes.extend([0; 4]);
                }
            }
        }
        bytes
    }

    /// No particular address, no port.
    pub fn any(of: u16) -> Self {
        Self::Inet {
            ip: if of == family::INET {
                mapped([0; 4])
            } else {
                [0; 16]
            },
            port: 0,
            v6: of == family::INET6,
        }
    }

    /// The port.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Inet { port, .. } => Some(*port),
            _ => None,
        }
    }

    /// An address of IP.
    pub fn from_ip(ip: IpAddr, port: u16, v6: bool) -> Self {
        let ip = match ip {
            IpAddr::V4(ip) => mapped(ip.octets()),
            IpAddr::V6(ip) => ip.octets(),
        };
        Self::Inet { ip, port, v6 }
    }

    /// The address without port.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Inet { ip, .. } => Some(Ipv6Addr::from(*ip).to_canonical()),
            _ => None,
        }
    }

    /// Address and port.
    pub fn socket(&self) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.ip()?, self.port()?))
    }

    /// Whether it was written as one of IPv6.
    pub fn is_v6(&self) -> bool {
        matches!(self, Self::Inet { v6: true, .. })
    }

    /// Whether it is one of IPv4, however it was written.
    pub fn is_four(&self) -> bool {
        matches!(self, Self::Inet { ip, .. } if four(ip))
    }

    /// Whether it means any address.
    pub fn is_any(&self) -> bool {
        matches!(self, Self::Inet { ip, .. } if any(ip))
    }

    /// Whether only this machine can mean it.
    pub fn is_loopback(&self) -> bool {
        self.ip().is_some_and(|ip| ip.is_loopback())
    }

    /// Whether it is this machine's.
    pub fn is_own(&self) -> bool {
        let Some(ip) = self.ip() else {
            return true;
        };
        self.is_any() || ip.is_loopback() || interface::has(ip)
    }

    /// This one as the other end sees it, which is this machine's too.
    pub fn facing(&self, other: &Self) -> Self {
        match (self, other.ip()) {
            (Self::Inet { port, v6, .. }, Some(ip)) if self.is_any() => {
                let ip = match ip {
                    IpAddr::V4(ip) if ip.is_unspecified() => core::net::Ipv4Addr::LOCALHOST.into(),
                    IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
                    ip => ip,
                };
                Self::from_ip(ip, *port, *v6)
            }
            _ => self.clone(),
        }
    }

    fn one() -> [u8; 16] {
        let mut one = [0; 16];
        one[15] = 1;
        one
    }

    /// Whether who is bound to this gets what is for `to`.
    pub fn accepts(&self, to: &Self) -> bool {
        let (
            Self::Inet { ip, port, v6 },
            Self::Inet {
                ip: wanted,
                port: wanted_port,
                ..
            },
        ) = (self, to)
        else {
            return false;
        };
        if port != wanted_port {
            return false;
        }
        if any(ip) {
            // The general address of IPv6 takes IPv4 too.
            return *v6 || four(wanted) || any(wanted);
        }
        ip == wanted || any(wanted) && four(ip) == four(wanted)
    }

    /// Whether two cannot be bound at once.
    pub fn overlaps(&self, other: &Self) -> bool {
        let (
            Self::Inet { ip, port, .. },
            Self::Inet {
                ip: theirs,
                port: their_port,
                ..
            },
        ) = (self, other)
        else {
            return false;
        };
        let same_version = four(ip) == four(theirs);
        port == their_port && (ip == theirs || same_version && (any(ip) || any(theirs)))
    }

    /// The own address of a connection that was asked for by this one.
    pub fn as_local(&self, listener: &Self) -> Self {
        match (self, listener) {
            (Self::Inet { ip, port, v6 }, _) if any(ip) => Self::Inet {
                ip: if four(ip) {
                    mapped([127, 0, 0, 1])
                } else {
                    Self::one()
                },
                port: *port,
                v6: *v6,
            },
            _ => self.clone(),
        }
    }
}
