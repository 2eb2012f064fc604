//! Datagrams to and from others. All sockets of one port share a socket of smoltcp: what arrives
//! there is given to who is meant at once.

use alloc::vec;
use core::net::{IpAddr, SocketAddr};

use appkernel_core::errno::Errno;
use appkernel_core::packet::Ends;
use appkernel_hal::clock;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::udp;
use smoltcp::wire::{IpAddress, IpEndpoint};

use super::super::outer;
use super::{STACK, Stack, go};

/// Of each direction.
const BUFFER: usize = 16 << 10;
/// Of a port.
pub const BYTES: usize = 2 * BUFFER;
/// Longest datagram that is sent: what smoltcp takes apart is not longer.
const LONGEST: usize = 8192 - 64;
const PACKETS: usize = 32;
const MAX_PORTS: usize = 512;
/// Datagrams that wait so long for their neighbour to answer are lost.
const PATIENCE_NS: u64 = 3_000_000_000;

/// A port in use.
pub struct Port {
    number: u16,
    handle: SocketHandle,
    users: usize,
    /// Since when something waits to be sent.
    waits: Option<u64>,
}

impl Stack {
    fn udp(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Gives arrived datagrams to their sockets; whether there were any.
    pub(super) fn receive_udp(&mut self) -> bool {
        let mut any = false;
        for port in &self.ports {
            let socket = self.sockets.get_mut::<udp::Socket<'_>>(port.handle);
            while let Ok((bytes, meta)) = socket.recv() {
                let Some(to) = meta.local_address else {
                    continue;
                };
                let from = SocketAddr::new(meta.endpoint.addr.into(), meta.endpoint.port);
                let to = SocketAddr::new(to.into(), port.number);
                outer::deliver(from, to, bytes);
                any = true;
            }
        }
        any
    }

    /// Drops what nobody takes, and ports that nobody uses any more.
    pub(super) fn look_at_ports(&mut self) {
        let now = clock::monotonic_ns();
        let sockets = &mut self.sockets;
        self.ports.retain_mut(|port| {
            let socket = sockets.get_mut::<udp::Socket<'_>>(port.handle);
            if socket.send_queue() == 0 {
                port.waits = None;
                if port.users == 0 {
                    sockets.remove(port.handle);
                    return false;
                }
            } else if now >= port.waits.get_or_insert(now).saturating_add(PATIENCE_NS) {
                socket.close();
                let _ = socket.bind(port.number);
                port.waits = None;
            }
            true
        });
    }

    pub(super) fn ports_deadline(&self) -> Option<u64> {
        let waits = self.ports.iter().filter_map(|p| p.waits);
        waits.map(|at| at.saturating_add(PATIENCE_NS)).min()
    }
}

/// Somebody does not take a datagram of ours; whether a program is to know.
pub fn refused(ends: &Ends) -> bool {
    outer::refused(ends.from, ends.to)
}

/// Takes a port into use, once more.
///
/// # Errors
/// `ENOBUFS`: too many ports or too little memory. `ENETUNREACH`: there is no network.
pub fn open(number: u16) -> Result<(), Errno> {
    let mut stack = STACK.lock();
    let stack = stack.as_mut().ok_or(Errno::ENETUNREACH)?;
    if let Some(port) = stack.ports.iter_mut().find(|p| p.number == number) {
        port.users += 1;
        return Ok(());
    }
    if stack.ports.len() >= MAX_PORTS || !stack.has_room_for(BYTES) {
        return Err(Errno::ENOBUFS);
    }
    let buffer =
        || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; PACKETS], vec![0; BUFFER]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(number).map_err(|_| Errno::EADDRNOTAVAIL)?;
    let handle = stack.sockets.add(socket);
    stack.ports.push(Port {
        number,
        handle,
        users: 1,
        waits: None,
    });
    Ok(())
}

/// One user of the port less.
pub fn close(number: u16) {
    let mut stack = STACK.lock();
    let Some(stack) = stack.as_mut() else { return };
    let Some(at) = stack.ports.iter().position(|p| p.number == number) else {
        return;
    };
    let Some(port) = stack.ports.get_mut(at) else {
        return;
    };
    port.users = port.users.saturating_sub(1);
    let handle = port.handle;
    // What was sent goes first.
    if port.users == 0 && stack.udp(handle).send_queue() == 0 {
        stack.ports.swap_remove(at);
        stack.sockets.remove(handle);
    }
}

/// Sends a datagram. What there is no room for is lost.
///
/// # Errors
/// `EMSGSIZE`: it is too long.
pub fn send(number: u16, from: IpAddr, to: SocketAddr, bytes: &[u8]) -> Result<(), Errno> {
    const HEADERS_V6: usize = 48;
    if bytes.len() > LONGEST {
        return Err(Errno::EMSGSIZE);
    }
    {
        let mut stack = STACK.lock();
        let stack = stack.as_mut().ok_or(Errno::ENETUNREACH)?;
        // Of IPv6, packets are not taken apart.
        if to.is_ipv6() && bytes.len() + HEADERS_V6 > stack.device.mtu {
            return Err(Errno::EMSGSIZE);
        }
        let port = stack.ports.iter().find(|p| p.number == number);
        let handle = port.map(|p| p.handle).ok_or(Errno::EADDRNOTAVAIL)?;
        let mut meta = udp::UdpMetadata::from(IpEndpoint::new(IpAddress::from(to.ip()), to.port()));
        meta.local_address = Some(IpAddress::from(from));
        match stack.udp(handle).send_slice(bytes, meta) {
            Ok(()) | Err(udp::SendError::BufferFull) => {}
            Err(_) => return Err(Errno::EADDRNOTAVAIL),
        }
    }
    go();
    Ok(())
}
