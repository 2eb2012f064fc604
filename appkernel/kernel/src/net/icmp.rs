//! Sockets for ICMP: `ping`'s (icmp(7)), which everybody may have, as Kubernetes' default for
//! `net.ipv4.ping_group_range` has it; and raw ones (raw(7)) of no other protocol.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::net::{IpAddr, SocketAddr};

use appkernel_core::errno::Errno;
use appkernel_core::icmp::{self, Packet};
use appkernel_hal::sync::Mutex;

use super::{Address, Icmp, Socket, stack, with};
use crate::task;

/// Sockets at one time: each packet is looked at for each of them.
const MAX_SOCKETS: usize = 256;

static SOCKETS: Mutex<Vec<Weak<Socket>>> = Mutex::new(Vec::new());

/// It gets what comes from now on.
///
/// # Errors
/// `ENOBUFS`: too many.
pub fn register(socket: &Arc<Socket>) -> Result<(), Errno> {
    let mut sockets = SOCKETS.lock();
    sockets.retain(|s| s.strong_count() > 0);
    if sockets.len() >= MAX_SOCKETS {
        return Err(Errno::ENOBUFS);
    }
    sockets.push(Arc::downgrade(socket));
    drop(sockets);
    // Without a network there is the loopback.
    let _ = stack::open_icmp();
    Ok(())
}

/// Gives a packet to all sockets that it is for; whether there were any.
pub fn received(packet: &Packet<'_>) -> bool {
    let all: Vec<_> = SOCKETS.lock().iter().filter_map(Weak::upgrade).collect();
    let taken = all.iter().filter(|socket| socket.take_icmp(packet)).count();
    taken > 0
}

impl Socket {
    fn take_icmp(&self, packet: &Packet<'_>) -> bool {
        let v6 = packet.from.is_ipv6();
        let (local, remote) = self.addresses();
        let bound = local.ip().filter(|_| !local.is_any());
        if self.is_v6() != v6
            || bound.is_some_and(|ip| ip != packet.to)
            || remote.is_some_and(|r| r.ip() != Some(packet.from))
        {
            return false;
        }
        let Some(kind) = packet.kind() else {
            return false;
        };
        let bytes = match self.icmp {
            Some(Icmp::Ping) => {
                let ours = kind == icmp::echo(v6).1
                    && icmp::ident(packet.message) == local.port()
                    && local != Address::None;
                if !ours {
                    return false;
                }
                packet.message
            }
            Some(Icmp::Raw) => {
                let (level, name) = with::ICMP_FILTER;
                let filter = self.option(level, name).unwrap_or(0);
                if !v6 && kind < 32 && filter >> kind & 1 != 0 {
                    return false;
                }
                if v6 { packet.message } else { packet.whole }
            }
            None => return false,
        };
        let from = self.address(SocketAddr::new(packet.from, 0));
        self.put_datagram(from, bytes, packet.hops);
        true
    }

    /// Hops and class of traffic, as the program wants them.
    fn ip_options(&self) -> (u8, u8) {
        let (hops, class) = match self.is_v6() {
            true => (with::V6_HOPS, with::V6_CLASS),
            false => (with::TTL, with::TOS),
        };
        let byte = |(level, name)| self.option(level, name).and_then(|v| u8::try_from(v).ok());
        (
            byte(hops).filter(|hops| *hops > 0).unwrap_or(64),
            byte(class).unwrap_or(0),
        )
    }

    /// Sends a message.
    pub(super) fn send_icmp(
        &self,
        icmp: Icmp,
        bytes: &[u8],
        to: Option<Address>,
    ) -> Result<usize, Errno> {
        let v6 = self.is_v6();
        let to = to.or_else(|| self.addresses().1);
        let to = to.ok_or(Errno::EDESTADDRREQ)?;
        let mut ip = to.ip().ok_or(Errno::EINVAL)?;
        if ip.is_ipv6() != v6 {
            return Err(Errno::EINVAL);
        }
        if ip.is_unspecified() {
            ip = match ip {
                IpAddr::V4(_) => core::net::Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => core::net::Ipv6Addr::LOCALHOST.into(),
            };
        }
        let mut message = bytes.to_vec();
        if icmp == Icmp::Ping {
            let (request, _) = icmp::echo(v6);
            if bytes.len() < icmp::HEADER
                || bytes.first() != Some(&request)
                || bytes.get(1) != Some(&0)
            {
                return Err(Errno::EINVAL);
            }
            self.name_itself()?;
            let ident = self.addresses().0.port().unwrap_or(0);
            if let Some(field) = message.get_mut(4..6) {
                field.copy_from_slice(&ident.to_be_bytes());
            }
        }
        let here = to.is_own();
        let own = if here {
            let local = self.addresses().0;
            local.ip().filter(|_| !local.is_any()).unwrap_or(ip)
        } else {
            self.end_towards(SocketAddr::new(ip, 0))?.ip()
        };
        // A raw socket's message of IPv4 is sent as it is.
        if v6 || icmp == Icmp::Ping {
            icmp::seal(&mut message, own, ip);
        }
        let options = self.ip_options();
        let packet = icmp::packet(own, ip, options, &message).ok_or(Errno::EMSGSIZE)?;
        if !here {
            stack::send_icmp(v6, &packet)?;
        } else if let Some(packet) = Packet::parse(&packet) {
            received(&packet);
            if let Some(answer) = packet.answer()
                && let Some(answer) = Packet::parse(&answer)
            {
                received(&answer);
            }
            task::wake(task::FILES);
        }
        Ok(bytes.len())
    }
}
