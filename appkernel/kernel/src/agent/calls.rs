//! The calls of the two services.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use appkernel_hal::{clock, frames};
use bulkhead_protocol::PROTOCOL_VERSION;
use bulkhead_protocol::metrics::{CPUStat, METRICS_TYPE_URL, MemoryStat, Metrics, PidsStat};
use bulkhead_protocol::rpc::{Code, Request, Status};
use bulkhead_protocol::sandbox::{self, SandboxCall};
use bulkhead_protocol::task::{self as api, TaskCall};
use bulkhead_protocol::types::{Any, Empty, ProcessInfo, ProcessStatus};
use prost::Message;

use super::create::check_id;
use super::process::Process;
use super::streams::Role;
use super::{Agent, spec, status, timestamp};
use crate::container::visible;
use crate::fs::proc_text::RELEASE;
use crate::signal::{self, Info, Signal};
use crate::task;

/// Events in one answer.
const EVENTS_AT_ONCE: usize = 256;
/// What programs get to end when the host names no time.
const SHORTEST_GRACE_NS: u64 = 2_000_000_000;

/// What a call gives.
pub enum Answer {
    Now(Vec<u8>),
    Later(Later),
}

/// What a call waits for.
pub enum Later {
    Exit { id: String, exec: String },
    Events { after: u64, until: Option<u64> },
}

impl Later {
    /// When it is answered at the latest.
    pub fn deadline(&self) -> Option<u64> {
        match self {
            Self::Events { until, .. } => *until,
            Self::Exit { .. } => None,
        }
    }
}

fn now<M: Message>(message: &M) -> Result<Answer, Status> {
    Ok(Answer::Now(message.encode_to_vec()))
}

fn done() -> Result<Answer, Status> {
    now(&Empty {})
}

impl Agent {
    /// Makes a call.
    pub(super) fn call(&mut self, request: &Request) -> Result<Answer, Status> {
        match request.service.as_str() {
            api::SERVICE => self.task_call(TaskCall::decode(&request.method, &request.payload)?),
            sandbox::SERVICE => {
                self.sandbox_call(SandboxCall::decode(&request.method, &request.payload)?)
            }
            name => {
                let name: String = name.chars().take(64).collect();
                Err(status(
                    Code::Unimplemented,
                    format!("no service {name:?} here"),
                ))
            }
        }
    }

    /// Tries a call again that waits; `None` if it still has to.
    pub(super) fn later(&mut self, what: &Later) -> Option<Result<Vec<u8>, Status>> {
        match what {
            Later::Exit { id, exec } => match self.process(id, exec) {
                Err(e) => Some(Err(e)),
                Ok(process) => {
                    let exit = process.exit?;
                    let answer = api::WaitResponse {
                        exit_status: exit.status,
                        exited_at: Some(timestamp(exit.at)),
                    };
                    Some(Ok(answer.encode_to_vec()))
                }
            },
            Later::Events { after, until } => {
                let events: Vec<_> = self
                    .events
                    .iter()
                    .filter(|e| e.sequence > *after)
                    .take(EVENTS_AT_ONCE)
                    .cloned()
                    .collect();
                let over = until.is_some_and(|at| clock::monotonic_ns() >= at);
                (over || !events.is_empty())
                    .then(|| Ok(sandbox::WaitEventResponse { events }.encode_to_vec()))
            }
        }
    }

    fn wait(&mut self, what: Later) -> Result<Answer, Status> {
        match self.later(&what) {
            Some(result) => result.map(Answer::Now),
            None => Ok(Answer::Later(what)),
        }
    }

    fn task_call(&mut self, call: TaskCall) -> Result<Answer, Status> {
        match call {
            TaskCall::Create(r) => {
                let pid = self.create(&r)?;
                now(&api::CreateTaskResponse { pid })
            }
            TaskCall::Start(r) => {
                let pid = self.start_process(&r.id, &r.exec_id)?;
                now(&api::StartResponse { pid })
            }
            TaskCall::State(r) => self.state(&r),
            TaskCall::Delete(r) => self.delete(&r),
            TaskCall::Exec(r) => self.exec(&r),
            TaskCall::ResizePty(r) => {
                let process = self.process(&r.id, &r.exec_id)?;
                let Some(pty) = &process.pty else {
                    return Err(status(
                        Code::FailedPrecondition,
                        format!("container {}: the process has no terminal", r.id),
                    ));
                };
                let side = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
                pty.resize(side(r.width), side(r.height));
                done()
            }
            TaskCall::CloseIO(r) => {
                let key = self.process(&r.id, &r.exec_id)?.stdio.keys[0];
                if r.stdin
                    && let Some(key) = key
                    && let Some(Role::Input { closing, .. }) = self.roles.get_mut(&key)
                {
                    *closing = true;
                }
                done()
            }
            TaskCall::Kill(r) => {
                self.kill(&r.id, &r.exec_id, r.signal, r.all)?;
                done()
            }
            TaskCall::Wait(r) => self.wait(Later::Exit {
                id: r.id,
                exec: r.exec_id,
            }),
            TaskCall::Pids(r) => {
                let container = self.held(&r.id)?.container.clone();
                let processes = task::living()
                    .iter()
                    .filter(|t| container.has(t.id) && t.id == t.process)
                    .map(|t| ProcessInfo {
                        pid: visible(t.id),
                        info: None,
                    })
                    .collect();
                now(&api::PidsResponse { processes })
            }
            TaskCall::Stats(r) => self.stats(&r.id),
            TaskCall::Connect(r) => {
                let task_pid = visible(self.process(&r.id, "")?.id);
                now(&api::ConnectResponse {
                    shim_pid: 1,
                    task_pid,
                    version: env!("CARGO_PKG_VERSION").to_string(),
                })
            }
            TaskCall::Shutdown(_) => done(),
            // Of memory and of tasks; others are taken and not heeded, as nothing could be done
            // about it by whoever asks.
            TaskCall::Update(r) => {
                let container = self.held(&r.id)?.container.clone();
                if let Some(resources) = &r.resources {
                    spec::limit(&container, &spec::parse(&resources.value)?);
                }
                done()
            }
            TaskCall::Pause(_) | TaskCall::Resume(_) => Err(status(
                Code::Unimplemented,
                "the app kernel does not freeze containers; pause the sandbox",
            )),
            TaskCall::Checkpoint(_) => Err(status(
                Code::Unimplemented,
                "checkpoints of containers are not supported; snapshot the sandbox instead",
            )),
        }
    }

    fn state(&mut self, r: &api::StateRequest) -> Result<Answer, Status> {
        let bundle = self.held(&r.id)?.bundle.clone();
        let process = self.process(&r.id, &r.exec_id)?;
        let [stdin, stdout, stderr] = process.stdio.names.clone();
        now(&api::StateResponse {
            id: r.id.clone(),
            bundle,
            pid: visible(process.id),
            status: process.state as i32,
            stdin,
            stdout,
            stderr,
            terminal: process.stdio.terminal,
            exit_status: process.exit.map_or(0, |e| e.status),
            exited_at: process.exit.map(|e| timestamp(e.at)),
            exec_id: r.exec_id.clone(),
        })
    }

    fn delete(&mut self, r: &api::DeleteRequest) -> Result<Answer, Status> {
        let process = self.process(&r.id, &r.exec_id)?;
        let pid = visible(process.id);
        if !r.exec_id.is_empty() && process.state == ProcessStatus::Running {
            return Err(status(
                Code::FailedPrecondition,
                format!("container {}: process {} runs", r.id, r.exec_id),
            ));
        }
        let exit = if r.exec_id.is_empty() {
            self.remove_container(&r.id)?
        } else {
            let held = self.held(&r.id)?;
            held.processes.remove(&r.exec_id).and_then(|p| p.exit)
        };
        now(&api::DeleteResponse {
            pid,
            exit_status: exit.map_or(0, |e| e.status),
            exited_at: exit.map(|e| timestamp(e.at)),
        })
    }

    fn exec(&mut self, r: &api::ExecProcessRequest) -> Result<Answer, Status> {
        check_id("exec", &r.exec_id)?;
        let held = self.held(&r.id)?;
        if held.processes.contains_key(&r.exec_id) {
            return Err(status(
                Code::AlreadyExists,
                format!("container {} has a process {} already", r.id, r.exec_id),
            ));
        }
        let container = held.container.clone();
        let template = held.template.clone();
        let any = r.spec.clone().unwrap_or_default();
        let mut value = spec::parse(&any.value)?;
        if value["user"].is_null() {
            value["user"] = template["user"].clone();
        }
        let process = spec::process(&value, "", &container, r.terminal)?;
        let stdio = self.stdio([&r.stdin, &r.stdout, &r.stderr], r.terminal)?;
        // Named now, connected when it starts.
        for key in stdio.keys.iter().flatten() {
            if let Some(role) = self.roles.get_mut(key) {
                *role = Role::Named(String::new(), u64::MAX);
            }
        }
        self.held(&r.id)?.processes.insert(
            r.exec_id.clone(),
            Process {
                id: 0,
                state: ProcessStatus::Created,
                exit: None,
                stdio,
                pty: None,
                spec: Some(process),
            },
        );
        done()
    }

    fn stats(&mut self, id: &str) -> Result<Answer, Status> {
        let container = self.held(id)?.container.clone();
        let tasks: Vec<_> = task::living()
            .into_iter()
            .filter(|t| container.has(t.id))
            .collect();
        let pages = task::pages_of(&container);
        let files = container.charge.in_files();
        let (total, _) = frames::statistics();
        let limited = |n: &core::sync::atomic::AtomicU64| match n.load(Ordering::Relaxed) {
            u64::MAX => None,
            n => Some(n),
        };
        let most = container.charge.most();
        let most = most.map_or(total as u64, |n| n.min(total as u64));
        let us = container.cpu_ns.load(Ordering::Relaxed) / 1000;
        let cpu = container.share.lock().statistics();
        let metrics = Metrics {
            pids: Some(PidsStat {
                current: tasks.len() as u64,
                limit: limited(&container.pids_max).unwrap_or(0),
            }),
            cpu: Some(CPUStat {
                usage_usec: us,
                user_usec: us,
                nr_periods: cpu.periods,
                nr_throttled: cpu.throttled,
                throttled_usec: cpu.throttled_ns / 1000,
                ..CPUStat::default()
            }),
            memory: Some(MemoryStat {
                anon: (pages - files) * 4096,
                shmem: files * 4096,
                usage: pages * 4096,
                usage_limit: most * 4096,
                ..MemoryStat::default()
            }),
            ..Metrics::default()
        };
        now(&api::StatsResponse {
            stats: Some(Any::of(METRICS_TYPE_URL, &metrics)),
        })
    }

    fn sandbox_call(&mut self, call: SandboxCall) -> Result<Answer, Status> {
        match call {
            SandboxCall::GetInfo(_) => {
                let (total, _) = frames::statistics();
                now(&sandbox::GetInfoResponse {
                    version: env!("CARGO_PKG_VERSION").to_string(),
                    protocol: PROTOCOL_VERSION,
                    kernel: format!("Bulkhead app kernel ({RELEASE})"),
                    boot: self.boot.clone(),
                    monotonic_ns: clock::monotonic_ns(),
                    cpus_online: 1,
                    memory_bytes: total as u64 * 4096,
                    features: Vec::new(),
                    unknown_calls: Some(crate::syscall::unknown()),
                })
            }
            SandboxCall::Check(_) => done(),
            SandboxCall::ConfigureSandbox(r) => {
                let warnings = self.configure(&r)?;
                now(&sandbox::ConfigureSandboxResponse { warnings })
            }
            SandboxCall::SetTime(r) => {
                if r.nanos > 999_999_999 || r.seconds < 0 {
                    return Err(status(Code::InvalidArgument, "not a time"));
                }
                let seconds = r.seconds.cast_unsigned();
                let ns = seconds.saturating_mul(1_000_000_000);
                clock::set_realtime_ns(ns.saturating_add(r.nanos.into()));
                done()
            }
            // The CPU's generator is asked for every byte: there is no state to feed.
            SandboxCall::AddEntropy(_) => done(),
            SandboxCall::OnlineResources(_) => now(&sandbox::OnlineResourcesResponse {
                cpus_online: 1,
                memory_blocks: 0,
            }),
            SandboxCall::WaitEvent(r) => {
                let until = (r.timeout_ms > 0).then(|| {
                    let ns = u64::from(r.timeout_ms) * 1_000_000;
                    clock::monotonic_ns().saturating_add(ns)
                });
                self.wait(Later::Events {
                    after: r.after,
                    until,
                })
            }
            SandboxCall::Shutdown(r) => {
                self.shut_down(u64::from(r.grace_ms) * 1_000_000);
                done()
            }
        }
    }

    /// Tells all programs to end; the machine goes down when they have, or had their time.
    fn shut_down(&mut self, grace_ns: u64) {
        for task in task::living() {
            if grace_ns > 0 {
                if visible(task.id) == 1 {
                    signal::send_process(task.process, Signal(15), Info::default());
                }
            } else {
                task::end_process(task.process, Signal::KILL.0.into());
                task::begin(task.id);
            }
        }
        let at = clock::monotonic_ns().saturating_add(grace_ns.max(SHORTEST_GRACE_NS));
        self.down = Some(at);
    }
}
