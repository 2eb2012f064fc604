//! Pods in VMs of their own: how a VM is sized, built, booted, and joined to the host.
//!
//! What happens in the guest is its agent's part; [`sandbox`] passes calls about containers on.
//! Which guests there are, and how they differ, is said in [`guests`] alone.

pub(super) mod container_spec;
mod debug_socket;
mod disks;
mod guest;
pub(super) mod guests;
mod machine;
mod netlink;
mod network;
mod portforward;
mod resize;
mod sandbox;
mod template;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{AddEntropyRequest, ConfigureSandboxRequest, Share};
use bulkhead_vmm::{NetConfig, Template, VmConfig};

use super::agent::setup::{self, failed};
use super::cgroup::{CpuShare, Threads, clean_threads};
use super::config::{Config, Isolation};
use super::pod::blocking;
use super::process::cgroup::{self, PodCgroup};
use super::proto::{LinuxResources, NODE, PodSandboxConfig};
use super::sandbox::{Answer, Kind, Plan};
use super::state::State;
use super::storage::Storage;
use super::worker::{Launch, Worker};
use crate::engine::EngineError;
use crate::engine::console::ConsoleHub;
use crate::engine::microvm::MicroVm;
use debug_socket::{About, DebugSocket};
use disks::Disks;
use guest::Guest;
pub use guests::Guests;
use guests::Sizes;
use machine::Machine;
use network::PodNetwork;
use portforward::PortForward;
use resize::{Cpus, Memory};
pub use sandbox::VmSandbox;
use sandbox::{Parts, VmHome};
use template::{Shape, Templates};

/// Pods of one daemon.
const MAX_PODS: usize = 4096;

/// Pods in VMs with one kind of guests.
#[derive(Debug)]
pub struct Vms {
    config: Arc<Config>,
    guests: Guests,
    templates: Arc<Templates>,
}

impl Vms {
    /// As configured.
    pub fn new(config: Arc<Config>, guests: Guests) -> Self {
        let templates = Templates::new(guests.templates(&config), &config.run_dir);
        Self {
            config,
            guests,
            templates,
        }
    }
}

impl Kind for Vms {
    type Sandbox = VmSandbox;

    fn name(&self) -> &'static str {
        self.guests.runtime()
    }

    fn directory(&self) -> PathBuf {
        self.config.run_dir.join(self.guests.directory())
    }

    fn max_pods(&self) -> usize {
        MAX_PODS
    }

    fn check(&self, wish: &PodSandboxConfig) -> Result<(), String> {
        self.guests.check(wish)?;
        let Some(options) = wish
            .linux
            .as_ref()
            .and_then(|l| l.security_context.as_ref())
            .and_then(|s| s.namespace_options.as_ref())
        else {
            return Ok(());
        };
        if options.network == NODE {
            return Err(
                "hostNetwork cannot be given to a VM: use a runtime without VMs for this pod"
                    .into(),
            );
        }
        if options.userns.as_ref().is_some_and(|u| u.mode != NODE) {
            return Err(
                "user namespaces of the host mean nothing in a VM: leave hostUsers out".into(),
            );
        }
        Ok(())
    }

    async fn start(&self, plan: Plan) -> Answer<VmSandbox> {
        let mut parts = Parts::default();
        match self.boot(&plan, &mut parts).await {
            Ok(guest) => {
                let sizes = self.guests.sizes(&self.config);
                let (boot, memory_mib) = size(&plan.wish, &sizes);
                let share = CpuShare::of(&resources(&plan.wish));
                let home = VmHome::new(
                    guest,
                    parts,
                    Disks::new(sizes.disk_slots),
                    Cpus::new(boot, most_cpus(boot, &sizes), share),
                    Memory::new(room_mib(memory_mib, &sizes) << 20),
                );
                Ok(VmSandbox::new(home, plan.streams))
            }
            Err(error) => {
                blocking(move || parts.take_down(None)).await?;
                Err(error)
            }
        }
    }

    fn clean(&self, state: &State) {
        if !state.netns.is_empty() {
            network::clean(Path::new(&state.netns));
        }
        clean_threads(&state.id);
        // A worker ends with its daemon; this is for one that does not.
        PodCgroup::of(&cgroup::expand(&state.cgroup_parent), &state.id).remove();
    }
}

impl Vms {
    /// Boots the VM; what it has made by then is in `parts`, also when it fails.
    async fn boot(&self, plan: &Plan, parts: &mut Parts) -> Answer<Arc<Guest>> {
        let (config, guests, wish) = (Arc::clone(&self.config), self.guests, plan.clone());
        let mut making = std::mem::take(parts);
        let templates = Arc::clone(&self.templates);
        let (made, built) = blocking(move || {
            let built = build(&config, guests, &wish, &mut making, &templates);
            (making, built)
        })
        .await?;
        *parts = made;
        let Built {
            vm,
            request,
            shape,
            entropy,
        } = built?;
        if let Machine::Worker(worker) = &vm {
            worker
                .watch(plan.stop.clone())
                .map_err(EngineError::io("watching the VM's process"))
                .map_err(failed)?;
        }
        let reached = Guest::reach(vm.clone(), &request, entropy.as_ref()).await;
        match (&reached, shape) {
            (Ok(_), Some(shape)) if entropy.is_none() => self.templates.make(shape),
            (Err(_), Some(shape)) if entropy.is_some() => self.templates.forget(&shape),
            _ => {}
        }
        let guest = Arc::new(reached.map_err(failed)?);
        // From here on the limit holds; the boot is not the pod's doing.
        let share = CpuShare::of(&resources(&plan.wish));
        let threads = parts.threads.as_ref().map(|threads| threads.limit(share));
        let process = parts.cgroup.as_ref().map(|of| share.set(of.path()));
        if let Some(Err(error)) = threads.or(process) {
            tracing::warn!(sandbox = plan.id, %error, "the pod's CPU share cannot be set");
        }
        parts.forward = forward_ports(plan, parts, &guest).await;
        parts.debug = self.show(plan, &vm);
        let watch = tokio::spawn(setup::watch_events(
            guest.link().sandbox(),
            plan.events.clone(),
            plan.namespace.clone(),
        ));
        parts.tasks.push(watch.abort_handle());
        vm.mark("sandbox ready");
        Ok(guest)
    }

    /// Makes its VM known to `vmmctl`. A pod is of use without.
    fn show(&self, plan: &Plan, vm: &Machine) -> Option<DebugSocket> {
        let (cpus, memory_mib) = size(&plan.wish, &self.guests.sizes(&self.config));
        let names = plan.wish.metadata.as_ref();
        let about = About {
            id: plan.id.clone(),
            kind: self.guests.shown(),
            pod: names.map_or(String::new(), |m| format!("{}/{}", m.namespace, m.name)),
            cpus,
            memory_mib,
        };
        match DebugSocket::start(&self.config.run_dir, about, plan.stop.clone(), vm) {
            Ok(debug) => Some(debug),
            Err(error) => {
                tracing::warn!(sandbox = plan.id, %error, "vmmctl will not see it");
                None
            }
        }
    }
}

/// Lets the host reach the guest's loopback. A pod is of use without.
async fn forward_ports(plan: &Plan, parts: &Parts, guest: &Arc<Guest>) -> Option<PortForward> {
    let netns = parts.network.as_ref()?.netns()?.try_clone().ok()?;
    let started = match blocking(move || portforward::prepare(&netns)).await {
        Ok(Ok(prepared)) => PortForward::start(prepared, guest),
        Ok(Err(error)) => Err(error),
        Err(_) => return None,
    };
    match started {
        Ok(forward) => Some(forward),
        Err(error) => {
            tracing::warn!(sandbox = plan.id, %error, "port-forwarding will not work");
            None
        }
    }
}

/// A VM that has been started.
struct Built {
    vm: Machine,
    /// What its agent is to be told.
    request: ConfigureSandboxRequest,
    /// If there can be templates of it.
    shape: Option<Shape>,
    /// It is a copy, which needs this.
    entropy: Option<AddEntropyRequest>,
}

/// Share, network, VM. Blocks.
fn build(
    config: &Config,
    guests: Guests,
    plan: &Plan,
    parts: &mut Parts,
    templates: &Templates,
) -> Answer<Built> {
    let boot = guests.boot(config).map_err(failed)?;
    let storage =
        Storage::create(&plan.dir).map_err(|e| Status::new(Code::Internal, e.to_string()))?;
    let mut network = match plan.netns.as_str() {
        "" => PodNetwork::default(),
        path => PodNetwork::join(Path::new(path)).map_err(failed)?,
    };
    let mut request = guest_setup(guests, plan, &storage, &network);
    let sizes = guests.sizes(config);
    let (vcpus, memory_mib) = size(&plan.wish, &sizes);
    let vm = VmConfig {
        id: plan.id.clone(),
        vcpus,
        max_vcpus: most_cpus(vcpus, &sizes),
        memory_mib,
        room_mib: room_mib(memory_mib, &sizes),
        hugepages: sizes.hugepages,
        kernel: boot.kernel,
        cmdline: boot.cmdline,
        disks: boot.disks,
        spare_disk_slots: sizes.disk_slots,
        shares: storage.devices(),
        nets: std::mem::take(&mut network.devices)
            .into_iter()
            .map(|net| NetConfig {
                vhost: sizes.vhost_net,
                plain: !sizes.net_offload,
                ..net
            })
            .collect(),
        vsock_cid: Some(3),
        rng: true,
        allow_emulated_kvm: guests.allow_emulated_kvm(config),
        ..VmConfig::default()
    };
    // Kept before anything can fail: they are taken away from there.
    parts.storage = Some(Arc::new(Mutex::new(storage)));
    parts.network = Some(network);
    let shape = match templates.wanted() {
        true => Shape::of(&vm),
        false => None,
    };
    let template = shape.as_ref().and_then(|shape| templates.find(shape));
    let mut entropy = None;
    if template.is_some() {
        template::adapt(&mut request);
        let random = template::entropy().map_err(EngineError::io("random numbers"));
        entropy = Some(random.map_err(failed)?);
    }
    let made = match guests.isolation(config) {
        Isolation::Thread => on_threads(plan, vm, parts, template.as_deref()),
        Isolation::Process => in_a_process(config, plan, vm, parts),
    };
    if let (Err(_), Some(_), Some(shape)) = (&made, &template, &shape) {
        templates.forget(shape);
    }
    Ok(Built {
        vm: made.map_err(failed)?,
        request,
        shape,
        entropy,
    })
}

/// Starts the VM on threads of this process.
fn on_threads(
    plan: &Plan,
    config: VmConfig,
    parts: &mut Parts,
    template: Option<&Template>,
) -> Result<Machine, EngineError> {
    parts.threads = Threads::create(&plan.id);
    let entrance = parts.threads.as_ref().map(Threads::entrance);
    let (vm, started) = in_cgroup(entrance, || {
        let console = ConsoleHub::new(None);
        let vm = Arc::new(match template {
            Some(template) => MicroVm::copy(config, console, template)?,
            None => MicroVm::create(config, console)?,
        });
        let started = vm.vm().start();
        Ok((vm, started))
    })?;
    let machine = Machine::Thread(vm);
    parts.vm = Some(machine.clone());
    started?;
    Ok(machine)
}

/// Starts the VM in a jailed process, which is in a cgroup below the pod's.
fn in_a_process(
    config: &Config,
    plan: &Plan,
    vm: VmConfig,
    parts: &mut Parts,
) -> Result<Machine, EngineError> {
    let parent = plan.wish.linux.as_ref();
    let parent = cgroup::expand(parent.map_or("", |l| l.cgroup_parent.as_str()));
    let cgroup = parts.cgroup.insert(PodCgroup::create(&parent, &plan.id)?);
    let netns = parts.network.as_ref().and_then(PodNetwork::netns);
    let worker = Worker::launch(Launch {
        dir: &plan.dir,
        cgroup: cgroup.path(),
        netns: netns.map(AsFd::as_fd),
        log: &config.log.level,
        vm,
    })?;
    let machine = Machine::Worker(worker);
    parts.vm = Some(machine.clone());
    Ok(machine)
}

/// Makes a VM on a thread whose children all are in the pod's cgroup.
fn in_cgroup<T: Send>(
    entrance: Option<impl Fn() -> std::io::Result<()> + Send>,
    make: impl FnOnce() -> Result<T, EngineError> + Send,
) -> Result<T, EngineError> {
    let failed = || EngineError::io("the thread that makes a VM");
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("vm-maker".into())
            .spawn_scoped(scope, || {
                if let Some(enter) = entrance {
                    enter().map_err(EngineError::io("the pod's cgroup"))?;
                }
                make()
            })
            .map_err(failed())?
            .join()
            .unwrap_or_else(|_| Err(failed()(std::io::Error::other("it panicked"))))
    })
}

fn guest_setup(
    guests: Guests,
    plan: &Plan,
    storage: &Storage,
    network: &PodNetwork,
) -> ConfigureSandboxRequest {
    let wish = &plan.wish;
    ConfigureSandboxRequest {
        sysctls: setup::sysctls(guests.usual_sysctls(), wish),
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
        ..setup::names(&plan.id, wish)
    }
}

/// What CRI says about the pod's containers together, and about its overhead.
pub(super) fn resources(wish: &PodSandboxConfig) -> [LinuxResources; 2] {
    let linux = wish.linux.as_ref();
    [
        linux.and_then(|l| l.resources).unwrap_or_default(),
        linux.and_then(|l| l.overhead).unwrap_or_default(),
    ]
}

/// vCPUs that a VM can have while it runs.
fn most_cpus(boot: u8, sizes: &Sizes) -> u8 {
    boot.saturating_add(sizes.grow_cpus)
        .min(sizes.max_cpus)
        .max(boot)
}

/// Memory in MiB that a VM can be given while it runs, in pieces that Linux can add.
fn room_mib(boot_mib: u64, sizes: &Sizes) -> u64 {
    let most = sizes.max_memory_mib.saturating_sub(boot_mib);
    sizes.grow_memory_mib.min(most) & !127
}

/// vCPUs and MiB of memory, from what Kubernetes says about the pod.
fn size(wish: &PodSandboxConfig, config: &Sizes) -> (u8, u64) {
    let mut cpus = 0.0f64;
    let mut bytes = 0u64;
    for part in resources(wish) {
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
    let limited = resources(wish)[0].memory_limit_in_bytes > 0;
    let memory_mib = match limited {
        true => (bytes.div_ceil(1 << 20))
            .saturating_add(config.overhead_mib)
            .min(config.max_memory_mib),
        false => config.default_memory_mib,
    };
    (vcpus, memory_mib)
}

#[cfg(test)]
mod tests {
    use super::super::proto::LinuxPodSandboxConfig;
    use super::*;

    fn wish(resources: Option<LinuxResources>) -> PodSandboxConfig {
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                resources,
                overhead: Some(LinuxResources {
                    cpu_period: 100_000,
                    cpu_quota: 25_000,
                    memory_limit_in_bytes: 32 << 20,
                    ..LinuxResources::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    #[test]
    fn a_vm_is_as_large_as_its_pod() {
        let config = Guests::Linux.sizes(&Config::default());
        assert_eq!(size(&PodSandboxConfig::default(), &config), (1, 256));
        let limited = LinuxResources {
            cpu_period: 100_000,
            cpu_quota: 190_000,
            memory_limit_in_bytes: 512 << 20,
            ..LinuxResources::default()
        };
        assert_eq!(size(&wish(Some(limited)), &config), (3, 512 + 32 + 64));
        let huge = LinuxResources {
            cpu_period: 1,
            cpu_quota: i64::MAX,
            memory_limit_in_bytes: i64::MAX,
            ..LinuxResources::default()
        };
        assert_eq!(
            size(&wish(Some(huge)), &config),
            (32, config.max_memory_mib)
        );
        let none = LinuxResources {
            cpu_period: 0,
            cpu_quota: -1,
            memory_limit_in_bytes: 0,
            ..LinuxResources::default()
        };
        assert_eq!(size(&wish(Some(none)), &config), (1, 256));
        // The app kernel has one CPU, whatever the pod's share of it.
        let config = Guests::App.sizes(&Config::default());
        assert_eq!(size(&PodSandboxConfig::default(), &config), (1, 128));
        assert_eq!(size(&wish(Some(limited)), &config), (1, 512 + 32 + 16));
    }

    #[test]
    fn what_the_app_kernel_lacks_is_refused() {
        let mut wish = wish(None);
        for guests in [Guests::Linux, Guests::App] {
            assert_eq!(guests.check(&wish), Ok(()));
        }
        if let Some(linux) = &mut wish.linux {
            linux
                .sysctls
                .insert("net.core.somaxconn".into(), "9".into());
        }
        assert_eq!(Guests::Linux.check(&wish), Ok(()));
        let reason = Guests::App.check(&wish).expect_err("refused");
        assert!(
            reason.contains("somaxconn") && reason.contains("bulkhead-microvm"),
            "{reason}"
        );
        assert!(Guests::App.usual_sysctls().is_empty());
    }
}
