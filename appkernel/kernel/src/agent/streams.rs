//! What a connection of the host is: calls, or bytes of a program.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use appkernel_core::errno::Errno;
use appkernel_hal::clock;
use bulkhead_protocol::frame::Decoder;
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::{STREAM_CLAIM_SECONDS, stream};

use super::vsock::{Key, Vsock};
use super::{Agent, status};
use crate::fs::file::Object;
use crate::fs::pipe::{End, Pipe};
use crate::fs::pty::Pty;
use crate::net::{self, Address, Socket, family};

const CLAIM_NS: u64 = STREAM_CLAIM_SECONDS * 1_000_000_000;
/// Bytes moved at once.
const CHUNK: usize = 32 << 10;
/// Streams that wait to be named, at most.
const MAX_WAITING: usize = 1024;

/// What is on the other side of a program's stream.
#[derive(Clone)]
pub enum Channel {
    Pipe(Arc<Pipe>),
    /// The terminal's master.
    Pty(Arc<Pty>),
}

/// What a connection is for.
pub enum Role {
    /// Calls.
    Control {
        decoder: Decoder,
        output: VecDeque<u8>,
    },
    /// A stream whose name is not known yet; since when.
    Header(Vec<u8>, u64),
    /// A stream that no call has named yet; since when.
    Named(String, u64),
    /// Standard input of a program. `closing`: it ends after what has arrived.
    Input {
        to: Channel,
        closing: bool,
        ended: bool,
    },
    /// Output of a program. `draining`: it has ended.
    Output { from: Channel, draining: bool },
    /// A connection to a port of the loopback; whether all of each direction is through.
    Forward {
        socket: Arc<Socket>,
        sent: bool,
        received: bool,
    },
    /// Nothing more will be said; until the host agrees.
    Ending,
}

impl Role {
    /// When it has waited too long.
    pub fn deadline(&self) -> Option<u64> {
        match self {
            Self::Header(_, since) | Self::Named(_, since) => Some(since.saturating_add(CLAIM_NS)),
            _ => None,
        }
    }
}

/// A stream's turn: whether anything moved, and whether the connection is kept.
pub fn serve(vsock: &mut Vsock, key: Key, role: &mut Role) -> (bool, bool) {
    if role
        .deadline()
        .is_some_and(|at| clock::monotonic_ns() >= at)
    {
        return (true, false);
    }
    match role {
        Role::Control { .. } => (false, true),
        Role::Header(line, since) => {
            if vsock.waiting(key) == 0 {
                return (false, !vsock.at_end(key));
            }
            // Byte by byte: what follows the line belongs to the program.
            line.extend(vsock.read(key, 1));
            match stream::parse_header(line) {
                Ok(None) => (true, true),
                Ok(Some((id, _))) if id.starts_with(stream::TCP) => match reach(&id) {
                    Ok(socket) => {
                        let taken = vsock.write(key, stream::OK) == stream::OK.len();
                        *role = Role::Forward {
                            socket,
                            sent: false,
                            received: false,
                        };
                        (true, taken)
                    }
                    Err(refusal) => {
                        vsock.write(key, &refusal);
                        (true, false)
                    }
                },
                Ok(Some((id, _))) => {
                    let since = *since;
                    // A new connection has room for three bytes.
                    if vsock.write(key, stream::OK) != stream::OK.len() {
                        return (true, false);
                    }
                    *role = Role::Named(id, since);
                    (true, true)
                }
                Err(_) => {
                    vsock.write(key, &stream::error_answer("bad stream header"));
                    (true, false)
                }
            }
        }
        Role::Named(..) => (false, !vsock.is_refused(key)),
        Role::Input { to, closing, ended } => {
            let (to, closing) = (to.clone(), *closing);
            input(vsock, key, &to, closing, ended)
        }
        Role::Output { from, draining } => {
            let (from, draining) = (from.clone(), *draining);
            output(vsock, key, &from, draining, role)
        }
        Role::Forward {
            socket,
            sent,
            received,
        } => {
            let socket = Arc::clone(socket);
            let moved =
                to_port(vsock, key, &socket, sent) | from_port(vsock, key, &socket, received);
            let over = *sent && *received || vsock.is_refused(key);
            if over {
                socket.closed();
            }
            (moved, !over)
        }
        Role::Ending => (false, !vsock.at_end(key) && !vsock.is_refused(key)),
    }
}

/// Connects to the port that an id names; or the answer that says why not.
fn reach(id: &str) -> Result<Arc<Socket>, Vec<u8>> {
    let port = id.strip_prefix(stream::TCP).and_then(|p| p.parse().ok());
    let port: u16 = port.ok_or_else(|| stream::error_answer("no port number"))?;
    let mut error = Errno::ECONNREFUSED;
    for (of, ip) in [
        (family::INET, IpAddr::V4(Ipv4Addr::LOCALHOST)),
        (family::INET6, IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ] {
        let socket = net::make(of, net::Kind::Stream);
        socket.watch();
        let to = Address::from_ip(ip, port, of == family::INET6);
        match socket.connect(to, None, false) {
            Ok(()) => return Ok(socket),
            Err(e) => error = e,
        }
        socket.closed();
    }
    let reason = alloc::format!("port {port} of the sandbox: {}", error.name());
    Err(stream::error_answer(&reason))
}

/// Moves what the host sent to the program; whether that was anything.
fn to_port(vsock: &mut Vsock, key: Key, socket: &Socket, done: &mut bool) -> bool {
    let mut moved = false;
    while !*done {
        let waiting = vsock.waiting(key);
        let room = socket.room();
        if waiting == 0 && vsock.at_end(key) || room.is_none() {
            let _ = socket.shutdown(1);
            *done = true;
            return true;
        }
        let count = waiting.min(room.unwrap_or(0)).min(CHUNK);
        if count == 0 {
            break;
        }
        let bytes = vsock.read(key, count);
        let _ = socket.send(&bytes, &[], None, false);
        moved = true;
    }
    moved
}

/// Moves what the program sent to the host; whether that was anything.
fn from_port(vsock: &mut Vsock, key: Key, socket: &Socket, done: &mut bool) -> bool {
    let mut moved = false;
    while !*done {
        let room = vsock.room(key);
        if room == 0 {
            break;
        }
        match socket.receive(room.min(CHUNK), false, false) {
            Ok(packet) if !packet.bytes.is_empty() => {
                vsock.write(key, &packet.bytes);
            }
            Err(Errno::EAGAIN) => break,
            Ok(_) | Err(_) => {
                vsock.finish(key);
                *done = true;
            }
        }
        moved = true;
    }
    moved
}

fn input(
    vsock: &mut Vsock,
    key: Key,
    to: &Channel,
    closing: bool,
    ended: &mut bool,
) -> (bool, bool) {
    if *ended {
        return (false, !vsock.at_end(key) && !vsock.is_refused(key));
    }
    let mut moved = false;
    loop {
        let waiting = vsock.waiting(key);
        let room = match to {
            Channel::Pipe(pipe) => pipe.room(),
            Channel::Pty(pty) => pty.input_room(),
        };
        let Some(room) = room else {
            // The program has closed its input: nobody wants the rest.
            return (moved, false);
        };
        let count = waiting.min(room).min(CHUNK);
        if count == 0 {
            let finished = waiting == 0 && (closing || vsock.at_end(key));
            if !finished {
                return (moved, true);
            }
            match to {
                Channel::Pipe(pipe) => pipe.close(End::Write),
                Channel::Pty(pty) => pty.input_ended(),
            }
            *ended = true;
            return (true, !vsock.at_end(key));
        }
        let bytes = vsock.read(key, count);
        moved = true;
        match to {
            Channel::Pipe(pipe) => {
                let _ = pipe.write(&bytes, false);
            }
            Channel::Pty(pty) => pty.input(&bytes),
        }
    }
}

fn output(
    vsock: &mut Vsock,
    key: Key,
    from: &Channel,
    draining: bool,
    role: &mut Role,
) -> (bool, bool) {
    let mut moved = false;
    loop {
        // The host has gone: the program must not block on that. It writes to nobody.
        let refused = vsock.is_refused(key);
        let room = if refused { CHUNK } else { vsock.room(key) };
        if room == 0 {
            return (moved, true);
        }
        let mut buffer = alloc::vec![0; room.min(CHUNK)];
        let got = match from {
            Channel::Pipe(pipe) => pipe.read(&mut buffer, false),
            Channel::Pty(pty) => pty.take_output(&mut buffer),
        };
        match got {
            Ok(count @ 1..) => {
                moved = true;
                if !refused {
                    vsock.write(key, buffer.get(..count).unwrap_or_default());
                }
            }
            // Nothing, and somebody may write still: after the program's end only what it left
            // behind, whose output is nobody's.
            Err(_) if !draining => return (moved, true),
            Ok(_) | Err(_) => {
                if let Channel::Pipe(pipe) = from {
                    pipe.close(End::Read);
                }
                vsock.finish(key);
                *role = Role::Ending;
                return (true, true);
            }
        }
    }
}

impl Agent {
    /// Takes the stream that a call names; nothing for an empty name.
    pub(super) fn take_stream(&mut self, uri: &str) -> Result<Option<Key>, Status> {
        if uri.is_empty() {
            return Ok(None);
        }
        let Some(id) = uri.strip_prefix(stream::SCHEME) else {
            return Err(status(
                Code::InvalidArgument,
                alloc::format!("stdio {uri:?} is not of the form {}<id>", stream::SCHEME),
            ));
        };
        let waiting = self
            .roles
            .iter()
            .filter(|(_, r)| matches!(r, Role::Named(..)));
        if waiting.clone().count() > MAX_WAITING {
            return Err(status(Code::ResourceExhausted, "too many streams wait"));
        }
        let found = waiting
            .filter(|(_, role)| matches!(role, Role::Named(name, _) if name == id))
            .map(|(key, _)| *key)
            .next();
        found.map(Some).ok_or_else(|| {
            status(
                Code::FailedPrecondition,
                alloc::format!(
                    "stream {id:?} is not connected; open it on port {} before naming it",
                    bulkhead_protocol::STREAM_PORT
                ),
            )
        })
    }
}
