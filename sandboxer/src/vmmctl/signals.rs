//! Signals sent to vmmctl, as bytes in a pipe that the main loop waits for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use nix::fcntl::OFlag;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Signals that are passed on to the program, besides those a terminal sends.
const PASSED_ON: [Signal; 7] = [
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

static WRITE_END: AtomicI32 = AtomicI32::new(-1);
/// Ctrl-C pressed and not yet seen by the main loop.
static WAITING: AtomicU32 = AtomicU32::new(0);

extern "C" fn handler(signal: libc::c_int) {
    // Only async-signal-safe calls in here.
    let fd = WRITE_END.load(Ordering::Relaxed);
    let byte = u8::try_from(signal).unwrap_or(0);
    // SAFETY: writes one byte from our stack to a descriptor that is never closed; a full pipe
    // loses the byte, which is fine. `errno` is restored for the code that was interrupted.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(fd, std::ptr::from_ref(&byte).cast(), 1);
        *libc::__errno_location() = errno;
    }
    if signal == libc::SIGINT && WAITING.fetch_add(1, Ordering::Relaxed) >= 1 {
        // The first one was not even looked at: we are stuck. What is left behind is cleaned by
        // the next vmmctl.
        super::terminal::restore_in_signal_handler();
        // SAFETY: ends the process without running anything else.
        unsafe { libc::_exit(i32::from(super::error::INTERRUPTED)) }
    }
}

/// The reading end.
#[derive(Debug)]
pub struct Signals {
    read: OwnedFd,
}

impl Signals {
    /// Starts to catch signals. Once per process.
    ///
    /// # Errors
    /// No pipe can be made.
    pub fn install() -> io::Result<Self> {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        WRITE_END.store(write.into_raw_fd(), Ordering::Relaxed);
        let action = SigAction::new(
            SigHandler::Handler(handler),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        for signal in PASSED_ON {
            // SAFETY: the handler does only what a signal handler may.
            let before = unsafe { sigaction(signal, &action) }?;
            // nohup: the terminal's end is not to end the program.
            if signal == Signal::SIGHUP && matches!(before.handler(), SigHandler::SigIgn) {
                // SAFETY: puts back what was there.
                unsafe { sigaction(signal, &before) }?;
            }
        }
        Ok(Self { read })
    }

    /// For waiting in a tokio runtime; then call [`Self::take`].
    ///
    /// # Errors
    /// The descriptor cannot be watched.
    pub fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        crate::engine::stdio::watch(self.read.try_clone()?, Interest::READABLE)
    }

    /// Signals that came since the last call.
    pub fn take(&self) -> Vec<i32> {
        let mut buffer = [0u8; 64];
        let n = nix::unistd::read(&self.read, &mut buffer).unwrap_or(0);
        let signals: Vec<i32> = buffer.iter().take(n).map(|b| i32::from(*b)).collect();
        if signals.contains(&libc::SIGINT) {
            WAITING.store(0, Ordering::Relaxed);
        }
        signals
    }

    /// Whether the user wants to end it: for long work that does not take signals from the pipe.
    pub fn interrupted(&self) -> bool {
        WAITING.load(Ordering::Relaxed) > 0
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}
