//! A person at a terminal: tests type and wait for what is shown.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command};
use std::time::Instant;

use crate::env::PATIENCE;
use crate::process::Guard;

/// A person at a terminal: a program that runs on a pseudo-terminal of its own.
#[derive(Debug)]
pub struct Terminal {
    master: fs::File,
    child: Guard,
    seen: String,
}

impl Terminal {
    /// Starts `command` as the leader of a session on a new terminal.
    pub fn start(command: &mut Command) -> Self {
        let pty = nix::pty::openpty(None, None).unwrap();
        let slave: OwnedFd = pty.slave;
        let (input, output, errors) = (
            slave.try_clone().unwrap(),
            slave.try_clone().unwrap(),
            slave.try_clone().unwrap(),
        );
        let raw = slave.as_raw_fd();
        command.stdin(input).stdout(output).stderr(errors);
        // SAFETY: setsid and an ioctl on an open descriptor are safe between fork and exec.
        unsafe {
            use std::os::unix::process::CommandExt;
            command.pre_exec(move || {
                if libc::setsid() < 0 || libc::ioctl(raw, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child: Child = command.spawn().unwrap();
        Self {
            master: fs::File::from(pty.master),
            child: Guard(child),
            seen: String::new(),
        }
    }

    /// What the person types.
    pub fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Gives the terminal another size.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the descriptor is a terminal and the argument a valid winsize.
        let done = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
        assert_eq!(done, 0);
    }

    /// Waits until `text` is shown after what was waited for before.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            assert!(Instant::now() < deadline, "no {text:?} in {:?}", self.seen);
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(500u16)).unwrap();
            if fds[0].any() == Some(true) {
                let mut buffer = [0; 4096];
                match self.master.read(&mut buffer) {
                    Ok(n) if n > 0 => self.seen.push_str(&String::from_utf8_lossy(&buffer[..n])),
                    _ => panic!("the terminal was closed without {text:?}: {:?}", self.seen),
                }
            }
        }
    }

    /// The exit code, when it has ended.
    pub fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "did not end: {:?}", self.seen);
            // Keeps the terminal from filling up.
            use std::os::fd::AsFd;
            let mut fds = [nix::poll::PollFd::new(
                self.master.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            let _ = nix::poll::poll(&mut fds, nix::poll::PollTimeout::from(100u16));
            let mut buffer = [0; 4096];
            if fds[0].any() == Some(true) && self.master.read(&mut buffer).is_err() {
                std::thread::yield_now();
            }
        }
    }
}
