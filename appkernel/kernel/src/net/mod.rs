//! Sockets within the machine: unix sockets, and TCP and UDP over the loopback. There are no packets:
//! what one end writes is in the other's buffer. All containers of a machine have one loopback.

mod address;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::any::Any;
use core::sync::atomic::{AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_hal::sync::Mutex;

use crate::fs::file::{File, Object, Ready};
use crate::fs::node::kind;
use crate::task;

pub use address::Address;

/// Bytes that wait in one socket.
const BUFFER: usize = 64 << 10;
/// Largest datagram.
const MAX_PACKET: usize = 65507;
/// Packets that wait in one socket.
const MAX_PACKETS: usize = 512;
/// Files that are under way in one socket.
const MAX_FILES: usize = 256;
/// First and last port that is given out.
const EPHEMERAL: (u16, u16) = (32768, 60999);
const MAX_BACKLOG: usize = 4096;

/// Address families.
pub mod family {
    pub const UNIX: u16 = 1;
    pub const INET: u16 = 2;
    pub const INET6: u16 = 10;
}

/// How bytes are kept together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Stream,
    Datagram,
    /// A connection of packets.
    Packets,
}

#[derive(Default)]
enum Phase {
    #[default]
    Idle,
    Listening {
        most: usize,
        queue: VecDeque<Arc<Socket>>,
    },
    Connected,
}

/// Something that was received.
pub struct Packet {
    pub from: Address,
    pub bytes: Vec<u8>,
    pub files: Vec<Arc<File>>,
}

#[derive(Default)]
struct State {
    local: Address,
    remote: Address,
    phase: Phase,
    peer: Weak<Socket>,
    input: VecDeque<u8>,
    /// Files that came with the bytes so far read plus those before this place.
    files: VecDeque<(u64, Vec<Arc<File>>)>,
    /// Bytes that came, and that were read.
    came: u64,
    read: u64,
    /// Packets and connections that came, and packets that were taken.
    arrived: u64,
    removed: u64,
    packets: VecDeque<Packet>,
    /// The other side sends no more; we do not read, or write, any more.
    ended: bool,
    read_closed: bool,
    write_closed: bool,
    error: Option<Errno>,
    options: BTreeMap<(u32, u32), u32>,
    /// Process, user and group of the other side, when it connected.
    peer_credentials: (u32, u32, u32),
    bound_node: Option<(u64, u64)>,
}

/// A socket.
pub struct Socket {
    pub family: u16,
    pub kind: Kind,
    number: u64,
    /// Process, user and group of who made it.
    owner: (u32, u32, u32),
    me: Weak<Socket>,
    state: Mutex<State>,
}

static NEXT: AtomicU64 = AtomicU64::new(1);
/// Unix sockets by the file they are bound to.
static NODES: Mutex<BTreeMap<(u64, u64), Weak<Socket>>> = Mutex::new(BTreeMap::new());
/// All sockets with an address that is no file.
static NAMED: Mutex<Vec<Weak<Socket>>> = Mutex::new(Vec::new());

fn named() -> Vec<Arc<Socket>> {
    let mut named = NAMED.lock();
    named.retain(|s| s.strong_count() > 0);
    named.iter().filter_map(Weak::upgrade).collect()
}

/// A new socket.
pub fn make(family: u16, kind: Kind) -> Arc<Socket> {
    let me = task::current();
    let (uid, gid) = {
        let own = me.credentials.lock();
        (own.euid, own.egid)
    };
    Arc::new_cyclic(|weak| Socket {
        family,
        kind,
        number: NEXT.fetch_add(1, Ordering::Relaxed),
        owner: (me.process, uid, gid),
        me: Weak::clone(weak),
        state: Mutex::new(State::default()),
    })
}

/// Two sockets that are connected.
pub fn pair(family: u16, kind: Kind) -> (Arc<Socket>, Arc<Socket>) {
    let (a, b) = (make(family, kind), make(family, kind));
    for (one, other) in [(&a, &b), (&b, &a)] {
        let mut state = one.state.lock();
        state.phase = Phase::Connected;
        state.peer = Arc::downgrade(other);
        state.peer_credentials = other.owner;
    }
    (a, b)
}

impl Socket {
    fn is_inet(&self) -> bool {
        self.family != family::UNIX
    }

    /// Own address, and the other side's.
    pub fn addresses(&self) -> (Address, Option<Address>) {
        let state = self.state.lock();
        let connected = matches!(state.phase, Phase::Connected);
        (state.local.clone(), connected.then(|| state.remote.clone()))
    }

    /// Process, user and group of the other side.
    pub fn peer_credentials(&self) -> (u32, u32, u32) {
        self.state.lock().peer_credentials
    }

    /// Whether it waits for connections.
    pub fn listens(&self) -> bool {
        matches!(self.state.lock().phase, Phase::Listening { .. })
    }

    /// Takes the error that waits.
    pub fn take_error(&self) -> Option<Errno> {
        self.state.lock().error.take()
    }

    /// An option that was set.
    pub fn option(&self, level: u32, name: u32) -> Option<u32> {
        self.state.lock().options.get(&(level, name)).copied()
    }

    /// Sets an option.
    pub fn set_option(&self, level: u32, name: u32, value: u32) {
        const MOST: usize = 64;
        let mut state = self.state.lock();
        if state.options.len() < MOST {
            state.options.insert((level, name), value);
        }
    }

    /// Binds to an address; to a file's for a path that was made.
    pub fn bind(&self, address: Address, node: Option<(u64, u64)>) -> Result<(), Errno> {
        if self.state.lock().local != Address::None {
            return Err(Errno::EINVAL);
        }
        let mut address = address;
        if let Address::Inet { port, .. } = &mut address {
            if *port == 0 {
                *port = self.free_port()?;
            } else if self.in_use(&address) {
                return Err(Errno::EADDRINUSE);
            }
        } else if let Address::Abstract(_) = &address
            && named().iter().any(|s| s.state.lock().local == address)
        {
            return Err(Errno::EADDRINUSE);
        }
        if let Some(node) = node {
            NODES.lock().insert(node, Weak::clone(&self.me));
        } else {
            NAMED.lock().push(Weak::clone(&self.me));
        }
        let mut state = self.state.lock();
        state.local = address;
        state.bound_node = node;
        Ok(())
    }

    fn in_use(&self, address: &Address) -> bool {
        const SOL_SOCKET: u32 = 1;
        const REUSEPORT: u32 = 15;
        const REUSEADDR: u32 = 2;
        let shares = |s: &Self, name| s.option(SOL_SOCKET, name).unwrap_or(0) != 0;
        named().iter().any(|other| {
            let (local, listens) = (other.addresses().0, other.listens());
            let same = other.kind == self.kind && other.is_inet() && local.overlaps(address);
            let both = shares(self, REUSEPORT) && shares(other, REUSEPORT);
            // Connections that were accepted share their listener's port.
            let old = self.kind == Kind::Stream && !listens && shares(self, REUSEADDR);
            same && !both && !old && other.state.lock().peer.strong_count() == 0
        })
    }

    fn free_port(&self) -> Result<u16, Errno> {
        let used: Vec<u16> = named()
            .iter()
            .filter(|s| s.kind == self.kind)
            .filter_map(|s| s.addresses().0.port())
            .collect();
        let range = EPHEMERAL.1 - EPHEMERAL.0 + 1;
        let start = (NEXT.load(Ordering::Relaxed) % u64::from(range)) as u16;
        (0..range)
            .map(|i| EPHEMERAL.0 + (start + i) % range)
            .find(|port| !used.contains(port))
            .ok_or(Errno::EADDRNOTAVAIL)
    }

    /// Waits for connections from now on.
    pub fn listen(&self, backlog: u32) -> Result<(), Errno> {
        if self.kind == Kind::Datagram {
            return Err(Errno::EOPNOTSUPP);
        }
        if self.is_inet() && self.state.lock().local == Address::None {
            self.bind(Address::any(self.family), None)?;
        }
        let mut state = self.state.lock();
        let most = (backlog as usize).clamp(1, MAX_BACKLOG);
        match &mut state.phase {
            Phase::Connected => return Err(Errno::EINVAL),
            Phase::Listening { most: old, .. } => *old = most,
            Phase::Idle => {
                if state.local == Address::None {
                    return Err(Errno::EINVAL);
                }
                state.phase = Phase::Listening {
                    most,
                    queue: VecDeque::new(),
                };
            }
        }
        Ok(())
    }

    /// Who has an address.
    fn find(&self, address: &Address, node: Option<(u64, u64)>) -> Result<Arc<Self>, Errno> {
        if let Some(node) = node {
            let found = NODES.lock().get(&node).and_then(Weak::upgrade);
            return found.ok_or(Errno::ECONNREFUSED);
        }
        if let Address::Inet { .. } = address
            && !address.is_own()
        {
            return Err(Errno::ENETUNREACH);
        }
        let found = named().into_iter().find(|other| {
            if other.kind != self.kind {
                return false;
            }
            let (local, remote) = other.addresses();
            let fits = match (&local, address) {
                (Address::Inet { .. }, Address::Inet { .. }) => local.accepts(address),
                (local, address) => local == address,
            };
            fits && (self.kind == Kind::Datagram
                && remote.is_none_or(|r| self.addresses().0.port() == r.port())
                || other.listens())
        });
        found.ok_or(Errno::ECONNREFUSED)
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
            if self.family == family::UNIX || address.is_own() {
                self.name_itself()?;
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
            return Err(Errno::ENETUNREACH);
        }
        if matches!(self.state.lock().phase, Phase::Connected) {
            return Err(Errno::EISCONN);
        }
        let listener = self.find(&address, node)?;
        self.name_itself()?;
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
        let (own, credentials) = if wait {
            task::wait_for(task::FILES, attempt)??
        } else {
            attempt().unwrap_or(Err(Errno::EAGAIN))?
        };
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
    fn name_itself(&self) -> Result<(), Errno> {
        if self.is_inet() && self.state.lock().local == Address::None {
            self.bind(Address::loopback(self.family), None)?;
        }
        Ok(())
    }

    /// Takes a connection.
    pub fn accept(&self, wait: bool) -> Result<Arc<Self>, Errno> {
        let attempt = || match &mut self.state.lock().phase {
            Phase::Listening { queue, .. } => queue.pop_front().map(Ok),
            _ => Some(Err(Errno::EINVAL)),
        };
        let socket = if wait {
            task::wait_for(task::FILES, attempt)?
        } else {
            attempt().unwrap_or(Err(Errno::EAGAIN))
        }?;
        task::wake(task::FILES);
        Ok(socket)
    }

    /// Ends one direction, or both: 0 reading, 1 writing, 2 both.
    pub fn shutdown(&self, how: u32) -> Result<(), Errno> {
        let peer = {
            let mut state = self.state.lock();
            if !matches!(state.phase, Phase::Connected) {
                return Err(Errno::ENOTCONN);
            }
            state.read_closed |= how != 1;
            state.write_closed |= how != 0;
            state.peer.upgrade()
        };
        if let Some(peer) = peer
            && how != 0
            && self.kind != Kind::Datagram
        {
            peer.state.lock().ended = true;
        }
        task::wake(task::FILES);
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
        let peer = match to {
            Some((address, node)) => {
                self.name_itself()?;
                self.find(&address, node)
            }
            None => {
                let state = self.state.lock();
                if !matches!(state.phase, Phase::Connected) {
                    return Err(if self.kind == Kind::Datagram && self.is_inet() {
                        Errno::EDESTADDRREQ
                    } else {
                        Errno::ENOTCONN
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
        let from = self.addresses().0;
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
            });
            Some(Ok(bytes.len()))
        };
        let count = if wait {
            task::wait_for(task::FILES, attempt)??
        } else {
            attempt().unwrap_or(Err(Errno::EAGAIN))?
        };
        task::wake(task::FILES);
        Ok(count)
    }

    fn send_stream(&self, bytes: &[u8], files: &[Arc<File>], wait: bool) -> Result<usize, Errno> {
        let mut done = 0;
        let mut files = files.to_vec();
        loop {
            let rest = bytes.get(done..).unwrap_or_default();
            let attempt = || {
                let (peer, connected) = {
                    let state = self.state.lock();
                    (
                        state.peer.upgrade(),
                        matches!(state.phase, Phase::Connected),
                    )
                };
                if !connected {
                    return Some(Err(Errno::ENOTCONN));
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
                if !files.is_empty() {
                    let under_way: usize = state.files.iter().map(|(_, f)| f.len()).sum();
                    if under_way + files.len() > MAX_FILES {
                        return Some(Err(Errno::ETOOMANYREFS));
                    }
                    let at = state.came;
                    state.files.push_back((at, core::mem::take(&mut files)));
                }
                state.input.extend(rest.iter().take(count));
                state.came += count as u64;
                Some(Ok(count))
            };
            let mut attempt = attempt;
            let result = if wait {
                task::wait_for(task::FILES, attempt).and_then(|r| r)
            } else {
                attempt().unwrap_or(Err(Errno::EAGAIN))
            };
            match result {
                Ok(count) => {
                    done += count;
                    task::wake(task::FILES);
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
            };
            if self.kind == Kind::Stream {
                if state.input.is_empty() {
                    if room == 0 || state.ended || state.read_closed {
                        return Some(Ok(nothing));
                    }
                    if !matches!(state.phase, Phase::Connected) {
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
                let bytes: Vec<u8> = if peek {
                    state.input.iter().take(count).copied().collect()
                } else {
                    state.read += count as u64;
                    state.input.drain(..count).collect()
                };
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
                })),
                Some(_) => {
                    state.removed += 1;
                    state.packets.pop_front().map(Ok)
                }
                None if state.read_closed || state.ended => Some(Ok(nothing)),
                None => None,
            }
        };
        let packet = if wait {
            task::wait_for(task::FILES, attempt)?
        } else {
            attempt().unwrap_or(Err(Errno::EAGAIN))
        }?;
        task::wake(task::FILES);
        Ok(packet)
    }

    /// Bytes that can be read.
    pub fn waiting(&self) -> usize {
        let state = self.state.lock();
        match self.kind {
            Kind::Stream => state.input.len(),
            _ => state.packets.front().map_or(0, |p| p.bytes.len()),
        }
    }
}

impl Object for Socket {
    fn read(&self, to: &mut [u8], wait: bool) -> Result<usize, Errno> {
        let packet = self.receive(to.len(), false, wait)?;
        let count = packet.bytes.len().min(to.len());
        for (slot, byte) in to.iter_mut().zip(&packet.bytes) {
            *slot = *byte;
        }
        Ok(count)
    }

    fn write(&self, from: &[u8], wait: bool) -> Result<usize, Errno> {
        self.send(from, &[], None, wait)
    }

    fn ready(&self) -> Ready {
        let (mut ready, peer) = {
            let state = self.state.lock();
            let stream = self.kind != Kind::Datagram;
            let (queued, connected) = match &state.phase {
                Phase::Listening { queue, .. } => (!queue.is_empty(), false),
                Phase::Connected => (false, true),
                Phase::Idle => (false, false),
            };
            let ended = stream && connected && (state.ended || state.read_closed);
            let ready = Ready {
                readable: queued
                    || !state.input.is_empty()
                    || !state.packets.is_empty()
                    || ended
                    || state.error.is_some(),
                writable: !stream || !connected || state.write_closed,
                hung_up: stream
                    && (ended && (state.write_closed || state.peer.strong_count() == 0)
                        || !connected && !matches!(state.phase, Phase::Listening { .. })),
                ended,
                error: state.error.is_some(),
            };
            (ready, state.peer.upgrade().filter(|_| stream && connected))
        };
        if let Some(peer) = peer {
            let state = peer.state.lock();
            ready.writable |= state.read_closed
                || state.input.len() + state.packets.iter().map(|p| p.bytes.len()).sum::<usize>()
                    < BUFFER;
        } else {
            ready.writable = true;
        }
        if self.listens() {
            ready.writable = false;
        }
        ready
    }

    fn progress(&self) -> (u64, u64) {
        let (came, peer) = {
            let state = self.state.lock();
            (state.came + state.arrived, state.peer.upgrade())
        };
        let room = peer.map_or(0, |peer| {
            let state = peer.state.lock();
            state.read + state.removed
        });
        (came, room)
    }

    fn name(&self) -> String {
        format!("socket:[{}]", self.number)
    }

    fn mode(&self) -> u32 {
        kind::SOCKET | 0o777
    }

    fn closed(&self) {
        let (peer, unread, queue, node) = {
            let mut state = self.state.lock();
            let queue = match core::mem::take(&mut state.phase) {
                Phase::Listening { queue, .. } => queue,
                _ => VecDeque::new(),
            };
            (
                state.peer.upgrade(),
                !state.input.is_empty(),
                queue,
                state.bound_node,
            )
        };
        if let Some(node) = node {
            NODES.lock().remove(&node);
        }
        if let Some(peer) = peer
            && self.kind != Kind::Datagram
        {
            let mut state = peer.state.lock();
            state.ended = true;
            state.peer = Weak::new();
            if unread && self.is_inet() {
                state.error = Some(Errno::ECONNRESET);
            }
        }
        for socket in queue {
            socket.closed();
        }
        task::wake(task::FILES);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
