//! `containerd.services.sandbox.v1.Controller`: the life of pods.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::metrics::{CPUStat, METRICS_TYPE_URL, MemoryStat, Metrics, PidsStat};
use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::task::StatsRequest;
use bulkhead_protocol::types::Any;
use prost::Message;

use super::config::Config;
use super::events::{Events, now};
use super::grpc::{Answer, Call, Service};
use super::pod::{Pod, blocking};
use super::proto::*;
use super::task::{Slot, check_id};
use crate::engine::Sandbox;

/// Version of the Task service at a pod's address; containerd takes no other.
pub(super) const TASK_VERSION: u32 = 3;
/// Pods of one daemon.
const MAX_PODS: usize = 4096;

/// The pods of this daemon.
#[derive(Debug)]
pub struct Controller {
    config: Arc<Config>,
    events: Events,
    pods: Mutex<HashMap<String, Arc<Pod>>>,
}

impl Controller {
    /// Without pods.
    pub fn new(config: Arc<Config>, events: Events) -> Arc<Self> {
        Arc::new(Self {
            config,
            events,
            pods: Mutex::default(),
        })
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All pods.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.pods().values().cloned().collect()
    }

    /// Adds a pod of an earlier process.
    pub fn add(&self, pod: Arc<Pod>) {
        self.pods().insert(pod.id.clone(), pod);
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
        check_wish(&id, &wish)?;
        {
            let pods = self.pods();
            if pods.contains_key(&id) {
                // Asked for again after a lost answer.
                return Ok(CreateResponse { sandbox_id: id });
            }
            if pods.len() >= MAX_PODS {
                return Err(Status::new(
                    Code::ResourceExhausted,
                    format!("{MAX_PODS} sandboxes exist; remove some"),
                ));
            }
        }
        let (config, events) = (Arc::clone(&self.config), self.events.clone());
        let (pod_id, netns) = (id.clone(), request.netns_path);
        let pod =
            blocking(move || Pod::create(config, events, namespace, pod_id, netns, wish)).await??;
        self.pods().entry(id.clone()).or_insert(pod);
        Ok(CreateResponse { sandbox_id: id })
    }

    async fn start(&self, request: IdRequest) -> Result<StartResponse, Status> {
        let pod = self.find(&request.sandbox_id)?;
        let starting = Arc::clone(&pod);
        // To its end even if the caller goes away.
        let started = tokio::spawn(async move { starting.start().await }).await;
        let started = started
            .unwrap_or_else(|e| Err(Status::new(Code::Internal, format!("start panicked: {e}"))));
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
        tokio::spawn(async move { pod.stop(grace).await })
            .await
            .unwrap_or_else(|e| Err(Status::new(Code::Internal, format!("stop panicked: {e}"))))?;
        Ok(Nothing {})
    }

    async fn remove(&self, pod: &Arc<Pod>) -> Result<(), Status> {
        let removing = Arc::clone(pod);
        tokio::spawn(async move { removing.remove().await })
            .await
            .unwrap_or_else(|e| {
                Err(Status::new(
                    Code::Internal,
                    format!("removal panicked: {e}"),
                ))
            })?;
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
        let pod = self.find(&request.sandbox_id)?;
        let end = pod.wait().await;
        Ok(WaitResponse {
            exit_status: end.status,
            exited_at: Some(end.at),
        })
    }

    fn status(&self, request: &StatusRequest) -> Result<StatusResponse, Status> {
        let pod = self.find(&request.sandbox_id)?;
        let (started, end) = (pod.started(), pod.ended());
        let ready = started.is_some() && end.is_none();
        let mut info = BTreeMap::new();
        if request.verbose {
            info.insert("runtime".into(), "bulkhead-microvm".into());
            if let Some(end) = &end {
                info.insert("reason".into(), end.reason.clone());
            }
            if let Ok(guest) = pod.guest()
                && let Ok(vm) = guest.vm().inspect()
            {
                info.insert("vm".into(), vm.to_string());
            }
        }
        Ok(StatusResponse {
            sandbox_id: request.sandbox_id.clone(),
            pid: std::process::id(),
            state: if ready {
                "SANDBOX_READY"
            } else {
                "SANDBOX_NOTREADY"
            }
            .into(),
            info,
            created_at: started,
            exited_at: end.map(|e| e.at),
            address: pod.address(),
            version: TASK_VERSION,
        })
    }

    /// The sum over the pod's containers, as the guest counts.
    async fn metrics(&self, request: IdRequest) -> Result<MetricsResponse, Status> {
        let pod = self.find(&request.sandbox_id)?;
        let guest = pod.guest()?;
        let ids: Vec<String> = pod
            .slots()
            .iter()
            .filter(|(_, slot)| matches!(slot, Slot::Container(_)))
            .map(|(id, _)| id.clone())
            .collect();
        let (mut cpu, mut memory, mut pids) = (
            CPUStat::default(),
            MemoryStat::default(),
            PidsStat::default(),
        );
        for id in ids {
            // One that has just ended has none.
            let Ok(answer) = guest.tasks().stats(&StatsRequest { id }).await else {
                continue;
            };
            let Some(one) = answer
                .stats
                .and_then(|any| Metrics::decode(any.value.as_slice()).ok())
            else {
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

    fn update(&self, request: &UpdateRequest) -> Result<Nothing, Status> {
        // What containerd stores about a sandbox (labels, extensions) does not concern its VM.
        self.find(&request.sandbox_id).map(|_| Nothing {})
    }

    async fn dispatch(&self, call: Call) -> Result<Vec<u8>, Status> {
        let Some(method) = call
            .path
            .strip_prefix(CONTROLLER)
            .and_then(|rest| rest.strip_prefix('/'))
        else {
            let shown: String = call.path.chars().take(100).collect();
            return Err(Status::new(
                Code::Unimplemented,
                format!("no service at {shown:?}"),
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
                let shown: String = other.chars().take(100).collect();
                return Err(Status::new(
                    Code::Unimplemented,
                    format!("{CONTROLLER} has no method {shown:?}"),
                ));
            }
        })
    }
}

pub(super) fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, Status> {
    M::decode(payload).map_err(|e| {
        Status::new(
            Code::InvalidArgument,
            format!("request cannot be decoded: {e}"),
        )
    })
}

/// What no VM can give.
fn check_wish(id: &str, wish: &PodSandboxConfig) -> Result<(), Status> {
    let refuse = |what: &str| {
        Err(Status::new(
            Code::InvalidArgument,
            format!("sandbox {id}: {what}"),
        ))
    };
    let Some(options) = wish
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.as_ref())
    else {
        return Ok(());
    };
    if options.network == NODE {
        return refuse(
            "hostNetwork cannot be given to a VM: use a runtime without VMs for this pod",
        );
    }
    if options.userns.as_ref().is_some_and(|u| u.mode != NODE) {
        return refuse("user namespaces of the host mean nothing in a VM: leave hostUsers out");
    }
    Ok(())
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
