//! Connections with others.

use alloc::sync::{Arc, Weak};
use alloc::vec;
use alloc::vec::Vec;
use core::net::SocketAddr;
use core::sync::atomic::Ordering;

use appkernel_core::errno::Errno;
use appkernel_core::packet::Ends;
use appkernel_hal::clock;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{self, State};
use smoltcp::time::Duration;
use smoltcp::wire::{IpAddress, IpEndpoint};

use super::super::Socket;
use super::{STACK, Stack, WORK, go};
use crate::task;

/// Of each direction of a connection.
const BUFFER: usize = 32 << 10;
/// Of a connection.
pub const BYTES: usize = 2 * BUFFER;
/// Connections at once.
const MAX_CONNECTIONS: usize = 2048;
/// Connections that others have begun and not finished; the oldest go first.
const MAX_HALF_OPEN: usize = 64;
const HALF_OPEN_NS: u64 = 20_000_000_000;
/// Connections that no program has any more, and those of them that only wait for stray packets;
/// what is left of them gets this long.
const MAX_ORPHANS: usize = 512;
const MAX_WAITING: usize = 32;
const ORPHAN_NS: u64 = 60_000_000_000;
/// Silence after which a connection is given up: one that is being made, and one with something
/// to be acknowledged.
const CONNECT: Duration = Duration::from_secs(120);
const SILENCE: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Begun by somebody else; the socket is the listening one.
    HalfOpen,
    /// Begun by its socket.
    Opening,
    Open,
    /// Its socket is closed.
    Orphan,
}

/// A connection.
pub struct Connection {
    handle: SocketHandle,
    phase: Phase,
    socket: Weak<Socket>,
    /// When the phase began.
    since: u64,
    /// Bytes that waited to be sent or acknowledged.
    queued: usize,
    /// The other side has ended it.
    ended: bool,
}

fn endpoint(at: SocketAddr) -> IpEndpoint {
    IpEndpoint::new(IpAddress::from(at.ip()), at.port())
}

fn address(at: IpEndpoint) -> SocketAddr {
    SocketAddr::new(at.addr.into(), at.port)
}

fn new_socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
    tcp::Socket::new(buffer(), buffer())
}

impl Stack {
    fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn connection(&mut self, handle: SocketHandle) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|c| c.handle == handle)
    }

    fn add(
        &mut self,
        socket: tcp::Socket<'static>,
        phase: Phase,
        of: Weak<Socket>,
    ) -> SocketHandle {
        let handle = self.sockets.add(socket);
        self.connections.push(Connection {
            handle,
            phase,
            socket: of,
            since: clock::monotonic_ns(),
            queued: 0,
            ended: false,
        });
        handle
    }

    fn forget(&mut self, handle: SocketHandle) {
        self.sockets.remove(handle);
        self.connections.retain(|c| c.handle != handle);
    }

    /// Somebody asks for a connection; whether the packet is to be looked at further.
    pub(super) fn opening(&mut self, ends: &Ends) -> bool {
        if !self.interface.has_ip_addr(IpAddress::from(ends.to.ip())) {
            return true;
        }
        let ends_of = |s: &tcp::Socket<'_>| Some((s.remote_endpoint()?, s.local_endpoint()?));
        let wanted = (endpoint(ends.from), endpoint(ends.to));
        let known = self
            .connections
            .iter()
            .map(|c| c.handle)
            .find(|h| ends_of(self.sockets.get(*h)) == Some(wanted));
        self.listeners.retain(|l| l.strong_count() > 0);
        let listening = self.listeners.iter().filter_map(Weak::upgrade);
        let best = listening
            .filter_map(|l| Some((l.listens_for(ends.to)?, l)))
            .min_by_key(|(rank, _)| *rank);
        // Nobody listens: the answer says so.
        let Some((_, listener)) = best else {
            return true;
        };
        if let Some(handle) = known {
            // What is left of the one before makes room, if no program has it any more.
            let left = self.tcp(handle).state() == State::TimeWait;
            let orphan = self.connection(handle).map(|c| c.phase) == Some(Phase::Orphan);
            if !left || !orphan {
                return true;
            }
            self.forget(handle);
        }
        let half_open = |c: &&Connection| c.phase == Phase::HalfOpen;
        let of_listener = Arc::downgrade(&listener);
        let own = self.connections.iter().filter(half_open);
        let own = own.filter(|c| c.socket.ptr_eq(&of_listener)).count();
        if !listener.has_place_for(own) {
            return false;
        }
        if self.connections.iter().filter(half_open).count() >= MAX_HALF_OPEN {
            let oldest = self.connections.iter().filter(half_open);
            if let Some(handle) = oldest.min_by_key(|c| c.since).map(|c| c.handle) {
                self.forget(handle);
            }
        }
        if self.connections.len() >= MAX_CONNECTIONS || !self.has_room_for(BYTES) {
            return false;
        }
        let mut socket = new_socket();
        socket.set_timeout(Some(SILENCE));
        if socket.listen(endpoint(ends.to)).is_err() {
            return false;
        }
        self.add(socket, Phase::HalfOpen, of_listener);
        true
    }

    /// Brings sockets up to date; whether anything is new for programs.
    pub(super) fn look(&mut self) -> bool {
        let mut moved = false;
        self.look_at_ports();
        self.look_at_icmp();
        let mut connections = core::mem::take(&mut self.connections);
        connections.retain_mut(|c| {
            let keep = match c.phase {
                Phase::HalfOpen => self.half_open(c, &mut moved),
                Phase::Opening => self.being_opened(c, &mut moved),
                Phase::Open => self.open(c, &mut moved),
                Phase::Orphan => self.orphan(c),
            };
            if !keep {
                self.sockets.remove(c.handle);
            }
            keep
        });
        self.thin_out(&mut connections, MAX_WAITING, |state| {
            state == State::TimeWait
        });
        self.thin_out(&mut connections, MAX_ORPHANS, |_| true);
        self.connections = connections;
        moved
    }

    /// Drops the oldest orphans in certain states, beyond so many.
    fn thin_out(&mut self, all: &mut Vec<Connection>, most: usize, of: impl Fn(State) -> bool) {
        let sockets = &mut self.sockets;
        let mut found: Vec<(u64, SocketHandle)> = all
            .iter()
            .filter(|c| c.phase == Phase::Orphan)
            .filter(|c| of(sockets.get::<tcp::Socket<'_>>(c.handle).state()))
            .map(|c| (c.since, c.handle))
            .collect();
        if found.len() <= most {
            return;
        }
        found.sort_by_key(|(since, _)| *since);
        found.truncate(found.len() - most);
        for (_, handle) in found {
            all.retain(|c| c.handle != handle);
            sockets.remove(handle);
        }
    }

    fn half_open(&mut self, c: &mut Connection, moved: &mut bool) -> bool {
        let old = clock::monotonic_ns() >= c.since.saturating_add(HALF_OPEN_NS);
        let socket = self.tcp(c.handle);
        match socket.state() {
            // The packet was no good; or nobody answers any more.
            State::Listen | State::Closed => return false,
            State::SynReceived => return !old,
            _ => {}
        }
        let ends = socket.local_endpoint().zip(socket.remote_endpoint());
        let listener = c.socket.upgrade();
        let accepted = listener.zip(ends).and_then(|(listener, (local, remote))| {
            listener.arrived(address(local), address(remote), c.handle)
        });
        c.since = clock::monotonic_ns();
        let Some(accepted) = accepted else {
            self.tcp(c.handle).abort();
            c.phase = Phase::Orphan;
            return true;
        };
        let no_delay = accepted.wants_no_delay();
        self.tcp(c.handle).set_nagle_enabled(!no_delay);
        c.socket = Arc::downgrade(&accepted);
        c.phase = Phase::Open;
        *moved = true;
        self.open(c, moved)
    }

    fn being_opened(&mut self, c: &mut Connection, moved: &mut bool) -> bool {
        let state = self.tcp(c.handle).state();
        if matches!(state, State::SynSent | State::SynReceived) {
            return true;
        }
        let Some(socket) = c.socket.upgrade() else {
            c.phase = Phase::Orphan;
            return true;
        };
        *moved = true;
        if state == State::Closed {
            let waited = clock::monotonic_ns().saturating_sub(c.since) / 1000;
            socket.failed(if waited >= CONNECT.total_micros() {
                Errno::ETIMEDOUT
            } else {
                Errno::ECONNREFUSED
            });
            return false;
        }
        self.tcp(c.handle).set_timeout(Some(SILENCE));
        socket.opened();
        c.phase = Phase::Open;
        self.open(c, moved)
    }

    fn open(&mut self, c: &mut Connection, moved: &mut bool) -> bool {
        let smol = self.sockets.get_mut::<tcp::Socket<'_>>(c.handle);
        let Some(socket) = c.socket.upgrade() else {
            // Nobody told us; it was not closed but lost.
            smol.abort();
            c.phase = Phase::Orphan;
            return true;
        };
        while smol.can_recv() {
            let taken = smol.recv(|bytes| {
                let taken = socket.take_in(bytes);
                (taken, taken)
            });
            match taken {
                Ok(1..) => *moved = true,
                _ => break,
            }
        }
        c.ended |= matches!(
            smol.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
        let queued = smol.send_queue();
        if queued < c.queued {
            socket.has_sent(c.queued - queued);
            *moved = true;
        }
        c.queued = queued;
        if !smol.may_recv() {
            let lost = smol.state() == State::Closed;
            let error = match () {
                () if !lost || c.ended && queued == 0 => None,
                () if smol.remote_endpoint().is_some() => Some(Errno::ETIMEDOUT),
                () if c.ended => Some(Errno::EPIPE),
                () => Some(Errno::ECONNRESET),
            };
            *moved |= socket.at_end(lost, error);
        }
        true
    }

    fn orphan(&mut self, c: &Connection) -> bool {
        let age = clock::monotonic_ns().saturating_sub(c.since);
        let socket = self.tcp(c.handle);
        // Nobody reads what still comes.
        let _ = socket.recv(|bytes| (bytes.len(), ()));
        match socket.state() {
            // It may have to say so to the other side first.
            State::Closed => socket.remote_endpoint().is_some() && age < 2 * ORPHAN_NS,
            _ if age >= ORPHAN_NS => {
                socket.abort();
                true
            }
            _ => true,
        }
    }

    /// When connections have to be looked at though nothing happens.
    pub(super) fn deadline(&self) -> Option<u64> {
        let limits = self.connections.iter().filter_map(|c| match c.phase {
            Phase::HalfOpen => Some(c.since.saturating_add(HALF_OPEN_NS)),
            Phase::Orphan => Some(c.since.saturating_add(ORPHAN_NS)),
            Phase::Opening | Phase::Open => None,
        });
        let now = clock::monotonic_ns();
        limits
            .filter(|at| *at > now)
            .chain(self.ports_deadline())
            .chain(self.icmp_deadline())
            .min()
    }
}

/// With a connection that a program has.
fn with<T>(
    handle: SocketHandle,
    f: impl FnOnce(&mut tcp::Socket<'static>, &mut Connection) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let mut stack = STACK.lock();
    let stack = stack.as_mut().ok_or(Errno::ENETUNREACH)?;
    let mut connections = stack.connections.iter_mut();
    let connection = connections.find(|c| c.handle == handle);
    let connection = connection.ok_or(Errno::ENOTCONN)?;
    f(stack.sockets.get_mut(handle), connection)
}

/// Begins a connection; `begun` is told its handle before anything happens.
///
/// # Errors
/// `ENOBUFS`: too many connections or too little memory; `EADDRNOTAVAIL`: not with these addresses.
pub fn connect(
    socket: Weak<Socket>,
    local: SocketAddr,
    remote: SocketAddr,
    no_delay: bool,
    begun: impl FnOnce(SocketHandle),
) -> Result<(), Errno> {
    {
        let mut stack = STACK.lock();
        let stack = stack.as_mut().ok_or(Errno::ENETUNREACH)?;
        if stack.connections.len() >= MAX_CONNECTIONS || !stack.has_room_for(BYTES) {
            return Err(Errno::ENOBUFS);
        }
        let mut smol = new_socket();
        smol.set_timeout(Some(CONNECT));
        smol.set_nagle_enabled(!no_delay);
        smol.connect(stack.interface.context(), endpoint(remote), endpoint(local))
            .map_err(|_| Errno::EADDRNOTAVAIL)?;
        begun(stack.add(smol, Phase::Opening, socket));
    }
    go();
    Ok(())
}

/// Others may connect to this socket from now on.
pub fn listen(socket: Weak<Socket>) {
    if let Some(stack) = STACK.lock().as_mut() {
        stack.listeners.retain(|l| l.strong_count() > 0);
        if !stack.listeners.iter().any(|l| l.ptr_eq(&socket)) {
            stack.listeners.push(socket);
        }
    }
}

/// Sends as much as there is room for; gives how much that was.
///
/// # Errors
/// `EPIPE`: the connection takes nothing any more.
pub fn send(handle: SocketHandle, bytes: &[u8]) -> Result<usize, Errno> {
    let sent = with(handle, |smol, c| {
        let sent = smol.send_slice(bytes).map_err(|_| Errno::EPIPE)?;
        c.queued = smol.send_queue();
        Ok(sent)
    })?;
    if sent > 0 {
        go();
    }
    Ok(sent)
}

/// Whether something can be sent, or never will.
pub fn room(handle: SocketHandle) -> bool {
    let room = with(handle, |smol, _| Ok(smol.can_send() || !smol.may_send()));
    room.unwrap_or(true)
}

/// A program has read: there may be room for what waits.
pub fn drained(handle: SocketHandle) {
    if with(handle, |smol, _| Ok(smol.can_recv())) == Ok(true) {
        go();
    }
}

/// Nothing more will be sent after what was.
pub fn shut_down(handle: SocketHandle) {
    let _ = with(handle, |smol, _| {
        smol.close();
        Ok(())
    });
    go();
}

/// Small pieces are sent at once.
pub fn set_no_delay(handle: SocketHandle, on: bool) {
    let _ = with(handle, |smol, _| {
        smol.set_nagle_enabled(!on);
        Ok(())
    });
}

/// Its program is done with the connection; `abort` if it left something unread.
pub fn close(handle: SocketHandle, abort: bool) {
    let _ = with(handle, |smol, c| {
        if abort {
            smol.abort();
        } else {
            smol.close();
        }
        c.phase = Phase::Orphan;
        c.socket = Weak::new();
        c.since = clock::monotonic_ns();
        Ok(())
    });
    // Not at once: a program may be ending.
    WORK.store(true, Ordering::Relaxed);
    task::wake(task::NETWORK);
}

/// A connection as /proc/net/tcp shows it.
pub struct Shown {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub state: u8,
}

/// All connections with others.
pub fn all() -> Vec<Shown> {
    let mut stack = STACK.lock();
    let Some(stack) = stack.as_mut() else {
        return Vec::new();
    };
    let mut shown = Vec::new();
    for c in &stack.connections {
        let smol = stack.sockets.get::<tcp::Socket<'_>>(c.handle);
        let Some((local, remote)) = smol.local_endpoint().zip(smol.remote_endpoint()) else {
            continue;
        };
        shown.push(Shown {
            local: address(local),
            remote: address(remote),
            state: match smol.state() {
                State::Established => 1,
                State::SynSent => 2,
                State::SynReceived => 3,
                State::FinWait1 => 4,
                State::FinWait2 => 5,
                State::TimeWait => 6,
                State::Closed => 7,
                State::CloseWait => 8,
                State::LastAck => 9,
                State::Listen => 10,
                State::Closing => 11,
            },
        });
    }
    shown
}
