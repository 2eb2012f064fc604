//! Terminals: a master and a slave with a line discipline between them (termios(3), pty(7)).

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::any::Any;

use appkernel_core::errno::Errno;
use appkernel_core::terminal::{Discipline, Effect};
use appkernel_hal::sync::Mutex;

use super::dev;
use super::file::{Object, Ready};
use super::node::kind;
use crate::signal::{self, Info, Signal};
use crate::task::{self, Task};

/// Terminals at once.
const MAX_TERMINALS: u32 = 256;
/// Bytes that wait for the master's reader; then writers wait.
const MAX_OUTPUT: usize = 64 << 10;
/// Bytes that wait for the program.
const MAX_INPUT: usize = 4096;

#[derive(Default)]
struct State {
    discipline: Discipline,
    output: VecDeque<u8>,
    size: [u16; 4],
    session: u32,
    foreground: u32,
    slaves: usize,
    /// A slave was open at some time: without any, it is hung up.
    was_open: bool,
    master_closed: bool,
}

/// A terminal.
pub struct Pty {
    /// Its number, as in /dev/pts.
    pub number: u32,
    /// The agent has the master.
    of_agent: bool,
    state: Mutex<State>,
}

static ALL: Mutex<Vec<Weak<Pty>>> = Mutex::new(Vec::new());

/// All terminals.
fn all() -> Vec<Arc<Pty>> {
    ALL.lock().iter().filter_map(Weak::upgrade).collect()
}

/// The terminal of a number.
pub fn find(number: u32) -> Option<Arc<Pty>> {
    all().into_iter().find(|pty| pty.number == number)
}

/// The terminal that controls a session.
pub fn of_session(session: u32) -> Option<Arc<Pty>> {
    all()
        .into_iter()
        .find(|pty| session != 0 && pty.state.lock().session == session)
}

/// A new terminal.
pub fn make(of_agent: bool) -> Result<Arc<Pty>, Errno> {
    let mut all = ALL.lock();
    all.retain(|pty| pty.strong_count() > 0);
    let used: Vec<u32> = all
        .iter()
        .filter_map(|p| Some(p.upgrade()?.number))
        .collect();
    let number = (0..MAX_TERMINALS)
        .find(|n| !used.contains(n))
        .ok_or(Errno::ENOSPC)?;
    let pty = Arc::new(Pty {
        number,
        of_agent,
        state: Mutex::new(State::default()),
    });
    all.push(Arc::downgrade(&pty));
    Ok(pty)
}

fn signal_group(group: u32, signal: Signal) {
    if group == 0 {
        return;
    }
    let mut told = Vec::new();
    for task in task::living() {
        if task.links.lock().group == group && !told.contains(&task.process) {
            told.push(task.process);
            signal::send_process(task.process, signal, Info::default());
        }
    }
}

impl Pty {
    fn changed(&self) {
        task::wake(task::FILES);
        if self.of_agent {
            task::wake(task::AGENT);
        }
    }

    /// The slave, opened by a program.
    pub fn open(self: &Arc<Self>) -> Arc<dyn Object> {
        {
            let mut state = self.state.lock();
            state.slaves += 1;
            state.was_open = true;
        }
        Arc::new(Slave(Arc::clone(self)))
    }

    /// The terminal controls a session from now on.
    pub fn control(&self, session: u32) {
        let mut state = self.state.lock();
        state.session = session;
        state.foreground = session;
    }

    /// As `control`, if neither has another already.
    pub fn take_over(&self, session: u32) {
        if of_session(session).is_none() && self.state.lock().session == 0 {
            self.control(session);
        }
    }

    /// Bytes that can be typed; `None` when nobody will read them.
    pub fn input_room(&self) -> Option<usize> {
        let state = self.state.lock();
        let gone = state.was_open && state.slaves == 0;
        (!gone).then(|| MAX_INPUT.saturating_sub(state.discipline.waiting()))
    }

    /// Types bytes.
    pub fn input(&self, bytes: &[u8]) {
        let mut signals = Vec::new();
        let group = {
            let mut state = self.state.lock();
            let state = &mut *state;
            for byte in bytes {
                match state.discipline.typed(*byte, &mut state.output) {
                    Effect::None => {}
                    Effect::Signal(number) => signals.push(Signal(number)),
                }
            }
            state.foreground
        };
        for signal in signals {
            signal_group(group, signal);
        }
        self.changed();
    }

    /// Types the character that ends a file.
    pub fn input_ended(&self) {
        let end = self.state.lock().discipline.end_character();
        self.input(&[end]);
    }

    /// Takes what programs wrote; `EAGAIN` if there is nothing yet, 0 when nobody has the slave.
    pub fn take_output(&self, to: &mut [u8]) -> Result<usize, Errno> {
        let count = {
            let mut state = self.state.lock();
            if state.output.is_empty() {
                let gone = state.was_open && state.slaves == 0;
                return if gone { Ok(0) } else { Err(Errno::EAGAIN) };
            }
            let count = to.len().min(state.output.len());
            for (slot, byte) in to.iter_mut().zip(state.output.drain(..count)) {
                *slot = byte;
            }
            count
        };
        self.changed();
        Ok(count)
    }

    /// Sets the size in characters; who is in front is told.
    pub fn resize(&self, columns: u16, rows: u16) {
        let group = {
            let mut state = self.state.lock();
            state.size[0] = rows;
            state.size[1] = columns;
            state.foreground
        };
        signal_group(group, Signal::WINCH);
    }

    /// Number as a device.
    pub fn rdev(&self) -> u32 {
        dev::number(136, self.number)
    }

    fn hang_up(&self) {
        let (session, group) = {
            let mut state = self.state.lock();
            state.master_closed = true;
            (state.session, state.foreground)
        };
        signal_group(group, Signal::HUP);
        if session != group {
            signal_group(session, Signal::HUP);
        }
        self.changed();
    }

    /// The calls of ioctl that are for terminals. `value` is what the program's argument points to,
    /// as far as the call reads it; the answer is what is written there.
    pub fn control_call(
        &self,
        task: &Task,
        request: u32,
        value: &[u8; 64],
        plain: u64,
        is_master: bool,
    ) -> Result<Vec<u8>, Errno> {
        let container = &task.container;
        let session = task.links.lock().session;
        let visible = |id: u32| crate::container::visible(id).to_le_bytes().to_vec();
        let mut state = self.state.lock();
        let own = state.session == session;
        match request {
            0x5401 => Ok(state.discipline.settings().to_vec()),
            0x5402..=0x5404 => {
                let mut settings = [0; Discipline::SETTINGS];
                settings.copy_from_slice(&value[..Discipline::SETTINGS]);
                state.discipline.set(&settings);
                if request == 0x5404 {
                    state.discipline.flush();
                }
                drop(state);
                self.changed();
                Ok(Vec::new())
            }
            // Waiting for output, breaks, flow: nothing to do.
            0x5405..=0x540a => Ok(Vec::new()),
            0x540b => {
                if plain != 1 {
                    state.discipline.flush();
                }
                Ok(Vec::new())
            }
            0x540e => {
                let leads = task.process == session;
                if own {
                    return Ok(Vec::new());
                }
                if !leads || state.session != 0 && plain != 1 {
                    return Err(Errno::EPERM);
                }
                state.session = session;
                state.foreground = session;
                Ok(Vec::new())
            }
            0x5422 if own => {
                if task.process == session {
                    state.session = 0;
                    state.foreground = 0;
                }
                Ok(Vec::new())
            }
            0x540f if own || is_master => Ok(visible(state.foreground)),
            0x5410 if own => {
                let group = i32::from_le_bytes([value[0], value[1], value[2], value[3]]);
                let group = u32::try_from(group).map_err(|_| Errno::EINVAL)?;
                let group = container.id(group);
                drop(state);
                let member = task::living().iter().any(|t| {
                    let links = t.links.lock();
                    links.group == group && links.session == session
                });
                if !member {
                    return Err(Errno::EPERM);
                }
                self.state.lock().foreground = group;
                Ok(Vec::new())
            }
            0x5429 if own || is_master => Ok(visible(state.session)),
            0x540f | 0x5410 | 0x5422 | 0x5429 => Err(Errno::ENOTTY),
            0x5413 => Ok(state.size.iter().flat_map(|v| v.to_le_bytes()).collect()),
            0x5414 => {
                let mut new = [0u16; 4];
                for (slot, pair) in new.iter_mut().zip(value.chunks_exact(2)) {
                    *slot = u16::from_le_bytes([pair[0], pair[1]]);
                }
                let changed = new != state.size;
                state.size = new;
                let group = state.foreground;
                drop(state);
                if changed {
                    signal_group(group, Signal::WINCH);
                }
                Ok(Vec::new())
            }
            0x541b => {
                let count = if is_master {
                    state.output.len()
                } else {
                    state.discipline.readable()
                };
                Ok((count as u32).to_le_bytes().to_vec())
            }
            0x8004_5430 if is_master => Ok(self.number.to_le_bytes().to_vec()),
            0x4004_5431 if is_master => Ok(Vec::new()),
            _ => Err(Errno::ENOTTY),
        }
    }

    /// A program of the background that reads is stopped.
    fn in_front(&self) -> Result<(), Errno> {
        let me = task::current();
        let (group, session) = {
            let links = me.links.lock();
            (links.group, links.session)
        };
        let wrong = {
            let state = self.state.lock();
            state.session == session && state.foreground != group && state.foreground != 0
        };
        if !wrong {
            return Ok(());
        }
        let bit = Signal::TTIN.bit();
        let deaf = me.pending.lock().mask & bit != 0 || me.handlers().lock().sets().0 & bit != 0;
        if deaf {
            return Err(Errno::EIO);
        }
        signal_group(group, Signal::TTIN);
        Err(Errno::EINTR)
    }
}

/// The program's side.
pub struct Slave(Arc<Pty>);

impl Slave {
    /// The terminal.
    pub fn pty(&self) -> &Arc<Pty> {
        &self.0
    }
}

impl Object for Slave {
    fn read(&self, to: &mut [u8], wait: bool) -> Result<usize, Errno> {
        self.0.in_front()?;
        let attempt = || {
            let mut state = self.0.state.lock();
            match state.discipline.read(to.len()) {
                None if state.master_closed => Some(Vec::new()),
                other => other,
            }
        };
        let bytes = if wait {
            task::wait_for(task::FILES, attempt)?
        } else {
            attempt().ok_or(Errno::EAGAIN)?
        };
        for (slot, byte) in to.iter_mut().zip(&bytes) {
            *slot = *byte;
        }
        self.0.changed();
        Ok(bytes.len())
    }

    fn write(&self, from: &[u8], wait: bool) -> Result<usize, Errno> {
        let mut done = 0;
        while done < from.len() {
            let rest = from.get(done..).unwrap_or_default();
            let attempt = || {
                let mut state = self.0.state.lock();
                if state.master_closed {
                    return Some(Err(Errno::EIO));
                }
                let state = &mut *state;
                // A character may become two.
                let room = MAX_OUTPUT.saturating_sub(state.output.len()) / 2;
                if room == 0 {
                    return None;
                }
                let count = room.min(rest.len());
                state
                    .discipline
                    .written(rest.get(..count).unwrap_or_default(), &mut state.output);
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
                    self.0.changed();
                }
                Err(e) if done == 0 => return Err(e),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn ready(&self) -> Ready {
        let state = self.0.state.lock();
        Ready {
            readable: state.discipline.readable() > 0 || state.discipline.at_end(),
            writable: state.output.len() < MAX_OUTPUT,
            hung_up: state.master_closed,
            ..Ready::default()
        }
    }

    fn name(&self) -> String {
        format!("/dev/pts/{}", self.0.number)
    }

    fn mode(&self) -> u32 {
        kind::CHARACTER | 0o620
    }

    fn rdev(&self) -> u32 {
        self.0.rdev()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for Slave {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.slaves = state.slaves.saturating_sub(1);
        drop(state);
        self.0.changed();
    }
}

/// The other side, opened by a program at /dev/ptmx.
pub struct Master(Arc<Pty>);

impl Master {
    /// A new terminal's.
    pub fn new() -> Result<Self, Errno> {
        make(false).map(Self)
    }

    /// The terminal.
    pub fn pty(&self) -> &Arc<Pty> {
        &self.0
    }
}

impl Object for Master {
    fn read(&self, to: &mut [u8], wait: bool) -> Result<usize, Errno> {
        let result = if wait {
            task::wait_for(task::FILES, || match self.0.take_output(to) {
                Err(Errno::EAGAIN) => None,
                other => Some(other),
            })?
        } else {
            self.0.take_output(to)
        };
        match result {
            // Nobody has the other side.
            Ok(0) if !to.is_empty() => Err(Errno::EIO),
            other => other,
        }
    }

    fn write(&self, from: &[u8], wait: bool) -> Result<usize, Errno> {
        let room = || self.0.input_room().unwrap_or(MAX_INPUT);
        let count = if wait {
            task::wait_for(task::FILES, || Some(room()).filter(|n| *n > 0))?
        } else {
            Some(room()).filter(|n| *n > 0).ok_or(Errno::EAGAIN)?
        };
        let taken = from.get(..count.min(from.len())).unwrap_or_default();
        self.0.input(taken);
        Ok(taken.len())
    }

    fn ready(&self) -> Ready {
        let state = self.0.state.lock();
        Ready {
            readable: !state.output.is_empty(),
            writable: state.discipline.waiting() < MAX_INPUT,
            hung_up: state.was_open && state.slaves == 0,
            ..Ready::default()
        }
    }

    fn name(&self) -> String {
        String::from("/dev/ptmx")
    }

    fn mode(&self) -> u32 {
        kind::CHARACTER | 0o666
    }

    fn rdev(&self) -> u32 {
        dev::number(5, 2)
    }

    fn closed(&self) {
        self.0.hang_up();
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
