//! A running guest as the daemon sees it: its VM, and the connection to its agent.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::CONTROL_PORT;
use bulkhead_protocol::sandbox::ConfigureSandboxRequest;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::daemon::agent::link::{Clock, Dial, Link};
use crate::engine::EngineError;
use crate::engine::microvm::MicroVm;
use crate::engine::stdio::watch;
use crate::timeouts;

/// First and longest pause between two attempts to reach an agent that is not listening yet.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// A guest whose agent answers.
#[derive(Debug)]
pub struct Guest {
    vm: Arc<MicroVm>,
    link: Arc<Link<VmWay>>,
}

/// The way to a guest's ports.
#[derive(Debug)]
pub struct VmWay(Arc<MicroVm>);

impl Dial for VmWay {
    async fn dial(&self, port: u32) -> std::io::Result<UnixStream> {
        dial(&self.0, port).await
    }
}

impl Guest {
    /// Waits until the agent of a started VM answers, and sets the sandbox up.
    ///
    /// # Errors
    /// The guest ends or does not answer in time, or refuses.
    pub async fn reach(
        vm: Arc<MicroVm>,
        request: &ConfigureSandboxRequest,
    ) -> Result<Self, EngineError> {
        let within = timeouts::boot();
        let attempts = async {
            let mut pause = RETRY.0;
            loop {
                if let Ok(stream) = dial(&vm, CONTROL_PORT).await {
                    return stream;
                }
                // Refused: the kernel is up, the agent not yet.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
            }
        };
        let ended = ended(&vm)?;
        let stream = tokio::select! {
            stream = tokio::time::timeout(within, attempts) => {
                stream.map_err(|_| vm.hangs("waiting for the agent", within))?
            }
            () = ended => return Err(vm.ended("booting")),
        };
        vm.vm().mark("agent answers");
        let mut link = Link::new(VmWay(Arc::clone(&vm)), stream);
        link.configure(vm.vm().id(), request, Clock::Guest).await?;
        vm.vm().mark("configured");
        Ok(Self {
            vm,
            link: Arc::new(link),
        })
    }

    /// The connection to its agent.
    pub fn link(&self) -> &Arc<Link<VmWay>> {
        &self.link
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<MicroVm> {
        &self.vm
    }

    /// Asks the guest to go down, waits, and ends it if it does not heed that.
    pub async fn shut_down(&self, grace: Duration) {
        let asked = self.link.shut_down(grace);
        let orderly = async {
            let Ok(ended) = ended(&self.vm) else {
                return asked.await;
            };
            tokio::pin!(ended);
            // Its end may be known before its answer, or instead of it.
            tokio::select! {
                () = &mut ended => {}
                () = asked => ended.await,
            }
        };
        let _ = tokio::time::timeout(timeouts::shutdown() + grace, orderly).await;
        self.vm.vm().stop();
    }
}

/// Resolves when the VM has ended.
///
/// # Errors
/// Out of descriptors.
pub fn ended(vm: &MicroVm) -> Result<impl Future<Output = ()> + Send + use<>, EngineError> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    let event = vm.vm().exit_event();
    // SAFETY: the VM keeps its event open; the descriptor is only duplicated.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let fd = fd
        .try_clone_to_owned()
        .map_err(EngineError::io("watching the VM"))?;
    let watched: AsyncFd<_> =
        watch(fd, Interest::READABLE).map_err(EngineError::io("watching the VM"))?;
    Ok(async move {
        let _ = watched.readable().await;
    })
}

/// One attempt, without a thread: the device's thread tells.
async fn dial(vm: &MicroVm, port: u32) -> std::io::Result<UnixStream> {
    let vsock = vm
        .vm()
        .vsock()
        .ok_or(std::io::Error::from(std::io::ErrorKind::Unsupported))?;
    let (sender, receiver) = oneshot::channel();
    let attempt = vsock.start_connect(port, move |outcome| {
        let _ = sender.send(outcome);
    })?;
    let outcome = receiver.await;
    drop(attempt);
    let stream = outcome.unwrap_or_else(|_| Err(std::io::ErrorKind::NotConnected.into()))?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}
