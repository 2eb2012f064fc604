//! What happens within the machine: what one end writes is put into the other's buffer.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use appkernel_core::bytes;
use appkernel_core::errno::Errno;

use super::{
    Address, BUFFER, Kind, MAX_FILES, MAX_PACKET, MAX_PACKETS, Packet, Phase, Socket, Waits, Wire,
    family, make, named, stack, with,
};
use super::{NODES, netlink};
use crate::fs::file::File;
use crate::task;

impl Socket {
    /// Who has an address.
    fn find(&self, address: &Address, node: Option<(u64, u64)>) -> Result<Arc<Self>, Errno> {
        if let Some(node) = node {
            let found = NODES.lock().get(&node).and_then(Weak::upgrade);
            let found = found.ok_or(Errno::ECONNREFUSED)?;
            return match found.kind == self.kind {
                true => Ok(found),
                false => Err(Errno::EPROTOTYPE),
            };
        }
        if let Address::Inet { .. } = address
            && !address.is_own()
        {
            return Err(Errno::ENETUNREACH);
        }
        let from = self.addresses().0.port();
        let found = named().into_iter().filter_map(|other| {
            if !other.is_like(self) {
                return None;
            }
            let (local, remote) = other.addresses();
            let rank = match (&local, address) {
                (Address::Inet { .. }, Address::Inet { .. }) => other.takes(address)?,
                (local, address) if local == address => 0,
                _ => return None,
            };
            if self.kind != Kind::Datagram {
                return other.listens().then_some((rank, other));
            }
            // Who is connected gets what is from its other end, before all others.
            match remote {
                None => Some((rank + 8, other)),
                Some(remote) => (remote.port() == from).then_some((rank, other)),
            }
        });
        let best = found.min_by_key(|(rank, _)| *rank);
        best.map(|(_, socket)| socket).ok_or(Errno::ECONNREFUSED)
    }

    /// Whether what is for an address is for this socket by where it is bound; lower numbers mean it
    /// more.
    pub(super) fn takes(&self, address: &Address) -> Option<u8> {
        let local = self.addresses().0;
        let (level, name) = with::V6_ONLY;
        let only = local.is_v6() && self.option(level, name).unwrap_or(0) != 0;
        if !local.accepts(address) || only && address.is_four() {
            return None;
        }
        Some(
            match (local.is_any(), local.is_four() == address.is_four()) {
                (false, _) => 0,
                (true, true) => 1,
                (true, false) => 2,
            },
        )
    }

    /// Connects.
    pub fn connect(
        &self,
        address: Address,
        node: Option<(u64, u64)>,
        wait: bool,
    ) -> Result<(), Errno> {
        if matches!(self.state.lock().phase, Phase::Listening { .. }) {
            return Err(Errno::EINVAL);
        }
        if self.kind == Kind::Datagram {
            if address == Address::None {
                let mut state = self.state.lock();
                state.phase = Phase::Idle;
                state.remote = Address::None;
                return Ok(());
            }
            if self.is_inet() && !address.is_own() {
                return self.connect_datagrams(address);
            }
            {
                self.name_for(&address)?;
                let peer = self.find(&address, node);
                let peer = match peer {
                    // Nobody needs to be there yet.
                    Err(Errno::ECONNREFUSED) if self.is_inet() => Weak::new(),
                    other => Arc::downgrade(&other?),
                };
                let mut state = self.state.lock();
                state.phase = Phase::Connected;
                state.remote = address;
                state.peer = peer;
                return Ok(());
            }
        }
        if matches!(self.state.lock().phase, Phase::Connected) {
            return Err(Errno::EISCONN);
        }
        if self.is_inet() && !address.is_own() {
            return self.connect_outside(address, wait);
        }
        let listener = self.find(&address, node)?;
        self.name_for(&address)?;
        let local = self.addresses().0;
        let server = make(self.family, self.kind);
        let attempt = || {
            let mut state = listener.state.lock();
            let own = state.local.clone();
            let credentials = listener.owner;
            let Phase::Listening { most, queue } = &mut state.phase else {
                return Some(Err(Errno::ECONNREFUSED));
            };
            if queue.len() > *most {
                return None;
            }
            queue.push_back(Arc::clone(&server));
            state.arrived += 1;
            Some(Ok((own, credentials)))
        };
        let (own, credentials) = self.until(wait, Waits::Send, attempt)?;
        {
            let mut state = server.state.lock();
            state.phase = Phase::Connected;
            state.peer = Weak::clone(&self.me);
            // The listener's port, the address that was asked for.
            state.local = if self.is_inet() {
                address.as_local(&own)
            } else {
                own
            };
            state.remote = local;
            state.peer_credentials = self.owner;
        }
        {
            let mut state = self.state.lock();
            state.phase = Phase::Connected;
            state.peer = Arc::downgrade(&server);
            state.remote = address;
            state.peer_credentials = credentials;
        }
        task::wake(task::FILES);
        Ok(())
    }

    /// Gives itself a port, if it has none.
    pub(super) fn name_itself(&self) -> Result<(), Errno> {
        if self.is_inet() && self.state.lock().local == Address::None {
            self.bind(Address::any(self.family), None)?;
        }
        Ok(())
    }

    /// Gives itself the address that reaches another of the machine, and a port.
    fn name_for(&self, to: &Address) -> Result<(), Errno> {
        if !self.is_inet() {
            return Ok(());
        }
        self.name_itself()?;
        let mut state = self.state.lock();
        state.local = state.local.facing(to);
        Ok(())
    }

    /// Sends; `to` for datagrams that name their receiver.
    pub fn send(
        &self,
        bytes: &[u8],
        files: &[Arc<File>],
        to: Option<(Address, Option<(u64, u64)>)>,
        wait: bool,
    ) -> Result<usize, Errno> {
        if self.family == family::NETLINK {
            return netlink::ask(self, bytes);
        }
        if let Some(error) = self.take_error() {
            return Err(error);
        }
        if self.state.lock().write_closed {
            return Err(Errno::EPIPE);
        }
        // What waits in sockets is the kernel's memory.
        if appkernel_hal::frames::is_scarce() {
            return Err(Errno::ENOBUFS);
        }
        if self.kind == Kind::Stream {
            return self.send_stream(bytes, files, wait);
        }
        if bytes.len() > MAX_PACKET {
            return Err(Errno::EMSGSIZE);
        }
        if let Some(icmp) = self.icmp {
            return self.send_icmp(icmp, bytes, to.map(|(address, _)| address));
        }
        if let Some(target) = self.target_outside(to.as_ref().map(|(address, _)| address)) {
            return self.send_outside(bytes, &target);
        }
        let facing = to.as_ref().map(|(address, _)| address.clone());
        let peer = match to {
            Some((address, node)) => {
                self.name_itself()?;
                self.find(&address, node)
            }
            None => {
                let state = self.state.lock();
                if !matches!(state.phase, Phase::Connected) {
                    return Err(match (self.kind, self.is_inet()) {
                        (Kind::Datagram, true) => Errno::EDESTADDRREQ,
                        _ => Errno::ENOTCONN,
                    });
                }
                let (peer, remote) = (state.peer.upgrade(), state.remote.clone());
                drop(state);
                match peer {
                    Some(peer) => Ok(peer),
                    None if self.is_inet() => self.find(&remote, None),
                    None => Err(if self.kind == Kind::Packets {
                        Errno::EPIPE
                    } else {
                        Errno::ECONNREFUSED
                    }),
                }
            }
        };
        let peer = match peer {
            // UDP to nobody is sent all the same; the answer comes later as an error.
            Err(Errno::ECONNREFUSED) if self.is_inet() => {
                if matches!(self.state.lock().phase, Phase::Connected) {
                    self.state.lock().error = Some(Errno::ECONNREFUSED);
                    task::wake(task::FILES);
                }
                return Ok(bytes.len());
            }
            other => other?,
        };
        let (own, remote) = self.addresses();
        let from = match facing.or(remote) {
            Some(to) if self.is_inet() => own.facing(&to),
            _ => own,
        };
        let attempt = || {
            let mut state = peer.state.lock();
            if state.read_closed {
                return Some(Err(Errno::EPIPE));
            }
            let full = state.packets.len() >= MAX_PACKETS
                || state.packets.iter().map(|p| p.bytes.len()).sum::<usize>() >= BUFFER;
            if full {
                // UDP is lost when nobody reads it.
                return self.is_inet().then_some(Ok(bytes.len()));
            }
            state.arrived += 1;
            state.packets.push_back(Packet {
                from: from.clone(),
                bytes: bytes.to_vec(),
                files: files.to_vec(),
                hops: 64,
            });
            Some(Ok(bytes.len()))
        };
        let count = self.until(wait, Waits::Send, attempt)?;
        task::wake(task::FILES);
        Ok(count)
    }

    fn send_stream(&self, bytes: &[u8], files: &[Arc<File>], wait: bool) -> Result<usize, Errno> {
        let mut done = 0;
        let mut files = files.to_vec();
        loop {
            let rest = bytes.get(done..).unwrap_or_default();
            let attempt = || {
                let (peer, wire) = {
                    let state = self.state.lock();
                    match state.phase {
                        Phase::Connected => {}
                        Phase::Connecting => return None,
                        _ if self.is_inet() => return Some(Err(Errno::EPIPE)),
                        _ => return Some(Err(Errno::ENOTCONN)),
                    }
                    (state.peer.upgrade(), state.wire)
                };
                if let Some(Wire::Tcp(handle)) = wire {
                    let error = self.take_error();
                    return match error.map_or_else(|| stack::send(handle, rest), Err) {
                        Ok(0) if !rest.is_empty() => None,
                        other => Some(other),
                    };
                }
                let Some(peer) = peer else {
                    return Some(Err(Errno::EPIPE));
                };
                let mut state = peer.state.lock();
                if state.read_closed {
                    return Some(Err(Errno::EPIPE));
                }
                let room = BUFFER.saturating_sub(state.input.len());
                if room == 0 {
                    return None;
                }
                let count = room.min(rest.len());
                let under_way: usize = state.files.iter().map(|(_, f)| f.len()).sum();
                if !files.is_empty() && under_way + files.len() > MAX_FILES {
                    return Some(Err(Errno::ETOOMANYREFS));
                }
                if !bytes::add(&mut state.input, rest.get(..count).unwrap_or_default()) {
                    return Some(Err(Errno::ENOBUFS));
                }
                if !files.is_empty() {
                    let at = state.came;
                    state.files.push_back((at, core::mem::take(&mut files)));
                }
                state.came += count as u64;
                Some(Ok(count))
            };
            match self.until(wait, Waits::Send, attempt) {
                Ok(count) => {
                    done += count;
                    self.tell();
                    if done >= bytes.len() {
                        return Ok(done);
                    }
                }
                Err(e) if done == 0 => return Err(e),
                Err(_) => return Ok(done),
            }
        }
    }

    /// Receives at most `room` bytes, or a packet of any length.
    pub fn receive(&self, room: usize, peek: bool, wait: bool) -> Result<Packet, Errno> {
        let attempt = || {
            let mut state = self.state.lock();
            if let Some(error) = state.error.take() {
                return Some(Err(error));
            }
            let nothing = Packet {
                from: Address::None,
                bytes: Vec::new(),
                files: Vec::new(),
                hops: 0,
            };
            if self.kind == Kind::Stream {
                if state.input.is_empty() {
                    if room == 0 || state.ended || state.read_closed {
                        return Some(Ok(nothing));
                    }
                    if !matches!(state.phase, Phase::Connected | Phase::Connecting) {
                        return Some(Err(Errno::ENOTCONN));
                    }
                    return None;
                }
                let mut count = room.min(state.input.len());
                let mut files = Vec::new();
                // Files come with the first byte they were sent with, and no others with them.
                let at = state.read;
                match state.files.front() {
                    Some((place, _)) if *place <= at => {
                        if peek {
                            files = state.files.front().map(|f| f.1.clone()).unwrap_or_default();
                        } else {
                            files = state.files.pop_front().map(|f| f.1).unwrap_or_default();
                        }
                        if let Some((next, _)) = state.files.get(usize::from(peek)) {
                            count = count.min((next - at) as usize);
                        }
                    }
                    Some((place, _)) => count = count.min((place - at) as usize),
                    None => {}
                }
                let mut bytes = alloc::vec![0; count];
                if peek {
                    bytes::copy(&state.input, &mut bytes);
                } else {
                    state.read += count as u64;
                    bytes::take(&mut state.input, &mut bytes);
                }
                return Some(Ok(Packet {
                    bytes,
                    files,
                    ..nothing
                }));
            }
            match state.packets.front() {
                Some(first) if peek => Some(Ok(Packet {
                    from: first.from.clone(),
                    bytes: first.bytes.clone(),
                    files: first.files.clone(),
                    hops: first.hops,
                })),
                Some(_) => {
                    state.removed += 1;
                    state.packets.pop_front().map(Ok)
                }
                None if state.read_closed || state.ended => Some(Ok(nothing)),
                None => None,
            }
        };
        let packet = self.until(wait, Waits::Receive, attempt)?;
        let wire = self.state.lock().wire;
        match wire {
            // Others do not see what is read here.
            Some(Wire::Tcp(handle)) => stack::drained(handle),
            _ => self.tell(),
        }
        Ok(packet)
    }
}
