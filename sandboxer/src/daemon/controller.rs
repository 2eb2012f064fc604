//! `containerd.services.sandbox.v1.Controller`: the life of the pods of one kind.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_protocol::metrics::{CPUStat, METRICS_TYPE_URL, MemoryStat, Metrics, PidsStat};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::types::Any;
use prost::Message;

use super::events::{Events, now};
use super::grpc::{self, Call, Service};
use super::pod::{Pod, blocking};
use super::proto::*;
use super::sandbox::{Answer, Kind, Sandbox};
use super::state::State;
use super::task::check_id;
use super::{cgroup, storage};
use crate::fsutil;

/// Version of the Task service at a pod's address; containerd takes no other.
const TASK_VERSION: u32 = 3;
/// Time for all pods to end when the daemon does.
const END_ALL: Duration = Duration::from_secs(60);

/// What has happened since the daemon was started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Pods that were started.
    pub starts: u64,
    /// Those that could not be.
    pub failures: u64,
    /// Those that ended by themselves.
    pub own_ends: u64,
    /// Time that the starts took together, in seconds.
    pub start_seconds: f64,
}

/// The pods of one kind.
#[derive(Debug)]
pub struct Controller<K: Kind> {
    kind: Arc<K>,
    events: Events,
    pods: Arc<Mutex<HashMap<String, Arc<Pod<K>>>>>,
    counts: Arc<Mutex<Counts>>,
}

impl<K: Kind> Controller<K> {
    /// With the pods of earlier processes, which have ended: containerd learns that from the
    /// records that are kept until it removes the pods. Needs a tokio runtime.
    pub fn new(kind: K, events: Events) -> Arc<Self> {
        let controller = Self::empty(kind, events);
        for entry in std::fs::read_dir(controller.kind.directory())
            .into_iter()
            .flatten()
            .flatten()
        {
            controller.adopt(entry.path());
        }
        controller
    }

    /// Without pods.
    pub fn empty(kind: K, events: Events) -> Arc<Self> {
        Arc::new(Self {
            kind: Arc::new(kind),
            events,
            pods: Arc::default(),
            counts: Arc::default(),
        })
    }

    /// Takes over the directory of a pod whose process has gone. Needs a tokio runtime.
    pub fn adopt(&self, dir: PathBuf) {
        match State::read(&dir) {
            Ok(state) if state.started.is_some() && check_id("sandbox", &state.id).is_ok() => {
                tracing::warn!(sandbox = state.id, "ended with an earlier sandboxer");
                let kind = Arc::clone(&self.kind);
                let pod = Pod::recover(kind, self.events.clone(), dir, state);
                self.pods().insert(pod.id.clone(), pod);
            }
            // Never started: containerd has been told so, or will create it anew.
            other => {
                if let Ok(state) = &other {
                    self.kind.clean(state);
                    cgroup::remove(&state.cgroups);
                }
                storage::clean(&dir);
                if let Err(error) = fsutil::remove_dir(&dir) {
                    tracing::warn!(%error, dir = %dir.display(), "cannot be removed");
                }
            }
        }
    }

    /// Whether there is a pod of this id.
    pub fn has(&self, id: &str) -> bool {
        self.pods().contains_key(id)
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<String, Arc<Pod<K>>>> {
        lock(&self.pods)
    }

    /// Its kind.
    pub fn kind(&self) -> &K {
        &self.kind
    }

    /// What has happened.
    pub fn counts(&self) -> Counts {
        *lock(&self.counts)
    }

    /// All pods.
    pub fn all(&self) -> Vec<Arc<Pod<K>>> {
        self.pods().values().cloned().collect()
    }

    /// Ends all pods, in order where there is time.
    pub async fn end_all(&self) {
        let mut stops = tokio::task::JoinSet::new();
        for pod in self.all() {
            stops.spawn(async move { pod.stop(Duration::from_secs(1)).await });
        }
        let all = async { while stops.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(END_ALL, all).await;
    }

    fn find(&self, id: &str) -> Answer<Arc<Pod<K>>> {
        self.pods().get(id).cloned().ok_or_else(|| {
            Status::new(
                Code::NotFound,
                format!("there is no sandbox {:?}", short(id)),
            )
        })
    }

    async fn create(&self, namespace: String, request: CreateRequest) -> Answer<CreateResponse> {
        let id = request.sandbox_id;
        check_id("sandbox", &id)?;
        let wish = match &request.options {
            // `ctr` and other clients give none, or options of their own.
            Some(any) if any.type_url.ends_with("PodSandboxConfig") => {
                PodSandboxConfig::decode(any.value.as_slice()).map_err(|e| {
                    Status::new(Code::InvalidArgument, format!("sandbox {id}: options: {e}"))
                })?
            }
            _ => PodSandboxConfig::default(),
        };
        self.kind.check(&wish).map_err(|reason| {
            Status::new(Code::InvalidArgument, format!("sandbox {id}: {reason}"))
        })?;
        {
            let pods = self.pods();
            if pods.contains_key(&id) {
                // Asked for again after a lost answer.
                return Ok(CreateResponse { sandbox_id: id });
            }
            let max = self.kind.max_pods();
            if pods.len() >= max {
                return Err(Status::new(
                    Code::ResourceExhausted,
                    format!("{max} sandboxes of {} exist; remove some", self.kind.name()),
                ));
            }
        }
        let (kind, events) = (Arc::clone(&self.kind), self.events.clone());
        let (pod_id, netns) = (id.clone(), request.netns_path);
        let pods = Arc::clone(&self.pods);
        // It is on the list once it is there, even if the caller has gone by then.
        blocking(move || {
            let pod = Pod::create(kind, events, namespace, pod_id.clone(), netns, wish)?;
            lock(&pods).entry(pod_id).or_insert(pod);
            Ok::<_, Status>(())
        })
        .await??;
        Ok(CreateResponse { sandbox_id: id })
    }

    async fn start(&self, request: IdRequest) -> Answer<StartResponse> {
        let pod = self.find(&request.sandbox_id)?;
        let starting = Arc::clone(&pod);
        let begin = Instant::now();
        // To its end even if the caller goes away.
        let started = to_the_end(async move { starting.start().await }).await;
        {
            let mut counts = lock(&self.counts);
            match &started {
                Ok(()) => counts.starts += 1,
                Err(_) => counts.failures += 1,
            }
            counts.start_seconds += begin.elapsed().as_secs_f64();
        }
        if started.is_ok() {
            self.count_own_end(&pod);
        }
        if let Err(error) = started {
            // CRI forgets a sandbox whose start fails: nobody else will remove it.
            self.remove(&pod).await?;
            return Err(error);
        }
        Ok(StartResponse {
            sandbox_id: request.sandbox_id,
            pid: std::process::id(),
            created_at: pod.started(),
            labels: BTreeMap::new(),
            address: pod.address(),
            version: TASK_VERSION,
        })
    }

    /// Counts it if it ends without having been asked to.
    fn count_own_end(&self, pod: &Arc<Pod<K>>) {
        let (ends, counts) = (pod.subscribe(), Arc::clone(&self.counts));
        tokio::spawn(async move {
            let mut ends = ends;
            let end = ends.wait_for(Option::is_some).await;
            if end.is_ok_and(|end| end.as_ref().is_some_and(|e| e.status != 0)) {
                lock(&counts).own_ends += 1;
            }
        });
    }

    async fn stop(&self, request: StopRequest) -> Answer<Nothing> {
        let pod = self.find(&request.sandbox_id)?;
        let grace = Duration::from_secs(request.timeout_secs.into());
        to_the_end(async move {
            pod.stop(grace).await;
            Ok(Nothing {})
        })
        .await
    }

    /// Ends a pod, and takes it off the list.
    ///
    /// # Errors
    /// It is being removed, and that panicked.
    pub async fn remove(&self, pod: &Arc<Pod<K>>) -> Answer<()> {
        let removing = Arc::clone(pod);
        to_the_end(async move { removing.remove().await }).await?;
        self.pods().remove(&pod.id);
        Ok(())
    }

    async fn shutdown(&self, request: IdRequest) -> Answer<Nothing> {
        // One that is not there has been removed.
        if let Ok(pod) = self.find(&request.sandbox_id) {
            self.remove(&pod).await?;
        }
        Ok(Nothing {})
    }

    async fn wait(&self, request: IdRequest) -> Answer<WaitResponse> {
        let end = self.find(&request.sandbox_id)?.wait().await;
        Ok(WaitResponse {
            exit_status: end.status,
            exited_at: Some(end.at),
        })
    }

    fn status(&self, request: &StatusRequest) -> Answer<StatusResponse> {
        let pod = self.find(&request.sandbox_id)?;
        let (started, end) = (pod.started(), pod.ended());
        let mut info = BTreeMap::new();
        if request.verbose {
            info.insert("runtime".into(), self.kind.name().into());
            if let Some(end) = &end {
                info.insert("reason".into(), end.reason.clone());
            }
            if let Some(text) = pod.sandbox().ok().and_then(|s| s.info()) {
                info.insert("sandbox".into(), text);
            }
        }
        let state = match started.is_some() && end.is_none() {
            true => "SANDBOX_READY",
            false => "SANDBOX_NOTREADY",
        };
        Ok(StatusResponse {
            sandbox_id: request.sandbox_id.clone(),
            pid: std::process::id(),
            state: state.into(),
            info,
            created_at: started,
            exited_at: end.map(|e| e.at),
            address: pod.address(),
            version: TASK_VERSION,
        })
    }

    async fn metrics(&self, request: IdRequest) -> Answer<MetricsResponse> {
        let pod = self.find(&request.sandbox_id)?;
        let metrics = usage(&pod).await?;
        Ok(MetricsResponse {
            metrics: Some(Metric {
                timestamp: Some(now()),
                id: request.sandbox_id,
                data: Some(Any::of(METRICS_TYPE_URL, &metrics)),
            }),
        })
    }

    fn update(&self, request: &UpdateRequest) -> Answer<Nothing> {
        // What containerd stores about a sandbox (labels, extensions) does not concern it.
        self.find(&request.sandbox_id).map(|_| Nothing {})
    }

    /// Answers a call of containerd's.
    ///
    /// # Errors
    /// What it is to be told.
    pub async fn dispatch(&self, call: Call) -> Answer<Vec<u8>> {
        let Some(method) = call
            .path
            .strip_prefix(CONTROLLER)
            .and_then(|rest| rest.strip_prefix('/'))
        else {
            return Err(Status::new(
                Code::Unimplemented,
                format!("no service at {:?}", short(&call.path)),
            ));
        };
        let payload = call.payload.as_ref();
        Ok(match method {
            "Create" => {
                let namespace = match call.namespace.as_str() {
                    "" => "k8s.io".to_owned(),
                    name => name.to_owned(),
                };
                self.create(namespace, decode(payload)?)
                    .await?
                    .encode_to_vec()
            }
            "Start" => self.start(decode(payload)?).await?.encode_to_vec(),
            "Platform" => {
                let request: IdRequest = decode(payload)?;
                self.find(&request.sandbox_id)?;
                // Also of kinds whose programs are no Linux binaries: containerd makes the
                // container's spec for it.
                PlatformResponse {
                    platform: Some(Platform {
                        os: "linux".into(),
                        architecture: "amd64".into(),
                        variant: String::new(),
                    }),
                }
                .encode_to_vec()
            }
            "Stop" => self.stop(decode(payload)?).await?.encode_to_vec(),
            "Wait" => self.wait(decode(payload)?).await?.encode_to_vec(),
            "Status" => self.status(&decode(payload)?)?.encode_to_vec(),
            "Shutdown" => self.shutdown(decode(payload)?).await?.encode_to_vec(),
            "Metrics" => self.metrics(decode(payload)?).await?.encode_to_vec(),
            "Update" => self.update(&decode(payload)?)?.encode_to_vec(),
            other => {
                return Err(Status::new(
                    Code::Unimplemented,
                    format!("{CONTROLLER} has no method {:?}", short(other)),
                ));
            }
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn short(text: &str) -> String {
    text.chars().take(100).collect()
}

/// What a pod's containers use together.
///
/// # Errors
/// It is not running.
pub async fn usage<K: Kind>(pod: &Pod<K>) -> Answer<Metrics> {
    let sandbox = pod.sandbox()?;
    let (mut cpu, mut memory, mut pids) = (
        CPUStat::default(),
        MemoryStat::default(),
        PidsStat::default(),
    );
    for id in pod.containers() {
        // One that has just ended has none.
        let Ok(one) = sandbox.stats(&id).await else {
            continue;
        };
        if let Some(one) = one.cpu {
            cpu.usage_usec = cpu.usage_usec.saturating_add(one.usage_usec);
            cpu.user_usec = cpu.user_usec.saturating_add(one.user_usec);
            cpu.system_usec = cpu.system_usec.saturating_add(one.system_usec);
        }
        if let Some(one) = one.memory {
            memory.usage = memory.usage.saturating_add(one.usage);
            memory.anon = memory.anon.saturating_add(one.anon);
            memory.file = memory.file.saturating_add(one.file);
            memory.inactive_file = memory.inactive_file.saturating_add(one.inactive_file);
        }
        if let Some(one) = one.pids {
            pids.current = pids.current.saturating_add(one.current);
        }
    }
    Ok(Metrics {
        pids: Some(pids),
        cpu: Some(cpu),
        memory: Some(memory),
        ..Metrics::default()
    })
}

/// Runs to its end even if the caller goes away: a thing is made whole or not at all.
pub async fn to_the_end<T: Send + 'static>(
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

fn decode<M: Message + Default>(payload: &[u8]) -> Answer<M> {
    M::decode(payload).map_err(|e| {
        Status::new(
            Code::InvalidArgument,
            format!("request cannot be decoded: {e}"),
        )
    })
}

/// A type of its own so that calls can hold the controller.
#[derive(Debug)]
pub struct Endpoint<K: Kind>(pub Arc<Controller<K>>);

impl<K: Kind> Service for Endpoint<K> {
    fn call(&self, call: Call) -> grpc::Answer {
        let controller = Arc::clone(&self.0);
        Box::pin(async move { controller.dispatch(call).await })
    }
}
