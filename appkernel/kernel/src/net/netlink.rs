//! Netlink sockets: what is asked is answered at once, into the socket's own queue.

use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::netlink;

use super::{Address, BUFFER, MAX_PACKETS, Packet, Socket, interface};
use crate::task;

/// Longest request.
const LONGEST: usize = 8 << 10;

/// Takes a program's requests.
///
/// # Errors
/// `EMSGSIZE`: it is too long. `ENOBUFS`: earlier answers were not read.
pub fn ask(socket: &Socket, bytes: &[u8]) -> Result<usize, Errno> {
    if bytes.len() > LONGEST {
        return Err(Errno::EMSGSIZE);
    }
    let port = match socket.addresses().0 {
        Address::Netlink(port) => port,
        _ => socket.name_netlink(0)?,
    };
    let answers = netlink::answer(bytes, port, &interface::links());
    let mut state = socket.state.lock();
    for bytes in answers {
        let held: usize = state.packets.iter().map(|p| p.bytes.len()).sum();
        if state.packets.len() >= MAX_PACKETS || held >= BUFFER {
            return Err(Errno::ENOBUFS);
        }
        state.arrived += 1;
        state.packets.push_back(Packet {
            from: Address::Netlink(0),
            bytes,
            files: Vec::new(),
            hops: 0,
        });
    }
    drop(state);
    task::wake(task::FILES);
    Ok(bytes.len())
}
