//! The functions of the vDSO: they run in programs, and tell the time from KVM's clock page, which
//! programs have before their copy of the code (`appkernel_core::vdso::CODE_AT`).

use core::arch::global_asm;

use appkernel_core::vdso::Function;

// The page of data lies right before the image, and the code at 0x800 in it. In the page: KVM's clock
// at 0 (version, time stamp, time, factor, shift), nanoseconds from there to the day's time at 128,
// and at 136 whether there is such a clock; without it the kernel is asked. Registers are those that a
// function may change. The version is odd while KVM changes the clock, and another one afterwards.
global_asm!(
    r#"
    .section .rodata.vdso, "a"
    .balign 16
vdso_code_start:

    .macro VDSO_NS otherwise
    lea r8, [rip + vdso_code_start - 0x1800]
    cmp dword ptr [r8 + 136], 0
    je \otherwise
80: mov r9d, [r8]
    test r9d, 1
    jnz 84f
    lfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [r8 + 8]
    jae 81f
    xor eax, eax
81: mov r10, [r8 + 16]
    mov cl, [r8 + 28]
    test cl, cl
    js 82f
    shl rax, cl
    jmp 83f
82: neg cl
    shr rax, cl
83: mov edx, [r8 + 24]
    mul rdx
    shrd rax, rdx, 32
    add rax, r10
    cmp r9d, [r8]
    je 85f
84: pause
    jmp 80b
85:
    .endm

    .macro VDSO_DIVIDE by
    xor edx, edx
    mov ecx, \by
    div rcx
    .endm

    /* clock_gettime(clock, time): 0, 5 and 11 are the day's time; 1, 4, 6 and 7 count from the start */
    .org vdso_code_start
    cmp edi, 11
    ja 5f
    mov eax, 0x8f3
    bt eax, edi
    jnc 5f
    VDSO_NS 5f
    mov ecx, 0x821
    bt ecx, edi
    jnc 6f
    add rax, [r8 + 128]
6:  VDSO_DIVIDE 1000000000
    mov [rsi], rax
    mov [rsi + 8], rdx
    xor eax, eax
    ret
5:  mov eax, 228
    syscall
    ret

    /* gettimeofday(time, zone) */
    .org vdso_code_start + 0x100
    test rsi, rsi
    jz 5f
    mov qword ptr [rsi], 0
5:  test rdi, rdi
    jz 6f
    VDSO_NS 7f
    add rax, [r8 + 128]
    VDSO_DIVIDE 1000000000
    mov [rdi], rax
    mov rax, rdx
    VDSO_DIVIDE 1000
    mov [rdi + 8], rax
6:  xor eax, eax
    ret
7:  mov eax, 96
    syscall
    ret

    /* time(time) */
    .org vdso_code_start + 0x200
    VDSO_NS 6f
    add rax, [r8 + 128]
    VDSO_DIVIDE 1000000000
    test rdi, rdi
    jz 5f
    mov [rdi], rax
5:  ret
6:  mov eax, 201
    syscall
    ret

    /* getcpu(cpu, node): there is one */
    .org vdso_code_start + 0x2c0
    xor eax, eax
    test rdi, rdi
    jz 5f
    mov [rdi], eax
5:  test rsi, rsi
    jz 6f
    mov [rsi], eax
6:  ret

    /* clock_getres(clock, time) */
    .org vdso_code_start + 0x2e0
    mov eax, 229
    syscall
    ret
    .org vdso_code_start + 0x300
vdso_code_end:
    .text
"#
);

unsafe extern "C" {
    static vdso_code_start: u8;
    static vdso_code_end: u8;
}

/// Where each function is in the code.
pub const FUNCTIONS: [Function; 5] = [
    function("clock_gettime", 0, 0x100),
    function("gettimeofday", 0x100, 0x200),
    function("time", 0x200, 0x2c0),
    function("getcpu", 0x2c0, 0x2e0),
    function("clock_getres", 0x2e0, 0x300),
];

const fn function(name: &'static str, start: usize, end: usize) -> Function {
    Function { name, start, end }
}

/// The code of all of them.
pub fn code() -> &'static [u8] {
    let start = &raw const vdso_code_start;
    let len = (&raw const vdso_code_end) as usize - start as usize;
    // SAFETY: the bytes between the two symbols are constants of the kernel's image.
    unsafe { core::slice::from_raw_parts(start, len) }
}
