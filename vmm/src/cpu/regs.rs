//! Registers of a vCPU before its first instruction.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::boot::{Entry, LINUX64_GDT};
use crate::error::VmError;
use crate::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_IA32_MISC_ENABLE: u32 = 0x1A0;
const MSR_IA32_MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
/// MTRRs enabled, everything write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 7 << 8;
const APIC_MODE_NMI: u32 = 4 << 8;

/// Sets up the vCPU that boots the guest. The others wait for its start-up interrupt in the state
/// KVM gives them.
pub(crate) fn set_boot_state(vcpu: &VcpuFd, entry: Entry) -> Result<(), VmError> {
    let mut sregs = vcpu.get_sregs().map_err(VmError::kvm("KVM_GET_SREGS"))?;
    let mut regs = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    match entry {
        Entry::Pvh { address } => {
            let code = flat_segment(0x08, 0xB, false);
            let data = flat_segment(0x10, 0x3, false);
            sregs.cs = code;
            for segment in [
                &mut sregs.ds,
                &mut sregs.es,
                &mut sregs.fs,
                &mut sregs.gs,
                &mut sregs.ss,
            ] {
                *segment = data;
            }
            sregs.tr = tss_segment();
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            regs.rip = address;
            regs.rbx = layout::PVH_INFO_ADDR;
        }
        Entry::Linux64 { address } => {
            sregs.cs = flat_segment(0x10, 0xB, true);
            let data = flat_segment(0x18, 0x3, false);
            for segment in [
                &mut sregs.ds,
                &mut sregs.es,
                &mut sregs.fs,
                &mut sregs.gs,
                &mut sregs.ss,
            ] {
                *segment = data;
            }
            sregs.tr = tss_segment();
            sregs.gdt.base = layout::GDT_ADDR;
            sregs.gdt.limit = (LINUX64_GDT.len() * 8 - 1) as u16;
            sregs.idt.base = 0;
            sregs.idt.limit = 0;
            sregs.cr3 = layout::PML4_ADDR;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = address;
            regs.rsi = layout::ZERO_PAGE_ADDR;
            regs.rsp = layout::BOOT_STACK_ADDR;
            regs.rbp = layout::BOOT_STACK_ADDR;
        }
    }
    vcpu.set_sregs(&sregs)
        .map_err(VmError::kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(VmError::kvm("KVM_SET_REGS"))
}

/// What every vCPU needs besides its boot state: MSRs and the LAPIC's local interrupts.
pub(crate) fn set_common_state(vcpu: &VcpuFd) -> Result<(), VmError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let wanted = [
        entry(MSR_IA32_MISC_ENABLE, MSR_IA32_MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ];
    let msrs =
        Msrs::from_entries(&wanted).map_err(|e| VmError::Memory(format!("MSR list: {e:?}")))?;
    // KVM says how many it took; one it does not know (on another vendor's CPU) is not an error.
    vcpu.set_msrs(&msrs).map_err(VmError::kvm("KVM_SET_MSRS"))?;

    let mut lapic = vcpu.get_lapic().map_err(VmError::kvm("KVM_GET_LAPIC"))?;
    for (register, mode) in [
        (APIC_LVT_LINT0, APIC_MODE_EXTINT),
        (APIC_LVT_LINT1, APIC_MODE_NMI),
    ] {
        for (slot, byte) in lapic.regs[register..register + 4]
            .iter_mut()
            .zip(mode.to_le_bytes())
        {
            *slot = byte as _;
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(VmError::kvm("KVM_SET_LAPIC"))
}

/// A segment over all of memory. `kind`: 0xB code, 0x3 data.
fn flat_segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn tss_segment() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0x67,
        selector: 0x20,
        type_: 0xB,
        present: 1,
        ..Default::default()
    }
}
