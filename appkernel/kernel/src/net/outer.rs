//! Sockets whose other end is on another machine.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::net::SocketAddr;

use appkernel_core::errno::Errno;
use smoltcp::iface::SocketHandle;

use super::{
    Address, BUFFER, Kind, MAX_PACKETS, Packet, Phase, Socket, Waits, Wire, family, interface,
    make_for, named, stack, with,
};
use crate::task;

impl Socket {
    pub(super) fn is_v6(&self) -> bool {
        self.family == family::INET6
    }

    pub(super) fn address(&self, of: SocketAddr) -> Address {
        Address::from_ip(of.ip(), of.port(), self.is_v6())
    }

    /// Whether small pieces are to be sent at once.
    pub(super) fn wants_no_delay(&self) -> bool {
        let (level, name) = with::NO_DELAY;
        self.option(level, name).unwrap_or(0) != 0
    }

    /// The own end of what goes to another machine; gives itself a port if it has none.
    pub(super) fn end_towards(&self, to: SocketAddr) -> Result<SocketAddr, Errno> {
        self.name_itself()?;
        let local = self.addresses().0;
        if local.is_loopback() {
            return Err(Errno::EINVAL);
        }
        let port = local.port().unwrap_or(0);
        let ip = match local.ip().filter(|_| !local.is_any()) {
            Some(ip) if ip.is_ipv4() != to.is_ipv4() => return Err(Errno::ENETUNREACH),
            Some(ip) => ip,
            None => interface::source(to.ip())?,
        };
        Ok(SocketAddr::new(ip, port))
    }

    /// Connects to another machine.
    pub(super) fn connect_outside(&self, address: Address, wait: bool) -> Result<(), Errno> {
        if matches!(self.state.lock().phase, Phase::Connecting) {
            return Err(Errno::EALREADY);
        }
        let to = address.socket().ok_or(Errno::EINVAL)?;
        if to.ip().is_multicast() {
            return Err(Errno::ENETUNREACH);
        }
        let own = self.end_towards(to)?;
        let handle = stack::connect(
            Weak::clone(&self.me),
            own,
            to,
            self.wants_no_delay(),
            |handle| {
                let mut state = self.state.lock();
                state.phase = Phase::Connecting;
                state.local = self.address(own);
                state.remote = address;
                state.wire = Some(Wire::Tcp(handle));
            },
        );
        handle?;
        let done = || {
            let mut state = self.state.lock();
            match state.phase {
                Phase::Connecting => None,
                Phase::Connected => Some(Ok(())),
                _ => Some(Err(state.error.take().unwrap_or(Errno::ECONNREFUSED))),
            }
        };
        if !wait {
            return Err(Errno::EINPROGRESS);
        }
        match self.until(true, Waits::Send, done) {
            Err(Errno::EAGAIN) => Err(Errno::EINPROGRESS),
            other => other,
        }
    }

    /// Names the other end of datagrams.
    pub(super) fn connect_datagrams(&self, address: Address) -> Result<(), Errno> {
        let to = address.socket().ok_or(Errno::EINVAL)?;
        let own = self.end_towards(to)?;
        self.open_port()?;
        let mut state = self.state.lock();
        state.phase = Phase::Connected;
        state.local = self.address(own);
        state.remote = address;
        state.peer = Weak::new();
        Ok(())
    }

    /// The other machine's address, if that is where a datagram goes.
    pub(super) fn target_outside(&self, to: Option<&Address>) -> Option<Address> {
        if !self.is_inet() || self.kind != Kind::Datagram {
            return None;
        }
        let target = to.cloned().or_else(|| self.addresses().1)?;
        (!target.is_own()).then_some(target)
    }

    /// Sends a datagram to another machine.
    pub(super) fn send_outside(&self, bytes: &[u8], to: &Address) -> Result<usize, Errno> {
        let to = to.socket().ok_or(Errno::EINVAL)?;
        if to.port() == 0 {
            return Err(Errno::EINVAL);
        }
        let own = self.end_towards(to)?;
        self.open_port()?;
        stack::send_udp(own.port(), own.ip(), to, bytes)?;
        Ok(bytes.len())
    }

    /// Lets datagrams of others come to the own port.
    pub(super) fn open_port(&self) -> Result<(), Errno> {
        let (local, wire) = {
            let state = self.state.lock();
            (state.local.clone(), state.wire)
        };
        let udp = self.kind == Kind::Datagram && self.icmp.is_none();
        let outside = self.is_inet() && udp && !local.is_loopback();
        if let Some(port) = local.port().filter(|_| outside && wire.is_none()) {
            stack::open_udp(port)?;
            self.state.lock().wire = Some(Wire::Udp(port));
        }
        Ok(())
    }

    /// Whether connections to that address are for this socket, and how much they are.
    pub(super) fn listens_for(&self, to: SocketAddr) -> Option<u8> {
        let rank = self.takes(&self.address(to))?;
        self.listens().then_some(rank)
    }

    /// Whether one more connection may wait besides those that are not complete.
    pub(super) fn has_place_for(&self, half_open: usize) -> bool {
        match &self.state.lock().phase {
            Phase::Listening { most, queue } => queue.len() + half_open <= *most,
            _ => false,
        }
    }

    /// A connection of another machine is complete: the socket that will be accepted.
    pub(super) fn arrived(
        &self,
        own: SocketAddr,
        other: SocketAddr,
        handle: SocketHandle,
    ) -> Option<Arc<Self>> {
        let server = make_for(self.family, self.kind, self.owner);
        {
            let mut state = server.state.lock();
            state.phase = Phase::Connected;
            state.wire = Some(Wire::Tcp(handle));
            state.local = self.address(own);
            state.remote = self.address(other);
        }
        let mut state = self.state.lock();
        let (options, limits) = (state.options.clone(), state.limits);
        let Phase::Listening { queue, .. } = &mut state.phase else {
            return None;
        };
        queue.push_back(Arc::clone(&server));
        state.arrived += 1;
        drop(state);
        let mut state = server.state.lock();
        (state.options, state.limits) = (options, limits);
        drop(state);
        Some(server)
    }

    /// The connection that was asked for is there.
    pub(super) fn opened(&self) {
        let mut state = self.state.lock();
        state.phase = Phase::Connected;
        state.arrived += 1;
    }

    /// The connection that was asked for is not to be had.
    pub(super) fn failed(&self, error: Errno) {
        let mut state = self.state.lock();
        state.phase = Phase::Idle;
        state.wire = None;
        state.error = Some(error);
        state.arrived += 1;
    }

    /// Takes in what the other side sent, as far as there is room; gives how much that was.
    pub(super) fn take_in(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock();
        if state.read_closed {
            return bytes.len();
        }
        let room = BUFFER.saturating_sub(state.input.len());
        let bytes = bytes.get(..room.min(bytes.len())).unwrap_or_default();
        if !appkernel_core::bytes::add(&mut state.input, bytes) {
            // It stays with the connection until there is memory.
            return 0;
        }
        state.came += bytes.len() as u64;
        bytes.len()
    }

    /// The other side has so many bytes more.
    pub(super) fn has_sent(&self, bytes: usize) {
        self.state.lock().removed += bytes as u64;
    }

    /// Nothing more will come; whether that is new. `lost`: nothing can be sent either.
    pub(super) fn at_end(&self, lost: bool, error: Option<Errno>) -> bool {
        let mut state = self.state.lock();
        let new = !state.ended || lost && !state.write_closed;
        if new {
            state.ended = true;
            state.write_closed |= lost;
            state.arrived += 1;
            if error.is_some() {
                state.error = error;
            }
        }
        new
    }
}

fn datagram_sockets() -> Vec<Arc<Socket>> {
    let mut all = named();
    all.retain(|s| s.is_inet() && s.kind == Kind::Datagram && s.icmp.is_none());
    all
}

/// Gives a datagram of another machine to the socket it is for.
pub fn deliver(from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
    let found = datagram_sockets().into_iter().filter_map(|socket| {
        let rank = socket.takes(&socket.address(to))?;
        match socket.addresses().1 {
            None => Some((rank + 8, socket)),
            Some(remote) => (remote.socket() == Some(from)).then_some((rank, socket)),
        }
    });
    let Some((_, socket)) = found.min_by_key(|(rank, _)| *rank) else {
        return;
    };
    socket.put_datagram(socket.address(from), bytes, 0);
}

impl Socket {
    /// A datagram came.
    pub(super) fn put_datagram(&self, from: Address, bytes: &[u8], hops: u8) {
        let mut state = self.state.lock();
        let held: usize = state.packets.iter().map(|p| p.bytes.len()).sum();
        // Lost when nobody reads it.
        if state.packets.len() >= MAX_PACKETS
            || held >= BUFFER
            || state.read_closed
            || appkernel_hal::frames::is_scarce()
        {
            return;
        }
        state.arrived += 1;
        state.packets.push_back(Packet {
            from,
            bytes: bytes.to_vec(),
            files: Vec::new(),
            hops,
        });
    }
}

/// Nobody takes the datagrams from one address to another; whether somebody here is connected so.
pub fn refused(own: SocketAddr, other: SocketAddr) -> bool {
    let found = datagram_sockets().into_iter().find(|socket| {
        let (local, remote) = socket.addresses();
        local.port() == Some(own.port()) && remote.and_then(|r| r.socket()) == Some(other)
    });
    let Some(socket) = found else { return false };
    let mut state = socket.state.lock();
    state.error = Some(Errno::ECONNREFUSED);
    state.arrived += 1;
    drop(state);
    task::wake(task::FILES);
    true
}
