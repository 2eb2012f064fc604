//! `containerd.services.sandbox.v1.Controller` for wasm pods.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::metrics::{CPUStat, METRICS_TYPE_URL, MemoryStat, Metrics, PidsStat};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::types::Any;
use prost::Message;

use super::Shared;
use super::pod::Pod;
use super::task::{Slot, metrics};
use crate::daemon::controller::{TASK_VERSION, decode};
use crate::daemon::events::now;
use crate::daemon::grpc::{Answer, Call, Service};
use crate::daemon::pod::blocking;
use crate::daemon::proto::*;
use crate::daemon::state::State;
use crate::daemon::task::check_id;
use crate::daemon::{cgroup, storage};
use crate::fsutil;

/// Pods of one daemon.
const MAX_PODS: usize = 16_384;

/// The wasm pods of this daemon.
#[derive(Debug)]
pub struct Controller {
    shared: Arc<Shared>,
    pods: Mutex<HashMap<String, Arc<Pod>>>,
}

impl Controller {
    /// With the pods of earlier processes, which have ended.
    pub fn new(shared: Arc<Shared>) -> Arc<Self> {
        let controller = Arc::new(Self {
            shared,
            pods: Mutex::default(),
        });
        controller.recover();
        controller
    }

    fn recover(&self) {
        for entry in std::fs::read_dir(self.shared.directory())
            .into_iter()
            .flatten()
            .flatten()
        {
            let dir = entry.path();
            match State::read(&dir) {
                Ok(state) if state.started.is_some() && check_id("sandbox", &state.id).is_ok() => {
                    tracing::warn!(sandbox = state.id, "ended with an earlier sandboxer");
                    let pod = Pod::recover(Arc::clone(&self.shared), dir, state);
                    self.pods().insert(pod.id.clone(), pod);
                }
                // Never started: containerd has been told so, or will create it anew.
                other => {
                    if let Ok(state) = &other {
                        cgroup::remove(&state.cgroups);
                    }
                    storage::clean(&dir);
                    if let Err(error) = fsutil::remove_dir(&dir) {
                        tracing::warn!(%error, dir = %dir.display(), "cannot be removed");
                    }
                }
            }
        }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all pods.
    pub async fn end_all(&self) {
        let all: Vec<Arc<Pod>> = self.pods().values().cloned().collect();
        let mut stops = tokio::task::JoinSet::new();
        for pod in all {
            stops.spawn(async move { pod.stop(Duration::from_secs(1)).await });
        }
        while stops.join_next().await.is_some() {}
    }

    fn find(&self, id: &str) -> Result<Arc<Pod>, Status> {
        self.pods().get(id).cloned().ok_or_else(|| {
            let shown: String = id.chars().take(100).collect();
            Status::new(Code::NotFound, format!("there is no sandbox {shown:?}"))
        })
    }

    async fn create(
        &self,
        namespace: String,
        request: CreateRequest,
    ) -> Result<CreateResponse, Status> {
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
        {
            let pods = self.pods();
            if pods.contains_key(&id) {
                // Asked for again after a lost answer.
                return Ok(CreateResponse { sandbox_id: id });
            }
            if pods.len() >= MAX_PODS {
                return Err(Status::new(
                    Code::ResourceExhausted,
                    format!("{MAX_PODS} wasm sandboxes exist; remove some"),
                ));
            }
        }
        let shared = Arc::clone(&self.shared);
        let (pod_id, netns) = (id.clone(), request.netns_path);
        let pod = blocking(move || Pod::create(shared, namespace, pod_id, netns, wish)).await??;
        self.pods().entry(id.clone()).or_insert(pod);
        Ok(CreateResponse { sandbox_id: id })
    }

    async fn start(&self, request: IdRequest) -> Result<StartResponse, Status> {
        let pod = self.find(&request.sandbox_id)?;
        let starting = Arc::clone(&pod);
        // To its end even if the caller goes away.
        let started = joined(tokio::spawn(async move { starting.start().await })).await;
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

    async fn stop(&self, request: StopRequest) -> Result<Nothing, Status> {
        let pod = self.find(&request.sandbox_id)?;
        let grace = Duration::from_secs(request.timeout_secs.into());
        joined(tokio::spawn(async move {
            pod.stop(grace).await;
            Ok(())
        }))
        .await?;
        Ok(Nothing {})
    }

    async fn remove(&self, pod: &Arc<Pod>) -> Result<(), Status> {
        let removing = Arc::clone(pod);
        joined(tokio::spawn(async move { removing.remove().await })).await?;
        self.pods().remove(&pod.id);
        Ok(())
    }

    async fn shutdown(&self, request: IdRequest) -> Result<Nothing, Status> {
        // One that is not there has been removed.
        if let Ok(pod) = self.find(&request.sandbox_id) {
            self.remove(&pod).await?;
        }
        Ok(Nothing {})
    }

    async fn wait(&self, request: IdRequest) -> Result<WaitResponse, Status> {
        let end = self.find(&request.sandbox_id)?.wait().await;
        Ok(WaitResponse {
            exit_status: end.status,
            exited_at: Some(end.at),
        })
    }

    fn status(&self, request: &StatusRequest) -> Result<StatusResponse, Status> {
        let pod = self.find(&request.sandbox_id)?;
        let (started, end) = (pod.started(), pod.ended());
        let mut info = BTreeMap::new();
        if request.verbose {
            info.insert("runtime".into(), "bulkhead-wasm".into());
            if let Some(end) = &end {
                info.insert("reason".into(), end.reason.clone());
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

    /// The sum over the pod's programs.
    fn metrics(&self, request: IdRequest) -> Result<MetricsResponse, Status> {
        let pod = self.find(&request.sandbox_id)?;
        let programs: Vec<_> = pod.slots().values().filter_map(Slot::program).collect();
        let (mut cpu, mut memory, mut pids) = (
            CPUStat::default(),
            MemoryStat::default(),
            PidsStat::default(),
        );
        for program in programs {
            let one = metrics(&program.stats());
            if let Some(one) = one.cpu {
                cpu.usage_usec = cpu.usage_usec.saturating_add(one.usage_usec);
                cpu.user_usec = cpu.user_usec.saturating_add(one.user_usec);
            }
            if let Some(one) = one.memory {
                memory.usage = memory.usage.saturating_add(one.usage);
                memory.anon = memory.anon.saturating_add(one.anon);
            }
            if let Some(one) = one.pids {
                pids.current = pids.current.saturating_add(one.current);
            }
        }
        let metrics = Metrics {
            pids: Some(pids),
            cpu: Some(cpu),
            memory: Some(memory),
            ..Metrics::default()
        };
        Ok(MetricsResponse {
            metrics: Some(Metric {
                timestamp: Some(now()),
                id: request.sandbox_id,
                data: Some(Any::of(METRICS_TYPE_URL, &metrics)),
            }),
        })
    }

    async fn dispatch(&self, call: Call) -> Result<Vec<u8>, Status> {
        let shown = |text: &str| text.chars().take(100).collect::<String>();
        let Some(method) = call
            .path
            .strip_prefix(CONTROLLER)
            .and_then(|rest| rest.strip_prefix('/'))
        else {
            return Err(Status::new(
                Code::Unimplemented,
                format!("no service at {:?}", shown(&call.path)),
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
                PlatformResponse {
                    // For the spec that containerd makes; see `super::spec`.
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
            "Metrics" => self.metrics(decode(payload)?)?.encode_to_vec(),
            "Update" => {
                // What containerd stores about a sandbox does not concern its programs.
                let request: UpdateRequest = decode(payload)?;
                self.find(&request.sandbox_id)?;
                Nothing {}.encode_to_vec()
            }
            other => {
                return Err(Status::new(
                    Code::Unimplemented,
                    format!("{CONTROLLER} has no method {:?}", shown(other)),
                ));
            }
        })
    }
}

async fn joined(task: tokio::task::JoinHandle<Result<(), Status>>) -> Result<(), Status> {
    task.await.unwrap_or_else(|error| {
        tracing::error!(%error, "a call panicked");
        Err(Status::new(
            Code::Internal,
            "the sandboxer failed in this call",
        ))
    })
}

/// A type of its own so that calls can hold the controller.
#[derive(Debug)]
pub struct Endpoint(pub Arc<Controller>);

impl Service for Endpoint {
    fn call(&self, call: Call) -> Answer {
        let controller = Arc::clone(&self.0);
        Box::pin(async move { controller.dispatch(call).await })
    }
}
