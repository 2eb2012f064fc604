//! The machine's interfaces as they are set up, and what programs ask about them.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr};

use appkernel_core::errno::Errno;
use appkernel_core::netconf::{Link, NAME_SIZE, Network, Route, parse_mac};
use appkernel_hal::sync::Mutex;
use bulkhead_protocol::sandbox::{ConfigureSandboxRequest, Interface};

use super::device::Device;
use super::stack;
use crate::start::Machine;

/// The interface besides the loopback.
static OUTER: Mutex<Option<Link>> = Mutex::new(None);
/// Addresses and routes that are kept; more are refused.
const MAX_ADDRESSES: usize = 6;
const MAX_ROUTES: usize = 30;
const INDEX: u32 = 2;

/// All interfaces.
pub fn links() -> Vec<Link> {
    let mut links = vec![Link::loopback()];
    links.extend(outer());
    links
}

/// The interface besides the loopback, if there is one.
pub fn outer() -> Option<Link> {
    let mut link = OUTER.lock().clone()?;
    link.counters = stack::counters();
    Some(link)
}

/// Whether an address is the interface's.
pub fn has(ip: IpAddr) -> bool {
    OUTER.lock().as_ref().is_some_and(|link| link.has(ip))
}

/// The own address for packets that leave the machine to `to`.
///
/// # Errors
/// `ENETUNREACH`: no route leads there.
pub fn source(to: IpAddr) -> Result<IpAddr, Errno> {
    if to == IpAddr::V4(Ipv4Addr::BROADCAST) {
        let link = OUTER.lock();
        let own = link.iter().flat_map(|l| &l.addresses).map(|a| a.ip);
        return own
            .into_iter()
            .find(IpAddr::is_ipv4)
            .ok_or(Errno::ENETUNREACH);
    }
    let link = OUTER.lock();
    link.as_ref()
        .and_then(|link| link.source(to))
        .ok_or(Errno::ENETUNREACH)
}

/// Largest packet to the outside.
pub fn mtu() -> usize {
    OUTER.lock().as_ref().map_or(0, |link| link.mtu as usize)
}

fn route(of: &bulkhead_protocol::sandbox::Route) -> Result<Route, String> {
    let ip = |text: &str| match text {
        "" => Ok(None),
        text => text
            .parse::<IpAddr>()
            .map(Some)
            .map_err(|_| format!("{text:?} is not an IP address")),
    };
    let gateway = ip(&of.gateway)?;
    let to = match of.destination.as_str() {
        "" | "default" => Network::all(gateway.is_some_and(|g| g.is_ipv6())),
        text => Network::parse(text)
            .ok_or_else(|| format!("{text:?} is not an address with a prefix length"))?
            .base(),
    };
    Ok(Route {
        to,
        gateway,
        source: ip(&of.source)?,
        metric: of.metric,
    })
}

fn set_up(link: &mut Link, wish: &Interface, largest: usize) -> Result<(), String> {
    if !wish.name.is_empty() {
        let usable = wish.name.len() < NAME_SIZE
            && wish.name.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
            && wish.name != "lo";
        if !usable {
            return Err(format!(
                "{:?} is no name for a network interface",
                wish.name
            ));
        }
        link.name.clone_from(&wish.name);
    }
    if wish.mtu > 0 {
        if wish.mtu as usize > largest || wish.mtu < 576 {
            return Err(format!(
                "interface {}: its MTU cannot be {} (576 to {largest})",
                link.name, wish.mtu
            ));
        }
        link.mtu = wish.mtu;
    }
    for text in &wish.addresses {
        let address = Network::parse(text)
            .filter(|a| !(a.ip.is_unspecified() || a.ip.is_multicast() || a.ip.is_loopback()));
        let address = address.ok_or_else(|| {
            format!(
                "interface {}: {text:?} is no address with a prefix",
                link.name
            )
        })?;
        if link.has(address.ip) {
            continue;
        }
        if link.addresses.len() >= MAX_ADDRESSES {
            return Err(format!(
                "interface {}: more than {MAX_ADDRESSES} addresses",
                link.name
            ));
        }
        link.addresses.push(address);
    }
    Ok(())
}

/// Sets the network up as the host says; gives what was left out.
///
/// # Errors
/// What is wrong with the request.
pub fn configure(
    machine: &Machine,
    request: &ConfigureSandboxRequest,
) -> Result<Vec<String>, String> {
    let mut warnings = Vec::new();
    let mut interfaces = request.interfaces.iter();
    if let Some(wish) = interfaces.next() {
        let mac = match wish.mac.as_str() {
            "" => None,
            text => {
                Some(parse_mac(text).ok_or_else(|| format!("{text:?} is not a hardware address"))?)
            }
        };
        let known = OUTER.lock().clone();
        let (mut link, largest) = match known {
            Some(link) => {
                let largest = stack::largest();
                (link, largest)
            }
            None => {
                let device = Device::start(machine, mac).ok_or_else(|| {
                    format!(
                        "interface {:?}: there is no network device {}, or it does not work",
                        wish.name, wish.mac
                    )
                })?;
                let mut link = Link {
                    index: INDEX,
                    name: "eth0".to_string(),
                    mac: device.mac,
                    mtu: device.mtu as u32,
                    ..Link::default()
                };
                link.addresses.push(link.link_local());
                let largest = device.largest;
                stack::start(device);
                (link, largest)
            }
        };
        set_up(&mut link, wish, largest)?;
        // What the kernel made itself comes last.
        link.addresses
            .sort_by_key(|a| appkernel_core::netconf::is_link_local(a.ip));
        *OUTER.lock() = Some(link);
    }
    for more in interfaces {
        warnings.push(format!(
            "interface {:?}: the app kernel uses one network interface",
            more.name
        ));
    }
    for wish in &request.routes {
        let route = route(wish)?;
        let mut link = OUTER.lock();
        let link = link
            .as_mut()
            .ok_or_else(|| format!("route to {:?}: there is no interface", wish.destination))?;
        if link.routes.contains(&route) {
            continue;
        }
        if link.routes.len() >= MAX_ROUTES {
            return Err(format!("more than {MAX_ROUTES} routes"));
        }
        link.routes.push(route);
    }
    if !request.neighbours.is_empty() {
        warnings.push("neighbours are asked for, not taken as given".to_string());
    }
    if let Some(link) = OUTER.lock().clone() {
        stack::apply(&link);
    }
    Ok(warnings)
}

/// A `sockaddr_in` without a port.
fn sockaddr(ip: Ipv4Addr) -> Vec<u8> {
    let mut bytes = super::family::INET.to_le_bytes().to_vec();
    bytes.extend([0; 2]);
    bytes.extend(ip.octets());
    bytes.resize(16, 0);
    bytes
}

/// The answer to an ioctl about an interface (netdevice(7)): what follows the name in the program's
/// `ifreq`, or the whole of it for the name itself.
///
/// # Errors
/// `ENODEV`: no such interface; `EADDRNOTAVAIL`: it has no such address; `EPERM` for changes;
/// `ENOTTY` for what is no call about interfaces.
pub fn control(request: u32, name: &[u8], value: i32) -> Result<Vec<u8>, Errno> {
    const GET_NAME: u32 = 0x8910;
    const GET_FLAGS: u32 = 0x8913;
    const GET_ADDRESS: u32 = 0x8915;
    const GET_PEER: u32 = 0x8917;
    const GET_BROADCAST: u32 = 0x8919;
    const GET_MASK: u32 = 0x891b;
    const GET_METRIC: u32 = 0x891d;
    const GET_MTU: u32 = 0x8921;
    const GET_HARDWARE: u32 = 0x8927;
    const GET_INDEX: u32 = 0x8933;
    const GET_QUEUE: u32 = 0x8942;
    let links = links();
    if request == GET_NAME {
        let index = value.cast_unsigned();
        let link = links
            .iter()
            .find(|l| l.index == index)
            .ok_or(Errno::ENODEV)?;
        let mut bytes = link.name.as_bytes().to_vec();
        bytes.resize(NAME_SIZE, 0);
        return Ok(bytes);
    }
    let known = matches!(
        request,
        GET_FLAGS
            | GET_ADDRESS
            | GET_PEER
            | GET_BROADCAST
            | GET_MASK
            | GET_METRIC
            | GET_MTU
            | GET_HARDWARE
            | GET_INDEX
            | GET_QUEUE
    );
    if !known {
        const CHANGES: [u32; 9] = [
            0x890b, 0x890c, 0x8914, 0x8916, 0x891a, 0x891c, 0x8922, 0x8923, 0x8924,
        ];
        return Err(if CHANGES.contains(&request) {
            Errno::EPERM
        } else {
            Errno::ENOTTY
        });
    }
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    let name = name.get(..end).unwrap_or_default();
    let link = links.iter().find(|l| l.name.as_bytes() == name);
    let link = link.ok_or(Errno::ENODEV)?;
    let four = link.addresses.iter().find(|a| a.ip.is_ipv4());
    let ip = four.and_then(|a| match a.ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    });
    Ok(match request {
        GET_FLAGS => (link.flags() as u16).to_le_bytes().to_vec(),
        GET_ADDRESS | GET_PEER => sockaddr(ip.ok_or(Errno::EADDRNOTAVAIL)?),
        GET_BROADCAST => sockaddr(
            four.and_then(Network::broadcast)
                .unwrap_or(Ipv4Addr::UNSPECIFIED),
        ),
        GET_MASK => sockaddr(four.ok_or(Errno::EADDRNOTAVAIL)?.mask()),
        GET_METRIC => vec![0; 4],
        GET_MTU => link.mtu.to_le_bytes().to_vec(),
        GET_HARDWARE => {
            let kind: u16 = if link.loopback { 772 } else { 1 };
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend(link.mac);
            bytes.resize(16, 0);
            bytes
        }
        GET_INDEX => link.index.to_le_bytes().to_vec(),
        _ => 1000u32.to_le_bytes().to_vec(),
    })
}

/// The `ifreq`s of all interfaces with an IPv4 address, one after the other.
pub fn list() -> Vec<u8> {
    let mut bytes = Vec::new();
    for link in links() {
        for address in &link.addresses {
            if let IpAddr::V4(ip) = address.ip {
                let start = bytes.len();
                bytes.extend(link.name.as_bytes());
                bytes.resize(start + NAME_SIZE, 0);
                bytes.extend(sockaddr(ip));
                bytes.resize(start + 40, 0);
            }
        }
    }
    bytes
}
