//! Finds out, before a guest hangs, whether KVM is there and whether it is the real thing.
//!
//! Some hosts (cloud instances without nested virtualisation, among them) have a `/dev/kvm` that
//! runs guest kernel code in software: it opens and answers, but a guest takes minutes to boot
//! and meets instructions that are missing. Two signs tell: the CPU offers neither VMX nor SVM,
//! and a counted loop in a throw-away VM runs far below any hardware's speed.

use std::arch::x86_64::__cpuid;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use kvm_ioctls::{Cap, Kvm, VcpuExit};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::VmError;

/// What kind of KVM this host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmKind {
    /// Guests run on the CPU (nested counts: the CPU offers VMX or SVM to us).
    Hardware,
    /// Guest kernel code is emulated: far too slow, and incomplete.
    Emulated,
    /// There is no `/dev/kvm`.
    Missing,
    /// `/dev/kvm` is there but not for us.
    Denied,
    /// It opens, but lacks something we need.
    Incomplete,
}

/// The result of [`kvm_check`].
#[derive(Clone, Debug, Serialize)]
pub struct KvmReport {
    /// The verdict.
    pub kind: KvmKind,
    /// What was seen, and the remedy, for a person.
    pub detail: String,
    /// KVM's API version (12 everywhere).
    pub api_version: Option<i32>,
    /// Measured speed of guest code in ring 0, instructions a second.
    pub instructions_per_second: Option<f64>,
}

impl KvmReport {
    /// Whether VMs can be expected to work.
    pub fn usable(&self) -> bool {
        self.kind == KvmKind::Hardware
    }
}

/// How hard to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Look at the CPU; measure only if it offers no virtualisation.
    Quick,
    /// Always measure (about 50 ms where KVM is emulated, 1 ms elsewhere).
    Measured,
}

/// Below this, guest code is emulated. Emulators of ring 0 give a few million instructions a
/// second, hardware and full-system emulation of SVM many hundreds of millions.
const LEAST_HARDWARE_RATE: f64 = 50e6;
/// Instructions of the measured loop: 50 ms at 4 million a second.
const LOOP_INSTRUCTIONS: u32 = 200_000;

const DEVICE: &str = "/dev/kvm";

/// Checks `/dev/kvm`.
pub fn kvm_check(probe: Probe) -> KvmReport {
    match open() {
        Ok(kvm) => check_open(&kvm, probe),
        Err((kind, detail)) => KvmReport {
            kind,
            detail,
            api_version: None,
            instructions_per_second: None,
        },
    }
}

/// Opens KVM, unless it is `given`, and refuses what cannot work, at the cost of a CPUID instruction
/// on good hosts.
pub(crate) fn open_checked(given: Option<&OwnedFd>, allow_emulated: bool) -> Result<Kvm, VmError> {
    let kvm = match given {
        Some(fd) => from_fd(fd)?,
        None => open().map_err(|(_, detail)| VmError::Kvm(detail))?,
    };
    if !allow_emulated && !cpu_offers_virtualisation() {
        let report = check_open(&kvm, Probe::Quick);
        if !report.usable() {
            return Err(VmError::Kvm(report.detail));
        }
    }
    Ok(kvm)
}

fn from_fd(fd: &OwnedFd) -> Result<Kvm, VmError> {
    let fd = fd.try_clone().map_err(VmError::host("KVM's descriptor"))?;
    // SAFETY: the descriptor is ours alone and is given away here. What kind of file it is does not
    // matter to safety: the kernel refuses KVM's requests on others.
    Ok(unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) })
}

fn open() -> Result<Kvm, (KvmKind, String)> {
    match Kvm::new() {
        Ok(kvm) => Ok(kvm),
        Err(error) => {
            let error = io::Error::from_raw_os_error(error.errno());
            Err(match error.kind() {
                io::ErrorKind::PermissionDenied => (
                    KvmKind::Denied,
                    format!(
                        "{DEVICE}: {error}: run as root or join the group that owns it (usermod -aG kvm $USER)"
                    ),
                ),
                _ if Path::new(DEVICE).exists() => {
                    (KvmKind::Incomplete, format!("{DEVICE}: {error}"))
                }
                _ => (
                    KvmKind::Missing,
                    format!(
                        "{DEVICE} is missing: load kvm_intel or kvm_amd, enable virtualisation in \
                         the firmware, or choose a host that has it"
                    ),
                ),
            })
        }
    }
}

/// Whether the CPU says it has VMX or SVM.
fn cpu_offers_virtualisation() -> bool {
    let vmx = __cpuid(1).ecx & (1 << 5) != 0;
    let svm = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & (1 << 2) != 0;
    vmx || svm
}

fn check_open(kvm: &Kvm, probe: Probe) -> KvmReport {
    let api_version = Some(kvm.get_api_version());
    let report = |kind, detail, rate| KvmReport {
        kind,
        detail,
        api_version,
        instructions_per_second: rate,
    };
    for (capability, name) in [
        (Cap::Irqchip, "in-kernel interrupt controller"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::UserMemory, "user memory"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::ExtCpuid, "CPUID control"),
    ] {
        if !kvm.check_extension(capability) {
            return report(
                KvmKind::Incomplete,
                format!("{DEVICE} lacks {name}: use Linux 5.10 or newer on the host"),
                None,
            );
        }
    }
    let offered = cpu_offers_virtualisation();
    if offered && probe == Probe::Quick {
        return report(KvmKind::Hardware, "hardware KVM".into(), None);
    }
    match measure_best(kvm) {
        Ok(rate) if rate >= LEAST_HARDWARE_RATE => report(
            KvmKind::Hardware,
            format!("hardware KVM, {:.0} million instructions/s", rate / 1e6),
            Some(rate),
        ),
        // A busy host can be slow too: the CPU's word counts more than the clock's.
        Ok(rate) if offered => report(
            KvmKind::Hardware,
            format!(
                "hardware KVM, but only {:.1} million instructions/s just now: is the host overloaded?",
                rate / 1e6
            ),
            Some(rate),
        ),
        Ok(rate) => report(
            KvmKind::Emulated,
            format!(
                "{DEVICE} opens, but it is not hardware KVM: guest kernel code is emulated at {:.1} \
                 million instructions/s (hardware: hundreds) and the CPU offers neither VMX nor \
                 SVM: use a host with hardware virtualisation, or the lab (./dev lab)",
                rate / 1e6
            ),
            Some(rate),
        ),
        Err(error) => report(
            KvmKind::Incomplete,
            format!("{DEVICE} opens, but cannot run a test guest: {error}"),
            None,
        ),
    }
}

/// The best of a few measurements: the first pays for page faults, any may be pre-empted.
fn measure_best(kvm: &Kvm) -> Result<f64, VmError> {
    let mut best = measure(kvm)?;
    for _ in 0..2 {
        if best >= LEAST_HARDWARE_RATE {
            break;
        }
        best = best.max(measure(kvm)?);
    }
    Ok(best)
}

/// Runs a counted loop in protected ring 0 of a throw-away VM.
fn measure(kvm: &Kvm) -> Result<f64, VmError> {
    const CODE_ADDR: u64 = 0x1000;
    let vm = kvm.create_vm().map_err(VmError::kvm("KVM_CREATE_VM"))?;
    let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])
        .map_err(|e| VmError::Memory(e.to_string()))?;
    // mov ecx, N/2; 1: dec ecx; jnz 1b; out 0x10, al
    let mut code = vec![0x66, 0xB9];
    code.extend_from_slice(&(LOOP_INSTRUCTIONS / 2).to_le_bytes());
    code.extend_from_slice(&[0x66, 0x49, 0x75, 0xFC, 0xE6, 0x10]);
    memory
        .write_slice(&code, GuestAddress(CODE_ADDR))
        .map_err(|e| VmError::Memory(e.to_string()))?;
    for region in memory.iter() {
        let slot = kvm_bindings::kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped for as long as `memory`, which outlives `vm`'s use here.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(VmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    let mut vcpu = vm.create_vcpu(0).map_err(VmError::kvm("KVM_CREATE_VCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(VmError::kvm("KVM_GET_SREGS"))?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)
        .map_err(VmError::kvm("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(VmError::kvm("KVM_GET_REGS"))?;
    regs.rip = CODE_ADDR;
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(VmError::kvm("KVM_SET_REGS"))?;
    let start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => break,
            Ok(VcpuExit::Intr) => {}
            Ok(other) => {
                return Err(VmError::Kvm(format!("unexpected exit {other:?}")));
            }
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(VmError::kvm("KVM_RUN")(e)),
        }
        if start.elapsed() > Duration::from_secs(5) {
            return Err(VmError::Kvm("no end after 5 s".into()));
        }
    }
    Ok(f64::from(LOOP_INSTRUCTIONS) / start.elapsed().as_secs_f64().max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the host is, the verdict must agree with what the CPU offers, and a person must
    /// be told what to do.
    #[test]
    fn the_verdict_fits_the_cpu() {
        let report = kvm_check(Probe::Measured);
        assert!(!report.detail.is_empty());
        if report.usable() {
            assert!(report.instructions_per_second.unwrap() > 0.0);
        }
        if cpu_offers_virtualisation() {
            assert_ne!(report.kind, KvmKind::Emulated, "{report:?}");
        }
    }
}
