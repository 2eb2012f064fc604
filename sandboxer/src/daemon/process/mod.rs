//! Pods of ordinary containers, for the runtime `bulkhead-process`: no VM, the host's kernel.
//!
//! The agent that makes containers in guests makes them here, too: one process of it for each pod,
//! in namespaces of its own ([`agent`]). What this kind has to do besides is little: a cgroup
//! ([`cgroup`]), the container's spec ([`container_spec`]), and seeing to it that nothing outlives
//! the pod.

mod agent;
pub(super) mod cgroup;
mod container_spec;
mod home;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_protocol::sandbox::ConfigureSandboxRequest;

use super::agent::AgentSandbox;
use super::agent::link::{Clock, Link};
use super::agent::setup::{self, USUAL_SYSCTLS, failed};
use super::config::Config;
use super::pod::blocking;
use super::proto::{NODE, NamespaceOptions, PodSandboxConfig};
use super::sandbox::{Answer, Kind, Plan};
use super::state::State;
use crate::engine::microvm::files::find_agent;
use agent::{HostAgent, HostWay, Launch};
use cgroup::PodCgroup;
use home::HostHome;

/// Pods of one daemon; each is a process.
const MAX_PODS: usize = 4096;
/// Sysctls of an IPC namespace; others of the kernel's are the host's.
const IPC_SYSCTLS: [&str; 8] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

/// A pod of ordinary containers.
pub type ProcessSandbox = AgentSandbox<Arc<HostHome>>;

/// Pods of ordinary containers.
#[derive(Debug, Clone)]
pub struct Processes {
    config: Arc<Config>,
    /// The host's mount namespace, in which volumes are found; `None`: ours.
    mounts: Option<Arc<File>>,
}

impl Processes {
    /// As configured. `mounts`: the mount namespace of the host, if this process has left it.
    pub fn new(config: Arc<Config>, mounts: Option<File>) -> Self {
        Self {
            config,
            mounts: mounts.map(Arc::new),
        }
    }

    /// Starts the agent; what it has made by then is in `home`, also when it fails. Blocks.
    fn launch(&self, plan: &Plan, home: &HostHome) -> Answer<()> {
        let program = find_agent(self.config.process.agent.as_deref()).map_err(failed)?;
        let cgroup = PodCgroup::create(&parent(&plan.wish), &plan.id).map_err(failed)?;
        let path = cgroup.path().to_owned();
        home.keep_cgroup(cgroup);
        let options = namespace_options(&plan.wish);
        let agent = HostAgent::launch(&Launch {
            program,
            directory: &plan.dir,
            cgroup: &path,
            mounts: self.mounts.as_deref(),
            network: &plan.netns,
            host_network: options.network == NODE,
            host_ipc: options.ipc == NODE,
        })
        .map_err(failed)?;
        home.keep_agent(agent);
        Ok(())
    }

    async fn start_in(self, plan: &Plan, home: &Arc<HostHome>) -> Answer<()> {
        let (wish, kept) = (plan.clone(), Arc::clone(home));
        blocking(move || self.launch(&wish, &kept)).await??;
        let mut link = HostWay::new(&plan.dir).link().await.map_err(failed)?;
        link.configure(&plan.id, &set_up(plan), Clock::Host)
            .await
            .map_err(failed)?;
        let watch = tokio::spawn(setup::watch_events(
            link.sandbox(),
            plan.events.clone(),
            plan.namespace.clone(),
        ));
        home.keep_link(Arc::new(link), watch.abort_handle());
        Ok(())
    }
}

impl Kind for Processes {
    type Sandbox = ProcessSandbox;

    fn name(&self) -> &'static str {
        "bulkhead-process"
    }

    fn directory(&self) -> PathBuf {
        self.config.run_dir.join("host")
    }

    fn max_pods(&self) -> usize {
        MAX_PODS
    }

    fn check(&self, wish: &PodSandboxConfig) -> Result<(), String> {
        let options = namespace_options(wish);
        if options.pid == NODE {
            return Err(
                "hostPID cannot be given by bulkhead-process: use another runtime, such as runc, \
                 for this pod"
                    .into(),
            );
        }
        if options.userns.as_ref().is_some_and(|u| u.mode != NODE) {
            return Err(
                "user namespaces are not supported by bulkhead-process: leave hostUsers out".into(),
            );
        }
        check_sysctls(wish)
    }

    async fn start(&self, plan: Plan) -> Answer<ProcessSandbox> {
        let home = Arc::new(HostHome::default());
        match self.clone().start_in(&plan, &home).await {
            Ok(()) => Ok(AgentSandbox::new(home, plan.streams)),
            Err(error) => {
                blocking(move || home.take_down_now()).await?;
                Err(error)
            }
        }
    }

    fn clean(&self, state: &State) {
        // With it goes what an agent has left that has not noticed our end yet.
        PodCgroup::of(&cgroup::expand(&state.cgroup_parent), &state.id).remove();
    }
}

fn namespace_options(wish: &PodSandboxConfig) -> NamespaceOptions {
    let linux = wish.linux.as_ref();
    let security = linux.and_then(|l| l.security_context.as_ref());
    security
        .and_then(|s| s.namespace_options.clone())
        .unwrap_or_default()
}

/// Where the pod's cgroup is to be, by CRI.
fn parent(wish: &PodSandboxConfig) -> PathBuf {
    let parent = wish.linux.as_ref().map_or("", |l| l.cgroup_parent.as_str());
    cgroup::expand(parent)
}

/// Refuses sysctls of a pod that would change the host.
///
/// # Errors
/// The reason.
pub fn check_sysctls(wish: &PodSandboxConfig) -> Result<(), String> {
    let options = namespace_options(wish);
    let mut names = wish.linux.iter().flat_map(|l| l.sysctls.keys());
    names.try_for_each(|name| check_sysctl(name, &options))
}

/// Where a sysctl is below `/proc/sys`.
pub fn sysctl_path(name: &str) -> String {
    match name.contains('/') {
        true => name.to_owned(),
        false => name.replace('.', "/"),
    }
}

/// Refuses what would change the host.
fn check_sysctl(name: &str, options: &NamespaceOptions) -> Result<(), String> {
    let path = sysctl_path(name);
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    let ipc = IPC_SYSCTLS.contains(&path.as_str()) || path.starts_with("fs/mqueue/");
    let reason = if !path.split('/').all(plain) {
        Some("that is no name of one")
    } else if path.starts_with("net/") {
        (options.network == NODE).then_some("the pod has the host's network")
    } else if ipc {
        (options.ipc == NODE).then_some("the pod has the host's IPC")
    } else {
        Some("it belongs to the whole host")
    };
    match reason {
        None => Ok(()),
        Some(reason) => Err(format!(
            "sysctl {name:?} cannot be set for a pod: {reason}; leave it out, or set it on the node"
        )),
    }
}

/// What its agent is told.
fn set_up(plan: &Plan) -> ConfigureSandboxRequest {
    let host_network = namespace_options(&plan.wish).network == NODE;
    let mut request = setup::names(&plan.id, &plan.wish);
    let usual: &[_] = match host_network || plan.netns.is_empty() {
        true => &[],
        false => USUAL_SYSCTLS,
    };
    request.sysctls = setup::sysctls(usual, &plan.wish);
    if host_network {
        // The node's names are its own.
        if plan.wish.hostname.is_empty() {
            request.hostname = String::new();
        }
        request.hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    }
    request
}

impl HostWay {
    /// Connects to the agent's control socket.
    async fn link(self) -> Result<Link<Self>, crate::engine::EngineError> {
        use super::agent::link::Dial;
        let control = self.dial(bulkhead_protocol::CONTROL_PORT).await.map_err(
            crate::engine::EngineError::io("connecting to the pod's agent"),
        )?;
        Ok(Link::new(self, control))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_cannot_change_its_host() {
        let own = NamespaceOptions::default();
        let hosts = NamespaceOptions {
            network: NODE,
            ipc: NODE,
            ..NamespaceOptions::default()
        };
        for (name, pods_own) in [
            ("net.core.somaxconn", true),
            ("net/ipv4/conf/eth0.1/forwarding", true),
            ("kernel.shmmax", true),
            ("fs.mqueue.msg_max", true),
            ("kernel.panic", false),
            ("vm.swappiness", false),
            ("network", false),
            ("net/../kernel/panic", false),
            ("net//kernel", false),
        ] {
            assert_eq!(check_sysctl(name, &own).is_ok(), pods_own, "{name}");
            assert!(check_sysctl(name, &hosts).is_err(), "{name}");
        }
    }
}
