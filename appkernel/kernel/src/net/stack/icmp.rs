//! Messages of ICMP to and from others, for the sockets of programs. All share one socket of smoltcp for
//! each version of IP; it is there from the first of them on.

use alloc::vec;

use appkernel_core::errno::Errno;
use appkernel_core::icmp::Packet;
use appkernel_hal::clock;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::raw;
use smoltcp::wire::{IpProtocol, IpVersion};

use super::super::icmp::received;
use super::{STACK, Stack, go};

/// Of each direction and version.
const BUFFER: usize = 16 << 10;
const PACKETS: usize = 32;
const BYTES: usize = 4 * BUFFER;
/// Longest packet that is sent: what smoltcp takes apart is not longer.
const LONGEST: usize = 8192 - 64;
/// Messages that wait so long for their neighbour to answer are lost.
const PATIENCE_NS: u64 = 3_000_000_000;

/// The sockets of smoltcp, and since when something waits to be sent.
pub struct Icmp([(SocketHandle, Option<u64>); 2]);

fn add(sockets: &mut SocketSet<'static>, v6: bool) -> SocketHandle {
    let (version, protocol) = match v6 {
        false => (IpVersion::Ipv4, IpProtocol::Icmp),
        true => (IpVersion::Ipv6, IpProtocol::Icmpv6),
    };
    let buffer =
        || raw::PacketBuffer::new(vec![raw::PacketMetadata::EMPTY; PACKETS], vec![0; BUFFER]);
    let socket = raw::Socket::new(Some(version), Some(protocol), buffer(), buffer());
    sockets.add(socket)
}

impl Stack {
    /// Gives what came to the sockets of programs; whether there was any.
    pub(super) fn receive_icmp(&mut self) -> bool {
        let Some(Icmp(both)) = &self.icmp else {
            return false;
        };
        let mut any = false;
        for (handle, _) in both {
            let socket = self.sockets.get_mut::<raw::Socket<'_>>(*handle);
            while let Ok(bytes) = socket.recv() {
                any |= Packet::parse(bytes).is_some_and(|packet| received(&packet));
            }
        }
        any
    }

    /// Drops what nobody takes.
    pub(super) fn look_at_icmp(&mut self) {
        let Some(Icmp(both)) = &mut self.icmp else {
            return;
        };
        let now = clock::monotonic_ns();
        for (i, (handle, waits)) in both.iter_mut().enumerate() {
            let socket = self.sockets.get_mut::<raw::Socket<'_>>(*handle);
            if socket.send_queue() == 0 {
                *waits = None;
            } else if now >= waits.get_or_insert(now).saturating_add(PATIENCE_NS) {
                self.sockets.remove(*handle);
                (*handle, *waits) = (add(&mut self.sockets, i == 1), None);
            }
        }
    }

    pub(super) fn icmp_deadline(&self) -> Option<u64> {
        let Icmp(both) = self.icmp.as_ref()?;
        let waits = both.iter().filter_map(|(_, waits)| *waits);
        waits.map(|at| at.saturating_add(PATIENCE_NS)).min()
    }
}

/// What comes is looked at from now on.
///
/// # Errors
/// `ENETUNREACH`: there is no network. `ENOBUFS`: too little memory.
pub fn open() -> Result<(), Errno> {
    let mut stack = STACK.lock();
    let stack = stack.as_mut().ok_or(Errno::ENETUNREACH)?;
    if stack.icmp.is_none() {
        if !stack.has_room_for(BYTES) {
            return Err(Errno::ENOBUFS);
        }
        let sockets = &mut stack.sockets;
        stack.icmp = Some(Icmp([false, true].map(|v6| (add(sockets, v6), None))));
    }
    Ok(())
}

/// Sends a packet, with the header of IP. What there is no room for is lost.
///
/// # Errors
/// `EMSGSIZE`: it is too long. `ENETUNREACH`, `ENOBUFS` as [`open`].
pub fn send(v6: bool, packet: &[u8]) -> Result<(), Errno> {
    open()?;
    {
        let mut stack = STACK.lock();
        let stack = stack.as_mut().ok_or(Errno::ENETUNREACH)?;
        // Of IPv6, packets are not taken apart.
        if packet.len() > LONGEST || v6 && packet.len() > stack.device.mtu {
            return Err(Errno::EMSGSIZE);
        }
        let Some(Icmp(both)) = &stack.icmp else {
            return Err(Errno::ENETUNREACH);
        };
        let handle = both[usize::from(v6)].0;
        let socket = stack.sockets.get_mut::<raw::Socket<'_>>(handle);
        match socket.send_slice(packet) {
            Ok(()) | Err(raw::SendError::BufferFull) => {}
        }
    }
    go();
    Ok(())
}
