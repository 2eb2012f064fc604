//! A pod of ordinary containers as the home of an agent: its process, its cgroup, its end.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::task::CreateTaskRequest;
use serde_json::Value;
use tokio::io::Interest;
use tokio::task::AbortHandle;

use super::agent::{HostAgent, HostWay};
use super::cgroup::PodCgroup;
use super::container_spec;
use crate::daemon::agent::link::Link;
use crate::daemon::agent::{Home, Prepared};
use crate::daemon::pod::blocking;
use crate::daemon::sandbox::{Answer, Figure, OwnEnd};
use crate::daemon::task::read_spec;
use crate::engine::stdio::watch;
use crate::timeouts;

/// What a pod has on the host, in the order in which it is made.
#[derive(Debug, Default)]
struct Parts {
    cgroup: Option<PodCgroup>,
    agent: Option<Arc<HostAgent>>,
    link: Option<Arc<Link<HostWay>>>,
    /// Passes the agent's events on.
    watch: Option<AbortHandle>,
}

/// A running pod.
#[derive(Debug, Default)]
pub struct HostHome {
    parts: Mutex<Parts>,
    /// Why we have ended it ourselves, if we have.
    given_up: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn has_ended() -> Status {
    Status::new(Code::FailedPrecondition, "the sandbox has ended")
}

impl HostHome {
    /// Its cgroup is made.
    pub fn keep_cgroup(&self, cgroup: PodCgroup) {
        lock(&self.parts).cgroup = Some(cgroup);
    }

    /// Its agent runs.
    pub fn keep_agent(&self, agent: HostAgent) {
        lock(&self.parts).agent = Some(Arc::new(agent));
    }

    /// Its agent answers.
    pub fn keep_link(&self, link: Arc<Link<HostWay>>, watch: AbortHandle) {
        let mut parts = lock(&self.parts);
        parts.link = Some(link);
        parts.watch = Some(watch);
    }

    fn agent(&self) -> Answer<Arc<HostAgent>> {
        lock(&self.parts).agent.clone().ok_or_else(has_ended)
    }

    /// Ends it, and takes all of it away. Blocks until its processes have gone.
    pub fn take_down_now(&self) {
        let parts = std::mem::take(&mut *lock(&self.parts));
        if let Some(watch) = parts.watch {
            watch.abort();
        }
        drop(parts.link);
        if let Some(agent) = parts.agent {
            // Here, since who still waits for its end holds it, too.
            agent.end();
        }
        if let Some(cgroup) = parts.cgroup {
            cgroup.remove();
        }
    }

    /// Resolves once the agent has ended.
    async fn agent_ended(agent: &HostAgent) -> std::io::Result<()> {
        let process = agent.process().try_clone_to_owned()?;
        watch(process, Interest::READABLE)?
            .readable()
            .await
            .map(drop)
    }
}

impl Home for Arc<HostHome> {
    type Way = HostWay;

    fn link(&self) -> Answer<Arc<Link<HostWay>>> {
        lock(&self.parts).link.clone().ok_or_else(has_ended)
    }

    async fn ended(&self) -> OwnEnd {
        let Ok(agent) = self.agent() else {
            // Taken down: that is no end of its own.
            return std::future::pending().await;
        };
        let reason = match HostHome::agent_ended(&agent).await {
            Ok(()) => {
                let given_up = lock(&self.given_up).take();
                given_up.unwrap_or_else(|| agent.how_it_ended())
            }
            Err(error) => format!("its agent cannot be watched: {error}"),
        };
        OwnEnd {
            reason,
            details: String::new(),
        }
    }

    async fn shut_down(&self, grace: Duration) {
        let (Ok(link), Ok(agent)) = (self.link(), self.agent()) else {
            return;
        };
        let orderly = async {
            link.shut_down(grace).await;
            let _ = HostHome::agent_ended(&agent).await;
        };
        let _ = tokio::time::timeout(timeouts::shutdown() + grace, orderly).await;
    }

    fn take_down(&self) {
        self.take_down_now();
    }

    fn info(&self) -> Option<String> {
        let agent = self.agent().ok()?;
        Some(serde_json::json!({"agent": agent.pid()}).to_string())
    }

    fn figures(&self) -> Vec<Figure> {
        Vec::new()
    }

    async fn prepare(&self, request: &CreateTaskRequest) -> Answer<Prepared> {
        let (id, bundle) = (request.id.clone(), request.bundle.clone());
        let oci_spec = blocking(move || {
            let mut spec = read_spec(Path::new(&bundle))?;
            container_spec::rewrite(&mut spec)?;
            serde_json::to_vec(&spec)
                .map_err(|e| Status::new(Code::Internal, format!("container {id}: spec: {e}")))
        });
        Ok(Prepared {
            rootfs: request.rootfs.clone(),
            oci_spec: oci_spec.await??,
            disks: Vec::new(),
        })
    }

    fn made(&self, _: &str, _: &str) {}

    fn discard(&self, _: &str) {
        // Its mounts are the agent's, which has undone them.
    }

    fn strip_resources(&self, _: &mut serde_json::Map<String, Value>) {}

    async fn limits_change(&self, _: &str, _: &Value) -> Answer<()> {
        // Its CPUs are the host's.
        Ok(())
    }

    async fn give_up(&self, reason: String) -> Answer<()> {
        let agent = self.agent()?;
        *lock(&self.given_up) = Some(reason);
        agent.kill();
        Ok(())
    }
}
