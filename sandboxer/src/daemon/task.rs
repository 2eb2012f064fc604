//! `containerd.task.v3.Task` for the containers of one pod.
//!
//! What happens in the guest is the agent's part. Here: the container's files, its standard
//! streams, and its record, which outlives the guest, because containerd asks for exit codes and
//! deletes containers after their sandbox has ended, however that came.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::client::{RpcError, TaskClient};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{CONTAINER_OPTIONS_TYPE_URL, ContainerOptions};
use bulkhead_protocol::server::TaskService;
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::{Any, Empty, Mount, ProcessStatus, Timestamp};
use serde_json::Value;
use tokio::sync::{Notify, watch};

use super::container_spec;
use super::events::{Event, now};
use super::guest::refused;
use super::pod::{KILLED, Pod, blocking};
use super::proto::{TaskCreate, TaskDelete, TaskExec, TaskExit, TaskId, TaskStart};
use super::stdio::{Names, Pumps};
use super::storage::StorageError;
use crate::timeouts;

/// Largest `config.json` of a bundle.
const MAX_SPEC: u64 = 3 << 20;
/// Containers of one pod.
const MAX_CONTAINERS: usize = 512;
/// Execs of one container.
const MAX_EXECS: usize = 1024;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: Timestamp,
}

#[derive(Debug, Default)]
struct ProcessState {
    pid: u32,
    running: bool,
    pumps: Option<Pumps>,
}

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    names: Names,
    state: Mutex<ProcessState>,
    exit: watch::Sender<Option<Exit>>,
    close_stdin: Arc<Notify>,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: String,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    paused: Mutex<bool>,
}

/// A container's place in its pod.
#[derive(Debug)]
pub enum Slot {
    /// Being made.
    Reserved,
    /// Made.
    Container(Arc<Container>),
}

impl Slot {
    /// A container of an earlier process.
    pub fn ended(id: &str) -> Self {
        let container = Container {
            id: id.to_owned(),
            bundle: String::new(),
            init: Arc::new(Process::new(Names::default(), None)),
            execs: Mutex::default(),
            paused: Mutex::default(),
        };
        let slot = Self::Container(Arc::new(container));
        slot.sandbox_ended();
        slot
    }

    /// Its guest has gone: so have all its processes.
    pub fn sandbox_ended(&self) {
        let Self::Container(container) = self else {
            return;
        };
        let exit = Exit {
            status: KILLED,
            at: now(),
        };
        container.init.ended(exit);
        for process in container.execs().values() {
            process.ended(exit);
        }
    }
}

impl Process {
    fn new(names: Names, pumps: Option<Pumps>) -> Self {
        let close_stdin = pumps.as_ref().map(Pumps::close_stdin).unwrap_or_default();
        Self {
            names,
            state: Mutex::new(ProcessState {
                pumps,
                ..ProcessState::default()
            }),
            exit: watch::Sender::new(None),
            close_stdin,
        }
    }

    fn state(&self) -> MutexGuard<'_, ProcessState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first end counts.
    fn ended(&self, exit: Exit) -> bool {
        self.exit.send_if_modified(|slot| {
            let first = slot.is_none();
            slot.get_or_insert(exit);
            first
        })
    }

    fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    async fn wait(&self) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return Some(exit);
            }
            if exit.changed().await.is_err() {
                return None;
            }
        }
    }
}

impl Container {
    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn process(&self, exec: &str) -> Result<Arc<Process>, Status> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs().get(exec).cloned().ok_or_else(|| {
            Status::new(
                Code::NotFound,
                format!("container {} has no process {exec:?}", self.id),
            )
        })
    }
}

/// The service.
#[derive(Debug)]
pub struct Tasks(pub Arc<Pod>);

type Answer<T> = Result<T, Status>;

/// Runs to its end even if the caller goes away: a container is made whole or not at all.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Answer<T>> + Send + 'static,
) -> Answer<T> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "a call panicked");
        Err(Status::new(
            Code::Internal,
            "the sandboxer failed in this call",
        ))
    })
}

/// Ids are names of files and cgroups further on.
pub fn check_id(kind: &str, id: &str) -> Result<(), Status> {
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

/// A program that cannot be executed is reported as runc's shim does: containerd and kubelet take
/// NotFound and PermissionDenied for something else.
fn program(what: &str, error: RpcError) -> Status {
    let status = refused(error);
    match Code::try_from(status.code) {
        Ok(Code::NotFound | Code::PermissionDenied) => Status::new(
            Code::Unknown,
            format!("OCI runtime {what} failed: {}", status.message),
        ),
        _ => status,
    }
}

fn storage_failed(error: StorageError) -> Status {
    let code = match error {
        StorageError::Io { .. } => Code::Internal,
        StorageError::Unsupported(_) => Code::InvalidArgument,
        StorageError::Missing(_) => Code::NotFound,
    };
    Status::new(code, error.to_string())
}

impl Tasks {
    fn find(&self, id: &str) -> Answer<Arc<Container>> {
        match self.0.slots().get(id) {
            Some(Slot::Container(container)) => Ok(Arc::clone(container)),
            _ => {
                let shown: String = id.chars().take(100).collect();
                Err(Status::new(
                    Code::NotFound,
                    format!("sandbox {} has no container {shown:?}", self.0.id),
                ))
            }
        }
    }

    /// The container and the client for a call about something that runs.
    fn running(&self, id: &str, exec: &str) -> Answer<(Arc<Container>, TaskClient)> {
        let container = self.find(id)?;
        if container.process(exec)?.exit().is_some() {
            return Err(Status::new(
                Code::NotFound,
                format!("container {id}: process {exec:?} has ended already"),
            ));
        }
        Ok((container, self.0.guest()?.tasks()))
    }

    fn event(&self, event: Event) {
        self.0.events.send(&self.0.namespace, event);
    }
}

/// Makes a container; undoes everything if that fails.
async fn create(pod: Arc<Pod>, request: CreateTaskRequest) -> Answer<u32> {
    check_id("container", &request.id)?;
    if !request.checkpoint.is_empty() {
        return Err(Status::new(
            Code::Unimplemented,
            "restoring a container from a checkpoint is not supported",
        ));
    }
    {
        let mut slots = pod.slots();
        if slots.contains_key(&request.id) {
            return Err(Status::new(
                Code::AlreadyExists,
                format!("container {} exists already", request.id),
            ));
        }
        if slots.len() >= MAX_CONTAINERS {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("sandbox {} has {MAX_CONTAINERS} containers", pod.id),
            ));
        }
        slots.insert(request.id.clone(), Slot::Reserved);
    }
    let id = request.id.clone();
    match create_reserved(&pod, request).await {
        Ok((container, pid)) => {
            let slot = Slot::Container(container);
            let mut slots = pod.slots();
            // The guest may have ended meanwhile, and with it all that was in the list by then.
            if pod.guest().is_err() {
                slot.sandbox_ended();
            }
            slots.insert(id, slot);
            drop(slots);
            pod.note_containers();
            Ok(pid)
        }
        Err(error) => {
            if let Ok(storage) = pod.storage() {
                let container = id.clone();
                blocking(move || lock(&storage).remove(&container)).await?;
            }
            pod.slots().remove(&id);
            Err(error)
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn create_reserved(
    pod: &Arc<Pod>,
    request: CreateTaskRequest,
) -> Answer<(Arc<Container>, u32)> {
    let guest = pod.guest()?;
    let storage = pod.storage()?;
    let names = Names {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
    };
    let (id, bundle, rootfs) = (request.id.clone(), request.bundle.clone(), request.rootfs);
    let shares_pids = guest.shares_pids();
    let prepared = blocking(move || {
        let mut spec = read_spec(Path::new(&bundle))?;
        let binds = container_spec::rewrite(&mut spec, shares_pids)?;
        let mut storage = lock(&storage);
        let root = storage.add_root(&id, &rootfs).map_err(storage_failed)?;
        for bind in &binds {
            let path = storage
                .add_volume(&id, Path::new(&bind.source), bind.access)
                .map_err(storage_failed)?;
            container_spec::set_source(&mut spec, bind, path);
        }
        let spec = serde_json::to_vec(&spec)
            .map_err(|e| Status::new(Code::Internal, format!("container {id}: spec: {e}")))?;
        Ok::<_, Status>((root, spec))
    });
    let (root, oci_spec) = prepared.await??;
    let (pumps, guest_names) = Pumps::start(&names, &guest, &pod.streams).await?;
    let options = ContainerOptions {
        oci_spec,
        user: String::new(),
        sandbox_etc: true,
    };
    let to_agent = CreateTaskRequest {
        id: request.id.clone(),
        rootfs: vec![Mount {
            r#type: "bulkhead-share".into(),
            source: root,
            target: String::new(),
            options: vec!["rbind".into()],
        }],
        terminal: names.terminal,
        stdin: guest_names.stdin,
        stdout: guest_names.stdout,
        stderr: guest_names.stderr,
        options: Some(Any::of(CONTAINER_OPTIONS_TYPE_URL, &options)),
        ..CreateTaskRequest::default()
    };
    let tasks = guest.tasks();
    let made = tasks
        .create(&to_agent)
        .await
        .map_err(|e| program("create", e))?;
    let init = Arc::new(Process::new(names, Some(pumps)));
    init.state().pid = made.pid;
    let container = Arc::new(Container {
        id: request.id.clone(),
        bundle: request.bundle.clone(),
        init: Arc::clone(&init),
        execs: Mutex::default(),
        paused: Mutex::default(),
    });
    tokio::spawn(watch_exit(
        Arc::clone(pod),
        tasks,
        init,
        request.id.clone(),
        String::new(),
    ));
    pod.events.send(
        &pod.namespace,
        Event::Create(TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            pid: made.pid,
        }),
    );
    Ok((container, made.pid))
}

pub(super) fn read_spec(bundle: &Path) -> Answer<Value> {
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

/// Waits for a process's end and reports it once its output has been passed on.
async fn watch_exit(
    pod: Arc<Pod>,
    tasks: TaskClient,
    process: Arc<Process>,
    container_id: String,
    exec_id: String,
) {
    let request = WaitRequest {
        id: container_id.clone(),
        exec_id: exec_id.clone(),
    };
    let exit = match tasks.wait(&request).await {
        Ok(answer) => Exit {
            status: answer.exit_status,
            at: answer.exited_at.unwrap_or_else(now),
        },
        // The guest has gone: its pod says so to all processes. Or the container was deleted.
        Err(e) if e.code().is_some() => Exit {
            status: KILLED,
            at: now(),
        },
        Err(_) => {
            let _ = process.wait().await;
            return report(&pod, &process, container_id, exec_id);
        }
    };
    drop(tasks);
    let pumps = process.state().pumps.take();
    if let Some(mut pumps) = pumps {
        pumps.drained(timeouts::drain()).await;
        // What nobody has taken yet goes on being offered until the process is deleted.
        process.state().pumps = Some(pumps);
    }
    process.ended(exit);
    report(&pod, &process, container_id, exec_id);
}

fn report(pod: &Pod, process: &Process, container_id: String, exec_id: String) {
    let pid = {
        let mut state = process.state();
        state.running = false;
        state.pid
    };
    let Some(exit) = process.exit() else { return };
    let id = match exec_id.is_empty() {
        true => container_id.clone(),
        false => exec_id,
    };
    pod.events.send(
        &pod.namespace,
        Event::Exit(TaskExit {
            container_id,
            id,
            pid,
            exit_status: exit.status,
            exited_at: Some(exit.at),
        }),
    );
}

/// Whether an error of the agent means that what was to be deleted is not there.
fn gone(error: &RpcError) -> bool {
    error.code() == Some(Code::NotFound)
}

async fn delete(pod: Arc<Pod>, request: DeleteRequest) -> Answer<DeleteResponse> {
    let tasks = Tasks(Arc::clone(&pod));
    let container = tasks.find(&request.id)?;
    let process = container.process(&request.exec_id)?;
    // A guest that has gone has nothing to delete.
    if let Ok(guest) = pod.guest() {
        match guest.tasks().delete(&request).await {
            Ok(_) => {}
            Err(e) if gone(&e) || e.code().is_none() => {}
            Err(e) => return Err(refused(e)),
        }
    }
    // One that never started ends by being deleted; one that ended is reported within moments.
    let exit = tokio::time::timeout(timeouts::drain() + Duration::from_secs(5), process.wait())
        .await
        .ok()
        .flatten()
        .unwrap_or_else(|| Exit {
            status: KILLED,
            at: now(),
        });
    process.ended(exit);
    let pid = {
        let mut state = process.state();
        state.pumps = None;
        state.pid
    };
    if request.exec_id.is_empty() {
        if let Ok(storage) = pod.storage() {
            let id = request.id.clone();
            blocking(move || lock(&storage).remove(&id)).await?;
        }
        pod.slots().remove(&request.id);
        pod.note_containers();
        pod.events.send(
            &pod.namespace,
            Event::Delete(TaskDelete {
                container_id: request.id,
                pid,
                exit_status: exit.status,
                exited_at: Some(exit.at),
                id: String::new(),
            }),
        );
    } else {
        container.execs().remove(&request.exec_id);
    }
    Ok(DeleteResponse {
        pid,
        exit_status: exit.status,
        exited_at: Some(exit.at),
    })
}

async fn exec(pod: Arc<Pod>, request: ExecProcessRequest) -> Answer<()> {
    check_id("exec", &request.exec_id)?;
    let tasks = Tasks(Arc::clone(&pod));
    let (container, client) = tasks.running(&request.id, "")?;
    {
        let execs = container.execs();
        if execs.contains_key(&request.exec_id) {
            return Err(Status::new(
                Code::AlreadyExists,
                format!(
                    "container {}: process {} exists",
                    request.id, request.exec_id
                ),
            ));
        }
        if execs.len() >= MAX_EXECS {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("container {} has {MAX_EXECS} processes of Exec", request.id),
            ));
        }
    }
    let names = Names {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let guest = pod.guest()?;
    let (pumps, guest_names) = Pumps::start(&names, &guest, &pod.streams).await?;
    let to_agent = ExecProcessRequest {
        stdin: guest_names.stdin,
        stdout: guest_names.stdout,
        stderr: guest_names.stderr,
        ..request.clone()
    };
    client.exec(&to_agent).await.map_err(refused)?;
    let process = Arc::new(Process::new(names, Some(pumps)));
    container
        .execs()
        .insert(request.exec_id.clone(), Arc::clone(&process));
    tasks.event(Event::ExecAdded(TaskExec {
        container_id: request.id,
        exec_id: request.exec_id,
        pid: 0,
    }));
    Ok(())
}

async fn start(pod: Arc<Pod>, request: StartRequest) -> Answer<u32> {
    let tasks = Tasks(Arc::clone(&pod));
    let (container, client) = tasks.running(&request.id, &request.exec_id)?;
    let process = container.process(&request.exec_id)?;
    let is_exec = !request.exec_id.is_empty();
    let pid = match client.start(&request).await {
        Ok(answer) => answer.pid,
        Err(e) => {
            if is_exec {
                // As containerd's own shim: what could not start has ended.
                let status = match e.code() {
                    Some(Code::NotFound) => 127,
                    Some(Code::PermissionDenied) => 126,
                    _ => 255,
                };
                process.ended(Exit { status, at: now() });
            }
            return Err(program(if is_exec { "exec" } else { "start" }, e));
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
            container_id: container_id.clone(),
            exec_id: exec_id.clone(),
            pid,
        }));
        tokio::spawn(watch_exit(pod, client, process, container_id, exec_id));
    } else {
        tasks.event(Event::Start(TaskStart { container_id, pid }));
    }
    Ok(pid)
}

impl TaskService for Tasks {
    async fn create(&self, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        let pod = Arc::clone(&self.0);
        let pid = to_the_end(create(pod, request)).await?;
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
        let (pid, running) = {
            let state = process.state();
            (state.pid, state.running)
        };
        let status = match (exit, running) {
            (Some(_), _) => ProcessStatus::Stopped,
            (None, false) => ProcessStatus::Created,
            (None, true) if *lock(&container.paused) => ProcessStatus::Paused,
            (None, true) => ProcessStatus::Running,
        };
        Ok(StateResponse {
            id: request.id,
            bundle: container.bundle.clone(),
            pid,
            status: status as i32,
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
        let (_, client) = self.running(&request.id, &request.exec_id)?;
        client.resize_pty(&request).await.map_err(refused)
    }

    async fn close_io(&self, request: CloseIoRequest) -> Answer<Empty> {
        if request.stdin {
            let container = self.find(&request.id)?;
            // The pump does the rest, behind all that has been written.
            container
                .process(&request.exec_id)?
                .close_stdin
                .notify_one();
        }
        Ok(Empty {})
    }

    async fn kill(&self, request: KillRequest) -> Answer<Empty> {
        let (_, client) = self.running(&request.id, &request.exec_id)?;
        client.kill(&request).await.map_err(refused)
    }

    async fn wait(&self, request: WaitRequest) -> Answer<WaitResponse> {
        let process = self.find(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await.ok_or_else(|| {
            Status::new(Code::NotFound, format!("container {} is gone", request.id))
        })?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(exit.at),
        })
    }

    async fn pids(&self, request: PidsRequest) -> Answer<PidsResponse> {
        let (_, client) = self.running(&request.id, "")?;
        client.pids(&request).await.map_err(refused)
    }

    async fn pause(&self, request: PauseRequest) -> Answer<Empty> {
        let (container, client) = self.running(&request.id, "")?;
        client.pause(&request).await.map_err(refused)?;
        *lock(&container.paused) = true;
        self.event(Event::Paused(TaskId {
            container_id: request.id,
        }));
        Ok(Empty {})
    }

    async fn resume(&self, request: ResumeRequest) -> Answer<Empty> {
        let (container, client) = self.running(&request.id, "")?;
        client.resume(&request).await.map_err(refused)?;
        *lock(&container.paused) = false;
        self.event(Event::Resumed(TaskId {
            container_id: request.id,
        }));
        Ok(Empty {})
    }

    async fn checkpoint(&self, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(Status::new(
            Code::Unimplemented,
            "checkpoints of containers are not supported",
        ))
    }

    async fn update(&self, request: UpdateTaskRequest) -> Answer<Empty> {
        let (_, client) = self.running(&request.id, "")?;
        let mut request = request;
        if let Some(any) = &mut request.resources {
            let mut resources: Value = serde_json::from_slice(&any.value).map_err(|e| {
                Status::new(
                    Code::InvalidArgument,
                    format!("resources are not JSON: {e}"),
                )
            })?;
            if let Some(resources) = resources.as_object_mut() {
                container_spec::strip_resources(resources);
            }
            any.value = serde_json::to_vec(&resources)
                .map_err(|e| Status::new(Code::Internal, e.to_string()))?;
        }
        client.update(&request).await.map_err(refused)
    }

    async fn stats(&self, request: StatsRequest) -> Answer<StatsResponse> {
        let (_, client) = self.running(&request.id, "")?;
        client.stats(&request).await.map_err(refused)
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

    #[tokio::test]
    async fn the_first_end_counts() {
        let process = Process::new(Names::default(), None);
        let exit = |status| Exit {
            status,
            at: Timestamp::default(),
        };
        assert!(process.ended(exit(3)) && !process.ended(exit(137)));
        assert_eq!(process.wait().await.map(|e| e.status), Some(3));
    }
}
