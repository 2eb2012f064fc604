//! One pod of any kind, from Create to Shutdown: its phases, its record on disk, its Task socket.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::server::TaskDispatch;
use bulkhead_protocol::types::Timestamp;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::container::Slot;
use super::events::{Events, now};
use super::proto::PodSandboxConfig;
use super::sandbox::{Answer, KILLED, Kind, OwnEnd, Plan, Sandbox, Stop};
use super::state::{self, State};
use super::streaming::Streams;
use super::task::Tasks;
use super::{cgroup, storage, ttrpc};

/// How a pod ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// 0 if it was asked to.
    pub status: u32,
    /// When.
    pub at: Timestamp,
    /// For people.
    pub reason: String,
}

/// Where a pod stands.
#[derive(Debug)]
enum Phase<S> {
    Created,
    Running(Arc<S>),
    Ended,
}

#[derive(Debug)]
struct Inner<S> {
    phase: Phase<S>,
    started: Option<Timestamp>,
    state: State,
    listener: Option<AbortHandle>,
    /// Notices the end that nobody asked for.
    watcher: Option<AbortHandle>,
}

/// A pod.
#[derive(Debug)]
pub struct Pod<K: Kind> {
    /// Its id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Its kind.
    pub kind: Arc<K>,
    /// What CRI says about it.
    pub wish: Arc<PodSandboxConfig>,
    /// Standard streams that containerd has opened.
    pub streams: Arc<Streams>,
    /// Where events go.
    pub events: Events,
    dir: PathBuf,
    inner: Mutex<Inner<K::Sandbox>>,
    slots: Mutex<HashMap<String, Slot<K::Sandbox>>>,
    end: watch::Sender<Option<End>>,
    /// Held while it is started, stopped or removed.
    operation: tokio::sync::Mutex<()>,
}

/// Runs something that blocks.
///
/// # Errors
/// It panicked.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Answer<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| {
        tracing::error!(error = %e, "a call panicked");
        Status::new(Code::Internal, "the sandboxer failed in this call")
    })
}

impl<K: Kind> Pod<K> {
    /// A new pod, not started. Blocks.
    ///
    /// # Errors
    /// Its directory cannot be made.
    pub fn create(
        kind: Arc<K>,
        events: Events,
        namespace: String,
        id: String,
        netns: String,
        wish: PodSandboxConfig,
    ) -> Answer<Arc<Self>> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = kind.directory().join(&id);
        let failed = |e: io::Error| {
            Status::new(
                Code::Internal,
                format!("sandbox {id}: {}: {e}", dir.display()),
            )
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(failed)?;
        let parent = wish.linux.as_ref().map_or("", |l| l.cgroup_parent.as_str());
        let state = State {
            version: state::VERSION,
            id: id.clone(),
            namespace,
            netns,
            pid: std::process::id(),
            started: None,
            cgroup_parent: parent.to_owned(),
            cgroups: cgroup::missing(parent),
            containers: Vec::new(),
        };
        if let Err(error) = state.write(&dir) {
            let _ = std::fs::remove_dir(&dir);
            return Err(failed(error));
        }
        cgroup::make(&state.cgroups);
        Ok(Self::assemble(
            kind,
            events,
            dir,
            wish,
            state,
            Phase::Created,
        ))
    }

    /// A pod of an earlier process: it has ended, whatever it was doing. Cleans up after it and
    /// serves its socket, so that containerd learns that.
    pub fn recover(kind: Arc<K>, events: Events, dir: PathBuf, state: State) -> Arc<Self> {
        storage::clean(&dir);
        kind.clean(&state);
        let started = state.started;
        let containers = state.containers.clone();
        let wish = PodSandboxConfig::default();
        let pod = Self::assemble(kind, events, dir, wish, state, Phase::Ended);
        pod.inner().started = started.map(|(seconds, nanos)| Timestamp { seconds, nanos });
        pod.end.send_replace(Some(End {
            status: KILLED,
            at: now(),
            reason: "the sandboxer ended while it was running".into(),
        }));
        for id in containers {
            pod.slots().insert(id.clone(), Slot::ended(&id));
        }
        if let Err(error) = pod.listen() {
            tracing::warn!(sandbox = pod.id, %error, "its task socket cannot be served");
        }
        pod
    }

    fn assemble(
        kind: Arc<K>,
        events: Events,
        dir: PathBuf,
        wish: PodSandboxConfig,
        state: State,
        phase: Phase<K::Sandbox>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: state.id.clone(),
            namespace: state.namespace.clone(),
            kind,
            wish: Arc::new(wish),
            streams: Arc::default(),
            events,
            dir,
            inner: Mutex::new(Inner {
                phase,
                started: None,
                state,
                listener: None,
                watcher: None,
            }),
            slots: Mutex::default(),
            end: watch::Sender::new(None),
            operation: tokio::sync::Mutex::default(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner<K::Sandbox>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its containers.
    pub fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot<K::Sandbox>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ids of the containers that are made.
    pub fn containers(&self) -> Vec<String> {
        self.slots()
            .iter()
            .filter(|(_, slot)| matches!(slot, Slot::Container(_)))
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Where its Task service is.
    pub fn address(&self) -> String {
        format!("ttrpc+unix://{}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("task.sock")
    }

    /// When it was started, if it was.
    pub fn started(&self) -> Option<Timestamp> {
        self.inner().started
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    /// For waiting without holding the pod.
    pub fn subscribe(&self) -> watch::Receiver<Option<End>> {
        self.end.subscribe()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> End {
        let mut end = self.end.subscribe();
        let found = end.wait_for(Option::is_some).await;
        found.ok().and_then(|end| end.clone()).unwrap_or(End {
            status: KILLED,
            at: now(),
            reason: String::new(),
        })
    }

    /// Its sandbox.
    ///
    /// # Errors
    /// It is not running.
    pub fn sandbox(&self) -> Answer<Arc<K::Sandbox>> {
        let what = match &self.inner().phase {
            Phase::Running(sandbox) => return Ok(Arc::clone(sandbox)),
            Phase::Created => "is not started".to_owned(),
            Phase::Ended => match self.ended() {
                Some(end) => format!("has ended: {}", end.reason),
                None => "has ended".to_owned(),
            },
        };
        Err(Status::new(
            Code::FailedPrecondition,
            format!("sandbox {} {what}", self.id),
        ))
    }

    /// Writes down which containers there are.
    pub fn note_containers(&self) {
        let containers = self.slots().keys().cloned().collect();
        self.note(|state| state.containers = containers);
    }

    fn note(&self, change: impl FnOnce(&mut State)) {
        let mut inner = self.inner();
        change(&mut inner.state);
        if let Err(error) = inner.state.write(&self.dir) {
            tracing::warn!(sandbox = self.id, %error, "its state cannot be written");
        }
    }

    /// Starts its sandbox. Starting a running pod is no error.
    ///
    /// # Errors
    /// Anything on the way; then nothing is left of it but its directory.
    pub async fn start(self: &Arc<Self>) -> Answer<()> {
        let _operation = self.operation.lock().await;
        match self.inner().phase {
            Phase::Created => {}
            Phase::Running(_) => return Ok(()),
            Phase::Ended => {
                return Err(Status::new(
                    Code::FailedPrecondition,
                    format!(
                        "sandbox {} has ended; remove it and create another",
                        self.id
                    ),
                ));
            }
        }
        let plan = self.plan();
        let result = match self.kind.start(plan).await {
            Ok(sandbox) => self.run(Arc::new(sandbox)),
            Err(error) => Err(error),
        };
        if let Err(error) = &result {
            tracing::error!(sandbox = self.id, error = error.message, "start failed");
            self.finish(KILLED, error.message.clone()).await;
        }
        result
    }

    fn plan(self: &Arc<Self>) -> Plan {
        let pod = Arc::downgrade(self);
        let stop = move |grace| {
            if let Some(pod) = pod.upgrade() {
                tokio::spawn(async move { pod.stop(grace).await });
            }
        };
        Plan {
            id: self.id.clone(),
            namespace: self.namespace.clone(),
            dir: self.dir.clone(),
            netns: self.inner().state.netns.clone(),
            wish: Arc::clone(&self.wish),
            streams: Arc::clone(&self.streams),
            events: self.events.clone(),
            stop: Stop(Arc::new(stop)),
        }
    }

    fn run(self: &Arc<Self>, sandbox: Arc<K::Sandbox>) -> Answer<()> {
        let started = now();
        let pod = Arc::downgrade(self);
        {
            let mut inner = self.inner();
            inner.phase = Phase::Running(Arc::clone(&sandbox));
            let watcher = tokio::spawn(async move {
                let end = sandbox.ended().await;
                drop(sandbox);
                if let Some(pod) = pod.upgrade() {
                    // A task of its own: what follows ends this one.
                    tokio::spawn(async move { pod.sandbox_ended(end).await });
                }
            });
            inner.watcher = Some(watcher.abort_handle());
        }
        // From now on, a failure finds a running pod to take down.
        self.listen().map_err(|e| {
            let socket = self.socket();
            Status::new(Code::Internal, format!("{}: {e}", socket.display()))
        })?;
        self.inner().started = Some(started);
        self.note(|state| state.started = Some((started.seconds, started.nanos)));
        tracing::info!(sandbox = self.id, "started");
        Ok(())
    }

    /// Serves its Task service until the pod is dropped.
    fn listen(self: &Arc<Self>) -> io::Result<()> {
        let socket = self.socket();
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&socket)?;
        let pod = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    // Out of descriptors: others must be closed first.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let Some(pod) = pod.upgrade() else { return };
                let streams = Arc::clone(&pod.streams);
                let dispatch = Arc::new(TaskDispatch(Arc::new(Tasks(pod))));
                tokio::spawn(async move {
                    if let Err(error) = ttrpc::serve(stream, dispatch, streams).await {
                        tracing::debug!(%error, "a connection of containerd broke");
                    }
                });
            }
        });
        self.inner().listener = Some(task.abort_handle());
        Ok(())
    }

    /// Its sandbox has ended, and nobody has asked for that.
    async fn sandbox_ended(self: &Arc<Self>, end: OwnEnd) {
        let _operation = self.operation.lock().await;
        if !matches!(self.inner().phase, Phase::Running(_)) {
            return;
        }
        let OwnEnd { reason, details } = end;
        if !details.is_empty() {
            tracing::error!(sandbox = self.id, "{details}");
        }
        tracing::error!(
            sandbox = self.id,
            error = reason,
            "the sandbox ended by itself"
        );
        self.finish(KILLED, reason).await;
    }

    /// Ends it: asks first, if there is time. Ending an ended pod is no error.
    pub async fn stop(self: &Arc<Self>, grace: Duration) {
        let _operation = self.operation.lock().await;
        let running = match &self.inner().phase {
            Phase::Ended => return,
            Phase::Created => None,
            Phase::Running(sandbox) => Some(Arc::clone(sandbox)),
        };
        if let Some(sandbox) = running {
            sandbox.shut_down(grace).await;
        }
        self.finish(0, "stopped".into()).await;
        tracing::info!(sandbox = self.id, "stopped");
    }

    /// Takes everything down that a running pod has. Called with the operation's lock held.
    async fn finish(&self, status: u32, reason: String) {
        let (phase, watcher) = {
            let mut inner = self.inner();
            (
                std::mem::replace(&mut inner.phase, Phase::Ended),
                inner.watcher.take(),
            )
        };
        if let Some(watcher) = watcher {
            watcher.abort();
        }
        for slot in self.slots().values() {
            slot.sandbox_ended();
        }
        // Threads and mounts are waited for there.
        let _ = blocking(move || {
            if let Phase::Running(sandbox) = phase {
                sandbox.take_down();
            }
        })
        .await;
        self.end.send_replace(Some(End {
            status,
            at: now(),
            reason,
        }));
    }

    /// Removes what is left of a pod; ends it before.
    ///
    /// # Errors
    /// None so far.
    pub async fn remove(self: &Arc<Self>) -> Answer<()> {
        self.stop(Duration::ZERO).await;
        let _operation = self.operation.lock().await;
        let cgroups = {
            let mut inner = self.inner();
            if let Some(listener) = inner.listener.take() {
                listener.abort();
            }
            std::mem::take(&mut inner.state.cgroups)
        };
        self.slots().clear();
        let dir = self.dir.clone();
        blocking(move || {
            cgroup::remove(&cgroups);
            crate::fsutil::remove_at_last(dir, |dir| {
                storage::clean(dir);
                crate::fsutil::remove_dir(dir)
            });
        })
        .await
    }
}

impl<K: Kind> Drop for Pod<K> {
    fn drop(&mut self) {
        if let Some(listener) = self.inner().listener.take() {
            listener.abort();
        }
    }
}
