//! What the guest's CPUs say of themselves: KVM's list with our topology.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// ECX bit 24 of leaf 1: the LAPIC timer takes TSC deadlines.
const TSC_DEADLINE: u32 = 1 << 24;
/// ECX bit 31 of leaf 1: running under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// ECX bit 3 of leaf 1: MONITOR/MWAIT, which would hold a host CPU.
const MONITOR: u32 = 1 << 3;

/// EBX bit 1 of leaf 7: the TSC_ADJUST MSR.
const TSC_ADJUST: u32 = 1 << 1;

/// Bits of an APIC id that number the vCPUs of one package.
fn id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

/// The CPUID table of vCPU `index` of `vcpus`: one package, one thread per core.
pub(crate) fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let (id, count, bits) = (u32::from(index), u32::from(vcpus), id_bits(vcpus));
    // The extended topology leaves are written whole below.
    cpuid.retain(|e| e.function != 0xB && e.function != 0x1F);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                // Initial APIC id, logical processors in the package, CLFLUSH size kept.
                entry.ebx = (entry.ebx & 0x0000_FFFF) | (id << 24) | (count.min(255) << 16);
                entry.ecx = (entry.ecx | HYPERVISOR) & !MONITOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                // Bit 28 (HTT): the count above is meaningful.
                if count > 1 {
                    entry.edx |= 1 << 28;
                } else {
                    entry.edx &= !(1 << 28);
                }
            }
            // Deterministic cache parameters: cores of the package, and who shares each cache.
            4 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << bits) - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3FFF) | (sharing << 14) | (((1 << bits) - 1) << 26);
            }
            // TSC_ADJUST is not offered: a guest that has it reads it once a second to see
            // whether firmware changed it, an exit each time.
            7 if entry.index == 0 => entry.ebx &= !TSC_ADJUST,
            // Performance monitoring is not offered: its MSRs are not saved.
            0xA => {
                entry.eax = 0;
                entry.ebx = 0;
                entry.ecx = 0;
                entry.edx = 0;
            }
            0x8000_0008 => {
                entry.ecx = (entry.ecx & !0xFFFF) | (bits << 12) | (count - 1);
            }
            0x8000_001D => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3FFF) | (sharing << 14);
            }
            // AMD: extended APIC id, one thread per core, one node.
            0x8000_001E => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    let leaf = |function, index, eax, ebx, ecx| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx: id,
        ..Default::default()
    };
    let highest = cpuid
        .as_slice()
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    for function in [0xB, 0x1F] {
        if function > highest {
            continue;
        }
        // Level 0: threads of a core (1); level 1: cores of the package; level 2: end.
        for entry in [
            leaf(function, 0, 0, 1, 0x100),
            leaf(function, 1, bits, count, 0x201),
            leaf(function, 2, 0, 0, 2),
        ] {
            // Full table: KVM's list is far below the limit of 256 entries.
            let _ = cpuid.push(entry);
        }
    }
    cpuid
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        }
    }

    #[test]
    fn topology_is_one_package_of_single_thread_cores() {
        let base = CpuId::from_entries(&[
            entry(0, 0, 0x1F),
            entry(1, 0, 0),
            entry(4, 3, 3 << 5),
            entry(0xB, 0, 99),
            entry(0x8000_0008, 0, 0),
        ])
        .unwrap();
        let cpuid = for_vcpu(&base, 5, 6, true);
        let get = |function, index| {
            *cpuid
                .as_slice()
                .iter()
                .find(|e| e.function == function && e.index == index)
                .unwrap()
        };
        assert_eq!(get(1, 0).ebx >> 24, 5);
        assert_eq!(get(1, 0).ebx >> 16 & 0xFF, 6);
        assert_ne!(get(1, 0).ecx & TSC_DEADLINE, 0);
        assert_eq!(get(0xB, 1).eax, 3);
        assert_eq!(get(0xB, 1).ebx, 6);
        assert_eq!(get(0xB, 0).edx, 5);
        assert_eq!(get(4, 3).eax >> 26, 7);
        assert_eq!(get(0x8000_0008, 0).ecx & 0xFF, 5);
    }
}
