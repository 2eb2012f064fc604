//! Containers and their processes, as the host knows them.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use appkernel_core::errno::Errno;
use appkernel_hal::clock;
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{EventKind, ExitEvent, OomEvent};
use bulkhead_protocol::types::ProcessStatus;

use super::spec::{self, Process as Spec};
use super::streams::{Channel, Role};
use super::vsock::Key;
use super::{Agent, failed, status, timestamp};
use crate::container::{self, Container, visible};
use crate::exec;
use crate::fs::dev::{self, Device};
use crate::fs::file::{File, Files, Kind, flag};
use crate::fs::pipe::{End, Pipe};
use crate::fs::pty::{self, Pty};
use crate::signal::{self, Info, Signal};
use crate::task::{self, New, Task};

/// How a process ended.
#[derive(Clone, Copy)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// Nanoseconds since 1970.
    pub at: u64,
}

/// Names of the streams, and which connections they are.
#[derive(Clone, Default)]
pub struct Stdio {
    pub names: [String; 3],
    pub keys: [Option<Key>; 3],
    pub terminal: bool,
}

/// A process that the host knows.
pub struct Process {
    /// Its number in the kernel; 0 before it was made.
    pub id: u32,
    pub state: ProcessStatus,
    pub exit: Option<Exit>,
    pub stdio: Stdio,
    pub pty: Option<Arc<Pty>>,
    /// Of an added process, until it is started.
    pub spec: Option<Spec>,
}

/// A container that the host knows.
pub struct Held {
    pub container: Arc<Container>,
    pub bundle: String,
    /// By exec id; the first one's is empty.
    pub processes: BTreeMap<String, Process>,
    /// `process` of its spec, for what added processes leave out.
    pub template: serde_json::Value,
    /// Of its programs that were ended for lack of memory, those that the host knows of.
    pub oom_kills: u64,
}

/// Opens one of the three standard files of a process: a stream's pipe, or /dev/null.
fn standard(role: &mut Option<Role>, which: usize, key: Option<Key>) -> Arc<File> {
    if key.is_none() {
        return Arc::new(File::new(Kind::Device(Device::Null), 2));
    }
    let pipe = Arc::new(Pipe::of_agent());
    let channel = Channel::Pipe(Arc::clone(&pipe));
    if which == 0 {
        *role = Some(Role::Input {
            to: channel,
            closing: false,
            ended: false,
        });
        Arc::new(File::new(Kind::Pipe(pipe, End::Read), 0))
    } else {
        *role = Some(Role::Output {
            from: channel,
            draining: false,
        });
        Arc::new(File::new(Kind::Pipe(pipe, End::Write), flag::WRITE_ONLY))
    }
}

impl Agent {
    /// The container of an id.
    pub(super) fn held(&mut self, id: &str) -> Result<&mut Held, Status> {
        self.containers.get_mut(id).ok_or_else(|| {
            let id: String = id.chars().take(150).collect();
            status(Code::NotFound, format!("there is no container {id:?}"))
        })
    }

    /// A process of a container.
    pub(super) fn process(&mut self, id: &str, exec: &str) -> Result<&mut Process, Status> {
        let held = self.held(id)?;
        held.processes.get_mut(exec).ok_or_else(|| {
            let exec: String = exec.chars().take(150).collect();
            status(
                Code::NotFound,
                format!("container {id} has no process {exec:?}"),
            )
        })
    }

    /// Makes a process that waits to be started, and connects its streams.
    pub(super) fn make_process(
        &mut self,
        container: &Arc<Container>,
        spec: &Spec,
        stdio: &Stdio,
    ) -> Result<(Arc<Task>, Option<Arc<Pty>>), Status> {
        let request = spec::request(container, spec)?;
        let name = spec.arguments.first().cloned().unwrap_or_default();
        let context = exec::Context {
            container,
            cwd: spec.cwd.as_bytes(),
            credentials: &spec.credentials,
            random: exec::is_random(0),
            may_become: !spec.no_new_privileges,
        };
        let image = exec::load(&request, context).map_err(|e| match e {
            Errno::ENOEXEC | Errno::ELOOP => status(
                Code::PermissionDenied,
                format!(
                    "container {}: exec: {name:?}: exec format error",
                    container.name
                ),
            ),
            e => failed(&format!("container {}: exec: {name:?}", container.name), e),
        })?;
        let mut files = Files::default();
        files.set_limit(spec.limits.soft(task::limits::FILES));
        let mut roles = [None, None, None];
        let pty = if stdio.terminal {
            let pty = pty::make(true).map_err(|e| failed("make a terminal", e))?;
            if let Some((columns, rows)) = spec.size {
                pty.resize(columns, rows);
            }
            self.show_terminal(container, &pty, spec);
            let slave = Arc::new(File::new(Kind::Object(pty.open()), 2));
            for _ in 0..3 {
                files
                    .insert(Arc::clone(&slave), 0, false)
                    .map_err(|e| failed("standard files", e))?;
            }
            let channel = || Channel::Pty(Arc::clone(&pty));
            roles[0] = Some(Role::Input {
                to: channel(),
                closing: false,
                ended: false,
            });
            roles[1] = Some(Role::Output {
                from: channel(),
                draining: false,
            });
            Some(pty)
        } else {
            for (which, role) in roles.iter_mut().enumerate() {
                let key = stdio.keys.get(which).copied().flatten();
                let file = standard(role, which, key);
                files
                    .insert(file, 0, false)
                    .map_err(|e| failed("standard files", e))?;
            }
            None
        };
        let task = Task::make(New {
            container,
            image,
            files,
            credentials: spec.credentials.clone(),
            cwd: spec.cwd.clone().into_bytes(),
            umask: spec.umask,
            limits: spec.limits,
            no_new_privileges: spec.no_new_privileges,
        })
        .map_err(|e| failed("make the process", e))?;
        if let Some(pty) = &pty {
            pty.control(task.id);
        }
        for (key, role) in stdio.keys.iter().zip(roles) {
            if let (Some(key), Some(role)) = (key, role) {
                self.roles.insert(*key, role);
            }
        }
        Ok((task, pty))
    }

    fn show_terminal(&self, container: &Container, pty: &Pty, spec: &Spec) {
        if let Some((crate::fs::node::Node::Memory(pts), _)) = container.mount_at(b"/dev/pts") {
            dev::add_terminal(&pts, pty.number, spec.credentials.owner());
        }
    }

    /// Starts the first process of a container, or an added one.
    pub(super) fn start_process(&mut self, id: &str, exec: &str) -> Result<u32, Status> {
        let container = Arc::clone(&self.held(id)?.container);
        let process = self.process(id, exec)?;
        if process.state != ProcessStatus::Created {
            return Err(status(
                Code::FailedPrecondition,
                format!("container {id}: process {exec:?} was started already"),
            ));
        }
        if let Some(spec) = process.spec.take() {
            let stdio = process.stdio.clone();
            if !task::living().iter().any(|t| container.has(t.id)) {
                return Err(status(
                    Code::FailedPrecondition,
                    format!("container {id} does not run"),
                ));
            }
            match self.make_process(&container, &spec, &stdio) {
                Ok((task, pty)) => {
                    let process = self.process(id, exec)?;
                    process.id = task.id;
                    process.pty = pty;
                }
                Err(e) => {
                    for key in stdio.keys.iter().flatten() {
                        self.vsock.close(*key);
                        self.roles.remove(key);
                    }
                    let process = self.process(id, exec)?;
                    process.state = ProcessStatus::Stopped;
                    process.exit = Some(Exit {
                        status: 127,
                        at: clock::realtime_ns(),
                    });
                    return Err(e);
                }
            }
        }
        let process = self.process(id, exec)?;
        process.state = ProcessStatus::Running;
        let number = process.id;
        task::begin(number);
        self.reached("first program");
        Ok(visible(number))
    }

    /// Tells the host which containers have lost programs for lack of memory.
    pub(super) fn note_shortages(&mut self) {
        let mut events = Vec::new();
        for (id, held) in &mut self.containers {
            let kills = held.container.oom_kills.load(Ordering::Relaxed);
            if kills > held.oom_kills {
                held.oom_kills = kills;
                events.push(OomEvent {
                    container_id: id.clone(),
                    oom_kills: kills,
                });
            }
        }
        for event in events {
            self.event(EventKind::Oom(event));
        }
    }

    /// A process without a parent has ended.
    pub(super) fn ended(&mut self, number: u32, wait_status: i32) {
        let code = if wait_status & 0x7f == 0 {
            (wait_status >> 8 & 0xff).cast_unsigned()
        } else {
            128 + (wait_status & 0x7f).cast_unsigned()
        };
        let at = clock::realtime_ns();
        let mut event = None;
        let mut draining = None;
        for (id, held) in &mut self.containers {
            for (exec, process) in &mut held.processes {
                if process.id == number && process.exit.is_none() {
                    process.exit = Some(Exit { status: code, at });
                    process.state = ProcessStatus::Stopped;
                    draining = Some(process.stdio.keys);
                    event = Some(ExitEvent {
                        container_id: id.clone(),
                        exec_id: exec.clone(),
                        pid: visible(number),
                        exit_status: code,
                        exited_at: Some(timestamp(at)),
                    });
                }
            }
        }
        for key in draining.into_iter().flatten().flatten() {
            match self.roles.get_mut(&key) {
                Some(Role::Output { draining, .. }) => *draining = true,
                Some(Role::Input { closing, .. }) => *closing = true,
                _ => {}
            }
        }
        if let Some(event) = event {
            self.event(EventKind::Exit(event));
        }
    }

    /// Sends a signal to a process, or to all of its container.
    pub(super) fn kill(
        &mut self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Status> {
        let container = Arc::clone(&self.held(id)?.container);
        let signal = Signal::parse(signal.into())
            .map_err(|_| status(Code::InvalidArgument, format!("{signal} is no signal")))?;
        let process = self.process(id, exec)?;
        let (number, state) = (process.id, process.state);
        if all {
            // Nobody runs meanwhile, and who has to end makes no more processes: none is missed. A
            // process may have lost its first thread.
            let own = task::living();
            let own = own.iter().filter(|t| container.has(t.id));
            let processes: alloc::collections::BTreeSet<u32> = own.map(|t| t.process).collect();
            for process in processes {
                signal::send_process(process, signal, Info::default());
            }
        } else if number == 0 || !signal::send_process(number, signal, Info::default()) {
            return Err(status(
                Code::NotFound,
                format!("container {id}: process {exec:?} does not run"),
            ));
        }
        if state == ProcessStatus::Created && signal == Signal::KILL && number != 0 {
            // It ends when it runs for the first time.
            task::begin(number);
        }
        Ok(())
    }

    /// Removes a container whose processes have ended, or ends them.
    pub(super) fn remove_container(&mut self, id: &str) -> Result<Option<Exit>, Status> {
        let held = self.held(id)?;
        let first = held.processes.get("");
        if first.is_some_and(|p| p.state == ProcessStatus::Running) {
            return Err(status(
                Code::FailedPrecondition,
                format!("container {id} runs; stop it first"),
            ));
        }
        let exit = first.and_then(|p| p.exit);
        let container = Arc::clone(&held.container);
        for task in task::living() {
            if container.has(task.id) {
                task::end_process(task.process, Signal::KILL.0.into());
                task::begin(task.id);
            }
        }
        self.containers.remove(id);
        container::remove(&container);
        Ok(exit)
    }
}
