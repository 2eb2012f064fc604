//! The agent: a thread of the kernel that does what the host asks for, by the protocol that the
//! agent of Linux guests speaks too (`agent/protocol`).
//!
//! One loop: it takes what arrived, moves bytes between programs and the host, answers, and sleeps
//! until the next interrupt, exit or time limit. It never waits for one thing only.

mod calls;
mod create;
mod process;
mod sandbox;
mod spec;
mod streams;
mod vsock;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_hal::sync::Mutex;
use appkernel_hal::{clock, cpu};
use bulkhead_protocol::frame::{Decoder, MAX_MESSAGE};
use bulkhead_protocol::rpc::{self, Code, Status};
use bulkhead_protocol::sandbox::{BootStage, Event, EventKind};
use bulkhead_protocol::types::Timestamp;
use bulkhead_protocol::{CONTROL_PORT, MAX_CALLS_PER_CONNECTION};

use crate::start::Machine;
use crate::{alarms, log, task};
use calls::Later;
use process::Held;
use sandbox::Shares;
use streams::Role;
use vsock::{Key, Vsock};

/// Bytes of answers that wait on one connection; beyond it no more calls are read.
const MAX_OUTPUT: usize = 8 << 20;
/// Bytes taken from a connection at once.
const CHUNK: usize = 16 << 10;
/// Events that are kept.
const EVENTS_KEPT: usize = 1024;
/// How long the last answer gets to reach the host.
const LAST_WORDS_NS: u64 = 200_000_000;

/// A call that is answered when something happened.
struct Waiting {
    key: Key,
    stream: u32,
    what: Later,
}

/// Everything the agent knows.
struct Agent {
    vsock: Vsock,
    roles: BTreeMap<Key, Role>,
    waiting: Vec<Waiting>,
    containers: BTreeMap<String, Held>,
    shares: Shares,
    events: VecDeque<Event>,
    sequence: u64,
    boot: Vec<BootStage>,
    /// When the machine goes down, and whether everybody was told.
    down: Option<u64>,
}

/// What `prepare` made, until the thread takes it.
static PREPARED: Mutex<Option<Agent>> = Mutex::new(None);

/// Starts the devices that the agent needs.
///
/// # Errors
/// There is no vsock device.
pub fn prepare(machine: Machine) -> Result<(), &'static str> {
    let vsock = Vsock::start(&machine).ok_or("there is no vsock device to be asked by either")?;
    *PREPARED.lock() = Some(Agent {
        vsock,
        roles: BTreeMap::new(),
        waiting: Vec::new(),
        containers: BTreeMap::new(),
        shares: Shares::new(machine),
        events: VecDeque::new(),
        sequence: 0,
        boot: Vec::new(),
        down: None,
    });
    Ok(())
}

/// The thread.
pub extern "C" fn run() -> ! {
    let agent = PREPARED.lock().take();
    let Some(mut agent) = agent else {
        panic!("the agent's thread runs before there is an agent")
    };
    agent.reached("agent listens");
    loop {
        while agent.turn() {}
        let deadline = agent.deadline();
        let vsock = &agent.vsock;
        let mut first = true;
        // Whatever wakes it is a reason to look.
        let _ = task::wait_until(task::AGENT, deadline, || {
            let look = vsock.has_work() || task::has_exits() || !first;
            first = false;
            look.then_some(())
        });
    }
}

fn status(code: Code, message: impl Into<String>) -> Status {
    Status::new(code, message)
}

/// The status for an error of the kernel's.
fn failed(what: &str, e: Errno) -> Status {
    let code = match e {
        Errno::ENOENT => Code::NotFound,
        Errno::EACCES | Errno::EPERM | Errno::EROFS => Code::PermissionDenied,
        Errno::ENOMEM | Errno::EAGAIN | Errno::ENFILE | Errno::ENOSPC => Code::ResourceExhausted,
        _ => Code::Internal,
    };
    status(code, alloc::format!("{what}: {}", e.name()))
}

/// A time as the protocol has it.
fn timestamp(ns: u64) -> Timestamp {
    Timestamp {
        seconds: (ns / 1_000_000_000).cast_signed(),
        nanos: (ns % 1_000_000_000) as i32,
    }
}

impl Agent {
    /// Does what there is to do; whether it was anything.
    fn turn(&mut self) -> bool {
        self.vsock.poll();
        alarms::run();
        let mut any = false;
        while let Some(key) = self.vsock.accept() {
            any = true;
            let role = if key.1 == CONTROL_PORT {
                Role::Control {
                    decoder: Decoder::new(MAX_MESSAGE),
                    output: VecDeque::new(),
                }
            } else {
                Role::Header(Vec::new(), clock::monotonic_ns())
            };
            self.roles.insert(key, role);
        }
        // Before the ends that they lead to.
        self.note_shortages();
        for (id, status) in task::take_exits() {
            any = true;
            self.ended(id, status);
        }
        let keys: Vec<Key> = self.roles.keys().copied().collect();
        for key in keys {
            any |= self.serve(key);
        }
        any |= self.answer_waiting();
        self.go_down();
        any
    }

    /// One connection's turn; whether anything moved.
    fn serve(&mut self, key: Key) -> bool {
        let Some(mut role) = self.roles.remove(&key) else {
            return false;
        };
        let (moved, keep) = match &mut role {
            Role::Control { decoder, output } => self.control(key, decoder, output),
            other => streams::serve(&mut self.vsock, key, other),
        };
        // A call may have given the stream of this key another role meanwhile.
        if keep {
            self.roles.entry(key).or_insert(role);
        } else {
            self.vsock.close(key);
        }
        if !keep && key.1 == CONTROL_PORT {
            self.waiting.retain(|w| w.key != key);
        }
        moved
    }

    fn control(
        &mut self,
        key: Key,
        decoder: &mut Decoder,
        output: &mut VecDeque<u8>,
    ) -> (bool, bool) {
        let mut moved = false;
        while output.len() < MAX_OUTPUT && self.vsock.waiting(key) > 0 {
            let bytes = self.vsock.read(key, CHUNK);
            moved = true;
            let mut input = bytes.as_slice();
            while let Some(frame) = decoder.feed(&mut input) {
                let answer = match rpc::accept_request(frame) {
                    Ok((stream, request)) => self.request(key, stream, &request),
                    Err(answer) => answer,
                };
                output.extend(answer.unwrap_or_default());
            }
        }
        while !output.is_empty() {
            output.make_contiguous();
            let sent = self.vsock.write(key, output.as_slices().0);
            if sent == 0 {
                break;
            }
            moved = true;
            output.drain(..sent);
        }
        let keep = !self.vsock.at_end(key) && !self.vsock.is_refused(key);
        (moved, keep)
    }

    /// Makes a call; gives the answer's frame, or nothing if it comes later.
    fn request(&mut self, key: Key, stream: u32, request: &rpc::Request) -> Option<Vec<u8>> {
        match self.call(request) {
            Ok(calls::Answer::Now(bytes)) => Some(rpc::encode_response(stream, Ok(bytes))),
            Ok(calls::Answer::Later(what)) => {
                let own = self.waiting.iter().filter(|w| w.key == key).count();
                if own >= MAX_CALLS_PER_CONNECTION {
                    let full = status(
                        Code::ResourceExhausted,
                        "too many calls wait on this connection; open another",
                    );
                    return Some(rpc::encode_response(stream, Err(full)));
                }
                self.waiting.push(Waiting { key, stream, what });
                None
            }
            Err(status) => Some(rpc::encode_response(stream, Err(status))),
        }
    }

    fn answer_waiting(&mut self) -> bool {
        let mut any = false;
        let waiting = core::mem::take(&mut self.waiting);
        let mut still = Vec::new();
        for wait in waiting {
            let Some(result) = self.later(&wait.what) else {
                still.push(wait);
                continue;
            };
            any = true;
            if let Some(Role::Control { output, .. }) = self.roles.get_mut(&wait.key) {
                output.extend(rpc::encode_response(wait.stream, result));
            }
        }
        self.waiting = still;
        any
    }

    /// When the agent has to look again though nothing happens.
    fn deadline(&self) -> Option<u64> {
        let waits = self.waiting.iter().filter_map(|w| w.what.deadline());
        let streams = self.roles.values().filter_map(Role::deadline);
        waits
            .chain(streams)
            .chain(self.down)
            .chain(alarms::next())
            .min()
    }

    /// Notes a stage of the boot, once.
    fn reached(&mut self, name: &str) {
        const MOST: usize = 32;
        if self.boot.len() < MOST && self.boot.iter().all(|s| s.name != name) {
            self.boot.push(BootStage {
                name: String::from(name),
                monotonic_ns: clock::monotonic_ns(),
            });
        }
    }

    fn event(&mut self, kind: EventKind) {
        self.sequence += 1;
        if self.events.len() >= EVENTS_KEPT {
            self.events.pop_front();
        }
        self.events.push_back(Event {
            sequence: self.sequence,
            at: Some(timestamp(clock::realtime_ns())),
            kind: Some(kind),
        });
    }

    /// Ends the machine when it was asked for and all programs have ended, or had their time.
    fn go_down(&mut self) {
        let Some(deadline) = self.down else { return };
        let now = clock::monotonic_ns();
        if task::living().is_empty() || now >= deadline {
            // The answer is in the queue: the host's device takes it while we wait a little.
            while clock::monotonic_ns() < now.saturating_add(LAST_WORDS_NS) {
                self.vsock.poll();
                if self.vsock.is_drained() {
                    break;
                }
                cpu::idle();
            }
            log!("going down");
            cpu::reset();
        }
    }
}
