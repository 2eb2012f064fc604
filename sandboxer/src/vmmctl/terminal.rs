//! The terminal: raw mode, size, colour.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicPtr, Ordering};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Settings to go back to when a signal ends us in raw mode.
static SAVED: AtomicPtr<libc::termios> = AtomicPtr::new(std::ptr::null_mut());

/// Raw mode of standard input while it lives.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Passes every key on as it is; `None` if standard input is no terminal.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        // Kept for the signal handler; made once, never freed.
        let saved = Box::into_raw(Box::new(libc::termios::from(before.clone())));
        SAVED.store(saved, Ordering::Release);
        tcsetattr(stdin.as_fd(), SetArg::TCSADRAIN, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &self.before);
        SAVED.store(std::ptr::null_mut(), Ordering::Release);
    }
}

/// Leaves raw mode; async-signal-safe.
pub fn restore_in_signal_handler() {
    let saved = SAVED.load(Ordering::Acquire);
    if !saved.is_null() {
        // SAFETY: the pointer is null or points to settings that are never freed; tcsetattr is
        // async-signal-safe.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved) };
    }
}

nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);

/// Columns and rows of the terminal on standard input or output.
pub fn size() -> Option<(u16, u16)> {
    for fd in [libc::STDIN_FILENO, libc::STDOUT_FILENO] {
        let mut size = libc::winsize {
            ws_row: 0,
            ws_col: 0,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the ioctl fills in a winsize that lives for the duration of the call.
        if unsafe { window_size(fd, &raw mut size) }.is_ok() && size.ws_col > 0 {
            return Some((size.ws_col, size.ws_row));
        }
    }
    None
}

/// Whether to draw on standard error: a terminal, and nobody asked for plain text.
pub fn fancy_stderr() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Whether to use colour on standard output.
pub fn colour_stdout() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}
