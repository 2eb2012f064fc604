//! One pod of wasm programs, from Create to Shutdown.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::server::TaskDispatch;
use bulkhead_protocol::types::Timestamp;
use bulkhead_wasm::{Network, PodConfig, Resolver, harden_thread};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::Shared;
use super::task::{Slot, Tasks};
use crate::daemon::events::now;
use crate::daemon::pod::{End, KILLED, blocking};
use crate::daemon::proto::{NODE, PodSandboxConfig};
use crate::daemon::state::{self, State};
use crate::daemon::storage::{self, Storage};
use crate::daemon::streaming::Streams;
use crate::daemon::{cgroup, ttrpc};

/// Largest resolv.conf of a host that is read.
const MAX_RESOLV: u64 = 64 << 10;

/// Where a pod stands.
#[derive(Debug)]
enum Phase {
    Created,
    Running(Running),
    Ended,
}

/// What a running pod has.
#[derive(Debug, Clone)]
pub struct Running {
    /// Its programs' pod.
    pub engine: bulkhead_wasm::Pod,
    /// Its containers' files.
    pub storage: Arc<Mutex<Storage>>,
}

#[derive(Debug)]
struct Inner {
    phase: Phase,
    started: Option<Timestamp>,
    state: State,
    listener: Option<AbortHandle>,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// What it shares with all others.
    pub shared: Arc<Shared>,
    /// Standard streams that containerd has opened.
    pub streams: Arc<Streams>,
    wish: PodSandboxConfig,
    dir: PathBuf,
    inner: Mutex<Inner>,
    slots: Mutex<HashMap<String, Slot>>,
    end: watch::Sender<Option<End>>,
    /// Held while it is started, stopped or removed.
    operation: tokio::sync::Mutex<()>,
}

impl Pod {
    /// A new pod, not started.
    ///
    /// # Errors
    /// Its directory cannot be made.
    pub fn create(
        shared: Arc<Shared>,
        namespace: String,
        id: String,
        netns: String,
        wish: PodSandboxConfig,
    ) -> Result<Arc<Self>, Status> {
        let dir = shared.directory().join(&id);
        let failed = |e: io::Error| {
            Status::new(
                Code::Internal,
                format!("sandbox {id}: {}: {e}", dir.display()),
            )
        };
        use std::os::unix::fs::DirBuilderExt;
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
            cgroups: cgroup::ensure(parent),
            containers: Vec::new(),
        };
        state.write(&dir).map_err(failed)?;
        Ok(Self::assemble(shared, dir, wish, state, Phase::Created))
    }

    /// A pod of an earlier process: its programs have ended with that.
    pub fn recover(shared: Arc<Shared>, dir: PathBuf, state: State) -> Arc<Self> {
        storage::clean(&dir);
        let started = state.started;
        let containers = state.containers.clone();
        let wish = PodSandboxConfig::default();
        let pod = Self::assemble(shared, dir, wish, state, Phase::Ended);
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
        shared: Arc<Shared>,
        dir: PathBuf,
        wish: PodSandboxConfig,
        state: State,
        phase: Phase,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: state.id.clone(),
            namespace: state.namespace.clone(),
            shared,
            streams: Arc::default(),
            wish,
            dir,
            inner: Mutex::new(Inner {
                phase,
                started: None,
                state,
                listener: None,
            }),
            slots: Mutex::default(),
            end: watch::Sender::new(None),
            operation: tokio::sync::Mutex::default(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its containers.
    pub fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where its Task service is.
    pub fn address(&self) -> String {
        format!("ttrpc+unix://{}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("task.sock")
    }

    /// Where a container's files are on the host.
    pub fn host_root(&self, number: &Path) -> PathBuf {
        self.dir.join("rootfs").join(number)
    }

    /// When it was started, if it was.
    pub fn started(&self) -> Option<Timestamp> {
        self.inner().started
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<End> {
        self.end.borrow().clone()
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

    /// What it runs with.
    ///
    /// # Errors
    /// It is not running.
    pub fn running(&self) -> Result<Running, Status> {
        let what = match &self.inner().phase {
            Phase::Running(running) => return Ok(running.clone()),
            Phase::Created => "is not started",
            Phase::Ended => "has ended",
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

    /// Makes it ready for containers. Starting a running pod is no error.
    ///
    /// # Errors
    /// Its network namespace is not there.
    pub async fn start(self: &Arc<Self>) -> Result<(), Status> {
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
        let pod = Arc::clone(self);
        let made = blocking(move || pod.build()).await?;
        let listening = made.and_then(|running| {
            self.listen().map_err(|e| {
                let socket = self.socket();
                Status::new(Code::Internal, format!("{}: {e}", socket.display()))
            })?;
            Ok(running)
        });
        match listening {
            Ok(running) => {
                let started = now();
                {
                    let mut inner = self.inner();
                    inner.phase = Phase::Running(running);
                    inner.started = Some(started);
                }
                self.note(|state| state.started = Some((started.seconds, started.nanos)));
                tracing::info!(sandbox = self.id, "started");
                Ok(())
            }
            Err(error) => {
                tracing::error!(sandbox = self.id, error = error.message, "start failed");
                self.finish(KILLED, error.message.clone()).await;
                Err(error)
            }
        }
    }

    fn build(&self) -> Result<Running, Status> {
        let internal = |e: String| Status::new(Code::Internal, e);
        let engine = self.shared.engine()?;
        let storage = Storage::create(&self.dir).map_err(|e| internal(e.to_string()))?;
        let netns = self.inner().state.netns.clone();
        let network = match netns.as_str() {
            "" if self.wants_host_network() => Network::Host,
            "" => Network::None,
            path => {
                let file = File::open(path)
                    .map_err(|e| internal(format!("network namespace {path}: {e}")))?;
                Network::Namespace(file.into())
            }
        };
        let limit = self.wish.linux.as_ref().and_then(|l| l.resources);
        let pod = bulkhead_wasm::Pod::new(
            &engine,
            PodConfig {
                id: self.id.clone(),
                network,
                resolver: Resolver::parse(&self.resolv_conf(), "127.0.0.1 localhost\n"),
                memory_bytes: limit
                    .and_then(|l| u64::try_from(l.memory_limit_in_bytes).ok())
                    .filter(|bytes| *bytes > 0),
                thread_hook: Some(Arc::new(harden_thread)),
                ..PodConfig::default()
            },
        );
        Ok(Running {
            engine: pod,
            storage: Arc::new(Mutex::new(storage)),
        })
    }

    fn wants_host_network(&self) -> bool {
        self.wish
            .linux
            .as_ref()
            .and_then(|l| l.security_context.as_ref())
            .and_then(|s| s.namespace_options.as_ref())
            .is_some_and(|options| options.network == NODE)
    }

    /// Without a wish: the host's own, as other runtimes do.
    fn resolv_conf(&self) -> String {
        use std::io::Read;
        let wish = self.wish.dns_config.as_ref();
        if let Some(dns) = wish.filter(|d| !d.servers.is_empty()) {
            let mut text = String::new();
            for server in &dns.servers {
                text.push_str(&format!("nameserver {server}\n"));
            }
            if !dns.searches.is_empty() {
                text.push_str(&format!("search {}\n", dns.searches.join(" ")));
            }
            if !dns.options.is_empty() {
                text.push_str(&format!("options {}\n", dns.options.join(" ")));
            }
            return text;
        }
        let mut text = String::new();
        let read =
            File::open("/etc/resolv.conf").map(|f| f.take(MAX_RESOLV).read_to_string(&mut text));
        match read {
            Ok(Ok(_)) => text,
            _ => String::new(),
        }
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

    /// Ends it and all its programs. Ending an ended pod is no error.
    pub async fn stop(self: &Arc<Self>, grace: Duration) {
        let _operation = self.operation.lock().await;
        if matches!(self.inner().phase, Phase::Ended) {
            return;
        }
        self.end_programs(grace).await;
        self.finish(0, "stopped".into()).await;
        tracing::info!(sandbox = self.id, "stopped");
    }

    /// First in peace, then by force.
    async fn end_programs(&self, grace: Duration) {
        let programs: Vec<bulkhead_wasm::Container> =
            self.slots().values().filter_map(Slot::program).collect();
        for (signal, time) in [
            (libc::SIGTERM, grace),
            (libc::SIGKILL, Duration::from_secs(5)),
        ] {
            if time.is_zero() {
                continue;
            }
            for program in &programs {
                // One that has ended refuses it.
                let _ = program.signal(signal);
            }
            let all = async {
                for program in &programs {
                    if program.status() != bulkhead_wasm::Status::Created {
                        program.ended().await;
                    }
                }
            };
            if tokio::time::timeout(time, all).await.is_ok() {
                return;
            }
        }
        tracing::warn!(sandbox = self.id, "a program does not end");
    }

    /// Takes everything down that a running pod has. Called with the operation's lock held.
    async fn finish(&self, status: u32, reason: String) {
        let phase = std::mem::replace(&mut self.inner().phase, Phase::Ended);
        let slots: Vec<Slot> = self.slots().values().cloned().collect();
        for slot in slots {
            slot.sandbox_ended();
        }
        // Mounts go with it.
        let _ = blocking(move || drop(phase)).await;
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
    pub async fn remove(self: &Arc<Self>) -> Result<(), Status> {
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
            storage::clean(&dir);
            cgroup::remove(&cgroups);
            if let Err(error) = crate::fsutil::remove_dir(&dir) {
                tracing::warn!(%error, dir = %dir.display(), "cannot be removed");
            }
        })
        .await
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(listener) = self.inner().listener.take() {
            listener.abort();
        }
    }
}
