//! Packets of virtio-vsock (virtio 1.2, 5.10.6).

/// Bytes of a packet's header.
pub const HEADER: usize = 44;
/// The sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender sends no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
const STREAM: u16 = 1;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[expect(missing_docs, reason = "they are the standard's names")]
pub enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

/// The header of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Address of the sender.
    pub source_cid: u64,
    /// Address of the receiver.
    pub target_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub target_port: u32,
    /// Bytes behind the header.
    pub len: u32,
    kind: u16,
    op: u16,
    /// `SHUTDOWN_*`.
    pub flags: u32,
    /// Bytes of the sender's receive buffer.
    pub room: u32,
    /// Bytes that it took out of it so far, wrapping.
    pub taken: u32,
}

impl Header {
    /// A packet of ours on the connection of these ports (theirs, ours), without data.
    pub fn new(
        own_cid: u64,
        peer_cid: u64,
        ports: (u32, u32),
        op: Op,
        flags: u32,
        room: u32,
        taken: u32,
    ) -> Self {
        Self {
            source_cid: own_cid,
            target_cid: peer_cid,
            source_port: ports.1,
            target_port: ports.0,
            len: 0,
            kind: STREAM,
            op: op as u16,
            flags,
            room,
            taken,
        }
    }

    /// What it is for; `None` for what streams do not have.
    pub fn op(&self) -> Option<Op> {
        if self.kind != STREAM {
            return None;
        }
        Some(match self.op {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }

    /// Reads a packet: header and data; `None` if it is shorter than it says.
    pub fn parse(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (head, rest) = bytes.split_at_checked(HEADER)?;
        let u16_at = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?));
        let header = Self {
            source_cid: u64_at(0)?,
            target_cid: u64_at(8)?,
            source_port: u32_at(16)?,
            target_port: u32_at(20)?,
            len: u32_at(24)?,
            kind: u16_at(28)?,
            op: u16_at(30)?,
            flags: u32_at(32)?,
            room: u32_at(36)?,
            taken: u32_at(40)?,
        };
        Some((header, rest.get(..header.len as usize)?))
    }

    /// The header as it goes over the wire.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.target_cid.to_le_bytes());
        for (at, value) in [
            (16, self.source_port),
            (20, self.target_port),
            (24, self.len),
            (32, self.flags),
            (36, self.room),
            (40, self.taken),
        ] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    #[test]
    fn packets_go_both_ways_and_short_ones_are_refused() {
        let mut header = Header::new(3, 2, (77, 1024), Op::Data, 0, 65536, 9);
        header.len = 4;
        let mut bytes = header.encode().to_vec();
        bytes.extend(b"data and more");
        let (parsed, data) = Header::parse(&bytes).unwrap();
        assert_eq!((parsed, data), (header, &b"data"[..]));
        assert_eq!(parsed.op(), Some(Op::Data));
        for len in 0..HEADER + 4 {
            assert_eq!(Header::parse(&bytes[..len]), None);
        }
    }

    #[test]
    fn no_packet_is_too_strange() {
        let mut state = 1u32;
        for _ in 0..1000 {
            let bytes: Vec<u8> = (0..60)
                .map(|_| {
                    state = state.wrapping_mul(1_103_515_245).wrapping_add(12345);
                    (state >> 16) as u8
                })
                .collect();
            if let Some((header, data)) = Header::parse(&bytes) {
                assert_eq!(header.len as usize, data.len());
                let _ = header.op();
            }
        }
    }
}
