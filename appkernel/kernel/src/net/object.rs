//! A socket as an open file.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::sync::Weak;
use core::any::Any;

use appkernel_core::errno::Errno;

use super::{BUFFER, Kind, NODES, Phase, Socket, Wire, stack, with};
use crate::fs::file::{Object, Ready};
use crate::fs::node::kind;
use crate::task;

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
        let (mut ready, peer, wire) = {
            let state = self.state.lock();
            let stream = self.kind != Kind::Datagram;
            let (queued, connected) = match &state.phase {
                Phase::Listening { queue, .. } => (!queue.is_empty(), false),
                Phase::Connected => (false, true),
                Phase::Connecting => return Ready::default(),
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
            let wire = match state.wire {
                Some(Wire::Tcp(handle)) if connected && !state.write_closed => Some(handle),
                _ => None,
            };
            let peer = state.peer.upgrade().filter(|_| stream && connected);
            (ready, peer, wire)
        };
        if let Some(handle) = wire {
            ready.writable = stack::room(handle);
        } else if let Some(peer) = peer {
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
            if state.wire.is_some() {
                return (state.came + state.arrived, state.removed);
            }
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
        let (peer, unread, queue, node, wire) = {
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
                state.wire.take(),
            )
        };
        match wire {
            Some(Wire::Tcp(handle)) => {
                let (level, name) = with::LINGER;
                // On, and for no time.
                let at_once = self.option(level, name) == Some(1);
                stack::close(handle, unread || at_once);
            }
            Some(Wire::Udp(port)) => stack::close_udp(port),
            None => {}
        }
        if let Some(node) = node {
            NODES.lock().remove(&node);
        }
        if let Some(peer) = peer
            && self.kind != Kind::Datagram
        {
            let mut state = peer.state.lock();
            if state.watched {
                task::wake(task::AGENT);
            }
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
