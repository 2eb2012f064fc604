//! Where the host comes in: vsock, or unix sockets when the agent runs on a host itself.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use bulkhead_protocol::HOST_CID;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen,
    socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};

/// A listening socket.
pub enum Listener {
    /// Of the guest.
    Vsock(AsyncFd<OwnedFd>),
    /// Of a test.
    Unix(UnixListener),
    /// Of a pod's agent on a host.
    Host(UnixListener),
}

impl Listener {
    /// Listens on a vsock port, for the host only.
    pub fn vsock(port: u32) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
        listen(&fd, Backlog::new(128)?)?;
        Ok(Self::Vsock(watch(fd, Interest::READABLE)?))
    }

    /// Waits for the host to connect.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        match self {
            Self::Unix(listener) => Ok(listener.accept().await?.0),
            Self::Host(listener) => loop {
                let connection = listener.accept().await?.0;
                let peer = connection.peer_cred()?;
                // 0: outside of our PID namespace. What runs in it does not command.
                if peer.uid() == 0 && peer.pid().is_none_or(|pid| pid == 0) {
                    return Ok(connection);
                }
                crate::warning!("refused a connection of process {:?}", peer.pid());
            },
            Self::Vsock(fd) => loop {
                let mut ready = fd.readable().await?;
                let accepted = ready.try_io(|fd| {
                    let fd = accept4(
                        fd.as_raw_fd(),
                        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                    )?;
                    Ok(owned(fd))
                });
                let Ok(accepted) = accepted else { continue };
                let connection = accepted?;
                // A process of a container may connect over the loopback or from a nested
                // guest: only the host commands.
                let peer = getpeername::<VsockAddr>(connection.as_raw_fd())?;
                if peer.cid() != HOST_CID {
                    crate::warning!("refused a connection from CID {}", peer.cid());
                    continue;
                }
                // read, write, shutdown and poll are the same calls for every stream socket, so
                // tokio's unix stream serves for vsock too; only its address is never asked for.
                return UnixStream::from_std(StdUnixStream::from(connection));
            },
        }
    }
}

/// Waits on a descriptor in the runtime of the caller.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names one open descriptor as long as it lives, and the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

fn owned(fd: std::os::fd::RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: accept4 has just returned this descriptor and nothing else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Accepts until the process ends. `serve` is called for each connection and must not block.
pub async fn accept_forever(listener: Listener, mut serve: impl FnMut(UnixStream)) {
    loop {
        match listener.accept().await {
            Ok(stream) => serve(stream),
            Err(error) => {
                // Out of descriptors or memory: connections under way must end first.
                crate::warning!("accept: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}
