//! Addresses of sockets, as programs write them.

use alloc::vec::Vec;

use appkernel_core::errno::Errno;

use super::family;

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
}

const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

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
            _ => Err(Errno::EAFNOSUPPORT),
        }
    }

    /// As a `sockaddr` of a family.
    pub fn encode(&self, of: u16) -> Vec<u8> {
        let mut bytes = of.to_le_bytes().to_vec();
        match self {
            Self::None if of == family::UNIX => {}
            Self::None => bytes.resize(if of == family::INET { 16 } else { 28 }, 0),
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

    /// The loopback, no port.
    pub fn loopback(of: u16) -> Self {
        let mut six = [0; 16];
        six[15] = 1;
        Self::Inet {
            ip: if of == family::INET {
                mapped([127, 0, 0, 1])
            } else {
                six
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

    fn is_four(ip: &[u8; 16]) -> bool {
        ip.starts_with(&MAPPED)
    }

    fn is_any(ip: &[u8; 16]) -> bool {
        *ip == [0; 16] || *ip == mapped([0; 4])
    }

    /// Whether it is this machine's.
    pub fn is_own(&self) -> bool {
        let Self::Inet { ip, .. } = self else {
            return true;
        };
        Self::is_any(ip) || Self::is_four(ip) && ip[12] == 127 || *ip == Self::one()
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
        if Self::is_any(ip) {
            // The general address of IPv6 takes IPv4 too.
            return *v6 || Self::is_four(wanted) || Self::is_any(wanted);
        }
        ip == wanted || Self::is_any(wanted) && Self::is_four(ip) == Self::is_four(wanted)
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
        let same_version = Self::is_four(ip) == Self::is_four(theirs);
        port == their_port
            && (ip == theirs || same_version && (Self::is_any(ip) || Self::is_any(theirs)))
    }

    /// The own address of a connection that was asked for by this one.
    pub fn as_local(&self, listener: &Self) -> Self {
        match (self, listener) {
            (Self::Inet { ip, port, v6 }, _) if Self::is_any(ip) => Self::Inet {
                ip: if Self::is_four(ip) {
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
