//! The host's end of the cable.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::device::{F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6};
use super::io::HEADER;

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The host refuses.
    #[error("tap {name}: cannot {what}: {source}{}", remedy(.source))]
    Host {
        /// Interface name.
        name: String,
        /// What was attempted.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// A name of another length than interfaces have.
    #[error("tap {0:?}: an interface name has 1 to 15 bytes, without '/' and NUL")]
    Name(String),
    /// The descriptor is not what a network device needs.
    #[error("tap {0}: not opened as a tap with IFF_NO_PI and IFF_VNET_HDR")]
    Flags(String),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; needs CAP_NET_ADMIN or a tap owned by this user",
        Some(libc::EBUSY) => "; another process uses it, stop that or choose another name",
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => "; load the tun module",
        _ => "",
    }
}

/// A tap interface, opened for frames with a virtio header.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    real: bool,
}

impl Tap {
    /// Opens the tap `name` of the calling thread's network namespace, making it if it does not
    /// exist.
    ///
    /// # Errors
    /// When the name is no interface name or the host refuses.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let host = |what: &'static str| {
            move |source| TapError::Host {
                name: name.to_owned(),
                what,
                source,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(host("open /dev/net/tun"))?;
        let mut request = empty_request();
        let fits = !name.is_empty()
            && name.len() < request.ifr_name.len()
            && !name.bytes().any(|b| b == 0 || b == b'/');
        if !fits {
            return Err(TapError::Name(name.to_owned()));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes an ifreq, which the pointer is to.
        let r = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if r < 0 {
            return Err(host("attach to it")(io::Error::last_os_error()));
        }
        Self::finish(file, name_of(&request))
    }

    /// Takes a tap somebody else opened (in another network namespace, with other rights).
    ///
    /// # Errors
    /// When the descriptor is not a tap of the right kind.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let mut request = empty_request();
        // SAFETY: TUNGETIFF writes an ifreq, which the pointer is to.
        let r = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        if r < 0 {
            return Err(TapError::Host {
                name: format!("descriptor {}", file.as_raw_fd()),
                what: "examine it",
                source: io::Error::last_os_error(),
            });
        }
        let name = name_of(&request);
        let needed = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNGETIFF filled in the flags; any value is valid.
        if unsafe { request.ifr_ifru.ifru_flags } & needed != needed {
            return Err(TapError::Flags(name));
        }
        // SAFETY: fcntl on an open descriptor with integer arguments.
        unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK);
        }
        Self::finish(file, name)
    }

    fn finish(file: File, name: String) -> Result<Self, TapError> {
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which the pointer is to.
        let r = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        if r < 0 {
            return Err(TapError::Host {
                name,
                what: "set its header size",
                source: io::Error::last_os_error(),
            });
        }
        Ok(Self {
            file,
            name,
            real: true,
        })
    }

    /// A non-blocking datagram socket in place of a tap, for tests and fuzzing.
    #[doc(hidden)]
    pub fn from_socket(fd: OwnedFd) -> Self {
        Self {
            file: File::from(fd),
            name: "socket".to_owned(),
            real: false,
        }
    }

    /// Interface name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn is_real(&self) -> bool {
        self.real
    }

    /// Tells the tap what the guest accepts: unfinished checksums, frames still to be cut.
    pub(super) fn set_offload(&self, features: u64) -> io::Result<()> {
        if !self.real {
            return Ok(());
        }
        let mut offload = 0;
        // Segmentation needs checksums (virtio 1.2, 5.1.3.1).
        if features & F_GUEST_CSUM != 0 {
            offload |= libc::TUN_F_CSUM;
            if features & F_GUEST_TSO4 != 0 {
                offload |= libc::TUN_F_TSO4;
            }
            if features & F_GUEST_TSO6 != 0 {
                offload |= libc::TUN_F_TSO6;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let r = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offload),
            )
        };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn empty_request() -> libc::ifreq {
    // SAFETY: an ifreq is plain data, of which all zeroes is a value.
    unsafe { std::mem::zeroed() }
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|c| *c as u8)
        .take_while(|c| *c != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
