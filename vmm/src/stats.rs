//! What a VM has done so far: exits, boot timeline, KVM's own counters.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

/// Time stamps of the stages of a boot, in microseconds since the VM began to be built.
#[derive(Debug)]
pub struct Marks {
    start: Instant,
    marks: Mutex<Vec<Mark>>,
}

/// Guests can write marks: bounded, so that one in a loop cannot fill our memory.
const MAX_MARKS: usize = 64;

/// One stage of the boot.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    /// Microseconds since the VM began to be built.
    pub us: u64,
    /// What was reached.
    pub stage: String,
}

/// The stages in order.
pub type Timeline = Vec<Mark>;

impl Marks {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            marks: Mutex::new(Vec::with_capacity(8)),
        }
    }

    /// Notes that `stage` is reached now.
    pub(crate) fn add(&self, stage: &str) {
        let us = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if marks.len() < MAX_MARKS {
            marks.push(Mark {
                us,
                stage: stage.into(),
            });
        }
    }

    /// The guest wrote `mark` to the boot mark port.
    pub(crate) fn record(&self, mark: u8) {
        self.add(&format!("guest mark {mark:#04x}"));
    }

    pub(crate) fn timeline(&self) -> Timeline {
        self.marks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Exits of one vCPU to user space.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VcpuExits {
    /// `IN` instructions.
    pub io_in: u64,
    /// `OUT` instructions.
    pub io_out: u64,
    /// Reads of device memory.
    pub mmio_read: u64,
    /// Writes of device memory that no ioeventfd took.
    pub mmio_write: u64,
    /// Exits caused by us (pause, statistics).
    pub interrupted: u64,
    /// All others.
    pub other: u64,
}

/// A snapshot of a VM's counters.
#[derive(Clone, Debug, Serialize)]
pub struct VmStats {
    /// Exits to user space, per vCPU.
    pub vcpus: Vec<VcpuExits>,
    /// KVM's binary statistics of the VM itself.
    pub kvm_vm: BTreeMap<String, u64>,
    /// KVM's binary statistics, summed over vCPUs (`exits`, `halt_exits`, `io_exits`,
    /// `mmio_exits`, `irq_exits`, …).
    pub kvm_vcpus: BTreeMap<String, u64>,
    /// Stages of the boot.
    pub timeline: Timeline,
    /// Counters of each device.
    pub devices: BTreeMap<String, serde_json::Value>,
    /// Instructions before the first one of a program, where they are counted and it came so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instructions_to_user: Option<u64>,
    /// Guest memory that the host has given so far, in bytes.
    pub memory_resident_bytes: u64,
}

/// `KVM_GET_STATS_FD`, `_IO(0xAE, 0xCE)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xAECE;
/// Header of a statistics file: flags, name size, number of descriptors, three offsets.
const HEADER_BYTES: usize = 24;
/// More than any kernel has; a bound for what we allocate.
const MAX_DESCRIPTORS: usize = 1024;

/// KVM's binary statistics of a VM or vCPU (Documentation/virt/kvm/api.rst, 4.133).
#[derive(Debug)]
pub(crate) struct KvmStats(File);

impl KvmStats {
    /// Opens the statistics of a VM or vCPU; `None` where the kernel has none (before 5.14).
    pub(crate) fn open(kvm_fd: RawFd) -> Option<Self> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or an error.
        let fd = unsafe { libc::ioctl(kvm_fd, KVM_GET_STATS_FD) };
        // SAFETY: a fresh descriptor that nobody else owns.
        (fd >= 0).then(|| Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Adds the current values to `sums`. Histograms are left out.
    pub(crate) fn add_to(&self, sums: &mut BTreeMap<String, u64>) -> io::Result<()> {
        let mut header = [0; HEADER_BYTES];
        self.0.read_exact_at(&mut header, 0)?;
        let word = |bytes: &[u8], at: usize| {
            bytes
                .get(at..at + 4)
                .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        };
        let name_size = word(&header, 4) as usize;
        let count = (word(&header, 8) as usize).min(MAX_DESCRIPTORS);
        let (descriptors, data) = (word(&header, 16), word(&header, 20));
        let entry_size = 16 + name_size.min(256);
        let mut table = vec![0; entry_size * count];
        self.0.read_exact_at(&mut table, u64::from(descriptors))?;
        for entry in table.chunks_exact(entry_size) {
            // flags u32, exponent i16, size u16, offset u32, bucket size u32, name.
            let kind = word(entry, 0) & 0xF;
            let values = u16::from_le_bytes([entry[6], entry[7]]);
            if kind > 2 || values != 1 {
                continue;
            }
            let mut value = [0; 8];
            let at = u64::from(data) + u64::from(word(entry, 8));
            self.0.read_exact_at(&mut value, at)?;
            let name = entry[16..].split(|b| *b == 0).next().unwrap_or(&[]);
            *sums
                .entry(String::from_utf8_lossy(name).into_owned())
                .or_insert(0) += u64::from_le_bytes(value);
        }
        Ok(())
    }
}

impl AsRawFd for KvmStats {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
