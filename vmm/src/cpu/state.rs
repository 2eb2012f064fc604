//! Everything of a vCPU that survives a snapshot.

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::error::VmError;

/// Registers and pending events of one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
    tsc_khz: u32,
}

/// MSR 0x6E0: the deadline must be set after the TSC itself.
const MSR_TSC_DEADLINE: u32 = 0x6E0;

/// MSRs that KVM says must be saved on this host.
pub(crate) fn msr_list(kvm: &Kvm) -> Result<Vec<u32>, VmError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(VmError::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}

impl VcpuState {
    /// Reads the state of a vCPU that is not running.
    ///
    /// # Errors
    /// When KVM refuses a call.
    pub fn save(vcpu: &VcpuFd, msr_list: &[u32]) -> Result<Self, VmError> {
        // The order follows KVM's documentation: mp_state first, since reading it may deliver a
        // pending INIT, then registers, events last.
        let mp_state = vcpu
            .get_mp_state()
            .map_err(VmError::kvm("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(VmError::kvm("KVM_GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(VmError::kvm("KVM_GET_SREGS"))?;
        let xsave = vcpu.get_xsave().map_err(VmError::kvm("KVM_GET_XSAVE"))?;
        let xcrs = vcpu.get_xcrs().map_err(VmError::kvm("KVM_GET_XCRS"))?;
        let debug = vcpu
            .get_debug_regs()
            .map_err(VmError::kvm("KVM_GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(VmError::kvm("KVM_GET_LAPIC"))?;
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        let msrs = read_msrs(vcpu, msr_list)?;
        let events = vcpu
            .get_vcpu_events()
            .map_err(VmError::kvm("KVM_GET_VCPU_EVENTS"))?;
        let cpuid = vcpu
            .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(VmError::kvm("KVM_GET_CPUID2"))?
            .as_slice()
            .to_vec();
        Ok(Self {
            cpuid,
            regs,
            sregs,
            xsave,
            xcrs,
            debug,
            lapic,
            mp_state,
            events,
            msrs,
            tsc_khz,
        })
    }

    /// Writes the state to a fresh vCPU.
    ///
    /// # Errors
    /// When KVM refuses a call, for example because the host's CPU lacks a saved feature.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), VmError> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|e| VmError::State(format!("CPUID table: {e:?}")))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(VmError::kvm("KVM_SET_CPUID2"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(VmError::kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs)
            .map_err(VmError::kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(VmError::kvm("KVM_SET_SREGS"))?;
        // SAFETY: the state is a whole `kvm_xsave` as KVM gave it, of the size this host uses,
        // since dynamically enabled features beyond 4 KiB are not offered to guests.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(VmError::kvm("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(VmError::kvm("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(VmError::kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(VmError::kvm("KVM_SET_LAPIC"))?;
        if self.tsc_khz != 0 && vcpu.get_tsc_khz().is_ok_and(|khz| khz != self.tsc_khz) {
            // Without TSC scaling this fails, and kvmclock makes up for it.
            let _ = vcpu.set_tsc_khz(self.tsc_khz);
        }
        let (deadline, rest): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .partition(|entry| entry.index == MSR_TSC_DEADLINE);
        for chunk in [rest, deadline] {
            write_msrs(vcpu, &chunk)?;
        }
        vcpu.set_vcpu_events(&self.events)
            .map_err(VmError::kvm("KVM_SET_VCPU_EVENTS"))
    }

    /// The general registers.
    pub fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    /// Segment, control and descriptor table registers.
    pub fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }
}

/// Reads all MSRs of the list that KVM lets us read; it stops at the first it refuses.
fn read_msrs(vcpu: &VcpuFd, list: &[u32]) -> Result<Vec<kvm_msr_entry>, VmError> {
    let mut out = Vec::with_capacity(list.len());
    let mut rest = list;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|e| VmError::Memory(format!("MSR list: {e:?}")))?;
        let got = vcpu
            .get_msrs(&mut msrs)
            .map_err(VmError::kvm("KVM_GET_MSRS"))?;
        out.extend_from_slice(&msrs.as_slice()[..got]);
        rest = rest.get(got + 1..).unwrap_or(&[]);
    }
    Ok(out)
}

/// Writes MSRs, passing over those KVM refuses (read-only ones are in its own list).
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs =
            Msrs::from_entries(rest).map_err(|e| VmError::Memory(format!("MSR list: {e:?}")))?;
        let done = vcpu.set_msrs(&msrs).map_err(VmError::kvm("KVM_SET_MSRS"))?;
        rest = rest.get(done + 1..).unwrap_or(&[]);
    }
    Ok(())
}
