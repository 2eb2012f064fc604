//! rtnetlink, as much as joining a tap to a pod's interface needs: reading links, addresses,
//! routes and neighbours; ingress queueing disciplines with a redirecting filter.
//!
//! All calls concern the network namespace of the calling thread. The kernel answers at once:
//! nothing here waits.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: i32 = 1;
const TC_ACT_STOLEN: i32 = 4;
const TC_H_INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;

/// A link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Hardware address, if it has one of six bytes.
    pub mac: Option<[u8; 6]>,
    /// MTU in bytes.
    pub mtu: u32,
    /// `IFF_*`.
    pub flags: u32,
}

/// An address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Index of the link.
    pub link: u32,
    /// The address.
    pub address: IpAddr,
    /// Length of its prefix.
    pub prefix: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
}

/// A route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Index of the link; 0 when it has several.
    pub link: u32,
    /// Of IPv6.
    pub v6: bool,
    /// Destination and prefix length; `None`: everywhere.
    pub destination: Option<(IpAddr, u8)>,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Preferred source.
    pub source: Option<IpAddr>,
    /// Priority.
    pub metric: u32,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTPROT_*`.
    pub protocol: u8,
    /// `RTN_*`.
    pub kind: u8,
}

/// A permanent neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// Index of the link.
    pub link: u32,
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: [u8; 6],
}

/// A message being built.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(192);
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&1u32.to_ne_bytes()); // sequence
        bytes.extend_from_slice(&0u32.to_ne_bytes()); // port
        bytes.extend_from_slice(body);
        Self(bytes)
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        push_attribute(&mut self.0, kind, value);
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(0).to_ne_bytes();
        for (slot, byte) in self.0.iter_mut().zip(length) {
            *slot = byte;
        }
        self.0
    }
}

fn push_attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // Values are names, numbers and small nests of these: far below 64 KiB.
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn nested(parts: &[(u16, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, value) in parts {
        push_attribute(&mut out, *kind, value);
    }
    out
}

/// A little reader of native-endian fields.
#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn u8(self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    fn u16(self, at: usize) -> u16 {
        let bytes = self.0.get(at..at + 2).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u16::from_ne_bytes)
    }

    fn u32(self, at: usize) -> u32 {
        let bytes = self.0.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u32::from_ne_bytes)
    }

    /// Attributes behind a fixed part of `skip` bytes.
    fn attributes(self, skip: usize) -> impl Iterator<Item = (u16, Bytes<'a>)> {
        let mut rest = self.0.get(skip..).unwrap_or_default();
        std::iter::from_fn(move || {
            let length = usize::from(Bytes(rest).u16(0));
            let value = rest.get(4..length)?;
            let kind = Bytes(rest).u16(2) & 0x3fff;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some((kind, Bytes(value)))
        })
    }

    fn ip(self) -> Option<IpAddr> {
        if let Ok(v4) = <[u8; 4]>::try_from(self.0) {
            return Some(Ipv4Addr::from(v4).into());
        }
        let v6 = <[u8; 16]>::try_from(self.0).ok()?;
        Some(Ipv6Addr::from(v6).into())
    }

    fn mac(self) -> Option<[u8; 6]> {
        self.0.try_into().ok()
    }

    fn text(self) -> String {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(self.0.len());
        String::from_utf8_lossy(self.0.get(..end).unwrap_or_default()).into_owned()
    }
}

/// An rtnetlink socket.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
}

impl Netlink {
    /// Opens one in the namespace of this thread.
    ///
    /// # Errors
    /// As `socket(2)`.
    pub fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { fd })
    }

    fn request(
        &self,
        kind: u16,
        flags: u16,
        body: &[u8],
        parts: &[(u16, &[u8])],
    ) -> io::Result<()> {
        let mut message = Message::new(kind, flags | NLM_F_ACK, body);
        for (kind, value) in parts {
            message.attribute(*kind, value);
        }
        send(self.fd.as_raw_fd(), &message.finish(), MsgFlags::empty())?;
        let mut buffer = [0; 8192];
        let n = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let reply = Bytes(buffer.get(..n).unwrap_or_default());
        if reply.u16(4) != NLMSG_ERROR {
            return Err(io::Error::other("unexpected answer of rtnetlink"));
        }
        match i32::from_ne_bytes(reply.u32(16).to_ne_bytes()) {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        }
    }

    /// Asks for all objects of a kind; gives the body of each message.
    fn dump(&self, kind: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let message = Message::new(kind, NLM_F_DUMP, body);
        send(self.fd.as_raw_fd(), &message.finish(), MsgFlags::empty())?;
        let mut all = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = buffer.get(..n).unwrap_or_default();
            while rest.len() >= 16 {
                let head = Bytes(rest);
                let length = head.u32(0) as usize;
                let Some(message) = rest.get(16..length) else {
                    return Err(io::Error::other("rtnetlink: a message is cut off"));
                };
                match head.u16(4) {
                    NLMSG_DONE => return Ok(all),
                    NLMSG_ERROR => {
                        let code = i32::from_ne_bytes(Bytes(message).u32(0).to_ne_bytes());
                        return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                    }
                    _ => all.push(message.to_vec()),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// All links.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        let all = self.dump(libc::RTM_GETLINK, &[0; 16])?;
        Ok(all.iter().map(|m| link(Bytes(m))).collect())
    }

    /// All addresses.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn addresses(&self) -> io::Result<Vec<Address>> {
        let all = self.dump(libc::RTM_GETADDR, &[0; 8])?;
        Ok(all.iter().filter_map(|m| address(Bytes(m))).collect())
    }

    /// All routes of the main table.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn routes(&self) -> io::Result<Vec<Route>> {
        let all = self.dump(libc::RTM_GETROUTE, &[0; 12])?;
        Ok(all.iter().filter_map(|m| route(Bytes(m))).collect())
    }

    /// All permanent neighbours.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn neighbours(&self) -> io::Result<Vec<Neighbour>> {
        let all = self.dump(libc::RTM_GETNEIGH, &[0; 12])?;
        Ok(all.iter().filter_map(|m| neighbour(Bytes(m))).collect())
    }

    /// Sets the MTU of a link and brings it up.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bring_up(&self, index: u32, mtu: u32) -> io::Result<()> {
        let up = u32::try_from(libc::IFF_UP).unwrap_or(1);
        let mut body = vec![0; 4];
        body.extend_from_slice(&index.to_ne_bytes());
        body.extend_from_slice(&up.to_ne_bytes());
        body.extend_from_slice(&up.to_ne_bytes());
        self.request(
            libc::RTM_NEWLINK,
            0,
            &body,
            &[(libc::IFLA_MTU, &mtu.to_ne_bytes())],
        )
    }

    /// Makes all that arrives on link `from` leave by link `to`.
    ///
    /// # Errors
    /// What the kernel says; `EEXIST` if `from` has an ingress discipline already.
    pub fn redirect(&self, from: u32, to: u32) -> io::Result<()> {
        self.request(
            libc::RTM_NEWQDISC,
            NLM_F_CREATE | NLM_F_EXCL,
            &tc_body(from, INGRESS_HANDLE, TC_H_INGRESS, 0),
            &[(TCA_KIND, b"ingress\0")],
        )?;
        // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex.
        let mut mirred = Vec::with_capacity(28);
        for n in [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR] {
            mirred.extend_from_slice(&i32::to_ne_bytes(n));
        }
        mirred.extend_from_slice(&to.to_ne_bytes());
        let parms = nested(&[(TCA_MIRRED_PARMS, &mirred)]);
        let action = nested(&[(TCA_ACT_KIND, b"mirred\0"), (TCA_ACT_OPTIONS, &parms)]);
        let actions = nested(&[(1, &action)]);
        let options = nested(&[(TCA_MATCHALL_ACT, &actions)]);
        // Priority 1, every protocol.
        let all = u16::try_from(libc::ETH_P_ALL).unwrap_or(3).to_be();
        let info = (1 << 16) | u32::from(all);
        self.request(
            libc::RTM_NEWTFILTER,
            NLM_F_CREATE | NLM_F_EXCL,
            &tc_body(from, 0, INGRESS_HANDLE, info),
            &[(TCA_KIND, b"matchall\0"), (TCA_OPTIONS, &options)],
        )
    }

    /// Undoes [`Self::redirect`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn end_redirect(&self, from: u32) -> io::Result<()> {
        let body = tc_body(from, INGRESS_HANDLE, TC_H_INGRESS, 0);
        self.request(libc::RTM_DELQDISC, 0, &body, &[])
    }
}

fn tc_body(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    for n in [index, handle, parent, info] {
        body.extend_from_slice(&n.to_ne_bytes());
    }
    body
}

fn link(message: Bytes<'_>) -> Link {
    let mut link = Link {
        index: message.u32(4),
        name: String::new(),
        mac: None,
        mtu: 0,
        flags: message.u32(8),
    };
    for (kind, value) in message.attributes(16) {
        match kind {
            libc::IFLA_IFNAME => link.name = value.text(),
            libc::IFLA_ADDRESS => link.mac = value.mac(),
            libc::IFLA_MTU => link.mtu = value.u32(0),
            _ => {}
        }
    }
    link
}

fn address(message: Bytes<'_>) -> Option<Address> {
    let (mut local, mut any) = (None, None);
    for (kind, value) in message.attributes(8) {
        match kind {
            libc::IFA_LOCAL => local = value.ip(),
            libc::IFA_ADDRESS => any = value.ip(),
            _ => {}
        }
    }
    Some(Address {
        link: message.u32(4),
        // On point-to-point links only this one is our own.
        address: local.or(any)?,
        prefix: message.u8(1),
        scope: message.u8(3),
    })
}

fn route(message: Bytes<'_>) -> Option<Route> {
    let family = i32::from(message.u8(0));
    let (prefix, table) = (message.u8(1), message.u8(4));
    if table != libc::RT_TABLE_MAIN || (family != libc::AF_INET && family != libc::AF_INET6) {
        return None;
    }
    let mut route = Route {
        link: 0,
        v6: family == libc::AF_INET6,
        destination: None,
        gateway: None,
        source: None,
        metric: 0,
        protocol: message.u8(5),
        scope: message.u8(6),
        kind: message.u8(7),
    };
    for (kind, value) in message.attributes(12) {
        match kind {
            libc::RTA_DST => route.destination = value.ip().map(|ip| (ip, prefix)),
            libc::RTA_OIF => route.link = value.u32(0),
            libc::RTA_GATEWAY => route.gateway = value.ip(),
            libc::RTA_PREFSRC => route.source = value.ip(),
            libc::RTA_PRIORITY => route.metric = value.u32(0),
            _ => {}
        }
    }
    Some(route)
}

fn neighbour(message: Bytes<'_>) -> Option<Neighbour> {
    const NUD_PERMANENT: u16 = 0x80;
    if message.u16(8) & NUD_PERMANENT == 0 {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for (kind, value) in message.attributes(12) {
        match kind {
            libc::NDA_DST => address = value.ip(),
            libc::NDA_LLADDR => mac = value.mac(),
            _ => {}
        }
    }
    Some(Neighbour {
        link: message.u32(4),
        address: address?,
        mac: mac?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_hosts_loopback_is_found() {
        let netlink = Netlink::open().expect("netlink");
        let links = netlink.links().expect("links");
        let lo = links.iter().find(|l| l.name == "lo").expect("lo");
        let has = |ip: &Address| ip.link == lo.index && ip.address.is_loopback() && ip.prefix == 8;
        assert!(netlink.addresses().expect("addresses").iter().any(has));
        netlink.routes().expect("routes");
        netlink.neighbours().expect("neighbours");
    }

    #[test]
    fn cut_attributes_end_the_list() {
        let mut bytes = nested(&[(3, b"eth0\0"), (1, &[1, 2, 3, 4, 5, 6])]);
        bytes.extend_from_slice(&[9, 0, 7, 0, 1]);
        let all: Vec<u16> = Bytes(&bytes).attributes(0).map(|(kind, _)| kind).collect();
        assert_eq!(all, [3, 1]);
        let mut zero = nested(&[(3, b"x")]);
        zero.extend_from_slice(&[0; 8]);
        assert_eq!(Bytes(&zero).attributes(0).count(), 1);
    }
}
