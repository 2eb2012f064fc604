//! A pod's VM, on threads of the daemon or in a process of its own.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_vmm::DiskConfig;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::daemon::sandbox::OwnEnd;
use crate::daemon::worker::Worker;
use crate::engine::microvm::MicroVm;
use crate::engine::stdio::watch;
use crate::engine::{EngineError, Sandbox as _};

/// How much of the console is logged when a guest ends by itself, in bytes.
const LAST_WORDS: usize = 2048;

/// A VM. Clones are the same one.
#[derive(Debug, Clone)]
pub enum Machine {
    /// On threads of this process.
    Thread(Arc<MicroVm>),
    /// In a jailed process.
    Worker(Arc<Worker>),
}

/// Resolves at an end.
pub type Ending = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Machine {
    /// The pod's id.
    pub fn id(&self) -> &str {
        match self {
            Self::Thread(vm) => vm.vm().id(),
            Self::Worker(worker) => worker.id(),
        }
    }

    /// One attempt to connect to a port of the guest.
    ///
    /// # Errors
    /// Nothing listens there, or the VM has ended.
    pub async fn dial(&self, port: u32) -> io::Result<UnixStream> {
        match self {
            Self::Thread(vm) => dial(vm, port).await,
            Self::Worker(worker) => worker.dial(port).await,
        }
    }

    /// Resolves when the VM has ended.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn ended(&self) -> Result<Ending, EngineError> {
        Ok(match self {
            Self::Thread(vm) => Box::pin(ended(vm)?),
            Self::Worker(worker) => Box::pin(worker.ended()),
        })
    }

    /// The error for a guest that ended by itself.
    pub fn end_error(&self, during: &'static str) -> EngineError {
        match self {
            Self::Thread(vm) => vm.ended(during),
            Self::Worker(worker) => EngineError::GuestEnded {
                during,
                reason: worker.end_reason().reason,
                console: String::new(),
                remedy: "",
            },
        }
    }

    /// The same for the log.
    pub fn own_end(&self) -> OwnEnd {
        let words = match self {
            Self::Thread(vm) => last_words(&vm.vm().console_tail()),
            Self::Worker(worker) => last_words(worker.end_reason().tail.as_bytes()),
        };
        OwnEnd {
            reason: self.end_error("running").to_string(),
            details: match words.is_empty() {
                true => words,
                false => format!("last words of the guest:\n{words}"),
            },
        }
    }

    /// The error for a guest that does not answer.
    pub async fn hangs(&self, during: &'static str, waited: Duration) -> EngineError {
        match self {
            Self::Thread(vm) => vm.hangs(during, waited),
            Self::Worker(worker) => EngineError::GuestHangs {
                during,
                seconds: waited.as_secs(),
                console: worker.last_line().await,
            },
        }
    }

    /// Notes a point in the VM's life.
    pub fn mark(&self, stage: &str) {
        match self {
            Self::Thread(vm) => vm.vm().mark(stage),
            Self::Worker(worker) => worker.mark(stage),
        }
    }

    /// Brings what is mounted at a place of the pod's directory to the VM, that sees it by the path
    /// `guest`, which ends in the same name. Blocks shortly.
    ///
    /// # Errors
    /// The host refuses it.
    pub fn show(&self, share: &str, guest: &str) -> io::Result<()> {
        match self {
            // It is there.
            Self::Thread(_) => Ok(()),
            Self::Worker(worker) => {
                let name = Path::new(guest).file_name().unwrap_or_default();
                worker.jailed().show(share, &name.to_string_lossy())
            }
        }
    }

    /// Puts a disk into a slot that the VM was given at boot. Blocks shortly.
    ///
    /// # Errors
    /// The VM refuses it, or is in a process of its own.
    pub fn attach_disk(&self, slot: usize, disk: DiskConfig) -> Result<(), EngineError> {
        match self {
            Self::Thread(vm) => vm.attach_disk(slot, disk),
            Self::Worker(_) => Err(not_in_a_process("a disk for a running VM")),
        }
    }

    /// Takes it out again.
    ///
    /// # Errors
    /// As [`Self::attach_disk`].
    pub fn detach_disk(&self, slot: usize) -> Result<(), EngineError> {
        match self {
            Self::Thread(vm) => vm.detach_disk(slot),
            Self::Worker(_) => Err(not_in_a_process("a disk for a running VM")),
        }
    }

    /// Makes vCPUs, up to `count`, that the guest may bring online. Blocks shortly; their threads
    /// are in the cgroup of the caller.
    ///
    /// # Errors
    /// The host refuses it, or the VM is in a process of its own.
    pub fn grow_vcpus(&self, count: u8) -> Result<(), EngineError> {
        match self {
            Self::Thread(vm) => vm.vm().grow_vcpus(count).map(drop).map_err(Into::into),
            Self::Worker(_) => Err(not_in_a_process("more CPUs for a running VM")),
        }
    }

    /// Wants the guest to have so many bytes beyond those of its boot ([`Self::added_memory`] says
    /// how far it is).
    ///
    /// # Errors
    /// The VM refuses it, or is in a process of its own.
    pub fn request_memory(&self, bytes: u64) -> Result<(), EngineError> {
        match self {
            Self::Thread(vm) => vm.vm().request_memory(bytes).map_err(Into::into),
            Self::Worker(_) => Err(not_in_a_process("more memory for a running VM")),
        }
    }

    /// Bytes that the guest has beyond those of its boot.
    pub fn added_memory(&self) -> u64 {
        match self {
            Self::Thread(vm) => vm.vm().added_memory().map_or(0, |(_, has)| has),
            Self::Worker(_) => 0,
        }
    }

    /// What it says of itself.
    pub fn info(&self) -> Option<String> {
        match self {
            Self::Thread(vm) => vm.inspect().ok().map(|vm| vm.to_string()),
            Self::Worker(worker) => {
                Some(serde_json::json!({"worker": worker.jailed().pid()}).to_string())
            }
        }
    }

    /// Ends it. Blocks shortly; [`Self::take_down`] waits.
    pub fn stop(&self) {
        match self {
            Self::Thread(vm) => vm.vm().stop(),
            Self::Worker(worker) => worker.jailed().kill(),
        }
    }

    /// Ends it and waits until it has gone. Blocks.
    pub fn take_down(&self) {
        match self {
            Self::Thread(vm) => vm.vm().stop(),
            Self::Worker(worker) => worker.jailed().end(),
        }
    }
}

/// A VM in a process has no slots and does not grow ([`Guests::sizes`](super::guests::Guests)), so
/// nobody asks.
fn not_in_a_process(what: &str) -> EngineError {
    EngineError::io(what)(io::Error::new(
        io::ErrorKind::Unsupported,
        "not with isolation = \"process\"",
    ))
}

fn ended(vm: &MicroVm) -> Result<impl Future<Output = ()> + Send + use<>, EngineError> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    let event = vm.vm().exit_event();
    // SAFETY: the VM keeps its event open; the descriptor is only duplicated.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let fd = fd
        .try_clone_to_owned()
        .map_err(EngineError::io("watching the VM"))?;
    let watched = watch(fd, Interest::READABLE).map_err(EngineError::io("watching the VM"))?;
    Ok(async move {
        let _ = watched.readable().await;
    })
}

/// Without a thread: the device's thread tells.
async fn dial(vm: &MicroVm, port: u32) -> io::Result<UnixStream> {
    let vsock = vm
        .vm()
        .vsock()
        .ok_or(io::Error::from(io::ErrorKind::Unsupported))?;
    let (sender, receiver) = oneshot::channel();
    let attempt = vsock.start_connect(port, move |outcome| {
        let _ = sender.send(outcome);
    })?;
    let outcome = receiver.await;
    drop(attempt);
    let stream = outcome.unwrap_or_else(|_| Err(io::ErrorKind::NotConnected.into()))?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// The end of a guest's console as one may log it: the guest is not trusted with control
/// characters, nor with filling the log.
fn last_words(tail: &[u8]) -> String {
    let start = tail.len().saturating_sub(LAST_WORDS);
    let text = String::from_utf8_lossy(tail.get(start..).unwrap_or_default()).into_owned();
    let clean = |c: &char| *c == '\n' || !c.is_control();
    text.chars()
        .filter(clean)
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_harmless() {
        let mut tail = vec![b'x'; 5000];
        tail.extend_from_slice(b"\n\x1b[2J\x07Kernel panic\r\n\xff");
        let words = last_words(&tail);
        assert!(words.len() <= LAST_WORDS + 3);
        assert!(words.ends_with("[2JKernel panic\n\u{fffd}"), "{words:?}");
        assert_eq!(last_words(b""), "");
    }
}
