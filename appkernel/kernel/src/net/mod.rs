//! Sockets: unix sockets, TCP and UDP, and netlink.
//!
//! Within the machine there are no packets: what one end writes is in the other's buffer (`local`).
//! What leaves the machine goes through the interface (`outer`, and `stack` below it). All containers
//! of a machine have one network.

mod address;
mod device;
mod icmp;
pub mod interface;
mod local;
mod netlink;
mod object;
mod outer;
pub mod stack;
pub mod text;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_hal::sync::Mutex;
use appkernel_hal::{clock, cpu};
use smoltcp::iface::SocketHandle;

use crate::fs::file::File;
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
    pub const NETLINK: u16 = 16;
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
    /// The other machine has not answered yet.
    Connecting,
    Connected,
}

/// A socket of datagrams for ICMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Icmp {
    /// It asks for echoes and gets their answers, with its port as their number.
    Ping,
    /// It sends anything and gets everything.
    Raw,
}

/// What a socket has beyond the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wire {
    Tcp(SocketHandle),
    /// A port of UDP.
    Udp(u16),
}

/// Options that have an effect here: level and name.
mod with {
    pub const REUSEADDR: (u32, u32) = (1, 2);
    pub const REUSEPORT: (u32, u32) = (1, 15);
    pub const LINGER: (u32, u32) = (1, 13);
    pub const NO_DELAY: (u32, u32) = (6, 1);
    pub const V6_ONLY: (u32, u32) = (41, 26);
    pub const TOS: (u32, u32) = (0, 1);
    pub const TTL: (u32, u32) = (0, 2);
    pub const V6_HOPS: (u32, u32) = (41, 16);
    pub const V6_CLASS: (u32, u32) = (41, 67);
    /// Types that a raw socket does not want.
    pub const ICMP_FILTER: (u32, u32) = (255, 1);
}

/// What a call waits for, as far as its time is limited (SO_RCVTIMEO, SO_SNDTIMEO).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    Receive,
    Send,
}

/// Something that was received.
pub struct Packet {
    pub from: Address,
    pub bytes: Vec<u8>,
    pub files: Vec<Arc<File>>,
    /// How many more hops it would have lived; 0: not known.
    pub hops: u8,
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
    wire: Option<Wire>,
    /// The agent is to know what happens to it.
    watched: bool,
    /// Nanoseconds that receiving and sending wait; 0: for ever.
    limits: [u64; 2],
}

/// A socket.
pub struct Socket {
    pub family: u16,
    pub kind: Kind,
    /// Neither TCP nor UDP.
    pub icmp: Option<Icmp>,
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
    make_with(family, kind, None)
}

/// A new socket for ICMP.
///
/// # Errors
/// Too many sockets of this kind.
pub fn make_icmp(family: u16, icmp: Icmp) -> Result<Arc<Socket>, Errno> {
    let socket = make_with(family, Kind::Datagram, Some(icmp));
    icmp::register(&socket)?;
    Ok(socket)
}

fn make_with(family: u16, kind: Kind, icmp: Option<Icmp>) -> Arc<Socket> {
    let me = task::current();
    let (uid, gid) = {
        let own = me.credentials.lock();
        (own.euid, own.egid)
    };
    make_of(family, kind, icmp, (me.process, uid, gid))
}

/// A new socket of that process, user and group.
fn make_for(family: u16, kind: Kind, owner: (u32, u32, u32)) -> Arc<Socket> {
    make_of(family, kind, None, owner)
}

fn make_of(family: u16, kind: Kind, icmp: Option<Icmp>, owner: (u32, u32, u32)) -> Arc<Socket> {
    Arc::new_cyclic(|weak| Socket {
        family,
        kind,
        icmp,
        number: NEXT.fetch_add(1, Ordering::Relaxed),
        owner,
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
        matches!(self.family, family::INET | family::INET6)
    }

    /// Whether two may hear of each other, and cannot have the same address.
    fn is_like(&self, other: &Self) -> bool {
        (self.kind, self.icmp) == (other.kind, other.icmp)
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

    /// The agent looks after it from now on.
    pub fn watch(&self) {
        self.state.lock().watched = true;
    }

    /// Wakes who waits for files, and the agent if the other end is its own. No state may be held.
    fn tell(&self) {
        task::wake(task::FILES);
        let peer = self.state.lock().peer.upgrade();
        if peer.is_some_and(|peer| peer.state.lock().watched) {
            task::wake(task::AGENT);
        }
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
        let wire = state.wire;
        drop(state);
        if let Some(Wire::Tcp(handle)) = wire
            && (level, name) == with::NO_DELAY
        {
            stack::set_no_delay(handle, value != 0);
        }
    }

    /// Binds to an address; to a file's for a path that was made.
    pub fn bind(&self, address: Address, node: Option<(u64, u64)>) -> Result<(), Errno> {
        if self.state.lock().local != Address::None {
            return Err(Errno::EINVAL);
        }
        if let Address::Netlink(wanted) = address {
            return self.name_netlink(wanted).map(|_| ());
        }
        let mut address = address;
        if let Address::Inet { port, .. } = &mut address {
            if self.icmp == Some(Icmp::Raw) {
                *port = 0;
            } else if *port == 0 {
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
        drop(state);
        // Without a network there is nobody to hear.
        let _ = self.open_port();
        Ok(())
    }

    /// Gives a netlink socket its number: the wanted one, or one of the kernel's choice.
    fn name_netlink(&self, wanted: u32) -> Result<u32, Errno> {
        let taken = |port| {
            named()
                .iter()
                .any(|s| s.addresses().0 == Address::Netlink(port))
        };
        let own = crate::container::visible(self.owner.0);
        let port = match wanted {
            0 => [own]
                .into_iter()
                .chain((1..4096).map(|i| u32::MAX - i))
                .find(|port| *port != 0 && !taken(*port))
                .ok_or(Errno::EADDRINUSE)?,
            port if taken(port) => return Err(Errno::EADDRINUSE),
            port => port,
        };
        NAMED.lock().push(Weak::clone(&self.me));
        self.state.lock().local = Address::Netlink(port);
        Ok(port)
    }

    fn in_use(&self, address: &Address) -> bool {
        let shares = |s: &Self, (level, name)| s.option(level, name).unwrap_or(0) != 0;
        named().iter().any(|other| {
            let (local, listens) = (other.addresses().0, other.listens());
            let same = other.is_like(self) && other.is_inet() && local.overlaps(address);
            let both = shares(self, with::REUSEPORT) && shares(other, with::REUSEPORT);
            // Connections that were accepted share their listener's port.
            let old = self.kind == Kind::Stream && !listens && shares(self, with::REUSEADDR);
            same && !both && !old && other.state.lock().peer.strong_count() == 0
        })
    }

    /// A port that nobody has, and that nobody can guess.
    fn free_port(&self) -> Result<u16, Errno> {
        let used: Vec<u16> = named()
            .iter()
            .filter(|s| s.is_like(self))
            .filter_map(|s| s.addresses().0.port())
            .collect();
        let range = EPHEMERAL.1 - EPHEMERAL.0 + 1;
        let mut start = [0; 2];
        cpu::random(&mut start);
        let start = u16::from_le_bytes(start) % range;
        (0..range)
            .map(|i| EPHEMERAL.0 + ((u32::from(start) + u32::from(i)) % u32::from(range)) as u16)
            .find(|port| !used.contains(port))
            .ok_or(Errno::EADDRNOTAVAIL)
    }

    /// Waits until `attempt` gives something, as long as the socket's time limit lets it.
    fn until<T>(
        &self,
        wait: bool,
        what: Waits,
        mut attempt: impl FnMut() -> Option<Result<T, Errno>>,
    ) -> Result<T, Errno> {
        if !wait {
            return attempt().unwrap_or(Err(Errno::EAGAIN));
        }
        let limit = self.limit(what);
        let deadline = (limit > 0).then(|| clock::monotonic_ns().saturating_add(limit));
        match task::wait_until(task::FILES, deadline, attempt) {
            Err(Errno::ETIMEDOUT) => Err(Errno::EAGAIN),
            other => other?,
        }
    }

    /// Nanoseconds that a call waits at most; 0: for ever.
    pub fn limit(&self, what: Waits) -> u64 {
        self.state.lock().limits[usize::from(what == Waits::Send)]
    }

    /// Sets how long calls wait.
    pub fn set_limit(&self, what: Waits, ns: u64) {
        self.state.lock().limits[usize::from(what == Waits::Send)] = ns;
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
            Phase::Connected | Phase::Connecting => return Err(Errno::EINVAL),
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
        let outside = self.is_inet() && !state.local.is_loopback();
        drop(state);
        if outside {
            stack::listen(Weak::clone(&self.me));
        }
        Ok(())
    }

    /// Takes a connection.
    pub fn accept(&self, wait: bool) -> Result<Arc<Self>, Errno> {
        let attempt = || match &mut self.state.lock().phase {
            Phase::Listening { queue, .. } => queue.pop_front().map(Ok),
            _ => Some(Err(Errno::EINVAL)),
        };
        let socket = self.until(wait, Waits::Receive, attempt)?;
        task::wake(task::FILES);
        Ok(socket)
    }

    /// Ends one direction, or both: 0 reading, 1 writing, 2 both.
    pub fn shutdown(&self, how: u32) -> Result<(), Errno> {
        if how > 2 {
            return Err(Errno::EINVAL);
        }
        let (peer, wire) = {
            let mut state = self.state.lock();
            if !matches!(state.phase, Phase::Connected) {
                return Err(Errno::ENOTCONN);
            }
            state.read_closed |= how != 1;
            state.write_closed |= how != 0;
            (state.peer.upgrade(), state.wire)
        };
        if let Some(Wire::Tcp(handle)) = wire
            && how != 0
        {
            stack::shut_down(handle);
        }
        if let Some(peer) = peer
            && how != 0
            && self.kind != Kind::Datagram
        {
            peer.state.lock().ended = true;
        }
        self.tell();
        Ok(())
    }

    /// Bytes that the other end of a connection within the machine has room for; `None`: it takes
    /// nothing any more.
    pub fn room(&self) -> Option<usize> {
        let peer = self.state.lock().peer.upgrade()?;
        let state = peer.state.lock();
        (!state.read_closed).then(|| BUFFER.saturating_sub(state.input.len()))
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
