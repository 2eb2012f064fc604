//! Options of sockets.

use alloc::vec;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;

use super::sockets::{SOL_SOCKET, socket, with};
use super::{Call, Result, get, get_u64, put};
use crate::container::visible;
use crate::net::{Icmp, Kind, Socket, Waits, family};

/// Names at the level of sockets.
mod name {
    pub const TYPE: u32 = 3;
    pub const ERROR: u32 = 4;
    pub const SEND_BUFFER: u32 = 7;
    pub const RECEIVE_BUFFER: u32 = 8;
    pub const LINGER: u32 = 13;
    pub const PEER_CREDENTIALS: u32 = 17;
    pub const RECEIVE_LOW: u32 = 18;
    pub const SEND_LOW: u32 = 19;
    pub const RECEIVE_TIME: u32 = 20;
    pub const SEND_TIME: u32 = 21;
    /// A name, of any length.
    pub const DEVICE: u32 = 25;
    pub const ACCEPTS: u32 = 30;
    pub const SEND_BUFFER_FORCE: u32 = 32;
    pub const RECEIVE_BUFFER_FORCE: u32 = 33;
    pub const PROTOCOL: u32 = 38;
    pub const DOMAIN: u32 = 39;
    pub const RECEIVE_TIME_64: u32 = 66;
    pub const SEND_TIME_64: u32 = 67;
}
/// From here on Linux knows none.
const LAST_NAME: u32 = 84;
const IPPROTO_TCP: u32 = 6;
const TCP_MAXSEG: u32 = 2;
const TCP_INFO: u32 = 11;
const IPPROTO_IP: u32 = 0;
const IPPROTO_IPV6: u32 = 41;
const IP_TTL: u32 = 2;
const IP_OPTIONS: u32 = 4;
const IP_MTU: u32 = 14;
/// What a socket's buffers are said to hold, and at most.
const BUFFER: u32 = 212_992;

/// setsockopt.
pub fn set(c: &Call<'_>) -> Result {
    let file = socket(c, 0)?;
    let socket = with(&file)?;
    let (level, option, at, len) = (c.uint(1), c.uint(2), c.arg(3), c.arg(4) & 0xffff_ffff);
    if !has_level(socket, level) {
        return Err(match socket.family {
            family::UNIX => Errno::EOPNOTSUPP,
            _ => Errno::ENOPROTOOPT,
        });
    }
    match (level, option) {
        // What the length and the value are does not matter then.
        (_, option) if option > i32::MAX as u32 => return Err(Errno::ENOPROTOOPT),
        (
            SOL_SOCKET,
            name::RECEIVE_TIME | name::SEND_TIME | name::RECEIVE_TIME_64 | name::SEND_TIME_64,
        ) => {
            if len < 16 {
                return Err(Errno::EINVAL);
            }
            let (seconds, us) = (get_u64(at)?.cast_signed(), get_u64(at.wrapping_add(8))?);
            if us >= 1_000_000 {
                return Err(Errno::EDOM);
            }
            // A time before now is none at all.
            let ns = u64::try_from(seconds).map_or(1, |s| {
                s.saturating_mul(1_000_000_000).saturating_add(us * 1000)
            });
            socket.set_limit(direction(option), ns);
            return Ok(0);
        }
        (SOL_SOCKET, name::LINGER) if len >= 8 => {
            let on = u32::from_le_bytes(get(at)?) != 0;
            let seconds = u32::from_le_bytes(get(at.wrapping_add(4))?);
            // On in the lowest bit, the seconds above it.
            let value = if on {
                seconds.min(u32::MAX >> 1) << 1 | 1
            } else {
                0
            };
            socket.set_option(level, option, value);
            return Ok(0);
        }
        (SOL_SOCKET, name::TYPE | name::ERROR | name::ACCEPTS | name::PROTOCOL | name::DOMAIN) => {
            return Err(Errno::ENOPROTOOPT);
        }
        // Linux looks at the length before it looks which option it is.
        (SOL_SOCKET, option) if len < 4 && option != name::DEVICE => {
            return Err(Errno::EINVAL);
        }
        (SOL_SOCKET, LAST_NAME..) => return Err(Errno::ENOPROTOOPT),
        _ => {}
    }
    let value = match len {
        4..=1024 => u32::from_le_bytes(get(at)?),
        1..4 => get::<1>(at)?[0].into(),
        _ => return Err(Errno::EINVAL),
    };
    let (option, value) = match (level, option) {
        (SOL_SOCKET, name::SEND_BUFFER | name::SEND_BUFFER_FORCE) => {
            (name::SEND_BUFFER, value.clamp(2304, BUFFER) * 2)
        }
        (SOL_SOCKET, name::RECEIVE_BUFFER | name::RECEIVE_BUFFER_FORCE) => {
            (name::RECEIVE_BUFFER, value.clamp(1152, BUFFER) * 2)
        }
        _ => (option, value),
    };
    socket.set_option(level, option, value);
    Ok(0)
}

fn direction(option: u32) -> Waits {
    match option {
        name::RECEIVE_TIME | name::RECEIVE_TIME_64 => Waits::Receive,
        _ => Waits::Send,
    }
}

fn tcp_info(socket: &Socket) -> Vec<u8> {
    let mut info = vec![0; 104];
    info[0] = match (socket.listens(), socket.addresses().1.is_some()) {
        (true, _) => 10,
        (_, true) => 1,
        _ => 7,
    };
    info
}

/// Whether a socket has options of a level at all.
fn has_level(socket: &Socket, level: u32) -> bool {
    const UDP: u32 = 17;
    const ICMP_V6: u32 = 58;
    const RAW: u32 = 255;
    const NETLINK: u32 = 270;
    match (socket.family, level) {
        (_, SOL_SOCKET) => true,
        (family::NETLINK, level) => level == NETLINK,
        (family::INET6, IPPROTO_IPV6) | (family::INET | family::INET6, IPPROTO_IP) => true,
        (family::INET | family::INET6, IPPROTO_TCP) => socket.kind == Kind::Stream,
        (family::INET | family::INET6, UDP) => {
            socket.kind == Kind::Datagram && socket.icmp.is_none()
        }
        (family::INET, RAW) | (family::INET6, ICMP_V6) => socket.icmp == Some(Icmp::Raw),
        _ => false,
    }
}

/// getsockopt.
pub fn get_option(c: &Call<'_>) -> Result {
    let file = socket(c, 0)?;
    let socket = with(&file)?;
    let room = i32::from_le_bytes(get(c.arg(4))?);
    let room = usize::try_from(room).map_err(|_| Errno::EINVAL)?;
    let word = |value: u32| value.to_le_bytes().to_vec();
    let (level, option) = (c.uint(1), c.uint(2));
    if !has_level(socket, level) {
        return Err(Errno::EOPNOTSUPP);
    }
    let bytes = match (level, option) {
        _ if option > i32::MAX as u32 => return Err(Errno::ENOPROTOOPT),
        (SOL_SOCKET, name::TYPE) => word(match socket.kind {
            Kind::Stream => 1,
            Kind::Datagram if socket.family == family::NETLINK => 3,
            Kind::Datagram if socket.icmp == Some(Icmp::Raw) => 3,
            Kind::Datagram => 2,
            Kind::Packets => 5,
        }),
        (SOL_SOCKET, name::ERROR) => word(socket.take_error().map_or(0, |e| e.0.cast_unsigned())),
        (SOL_SOCKET, name::PROTOCOL) => word(match (socket.family, socket.kind) {
            (family::UNIX | family::NETLINK, _) => 0,
            (family::INET, _) if socket.icmp.is_some() => 1,
            _ if socket.icmp.is_some() => 58,
            (_, Kind::Stream) => 6,
            _ => 17,
        }),
        (SOL_SOCKET, name::DOMAIN) => word(socket.family.into()),
        (SOL_SOCKET, name::ACCEPTS) => word(socket.listens().into()),
        (SOL_SOCKET, name::PEER_CREDENTIALS) => {
            let (process, uid, gid) = socket.peer_credentials();
            let fields = [visible(process), uid, gid];
            fields.iter().flat_map(|f| f.to_le_bytes()).collect()
        }
        (SOL_SOCKET, name::SEND_BUFFER | name::RECEIVE_BUFFER) => {
            word(socket.option(level, option).unwrap_or(BUFFER))
        }
        (SOL_SOCKET, name::RECEIVE_LOW | name::SEND_LOW) => {
            word(socket.option(level, option).unwrap_or(1))
        }
        (SOL_SOCKET, name::LINGER) => {
            let value = socket.option(level, option).unwrap_or(0);
            [value & 1, value >> 1]
                .iter()
                .flat_map(|f| f.to_le_bytes())
                .collect()
        }
        (
            SOL_SOCKET,
            name::RECEIVE_TIME | name::SEND_TIME | name::RECEIVE_TIME_64 | name::SEND_TIME_64,
        ) => {
            let ns = socket.limit(direction(option));
            let fields = [ns / 1_000_000_000, ns % 1_000_000_000 / 1000];
            fields.iter().flat_map(|f| f.to_le_bytes()).collect()
        }
        (IPPROTO_TCP, TCP_INFO) => tcp_info(socket),
        (IPPROTO_TCP, TCP_MAXSEG) => word(socket.option(level, option).unwrap_or(1448)),
        (IPPROTO_IP, IP_TTL) => word(socket.option(level, option).unwrap_or(64)),
        (IPPROTO_IP, IP_MTU) => word(match crate::net::interface::mtu() {
            0 => 65536,
            mtu => mtu as u32,
        }),
        // No options in packets.
        (IPPROTO_IP, IP_OPTIONS) => Vec::new(),
        _ => word(socket.option(level, option).unwrap_or(0)),
    };
    let count = bytes.len().min(room);
    put(c.arg(3), bytes.get(..count).unwrap_or_default())?;
    put(c.arg(4), &(count as u32).to_le_bytes())?;
    Ok(0)
}
