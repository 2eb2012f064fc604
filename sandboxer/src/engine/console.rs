//! The guest's serial console, for the terminal and for those who attach.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Attached at once.
const MAX_ATTACHED: usize = 8;
/// How long a vCPU waits for a reader that does not read; then the output is dropped, so that a
/// stopped terminal cannot stop the VM for ever.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long between two looks at such a reader.
const LOOK: Duration = Duration::from_millis(5);

/// What is written to is a file even where it is a socket: the vCPU's thread writes, and it may do
/// little else (`bulkhead_vmm::seccomp`). It closes nothing for the same reason.
#[derive(Default)]
struct Inner {
    primary: Option<File>,
    attached: Vec<(u64, File)>,
    /// Those who have left; closed by the next who comes or goes.
    left: Vec<File>,
    next: u64,
}

/// Passes the console's output on. Clones share it.
#[derive(Clone, Default)]
pub struct ConsoleHub(Arc<Mutex<Inner>>);

impl fmt::Debug for ConsoleHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConsoleHub")
    }
}

impl ConsoleHub {
    /// A hub that also writes to `primary`, usually the terminal.
    pub fn new(primary: Option<OwnedFd>) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            primary: primary.map(File::from),
            ..Inner::default()
        })))
    }

    /// Starts to copy output to `stream`, beginning with `tail`; the result is for
    /// [`Self::detach`].
    ///
    /// # Errors
    /// Too many are attached, or the stream is closed.
    pub fn attach(&self, stream: UnixStream, tail: &[u8]) -> io::Result<u64> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.attached.len() >= MAX_ATTACHED {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("{MAX_ATTACHED} are attached to the console already"),
            ));
        }
        // The tail first, blocking: it fits into the socket's buffer.
        (&stream).write_all(tail)?;
        stream.set_nonblocking(true)?;
        let number = inner.next;
        inner.next += 1;
        inner.attached.push((number, OwnedFd::from(stream).into()));
        inner.left.clear();
        Ok(number)
    }

    /// Forgets one who has left, also while the guest is silent.
    pub fn detach(&self, number: u64) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.attached.retain(|(other, _)| *other != number);
        inner.left.clear();
    }
}

impl Write for ConsoleHub {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(primary) = &mut inner.primary {
            write_patiently(primary, data);
        }
        // A reader that does not keep up loses output; one that has gone is forgotten.
        let Inner { attached, left, .. } = &mut *inner;
        let gone = attached.extract_if(.., |(_, reader)| match reader.write(data) {
            Ok(_) => false,
            Err(e) => !matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ),
        });
        left.extend(gone.map(|(_, reader)| reader));
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_patiently(file: &mut File, mut data: &[u8]) {
    let begin = Instant::now();
    while !data.is_empty() {
        match file.write(data) {
            Ok(0) => return,
            Ok(n) => data = data.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if begin.elapsed() > PATIENCE {
                    return;
                }
                std::thread::park_timeout(LOOK);
            }
            Err(_) => return,
        }
    }
}

/// The last line of a console that says something, cleaned for a message.
pub fn last_line(tail: &[u8]) -> String {
    let text = String::from_utf8_lossy(tail);
    let line = text
        .lines()
        .rev()
        .map(str::trim)
        .find(|l| !l.is_empty())
        .unwrap_or("");
    // The guest chose these bytes and a terminal shows them.
    let clean: String = line.chars().filter(|c| !c.is_control()).take(160).collect();
    if clean.is_empty() {
        String::new()
    } else {
        format!("; its last words: {clean:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_attached_get_tail_and_output_and_may_leave() {
        let mut hub = ConsoleHub::default();
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        hub.attach(theirs, b"before ").expect("attached");
        hub.write_all(b"after").expect("written");
        let mut text = [0u8; 12];
        ours.read_exact(&mut text).expect("read");
        assert_eq!(&text, b"before after");
        drop(ours);
        hub.write_all(b"x").expect("nobody there");
        assert!(hub.0.lock().expect("lock").attached.is_empty());
    }

    #[test]
    fn a_reader_that_sleeps_does_not_stop_the_guest() {
        let mut hub = ConsoleHub::default();
        let (_ours, theirs) = UnixStream::pair().expect("pair");
        hub.attach(theirs, b"").expect("attached");
        for _ in 0..10_000 {
            hub.write_all(&[b'x'; 1000]).expect("written");
        }
    }

    #[test]
    fn last_words_are_harmless() {
        assert_eq!(
            last_line(b"a\nKernel panic\x1b[2J\n\n"),
            "; its last words: \"Kernel panic[2J\""
        );
        assert_eq!(last_line(b""), "");
    }
}
