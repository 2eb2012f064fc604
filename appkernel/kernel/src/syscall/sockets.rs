//! Calls on sockets.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_hal::usercopy;

use super::{Call, Result, get, get_u64, paths, put, socket_options};
use crate::fs;
use crate::fs::file::{File, Kind as FileKind, flag};
use crate::fs::node::kind;
use crate::net::{self, Address, Icmp, Kind, Socket, family, interface};
use crate::signal::{self, Info, Signal};

/// Flags of messages.
mod message {
    pub const PEEK: u32 = 2;
    pub const CTRUNC: u32 = 8;
    pub const TRUNC: u32 = 0x20;
    pub const DONTWAIT: u32 = 0x40;
    pub const WAITALL: u32 = 0x100;
    pub const NOSIGNAL: u32 = 0x4000;
    pub const CMSG_CLOEXEC: u32 = 0x4000_0000;
}
pub const SOL_SOCKET: u32 = 1;
/// In the type of a new socket.
const NONBLOCK: u32 = 0o4000;
const CLOEXEC: u32 = 0o2_000_000;
/// Most bytes of one call.
const MAX_BYTES: usize = 64 << 10;
/// Most bytes beside a message.
const MAX_CONTROL: usize = 4096;
const MAX_PASSED: usize = 253;
/// The capability that raw sockets take.
const NET_RAW: u32 = 13;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        41 => make(c),
        42 => connect(c),
        43 => accept(c, 0),
        288 => accept(c, c.uint(3)),
        44 => send_to(c),
        45 => receive_from(c),
        46 => send_message(c, c.arg(1), c.uint(2)),
        47 => receive_message(c, c.arg(1), c.uint(2)),
        48 => socket(c, 0).and_then(|file| with(&file)?.shutdown(c.uint(1)).map(|()| 0)),
        49 => bind(c),
        50 => socket(c, 0).and_then(|file| with(&file)?.listen(c.uint(1)).map(|()| 0)),
        51 => name(c, false),
        52 => name(c, true),
        53 => pair(c),
        54 => socket_options::set(c),
        55 => socket_options::get_option(c),
        299 => many(c, receive_message),
        307 => many(c, send_message),
        _ => return None,
    })
}

pub fn socket(c: &Call<'_>, i: usize) -> Result<Arc<File>> {
    let file = c.task.used_file(c.int(i))?;
    with(&file)?;
    Ok(file)
}

pub fn with(file: &File) -> Result<&Socket> {
    file.object::<Socket>().ok_or(Errno::ENOTSOCK)
}

fn insert(c: &Call<'_>, socket: Arc<Socket>, flags: u32) -> Result<i32> {
    let status = if flags & NONBLOCK != 0 {
        flag::NONBLOCK
    } else {
        0
    };
    let file = Arc::new(File::new(FileKind::Object(socket), status | 2));
    c.task.files().lock().insert(file, 0, flags & CLOEXEC != 0)
}

fn kinds(c: &Call<'_>) -> Result<(u16, Kind)> {
    let of = u16::try_from(c.uint(0)).map_err(|_| Errno::EAFNOSUPPORT)?;
    const RAW: u32 = 3;
    const LARGEST: u32 = 10;
    if c.uint(1) & !(NONBLOCK | CLOEXEC) > LARGEST {
        return Err(Errno::EINVAL);
    }
    let kind = match (of, c.uint(1) & 0xf) {
        (family::UNIX | family::INET | family::INET6, 1) => Kind::Stream,
        (family::UNIX | family::INET | family::INET6, 2) => Kind::Datagram,
        (family::UNIX, 5) => Kind::Packets,
        (family::NETLINK, 2 | 3) => {
            // Only what is asked about interfaces.
            return if c.uint(2) == 0 {
                Ok((of, Kind::Datagram))
            } else {
                Err(Errno::EPROTONOSUPPORT)
            };
        }
        (family::NETLINK, _) => return Err(Errno::ESOCKTNOSUPPORT),
        (family::INET | family::INET6, RAW) if c.uint(2) == 0 => {
            return Err(Errno::EPROTONOSUPPORT);
        }
        (family::UNIX | family::INET | family::INET6, _) => return Err(Errno::ESOCKTNOSUPPORT),
        _ => return Err(Errno::EAFNOSUPPORT),
    };
    let fits = match (of, kind, c.uint(2)) {
        (_, _, 0) | (family::UNIX, _, 1) => true,
        (family::UNIX, ..) => false,
        (_, Kind::Stream, protocol) => protocol == 6,
        (_, _, protocol) => protocol == 17,
    };
    if !fits {
        return Err(Errno::EPROTONOSUPPORT);
    }
    Ok((of, kind))
}

/// A socket for ICMP, if that is what is asked for.
fn icmp(c: &Call<'_>) -> Result<Option<(u16, Icmp)>> {
    const DATAGRAM: u32 = 2;
    const RAW: u32 = 3;
    let of = match (c.uint(0), c.uint(2)) {
        (2, 1) => family::INET,
        (10, 58) => family::INET6,
        _ => return Ok(None),
    };
    match c.uint(1) & !(NONBLOCK | CLOEXEC) {
        DATAGRAM => Ok(Some((of, Icmp::Ping))),
        RAW if c.task.credentials.lock().capabilities.has(NET_RAW) => Ok(Some((of, Icmp::Raw))),
        RAW => Err(Errno::EPERM),
        _ => Ok(None),
    }
}

fn make(c: &Call<'_>) -> Result {
    if let Some((of, icmp)) = icmp(c)? {
        return insert(c, net::make_icmp(of, icmp)?, c.uint(1)).map(|fd| fd as u64);
    }
    let (of, kind) = kinds(c)?;
    insert(c, net::make(of, kind), c.uint(1)).map(|fd| fd as u64)
}

fn pair(c: &Call<'_>) -> Result {
    let (of, kind) = kinds(c)?;
    if of != family::UNIX {
        return Err(Errno::EOPNOTSUPP);
    }
    let (a, b) = net::pair(of, kind);
    let first = insert(c, a, c.uint(1))?;
    let close = |fd| {
        let file = c.task.files().lock().remove(fd);
        drop(file);
    };
    let second = insert(c, b, c.uint(1)).inspect_err(|_| close(first))?;
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_le_bytes());
    bytes[4..].copy_from_slice(&second.to_le_bytes());
    put(c.arg(3), &bytes).inspect_err(|_| {
        close(first);
        close(second);
    })?;
    Ok(0)
}

fn address(at: u64, len: u64) -> Result<Address> {
    const LONGEST: u64 = 128;
    if len > LONGEST {
        return Err(Errno::EINVAL);
    }
    let mut bytes = vec![0; len as usize];
    usercopy::read(&mut bytes, at).map_err(|_| Errno::EFAULT)?;
    Address::parse(&bytes)
}

/// The file that a unix socket's path leads to.
fn node_of(c: &Call<'_>, address: &Address) -> Result<Option<(u64, u64)>> {
    let Address::Path(path) = address else {
        return Ok(None);
    };
    let cwd = c.task.place.lock().cwd.clone();
    let found = fs::resolve(&c.task.container, &cwd, path, true)?;
    if found.node.kind() != kind::SOCKET {
        return Err(Errno::ECONNREFUSED);
    }
    let credentials = c.task.credentials.lock().clone();
    if !credentials.may(&found.node.attributes()?, crate::task::may::WRITE) {
        return Err(Errno::EACCES);
    }
    Ok(Some(found.node.identity()))
}

fn check_family(socket: &Socket, address: &Address) -> Result<()> {
    let fits = match address {
        Address::None => true,
        Address::Path(_) | Address::Abstract(_) => socket.family == family::UNIX,
        Address::Netlink(_) => socket.family == family::NETLINK,
        Address::Inet { v6, .. } => socket.family == if *v6 { family::INET6 } else { family::INET },
    };
    if fits {
        Ok(())
    } else {
        Err(Errno::EAFNOSUPPORT)
    }
}

fn bind(c: &Call<'_>) -> Result {
    let file = socket(c, 0)?;
    let socket = with(&file)?;
    let mut address = address(c.arg(1), c.arg(2) & 0xffff_ffff)?;
    check_family(socket, &address)?;
    let mut node = None;
    match &address {
        Address::None if socket.family == family::UNIX => {
            // A name of the kernel's choice.
            let mut name = [0; 5];
            appkernel_hal::cpu::random(&mut name);
            let text = name
                .iter()
                .map(|b| b"0123456789abcdef"[usize::from(b & 15)]);
            address = Address::Abstract(text.collect());
        }
        Address::None => return Err(Errno::EINVAL),
        Address::Path(path) => {
            if socket.addresses().0 != Address::None {
                return Err(Errno::EINVAL);
            }
            let cwd = c.task.place.lock().cwd.clone();
            let place = fs::walk(&c.task.container, &cwd, path, false)?;
            if place.found.is_some() {
                return Err(Errno::EADDRINUSE);
            }
            paths::changes(c, &place)?;
            let umask = c.task.place.lock().umask;
            let owner = c.task.credentials.lock().owner();
            let mode = kind::SOCKET | 0o777 & !umask;
            place.directory.make_special(&place.name, mode, 0, owner)?;
            node = Some(place.directory.lookup(&place.name)?.identity());
        }
        Address::Inet { port, .. } => {
            if !address.is_own() {
                return Err(Errno::EADDRNOTAVAIL);
            }
            const PRIVILEGED: core::ops::Range<u16> = 1..1024;
            if PRIVILEGED.contains(port) && !c.task.credentials.lock().is_root() {
                return Err(Errno::EACCES);
            }
        }
        Address::Abstract(_) | Address::Netlink(_) => {}
    }
    socket.bind(address, node)?;
    Ok(0)
}

fn connect(c: &Call<'_>) -> Result {
    let file = socket(c, 0)?;
    let socket = with(&file)?;
    let address = address(c.arg(1), c.arg(2) & 0xffff_ffff)?;
    check_family(socket, &address)?;
    let node = node_of(c, &address)?;
    socket.connect(address, node, file.waits())?;
    Ok(0)
}

fn put_address(address: &Address, of: u16, to: u64, len_at: u64) -> Result<()> {
    if to == 0 {
        return Ok(());
    }
    let bytes = address.encode(of);
    let room = i32::from_le_bytes(get(len_at)?);
    let room = usize::try_from(room).map_err(|_| Errno::EINVAL)?;
    put(to, bytes.get(..bytes.len().min(room)).unwrap_or_default())?;
    put(len_at, &(bytes.len() as u32).to_le_bytes())
}

fn accept(c: &Call<'_>, flags: u32) -> Result {
    let file = socket(c, 0)?;
    let listener = with(&file)?;
    if flags & !(NONBLOCK | CLOEXEC) != 0 {
        return Err(Errno::EINVAL);
    }
    if listener.kind == Kind::Datagram {
        return Err(Errno::EOPNOTSUPP);
    }
    if c.arg(1) != 0 && i32::from_le_bytes(get(c.arg(2))?) < 0 {
        return Err(Errno::EINVAL);
    }
    let socket = listener.accept(file.waits())?;
    let (_, remote) = socket.addresses();
    let of = socket.family;
    let fd = insert(c, socket, flags)?;
    put_address(&remote.unwrap_or_default(), of, c.arg(1), c.arg(2))?;
    Ok(fd as u64)
}

fn name(c: &Call<'_>, other: bool) -> Result {
    let file = socket(c, 0)?;
    let socket = with(&file)?;
    let (local, remote) = socket.addresses();
    let address = if other {
        remote.ok_or(Errno::ENOTCONN)?
    } else {
        local
    };
    let address = match address {
        Address::None if socket.family != family::UNIX => Address::any(socket.family),
        address => address,
    };
    if c.arg(1) == 0 {
        get::<4>(c.arg(2))?;
        return Err(Errno::EFAULT);
    }
    put_address(&address, socket.family, c.arg(1), c.arg(2))?;
    Ok(0)
}

fn broken(c: &Call<'_>, flags: u32, e: Errno) -> Errno {
    if e == Errno::EPIPE && flags & message::NOSIGNAL == 0 {
        signal::send(c.task, Signal::PIPE, Info::default());
    }
    e
}

fn send_to(c: &Call<'_>) -> Result {
    let file = socket(c, 0)?;
    let socket = with(&file)?;
    let flags = c.uint(3);
    check_send(socket, flags)?;
    let mut bytes = vec![0; (c.arg(2) as usize).min(MAX_BYTES)];
    usercopy::read(&mut bytes, c.arg(1)).map_err(|_| Errno::EFAULT)?;
    let to = target(c, socket, c.arg(4), c.arg(5) & 0xffff_ffff)?;
    let wait = file.waits() && flags & message::DONTWAIT == 0;
    let sent = socket
        .send(&bytes, &[], to, wait)
        .map_err(|e| broken(c, flags, e))?;
    Ok(sent as u64)
}

type Target = Option<(Address, Option<(u64, u64)>)>;

fn target(c: &Call<'_>, socket: &Socket, at: u64, len: u64) -> Result<Target> {
    if at == 0 || len == 0 || socket.kind != Kind::Datagram || socket.family == family::NETLINK {
        return Ok(None);
    }
    let address = address(at, len)?;
    check_family(socket, &address)?;
    let node = node_of(c, &address)?;
    Ok(Some((address, node)))
}

/// There is no urgent data, and no queue of errors.
fn check_receive(flags: u32) -> Result<()> {
    const OOB: u32 = 1;
    const ERROR_QUEUE: u32 = 0x2000;
    match flags {
        _ if flags & OOB != 0 => Err(Errno::EINVAL),
        _ if flags & ERROR_QUEUE != 0 => Err(Errno::EAGAIN),
        _ => Ok(()),
    }
}

/// Urgent data is for streams.
fn check_send(socket: &Socket, flags: u32) -> Result<()> {
    const OOB: u32 = 1;
    if flags & OOB != 0 && (socket.kind != Kind::Stream || socket.family == family::UNIX) {
        return Err(Errno::EOPNOTSUPP);
    }
    Ok(())
}

fn receive_from(c: &Call<'_>) -> Result {
    let file = socket(c, 0)?;
    let socket = with(&file)?;
    let flags = c.uint(3);
    check_receive(flags)?;
    if c.arg(4) != 0 && i32::from_le_bytes(get(c.arg(5))?) < 0 {
        return Err(Errno::EINVAL);
    }
    let room = (c.arg(2) as usize).min(MAX_BYTES);
    let wait = file.waits() && flags & message::DONTWAIT == 0;
    let mut packet = socket.receive(room, flags & message::PEEK != 0, wait)?;
    // All that was asked for, unless the other side ends.
    while flags & message::WAITALL != 0
        && flags & message::PEEK == 0
        && socket.kind == Kind::Stream
        && packet.bytes.len() < room
        && !packet.bytes.is_empty()
    {
        match socket.receive(room - packet.bytes.len(), false, wait) {
            Ok(more) if !more.bytes.is_empty() => packet.bytes.extend(more.bytes),
            _ => break,
        }
    }
    let count = packet.bytes.len().min(room);
    put(c.arg(1), packet.bytes.get(..count).unwrap_or_default())?;
    let nobody = matches!(packet.from, Address::None) && socket.family == family::UNIX;
    if socket.kind == Kind::Datagram && !nobody {
        put_address(&packet.from, socket.family, c.arg(4), c.arg(5))?;
    } else if c.arg(5) != 0 {
        put(c.arg(5), &0u32.to_le_bytes())?;
    }
    Ok(if flags & message::TRUNC != 0 {
        packet.bytes.len() as u64
    } else {
        count as u64
    })
}

/// The parts of a message in the program's memory: address and length of each.
fn parts(at: u64, count: u64) -> Result<Vec<(u64, usize)>> {
    if count > 1024 {
        return Err(Errno::EMSGSIZE);
    }
    let mut all = Vec::new();
    let mut total = 0usize;
    for i in 0..count {
        let entry = at.wrapping_add(i * 16);
        let (base, len) = (get_u64(entry)?, get_u64(entry.wrapping_add(8))? as usize);
        let len = len.min(MAX_BYTES - total);
        total += len;
        all.push((base, len));
    }
    Ok(all)
}

fn send_message(c: &Call<'_>, at: u64, flags: u32) -> Result {
    let file = socket(c, 0)?;
    let socket = with(&file)?;
    check_send(socket, flags)?;
    let (name, name_len) = (get_u64(at)?, get_u64(at.wrapping_add(8))? & 0xffff_ffff);
    let mut bytes = Vec::new();
    for (base, len) in parts(get_u64(at.wrapping_add(16))?, get_u64(at.wrapping_add(24))?)? {
        let start = bytes.len();
        bytes.resize(start + len, 0);
        let piece = bytes.get_mut(start..).unwrap_or_default();
        usercopy::read(piece, base).map_err(|_| Errno::EFAULT)?;
    }
    let files = passed_files(
        c,
        get_u64(at.wrapping_add(32))?,
        get_u64(at.wrapping_add(40))? as usize,
    )?;
    let to = target(c, socket, name, name_len)?;
    let wait = file.waits() && flags & message::DONTWAIT == 0;
    let sent = socket
        .send(&bytes, &files, to, wait)
        .map_err(|e| broken(c, flags, e))?;
    Ok(sent as u64)
}

/// Files in the control part of a message.
fn passed_files(c: &Call<'_>, at: u64, len: usize) -> Result<Vec<Arc<File>>> {
    const RIGHTS: u32 = 1;
    let mut files = Vec::new();
    if at == 0 || len == 0 {
        return Ok(files);
    }
    if len > MAX_CONTROL {
        return Err(Errno::ENOBUFS);
    }
    let mut bytes = vec![0; len];
    usercopy::read(&mut bytes, at).map_err(|_| Errno::EFAULT)?;
    let mut rest = bytes.as_slice();
    while rest.len() >= 16 {
        let word = |at: usize| {
            let part = rest.get(at..at + 4).and_then(|p| p.try_into().ok());
            part.map_or(0, u32::from_le_bytes)
        };
        let len = word(0) as usize;
        let (level, kind) = (word(8), word(12));
        let data = rest.get(16..len).ok_or(Errno::EINVAL)?;
        if (level, kind) == (SOL_SOCKET, RIGHTS) {
            for fd in data.chunks_exact(4) {
                let fd = i32::from_le_bytes([fd[0], fd[1], fd[2], fd[3]]);
                let file = c.task.file(fd)?;
                // Sockets in sockets in sockets: closing the last would end in the kernel's stack.
                let holds_files = file
                    .object::<Socket>()
                    .is_some_and(|s| s.family == family::UNIX);
                if holds_files {
                    return Err(Errno::ETOOMANYREFS);
                }
                files.push(file);
                if files.len() > MAX_PASSED {
                    return Err(Errno::EINVAL);
                }
            }
        }
        rest = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(files)
}

fn receive_message(c: &Call<'_>, at: u64, flags: u32) -> Result {
    let file = socket(c, 0)?;
    let socket = with(&file)?;
    check_receive(flags)?;
    if get_u64(at)? != 0 && (get_u64(at.wrapping_add(8))? as u32).cast_signed() < 0 {
        return Err(Errno::EINVAL);
    }
    let parts = parts(get_u64(at.wrapping_add(16))?, get_u64(at.wrapping_add(24))?)?;
    let room: usize = parts.iter().map(|(_, len)| len).sum();
    let wait = file.waits() && flags & message::DONTWAIT == 0;
    let packet = socket.receive(room, flags & message::PEEK != 0, wait)?;
    let mut done = 0;
    for (base, len) in parts {
        let piece = packet.bytes.get(done..).unwrap_or_default();
        let piece = piece.get(..len.min(piece.len())).unwrap_or_default();
        put(base, piece)?;
        done += piece.len();
    }
    let mut out_flags = 0u32;
    if done < packet.bytes.len() {
        out_flags |= message::TRUNC;
    }
    // Who sent it.
    let name = get_u64(at)?;
    if name != 0 {
        let bytes = if socket.kind == Kind::Datagram {
            packet.from.encode(socket.family)
        } else {
            Vec::new()
        };
        let room = get_u64(at.wrapping_add(8))? as u32 as usize;
        put(name, bytes.get(..bytes.len().min(room)).unwrap_or_default())?;
        put(at.wrapping_add(8), &(bytes.len() as u32).to_le_bytes())?;
    }
    // Files that came with it.
    let control = get_u64(at.wrapping_add(32))?;
    let control_room = get_u64(at.wrapping_add(40))? as usize;
    let mut used = 0usize;
    if !packet.files.is_empty() {
        let fitting = control_room.saturating_sub(16) / 4;
        if fitting < packet.files.len() {
            out_flags |= message::CTRUNC;
        }
        let mut numbers = Vec::new();
        for file in packet.files.into_iter().take(fitting) {
            let close = flags & message::CMSG_CLOEXEC != 0;
            numbers.push(c.task.files().lock().insert(file, 0, close)?);
        }
        if !numbers.is_empty() {
            let len = 16 + numbers.len() * 4;
            let mut bytes = (len as u64).to_le_bytes().to_vec();
            bytes.extend(SOL_SOCKET.to_le_bytes());
            bytes.extend(1u32.to_le_bytes());
            bytes.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
            put(control, &bytes)?;
            used = len.next_multiple_of(8).min(control_room);
        }
    }
    if let Some((level, name)) = hops_wanted(socket)
        && packet.hops > 0
    {
        const LEN: usize = 20;
        if control_room < LEN {
            out_flags |= message::CTRUNC;
        } else {
            let mut bytes = (LEN as u64).to_le_bytes().to_vec();
            let fields = [level, name, packet.hops.into()];
            bytes.extend(fields.iter().flat_map(|n| n.to_le_bytes()));
            put(control, &bytes)?;
            used = LEN.next_multiple_of(8).min(control_room);
        }
    }
    put(at.wrapping_add(40), &(used as u64).to_le_bytes())?;
    put(at.wrapping_add(48), &out_flags.to_le_bytes())?;
    Ok(if flags & message::TRUNC != 0 {
        packet.bytes.len() as u64
    } else {
        done as u64
    })
}

/// Level and name of the message that tells how many hops a packet had left, if the program wants it.
fn hops_wanted(socket: &Socket) -> Option<(u32, u32)> {
    const IP: (u32, u32, u32) = (0, 12, 2);
    const IPV6: (u32, u32, u32) = (41, 51, 52);
    let (level, option, name) = match socket.family {
        _ if socket.kind != Kind::Datagram => return None,
        family::INET => IP,
        family::INET6 => IPV6,
        _ => return None,
    };
    (socket.option(level, option).unwrap_or(0) != 0).then_some((level, name))
}

/// sendmmsg and recvmmsg: one after the other, and only the first waits.
fn many(c: &Call<'_>, f: fn(&Call<'_>, u64, u32) -> Result) -> Result {
    const ENTRY: u64 = 64;
    let count = u64::from(c.uint(2)).min(1024);
    let mut done = 0;
    for i in 0..count {
        let at = c.arg(1).wrapping_add(i * ENTRY);
        let flags = c.uint(3) & !0x1_0000 | if i > 0 { message::DONTWAIT } else { 0 };
        match f(c, at, flags) {
            Ok(len) => put(at.wrapping_add(56), &(len as u32).to_le_bytes())?,
            Err(_) if done > 0 => break,
            Err(e) => return Err(e),
        }
        done += 1;
    }
    Ok(done)
}

/// Calls of ioctl about interfaces, on any socket (netdevice(7)).
pub fn control(c: &Call<'_>) -> Result {
    const GET_LIST: u32 = 0x8912;
    const NAME: usize = 16;
    let at = c.arg(2);
    if c.uint(1) == GET_LIST {
        let room = u32::from_le_bytes(get(at)?) as usize;
        let to = get_u64(at.wrapping_add(8))?;
        let list = interface::list();
        let mut len = list.len();
        if to != 0 {
            len = len.min(room / 40 * 40);
            put(to, list.get(..len).unwrap_or_default())?;
        }
        put(at, &(len as u32).to_le_bytes())?;
        return Ok(0);
    }
    let request: [u8; NAME + 4] = match c.uint(1) {
        0x8900..=0x89ff => get(at)?,
        _ => return Err(Errno::ENOTTY),
    };
    let (name, value) = request.split_at(NAME);
    let value = value.try_into().map_or(0, i32::from_le_bytes);
    let answer = interface::control(c.uint(1), name, value)?;
    // The name's own answer is the name.
    let behind = if c.uint(1) == 0x8910 { 0 } else { NAME as u64 };
    put(at.wrapping_add(behind), &answer)?;
    Ok(0)
}
