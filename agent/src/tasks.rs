//! The Task service.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::metrics::METRICS_TYPE_URL;
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{CONTAINER_OPTIONS_TYPE_URL, ContainerOptions, LAYERS_MOUNT};
use bulkhead_protocol::server::TaskService;
use bulkhead_protocol::task::*;
use bulkhead_protocol::types::{Any, Empty, ProcessInfo};
use prost::Message;
use serde_json::Value;
use tokio::sync::oneshot;

use crate::container::{self, Container, New, StdioNames, View};
use crate::disks;
use crate::error::{Context, Error, Result};
use crate::events::{Events, timestamp};
use crate::helper::{self, Job};
use crate::layers;
use crate::mounts::Shares;
use crate::reaper::{Exit, Reaper};
use crate::spec;
use crate::stdio::{ChildEnds, Streaming};
use crate::streams::Streams;

/// Containers at once.
const MAX_CONTAINERS: usize = 1024;

enum Slot {
    /// Being made.
    Reserved,
    /// Made.
    Container(Arc<Container>),
}

/// The containers of this guest.
pub struct Tasks {
    slots: Mutex<HashMap<String, Slot>>,
    /// Reaps their processes.
    pub reaper: Arc<Reaper>,
    /// Their streams.
    pub streams: Arc<Streams>,
    /// What happens to them.
    pub events: Arc<Events>,
    /// Where their files are.
    pub shares: Arc<Shares>,
    /// The PID namespace that containers share: its PID 1 and that process's end.
    pid_namespace: tokio::sync::Mutex<Option<(i32, oneshot::Receiver<Exit>)>>,
}

/// Runs to its end even if the caller goes away: a container is made whole or not at all.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> std::result::Result<T, Status> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(Status::from),
        Err(error) => {
            crate::error!("a call panicked: {error}");
            Err(Status::new(Code::Internal, "the agent failed in this call"))
        }
    }
}

/// Ids become file names and names of cgroups.
fn check_id(kind: &str, id: &str) -> Result<()> {
    let good = !id.is_empty()
        && id.len() <= 128
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.+-".contains(&b));
    if good {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{kind} id {:?} must be 1 to 128 of [A-Za-z0-9_.+-], not starting with a dot",
        id.chars().take(150).collect::<String>()
    )))
}

impl Tasks {
    /// No containers.
    pub fn new(
        reaper: Arc<Reaper>,
        streams: Arc<Streams>,
        events: Arc<Events>,
        shares: Arc<Shares>,
    ) -> Arc<Self> {
        Arc::new(Self {
            slots: Mutex::default(),
            reaper,
            streams,
            events,
            shares,
            pid_namespace: tokio::sync::Mutex::default(),
        })
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &str) -> Result<Arc<Container>> {
        match self.slots().get(id) {
            Some(Slot::Container(container)) => Ok(container.clone()),
            _ => Err(Error::NotFound(format!(
                "there is no container {:?}",
                id.chars().take(150).collect::<String>()
            ))),
        }
    }

    /// All containers.
    pub fn all(&self) -> Vec<Arc<Container>> {
        self.slots()
            .values()
            .filter_map(|slot| match slot {
                Slot::Container(container) => Some(container.clone()),
                Slot::Reserved => None,
            })
            .collect()
    }

    async fn make(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32> {
        check_id("container", &request.id)?;
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported(
                "restoring a container from a checkpoint is not supported".to_owned(),
            ));
        }
        {
            let mut slots = self.slots();
            if slots.contains_key(&request.id) {
                return Err(Error::Exists(format!(
                    "container {} exists already",
                    request.id
                )));
            }
            if slots.len() >= MAX_CONTAINERS {
                return Err(Error::Limit(format!(
                    "{MAX_CONTAINERS} containers in one sandbox; delete some"
                )));
            }
            slots.insert(request.id.clone(), Slot::Reserved);
        }
        let made = self.make_reserved(&request).await;
        let id = request.id;
        match made {
            Ok(container) => {
                let pid = container.view("")?.pid;
                self.slots().insert(id, Slot::Container(container));
                Ok(pid)
            }
            Err(error) => {
                container::clean_up(&id).await;
                self.slots().remove(&id);
                Err(error)
            }
        }
    }

    async fn make_reserved(&self, request: &CreateTaskRequest) -> Result<Arc<Container>> {
        let id = &request.id;
        let options = container_options(request)?;
        let names = StdioNames {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let streaming = Streaming::take(
            &self.streams,
            request.terminal,
            &request.stdin,
            &request.stdout,
            &request.stderr,
        )?;
        let bundle = container::directory(id);
        let root = bundle.join("rootfs");
        std::fs::create_dir_all(&root).context(|| format!("make {}", root.display()))?;
        let mounts = rootfs_mounts(request, &options)?;
        match mounts.as_slice() {
            [m] if m.r#type == LAYERS_MOUNT => {
                layers::mount_root(id, m, &self.shares, &root).await?;
            }
            mounts => self.shares.mount_rootfs(mounts, &root)?,
        }
        let pid_namespace = match spec::shares_pids(&options) {
            true => Some(self.pid_namespace().await?),
            false => None,
        };
        let disks = disks::find_all(&options.disks).await?;
        let place = spec::Place {
            id,
            bundle: &bundle,
            root: &root,
            terminal: request.terminal,
            pid_namespace,
            disks: &disks,
        };
        let prepared = spec::prepare(&options, place, &self.shares)?;
        let new = New {
            id,
            bundle: &request.bundle,
            prepared,
            streaming,
            names,
        };
        Container::create(new, &self.reaper, self.events.clone()).await
    }

    /// PID 1 of the namespace that containers share, made when the first one wants it.
    async fn pid_namespace(&self) -> Result<i32> {
        let mut holder = self.pid_namespace.lock().await;
        if let Some((pid, end)) = holder.as_mut()
            && matches!(end.try_recv(), Err(oneshot::error::TryRecvError::Empty))
        {
            return Ok(*pid);
        }
        let null = || -> Result<std::os::fd::OwnedFd> {
            let file = std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/null")
                .context(|| "open /dev/null".to_owned())?;
            Ok(file.into())
        };
        let ends = ChildEnds {
            stdin: null()?,
            stdout: null()?,
            stderr: null()?,
        };
        let made = helper::run(&self.reaper, &Job::PidNamespace, ends).await?;
        *holder = Some((made.pid, made.end));
        Ok(made.pid)
    }
}

fn container_options(request: &CreateTaskRequest) -> Result<ContainerOptions> {
    let any = request.options.as_ref().ok_or_else(|| {
        Error::Invalid(format!(
            "container {}: options are missing; they carry the OCI spec",
            request.id
        ))
    })?;
    if any.type_url != CONTAINER_OPTIONS_TYPE_URL {
        return Err(Error::Invalid(format!(
            "container {}: options are of type {:?}, not {CONTAINER_OPTIONS_TYPE_URL}",
            request.id,
            any.type_url.chars().take(150).collect::<String>()
        )));
    }
    ContainerOptions::decode(any.value.as_slice())
        .map_err(|error| Error::Invalid(format!("container {}: options: {error}", request.id)))
}

/// The mounts of the root; without any, the spec's `root.path` below a share.
fn rootfs_mounts(
    request: &CreateTaskRequest,
    options: &ContainerOptions,
) -> Result<Vec<bulkhead_protocol::types::Mount>> {
    if !request.rootfs.is_empty() {
        return Ok(request.rootfs.clone());
    }
    let spec: Value = serde_json::from_slice(&options.oci_spec).unwrap_or_default();
    match spec.pointer("/root/path").and_then(Value::as_str) {
        Some(path) if path.starts_with('/') => Ok(vec![bulkhead_protocol::types::Mount {
            r#type: "bulkhead-share".to_owned(),
            source: path.to_owned(),
            ..Default::default()
        }]),
        _ => Err(Error::Invalid(format!(
            "container {}: neither rootfs mounts nor an absolute root.path are given",
            request.id
        ))),
    }
}

fn exit_of(view: &View) -> (u32, Option<bulkhead_protocol::types::Timestamp>) {
    match view.exit {
        Some(exit) => (exit.status, Some(timestamp(exit.at))),
        None => (0, None),
    }
}

/// The service; a type of its own so that its calls can hold the tasks.
pub struct Service(pub Arc<Tasks>);

type Answer<T> = std::result::Result<T, Status>;

impl TaskService for Service {
    async fn create(&self, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        let tasks = self.0.clone();
        let pid = to_the_end(async move { tasks.make(request).await }).await?;
        Ok(CreateTaskResponse { pid })
    }

    async fn start(&self, request: StartRequest) -> Answer<StartResponse> {
        let container = self.0.find(&request.id)?;
        let reaper = self.0.reaper.clone();
        let pid =
            to_the_end(async move { container.start(&request.exec_id, &reaper).await }).await?;
        Ok(StartResponse { pid })
    }

    async fn state(&self, request: StateRequest) -> Answer<StateResponse> {
        let container = self.0.find(&request.id)?;
        let view = container.view(&request.exec_id)?;
        let (exit_status, exited_at) = exit_of(&view);
        Ok(StateResponse {
            id: request.id,
            bundle: container.bundle.clone(),
            pid: view.pid,
            status: view.status as i32,
            stdin: view.names.stdin,
            stdout: view.names.stdout,
            stderr: view.names.stderr,
            terminal: view.names.terminal,
            exit_status,
            exited_at,
            exec_id: request.exec_id,
        })
    }

    async fn delete(&self, request: DeleteRequest) -> Answer<DeleteResponse> {
        let container = self.0.find(&request.id)?;
        let view = if request.exec_id.is_empty() {
            let tasks = self.0.clone();
            to_the_end(async move {
                let view = container.delete().await?;
                tasks.slots().remove(&request.id);
                Ok(view)
            })
            .await?
        } else {
            container.delete_exec(&request.exec_id)?
        };
        let (exit_status, exited_at) = exit_of(&view);
        Ok(DeleteResponse {
            pid: view.pid,
            exit_status,
            exited_at,
        })
    }

    async fn exec(&self, request: ExecProcessRequest) -> Answer<Empty> {
        let container = self.0.find(&request.id)?;
        check_id("exec", &request.exec_id)?;
        let spec = request.spec.unwrap_or_default();
        let process = serde_json::from_slice(&spec.value)
            .map_err(|error| Error::Invalid(format!("exec: spec is not JSON: {error}")))?;
        let streaming = Streaming::take(
            &self.0.streams,
            request.terminal,
            &request.stdin,
            &request.stdout,
            &request.stderr,
        )?;
        let names = StdioNames {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        container.announce(&request.exec_id, process, streaming, names)?;
        Ok(Empty {})
    }

    async fn resize_pty(&self, request: ResizePtyRequest) -> Answer<Empty> {
        let container = self.0.find(&request.id)?;
        container.resize(&request.exec_id, request.width, request.height)?;
        Ok(Empty {})
    }

    async fn close_io(&self, request: CloseIoRequest) -> Answer<Empty> {
        let container = self.0.find(&request.id)?;
        if request.stdin {
            container.close_stdin(&request.exec_id)?;
        }
        Ok(Empty {})
    }

    async fn kill(&self, request: KillRequest) -> Answer<Empty> {
        let container = self.0.find(&request.id)?;
        container.kill(&request.exec_id, request.signal, request.all)?;
        Ok(Empty {})
    }

    async fn wait(&self, request: WaitRequest) -> Answer<WaitResponse> {
        let container = self.0.find(&request.id)?;
        let exit = container.wait(&request.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)),
        })
    }

    async fn pids(&self, request: PidsRequest) -> Answer<PidsResponse> {
        let container = self.0.find(&request.id)?;
        Ok(PidsResponse {
            processes: container
                .pids()?
                .into_iter()
                .map(|pid| ProcessInfo { pid, info: None })
                .collect(),
        })
    }

    async fn pause(&self, request: PauseRequest) -> Answer<Empty> {
        self.0.find(&request.id)?.freeze(true).await?;
        Ok(Empty {})
    }

    async fn resume(&self, request: ResumeRequest) -> Answer<Empty> {
        self.0.find(&request.id)?.freeze(false).await?;
        Ok(Empty {})
    }

    async fn checkpoint(&self, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(Status::new(
            Code::Unimplemented,
            "checkpoints of containers are not supported; snapshot the sandbox instead",
        ))
    }

    async fn update(&self, request: UpdateTaskRequest) -> Answer<Empty> {
        let container = self.0.find(&request.id)?;
        let Some(resources) = request.resources else {
            return Ok(Empty {});
        };
        let resources: Value = serde_json::from_slice(&resources.value)
            .map_err(|error| Error::Invalid(format!("update: resources are not JSON: {error}")))?;
        container.cgroup()?.update(&resources)?;
        Ok(Empty {})
    }

    async fn stats(&self, request: StatsRequest) -> Answer<StatsResponse> {
        let container = self.0.find(&request.id)?;
        let metrics = container.cgroup()?.metrics();
        Ok(StatsResponse {
            stats: Some(Any::of(METRICS_TYPE_URL, &metrics)),
        })
    }

    async fn connect(&self, request: ConnectRequest) -> Answer<ConnectResponse> {
        let view = self.0.find(&request.id)?.view("")?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: view.pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    async fn shutdown(&self, _: ShutdownRequest) -> Answer<Empty> {
        Ok(Empty {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_safe_as_names() {
        for good in ["c1", "A_b.c-d+1", &"x".repeat(128)] {
            assert!(check_id("c", good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".x", "a/b", "a b", "a\n", &"x".repeat(129)] {
            assert!(check_id("c", bad).is_err(), "{bad:?}");
        }
    }
}
