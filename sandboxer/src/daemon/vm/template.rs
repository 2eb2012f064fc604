//! VMs that were booted beforehand: pods of a shape that has been seen begin as copies of one.
//!
//! The first pod of a shape boots; then a VM of that shape, with nothing of any pod, is booted in
//! the background up to where its agent answers, and kept as it is then. The next pods copy its
//! memory, which takes a fraction of the time of a boot. No two share any of it.

use std::fmt::Write as _;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_protocol::sandbox::{AddEntropyRequest, ConfigureSandboxRequest, GetInfoRequest};
use bulkhead_vmm::{DiskConfig, DiskSource, NetConfig, ShareConfig, Template, VmConfig};
use nix::sched::{CloneFlags, unshare};

use super::guest::Guest;
use super::machine::Machine;
use super::network;
use crate::daemon::pod::blocking;
use crate::engine::EngineError;
use crate::engine::agent::failed;
use crate::engine::console::ConsoleHub;
use crate::engine::microvm::MicroVm;
use crate::engine::microvm::tap::create_tap;

/// As the VM is called in logs and names of threads.
const NAME: &str = "template";
/// After a template that could not be made, until the next of its shape.
const PAUSE: Duration = Duration::from_secs(60);
/// Bytes of entropy that a copy is given: more than the state of the guest's generator.
const ENTROPY: usize = 64;

/// What a VM must have in common with its template: all that its kernel has seen of its hardware.
#[derive(Debug)]
pub struct Shape {
    key: String,
    /// A VM of this shape, connected to nothing; shares have the roots of the pod.
    blank: VmConfig,
}

impl Shape {
    /// The shape of a pod's VM; `None`: it cannot be copied.
    pub fn of(config: &VmConfig) -> Option<Self> {
        if config.hugepages || config.nets.iter().any(|net| net.vhost) {
            return None;
        }
        let mut disks = Vec::new();
        for disk in &config.disks {
            let DiskSource::Path(path) = &disk.source else {
                return None;
            };
            disks.push(DiskConfig {
                source: DiskSource::Path(path.clone()),
                read_only: disk.read_only,
                serial: disk.serial.clone(),
            });
        }
        let net = |(number, net): (usize, &NetConfig)| NetConfig {
            tap: String::new(),
            fd: None,
            mac: Some(address(number)),
            mtu: net.mtu,
            vhost: false,
            plain: net.plain,
        };
        let blank = VmConfig {
            id: NAME.into(),
            vcpus: config.vcpus,
            max_vcpus: config.max_vcpus,
            memory_mib: config.memory_mib,
            room_mib: config.room_mib,
            kernel: config.kernel.clone(),
            cmdline: config.cmdline.clone(),
            disks,
            spare_disk_slots: config.spare_disk_slots,
            shares: config.shares.clone(),
            nets: config.nets.iter().enumerate().map(net).collect(),
            vsock_cid: config.vsock_cid,
            rng: config.rng,
            allow_emulated_kvm: config.allow_emulated_kvm,
            ..VmConfig::default()
        };
        // Files may be replaced under their names.
        let mut key = identity(&blank.kernel)?;
        for disk in &blank.disks {
            if let DiskSource::Path(path) = &disk.source {
                key.push_str(&identity(path)?);
            }
        }
        for share in &blank.shares {
            let _ = write!(key, "{} {} ", share.tag, share.read_only);
        }
        for net in &blank.nets {
            let _ = write!(key, "{:?} {} ", net.mtu, net.plain);
        }
        let _ = write!(
            key,
            "{} {} {} {} {} {}",
            blank.vcpus,
            blank.max_vcpus,
            blank.memory_mib,
            blank.room_mib,
            blank.spare_disk_slots,
            blank.cmdline
        );
        Some(Self { key, blank })
    }
}

/// Hardware address of a template's interface.
fn address(number: usize) -> [u8; 6] {
    [2, 0, 0, 0, 0, u8::try_from(number).unwrap_or(u8::MAX)]
}

/// Tells a file from any other, and from what it may become.
fn identity(path: &Path) -> Option<String> {
    let data = std::fs::metadata(path).ok()?;
    Some(format!(
        "{}:{}:{}:{}.{} ",
        data.dev(),
        data.ino(),
        data.size(),
        data.mtime(),
        data.mtime_nsec()
    ))
}

#[derive(Debug, Default)]
struct Inner {
    /// The one that was used last is the last.
    ready: Vec<(String, Arc<Template>)>,
    /// One is in the making.
    making: bool,
    /// Shapes of which none could be made, and when: it is not tried again for a while.
    refused: Vec<(String, Instant)>,
}

/// The templates of one daemon.
#[derive(Debug)]
pub struct Templates {
    inner: Mutex<Inner>,
    /// Most that are kept.
    limit: usize,
    /// For a template's shares, of which it sees nothing; only there while one is made.
    nothing: PathBuf,
}

impl Templates {
    /// None yet, and at most `limit`.
    pub fn new(limit: usize, run_dir: &Path) -> Arc<Self> {
        let nothing = run_dir.join(NAME);
        // Of an earlier process that was killed.
        if limit > 0 {
            let _ = std::fs::remove_dir(&nothing);
        }
        Arc::new(Self {
            inner: Mutex::default(),
            limit,
            nothing,
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there can be any.
    pub fn wanted(&self) -> bool {
        self.limit > 0
    }

    /// The template of a shape, if there is one.
    pub fn find(&self, shape: &Shape) -> Option<Arc<Template>> {
        let mut inner = self.inner();
        let at = inner.ready.iter().position(|(key, _)| *key == shape.key)?;
        let found = inner.ready.remove(at);
        let template = Arc::clone(&found.1);
        inner.ready.push(found);
        Some(template)
    }

    /// Forgets the template of a shape: a pod did not come up from it.
    pub fn forget(&self, shape: &Shape) {
        self.inner().ready.retain(|(key, _)| *key != shape.key);
    }

    /// Makes a template of a shape in the background, unless there is one or another is in the
    /// making.
    pub fn make(self: &Arc<Self>, shape: Shape) {
        {
            let mut inner = self.inner();
            let known = inner.ready.iter().any(|(key, _)| *key == shape.key);
            inner.refused.retain(|(_, at)| at.elapsed() < PAUSE);
            let refused = inner.refused.iter().any(|(key, _)| *key == shape.key);
            if known || inner.making || refused {
                return;
            }
            inner.making = true;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let begin = Instant::now();
            let Shape { key, blank } = shape;
            let (cpus, memory_mib) = (blank.vcpus, blank.memory_mib);
            let made = this.build(blank).await;
            let nothing = this.nothing.clone();
            let _ = blocking(move || std::fs::remove_dir(nothing)).await;
            let mut inner = this.inner();
            inner.making = false;
            match made {
                Ok(template) => {
                    tracing::info!(
                        cpus,
                        memory_mib,
                        kept_mib = template.bytes() >> 20,
                        ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(0),
                        "VMs of this shape start as copies from now on"
                    );
                    let surplus = (inner.ready.len() + 1).saturating_sub(this.limit);
                    inner.ready.drain(..surplus);
                    inner.ready.push((key, Arc::new(template)));
                }
                Err(error) => {
                    tracing::warn!(cpus, memory_mib, %error, "VMs of this shape boot, for now");
                    inner.refused.push((key, Instant::now()));
                }
            }
        });
    }

    /// Boots a VM, waits for its agent, and keeps what it is then.
    async fn build(&self, mut config: VmConfig) -> Result<Template, EngineError> {
        let nothing = self.nothing.clone();
        let vm = blocking(move || {
            std::fs::create_dir_all(&nothing).map_err(EngineError::io("a template's share"))?;
            for share in &mut config.shares {
                *share = ShareConfig {
                    root: nothing.clone(),
                    ..share.clone()
                };
            }
            for net in &mut config.nets {
                net.fd = Some(loose_tap().map_err(EngineError::io("a template's tap"))?);
            }
            let vm = Arc::new(MicroVm::create(config, ConsoleHub::new(None))?);
            vm.vm().start()?;
            Ok::<_, EngineError>(vm)
        })
        .await
        .unwrap_or_else(|_| Err(panicked()))?;
        let machine = Machine::Thread(Arc::clone(&vm));
        let link = Guest::link_to(&machine).await;
        let answered = match &link {
            Ok(link) => link
                .sandbox()
                .get_info(&GetInfoRequest {})
                .await
                .map(drop)
                .map_err(failed("asking a template's agent")),
            Err(_) => Ok(()),
        };
        // The connection is still there when it is saved: a copy is told that it has ended.
        blocking(move || {
            let made = answered.and_then(|()| Ok(Template::of(vm.vm())?));
            machine.take_down();
            let link = link.map(drop);
            link.and(made)
        })
        .await
        .unwrap_or_else(|_| Err(panicked()))
    }
}

fn panicked() -> EngineError {
    EngineError::io("a template")(io::Error::other("its thread failed"))
}

/// A tap in a network namespace of its own, which goes with it.
fn loose_tap() -> io::Result<OwnedFd> {
    network::on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(OwnedFd::from(create_tap("bhtap%d")?.1))
    })
}

/// Says in a pod's set-up that its interfaces have the addresses of a template still.
pub fn adapt(request: &mut ConfigureSandboxRequest) {
    for (number, interface) in request.interfaces.iter_mut().enumerate() {
        interface.device_mac = network::mac(&address(number));
    }
}

/// What makes a copy's random numbers its own.
///
/// # Errors
/// The host has none.
pub fn entropy() -> io::Result<AddEntropyRequest> {
    let mut data = vec![0; ENTROPY];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut data)?;
    Ok(AddEntropyRequest { data })
}
