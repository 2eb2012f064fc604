//! What is looked at in packets before the protocols are.

use core::net::{IpAddr, SocketAddr};

const ETHERNET: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Both ends of a packet's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Who sent it.
    pub from: SocketAddr,
    /// Whom it is for.
    pub to: SocketAddr,
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Protocol, addresses and content of an IP packet that is not a later part of one.
fn ip(packet: &[u8]) -> Option<(u8, IpAddr, IpAddr, &[u8])> {
    match packet.first()? >> 4 {
        4 => {
            let head = usize::from(packet.first()? & 15) * 4;
            let (from, to): ([u8; 4], [u8; 4]) = (
                packet.get(12..16)?.try_into().ok()?,
                packet.get(16..20)?.try_into().ok()?,
            );
            if word(packet, 6)? & 0x1fff != 0 {
                return None;
            }
            Some((*packet.get(9)?, from.into(), to.into(), packet.get(head..)?))
        }
        6 => {
            let (from, to): ([u8; 16], [u8; 16]) = (
                packet.get(8..24)?.try_into().ok()?,
                packet.get(24..40)?.try_into().ok()?,
            );
            Some((*packet.get(6)?, from.into(), to.into(), packet.get(40..)?))
        }
        _ => None,
    }
}

fn of_frame(frame: &[u8]) -> Option<&[u8]> {
    matches!(word(frame, 12)?, 0x0800 | 0x86dd).then(|| frame.get(ETHERNET..))?
}

fn ends(from: IpAddr, to: IpAddr, ports: &[u8]) -> Option<Ends> {
    Some(Ends {
        from: SocketAddr::new(from, word(ports, 0)?),
        to: SocketAddr::new(to, word(ports, 2)?),
    })
}

/// The ends of the connection that an Ethernet frame asks for, if it does: its first packet of TCP.
pub fn opens(frame: &[u8]) -> Option<Ends> {
    let (protocol, from, to, rest) = ip(of_frame(frame)?)?;
    let flags = *rest.get(13)?;
    let first = protocol == TCP && flags & (FIN | SYN | RST | ACK) == SYN;
    first.then(|| ends(from, to, rest))?
}

/// The ends of the packet of ours that an Ethernet frame says nobody takes; of UDP.
pub fn refused(frame: &[u8]) -> Option<Ends> {
    let (protocol, _, _, rest) = ip(of_frame(frame)?)?;
    let says = match (protocol, rest.first()?, rest.get(1)?) {
        // Unreachable: the port.
        (1, 3, 3) | (58, 1, 4) => rest.get(8..)?,
        _ => return None,
    };
    let (protocol, from, to, ports) = ip(says)?;
    (protocol == UDP).then(|| ends(from, to, ports))?
}

#[cfg(test)]
mod tests {
    use std::prelude::v1::*;
    use std::vec;

    use super::*;

    fn v4(protocol: u8, from: [u8; 4], to: [u8; 4], content: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
        packet.extend(from);
        packet.extend(to);
        packet.extend(content);
        packet
    }

    fn frame(kind: u16, packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend(kind.to_be_bytes());
        frame.extend(packet);
        frame
    }

    fn tcp(flags: u8) -> Vec<u8> {
        let mut head = vec![0x30, 0x39, 0, 80];
        head.resize(13, 0);
        head.push(flags);
        head.resize(20, 0);
        head
    }

    #[test]
    fn first_packets_are_told_from_others() {
        let whole = |flags| frame(0x0800, &v4(TCP, [10, 0, 0, 1], [10, 0, 0, 2], &tcp(flags)));
        let ends = opens(&whole(SYN)).unwrap();
        assert_eq!(ends.from.to_string(), "10.0.0.1:12345");
        assert_eq!(ends.to.to_string(), "10.0.0.2:80");
        for flags in [SYN | ACK, ACK, RST, SYN | FIN, 0] {
            assert_eq!(opens(&whole(flags)), None);
        }
        let syn = whole(SYN);
        for len in 0..ETHERNET + 20 + 14 {
            assert_eq!(opens(&syn[..len]), None, "{len}");
        }
        let mut six = vec![0x60, 0, 0, 0, 0, 20, TCP, 64];
        six.extend([0; 15]);
        six.push(1);
        six.extend([0; 15]);
        six.push(2);
        six.extend(tcp(SYN));
        assert_eq!(
            opens(&frame(0x86dd, &six)).unwrap().to.to_string(),
            "[::2]:80"
        );
        assert_eq!(opens(&frame(0x0800, &six[..10])), None);
    }

    #[test]
    fn a_refusal_names_the_refused_packet() {
        let ours = v4(
            UDP,
            [10, 0, 0, 2],
            [10, 0, 0, 1],
            &[0x80, 0, 0, 53, 0, 8, 0, 0],
        );
        let mut icmp = vec![3, 3, 0, 0, 0, 0, 0, 0];
        icmp.extend(&ours);
        let frame = frame(0x0800, &v4(1, [10, 0, 0, 1], [10, 0, 0, 2], &icmp));
        let ends = refused(&frame).unwrap();
        assert_eq!(ends.from.to_string(), "10.0.0.2:32768");
        assert_eq!(ends.to.to_string(), "10.0.0.1:53");
        for len in 0..frame.len() - 4 {
            assert_eq!(refused(&frame[..len]), None, "{len}");
        }
    }

    #[test]
    fn no_frame_is_too_strange() {
        let mut state = 7u32;
        for len in 0..2000usize {
            let mut bytes: Vec<u8> = (0..len % 90)
                .map(|_| {
                    state = state.wrapping_mul(1_103_515_245).wrapping_add(12345);
                    (state >> 16) as u8
                })
                .collect();
            if bytes.len() > 15 {
                bytes[12..14].copy_from_slice(&[8, 0]);
                bytes[14] = if len % 2 == 0 { 0x4f } else { 0x60 };
            }
            let _ = (opens(&bytes), refused(&bytes));
        }
    }
}
