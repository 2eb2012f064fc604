//! Pipes.

use alloc::collections::VecDeque;

use appkernel_core::errno::Errno;
use appkernel_hal::sync::Mutex;

use crate::task;

/// As Linux.
const CAPACITY: usize = 65536;
/// Writes of so many bytes are not mixed with others (`PIPE_BUF`).
const ATOMIC: usize = 4096;

#[derive(Debug, Default)]
struct State {
    data: VecDeque<u8>,
    readers: usize,
    writers: usize,
}

/// Bytes from writers to readers.
#[derive(Debug)]
pub struct Pipe(Mutex<State>);

/// Which end a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Read,
    Write,
}

impl Pipe {
    /// With one reader and one writer.
    pub fn new() -> Self {
        Self(Mutex::new(State {
            readers: 1,
            writers: 1,
            ..State::default()
        }))
    }

    /// An end is closed.
    pub fn close(&self, end: End) {
        {
            let mut state = self.0.lock();
            let count = match end {
                End::Read => &mut state.readers,
                End::Write => &mut state.writers,
            };
            *count = count.saturating_sub(1);
        }
        task::wake(task::FILES);
    }

    /// Readable (or at its end), writable (or without readers), and hung up.
    pub fn ready(&self, end: End) -> (bool, bool, bool) {
        let state = self.0.lock();
        match end {
            End::Read => (
                !state.data.is_empty() || state.writers == 0,
                false,
                state.writers == 0,
            ),
            End::Write => (
                false,
                CAPACITY - state.data.len() >= ATOMIC || state.readers == 0,
                state.readers == 0,
            ),
        }
    }

    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.0.lock().data.len()
    }

    /// Reads what there is; waits for at least one byte, unless at the end.
    pub fn read(&self, to: &mut [u8], wait: bool) -> Result<usize, Errno> {
        if to.is_empty() {
            return Ok(0);
        }
        let mut attempt = || {
            let mut state = self.0.lock();
            if state.data.is_empty() {
                return (state.writers == 0).then_some(0);
            }
            let count = to.len().min(state.data.len());
            for (slot, byte) in to.iter_mut().zip(state.data.drain(..count)) {
                *slot = byte;
            }
            Some(count)
        };
        let count = if wait {
            task::wait_for(task::FILES, attempt)?
        } else {
            attempt().ok_or(Errno::EAGAIN)?
        };
        task::wake(task::FILES);
        Ok(count)
    }

    /// Writes all bytes, or as many as fit without waiting.
    pub fn write(&self, from: &[u8], wait: bool) -> Result<usize, Errno> {
        let mut done = 0;
        while done < from.len() {
            let rest = from.get(done..).unwrap_or_default();
            let attempt = || {
                let mut state = self.0.lock();
                if state.readers == 0 {
                    return Some(Err(Errno::EPIPE));
                }
                let room = CAPACITY - state.data.len();
                let needed = if rest.len() <= ATOMIC { rest.len() } else { 1 };
                if room < needed {
                    return None;
                }
                let count = room.min(rest.len());
                state.data.extend(rest.iter().take(count));
                Some(Ok(count))
            };
            let result = if wait {
                task::wait_for(task::FILES, attempt).and_then(|r| r)
            } else {
                attempt().unwrap_or(Err(Errno::EAGAIN))
            };
            match result {
                Ok(count) => {
                    done += count;
                    task::wake(task::FILES);
                }
                Err(e) if done == 0 => return Err(e),
                Err(_) => break,
            }
        }
        Ok(done)
    }
}
