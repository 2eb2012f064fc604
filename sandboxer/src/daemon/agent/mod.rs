//! Sandboxes whose containers an agent makes: in a guest, or on this host. Calls about containers
//! go to the agent; standard streams are joined here. What differs is said by a [`Home`].

pub mod link;
pub mod setup;
pub mod spec;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::client::{RpcError, TaskClient};
use bulkhead_protocol::metrics::Metrics;
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{CONTAINER_OPTIONS_TYPE_URL, ContainerOptions, Disk};
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::{Any, Mount};
use prost::Message;
use serde_json::Value;
use tokio::sync::Notify;

use super::events::now;
use super::sandbox::{Answer, Exit, Figure, KILLED, Of, OwnEnd, Sandbox};
use super::stdio::{GuestNames, Names, Places, Pumps};
use super::streaming::Streams;
use crate::timeouts;
use link::{Dial, Link, refused};

/// Where an agent and its containers are.
pub trait Home: Debug + Send + Sync + 'static {
    /// The way to the agent.
    type Way: Dial;

    /// The connection to the agent.
    ///
    /// # Errors
    /// The sandbox has ended.
    fn link(&self) -> Answer<Arc<Link<Self::Way>>>;

    /// As [`Sandbox::ended`].
    fn ended(&self) -> impl Future<Output = OwnEnd> + Send;

    /// As [`Sandbox::shut_down`].
    fn shut_down(&self, grace: Duration) -> impl Future<Output = ()> + Send;

    /// As [`Sandbox::take_down`].
    fn take_down(&self);

    /// As [`Sandbox::info`].
    fn info(&self) -> Option<String>;

    /// As [`Sandbox::figures`].
    fn figures(&self) -> Vec<Figure>;

    /// Brings a container's files where the agent sees them. When that fails, [`Self::discard`]
    /// follows.
    fn prepare(&self, request: &CreateTaskRequest)
    -> impl Future<Output = Answer<Prepared>> + Send;

    /// A container has been made. Blocks shortly.
    fn made(&self, container: &str, bundle: &str);

    /// As [`Sandbox::discard`].
    fn discard(&self, container: &str);

    /// Takes out of OCI resources what means nothing there.
    fn strip_resources(&self, resources: &mut serde_json::Map<String, Value>);

    /// A container's limits are about to change to these OCI resources.
    fn limits_change(
        &self,
        container: &str,
        resources: &Value,
    ) -> impl Future<Output = Answer<()>> + Send;

    /// Ends a sandbox whose agent hangs, for a reason. Its end is noticed as one of its own.
    fn give_up(&self, reason: String) -> impl Future<Output = Answer<()>> + Send;
}

/// A container for the agent.
#[derive(Debug)]
pub struct Prepared {
    /// Its root.
    pub rootfs: Vec<Mount>,
    /// Its spec.
    pub oci_spec: Vec<u8>,
    /// Disks that the spec names by numbers of the host's.
    pub disks: Vec<Disk>,
}

/// A process that an agent has made.
#[derive(Debug)]
pub struct AgentProcess {
    /// What copies its standard streams, until they are dropped.
    pumps: Mutex<Option<Pumps>>,
    close_stdin: Arc<Notify>,
}

impl AgentProcess {
    fn new(pumps: Pumps) -> Self {
        Self {
            close_stdin: pumps.close_stdin(),
            pumps: Mutex::new(Some(pumps)),
        }
    }
}

/// A running sandbox.
#[derive(Debug)]
pub struct AgentSandbox<H> {
    home: H,
    streams: Arc<Streams>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether an error of the agent means that what was to be deleted is not there.
fn gone(error: &RpcError) -> bool {
    error.code() == Some(Code::NotFound)
}

impl<H: Home> AgentSandbox<H> {
    /// Whose agent answers.
    pub fn new(home: H, streams: Arc<Streams>) -> Self {
        Self { home, streams }
    }

    fn tasks(&self) -> Answer<TaskClient> {
        Ok(self.home.link()?.tasks())
    }

    /// Opens a process's streams to the agent and starts to copy.
    async fn open(&self, names: &Names) -> Answer<(Pumps, GuestNames)> {
        let link = self.home.link()?;
        let places = Places::parse(names, &self.streams)?;
        let open = async |wanted: bool| match wanted {
            true => link.stream().await.map(Some),
            false => Ok(None),
        };
        let [stdin, stdout, stderr] = places.wanted();
        let (stdin, stdout, stderr) = tokio::try_join!(open(stdin), open(stdout), open(stderr))?;
        Ok(Pumps::between(places, [stdin, stdout, stderr]))
    }
}

impl<H: Home> Sandbox for AgentSandbox<H> {
    type Process = AgentProcess;

    async fn ended(&self) -> OwnEnd {
        self.home.ended().await
    }

    async fn shut_down(&self, grace: Duration) {
        self.home.shut_down(grace).await;
    }

    fn take_down(&self) {
        self.home.take_down();
    }

    fn info(&self) -> Option<String> {
        self.home.info()
    }

    fn figures(&self) -> Vec<Figure> {
        self.home.figures()
    }

    async fn create(&self, request: &CreateTaskRequest) -> Answer<(AgentProcess, u32)> {
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let Prepared {
            rootfs,
            oci_spec,
            disks,
        } = self.home.prepare(request).await?;
        let (pumps, guest_names) = self.open(&names).await?;
        let options = ContainerOptions {
            oci_spec,
            user: String::new(),
            sandbox_etc: true,
            disks,
        };
        let to_agent = CreateTaskRequest {
            id: request.id.clone(),
            rootfs,
            terminal: names.terminal,
            stdin: guest_names.stdin,
            stdout: guest_names.stdout,
            stderr: guest_names.stderr,
            options: Some(Any::of(CONTAINER_OPTIONS_TYPE_URL, &options)),
            ..CreateTaskRequest::default()
        };
        let made = self.tasks()?.create(&to_agent).await.map_err(refused)?;
        // A small file in memory.
        self.home.made(&request.id, &request.bundle);
        Ok((AgentProcess::new(pumps), made.pid))
    }

    fn discard(&self, container: &str) {
        self.home.discard(container);
    }

    async fn exec(&self, request: &ExecProcessRequest) -> Answer<AgentProcess> {
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let (pumps, guest_names) = self.open(&names).await?;
        let to_agent = ExecProcessRequest {
            stdin: guest_names.stdin,
            stdout: guest_names.stdout,
            stderr: guest_names.stderr,
            ..request.clone()
        };
        self.tasks()?.exec(&to_agent).await.map_err(refused)?;
        Ok(AgentProcess::new(pumps))
    }

    async fn start(&self, _: &AgentProcess, of: &Of) -> Answer<u32> {
        let request = StartRequest {
            id: of.container.clone(),
            exec_id: of.exec.clone(),
        };
        let answer = self.tasks()?.start(&request).await.map_err(refused)?;
        Ok(answer.pid)
    }

    async fn wait(&self, process: &AgentProcess, of: &Of) -> Option<Exit> {
        let request = WaitRequest {
            id: of.container.clone(),
            exec_id: of.exec.clone(),
        };
        let tasks = self.tasks().ok()?;
        let exit = match tasks.wait(&request).await {
            Ok(answer) => Exit {
                status: answer.exit_status,
                at: answer.exited_at.unwrap_or_else(now),
            },
            // It was deleted.
            Err(e) if e.code().is_some() => Exit {
                status: KILLED,
                at: now(),
            },
            // The agent has gone: the end of the sandbox says so to all processes.
            Err(_) => return None,
        };
        let pumps = lock(&process.pumps).take();
        if let Some(mut pumps) = pumps {
            pumps.drained(timeouts::drain()).await;
            // What nobody has taken yet goes on being offered until the process is deleted.
            *lock(&process.pumps) = Some(pumps);
        }
        Some(exit)
    }

    async fn delete(&self, _: &AgentProcess, of: &Of) -> Answer<()> {
        let request = DeleteRequest {
            id: of.container.clone(),
            exec_id: of.exec.clone(),
        };
        let Ok(tasks) = self.tasks() else {
            return Ok(());
        };
        match tasks.delete(&request).await {
            Ok(_) => Ok(()),
            Err(e) if gone(&e) || e.code().is_none() => Ok(()),
            Err(e) => Err(refused(e)),
        }
    }

    async fn kill(&self, _: &AgentProcess, request: &KillRequest) -> Answer<()> {
        let tasks = self.tasks()?;
        let limit = timeouts::signal();
        if let Ok(answer) = tokio::time::timeout(limit, tasks.kill(request)).await {
            return answer.map(drop).map_err(refused);
        }
        // A sandbox that hangs must not hold up a stop for longer than its grace.
        let seconds = limit.as_secs();
        if i32::try_from(request.signal).is_ok_and(|signal| signal == libc::SIGKILL) {
            let reason = format!(
                "it did not answer to SIGKILL for container {} within {seconds} s and was ended",
                request.id
            );
            // Its end reaches all processes by the watch over it.
            return self.home.give_up(reason).await;
        }
        // Who sent it waits for the grace and then sends SIGKILL.
        tracing::warn!(
            container = request.id,
            signal = request.signal,
            "the sandbox did not take a signal within {seconds} s"
        );
        Ok(())
    }

    async fn resize(&self, _: &AgentProcess, request: &ResizePtyRequest) -> Answer<()> {
        let answer = self.tasks()?.resize_pty(request).await;
        answer.map(drop).map_err(refused)
    }

    async fn close_stdin(&self, process: &AgentProcess) {
        // The pump does the rest, behind all that has been written.
        process.close_stdin.notify_one();
    }

    async fn pids(&self, container: &str) -> Answer<PidsResponse> {
        let id = container.to_owned();
        let answer = self.tasks()?.pids(&PidsRequest { id }).await;
        answer.map_err(refused)
    }

    async fn pause(&self, container: &str) -> Answer<()> {
        let id = container.to_owned();
        let answer = self.tasks()?.pause(&PauseRequest { id }).await;
        answer.map(drop).map_err(refused)
    }

    async fn resume(&self, container: &str) -> Answer<()> {
        let id = container.to_owned();
        let answer = self.tasks()?.resume(&ResumeRequest { id }).await;
        answer.map(drop).map_err(refused)
    }

    async fn update(&self, mut request: UpdateTaskRequest) -> Answer<()> {
        if let Some(any) = &mut request.resources {
            let mut resources: Value = serde_json::from_slice(&any.value).map_err(|e| {
                Status::new(
                    Code::InvalidArgument,
                    format!("resources are not JSON: {e}"),
                )
            })?;
            if let Some(resources) = resources.as_object_mut() {
                self.home.strip_resources(resources);
            }
            self.home.limits_change(&request.id, &resources).await?;
            any.value = serde_json::to_vec(&resources)
                .map_err(|e| Status::new(Code::Internal, e.to_string()))?;
        }
        let answer = self.tasks()?.update(&request).await;
        answer.map(drop).map_err(refused)
    }

    async fn stats(&self, container: &str) -> Answer<Metrics> {
        let id = container.to_owned();
        let answer = self.tasks()?.stats(&StatsRequest { id }).await;
        let stats = answer.map_err(refused)?.stats.unwrap_or_default();
        Metrics::decode(stats.value.as_slice()).map_err(|e| {
            let text = format!("container {container}: statistics of the sandbox: {e}");
            Status::new(Code::Internal, text)
        })
    }
}
