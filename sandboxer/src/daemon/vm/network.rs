//! A pod's network: for every interface that CNI has put into the pod's namespace, a tap beside it
//! and two filters that hand every frame over. What CNI has set up stays as it is and visible; the
//! guest gets the interface's name, hardware address, MTU, addresses, routes and permanent
//! neighbours.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;

use bulkhead_protocol::sandbox;
use bulkhead_vmm::NetConfig;
use nix::sched::{CloneFlags, setns};

use super::netlink::{Address, Link, Neighbour, Netlink, Route};
use crate::engine::EngineError;
use crate::engine::microvm::tap::create_tap;

/// Interfaces a pod may have; each takes a device slot of its VM.
const MAX_INTERFACES: usize = 4;
const RTPROT_KERNEL: u8 = 2;

/// A pod's network, joined. [`PodNetwork::leave`] undoes it.
#[derive(Debug, Default)]
pub struct PodNetwork {
    netns: Option<File>,
    redirected: Vec<u32>,
    /// For the VM; taken once.
    pub devices: Vec<NetConfig>,
    /// For the guest.
    pub interfaces: Vec<sandbox::Interface>,
    /// For the guest.
    pub routes: Vec<sandbox::Route>,
    /// For the guest.
    pub neighbours: Vec<sandbox::Neighbour>,
}

/// Runs `work` on a thread of its own that has entered `netns`.
///
/// # Errors
/// The namespace cannot be entered, or what `work` says.
pub fn within<T: Send>(netns: &File, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_a_thread(|| {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

/// Runs `work` on a thread of its own, which may enter another network namespace: it ends then, and
/// nothing else ever runs in there.
///
/// # Errors
/// There is no thread to be had, or what `work` says.
pub fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("netns".into())
            .stack_size(256 << 10)
            .spawn_scoped(scope, work)?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace failed")))
    })
}

impl PodNetwork {
    /// Joins the network of the namespace at `path`. Blocks shortly.
    ///
    /// # Errors
    /// The namespace is not there, or refuses something.
    pub fn join(path: &Path) -> Result<Self, EngineError> {
        let failed = || EngineError::io(format!("pod network {}", path.display()));
        let netns = File::open(path).map_err(failed())?;
        let joined = within(&netns, || {
            let mut made = Self::default();
            match made.join_all() {
                Ok(()) => Ok(made),
                Err(e) => {
                    made.end_redirects();
                    Err(e)
                }
            }
        });
        let mut joined = joined.map_err(failed())?;
        joined.netns = Some(netns);
        Ok(joined)
    }

    /// In the namespace.
    fn join_all(&mut self) -> io::Result<()> {
        let netlink = Netlink::open()?;
        let loopback = u32::try_from(libc::IFF_LOOPBACK).unwrap_or(8);
        let links: Vec<Link> = netlink
            .links()?
            .into_iter()
            // Others cannot be joined: tunnels that come with the namespace have no address.
            .filter(|l| l.flags & loopback == 0 && l.mac.is_some_and(|m| m != [0; 6]))
            .collect();
        if links.len() > MAX_INTERFACES {
            return Err(io::Error::other(format!(
                "the pod has {} interfaces; at most {MAX_INTERFACES} can be given to a VM",
                links.len()
            )));
        }
        let (addresses, routes) = (netlink.addresses()?, netlink.routes()?);
        let neighbours = netlink.neighbours()?;
        for (number, link) in links.iter().enumerate() {
            self.join_link(&netlink, number, link)
                .map_err(|e| io::Error::new(e.kind(), format!("interface {}: {e}", link.name)))?;
            self.interfaces.push(interface(link, &addresses));
        }
        let name = |index: u32| links.iter().find(|l| l.index == index).map(|l| &l.name);
        let mut routes: Vec<_> = routes.iter().filter(|r| wanted(r)).collect();
        // Those on the link first: others need them.
        routes.sort_by_key(|r| r.gateway.is_some());
        for r in routes {
            if let Some(name) = name(r.link) {
                self.routes.push(route(r, name));
            }
        }
        for n in &neighbours {
            if let Some(name) = name(n.link) {
                self.neighbours.push(neighbour(n, name));
            }
        }
        Ok(())
    }

    fn join_link(&mut self, netlink: &Netlink, number: usize, link: &Link) -> io::Result<()> {
        let (tap, fd) = create_tap(&format!("bhtap{number}"))?;
        // Without it the host's side of the tap would announce itself to the guest.
        let no_v6 = format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6");
        let _ = std::fs::write(no_v6, "1");
        let index = nix::net::if_::if_nametoindex(tap.as_str())?;
        netlink.bring_up(index, link.mtu)?;
        netlink.redirect(link.index, index).map_err(|e| {
            let what =
                "joining it to the tap (kernel modules sch_ingress, cls_matchall, act_mirred)";
            io::Error::new(e.kind(), format!("{what}: {e}"))
        })?;
        self.redirected.push(link.index);
        netlink.redirect(index, link.index)?;
        self.devices.push(NetConfig {
            tap,
            fd: Some(OwnedFd::from(fd)),
            mac: link.mac,
            mtu: u16::try_from(link.mtu).ok(),
            vhost: false,
            plain: false,
        });
        Ok(())
    }

    /// In the namespace. The taps go with their descriptors.
    fn end_redirects(&mut self) {
        if let Ok(netlink) = Netlink::open() {
            for index in self.redirected.drain(..) {
                // Gone with its interface, if CNI was faster.
                let _ = netlink.end_redirect(index);
            }
        }
    }

    /// The namespace.
    pub fn netns(&self) -> Option<&File> {
        self.netns.as_ref()
    }

    /// Undoes the join. The VM must have ended, as it holds the taps.
    pub fn leave(mut self) {
        if let Some(netns) = self.netns.take() {
            let _ = within(&netns, || {
                self.end_redirects();
                Ok(())
            });
        }
    }
}

fn interface(link: &Link, addresses: &[Address]) -> sandbox::Interface {
    let own = addresses.iter().filter(|a| a.link == link.index);
    // The guest makes link-local addresses itself, the same from the same hardware address.
    let own = own.filter(|a| !(a.address.is_ipv6() && a.scope == libc::RT_SCOPE_LINK));
    sandbox::Interface {
        name: link.name.clone(),
        mac: mac(&link.mac.unwrap_or_default()),
        addresses: own.map(|a| format!("{}/{}", a.address, a.prefix)).collect(),
        mtu: link.mtu,
        device_mac: String::new(),
    }
}

/// Routes to connected networks come with the addresses.
fn wanted(route: &Route) -> bool {
    let local = matches!(
        route.destination,
        Some((IpAddr::V6(a), _)) if a.is_unicast_link_local() || a.is_multicast()
    );
    route.kind == libc::RTN_UNICAST && route.protocol != RTPROT_KERNEL && route.link != 0 && !local
}

fn route(r: &Route, name: &str) -> sandbox::Route {
    let text = |ip: Option<IpAddr>| ip.map_or(String::new(), |ip| ip.to_string());
    let destination = match r.destination {
        Some((ip, prefix)) => format!("{ip}/{prefix}"),
        // Without a gateway the family would be lost.
        None if r.v6 && r.gateway.is_none() => "::/0".into(),
        None => String::new(),
    };
    sandbox::Route {
        destination,
        gateway: text(r.gateway),
        interface: name.to_owned(),
        source: text(r.source),
        metric: r.metric,
        scope: r.scope.into(),
    }
}

fn neighbour(n: &Neighbour, name: &str) -> sandbox::Neighbour {
    sandbox::Neighbour {
        address: n.address.to_string(),
        mac: mac(&n.mac),
        interface: name.to_owned(),
    }
}

/// As it is written.
pub fn mac(bytes: &[u8; 6]) -> String {
    let parts: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    parts.join(":")
}

/// Undoes what an earlier process has done in a namespace, if that is still there. Its taps went
/// with it.
pub fn clean(path: &Path) {
    let Ok(netns) = File::open(path) else { return };
    let _ = within(&netns, || {
        let netlink = Netlink::open()?;
        for link in netlink.links()? {
            // Refused where there is none.
            let _ = netlink.end_redirect(link.index);
        }
        Ok(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_veth_with_routes_is_described_for_the_guest() {
        let link = Link {
            index: 2,
            name: "eth0".into(),
            mac: Some([2, 0, 0, 0, 0, 0xfe]),
            mtu: 1450,
            flags: 0,
        };
        let address = |text: &str, prefix, scope| Address {
            link: 2,
            address: text.parse().expect("address"),
            prefix,
            scope,
        };
        let made = interface(
            &link,
            &[
                address("10.88.0.5", 16, 0),
                address("fe80::1", 64, libc::RT_SCOPE_LINK),
                address("fd00::5", 64, 0),
            ],
        );
        assert_eq!(made.addresses, ["10.88.0.5/16", "fd00::5/64"]);
        assert_eq!((made.mac.as_str(), made.mtu), ("02:00:00:00:00:fe", 1450));
        let default = Route {
            link: 2,
            v6: false,
            destination: None,
            gateway: Some("10.88.0.1".parse().expect("address")),
            source: None,
            metric: 0,
            scope: 0,
            protocol: 3,
            kind: libc::RTN_UNICAST,
        };
        assert!(wanted(&default));
        assert!(!wanted(&Route {
            protocol: RTPROT_KERNEL,
            ..default
        }));
        let made = route(&default, "eth0");
        assert_eq!(
            (made.destination.as_str(), made.gateway.as_str()),
            ("", "10.88.0.1")
        );
    }
}
