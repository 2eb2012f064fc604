//! A tap device for one VM: the host end gets an address, the guest the next one.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::engine::EngineError;

/// Longest interface name.
const NAME_MAX: usize = 15;

/// An open tap. Goes away with its descriptor unless it existed before.
#[derive(Debug)]
pub struct Tap {
    /// Its name on the host.
    pub name: String,
    /// The queue, for the VM.
    pub fd: OwnedFd,
    /// Address of the host's end; `None` for a tap that was there before.
    pub host: Option<Ipv4Addr>,
    /// Address for the guest.
    pub guest: Option<Ipv4Addr>,
}

#[repr(C)]
struct IfReq {
    name: [u8; 16],
    data: [u8; 24],
}

impl IfReq {
    fn new(name: &str) -> Self {
        let mut request = Self {
            name: [0; 16],
            data: [0; 24],
        };
        for (to, from) in request.name.iter_mut().zip(name.bytes().take(NAME_MAX)) {
            *to = from;
        }
        request
    }

    fn flags(mut self, flags: libc::c_int) -> Self {
        let low = u16::try_from(flags & 0xffff).unwrap_or(0).to_ne_bytes();
        self.data[..2].copy_from_slice(&low);
        self
    }

    /// `struct sockaddr_in`.
    fn address(mut self, address: Ipv4Addr) -> Self {
        let family = u16::try_from(libc::AF_INET).unwrap_or(2).to_ne_bytes();
        self.data[..2].copy_from_slice(&family);
        self.data[4..8].copy_from_slice(&address.octets());
        self
    }
}

fn ioctl(fd: &impl AsRawFd, request: libc::c_ulong, argument: &mut IfReq) -> io::Result<()> {
    // SAFETY: all requests used here take a pointer to a `struct ifreq`, which `IfReq` is laid out
    // as (16 bytes of name, 24 of union); it lives for the duration of the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// Opens the tap `name`, making it if it is not there, in the network namespace of this thread;
/// `%d` in the name becomes a free number. Gives its real name and its queue.
///
/// # Errors
/// There is no `/dev/net/tun` (load the module tun), the name is taken, or privileges are missing.
pub fn create_tap(name: &str) -> io::Result<(String, File)> {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = IfReq::new(name).flags(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    ioctl(&tun, TUNSETIFF, &mut request)?;
    let end = request.name.iter().position(|b| *b == 0);
    let real = request
        .name
        .get(..end.unwrap_or(NAME_MAX))
        .unwrap_or_default();
    Ok((String::from_utf8_lossy(real).into_owned(), tun))
}

impl Tap {
    /// Opens the tap `name`, or makes one and gives it an address of the /30 network number
    /// `network` (0 to 16,383) in 172.31.0.0/16.
    ///
    /// # Errors
    /// There is no `/dev/net/tun`, the name is taken or unusable, or privileges are missing.
    pub fn open(name: Option<&str>, network: u16) -> Result<Self, EngineError> {
        let wanted = name.unwrap_or("bulkhead%d");
        let failed =
            |what: &str| EngineError::io(format!("tap {}: {what}", name.unwrap_or("(new)")));
        if wanted.is_empty()
            || wanted.len() > NAME_MAX
            || wanted.bytes().any(|b| b == b'/' || b.is_ascii_whitespace())
        {
            let rule = "an interface name has at most 15 characters, no '/' and no blanks";
            let source = io::Error::new(io::ErrorKind::InvalidInput, rule);
            return Err(failed("cannot be a tap")(source));
        }
        let existed = name.is_some_and(|n| std::path::Path::new("/sys/class/net").join(n).exists());
        let (real, tun) = create_tap(wanted).map_err(failed(
            "cannot be made (is it in use? are you root? is there /dev/net/tun?)",
        ))?;
        if existed {
            return Ok(Self {
                name: real,
                fd: tun.into(),
                host: None,
                guest: None,
            });
        }
        let base = u32::from(Ipv4Addr::new(172, 31, 0, 0)) + u32::from(network % 16_384) * 4;
        let (host, guest) = (Ipv4Addr::from(base + 1), Ipv4Addr::from(base + 2));
        let socket = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Inet,
            nix::sys::socket::SockType::Datagram,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(|e| failed("socket")(e.into()))?;
        let steps = [
            (libc::SIOCSIFADDR, IfReq::new(&real).address(host)),
            (
                libc::SIOCSIFNETMASK,
                IfReq::new(&real).address(Ipv4Addr::new(255, 255, 255, 252)),
            ),
            (
                libc::SIOCSIFFLAGS,
                IfReq::new(&real).flags(libc::IFF_UP | libc::IFF_RUNNING),
            ),
        ];
        for (number, mut argument) in steps {
            ioctl(&socket, number as libc::c_ulong, &mut argument)
                .map_err(failed("cannot be configured"))?;
        }
        Ok(Self {
            name: real,
            fd: tun.into(),
            host: Some(host),
            guest: Some(guest),
        })
    }
}
