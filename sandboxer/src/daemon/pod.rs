//! One pod: its VM and what was made for it on the host, from Create to Shutdown.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{
    ConfigureSandboxRequest, Dns, EventKind, Share, WaitEventRequest,
};
use bulkhead_protocol::server::TaskDispatch;
use bulkhead_protocol::types::Timestamp;
use bulkhead_vmm::{DiskConfig, DiskSource, VmConfig};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::config::Config;
use super::debug_socket::{About, DebugSocket};
use super::events::{Event, Events, now};
use super::guest::{Guest, ended};
use super::network::PodNetwork;
use super::portforward::{self, PortForward};
use super::proto::{PodSandboxConfig, TaskId};
use super::state::{self, State};
use super::storage::{self, Storage};
use super::streaming::Streams;
use super::task::{Slot, Tasks};
use super::{cgroup, ttrpc};
use crate::engine::EngineError;
use crate::engine::console::ConsoleHub;
use crate::engine::microvm::MicroVm;
use crate::engine::microvm::files::GuestFiles;

/// Exit status of a pod whose VM ended by itself, as if killed.
pub const KILLED: u32 = 137;

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
#[derive(Debug, Clone)]
enum Phase {
    Created,
    Running(Arc<Guest>),
    Ended,
}

#[derive(Debug)]
struct Inner {
    phase: Phase,
    started: Option<Timestamp>,
    storage: Option<Arc<Mutex<Storage>>>,
    network: Option<PodNetwork>,
    forward: Option<PortForward>,
    debug: Option<DebugSocket>,
    tasks: Vec<AbortHandle>,
    state: State,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// What containerd asked for.
    pub wish: PodSandboxConfig,
    /// Its containers and their processes.
    pub containers: Mutex<HashMap<String, Slot>>,
    /// Standard streams that containerd has opened.
    pub streams: Arc<Streams>,
    /// Where events go.
    pub events: Events,
    config: Arc<Config>,
    dir: PathBuf,
    inner: Mutex<Inner>,
    end: watch::Sender<Option<End>>,
    listener: Mutex<Option<AbortHandle>>,
    /// Held while it is started, stopped or removed.
    operation: tokio::sync::Mutex<()>,
}

/// Makes a status of an engine's error.
fn failed(error: EngineError) -> Status {
    let code = match &error {
        EngineError::NoGuest { .. } => Code::FailedPrecondition,
        EngineError::GuestHangs { .. } => Code::DeadlineExceeded,
        _ => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// Runs something that blocks.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|e| {
        tracing::error!(error = %e, "a call panicked");
        Status::new(Code::Internal, "the sandboxer failed in this call")
    })
}

impl Pod {
    /// A new pod, not started.
    ///
    /// # Errors
    /// Its directory or cgroup cannot be made.
    pub fn create(
        config: Arc<Config>,
        events: Events,
        namespace: String,
        id: String,
        netns: String,
        wish: PodSandboxConfig,
    ) -> Result<Arc<Self>, Status> {
        let dir = directory(&config, &id);
        let failed = |e: std::io::Error| {
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
            namespace: namespace.clone(),
            netns,
            pid: std::process::id(),
            started: None,
            cgroups: cgroup::ensure(parent),
            containers: Vec::new(),
        };
        state.write(&dir).map_err(failed)?;
        Ok(Self::assemble(
            config,
            events,
            dir,
            wish,
            state,
            Phase::Created,
        ))
    }

    /// A pod of an earlier process: it has ended, whatever it was doing. Cleans up after it and
    /// serves its socket, so that containerd learns that.
    pub fn recover(config: Arc<Config>, events: Events, dir: PathBuf, state: State) -> Arc<Self> {
        storage::clean(&dir);
        if !state.netns.is_empty() {
            super::network::clean(Path::new(&state.netns));
        }
        let started = state.started;
        let containers = state.containers.clone();
        let wish = PodSandboxConfig::default();
        let pod = Self::assemble(config, events, dir, wish, state, Phase::Ended);
        pod.inner().started = started.map(|(seconds, nanos)| Timestamp { seconds, nanos });
        pod.end.send_replace(Some(End {
            status: KILLED,
            at: now(),
            reason: "the sandboxer ended while it was running".into(),
        }));
        {
            let mut slots = pod.slots();
            for id in containers {
                slots.insert(id.clone(), Slot::ended(&id));
            }
        }
        if let Err(error) = pod.listen() {
            tracing::warn!(sandbox = pod.id, %error, "its task socket cannot be served");
        }
        pod
    }

    fn assemble(
        config: Arc<Config>,
        events: Events,
        dir: PathBuf,
        wish: PodSandboxConfig,
        state: State,
        phase: Phase,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: state.id.clone(),
            namespace: state.namespace.clone(),
            wish,
            containers: Mutex::default(),
            streams: Arc::default(),
            events,
            config,
            dir,
            inner: Mutex::new(Inner {
                phase,
                started: None,
                storage: None,
                network: None,
                forward: None,
                debug: None,
                tasks: Vec::new(),
                state,
            }),
            end: watch::Sender::new(None),
            listener: Mutex::default(),
            operation: tokio::sync::Mutex::default(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listener(&self) -> MutexGuard<'_, Option<AbortHandle>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its containers.
    pub fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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

    /// Waits for its end.
    pub async fn wait(&self) -> End {
        let mut end = self.end.subscribe();
        loop {
            if let Some(end) = end.borrow_and_update().clone() {
                return end;
            }
            if end.changed().await.is_err() {
                return End {
                    status: KILLED,
                    at: now(),
                    reason: String::new(),
                };
            }
        }
    }

    /// Its guest.
    ///
    /// # Errors
    /// It is not running.
    pub fn guest(&self) -> Result<Arc<Guest>, Status> {
        match &self.inner().phase {
            Phase::Running(guest) => Ok(Arc::clone(guest)),
            Phase::Created => Err(Status::new(
                Code::FailedPrecondition,
                format!("sandbox {} is not started", self.id),
            )),
            Phase::Ended => {
                let reason = self.ended().map_or(String::new(), |e| e.reason);
                Err(Status::new(
                    Code::FailedPrecondition,
                    format!("sandbox {} has ended: {reason}", self.id),
                ))
            }
        }
    }

    /// Its share.
    ///
    /// # Errors
    /// It is not running.
    pub fn storage(&self) -> Result<Arc<Mutex<Storage>>, Status> {
        self.inner().storage.clone().ok_or_else(|| {
            Status::new(
                Code::FailedPrecondition,
                format!("sandbox {} is not running", self.id),
            )
        })
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

    /// Boots its VM. Starting a running pod is no error.
    ///
    /// # Errors
    /// Anything on the way; then nothing is left of it but its directory.
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
        match self.boot().await {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::error!(sandbox = self.id, error = error.message, "start failed");
                self.finish(KILLED, error.message.clone()).await;
                Err(error)
            }
        }
    }

    async fn boot(self: &Arc<Self>) -> Result<(), Status> {
        let pod = Arc::clone(self);
        let (vm, request) = blocking(move || pod.build()).await??;
        let guest = Guest::reach(Arc::clone(&vm), &request)
            .await
            .map_err(failed)?;
        let guest = Arc::new(guest);
        self.listen().map_err(|e| {
            let socket = self.socket();
            Status::new(Code::Internal, format!("{}: {e}", socket.display()))
        })?;
        let vm_end = ended(&vm).map_err(failed)?;
        self.forward_ports().await;
        self.show(&vm);
        let started = now();
        {
            let mut inner = self.inner();
            inner.phase = Phase::Running(Arc::clone(&guest));
            inner.started = Some(started);
            let pod = Arc::downgrade(self);
            // Not among the tasks that the end stops: it is what brings the end about.
            tokio::spawn(async move {
                vm_end.await;
                if let Some(pod) = pod.upgrade() {
                    pod.vm_ended().await;
                }
            });
            let watch = tokio::spawn(watch_events(
                guest.sandbox(),
                self.events.clone(),
                self.namespace.clone(),
            ));
            inner.tasks.push(watch.abort_handle());
        }
        self.note(|state| state.started = Some((started.seconds, started.nanos)));
        vm.vm().mark("sandbox ready");
        tracing::info!(sandbox = self.id, "started");
        Ok(())
    }

    /// Lets the host reach the guest's loopback. A pod is of use without.
    async fn forward_ports(self: &Arc<Self>) {
        let netns = {
            let inner = self.inner();
            let netns = inner.network.as_ref().and_then(PodNetwork::netns);
            netns.and_then(|n| n.try_clone().ok())
        };
        let Some(netns) = netns else { return };
        let started = match blocking(move || portforward::prepare(&netns)).await {
            Ok(Ok(prepared)) => PortForward::start(prepared, self),
            Ok(Err(error)) => Err(error),
            Err(_) => return,
        };
        match started {
            Ok(forward) => self.inner().forward = Some(forward),
            Err(error) => {
                tracing::warn!(sandbox = self.id, %error, "port-forwarding will not work");
            }
        }
    }

    /// Makes its VM known to `vmmctl`. A pod is of use without.
    fn show(self: &Arc<Self>, vm: &Arc<MicroVm>) {
        let (cpus, memory_mib) = size(&self.wish, &self.config.microvm);
        let names = self.wish.metadata.as_ref();
        let about = About {
            id: self.id.clone(),
            pod: names.map_or(String::new(), |m| format!("{}/{}", m.namespace, m.name)),
            cpus,
            memory_mib,
        };
        match DebugSocket::start(&self.config.run_dir, about, self, vm) {
            Ok(debug) => self.inner().debug = Some(debug),
            Err(error) => tracing::warn!(sandbox = self.id, %error, "vmmctl will not see it"),
        }
    }

    /// Blocking part: share, network, VM.
    fn build(&self) -> Result<(Arc<MicroVm>, ConfigureSandboxRequest), Status> {
        let vm_config = &self.config.microvm;
        let files = GuestFiles::find(vm_config.kernel.as_deref(), vm_config.image.as_deref())
            .map_err(failed)?;
        let storage =
            Storage::create(&self.dir).map_err(|e| Status::new(Code::Internal, e.to_string()))?;
        let netns = self.inner().state.netns.clone();
        let mut network = match netns.as_str() {
            "" => PodNetwork::default(),
            path => PodNetwork::join(Path::new(path)).map_err(failed)?,
        };
        let request = self.guest_setup(&storage, &network);
        let (vcpus, memory_mib) = size(&self.wish, vm_config);
        let config = VmConfig {
            id: self.id.clone(),
            vcpus,
            memory_mib,
            hugepages: vm_config.hugepages,
            kernel: files.kernel,
            cmdline: format!(
                "quiet root=/dev/vda rootfstype=erofs ro init=/sbin/agent dummy.numdummies=0 {}",
                vm_config.cmdline
            ),
            disks: vec![DiskConfig {
                source: DiskSource::Path(files.image),
                read_only: true,
                serial: "bulkhead-root".into(),
            }],
            shares: storage.devices(),
            nets: std::mem::take(&mut network.devices),
            vsock_cid: Some(3),
            rng: true,
            allow_emulated_kvm: vm_config.allow_emulated_kvm,
            ..VmConfig::default()
        };
        // Kept before anything can fail: the end takes them away.
        {
            let mut inner = self.inner();
            inner.storage = Some(Arc::new(Mutex::new(storage)));
            inner.network = Some(network);
        }
        let vm = Arc::new(MicroVm::create(config, ConsoleHub::new(None)).map_err(failed)?);
        vm.vm().start().map_err(|e| failed(e.into()))?;
        Ok((vm, request))
    }

    fn guest_setup(&self, storage: &Storage, network: &PodNetwork) -> ConfigureSandboxRequest {
        let wish = &self.wish;
        let dns = wish.dns_config.as_ref().map(|d| Dns {
            servers: d.servers.clone(),
            searches: d.searches.clone(),
            options: d.options.clone(),
        });
        let empty = |d: &Dns| d.servers.is_empty() && d.searches.is_empty() && d.options.is_empty();
        ConfigureSandboxRequest {
            hostname: match wish.hostname.as_str() {
                "" => self.id.chars().take(12).collect(),
                name => name.to_owned(),
            },
            // Without a wish: the host's own, as other runtimes do.
            dns: dns.filter(|d| !empty(d)).or_else(host_dns),
            hosts: String::new(),
            sysctls: sysctls(wish),
            shares: storage
                .guest_mounts()
                .into_iter()
                .map(|(tag, path)| Share {
                    tag: tag.into(),
                    path: path.into(),
                    options: Vec::new(),
                })
                .collect(),
            interfaces: network.interfaces.clone(),
            routes: network.routes.clone(),
            neighbours: network.neighbours.clone(),
        }
    }

    /// Serves its Task service until the pod is dropped.
    fn listen(self: &Arc<Self>) -> std::io::Result<()> {
        let socket = self.socket();
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
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
        self.inner().state.pid = std::process::id();
        *self.listener() = Some(task.abort_handle());
        Ok(())
    }

    /// The VM has ended, by our wish or its own.
    async fn vm_ended(self: &Arc<Self>) {
        let _operation = self.operation.lock().await;
        let Phase::Running(guest) = self.inner().phase.clone() else {
            return;
        };
        let error = guest.vm().ended("running").to_string();
        drop(guest);
        tracing::error!(sandbox = self.id, error, "the guest ended by itself");
        self.finish(KILLED, error).await;
    }

    /// Ends it: asks the guest first, if there is time. Ending an ended pod is no error.
    ///
    /// # Errors
    /// None so far.
    pub async fn stop(self: &Arc<Self>, grace: Duration) -> Result<(), Status> {
        let _operation = self.operation.lock().await;
        let phase = self.inner().phase.clone();
        match phase {
            Phase::Ended => return Ok(()),
            Phase::Created => {}
            Phase::Running(guest) => guest.shut_down(grace).await,
        }
        self.finish(0, "stopped".into()).await;
        tracing::info!(sandbox = self.id, "stopped");
        Ok(())
    }

    /// Takes everything down that a running pod has. Called with the operation's lock held.
    async fn finish(&self, status: u32, reason: String) {
        let (phase, storage, network, tasks, outside) = {
            let mut inner = self.inner();
            (
                std::mem::replace(&mut inner.phase, Phase::Ended),
                inner.storage.take(),
                inner.network.take(),
                std::mem::take(&mut inner.tasks),
                (inner.forward.take(), inner.debug.take()),
            )
        };
        drop(outside);
        for task in tasks {
            task.abort();
        }
        for slot in self.slots().values() {
            slot.sandbox_ended();
        }
        let _ = blocking(move || {
            // The VM first: it uses the rest. Threads are waited for here.
            if let Phase::Running(guest) = &phase {
                guest.vm().vm().stop();
            }
            drop(phase);
            drop(storage);
            if let Some(network) = network {
                network.leave();
            }
        })
        .await;
        self.end.send_replace(Some(End {
            status,
            at: now(),
            reason,
        }));
    }

    /// Removes what is left of an ended pod.
    ///
    /// # Errors
    /// As [`Self::stop`], which it does first.
    pub async fn remove(self: &Arc<Self>) -> Result<(), Status> {
        self.stop(Duration::ZERO).await?;
        let _operation = self.operation.lock().await;
        if let Some(listener) = self.listener().take() {
            listener.abort();
        }
        let (dir, cgroups) = (
            self.dir.clone(),
            std::mem::take(&mut self.inner().state.cgroups),
        );
        self.slots().clear();
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
        if let Some(listener) = self.listener().take() {
            listener.abort();
        }
    }
}

/// Where a pod's things are.
pub fn directory(config: &Config, id: &str) -> PathBuf {
    config.run_dir.join("pods").join(id)
}

/// vCPUs and MiB of memory, from what Kubernetes says about the pod.
fn size(wish: &PodSandboxConfig, config: &super::config::Microvm) -> (u8, u64) {
    let linux = wish.linux.as_ref();
    let parts = [
        linux.and_then(|l| l.resources),
        linux.and_then(|l| l.overhead),
    ];
    let mut cpus = 0.0f64;
    let mut bytes = 0u64;
    for part in parts.into_iter().flatten() {
        if part.cpu_quota > 0 && part.cpu_period > 0 {
            #[expect(clippy::cast_precision_loss, reason = "microseconds of a CPU period")]
            let share = part.cpu_quota as f64 / part.cpu_period as f64;
            cpus += share;
        }
        bytes = bytes.saturating_add(u64::try_from(part.memory_limit_in_bytes).unwrap_or(0));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to what fits"
    )]
    let vcpus = match cpus > 0.0 {
        true => cpus.ceil().clamp(1.0, config.max_cpus.into()) as u8,
        false => config.default_cpus,
    };
    // A limit of the pod's containers says nothing of those without one.
    let limited = linux
        .and_then(|l| l.resources)
        .is_some_and(|r| r.memory_limit_in_bytes > 0);
    let memory_mib = match limited {
        true => (bytes.div_ceil(1 << 20))
            .saturating_add(config.overhead_mib)
            .min(config.max_memory_mib),
        false => config.default_memory_mib,
    };
    (vcpus, memory_mib)
}

/// The pod's sysctls over those that containerd gives every pod with a network of its own, unless
/// its configuration turns them off: users without privilege may ping and open low ports.
fn sysctls(wish: &PodSandboxConfig) -> std::collections::BTreeMap<String, String> {
    let mut all: std::collections::BTreeMap<_, _> = [
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("net.ipv4.ping_group_range", "0 2147483647"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    all.extend(wish.linux.iter().flat_map(|l| l.sysctls.clone()));
    all
}

/// Name resolution of the host.
fn host_dns() -> Option<Dns> {
    let text = std::fs::read_to_string("/etc/resolv.conf").ok()?;
    let mut dns = Dns::default();
    for line in text.lines().take(100) {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.servers.extend(words.next()),
            Some("search") => dns.searches = words.collect(),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    // In the guest, its own loopback would be asked.
    dns.servers.retain(|s| {
        s.parse()
            .is_ok_and(|ip: std::net::IpAddr| !ip.is_loopback())
    });
    Some(dns)
}

/// Passes on what only the guest knows.
async fn watch_events(
    sandbox: bulkhead_protocol::client::SandboxClient,
    events: Events,
    namespace: String,
) {
    let mut after = 0;
    loop {
        let request = WaitEventRequest {
            after,
            timeout_ms: 0,
        };
        let Ok(answer) = sandbox.wait_event(&request).await else {
            return;
        };
        for event in answer.events {
            after = after.max(event.sequence);
            if let Some(EventKind::Oom(oom)) = event.kind {
                let id = TaskId {
                    container_id: oom.container_id,
                };
                events.send(&namespace, Event::Oom(id));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::proto::{LinuxPodSandboxConfig, LinuxResources};
    use super::*;

    fn wish(resources: Option<LinuxResources>) -> PodSandboxConfig {
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                resources,
                overhead: Some(LinuxResources {
                    cpu_period: 100_000,
                    cpu_quota: 25_000,
                    memory_limit_in_bytes: 32 << 20,
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    #[test]
    fn a_vm_is_as_large_as_its_pod() {
        let config = super::super::config::Microvm::default();
        assert_eq!(size(&PodSandboxConfig::default(), &config), (1, 256));
        let limited = LinuxResources {
            cpu_period: 100_000,
            cpu_quota: 190_000,
            memory_limit_in_bytes: 512 << 20,
        };
        assert_eq!(size(&wish(Some(limited)), &config), (3, 512 + 32 + 64));
        let huge = LinuxResources {
            cpu_period: 1,
            cpu_quota: i64::MAX,
            memory_limit_in_bytes: i64::MAX,
        };
        assert_eq!(
            size(&wish(Some(huge)), &config),
            (32, config.max_memory_mib)
        );
        let none = LinuxResources {
            cpu_period: 0,
            cpu_quota: -1,
            memory_limit_in_bytes: 0,
        };
        assert_eq!(size(&wish(Some(none)), &config), (1, 256));
    }
}
