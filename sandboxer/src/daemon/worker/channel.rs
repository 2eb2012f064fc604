//! What the daemon and a worker say to each other: JSON in datagrams, with descriptors.
//!
//! The worker is not trusted: it may have been broken into. The daemon bounds what it reads, takes
//! no descriptor from it, and believes of its answers only what concerns its own VM.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, setsockopt, socketpair, sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest message.
const MAX_MESSAGE: usize = 64 << 10;
/// Most descriptors that come with one.
const MAX_FDS: usize = 64;

/// What a process that is to become a worker is told first, while it still has its rights. With it
/// comes the pod's network namespace, if there is one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Begin {
    /// The pod's directory: the jail is built on it.
    pub dir: PathBuf,
    /// Directories in it that the jail sees, each by its own name.
    pub shares: Vec<String>,
    /// The cgroup to be in.
    pub cgroup: PathBuf,
    /// What it logs.
    pub log: String,
}

/// A disk; its file comes as a descriptor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Disk {
    /// The guest cannot write.
    pub read_only: bool,
    /// Serial number.
    pub serial: String,
}

/// A share, by a directory of the jail.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Share {
    /// Tag.
    pub tag: String,
    /// Which of [`Begin::shares`].
    pub name: String,
    /// Nobody else changes it, so that the guest may cache it for good.
    pub unchanging: bool,
}

/// A network device; its tap comes as a descriptor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Net {
    /// Name of the tap, for people.
    pub tap: String,
    /// Hardware address.
    pub mac: Option<[u8; 6]>,
    /// MTU.
    pub mtu: Option<u16>,
    /// No offloads.
    pub plain: bool,
}

/// The VM to run. With it come, in this order: KVM, the guest's memory, the kernel, the disks,
/// the taps.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Wish {
    /// The pod's id.
    pub id: String,
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory.
    pub memory_mib: u64,
    /// By huge pages.
    pub hugepages: bool,
    /// Command line.
    pub cmdline: String,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Shares.
    pub shares: Vec<Share>,
    /// Network devices.
    pub nets: Vec<Net>,
    /// Where KVM is emulated.
    pub allow_emulated_kvm: bool,
}

/// From the daemon, once the worker is in its jail.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Order {
    /// Run this VM.
    Run(Wish),
    /// Join the stream that comes along with a port of the guest.
    Dial {
        /// For the answer.
        id: u64,
        /// The port.
        port: u32,
    },
    /// Nobody waits for this attempt any more.
    GiveUp {
        /// Which.
        id: u64,
    },
    /// A point in the VM's life, for its boot times.
    Mark {
        /// Its name.
        stage: String,
    },
    /// What the guest's console said last.
    Tail {
        /// For the answer.
        id: u64,
    },
    /// Serve `vmmctl` at the listening socket that comes along.
    Debug,
}

/// From a worker that is on its way, of whatever kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Birth {
    /// From the process that makes it: its process id on the host.
    Made {
        /// The id.
        pid: i32,
    },
    /// It is in its jail and has no right left.
    Jailed,
    /// It cannot go on. At any time, also later.
    Failed {
        /// Why.
        reason: String,
    },
}

/// From the worker of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// Its VM runs.
    Running,
    /// It cannot go on.
    Failed {
        /// Why.
        reason: String,
    },
    /// How an attempt to dial went.
    Dialled {
        /// Which.
        id: u64,
        /// An error of the host's (`errno`) and its text; `None`: the stream is joined.
        error: Option<(i32, String)>,
    },
    /// The answer to [`Order::Tail`].
    Tail {
        /// Which.
        id: u64,
        /// Its end.
        text: String,
    },
    /// Somebody asked it, at its debug socket, to stop.
    StopAsked {
        /// The grace.
        grace_ms: u64,
    },
    /// The VM has ended by itself.
    Ended {
        /// Why.
        reason: String,
        /// What the guest's console said last.
        tail: String,
    },
}

/// One end.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl Channel {
    /// Ours, and the other's.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self(ours), theirs))
    }

    /// Bounds how long [`Self::receive`] waits.
    ///
    /// # Errors
    /// What the host says.
    pub fn patience(&self, limit: Duration) -> io::Result<()> {
        let seconds = i64::try_from(limit.as_secs()).unwrap_or(i64::MAX);
        let limit = TimeVal::new(seconds, limit.subsec_micros().into());
        Ok(setsockopt(&self.0, ReceiveTimeout, &limit)?)
    }

    /// Sends without waiting: the other end has room, or is hung.
    ///
    /// # Errors
    /// The other end has gone or does not read.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        if text.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = match raw.is_empty() {
            true => &[][..],
            false => &rights[..],
        };
        let slices = [IoSlice::new(&text)];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &slices, rights, flags, None) {
                Err(nix::errno::Errno::EINTR) => {}
                other => return Ok(other.map(drop)?),
            }
        }
    }

    /// Waits for a message, with the descriptors that come with it; `None`: the other end has gone.
    ///
    /// # Errors
    /// No message came in time, or what came is none.
    pub fn receive<M: DeserializeOwned>(&self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        self.read(MsgFlags::empty(), MAX_FDS)
    }

    /// A message that is there; descriptors with it are closed unseen.
    ///
    /// # Errors
    /// None is there (`WouldBlock`), or what came is none.
    pub fn look<M: DeserializeOwned>(&self) -> io::Result<Option<M>> {
        let found = self.read(MsgFlags::MSG_DONTWAIT, 0)?;
        Ok(found.map(|(message, _)| message))
    }

    /// A message that is there, with the descriptors that come with it.
    ///
    /// # Errors
    /// None is there (`WouldBlock`), or what came is none.
    pub fn look_with_fds<M: DeserializeOwned>(&self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        self.read(MsgFlags::MSG_DONTWAIT, MAX_FDS)
    }

    fn read<M: DeserializeOwned>(
        &self,
        flags: MsgFlags,
        most: usize,
    ) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let mut fds = Vec::new();
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        let (bytes, cut) = loop {
            // Without room for them, the kernel passes no descriptors on.
            let space = (most > 0).then_some(space.as_mut_slice());
            match recvmsg::<()>(self.0.as_raw_fd(), &mut slices, space, flags) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
                Err(error) => return Err(error.into()),
                Ok(message) => {
                    let passed = match most {
                        0 => None,
                        _ => Some(message.cmsgs()?),
                    };
                    for part in passed.into_iter().flatten() {
                        if let ControlMessageOwned::ScmRights(raw) = part {
                            // SAFETY: the kernel has just made these descriptors for us.
                            fds.extend(
                                raw.into_iter()
                                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                            );
                        }
                    }
                    break (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC));
                }
            }
        };
        if bytes == 0 {
            return Ok(None);
        }
        let text = buffer.get(..bytes).unwrap_or_default();
        if cut {
            return Err(io::Error::other("a message is too long"));
        }
        Ok(Some((serde_json::from_slice(text)?, fds)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn messages_keep_their_bounds_and_their_descriptors() {
        let (ours, theirs) = Channel::pair().expect("pair");
        let theirs = Channel::from(theirs);
        let (mut near, far) = UnixStream::pair().expect("pair");
        ours.send(&Order::Dial { id: 7, port: 9 }, &[far.as_fd()])
            .expect("send");
        drop(far);
        ours.send(&Order::Debug, &[]).expect("send");
        let (order, mut fds) = theirs.receive().expect("receive").expect("message");
        assert!(matches!(order, Order::Dial { id: 7, port: 9 }));
        let mut stream = UnixStream::from(fds.pop().expect("a descriptor"));
        stream.write_all(b"x").expect("write");
        let mut byte = [0];
        near.read_exact(&mut byte).expect("read");
        let (order, fds) = theirs
            .receive::<Order>()
            .expect("receive")
            .expect("message");
        assert!(matches!(order, Order::Debug) && fds.is_empty());
        assert!(matches!(theirs.look::<Order>(), Err(e) if e.kind() == io::ErrorKind::WouldBlock));
        drop(ours);
        assert!(theirs.look::<Order>().expect("the end").is_none());
    }

    #[test]
    fn the_daemon_takes_no_descriptors_and_no_nonsense() {
        let (ours, theirs) = Channel::pair().expect("pair");
        let theirs = Channel::from(theirs);
        let (near, far) = UnixStream::pair().expect("pair");
        theirs.send(&Report::Running, &[far.as_fd()]).expect("send");
        drop(far);
        assert_eq!(ours.look().expect("look"), Some(Report::Running));
        // It was closed: nobody holds the other end.
        let mut rest = Vec::new();
        (&near).read_to_end(&mut rest).expect("the end");
        theirs.send(&"nonsense", &[]).expect("send");
        assert!(ours.look::<Report>().is_err());
        let long = "x".repeat(MAX_MESSAGE);
        assert!(theirs.send(&long, &[]).is_err());
    }
}
