//! Packets of ICMP (RFC 792) and ICMPv6 (RFC 4443), with the headers of IP before them.

use alloc::vec::Vec;
use core::net::IpAddr;

/// Numbers of the protocols in IP's header.
pub const ICMP: u8 = 1;
/// Of ICMPv6.
pub const ICMP_V6: u8 = 58;
/// Type, code and checksum, and what an echo has: number and place in a row.
pub const HEADER: usize = 8;

const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;

/// A packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Who sent it.
    pub from: IpAddr,
    /// Whom it is for.
    pub to: IpAddr,
    /// How many more hops it would have lived.
    pub hops: u8,
    /// From the type on.
    pub message: &'a [u8],
    /// With the header of IP.
    pub whole: &'a [u8],
}

fn sum(bytes: &[u8]) -> u32 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let words = pairs
        .iter()
        .map(|pair| u32::from(u16::from_be_bytes(*pair)));
    let last = rest.first().map_or(0, |byte| u32::from(*byte) << 8);
    // No overflow: packets have fewer than 65536 bytes.
    words.sum::<u32>().wrapping_add(last)
}

/// The internet checksum (RFC 1071) of parts, of which all but the last have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut total = parts
        .iter()
        .map(|part| sum(part))
        .fold(0, u32::wrapping_add);
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

/// Puts the right checksum into a message.
pub fn seal(message: &mut [u8], from: IpAddr, to: IpAddr) {
    let Some(field) = message.get_mut(2..4) else {
        return;
    };
    field.fill(0);
    let value = match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let len = (message.len() as u32).to_be_bytes();
            let tail = [0, 0, 0, ICMP_V6];
            checksum(&[&from.octets(), &to.octets(), &len, &tail, message])
        }
        _ => checksum(&[message]),
    };
    if let Some(field) = message.get_mut(2..4) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

/// What asks for an echo, and what answers, as types.
pub fn echo(v6: bool) -> (u8, u8) {
    if v6 { (128, 129) } else { (8, 0) }
}

/// The number of an echo.
pub fn ident(message: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(4..6)?.try_into().ok()?))
}

/// The header of IP with a message behind it; `None`: it is too long, or the addresses do not go together.
pub fn packet(
    from: IpAddr,
    to: IpAddr,
    (hops, class): (u8, u8),
    message: &[u8],
) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let len = u16::try_from(V4_HEADER + message.len()).ok()?;
            bytes.try_reserve_exact(len.into()).ok()?;
            bytes.extend([0x45, class]);
            bytes.extend(len.to_be_bytes());
            bytes.extend([0, 0, 0, 0, hops, ICMP, 0, 0]);
            bytes.extend(from.octets());
            bytes.extend(to.octets());
            let value = checksum(&[&bytes]).to_be_bytes();
            bytes.get_mut(10..12)?.copy_from_slice(&value);
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let len = u16::try_from(message.len()).ok()?;
            bytes.try_reserve_exact(V6_HEADER + message.len()).ok()?;
            bytes.extend([0x60 | class >> 4, class << 4, 0, 0]);
            bytes.extend(len.to_be_bytes());
            bytes.extend([ICMP_V6, hops]);
            bytes.extend(from.octets());
            bytes.extend(to.octets());
        }
        _ => return None,
    }
    bytes.extend(message);
    Some(bytes)
}

impl<'a> Packet<'a> {
    /// Reads a packet with the header of IP.
    pub fn parse(whole: &'a [u8]) -> Option<Self> {
        let octets = |at: usize| -> Option<[u8; 16]> { whole.get(at..at + 16)?.try_into().ok() };
        match whole.first()? >> 4 {
            4 => {
                let head = usize::from(whole.first()? & 15) * 4;
                let address =
                    |at: usize| -> Option<[u8; 4]> { whole.get(at..at + 4)?.try_into().ok() };
                (*whole.get(9)? == ICMP && head >= V4_HEADER).then_some(())?;
                Some(Self {
                    from: address(12)?.into(),
                    to: address(16)?.into(),
                    hops: *whole.get(8)?,
                    message: whole.get(head..)?,
                    whole,
                })
            }
            6 => {
                (*whole.get(6)? == ICMP_V6).then_some(())?;
                Some(Self {
                    from: octets(8)?.into(),
                    to: octets(24)?.into(),
                    hops: *whole.get(7)?,
                    message: whole.get(V6_HEADER..)?,
                    whole,
                })
            }
            _ => None,
        }
    }

    /// The type.
    pub fn kind(&self) -> Option<u8> {
        self.message.first().copied()
    }

    /// The answer to this packet, if it asks for an echo.
    pub fn answer(&self) -> Option<Vec<u8>> {
        let (request, reply) = echo(self.to.is_ipv6());
        if self.kind() != Some(request) || self.message.len() < HEADER {
            return None;
        }
        let mut message = self.message.to_vec();
        *message.first_mut()? = reply;
        seal(&mut message, self.to, self.from);
        packet(self.to, self.from, (64, 0), &message)
    }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;

    #[test]
    fn an_echo_is_answered_with_right_checksums() {
        for (from, to) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let v6 = to.is_ipv6();
            let mut message = vec![echo(v6).0, 0, 0, 0, 0x12, 0x34, 0, 1, b'a', b'b', b'c'];
            seal(&mut message, from, to);
            let bytes = packet(from, to, (63, 0), &message).unwrap();
            let request = Packet::parse(&bytes).unwrap();
            assert_eq!((request.from, request.to, request.hops), (from, to, 63));
            assert_eq!(request.message, message);
            let bytes = request.answer().unwrap();
            let answer = Packet::parse(&bytes).unwrap();
            assert_eq!((answer.from, answer.to), (to, from));
            assert_eq!(answer.kind(), Some(echo(v6).1));
            assert_eq!(ident(answer.message), Some(0x1234));
            assert!(answer.message.ends_with(b"abc") && answer.answer().is_none());
            // A sum over all that has its checksum in it is zero.
            let mut again = answer.message.to_vec();
            seal(&mut again, to, from);
            assert_eq!(again, answer.message);
            if !v6 {
                assert_eq!(
                    (checksum(&[&bytes[..20]]), checksum(&[answer.message])),
                    (0, 0)
                );
            }
        }
        assert!(packet([1, 2, 3, 4].into(), "::1".parse().unwrap(), (1, 0), &[]).is_none());
    }

    #[test]
    fn any_packet_is_read() {
        let (from, to) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let four = packet(from, to, (64, 0), &[8, 0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        let six: IpAddr = "fd00::1".parse().unwrap();
        let six = packet(six, six, (64, 0), &[128, 0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        for whole in [four, six] {
            for len in 0..whole.len() {
                for change in 0..=255 {
                    let mut bytes = whole[..len].to_vec();
                    if let [first, ..] = &mut *bytes {
                        *first = *first & 0xf0 | change & 15;
                    }
                    if let Some(packet) = Packet::parse(&bytes) {
                        packet.answer();
                        ident(packet.message);
                    }
                }
            }
        }
    }
}
