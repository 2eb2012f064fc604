//! What a VM is made of.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

pub use bulkhead_devices::virtio::blk::joined_layout;
pub use bulkhead_devices::virtio::fs::{Caching, UPPER_PREFIX};

use crate::error::VmError;
use crate::layout;

/// Where the guest's serial console goes.
#[derive(Default)]
pub enum Console {
    /// Kept only in the ring that diagnoses failures.
    #[default]
    None,
    /// Also written here. The writer must not block for ever: a vCPU waits for it.
    Writer(Box<dyn Write + Send>),
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Writer(_) => "Writer",
        })
    }
}

/// What backs a disk.
#[derive(Debug)]
pub enum DiskSource {
    /// A raw image file or block device, opened by the VMM.
    Path(PathBuf),
    /// An open file.
    File(File),
    /// Open files one behind the other at the places that [`joined_layout`] says; read-only.
    Joined(Vec<File>),
}

/// A virtio-blk disk.
#[derive(Debug)]
pub struct DiskConfig {
    /// What backs it.
    pub source: DiskSource,
    /// The guest cannot write.
    pub read_only: bool,
    /// Serial number the guest sees, at most 20 bytes.
    pub serial: String,
}

/// A directory shared by virtio-fs.
#[derive(Clone, Debug)]
pub struct ShareConfig {
    /// The tag the guest mounts.
    pub tag: String,
    /// The directory that becomes the root of the share.
    pub root: PathBuf,
    /// The guest cannot write.
    pub read_only: bool,
    /// How long the guest may believe what it was told about files. With [`Caching::Always`] it
    /// also collects writes: only for directories nobody else changes.
    pub caching: Caching,
    /// The guest may use directories of it as upper layers of overlays
    /// ([`bulkhead_devices::virtio::fs::FsConfig::upper_layers`]).
    pub upper_layers: bool,
    /// The host makes what is in its root while the guest runs
    /// ([`bulkhead_devices::virtio::fs::FsConfig::fixed_top`]).
    pub fixed_top: bool,
}

/// A virtio-net device on a tap.
#[derive(Debug)]
pub struct NetConfig {
    /// Name of the tap in the network namespace of the caller (ignored if `fd` is given).
    pub tap: String,
    /// An already opened tap (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`).
    pub fd: Option<OwnedFd>,
    /// MAC address the guest is given.
    pub mac: Option<[u8; 6]>,
    /// MTU the guest is given.
    pub mtu: Option<u16>,
    /// Use the host kernel's vhost-net where it is available.
    pub vhost: bool,
    /// No offloads ([`bulkhead_devices::virtio::net::NetOptions::plain`]).
    pub plain: bool,
}

/// Everything needed to build a VM. `Default` gives one vCPU, 128 MiB and no devices but the
/// serial console.
#[derive(Debug)]
pub struct VmConfig {
    /// Name in logs and thread names.
    pub id: String,
    /// An open `/dev/kvm`, for who cannot open it himself.
    pub kvm: Option<OwnedFd>,
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// vCPUs that the guest is told of, so that it can be given more while it runs
    /// ([`crate::Vm::grow_vcpus`]); at most 32, and no fewer than `vcpus` count.
    pub max_vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// A file for guest memory ([`crate::memory::VmMemory::make_file`]); `None`: one is made.
    pub memory: Option<File>,
    /// MiB that the guest can be given while it runs ([`crate::Vm::request_memory`]), a multiple
    /// of 128; not with `hugepages` nor with a file for `memory`.
    pub room_mib: u64,
    /// Back guest memory with 2 MiB pages of hugetlbfs.
    pub hugepages: bool,
    /// ELF `vmlinux` (PVH or 64-bit entry) or `bzImage`.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Appended to the default command line.
    pub cmdline: String,
    /// Leave the default command line out.
    pub bare_cmdline: bool,
    /// Disks, in the order of `vda`, `vdb`, …
    pub disks: Vec<DiskConfig>,
    /// Empty disk slots that can be filled while the VM runs.
    pub spare_disk_slots: u8,
    /// Shared directories.
    pub shares: Vec<ShareConfig>,
    /// Network devices, in the order of `eth0`, `eth1`, …
    pub nets: Vec<NetConfig>,
    /// Adds a vsock device with this guest CID (3 or above).
    pub vsock_cid: Option<u32>,
    /// Adds an entropy device.
    pub rng: bool,
    /// Adds a memory balloon with free-page reporting.
    pub balloon: bool,
    /// Where the serial console goes.
    pub console: Console,
    /// Waits for a debugger on this address (`127.0.0.1:1234` or a socket path) before the first
    /// instruction.
    pub gdb: Option<String>,
    /// Where to write a core of a guest that panics or triple-faults; the file must not exist.
    pub crash_core: Option<PathBuf>,
    /// Holds the VM's threads to the system calls that they need ([`crate::seccomp`]).
    pub seccomp: bool,
    /// Runs even where KVM is emulated and far too slow.
    pub allow_emulated_kvm: bool,
    /// Counts the instructions of the first vCPU before its first program, by single steps.
    pub count_instructions: bool,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            id: "vm".into(),
            kvm: None,
            vcpus: 1,
            max_vcpus: 0,
            memory_mib: 128,
            memory: None,
            room_mib: 0,
            hugepages: false,
            kernel: PathBuf::new(),
            initramfs: None,
            cmdline: String::new(),
            bare_cmdline: false,
            disks: Vec::new(),
            spare_disk_slots: 0,
            shares: Vec::new(),
            nets: Vec::new(),
            vsock_cid: None,
            rng: false,
            balloon: false,
            console: Console::None,
            gdb: None,
            crash_core: None,
            seccomp: true,
            allow_emulated_kvm: false,
            count_instructions: false,
        }
    }
}

impl VmConfig {
    /// vCPUs that it can have.
    pub(crate) fn most_vcpus(&self) -> u8 {
        self.max_vcpus.max(self.vcpus)
    }

    /// Checks every value that can be checked without touching the host's state.
    ///
    /// # Errors
    /// Names the first option that cannot be.
    pub fn validate(&self) -> Result<(), VmError> {
        let config = |what, reason| Err(VmError::Config { what, reason });
        if self.vcpus == 0 || self.vcpus > layout::MAX_VCPUS {
            return config(
                "cpus",
                format!("{} vCPUs: give 1 to {}", self.vcpus, layout::MAX_VCPUS),
            );
        }
        if self.max_vcpus > layout::MAX_VCPUS {
            return config(
                "most cpus",
                format!(
                    "{} vCPUs: give at most {}",
                    self.max_vcpus,
                    layout::MAX_VCPUS
                ),
            );
        }
        if self.memory_mib < layout::MIN_MEMORY_MIB {
            return config(
                "memory",
                format!(
                    "{} MiB is too small to boot in: give at least {} MiB",
                    self.memory_mib,
                    layout::MIN_MEMORY_MIB
                ),
            );
        }
        let host_mib = host_memory_mib();
        if self.memory_mib > host_mib {
            return config(
                "memory",
                format!(
                    "{} MiB is more than this host has ({host_mib} MiB): give less",
                    self.memory_mib
                ),
            );
        }
        if self.count_instructions && self.gdb.is_some() {
            return config(
                "count instructions",
                "it steps as a debugger does: leave gdb out".into(),
            );
        }
        if !self.room_mib.is_multiple_of(crate::room::ROOM_PIECE >> 20) || self.room_mib > host_mib
        {
            return config(
                "room for memory",
                format!(
                    "{} MiB: give a multiple of 128, and no more than this host has",
                    self.room_mib
                ),
            );
        }
        if self.room_mib > 0 && (self.hugepages || self.memory.is_some()) {
            return config(
                "room for memory",
                "cannot be had with huge pages, or with a file for memory".into(),
            );
        }
        if self.hugepages && !self.memory_mib.is_multiple_of(2) {
            return config(
                "memory",
                "with huge pages give an even number of MiB".into(),
            );
        }
        if let Some(cid) = self.vsock_cid
            && cid < 3
        {
            return config(
                "vsock cid",
                format!("{cid} is reserved: give 3 or above (2 is the host)"),
            );
        }
        for share in &self.shares {
            if share.tag.is_empty() || share.tag.len() > 36 {
                return config(
                    "share tag",
                    format!("{:?} must have 1 to 36 bytes", share.tag),
                );
            }
        }
        for disk in &self.disks {
            if disk.serial.len() > 20 {
                return config(
                    "disk serial",
                    format!("{:?} is longer than 20 bytes", disk.serial),
                );
            }
        }
        Ok(())
    }
}

/// Memory of this host in MiB.
fn host_memory_mib() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let (pages, size) = unsafe {
        (
            libc::sysconf(libc::_SC_PHYS_PAGES),
            libc::sysconf(libc::_SC_PAGESIZE),
        )
    };
    match (u64::try_from(pages), u64::try_from(size)) {
        (Ok(pages), Ok(size)) => pages.saturating_mul(size) >> 20,
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_cannot_be() {
        let says = |config: VmConfig| config.validate().unwrap_err().to_string();
        assert!(
            says(VmConfig {
                vcpus: 33,
                ..VmConfig::default()
            })
            .contains("1 to 32")
        );
        assert!(
            says(VmConfig {
                max_vcpus: 33,
                ..VmConfig::default()
            })
            .contains("at most 32")
        );
        assert!(
            says(VmConfig {
                memory_mib: 4,
                ..VmConfig::default()
            })
            .contains("at least 16 MiB")
        );
        assert!(
            says(VmConfig {
                memory_mib: 1 << 40,
                ..VmConfig::default()
            })
            .contains("more than this host has")
        );
        assert!(
            says(VmConfig {
                vsock_cid: Some(2),
                ..VmConfig::default()
            })
            .contains("reserved")
        );
    }
}
