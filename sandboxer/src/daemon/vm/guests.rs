//! The kinds of guests that pods' VMs run: Linux with the agent, and the app kernel, which is its
//! own agent. They take the same devices and speak the same protocol; all that differs between
//! them is said here.

use bulkhead_vmm::{DiskConfig, DiskSource};

use crate::daemon::agent::setup::USUAL_SYSCTLS;
use crate::daemon::config::{Config, Isolation};
use crate::daemon::proto::PodSandboxConfig;
use crate::engine::EngineError;
use crate::engine::microvm::files::{GuestFiles, find_app_kernel};

/// A kind of guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guests {
    /// Linux, with the agent on a disk.
    Linux,
    /// Our own kernel.
    App,
}

/// What a VM boots.
#[derive(Debug)]
pub struct Boot {
    /// The kernel.
    pub kernel: std::path::PathBuf,
    /// Behind the VMM's own words for it.
    pub cmdline: String,
    /// The image, where there is one.
    pub disks: Vec<DiskConfig>,
}

/// How large VMs are, as configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// vCPUs of a pod that has no CPU limit.
    pub default_cpus: u8,
    /// Most vCPUs.
    pub max_cpus: u8,
    /// vCPUs that may come while it runs.
    pub grow_cpus: u8,
    /// Memory of a pod that has no memory limit, in MiB.
    pub default_memory_mib: u64,
    /// Added to the limit of a pod that has one, in MiB.
    pub overhead_mib: u64,
    /// Most memory, in MiB.
    pub max_memory_mib: u64,
    /// Memory that may come while it runs, in MiB.
    pub grow_memory_mib: u64,
    /// Slots for disks that come later.
    pub disk_slots: u8,
    /// Memory by huge pages of the host.
    pub hugepages: bool,
    /// Packets by the host's kernel.
    pub vhost_net: bool,
    /// Whether packets may be larger than the MTU and without checksums on their way.
    pub net_offload: bool,
}

impl Guests {
    /// The runtime's name.
    pub fn runtime(self) -> &'static str {
        match self {
            Self::Linux => "bulkhead-microvm",
            Self::App => "bulkhead-app",
        }
    }

    /// As `vmmctl ps` shows it.
    pub fn shown(self) -> &'static str {
        match self {
            Self::Linux => "microvm",
            Self::App => "app",
        }
    }

    /// Where pods' directories are, below the run directory; short, since sockets are in them.
    pub fn directory(self) -> &'static str {
        match self {
            Self::Linux => "pods",
            Self::App => "apps",
        }
    }

    /// Finds what it boots.
    ///
    /// # Errors
    /// A file is missing.
    pub fn boot(self, config: &Config) -> Result<Boot, EngineError> {
        match self {
            Self::Linux => {
                let wish = &config.microvm;
                let files = GuestFiles::find(wish.kernel.as_deref(), wish.image.as_deref())?;
                Ok(Boot {
                    kernel: files.kernel,
                    cmdline: format!(
                        "quiet root=/dev/vda rootfstype=erofs ro init=/sbin/agent \
                         dummy.numdummies=0 {}",
                        wish.cmdline
                    ),
                    disks: vec![DiskConfig {
                        source: DiskSource::Path(files.image),
                        read_only: true,
                        serial: "bulkhead-root".into(),
                    }],
                })
            }
            Self::App => Ok(Boot {
                kernel: find_app_kernel(config.app.kernel.as_deref())?,
                cmdline: format!("quiet {}", config.app.cmdline),
                disks: Vec::new(),
            }),
        }
    }

    /// How large its VMs are.
    pub fn sizes(self, config: &Config) -> Sizes {
        match self {
            Self::Linux => {
                let wish = &config.microvm;
                // What is in a process of its own is given nothing more while it runs.
                let alone = wish.isolation == Isolation::Process;
                Sizes {
                    default_cpus: wish.default_cpus,
                    max_cpus: wish.max_cpus,
                    grow_cpus: if alone { 0 } else { wish.grow_cpus },
                    default_memory_mib: wish.default_memory_mib,
                    overhead_mib: wish.overhead_mib,
                    max_memory_mib: wish.max_memory_mib,
                    grow_memory_mib: match alone || wish.hugepages {
                        true => 0,
                        false => wish.grow_memory_mib,
                    },
                    disk_slots: if alone { 0 } else { wish.disk_slots },
                    hugepages: wish.hugepages,
                    vhost_net: wish.vhost_net && !alone,
                    net_offload: wish.net_offload,
                }
            }
            Self::App => {
                let wish = &config.app;
                Sizes {
                    // The kernel runs on one.
                    default_cpus: 1,
                    max_cpus: 1,
                    grow_cpus: 0,
                    default_memory_mib: wish.default_memory_mib,
                    overhead_mib: wish.overhead_mib,
                    max_memory_mib: wish.max_memory_mib,
                    grow_memory_mib: 0,
                    // It has no driver for them.
                    disk_slots: 0,
                    hugepages: false,
                    vhost_net: false,
                    net_offload: true,
                }
            }
        }
    }

    /// How many VMs are kept to be copied.
    pub fn templates(self, config: &Config) -> usize {
        match (self, self.isolation(config)) {
            // A worker makes its VM itself.
            (Self::Linux, Isolation::Thread) => config.microvm.templates.into(),
            // The app kernel boots in less time than a copy takes.
            _ => 0,
        }
    }

    /// What separates its VMs from the daemon.
    pub fn isolation(self, config: &Config) -> Isolation {
        match self {
            Self::Linux => config.microvm.isolation,
            Self::App => config.app.isolation,
        }
    }

    /// Whether it may run where KVM itself is emulated.
    pub fn allow_emulated_kvm(self, config: &Config) -> bool {
        match self {
            Self::Linux => config.microvm.allow_emulated_kvm,
            Self::App => config.app.allow_emulated_kvm,
        }
    }

    /// Sysctls of its pods that have no other wish.
    pub fn usual_sysctls(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Linux => USUAL_SYSCTLS,
            Self::App => &[],
        }
    }

    /// Refuses what this kind alone cannot give.
    ///
    /// # Errors
    /// The reason, and what to do.
    pub fn check(self, wish: &PodSandboxConfig) -> Result<(), String> {
        let sysctl = wish.linux.as_ref().and_then(|l| l.sysctls.keys().next());
        match (self, sysctl) {
            (Self::App, Some(name)) => Err(format!(
                "sysctl {name:?}: the app kernel has none that a pod could set: leave it out, or \
                 use the runtime bulkhead-microvm for this pod"
            )),
            _ => Ok(()),
        }
    }
}
