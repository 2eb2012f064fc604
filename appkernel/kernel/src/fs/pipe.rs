//! Pipes.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use appkernel_core::bytes;
use appkernel_core::errno::Errno;
use appkernel_hal::frames;
use appkernel_hal::sync::Mutex;

use super::file::{Kind, Ready, flag};
use super::node::Node;
use crate::task;

/// As Linux.
const CAPACITY: usize = 65536;
/// As Linux' `fs.pipe-max-size`.
pub const CAPACITY_MAX: usize = 1 << 20;
/// Writes of so many bytes are not mixed with others (`PIPE_BUF`).
const ATOMIC: usize = 4096;

#[derive(Debug, Default)]
struct State {
    data: VecDeque<u8>,
    readers: usize,
    writers: usize,
    /// Bytes that came, and that were taken.
    came: u64,
    taken: u64,
    /// Bytes it may hold; 0 for the usual number.
    capacity: usize,
}

impl State {
    fn capacity(&self) -> usize {
        match self.capacity {
            0 => CAPACITY,
            own => own,
        }
    }

    fn room(&self) -> usize {
        self.capacity().saturating_sub(self.data.len())
    }
}

/// Bytes from writers to readers.
#[derive(Debug)]
pub struct Pipe {
    number: u64,
    state: Mutex<State>,
    /// The agent moves its bytes: it is woken by what happens.
    is_agents: AtomicBool,
}

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Which end a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Read,
    Write,
    /// A fifo that is open both ways.
    Both,
}

impl Pipe {
    /// With one reader and one writer.
    pub fn new() -> Self {
        Self {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            state: Mutex::new(State {
                readers: 1,
                writers: 1,
                ..State::default()
            }),
            is_agents: AtomicBool::new(false),
        }
    }

    /// Whose other end the agent has.
    pub fn of_agent() -> Self {
        let pipe = Self::new();
        pipe.is_agents.store(true, Ordering::Relaxed);
        pipe
    }

    /// Its number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// One more file has this end.
    pub fn open(&self, end: End) {
        let mut state = self.state.lock();
        match end {
            End::Read => state.readers += 1,
            End::Write => state.writers += 1,
            End::Both => {
                state.readers += 1;
                state.writers += 1;
            }
        }
    }

    fn changed(&self) {
        task::wake(task::FILES);
        if self.is_agents.load(Ordering::Relaxed) {
            task::wake(task::AGENT);
        }
    }

    /// Bytes that can be written without waiting; `None` when nobody reads.
    pub fn room(&self) -> Option<usize> {
        let state = self.state.lock();
        (state.readers > 0).then(|| state.room())
    }

    /// An end is closed.
    pub fn close(&self, end: End) {
        {
            let mut state = self.state.lock();
            if end != End::Write {
                state.readers = state.readers.saturating_sub(1);
            }
            if end != End::Read {
                state.writers = state.writers.saturating_sub(1);
            }
        }
        self.changed();
    }

    /// How far an end is ready.
    pub fn ready(&self, end: End) -> Ready {
        let state = self.state.lock();
        match end {
            End::Read => Ready {
                readable: !state.data.is_empty(),
                hung_up: state.writers == 0,
                ..Ready::default()
            },
            End::Write => Ready {
                writable: state.room() >= ATOMIC || state.readers == 0,
                error: state.readers == 0,
                ..Ready::default()
            },
            End::Both => Ready {
                readable: !state.data.is_empty(),
                writable: state.room() >= ATOMIC,
                ..Ready::default()
            },
        }
    }

    /// Bytes that came, and that were taken.
    pub fn progress(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.came, state.taken)
    }

    /// Bytes it may hold.
    pub fn capacity(&self) -> usize {
        self.state.lock().capacity()
    }

    /// Sets how many bytes it may hold: a power of two of pages.
    ///
    /// # Errors
    /// `EINVAL`, `EPERM` if it is more than it may be, `EBUSY` if there are more bytes in it.
    pub fn set_capacity(&self, wanted: u32) -> Result<usize, Errno> {
        if wanted == 0 || wanted > 1 << 31 {
            return Err(Errno::EINVAL);
        }
        let bytes = (wanted as usize).next_multiple_of(4096).next_power_of_two();
        // For everybody: what waits in pipes is the kernel's memory.
        if bytes > CAPACITY_MAX {
            return Err(Errno::EPERM);
        }
        let mut state = self.state.lock();
        if bytes < state.data.len() {
            return Err(Errno::EBUSY);
        }
        state.capacity = bytes;
        drop(state);
        self.changed();
        Ok(bytes)
    }

    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.state.lock().data.len()
    }

    /// A copy of the first bytes in it.
    pub fn peek(&self, most: usize) -> Vec<u8> {
        let state = self.state.lock();
        let mut copy = alloc::vec![0; most.min(state.data.len())];
        bytes::copy(&state.data, &mut copy);
        copy
    }

    /// Takes bytes out that were seen by `peek`.
    pub fn skip(&self, count: usize) {
        {
            let mut state = self.state.lock();
            let count = count.min(state.data.len());
            state.data.drain(..count);
            state.taken += count as u64;
        }
        self.changed();
    }

    /// Whether more can come.
    pub fn has_writers(&self) -> bool {
        self.state.lock().writers > 0
    }

    /// Reads what there is; waits for at least one byte, unless at the end.
    pub fn read(&self, to: &mut [u8], wait: bool) -> Result<usize, Errno> {
        if to.is_empty() {
            return Ok(0);
        }
        let mut attempt = || {
            let mut state = self.state.lock();
            if state.data.is_empty() {
                return (state.writers == 0).then_some(0);
            }
            let count = bytes::take(&mut state.data, to);
            state.taken += count as u64;
            Some(count)
        };
        let count = if wait {
            task::wait_for(task::FILES, attempt)?
        } else {
            attempt().ok_or(Errno::EAGAIN)?
        };
        self.changed();
        Ok(count)
    }

    /// Writes all bytes, or as many as fit without waiting.
    pub fn write(&self, from: &[u8], wait: bool) -> Result<usize, Errno> {
        // What waits in pipes is the kernel's memory.
        if frames::is_scarce() {
            return Err(Errno::ENOMEM);
        }
        let mut done = 0;
        while done < from.len() {
            let rest = from.get(done..).unwrap_or_default();
            let attempt = || {
                let mut state = self.state.lock();
                if state.readers == 0 {
                    return Some(Err(Errno::EPIPE));
                }
                let room = state.room();
                let needed = if rest.len() <= ATOMIC { rest.len() } else { 1 };
                if room < needed {
                    return None;
                }
                let count = room.min(rest.len());
                if !bytes::add(&mut state.data, rest.get(..count).unwrap_or_default()) {
                    return Some(Err(Errno::ENOMEM));
                }
                state.came += count as u64;
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
                    self.changed();
                }
                Err(e) if done == 0 => return Err(e),
                Err(_) => break,
            }
        }
        Ok(done)
    }
}

/// Pipes behind the fifos that are open.
static FIFOS: Mutex<BTreeMap<(u64, u64), Weak<Pipe>>> = Mutex::new(BTreeMap::new());

/// Opens a fifo; waits for the other side if `wait`.
pub fn open_fifo(node: &Node, access: u32, wait: bool) -> Result<Kind, Errno> {
    let pipe = {
        let mut fifos = FIFOS.lock();
        fifos.retain(|_, pipe| pipe.strong_count() > 0);
        let known = fifos.get(&node.identity()).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let pipe = Arc::new(Pipe::new());
            *pipe.state.lock() = State::default();
            fifos.insert(node.identity(), Arc::downgrade(&pipe));
            pipe
        })
    };
    let end = match access {
        0 => End::Read,
        flag::WRITE_ONLY => End::Write,
        // Not for fifos by POSIX; Linux lets it be, programs use it to never wait.
        _ => End::Both,
    };
    pipe.open(end);
    task::wake(task::FILES);
    let other = |pipe: &Pipe| {
        let state = pipe.state.lock();
        match end {
            End::Read => state.writers > 0 || !state.data.is_empty(),
            End::Write => state.readers > 0,
            End::Both => true,
        }
    };
    if !other(&pipe) {
        if !wait && end == End::Write {
            pipe.close(end);
            return Err(Errno::ENXIO);
        }
        if wait && let Err(e) = task::wait_for(task::FILES, || other(&pipe).then_some(())) {
            pipe.close(end);
            return Err(e);
        }
    }
    Ok(Kind::Pipe(pipe, end))
}
