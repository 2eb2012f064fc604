//! Entry by Xen's PVH protocol (32-bit protected mode, paging off), first page tables, and what the
//! loader says about the machine.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::direct;

// PVH: EBX holds the physical address of the start info. The tables map the first 4 GiB (`map_upper`
// adds to that) by 2 MiB pages: at their own addresses (until `drop_identity_map`), at DIRECT_MAP, and
// the first GiB at KERNEL_OFFSET.
global_asm!(
    r#"
    .set KOFF, 0xffffffff80000000
    .section .note.pvh, "a", @note
    .align 4
    .long 4
    .long 8
    .long 18
    .asciz "Xen"
    .quad pvh_entry - KOFF

    .section .text.boot, "ax"
    .code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    movl %ebx, %ebp
    movl $(boot_pd - KOFF), %edi
    movl $0x83, %eax
    xorl %ecx, %ecx
1:  movl %eax, (%edi,%ecx,8)
    movl $0, 4(%edi,%ecx,8)
    addl $0x200000, %eax
    incl %ecx
    cmpl $2048, %ecx
    jne 1b
    movl $(boot_pdpt - KOFF), %edi
    movl $(boot_pd - KOFF + 3), %eax
    movl %eax, (%edi)
    addl $0x1000, %eax
    movl %eax, 8(%edi)
    addl $0x1000, %eax
    movl %eax, 16(%edi)
    addl $0x1000, %eax
    movl %eax, 24(%edi)
    movl $(boot_pdpt_kernel - KOFF), %edi
    movl $(boot_pd - KOFF + 3), %eax
    movl %eax, 4080(%edi)
    movl $(boot_pml4 - KOFF), %edi
    movl $(boot_pdpt - KOFF + 3), %eax
    movl %eax, (%edi)
    movl %eax, 2048(%edi)
    movl $(boot_pdpt_kernel - KOFF + 3), %eax
    movl %eax, 4088(%edi)
    movl %edi, %cr3
    movl $0x6a0, %eax          /* PAE, PGE, OSFXSR, OSXMMEXCPT */
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x901, %eax           /* SCE, LME, NXE */
    wrmsr
    movl $0x80010033, %eax     /* PG, WP, NE, ET, MP, PE */
    movl %eax, %cr0
    lgdt (boot_gdt_pointer - KOFF)
    ljmp $0x08, $(boot_long - KOFF)
    .code64
boot_long:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movabsq $boot_stack_top, %rsp
    movl %ebp, %edi
    xorl %ebp, %ebp
    movabsq $kernel_main, %rax
    pushq $0
    jmp *%rax

    .align 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
boot_gdt_pointer:
    .word 23
    .long boot_gdt - KOFF

    .section .bss, "aw", @nobits
    .align 4096
    .globl boot_pml4
boot_pml4: .skip 4096
    .globl boot_pdpt
boot_pdpt: .skip 4096
boot_pdpt_kernel: .skip 4096
boot_pd: .skip 16384
boot_stack: .skip 65536
boot_stack_top:
    .text
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static mut boot_pml4: [u64; 512];
    static mut boot_pdpt: [u64; 512];
    static kernel_end: u8;
    static kernel_start: u8;
}

/// Physical range of the kernel itself.
pub fn kernel_range() -> (u64, u64) {
    let start = (&raw const kernel_start) as u64 - crate::KERNEL_OFFSET;
    let end = (&raw const kernel_end) as u64 - crate::KERNEL_OFFSET;
    (start, end)
}

/// The tables from the start map memory up to here.
pub const FIRST_MAPPED_END: u64 = 1 << 32;
/// Memory above cannot be mapped at [`crate::DIRECT_MAP`]: one table of the upper half reaches so far.
pub const MAPPED_END: u64 = 1 << 39;

/// Maps the memory of `ram` that lies above the first 4 GiB, by 2 MiB pages. `next` is the address of
/// memory that nobody uses, below 4 GiB; returns what is left of it. Each GiB takes one page.
pub(crate) fn map_upper(ram: &[Range], mut next: u64) -> u64 {
    const GIB: u64 = 1 << 30;
    const LARGE: u64 = 2 << 20;
    /// Present, writable, a page of 2 MiB, not executable.
    const FLAGS: u64 = 1 | 2 | 1 << 7 | 1 << 63;
    for gib in FIRST_MAPPED_END / GIB..MAPPED_END / GIB {
        let (from, to) = (gib * GIB, (gib + 1) * GIB);
        if !ram.iter().any(|(start, end)| *start < to && from < *end) {
            continue;
        }
        // SAFETY: the page is nobody's, and mapped; the table of the upper half is the kernel's own, and
        // nothing was mapped there, so that nothing of it is in a TLB.
        unsafe {
            let table = direct(next).cast::<u64>();
            for i in 0..512 {
                table.add(i).write((from + i as u64 * LARGE) | FLAGS);
            }
            let slot = (&raw mut boot_pdpt).cast::<u64>().add(gib as usize);
            slot.write_volatile(next | 1 | 2);
        }
        next += crate::PAGE;
    }
    next
}

static PML4_PHYSICAL: AtomicU64 = AtomicU64::new(0);

/// Physical address of the kernel's own page table, whose upper half all others share.
pub fn kernel_pml4() -> u64 {
    PML4_PHYSICAL.load(Ordering::Relaxed)
}

/// Takes the lower half out of the kernel's page table: from here a null pointer faults.
pub fn drop_identity_map() {
    let address = (&raw const boot_pml4) as u64 - crate::KERNEL_OFFSET;
    PML4_PHYSICAL.store(address, Ordering::Relaxed);
    // SAFETY: the table is the kernel's own and nothing uses addresses of the lower half any more:
    // code, stack and data are in the upper half since `boot_long`.
    unsafe {
        (&raw mut boot_pml4).cast::<u64>().write_volatile(0);
        crate::cpu::write_cr3(address);
    }
}

/// A range of usable memory (start, end), physical.
pub type Range = (u64, u64);

/// What the loader says.
#[derive(Debug)]
pub struct Info {
    /// Usable memory.
    pub ram: [Range; 8],
    /// Command line.
    pub cmdline: &'static str,
}

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

fn read<T: Copy>(physical: u64) -> T {
    // SAFETY: the loader's structures are plain numbers in the first 4 GiB, which are mapped; they
    // are read before any frame is given out.
    unsafe { direct(physical).cast::<T>().read_unaligned() }
}

/// Reads the start info at physical address `start`.
///
/// # Errors
/// When it is not one.
pub fn info(start: u64) -> Result<Info, &'static str> {
    if read::<u32>(start) != MAGIC {
        return Err("the loader gave no PVH start info: boot by the PVH protocol");
    }
    if read::<u32>(start + 4) < 1 {
        return Err("the PVH start info has no memory map: version 1 is needed");
    }
    let (cmdline, map, count) = (
        read::<u64>(start + 24),
        read::<u64>(start + 40),
        read::<u32>(start + 48),
    );
    let mut ram = [(0, 0); 8];
    let usable = (0..u64::from(count.min(128)))
        .map(|i| map + i * 24)
        .filter(|at| read::<u32>(at + 16) == RAM)
        .map(|at| {
            let address = read::<u64>(at);
            (address, address.saturating_add(read::<u64>(at + 8)))
        });
    for (slot, range) in ram.iter_mut().zip(usable) {
        *slot = range;
    }
    let mut len = 0;
    while cmdline != 0 && len < 4096 && read::<u8>(cmdline + len) != 0 {
        len += 1;
    }
    let bytes = if len == 0 {
        &[]
    } else {
        // SAFETY: just read to its end; it lies below the frames that are given out (`frames`
        // takes none below 1 MiB, where loaders put it).
        unsafe { core::slice::from_raw_parts(direct(cmdline), len as usize) }
    };
    Ok(Info {
        ram,
        cmdline: core::str::from_utf8(bytes).unwrap_or(""),
    })
}
