//! A running VM as the home of an agent: its parts on the host, its end, its containers' files.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::rpc::{Code, Status};
use bulkhead_protocol::sandbox::{Disk, LAYERS_MOUNT, OnlineResourcesRequest};
use bulkhead_protocol::task::CreateTaskRequest;
use bulkhead_protocol::types::Mount;
use bulkhead_vmm::{DiskConfig, DiskSource, joined_layout};
use serde_json::Value;
use tokio::task::AbortHandle;

use super::container_spec::{self, HostDevice};
use super::debug_socket::DebugSocket;
use super::disks::{self, Disks, Key};
use super::guest::{Guest, VmWay};
use super::in_cgroup;
use super::machine::Machine;
use super::network::PodNetwork;
use super::portforward::PortForward;
use super::resize::{Change, Cpus, Memory};
use crate::daemon::agent::link::{Link, refused};
use crate::daemon::agent::{AgentSandbox, Home, Prepared};
use crate::daemon::cgroup::Threads;
use crate::daemon::pod::blocking;
use crate::daemon::process::cgroup::PodCgroup;
use crate::daemon::sandbox::{Answer, Figure, OwnEnd};
use crate::daemon::storage::{Layers, Storage, StorageError};
use crate::daemon::task::read_spec;
use crate::daemon::worker::Worker;
use crate::timeouts;

/// How often one looks how far a guest is with new memory.
const MEMORY_LOOK: Duration = Duration::from_millis(5);

/// What a VM has on the host, in the order in which it is made.
#[derive(Debug, Default)]
pub struct Parts {
    /// Its files.
    pub storage: Option<Arc<Mutex<Storage>>>,
    /// Its network.
    pub network: Option<PodNetwork>,
    /// The VM.
    pub vm: Option<Machine>,
    /// What serves its loopback.
    pub forward: Option<PortForward>,
    /// What serves `vmmctl`.
    pub debug: Option<DebugSocket>,
    /// What else runs for it.
    pub tasks: Vec<AbortHandle>,
    /// Where its threads are counted.
    pub threads: Option<Threads>,
    /// Where its process is, if it has one.
    pub cgroup: Option<PodCgroup>,
}

impl Parts {
    /// Takes all of it away. Blocks: the VM's threads are waited for.
    pub fn take_down(self, guest: Option<Arc<Guest>>) {
        drop((self.forward, self.debug));
        for task in self.tasks {
            task.abort();
        }
        // It uses the rest.
        if let Some(vm) = &self.vm {
            vm.take_down();
        }
        drop((guest, self.vm));
        // They are empty by now.
        drop(self.threads);
        if let Some(cgroup) = self.cgroup {
            cgroup.remove();
        }
        drop(self.storage);
        if let Some(network) = self.network {
            network.leave();
        }
    }
}

/// A pod in a VM.
pub type VmSandbox = AgentSandbox<VmHome>;

/// A running VM.
#[derive(Debug)]
pub struct VmHome {
    /// Until it is taken down: it holds the VM's devices.
    guest: Mutex<Option<Arc<Guest>>>,
    parts: Mutex<Parts>,
    /// What is in its disk slots.
    disks: Arc<Mutex<Disks>>,
    /// Its CPUs.
    cpus: Mutex<Cpus>,
    /// Its memory.
    memory: Mutex<Memory>,
    /// Held while these are changed.
    resizing: tokio::sync::Mutex<()>,
    /// Why we have ended it ourselves, if we have.
    given_up: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn storage_failed(error: StorageError) -> Status {
    let code = match error {
        StorageError::Io { .. } => Code::Internal,
        StorageError::Unsupported(_) => Code::InvalidArgument,
        StorageError::Missing(_) => Code::NotFound,
    };
    Status::new(code, error.to_string())
}

#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus knows no other numbers"
)]
fn number(value: u64) -> f64 {
    value as f64
}

/// What the host says of a VM's process: nothing of it depends on the worker's word.
fn worker_figures(worker: &Worker) -> Vec<Figure> {
    let mut figures = Vec::new();
    if let Some(resident) = worker.jailed().resident() {
        let help = "Memory of a VM's process, with what it has touched of its guest's.";
        figures.push(Figure::gauge(
            "bulkhead_worker_resident_bytes",
            help,
            number(resident),
        ));
    }
    if let Some((user, system)) = worker.jailed().cpu() {
        figures.extend(cpu_figures(user, system));
    }
    figures
}

fn cpu_figures(user: Duration, system: Duration) -> impl Iterator<Item = Figure> {
    let help = "CPU time of a VM's threads on the host; user includes the guest.";
    [("user", user), ("system", system)]
        .into_iter()
        .map(move |(mode, value)| Figure {
            label: Some(("mode", mode)),
            ..Figure::counter("bulkhead_vm_cpu_seconds_total", help, value.as_secs_f64())
        })
}

impl VmHome {
    /// A VM whose agent answers.
    pub(super) fn new(
        guest: Arc<Guest>,
        parts: Parts,
        disks: Disks,
        cpus: Cpus,
        memory: Memory,
    ) -> Self {
        Self {
            guest: Mutex::new(Some(guest)),
            parts: Mutex::new(parts),
            disks: Arc::new(Mutex::new(disks)),
            cpus: Mutex::new(cpus),
            memory: Mutex::new(memory),
            resizing: tokio::sync::Mutex::default(),
            given_up: Mutex::default(),
        }
    }

    fn guest(&self) -> Answer<Arc<Guest>> {
        let guest = lock(&self.guest).clone();
        guest.ok_or_else(|| Status::new(Code::FailedPrecondition, "the sandbox has ended"))
    }

    /// Tells those who look from outside. Blocks.
    fn show_container(&self, id: &str, bundle: Option<&str>) {
        if let Some(debug) = &mut lock(&self.parts).debug {
            debug.set_container(id, bundle.map(Into::into));
        }
    }

    /// Gives the VM more CPUs, or takes some away.
    async fn resize(&self, change: Change) -> Answer<()> {
        let guest = self.guest()?;
        let before = lock(&self.cpus).online;
        if change.wanted > u64::from(change.online) {
            tracing::warn!(
                sandbox = guest.vm().id(),
                "its limits ask for {} CPUs, it can have {}: see microvm.grow_cpus",
                change.wanted,
                change.online
            );
        }
        if change.online > before {
            let vm = guest.vm().clone();
            let entrance = lock(&self.parts).threads.as_ref().map(Threads::entrance);
            let made = blocking(move || in_cgroup(entrance, || vm.grow_vcpus(change.online)));
            made.await?
                .map_err(|e| Status::new(Code::Internal, format!("more CPUs: {e}")))?;
        }
        if change.online != before {
            let request = OnlineResourcesRequest {
                cpus: change.online.into(),
                memory: false,
            };
            let answer = guest.link().sandbox().online_resources(&request).await;
            let online = answer.map_err(refused)?.cpus_online;
            if online < change.online.into() {
                let text = format!("the guest has {online} CPUs, not {}", change.online);
                return Err(Status::new(Code::Internal, text));
            }
            lock(&self.cpus).online = change.online;
        }
        let parts = lock(&self.parts);
        let limited = parts.threads.as_ref().map(|t| t.limit(change.share));
        limited.unwrap_or(Ok(())).map_err(|e| {
            Status::new(
                Code::Internal,
                format!("the pod's CPU share on the host: {e}"),
            )
        })
    }

    /// Gives the VM more memory before a container may use it, or takes some away.
    async fn memory_changes(&self, container: &str, resources: &Value) -> Answer<()> {
        let guest = self.guest()?;
        let before = lock(&self.memory).now(container);
        let wanted = lock(&self.memory).update(container, resources);
        let wanted = wanted.map_err(|e| {
            let text = format!("container {container}: {e}");
            Status::new(Code::FailedPrecondition, text)
        })?;
        let Some(wanted) = wanted else {
            return Ok(());
        };
        let had = lock(&self.memory).requested;
        let changed = self.change_memory(&guest, had, wanted).await;
        match &changed {
            Ok(()) => lock(&self.memory).requested = wanted,
            Err(_) => {
                lock(&self.memory).set_back(container, before);
                let _ = guest.vm().request_memory(had);
            }
        }
        changed
    }

    async fn change_memory(&self, guest: &Guest, had: u64, wanted: u64) -> Answer<()> {
        let failed = |text: String| Status::new(Code::Internal, text);
        let vm = guest.vm();
        vm.request_memory(wanted)
            .map_err(|e| failed(format!("more memory: {e}")))?;
        // What is to be given back comes back when the guest can spare it.
        if wanted < had {
            return Ok(());
        }
        let begin = std::time::Instant::now();
        loop {
            let has = vm.added_memory();
            if has >= wanted {
                return Ok(());
            }
            if begin.elapsed() > timeouts::call() {
                return Err(failed(format!(
                    "the guest has taken {} of {} MiB of memory",
                    has >> 20,
                    wanted >> 20
                )));
            }
            tokio::time::sleep(MEMORY_LOOK).await;
        }
    }

    fn storage(&self) -> Answer<Arc<Mutex<Storage>>> {
        lock(&self.parts)
            .storage
            .clone()
            .ok_or_else(|| Status::new(Code::FailedPrecondition, "the sandbox has ended"))
    }
}

impl Home for VmHome {
    type Way = VmWay;

    fn link(&self) -> Answer<Arc<Link<VmWay>>> {
        Ok(Arc::clone(self.guest()?.link()))
    }

    async fn ended(&self) -> OwnEnd {
        let reason = |reason: String| OwnEnd {
            reason,
            ..OwnEnd::default()
        };
        let Ok(guest) = self.guest() else {
            // Taken down: that is no end of its own.
            return std::future::pending().await;
        };
        let end = guest.vm().ended();
        drop(guest);
        match end {
            Ok(end) => end.await,
            Err(error) => return reason(error.to_string()),
        }
        if let Some(given_up) = lock(&self.given_up).take() {
            return reason(given_up);
        }
        let Ok(guest) = self.guest() else {
            return std::future::pending().await;
        };
        guest.vm().own_end()
    }

    async fn shut_down(&self, grace: Duration) {
        if let Ok(guest) = self.guest() {
            guest.shut_down(grace).await;
        }
    }

    fn take_down(&self) {
        let parts = std::mem::take(&mut *lock(&self.parts));
        let guest = lock(&self.guest).take();
        parts.take_down(guest);
    }

    fn info(&self) -> Option<String> {
        self.guest().ok()?.vm().info()
    }

    fn figures(&self) -> Vec<Figure> {
        let Ok(guest) = self.guest() else {
            return Vec::new();
        };
        let vm = match guest.vm() {
            Machine::Thread(vm) => vm,
            Machine::Worker(worker) => return worker_figures(worker),
        };
        let stats = vm.vm().stats();
        let mut exits = [
            ("io_in", 0u64),
            ("io_out", 0),
            ("mmio_read", 0),
            ("mmio_write", 0),
            ("interrupted", 0),
            ("other", 0),
        ];
        for cpu in &stats.vcpus {
            let of_cpu = [
                cpu.io_in,
                cpu.io_out,
                cpu.mmio_read,
                cpu.mmio_write,
                cpu.interrupted,
                cpu.other,
            ];
            for ((_, sum), count) in exits.iter_mut().zip(of_cpu) {
                *sum = sum.saturating_add(count);
            }
        }
        let mut figures: Vec<Figure> = exits
            .into_iter()
            .map(|(reason, value)| Figure {
                label: Some(("reason", reason)),
                ..Figure::counter(
                    "bulkhead_vm_exits_total",
                    "Exits of a VM's CPUs to the daemon, by reason.",
                    number(value),
                )
            })
            .collect();
        if let Some(exits) = stats.kvm_vcpus.get("exits") {
            let help = "All exits of a VM's CPUs, those that the kernel serves included.";
            figures.push(Figure::counter(
                "bulkhead_vm_kvm_exits_total",
                help,
                number(*exits),
            ));
        }
        let help = "Guest memory that the host has given so far.";
        let resident = number(stats.memory_resident_bytes);
        figures.push(Figure::gauge("bulkhead_vm_resident_bytes", help, resident));
        if let Some(used) = lock(&self.parts).threads.as_ref().and_then(Threads::usage) {
            figures.extend(cpu_figures(used.user, used.system));
        }
        figures
    }

    async fn prepare(&self, request: &CreateTaskRequest) -> Answer<Prepared> {
        let storage = self.storage()?;
        let (id, bundle) = (request.id.clone(), request.bundle.clone());
        let rootfs = request.rootfs.clone();
        let shares_pids = self.link()?.shares_pids();
        let (vm, slots) = (self.guest()?.vm().clone(), Arc::clone(&self.disks));
        let prepared = blocking(move || {
            let mut spec = read_spec(Path::new(&bundle))?;
            let mut wanted = container_spec::rewrite(&mut spec, shares_pids)?;
            let mut storage = lock(&storage);
            let show = |share: &str, path: &str| {
                vm.show(share, path).map_err(|e| {
                    let text = format!("container {id}: showing {path} to the VM's process: {e}");
                    Status::new(Code::Internal, text)
                })
            };
            let layers = by_layers(&vm, &mut lock(&slots), &mut storage, &id, &rootfs);
            let root = match layers {
                Some(root) => root,
                None => {
                    let root = storage.add_root(&id, &rootfs).map_err(storage_failed)?;
                    show("rootfs", &root)?;
                    shared_root(root)
                }
            };
            let mut as_devices = Vec::new();
            for bind in wanted.binds {
                let source = Path::new(&bind.source);
                if let Some(number) = disks::block_device(source) {
                    as_devices.push((bind, number));
                    continue;
                }
                let path = storage
                    .add_volume(&id, source, bind.access)
                    .map_err(storage_failed)?;
                show("volumes", &path)?;
                container_spec::set_source(&mut spec, &bind, path);
            }
            drop(storage);
            let more = container_spec::make_devices(&mut spec, &as_devices);
            wanted.devices.extend(more);
            let disks = attach_devices(&vm, &mut lock(&slots), &id, &wanted.devices)?;
            let resources = spec["linux"]["resources"].take();
            spec["linux"]["resources"] = resources.clone();
            let spec = serde_json::to_vec(&spec)
                .map_err(|e| Status::new(Code::Internal, format!("container {id}: spec: {e}")))?;
            Ok::<_, Status>((root, spec, disks, resources))
        });
        let (root, oci_spec, disks, resources) = prepared.await??;
        lock(&self.cpus).add(&request.id, &resources);
        lock(&self.memory).add(&request.id, &resources);
        Ok(Prepared {
            rootfs: vec![root],
            oci_spec,
            disks,
        })
    }

    fn made(&self, container: &str, bundle: &str) {
        self.show_container(container, Some(bundle));
    }

    fn discard(&self, container: &str) {
        self.show_container(container, None);
        if let Ok(storage) = self.storage() {
            lock(&storage).remove(container);
        }
        // CPUs and memory that it was given stay until the next change.
        let _ = lock(&self.cpus).remove(container);
        lock(&self.memory).remove(container);
        if let Ok(guest) = self.guest() {
            let mut disks = lock(&self.disks);
            for slot in disks.release(container) {
                if let Err(error) = guest.vm().detach_disk(slot) {
                    tracing::warn!(container, slot, %error, "a disk cannot be taken out");
                }
            }
        }
    }

    fn strip_resources(&self, resources: &mut serde_json::Map<String, Value>) {
        container_spec::strip_resources(resources);
    }

    async fn limits_change(&self, container: &str, resources: &Value) -> Answer<()> {
        let _resizing = self.resizing.lock().await;
        self.memory_changes(container, resources).await?;
        let before = lock(&self.cpus).now(container);
        let change = lock(&self.cpus).update(container, resources);
        let Some(change) = change else {
            return Ok(());
        };
        let resized = self.resize(change).await;
        if resized.is_err() {
            lock(&self.cpus).set_back(container, before);
        }
        resized
    }

    async fn give_up(&self, reason: String) -> Answer<()> {
        let guest = self.guest()?;
        *lock(&self.given_up) = Some(reason);
        blocking(move || guest.vm().stop()).await
    }
}

/// A root that lies in the pod's share.
fn shared_root(source: String) -> Mount {
    Mount {
        r#type: "bulkhead-share".into(),
        source,
        target: String::new(),
        options: vec!["rbind".into()],
    }
}

/// Gives the guest the layers of a container's image as a disk, if they are images and it has a
/// slot for that. All pods of the node then read the same files of the host. `None`: the root is to
/// be mounted on the host.
fn by_layers(
    vm: &Machine,
    slots: &mut Disks,
    storage: &mut Storage,
    container: &str,
    rootfs: &[Mount],
) -> Option<Mount> {
    if slots.is_empty() {
        return None;
    }
    let layers = Layers::of(rootfs)?;
    let given = disks::open_layers(&layers.files).and_then(|(files, key, lengths)| {
        let what = "the image's layers";
        let starts = joined_layout(&lengths).ok_or(disks::DiskError::Layers)?;
        let serial = slots.attach(container, what, key, |slot, serial| {
            let disk = DiskConfig {
                source: DiskSource::Joined(files),
                read_only: true,
                serial: serial.to_owned(),
            };
            let failed = |source| disks::DiskError::Vm {
                what: what.into(),
                source: Box::new(source),
            };
            vm.attach_disk(slot, disk).map_err(failed)
        })?;
        Ok((serial, starts, lengths))
    });
    let fall_back = |reason: &dyn std::fmt::Display| {
        tracing::info!(container, %reason, "its image is given by virtio-fs, not as a disk");
    };
    let (serial, starts, lengths) = match given {
        Ok(given) => given,
        Err(error) => {
            fall_back(&error);
            return None;
        }
    };
    let (upper, work) = match storage.add_upper(container, &layers) {
        Ok(paths) => paths,
        Err(error) => {
            fall_back(&error);
            return None;
        }
    };
    let mut options: Vec<String> = starts
        .iter()
        .zip(&lengths)
        .map(|(start, length)| format!("layer={start}:{length}"))
        .collect();
    options.extend([format!("upper={upper}"), format!("work={work}")]);
    Some(Mount {
        r#type: LAYERS_MOUNT.into(),
        source: serial,
        target: String::new(),
        options,
    })
}

/// Puts block devices of the host into the VM's slots, for a container.
fn attach_devices(
    vm: &Machine,
    slots: &mut Disks,
    container: &str,
    devices: &[HostDevice],
) -> Answer<Vec<Disk>> {
    let mut disks: Vec<Disk> = Vec::new();
    for device in devices {
        let (major, minor) = device.number;
        if disks.iter().any(|d| (d.major, d.minor) == device.number) {
            continue;
        }
        // Under two names it is one device: what may be written under one may be written.
        let same = |d: &&HostDevice| d.number == device.number;
        let read_only = devices.iter().filter(same).all(|d| d.read_only);
        let what = format!("device {}", device.path);
        let key = |read_only| Key::Device {
            number: device.number,
            read_only,
        };
        // Who only reads what others of the pod write sees what they do: by the same disk, to which
        // the rules of its cgroup do not let it write.
        if read_only && let Some(serial) = slots.share(container, &key(false)) {
            disks.push(Disk {
                serial,
                major,
                minor,
                read_only: false,
            });
            continue;
        }
        let key = key(read_only);
        let serial = slots.attach(container, &what, key, |slot, serial| {
            let file = disks::open_device(&what, device.number, read_only)?;
            let disk = DiskConfig {
                source: DiskSource::File(file),
                read_only,
                serial: serial.to_owned(),
            };
            let what = what.clone();
            vm.attach_disk(slot, disk)
                .map_err(|source| disks::DiskError::Vm {
                    what,
                    source: Box::new(source),
                })
        })?;
        disks.push(Disk {
            serial,
            major,
            minor,
            read_only,
        });
    }
    Ok(disks)
}
