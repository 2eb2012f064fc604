//! Port-forwarding: containerd connects to `localhost` in the pod's network namespace, but the
//! pod's programs listen in its guest.
//!
//! A program of a few instructions (BPF, `sk_lookup`) hands every TCP connection to that
//! namespace's loopback, whatever its port, to one listening socket of ours per address family,
//! which sees the wanted port as its own. The bytes go to the guest's agent, which connects to its
//! loopback. Nothing is configured that CNI or anybody else could trip over, and the kernel takes
//! all of it away with our descriptors.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bulkhead_protocol::STREAM_PORT;
use bulkhead_protocol::stream::{TCP, connect};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::guest::Guest;
use super::network::within;
use crate::timeouts;

/// Connections of one pod at once.
const MAX_CONNECTIONS: usize = 1024;

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// What serves a pod's loopback on the host. Dropping it ends that.
#[derive(Debug)]
pub struct PortForward {
    tasks: Vec<AbortHandle>,
    _link: OwnedFd,
}

impl Drop for PortForward {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// What is made in the namespace, before there is anybody to serve it.
#[derive(Debug)]
pub struct Prepared {
    listeners: Vec<TcpListener>,
    link: OwnedFd,
}

/// Takes over the namespace's loopback.
///
/// # Errors
/// The kernel lacks `sk_lookup` (5.9), or refuses.
pub fn prepare(netns: &File) -> io::Result<Prepared> {
    let listeners = within(netns, || {
        let v4 = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        v4.set_nonblocking(true)?;
        // A host may have no IPv6.
        let v6 = TcpListener::bind(SocketAddr::from((Ipv6Addr::LOCALHOST, 0)))
            .and_then(|l| l.set_nonblocking(true).map(|()| l));
        Ok([Some(v4), v6.ok()])
    })?;
    let map = create_map()?;
    for (key, listener) in (0u32..).zip(&listeners) {
        if let Some(listener) = listener {
            update_map(&map, key, listener)?;
        }
    }
    let program = load(&program(map.as_raw_fd()))?;
    let link = attach(&program, netns)?;
    Ok(Prepared {
        listeners: listeners.into_iter().flatten().collect(),
        link,
    })
}

impl PortForward {
    /// Serves a pod whose guest runs. Needs a tokio runtime.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn start(prepared: Prepared, guest: &Arc<Guest>) -> io::Result<Self> {
        let mut tasks = Vec::new();
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        for listener in prepared.listeners {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let (guest, slots) = (Arc::downgrade(guest), Arc::clone(&slots));
            let task = tokio::spawn(async move {
                while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
                    let Ok((stream, _)) = listener.accept().await else {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    };
                    let guest = Weak::clone(&guest);
                    tokio::spawn(async move {
                        if let Err(error) = forward(stream, &guest).await {
                            tracing::debug!(%error, "a forwarded connection ended");
                        }
                        drop(slot);
                    });
                }
            });
            tasks.push(task.abort_handle());
        }
        Ok(Self {
            tasks,
            _link: prepared.link,
        })
    }
}

async fn forward(mut stream: TcpStream, guest: &Weak<Guest>) -> io::Result<()> {
    let port = stream.local_addr()?.port();
    let gone = || io::Error::from(io::ErrorKind::NotConnected);
    let guest = guest.upgrade().ok_or_else(gone)?;
    let mut inside = guest.link().dial(STREAM_PORT).await?;
    drop(guest);
    tokio::time::timeout(
        timeouts::call(),
        connect(&mut inside, &format!("{TCP}{port}")),
    )
    .await
    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    tokio::io::copy_bidirectional(&mut stream, &mut inside)
        .await
        .map(|_| ())
}

/// One instruction of BPF: `code`, registers, offset and constant, as the kernel has them.
fn op(code: u8, dst: u8, src: u8, offset: i16, imm: i32) -> u64 {
    let [o0, o1] = offset.to_le_bytes();
    let [i0, i1, i2, i3] = imm.to_le_bytes();
    u64::from_le_bytes([code, dst | src << 4, o0, o1, i0, i1, i2, i3])
}

/// Connections to 127.0.0.0/8 go to socket 0 of the map, those to ::1 to socket 1; all others
/// their ordinary way.
fn program(map: i32) -> Vec<u64> {
    const LDX_W: u8 = 0x61;
    const JNE: u8 = 0x55;
    const JEQ: u8 = 0x15;
    const JA: u8 = 0x05;
    const MOV_REG: u8 = 0xbf;
    const MOV: u8 = 0xb7;
    const AND: u8 = 0x57;
    const ADD: u8 = 0x07;
    const ST_W: u8 = 0x62;
    const LD_MAP: u8 = 0x18;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    // Fields of struct bpf_sk_lookup.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const LOCAL_IP6: i16 = 44;
    // Targets of jumps.
    const V6: i16 = 11;
    const LOOKUP: i16 = 20;
    const PASS: i16 = 33;
    let one = i32::from_ne_bytes(1u32.to_be_bytes());
    let mut code: Vec<u64> = Vec::with_capacity(40);
    // A jump from where the program ends so far; its offset counts from the next instruction.
    let jump = |code: &mut Vec<u64>, kind: u8, register: u8, imm: i32, target: i16| {
        let here = i16::try_from(code.len()).unwrap_or(0);
        code.push(op(kind, register, 0, target - here - 1, imm));
    };
    code.push(op(MOV_REG, 6, 1, 0, 0));
    code.push(op(LDX_W, 2, 6, PROTOCOL, 0));
    jump(&mut code, JNE, 2, libc::IPPROTO_TCP, PASS);
    code.push(op(LDX_W, 2, 6, FAMILY, 0));
    jump(&mut code, JEQ, 2, libc::AF_INET6, V6);
    jump(&mut code, JNE, 2, libc::AF_INET, PASS);
    code.push(op(LDX_W, 2, 6, LOCAL_IP4, 0));
    // The first octet, in the order of the network.
    code.push(op(AND, 2, 0, 0, 0xff));
    jump(&mut code, JNE, 2, 127, PASS);
    code.push(op(ST_W, 10, 0, -4, 0));
    jump(&mut code, JA, 0, 0, LOOKUP);
    for (word, wanted) in [(0, 0), (4, 0), (8, 0), (12, one)] {
        code.push(op(LDX_W, 2, 6, LOCAL_IP6 + word, 0));
        jump(&mut code, JNE, 2, wanted, PASS);
    }
    code.push(op(ST_W, 10, 0, -4, 1));
    // The map's descriptor takes two instructions.
    code.push(op(LD_MAP, 1, 1, 0, map));
    code.push(0);
    code.push(op(MOV_REG, 2, 10, 0, 0));
    code.push(op(ADD, 2, 0, 0, -4));
    code.push(op(CALL, 0, 0, 0, 1)); // bpf_map_lookup_elem
    jump(&mut code, JEQ, 0, 0, PASS);
    code.push(op(MOV_REG, 7, 0, 0, 0));
    code.push(op(MOV_REG, 1, 6, 0, 0));
    code.push(op(MOV_REG, 2, 7, 0, 0));
    code.push(op(MOV, 3, 0, 0, 0));
    code.push(op(CALL, 0, 0, 0, 124)); // bpf_sk_assign
    code.push(op(MOV_REG, 1, 7, 0, 0));
    code.push(op(CALL, 0, 0, 0, 86)); // bpf_sk_release
    code.push(op(MOV, 0, 0, 0, 1)); // SK_PASS
    code.push(op(EXIT, 0, 0, 0, 0));
    code
}

fn bpf<T>(command: libc::c_int, argument: &T) -> io::Result<i32> {
    // The verifier gives up with EAGAIN when a signal is pending.
    for _ in 0..100 {
        // SAFETY: the pointer and size are of one argument of the command's layout, whose own
        // pointers the caller keeps alive.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *argument, size_of::<T>()) };
        if result >= 0 {
            return i32::try_from(result).map_err(io::Error::other);
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
            return Err(error);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: bpf(2) has just made this descriptor for us alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn create_map() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        kind: u32,
        key_size: u32,
        value_size: u32,
        entries: u32,
        flags: u32,
    }
    let create = Create {
        kind: MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 4,
        entries: 2,
        flags: 0,
    };
    bpf(MAP_CREATE, &create).map(owned)
}

fn update_map(map: &OwnedFd, key: u32, socket: &TcpListener) -> io::Result<()> {
    #[repr(C)]
    struct Update {
        map: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let value = socket.as_raw_fd();
    let update = Update {
        map: map.as_raw_fd().unsigned_abs(),
        pad: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE_ELEM, &update).map(drop)
}

fn load(code: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        attach_type: u32,
    }
    let license = c"Apache-2.0";
    let load = Load {
        kind: PROG_TYPE_SK_LOOKUP,
        count: u32::try_from(code.len()).unwrap_or(u32::MAX),
        instructions: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        attach_type: ATTACH_SK_LOOKUP,
        ..Load::default()
    };
    bpf(PROG_LOAD, &load).map(owned)
}

fn attach(program: &OwnedFd, netns: &File) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Link {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let link = Link {
        program: program.as_raw_fd().unsigned_abs(),
        target: netns.as_raw_fd().unsigned_abs(),
        attach_type: ATTACH_SK_LOOKUP,
        flags: 0,
    };
    bpf(LINK_CREATE, &link).map(owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Jump targets and the place of each part: a wrong one would still load.
    #[test]
    fn every_jump_lands_on_its_part() {
        let code = program(3);
        assert_eq!(code.len(), 35);
        let opcode = |at: usize| code[at].to_le_bytes()[0];
        assert_eq!((opcode(11), opcode(20), opcode(33)), (0x61, 0x18, 0xb7));
        for (at, word) in code.iter().enumerate() {
            let bytes = word.to_le_bytes();
            if matches!(bytes[0], 0x05 | 0x15 | 0x55) {
                let offset = i16::from_le_bytes([bytes[2], bytes[3]]);
                let target = at as i64 + 1 + i64::from(offset);
                assert!([11, 20, 33].contains(&target), "{at} to {target}");
            }
        }
    }

    #[test]
    fn all_ports_of_a_namespace_lead_here() {
        let here = std::thread::spawn(|| {
            use nix::sched::{CloneFlags, unshare};
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                // Needs root.
                return None;
            }
            Some(File::open("/proc/thread-self/ns/net").expect("netns"))
        });
        let Some(netns) = here.join().expect("thread") else {
            return;
        };
        let prepared = match prepare(&netns) {
            Ok(prepared) => prepared,
            // A kernel without sk_lookup, or without the right to it.
            Err(e) if e.raw_os_error().is_some() => return,
            Err(e) => panic!("{e}"),
        };
        drop(prepared);
    }
}
