//! Kubernetes' container runtime interface, spoken by the tests, and a containerd of their own with
//! our daemon beside it.

pub mod containerd;
pub mod grpc;
pub mod proto;
pub mod registry;
mod testpod;
mod websocket;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use grpc::Client;
use proto::*;

pub use testpod::TestPod;
pub use websocket::WebSocket;

/// Longest time for one call.
const CALL: Duration = Duration::from_secs(300);

/// Longest time until containerd has noticed that the sandboxer is back.
const RECONNECT: Duration = Duration::from_secs(30);

/// Whether containerd says that it cannot connect to the sandboxer.
fn unreachable(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    text.contains("dial unix") && text.contains("/run/bulkhead/")
}

/// Calls of `runtime.v1.RuntimeService`.
#[derive(Debug)]
pub struct Cri {
    client: Client,
    /// Runtime of new pods.
    pub handler: String,
}

impl Cri {
    /// Connects to containerd.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connect(socket: &std::path::Path, handler: &str) -> Result<Self> {
        Ok(Self {
            client: Client::connect(socket)?,
            handler: handler.to_owned(),
        })
    }

    fn call<Q: prost::Message, A: prost::Message + Default>(
        &self,
        method: &str,
        request: &Q,
    ) -> Result<A> {
        let path = format!("/runtime.v1.RuntimeService/{method}");
        let begin = Instant::now();
        loop {
            let answer = self.client.call(&path, request, CALL);
            match answer {
                // containerd's connection to a sandboxer that has just been started again waits
                // some seconds before its next attempt; kubelet asks again as well.
                Err(error) if begin.elapsed() < RECONNECT && unreachable(&error) => {
                    std::thread::sleep(Duration::from_millis(200));
                }
                answer => return answer.with_context(|| method.to_owned()),
            }
        }
    }

    /// RunPodSandbox.
    ///
    /// # Errors
    /// What containerd says.
    pub fn run_pod(&self, config: &PodSandboxConfig) -> Result<String> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: self.handler.clone(),
        };
        let answer: PodId = self.call("RunPodSandbox", &request)?;
        Ok(answer.pod_sandbox_id)
    }

    /// StopPodSandbox.
    ///
    /// # Errors
    /// What containerd says.
    pub fn stop_pod(&self, id: &str) -> Result<()> {
        self.call::<_, Nothing>("StopPodSandbox", &PodId::of(id))
            .map(drop)
    }

    /// RemovePodSandbox.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove_pod(&self, id: &str) -> Result<()> {
        self.call::<_, Nothing>("RemovePodSandbox", &PodId::of(id))
            .map(drop)
    }

    /// PodSandboxStatus.
    ///
    /// # Errors
    /// What containerd says.
    pub fn pod_status(&self, id: &str) -> Result<PodSandboxStatus> {
        let answer: PodSandboxStatusResponse = self.call("PodSandboxStatus", &PodId::of(id))?;
        answer.status.context("PodSandboxStatus: no status")
    }

    /// ListPodSandbox.
    ///
    /// # Errors
    /// What containerd says.
    pub fn pods(&self) -> Result<Vec<PodSandbox>> {
        let answer: ListPodSandboxResponse = self.call("ListPodSandbox", &Nothing {})?;
        Ok(answer.items)
    }

    /// PullImage, of `runtime.v1.ImageService`.
    ///
    /// # Errors
    /// What containerd says.
    pub fn pull(&self, image: &str) -> Result<String> {
        let request = PullImageRequest {
            image: Some(ImageSpec {
                image: image.to_owned(),
            }),
        };
        let path = "/runtime.v1.ImageService/PullImage";
        let answer: PullImageResponse = self.client.call(path, &request, CALL)?;
        Ok(answer.image_ref)
    }

    /// CreateContainer.
    ///
    /// # Errors
    /// What containerd says.
    pub fn create(
        &self,
        pod: &str,
        sandbox: &PodSandboxConfig,
        config: &ContainerConfig,
    ) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(sandbox.clone()),
        };
        let answer: ContainerId = self.call("CreateContainer", &request)?;
        Ok(answer.container_id)
    }

    /// StartContainer.
    ///
    /// # Errors
    /// What containerd says.
    pub fn start(&self, id: &str) -> Result<()> {
        self.call::<_, Nothing>("StartContainer", &ContainerId::of(id))
            .map(drop)
    }

    /// StopContainer.
    ///
    /// # Errors
    /// What containerd says.
    pub fn stop(&self, id: &str, grace_seconds: i64) -> Result<()> {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout: grace_seconds,
        };
        self.call::<_, Nothing>("StopContainer", &request).map(drop)
    }

    /// RemoveContainer.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.call::<_, Nothing>("RemoveContainer", &ContainerId::of(id))
            .map(drop)
    }

    /// ContainerStatus.
    ///
    /// # Errors
    /// What containerd says.
    pub fn status(&self, id: &str) -> Result<ContainerStatus> {
        let answer: ContainerStatusResponse = self.call("ContainerStatus", &ContainerId::of(id))?;
        answer.status.context("ContainerStatus: no status")
    }

    /// Waits until a container has exited.
    ///
    /// # Errors
    /// It does not, in time.
    pub fn wait_exit(&self, id: &str, limit: Duration) -> Result<ContainerStatus> {
        let begin = Instant::now();
        loop {
            let status = self.status(id)?;
            if status.state == CONTAINER_EXITED {
                return Ok(status);
            }
            if begin.elapsed() > limit {
                bail!("container {id} has not exited within {limit:?}: {status:?}");
            }
            // CRI has no call that waits.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// ExecSync.
    ///
    /// # Errors
    /// What containerd says.
    pub fn exec(&self, id: &str, command: &[&str]) -> Result<ExecSyncResponse> {
        self.exec_for(id, command, 0)
    }

    /// ExecSync with a time-out in seconds.
    ///
    /// # Errors
    /// What containerd says.
    pub fn exec_for(&self, id: &str, command: &[&str], timeout: i64) -> Result<ExecSyncResponse> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|c| (*c).to_owned()).collect(),
            timeout,
        };
        self.call("ExecSync", &request)
    }

    /// ReopenContainerLog.
    ///
    /// # Errors
    /// What containerd says.
    pub fn reopen_log(&self, id: &str) -> Result<()> {
        self.call::<_, Nothing>("ReopenContainerLog", &ContainerId::of(id))
            .map(drop)
    }

    /// Exec: the URL at which the streams are.
    ///
    /// # Errors
    /// What containerd says.
    pub fn exec_url(&self, id: &str, command: &[&str], tty: bool, stdin: bool) -> Result<String> {
        let request = ExecRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|c| (*c).to_owned()).collect(),
            tty,
            stdin,
            stdout: true,
            stderr: !tty,
        };
        let answer: UrlResponse = self.call("Exec", &request)?;
        Ok(answer.url)
    }

    /// Attach: the URL at which the streams are.
    ///
    /// # Errors
    /// What containerd says.
    pub fn attach_url(&self, id: &str, tty: bool, stdin: bool) -> Result<String> {
        let request = AttachRequest {
            container_id: id.to_owned(),
            tty,
            stdin,
            stdout: true,
            stderr: !tty,
        };
        let answer: UrlResponse = self.call("Attach", &request)?;
        Ok(answer.url)
    }

    /// PortForward: the URL at which the streams are.
    ///
    /// # Errors
    /// What containerd says.
    pub fn port_forward_url(&self, pod: &str, port: i32) -> Result<String> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.to_owned(),
            port: vec![port],
        };
        let answer: UrlResponse = self.call("PortForward", &request)?;
        Ok(answer.url)
    }

    /// ContainerStats.
    ///
    /// # Errors
    /// What containerd says.
    pub fn stats(&self, id: &str) -> Result<ContainerStats> {
        let answer: ContainerStatsResponse = self.call("ContainerStats", &ContainerId::of(id))?;
        answer.stats.context("ContainerStats: no stats")
    }

    /// PodSandboxStats.
    ///
    /// # Errors
    /// What containerd says.
    pub fn pod_stats(&self, id: &str) -> Result<PodSandboxStats> {
        let answer: PodSandboxStatsResponse = self.call("PodSandboxStats", &PodId::of(id))?;
        answer.stats.context("PodSandboxStats: no stats")
    }

    /// UpdateContainerResources.
    ///
    /// # Errors
    /// What containerd says.
    pub fn update(&self, id: &str, resources: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
        };
        self.call::<_, Nothing>("UpdateContainerResources", &request)
            .map(drop)
    }

    /// Whether runtime and network are ready; else what containerd says about it.
    ///
    /// # Errors
    /// containerd does not answer, or is not ready.
    pub fn ready(&self) -> Result<()> {
        let answer: StatusResponse = self.call("Status", &Nothing {})?;
        let conditions = answer.status.unwrap_or_default().conditions;
        for wanted in ["RuntimeReady", "NetworkReady"] {
            match conditions.iter().find(|c| c.r#type == wanted) {
                Some(c) if c.status => {}
                other => bail!("{wanted}: {other:?}"),
            }
        }
        Ok(())
    }
}

/// A pod's configuration with the names filled in.
pub fn pod(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: format!("/run/cri-test/logs/{name}"),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: format!("/cri-test-{name}"),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// A container's configuration.
pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: format!("localhost/bulkhead/{image}:latest"),
        }),
        command: command.iter().map(|c| (*c).to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig::default()),
        ..ContainerConfig::default()
    }
}

/// What a container has written, by its log in CRI's format: standard output and error.
///
/// # Errors
/// The log is not there.
pub fn log(pod: &PodSandboxConfig, container: &ContainerConfig) -> Result<(String, String)> {
    let path = std::path::Path::new(&pod.log_directory).join(&container.log_path);
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let text = String::from_utf8_lossy(&text);
    let (mut out, mut err) = (String::new(), String::new());
    for line in text.lines() {
        // time stream tag text; tag P: the line goes on in the next.
        let mut parts = line.splitn(4, ' ');
        let (_, stream, tag, text) = (parts.next(), parts.next(), parts.next(), parts.next());
        let to = if stream == Some("stderr") {
            &mut err
        } else {
            &mut out
        };
        to.push_str(text.unwrap_or_default());
        if tag == Some("F") {
            to.push('\n');
        }
    }
    Ok((out, err))
}
