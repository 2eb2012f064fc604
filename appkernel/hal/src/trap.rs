//! Exceptions, interrupts and system calls: the way in and out.

use core::arch::{asm, global_asm};

use crate::cpu::KERNEL_CODE;

/// Vector number in a [`Frame`] that came by `syscall`.
pub const SYSCALL: u64 = 0x100;
/// First vector of device interrupts: IOAPIC pin n is vector `IRQ_BASE + n`.
pub const IRQ_BASE: u8 = 0x20;
/// Vector of the timer.
pub const TIMER: u8 = 0x40;
/// Vector of the APIC's false alarms.
pub const SPURIOUS: u8 = 0x4f;
const VECTORS: usize = 0x50;

/// Registers of what was interrupted, as the entry code leaves them on the stack.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
#[expect(missing_docs, reason = "they are the registers of these names")]
pub struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// Vector, or [`SYSCALL`]. Anything but `SYSCALL` returns by `iretq`, with all registers.
    pub vector: u64,
    /// Error code of the exception; number of the system call.
    pub code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

impl Frame {
    /// Whether a program was interrupted, not the kernel.
    pub fn from_user(&self) -> bool {
        self.cs & 3 == 3
    }
}

// Per-CPU data through GS: 0 kernel stack, 8 the program's stack while it is exchanged. `kernel_trap`,
// `kernel_syscall` and `kernel_start_task` are the kernel's, in Rust.
global_asm!(
    r#"
    .macro PUSH_REGS
    push rdi
    push rsi
    push rdx
    push rcx
    push rax
    push r8
    push r9
    push r10
    push r11
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    .endm

    .macro POP_REGS
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    pop r11
    pop r10
    pop r9
    pop r8
    pop rax
    pop rcx
    pop rdx
    pop rsi
    pop rdi
    .endm

    .text
    .align 16
trap_common:
    test byte ptr [rsp + 24], 3
    jz 1f
    swapgs
1:  PUSH_REGS
    cld
    xor ebp, ebp
    mov rdi, rsp
    call kernel_trap
trap_return:
    cmp qword ptr [rsp + 15*8], 0x100
    jne 2f
    /* sysret with a non-canonical address would fault in the kernel, on the program's stack. */
    mov rcx, [rsp + 17*8]
    mov rax, rcx
    shr rax, 47
    jnz 2f
    POP_REGS
    mov rcx, [rsp + 16]
    mov r11, [rsp + 32]
    mov rsp, [rsp + 40]
    swapgs
    sysretq
2:  POP_REGS
    add rsp, 16
    test byte ptr [rsp + 8], 3
    jz 3f
    swapgs
3:  iretq

    /* Where a new task begins: what waits for it comes before its first instruction. */
    .align 16
task_start:
    mov rdi, rsp
    call kernel_start_task
    jmp trap_return

    .align 16
syscall_entry:
    swapgs
    mov gs:[8], rsp
    mov rsp, gs:[0]
    push 0x1b
    push gs:[8]
    push r11
    push 0x23
    push rcx
    push rax
    push 0x100
    PUSH_REGS
    xor ebp, ebp
    mov rdi, rsp
    call kernel_syscall
    jmp trap_return

    .align 16
trap_stubs:
    .set vector, 0
    .rept 0x50
    .align 16
    .if (vector == 8) || (vector == 10) || (vector == 11) || (vector == 12) || (vector == 13) || (vector == 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push 0
    .endif
    push vector
    jmp trap_common
    .set vector, vector + 1
    .endr
"#
);

unsafe extern "C" {
    fn syscall_entry();
    fn trap_stubs();
    fn task_start();
}

pub(crate) fn syscall_entry_address() -> u64 {
    syscall_entry as *const () as u64
}

pub(crate) fn task_start_address() -> u64 {
    task_start as *const () as u64
}

static mut IDT: [[u64; 2]; VECTORS] = [[0; 2]; VECTORS];

/// Loads the interrupt table.
pub fn init() {
    let base = trap_stubs as *const () as u64;
    for vector in 0..VECTORS as u64 {
        let address = base + vector * 16;
        // NMI, double fault and machine check get a stack of their own: the kernel's may be the
        // problem. Breakpoint and overflow may be raised by programs.
        let ist = u64::from(matches!(vector, 2 | 8 | 18));
        let privilege: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = address & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | ist << 32
            | (0x8e | privilege << 5) << 40
            | (address >> 16 & 0xffff) << 48;
        // SAFETY: the index is below the table's length; one CPU at boot.
        unsafe {
            (&raw mut IDT)
                .cast::<[u64; 2]>()
                .add(vector as usize)
                .write([low, address >> 32]);
        }
    }
    let mut pointer = [0u8; 10];
    let (limit, at) = pointer.split_at_mut(2);
    limit.copy_from_slice(&((VECTORS * 16 - 1) as u16).to_le_bytes());
    at.copy_from_slice(&((&raw const IDT) as u64).to_le_bytes());
    // SAFETY: the table is complete and lives for ever.
    unsafe { asm!("lidt [{}]", in(reg) pointer.as_ptr(), options(nostack)) };
}

unsafe extern "C" {
    static extable_start: [u64; 2];
    static extable_end: [u64; 2];
}

/// Where to go on if the kernel's instruction at `rip` faults: only copies from and to programs
/// have such a place.
pub fn fixup(rip: u64) -> Option<u64> {
    let start = &raw const extable_start;
    let count = ((&raw const extable_end) as usize - start as usize) / 16;
    // SAFETY: the linker collects pairs of addresses between the two symbols.
    let table = unsafe { core::slice::from_raw_parts(start, count) };
    table.iter().find(|[at, _]| *at == rip).map(|[_, to]| *to)
}
