//! `containerd.task.v3.Task` for the containers of one pod of any kind: what containerd may ask
//! when, the records, the events. How it is done is the sandbox's part.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::metrics::METRICS_TYPE_URL;
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::server::TaskService;
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::{Any, Empty, ProcessInfo};
use serde_json::Value;

use super::container::{Container, Process, Slot};
use super::controller::to_the_end;
use super::events::{Event, now};
use super::pod::{Pod, blocking};
use super::proto::{TaskCreate, TaskDelete, TaskExec, TaskExit, TaskId, TaskStart};
use super::sandbox::{Answer, Exit, KILLED, Kind, Of, Sandbox};
use super::stdio::Names;
use crate::timeouts;

/// Largest `config.json` of a bundle.
const MAX_SPEC: u64 = 3 << 20;
/// Containers of one pod.
const MAX_CONTAINERS: usize = 512;
/// Execs of one container.
const MAX_EXECS: usize = 1024;
/// How long Delete waits for the end of a process, beside its output.
const END_TIME: Duration = Duration::from_secs(5);

/// The service.
#[derive(Debug)]
pub struct Tasks<K: Kind>(pub Arc<Pod<K>>);

/// Ids are names of files and cgroups further on.
///
/// # Errors
/// It is not fit for that.
pub fn check_id(kind: &str, id: &str) -> Answer<()> {
    let good = !id.is_empty()
        && id.len() <= 76
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.+-".contains(&b));
    if good {
        return Ok(());
    }
    let shown: String = id.chars().take(100).collect();
    Err(Status::new(
        Code::InvalidArgument,
        format!("{kind} id {shown:?} must be 1 to 76 of [A-Za-z0-9_.+-], not starting with a dot"),
    ))
}

/// Reads the OCI spec of a bundle. Blocks.
///
/// # Errors
/// It is not there, too large, or no JSON.
pub fn read_spec(bundle: &Path) -> Answer<Value> {
    use std::io::Read;
    let path = bundle.join("config.json");
    let failed = |e: std::io::Error| {
        Status::new(
            Code::InvalidArgument,
            format!("bundle {}: {e}", path.display()),
        )
    };
    let mut text = Vec::new();
    std::fs::File::open(&path)
        .and_then(|f| f.take(MAX_SPEC + 1).read_to_end(&mut text))
        .map_err(failed)?;
    if text.len() as u64 > MAX_SPEC {
        return Err(failed(std::io::Error::other(format!(
            "config.json is over {MAX_SPEC} bytes"
        ))));
    }
    serde_json::from_slice(&text).map_err(|e| failed(e.into()))
}

/// A program that cannot be executed is reported as runc's shim does: containerd and kubelet take
/// NotFound and PermissionDenied for something else.
fn program(what: &str, status: Status) -> Status {
    match Code::try_from(status.code) {
        Ok(Code::NotFound | Code::PermissionDenied) => Status::new(
            Code::Unknown,
            format!("OCI runtime {what} failed: {}", status.message),
        ),
        _ => status,
    }
}

/// As containerd's own shim: an Exec that could not start has ended.
fn never_started(status: &Status) -> Exit {
    let status = match Code::try_from(status.code) {
        Ok(Code::NotFound) => 127,
        Ok(Code::PermissionDenied) => 126,
        _ => 255,
    };
    Exit { status, at: now() }
}

fn refuse(code: Code, text: String) -> Status {
    Status::new(code, text)
}

/// What a call about something that runs needs.
type Running<K> = (
    Arc<Container<<K as Kind>::Sandbox>>,
    Arc<Process<<K as Kind>::Sandbox>>,
    Arc<<K as Kind>::Sandbox>,
);

impl<K: Kind> Tasks<K> {
    fn find(&self, id: &str) -> Answer<Arc<Container<K::Sandbox>>> {
        match self.0.slots().get(id) {
            Some(Slot::Container(container)) => Ok(Arc::clone(container)),
            _ => {
                let shown: String = id.chars().take(100).collect();
                let text = format!("sandbox {} has no container {shown:?}", self.0.id);
                Err(refuse(Code::NotFound, text))
            }
        }
    }

    /// What has not ended.
    fn running(&self, id: &str, exec: &str) -> Answer<Running<K>> {
        let container = self.find(id)?;
        let process = container.process(exec)?;
        if process.exit().is_some() || process.handle.is_none() {
            let text = format!("container {id}: process {exec:?} has ended already");
            return Err(refuse(Code::NotFound, text));
        }
        let sandbox = self.0.sandbox()?;
        Ok((container, process, sandbox))
    }

    fn event(&self, event: Event) {
        self.0.events.send(&self.0.namespace, event);
    }
}

/// The sandbox's part of a process that [`Tasks::running`] has found.
fn handle<S: Sandbox>(process: &Process<S>) -> Answer<&S::Process> {
    process.handle.as_ref().ok_or_else(|| {
        let text = format!("container {} has ended already", process.of.container);
        refuse(Code::NotFound, text)
    })
}

/// Makes a container; undoes everything if that fails.
async fn create<K: Kind>(pod: Arc<Pod<K>>, request: CreateTaskRequest) -> Answer<u32> {
    check_id("container", &request.id)?;
    if !request.checkpoint.is_empty() {
        let text = "restoring a container from a checkpoint is not supported";
        return Err(refuse(Code::Unimplemented, text.into()));
    }
    {
        let mut slots = pod.slots();
        if slots.contains_key(&request.id) {
            let text = format!("container {} exists already", request.id);
            return Err(refuse(Code::AlreadyExists, text));
        }
        if slots.len() >= MAX_CONTAINERS {
            let text = format!("sandbox {} has {MAX_CONTAINERS} containers", pod.id);
            return Err(refuse(Code::ResourceExhausted, text));
        }
        slots.insert(request.id.clone(), Slot::Reserved);
    }
    let id = request.id.clone();
    match create_reserved(&pod, request).await {
        Ok((container, pid)) => {
            let slot = Slot::Container(container);
            let mut slots = pod.slots();
            // The sandbox may have ended meanwhile, and with it all that was in the list by then.
            if pod.sandbox().is_err() {
                slot.sandbox_ended();
            }
            slots.insert(id, slot);
            drop(slots);
            pod.note_containers();
            Ok(pid)
        }
        Err(error) => {
            discard(&pod, &id).await?;
            pod.slots().remove(&id);
            Err(error)
        }
    }
}

/// Removes a container's files; those of a sandbox that has ended went with it.
async fn discard<K: Kind>(pod: &Pod<K>, id: &str) -> Answer<()> {
    let Ok(sandbox) = pod.sandbox() else {
        return Ok(());
    };
    let id = id.to_owned();
    blocking(move || sandbox.discard(&id)).await
}

type Made<S> = (Arc<Container<S>>, u32);

async fn create_reserved<K: Kind>(
    pod: &Arc<Pod<K>>,
    request: CreateTaskRequest,
) -> Answer<Made<K::Sandbox>> {
    let sandbox = pod.sandbox()?;
    let (made, pid) = sandbox
        .create(&request)
        .await
        .map_err(|e| program("create", e))?;
    let names = Names {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
    };
    let of = Of {
        container: request.id.clone(),
        exec: String::new(),
    };
    let init = Process::new(of, names, Some(made), pid);
    tokio::spawn(watch_exit(Arc::clone(pod), sandbox, Arc::clone(&init)));
    let container = Container::new(request.bundle.clone(), init);
    let event = Event::Create(TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        pid,
    });
    pod.events.send(&pod.namespace, event);
    Ok((container, pid))
}

/// Waits for a process's end and reports it once its output has been passed on.
async fn watch_exit<K: Kind>(
    pod: Arc<Pod<K>>,
    sandbox: Arc<K::Sandbox>,
    process: Arc<Process<K::Sandbox>>,
) {
    if let Some(handle) = &process.handle {
        let exit = tokio::select! {
            exit = sandbox.wait(handle, &process.of) => exit,
            // Deleted without a start, or the sandbox has ended.
            _ = process.wait() => None,
        };
        if let Some(exit) = exit {
            process.ended(exit);
        }
    }
    drop(sandbox);
    let Some(exit) = process.wait().await else {
        return;
    };
    let pid = {
        let mut state = process.state();
        state.running = false;
        state.pid
    };
    let of = process.of.clone();
    let event = Event::Exit(TaskExit {
        id: match of.is_init() {
            true => of.container.clone(),
            false => of.exec,
        },
        container_id: of.container,
        pid,
        exit_status: exit.status,
        exited_at: Some(exit.at),
    });
    pod.events.send(&pod.namespace, event);
}

async fn delete<K: Kind>(pod: Arc<Pod<K>>, request: DeleteRequest) -> Answer<DeleteResponse> {
    let tasks = Tasks(Arc::clone(&pod));
    let container = tasks.find(&request.id)?;
    let process = container.process(&request.exec_id)?;
    // A sandbox that has ended has nothing to delete.
    if let (Ok(sandbox), Some(handle)) = (pod.sandbox(), &process.handle) {
        sandbox.delete(handle, &process.of).await?;
    }
    // One that never started ends by being deleted; one that ended is reported within moments.
    let exit = tokio::time::timeout(timeouts::drain() + END_TIME, process.wait())
        .await
        .ok()
        .flatten()
        .unwrap_or_else(|| Exit {
            status: KILLED,
            at: now(),
        });
    process.ended(exit);
    let pid = process.state().pid;
    if request.exec_id.is_empty() {
        discard(&pod, &request.id).await?;
        pod.slots().remove(&request.id);
        pod.note_containers();
        tasks.event(Event::Delete(TaskDelete {
            container_id: request.id,
            pid,
            exit_status: exit.status,
            exited_at: Some(exit.at),
            id: String::new(),
        }));
    } else {
        container.execs().remove(&request.exec_id);
    }
    Ok(DeleteResponse {
        pid,
        exit_status: exit.status,
        exited_at: Some(exit.at),
    })
}

async fn exec<K: Kind>(pod: Arc<Pod<K>>, request: ExecProcessRequest) -> Answer<()> {
    check_id("exec", &request.exec_id)?;
    let tasks = Tasks(Arc::clone(&pod));
    let (container, _, sandbox) = tasks.running(&request.id, "")?;
    {
        let execs = container.execs();
        if execs.contains_key(&request.exec_id) {
            let text = format!(
                "container {}: process {} exists",
                request.id, request.exec_id
            );
            return Err(refuse(Code::AlreadyExists, text));
        }
        if execs.len() >= MAX_EXECS {
            let text = format!("container {} has {MAX_EXECS} processes of Exec", request.id);
            return Err(refuse(Code::ResourceExhausted, text));
        }
    }
    let made = sandbox.exec(&request).await?;
    let names = Names {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
    };
    let of = Of {
        container: request.id.clone(),
        exec: request.exec_id.clone(),
    };
    let process = Process::new(of, names, Some(made), 0);
    container.execs().insert(request.exec_id.clone(), process);
    tasks.event(Event::ExecAdded(TaskExec {
        container_id: request.id,
        exec_id: request.exec_id,
        pid: 0,
    }));
    Ok(())
}

async fn start<K: Kind>(pod: Arc<Pod<K>>, request: StartRequest) -> Answer<u32> {
    let tasks = Tasks(Arc::clone(&pod));
    let (_, process, sandbox) = tasks.running(&request.id, &request.exec_id)?;
    let is_exec = !process.of.is_init();
    let pid = match sandbox.start(handle(&process)?, &process.of).await {
        Ok(pid) => pid,
        Err(status) => {
            if is_exec {
                process.ended(never_started(&status));
            }
            return Err(program(if is_exec { "exec" } else { "start" }, status));
        }
    };
    {
        let mut state = process.state();
        state.pid = pid;
        // It may have been fast.
        state.running = process.exit().is_none();
    }
    let (container_id, exec_id) = (request.id, request.exec_id);
    if is_exec {
        tasks.event(Event::ExecStarted(TaskExec {
            container_id,
            exec_id,
            pid,
        }));
        tokio::spawn(watch_exit(pod, sandbox, process));
    } else {
        tasks.event(Event::Start(TaskStart { container_id, pid }));
    }
    Ok(pid)
}

impl<K: Kind> TaskService for Tasks<K> {
    async fn create(&self, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        let pid = to_the_end(create(Arc::clone(&self.0), request)).await?;
        Ok(CreateTaskResponse { pid })
    }

    async fn start(&self, request: StartRequest) -> Answer<StartResponse> {
        let pid = to_the_end(start(Arc::clone(&self.0), request)).await?;
        Ok(StartResponse { pid })
    }

    async fn state(&self, request: StateRequest) -> Answer<StateResponse> {
        let container = self.find(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = process.exit();
        let pid = process.state().pid;
        Ok(StateResponse {
            id: request.id,
            bundle: container.bundle.clone(),
            pid,
            status: container.status(&process) as i32,
            stdin: process.names.stdin.clone(),
            stdout: process.names.stdout.clone(),
            stderr: process.names.stderr.clone(),
            terminal: process.names.terminal,
            exit_status: exit.map_or(0, |e| e.status),
            exited_at: exit.map(|e| e.at),
            exec_id: request.exec_id,
        })
    }

    async fn delete(&self, request: DeleteRequest) -> Answer<DeleteResponse> {
        to_the_end(delete(Arc::clone(&self.0), request)).await
    }

    async fn exec(&self, request: ExecProcessRequest) -> Answer<Empty> {
        to_the_end(exec(Arc::clone(&self.0), request)).await?;
        Ok(Empty {})
    }

    async fn resize_pty(&self, request: ResizePtyRequest) -> Answer<Empty> {
        let (_, process, sandbox) = self.running(&request.id, &request.exec_id)?;
        sandbox.resize(handle(&process)?, &request).await?;
        Ok(Empty {})
    }

    async fn close_io(&self, request: CloseIoRequest) -> Answer<Empty> {
        let process = self.find(&request.id)?.process(&request.exec_id)?;
        if request.stdin
            && let (Ok(sandbox), Some(handle)) = (self.0.sandbox(), &process.handle)
        {
            sandbox.close_stdin(handle).await;
        }
        Ok(Empty {})
    }

    async fn kill(&self, request: KillRequest) -> Answer<Empty> {
        let (_, process, sandbox) = self.running(&request.id, &request.exec_id)?;
        sandbox.kill(handle(&process)?, &request).await?;
        Ok(Empty {})
    }

    async fn wait(&self, request: WaitRequest) -> Answer<WaitResponse> {
        let process = self.find(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await.ok_or_else(|| {
            let text = format!("container {} is gone", request.id);
            refuse(Code::NotFound, text)
        })?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(exit.at),
        })
    }

    async fn pids(&self, request: PidsRequest) -> Answer<PidsResponse> {
        let init = self.find(&request.id)?.process("")?;
        let mut answer = match self.running(&request.id, "") {
            Ok((_, _, sandbox)) => sandbox.pids(&request.id).await?,
            Err(_) => PidsResponse::default(),
        };
        // Never none, as long as the container is there: containerd, when it comes back, takes one
        // without processes for a leak and deletes it, and with it the exit code of one that ended
        // meanwhile.
        if answer.processes.is_empty() {
            let pid = init.state().pid;
            answer.processes.push(ProcessInfo { pid, info: None });
        }
        Ok(answer)
    }

    async fn pause(&self, request: PauseRequest) -> Answer<Empty> {
        let (container, _, sandbox) = self.running(&request.id, "")?;
        sandbox.pause(&request.id).await?;
        *container.paused() = true;
        self.event(Event::Paused(TaskId {
            container_id: request.id,
        }));
        Ok(Empty {})
    }

    async fn resume(&self, request: ResumeRequest) -> Answer<Empty> {
        let (container, _, sandbox) = self.running(&request.id, "")?;
        sandbox.resume(&request.id).await?;
        *container.paused() = false;
        self.event(Event::Resumed(TaskId {
            container_id: request.id,
        }));
        Ok(Empty {})
    }

    async fn checkpoint(&self, _: CheckpointTaskRequest) -> Answer<Empty> {
        let text = "checkpoints of containers are not supported";
        Err(refuse(Code::Unimplemented, text.into()))
    }

    async fn update(&self, request: UpdateTaskRequest) -> Answer<Empty> {
        let (_, _, sandbox) = self.running(&request.id, "")?;
        sandbox.update(request).await?;
        Ok(Empty {})
    }

    async fn stats(&self, request: StatsRequest) -> Answer<StatsResponse> {
        let (_, _, sandbox) = self.running(&request.id, "")?;
        let metrics = sandbox.stats(&request.id).await?;
        Ok(StatsResponse {
            stats: Some(Any::of(METRICS_TYPE_URL, &metrics)),
        })
    }

    async fn connect(&self, request: ConnectRequest) -> Answer<ConnectResponse> {
        let process = self.find(&request.id)?.process("")?;
        let task_pid = process.state().pid;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    async fn shutdown(&self, _: ShutdownRequest) -> Answer<Empty> {
        // The sandbox's life is the controller's matter.
        Ok(Empty {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_safe_as_names() {
        assert!(check_id("c", &"a".repeat(64)).is_ok());
        for bad in ["", "..", ".x", "a/b", "a b", &"x".repeat(77)] {
            assert!(check_id("c", bad).is_err(), "{bad:?}");
        }
    }
}
