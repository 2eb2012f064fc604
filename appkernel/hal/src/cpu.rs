//! Registers, ports, descriptor tables.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

/// Selector of the kernel's code.
pub const KERNEL_CODE: u16 = 0x08;
/// Selector of programs' data.
pub const USER_DATA: u16 = 0x1b;
/// Selector of programs' code.
pub const USER_CODE: u16 = 0x23;
const TSS_SELECTOR: u16 = 0x28;

const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_UMIP: u64 = 1 << 11;

/// Model-specific registers in use.
pub mod msr {
    /// `syscall`: selectors.
    pub const STAR: u32 = 0xc000_0081;
    /// `syscall`: entry point.
    pub const LSTAR: u32 = 0xc000_0082;
    /// `syscall`: flags to clear.
    pub const SFMASK: u32 = 0xc000_0084;
    /// Base of FS.
    pub const FS_BASE: u32 = 0xc000_0100;
    /// Base of GS.
    pub const GS_BASE: u32 = 0xc000_0101;
    /// The other base of GS, which `swapgs` exchanges.
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    /// Local APIC's address and enable bit.
    pub const APIC_BASE: u32 = 0x1b;
}

/// Writes a byte to a port.
///
/// # Safety
/// What the device behind the port does must not break memory safety.
pub unsafe fn outb(port: u16, value: u8) {
    // SAFETY: the caller's.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
}

/// Reads a byte from a port.
///
/// # Safety
/// As for [`outb`].
pub unsafe fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: the caller's.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must exist and the value keep the kernel's assumptions.
pub unsafe fn wrmsr(register: u32, value: u64) {
    // SAFETY: the caller's.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// Reads a model-specific register.
///
/// # Safety
/// The register must exist.
pub unsafe fn rdmsr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Address of the last page fault.
pub fn read_cr2() -> u64 {
    let value: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// The page table in use.
pub fn read_cr3() -> u64 {
    let value: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Uses another page table.
///
/// # Safety
/// Its upper half must be the kernel's.
pub unsafe fn write_cr3(value: u64) {
    // SAFETY: the caller's.
    unsafe { asm!("mov cr3, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// Forgets what the CPU knows of the page at `address`.
pub fn invalidate(address: u64) {
    // SAFETY: only makes the CPU look again.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// Forgets what the CPU knows of all pages of programs.
pub fn forget_programs() {
    // SAFETY: the table in use is loaded again. The kernel's own entries are not marked global, but
    // they never change.
    unsafe { write_cr3(read_cr3()) };
}

/// Time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: exists on every x86-64.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Waits for the next interrupt and takes it.
pub fn idle() {
    // SAFETY: the handlers save what they change; the instruction after `sti` runs before an
    // interrupt does, so none is slept through.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Takes the interrupts that wait, in the middle of what the kernel does.
pub fn take_interrupts() {
    // SAFETY: as for `idle`; those that wait come after the instruction that follows `sti`.
    unsafe { asm!("sti", "nop", "cli", options(nostack)) };
}

/// Resets the machine: keyboard controller first, a triple fault if nobody answers.
pub fn reset() -> ! {
    // SAFETY: nothing runs after it.
    unsafe {
        outb(0x64, 0xfe);
        for _ in 0..1_000_000 {
            core::hint::spin_loop();
        }
        let nothing = [0u16; 5];
        asm!("lidt [{}]", "int3", in(reg) &raw const nothing, options(noreturn));
    }
}

/// Marks a point of the boot in the VMM's timeline (its debug port; nothing elsewhere).
pub fn boot_mark(mark: u8) {
    // SAFETY: a port that only records.
    unsafe { outb(0x3f0, mark) };
}

#[repr(C, packed)]
struct Tss {
    reserved0: u32,
    rsp: [u64; 3],
    reserved1: u64,
    ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    io_map: u16,
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// What the entry code finds through GS; offsets are in `trap`.
#[repr(C)]
struct PerCpu {
    kernel_stack: u64,
    user_stack: u64,
}

const FAULT_STACK: usize = 16384;
#[repr(C, align(16))]
struct FaultStack([u8; FAULT_STACK]);

static mut TSS: Tss = Tss {
    reserved0: 0,
    rsp: [0; 3],
    reserved1: 0,
    ist: [0; 7],
    reserved2: 0,
    reserved3: 0,
    io_map: size_of::<Tss>() as u16,
};
static mut GDT: [u64; 7] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
];
static mut PER_CPU: PerCpu = PerCpu {
    kernel_stack: 0,
    user_stack: 0,
};
static mut DOUBLE_FAULT_STACK: FaultStack = FaultStack([0; FAULT_STACK]);

/// Loads descriptor tables and the registers for system calls, and switches protections on.
pub fn init() {
    let tss = (&raw const TSS) as u64;
    let fault_stack = (&raw const DOUBLE_FAULT_STACK) as u64 + FAULT_STACK as u64;
    // SAFETY: called once at boot on the only CPU, before anything uses the tables. The selectors
    // name descriptors of the table just loaded; the code selector is the one in use already.
    unsafe {
        (&raw mut TSS.ist)
            .cast::<u64>()
            .write_unaligned(fault_stack);
        let limit = size_of::<Tss>() as u64 - 1;
        let low = limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
        let gdt = (&raw mut GDT).cast::<u64>();
        gdt.add(5).write(low);
        gdt.add(6).write(tss >> 32);
        let pointer = Pointer {
            limit: (size_of::<[u64; 7]>() - 1) as u16,
            base: gdt as u64,
        };
        asm!("lgdt [{}]", in(reg) &raw const pointer, options(nostack));
        asm!("ltr {:x}", in(reg) TSS_SELECTOR, options(nostack));
        // Null data segments: long mode does not use them, `iretq` to programs clears them anyway.
        asm!("mov ds, {0:e}", "mov es, {0:e}", "mov fs, {0:e}", "mov gs, {0:e}", in(reg) 0, options(nostack));
        wrmsr(msr::GS_BASE, (&raw const PER_CPU) as u64);
        wrmsr(msr::KERNEL_GS_BASE, 0);
        // syscall: kernel code and the data after it; sysret: programs' data, then code.
        wrmsr(
            msr::STAR,
            u64::from(KERNEL_CODE) << 32 | u64::from(KERNEL_CODE + 8) << 48,
        );
        wrmsr(msr::LSTAR, crate::trap::syscall_entry_address());
        // Trap, interrupt, direction, IOPL, nested task and alignment flags off in the kernel.
        wrmsr(msr::SFMASK, 0x4_7700);
    }
    protections();
}

fn protections() {
    let leaf7 = __cpuid_count(7, 0);
    let leaf1 = __cpuid_count(1, 0);
    let mut cr4: u64;
    // SAFETY: only bits whose feature the CPU announces are set. User copies lift SMAP's
    // protection where they mean to.
    unsafe {
        asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack));
        if leaf7.ebx & 1 << 7 != 0 {
            cr4 |= CR4_SMEP;
        }
        if leaf7.ebx & 1 << 20 != 0 {
            cr4 |= CR4_SMAP;
            crate::usercopy::use_smap();
        }
        if leaf7.ecx & 1 << 2 != 0 {
            cr4 |= CR4_UMIP;
        }
        let xsave = leaf1.ecx & 1 << 26 != 0;
        if xsave {
            cr4 |= CR4_OSXSAVE;
        }
        asm!("mov cr4, {}", in(reg) cr4, options(nostack));
        if xsave {
            // x87, SSE, AVX.
            let wanted = __cpuid_count(0xd, 0).eax & 7;
            asm!("xsetbv", in("ecx") 0, in("eax") wanted, in("edx") 0, options(nostack));
            crate::context::use_xsave(wanted);
        }
    }
}

/// Where traps from programs find their stack.
pub fn set_kernel_stack(top: u64) {
    // SAFETY: one CPU, interrupts off: nobody reads them meanwhile.
    unsafe {
        (&raw mut PER_CPU.kernel_stack).write(top);
        (&raw mut TSS.rsp).cast::<u64>().write_unaligned(top);
    }
}

/// Fills the bytes from the CPU's random number generator, or, where there is none, from a mix of
/// its time stamps, which is no secret from the host.
pub fn random(bytes: &mut [u8]) {
    let has = __cpuid_count(1, 0).ecx & 1 << 30 != 0;
    let mut state = tsc() ^ 0x9e37_79b9_7f4a_7c15;
    for chunk in bytes.chunks_mut(8) {
        let mut word = 0u64;
        let mut good = 0u8;
        if has {
            for _ in 0..16 {
                // SAFETY: the CPU announces the instruction.
                unsafe {
                    asm!("rdrand {}", "setc {}", out(reg) word, out(reg_byte) good, options(nomem, nostack))
                };
                if good != 0 {
                    break;
                }
            }
        }
        if good == 0 {
            state = state.rotate_left(17).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ tsc();
            word = state ^ state >> 31;
        }
        for (to, from) in chunk.iter_mut().zip(word.to_le_bytes()) {
            *to = from;
        }
    }
}
