//! Switching between tasks: kernel stacks, and the registers of FPU and vector units, which the
//! kernel itself never uses.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

use crate::trap::{Frame, task_start_address};
use crate::{cpu, direct};

/// Pages of a program's kernel stack: `1 << STACK_ORDER`.
pub const STACK_ORDER: usize = 2;
/// Of the kernel's own threads: they decode what the host sends, which nests.
const THREAD_STACK_ORDER: usize = 5;

/// What the lowest word of a stack holds.
const STACK_END: u64 = 0x5354_4143_4b5f_454e;

/// Bytes of the vector registers: x87 and SSE, header, upper halves of AVX.
const AREA: usize = 512 + 64 + 256;

/// Features whose state XSAVE keeps; 0 without XSAVE.
static XSAVE: AtomicU64 = AtomicU64::new(0);

pub(crate) fn use_xsave(features: u32) {
    XSAVE.store(features.into(), Ordering::Relaxed);
}

global_asm!(
    r#"
    .text
    .align 16
context_switch:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rdi], rsp
    mov rsp, rsi
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"#
);

unsafe extern "C" {
    fn context_switch(save: *mut u64, load: u64);
}

/// What a task needs to go on: its kernel stack and its vector registers.
#[derive(Debug)]
pub struct Context {
    stack: u64,
    order: usize,
    vectors: u64,
    pointer: u64,
    /// Base of FS (thread-local storage).
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
}

impl Context {
    /// A task that starts by returning to `frame`; `None` when there is no memory.
    pub fn new(frame: Frame) -> Option<Self> {
        if crate::frames::is_scarce() {
            return None;
        }
        Self::with_stack(frame, STACK_ORDER)
    }

    /// A thread of the kernel that starts with `entry`, which must never return.
    pub fn kernel_thread(entry: extern "C" fn() -> !) -> Option<Self> {
        let frame = Frame {
            rip: entry as *const () as u64,
            cs: cpu::KERNEL_CODE.into(),
            ss: (cpu::KERNEL_CODE + 8).into(),
            rflags: 2,
            ..Frame::default()
        };
        let mut context = Self::with_stack(frame, THREAD_STACK_ORDER)?;
        // Below the frame, and as after a call.
        let rsp = context.stack_top() - size_of::<Frame>() as u64 - 8;
        context.start_at(Frame { rsp, ..frame });
        Some(context)
    }

    fn with_stack(frame: Frame, order: usize) -> Option<Self> {
        let stack = crate::heap::frames_in_need(order)?;
        let Some(vectors) = crate::frames::allocate_zeroed() else {
            crate::frames::release(stack, order);
            return None;
        };
        // The initial state: x87 and SSE control words as Linux starts programs. The header of an
        // extended area says that nothing else is in it.
        // SAFETY: the page is ours and large enough.
        unsafe {
            let area = direct(vectors);
            area.cast::<u16>().write(0x37f);
            area.add(24).cast::<u32>().write(0x1f80);
            area.add(512).cast::<u64>().write(3);
        }
        // SAFETY: the stack is ours and not in use; it is far larger than a word.
        unsafe { direct(stack).cast::<u64>().write(STACK_END) };
        let mut context = Self {
            stack,
            order,
            vectors,
            pointer: 0,
            fs_base: 0,
            gs_base: 0,
        };
        context.start_at(frame);
        Some(context)
    }

    fn start_at(&mut self, frame: Frame) {
        let top = self.stack_top();
        let frame_at = top - size_of::<Frame>() as u64;
        let pointer = frame_at - 7 * 8;
        // SAFETY: the stack is ours and not in use: six saved registers, the return address, the
        // frame.
        unsafe {
            crate::kernel_pointer::<Frame>(frame_at).write(frame);
            let words = crate::kernel_pointer::<u64>(pointer);
            for i in 0..6 {
                words.add(i).write(0);
            }
            words.add(6).write(task_start_address());
        }
        self.pointer = pointer;
    }

    /// Whether the lowest word of the stack is as it was: below it lies somebody else's memory.
    fn is_whole(&self) -> bool {
        // SAFETY: the stack is ours and mapped.
        unsafe { direct(self.stack).cast::<u64>().read_volatile() == STACK_END }
    }

    /// Top of the kernel stack (virtual).
    pub fn stack_top(&self) -> u64 {
        self.stack + crate::DIRECT_MAP + (crate::PAGE << self.order)
    }

    /// Registers of the program, while the task is in a system call or trap from it.
    pub fn frame(&self) -> *mut Frame {
        crate::kernel_pointer(self.stack_top() - size_of::<Frame>() as u64)
    }

    /// Gives the vector registers their initial values, for a new program.
    pub fn reset_vectors(&mut self) {
        // SAFETY: the page is the context's own.
        unsafe {
            let area = direct(self.vectors);
            area.write_bytes(0, 4096);
            area.cast::<u16>().write(0x37f);
            area.add(24).cast::<u32>().write(0x1f80);
            area.add(512).cast::<u64>().write(3);
            self.load_vectors();
        }
    }

    /// Saves the CPU's vector registers here (of the running task, before they are copied).
    pub fn save_vectors(&self) {
        // SAFETY: the area is a page, aligned, and larger than the state of the enabled features.
        unsafe {
            let area = direct(self.vectors);
            if XSAVE.load(Ordering::Relaxed) != 0 {
                asm!("xsave64 [{}]", in(reg) area, in("eax") 7, in("edx") 0, options(nostack));
            } else {
                asm!("fxsave64 [{}]", in(reg) area, options(nostack));
            }
        }
    }

    /// Loads the vector registers saved here.
    ///
    /// # Safety
    /// The kernel must not use them, which it does not (soft float).
    unsafe fn load_vectors(&self) {
        // SAFETY: as for saving; the area was saved by the CPU or made by `new`.
        unsafe {
            let area = direct(self.vectors);
            if XSAVE.load(Ordering::Relaxed) != 0 {
                asm!("xrstor64 [{}]", in(reg) area, in("eax") 7, in("edx") 0, options(nostack));
            } else {
                asm!("fxrstor64 [{}]", in(reg) area, options(nostack));
            }
        }
    }

    /// Takes over the vector registers saved in `other`.
    pub fn copy_vectors(&mut self, other: &Self) {
        // SAFETY: two different pages of ours.
        unsafe { direct(self.vectors).copy_from_nonoverlapping(direct(other.vectors), 4096) };
    }

    /// The running program's vector registers as bytes: for its stack while a handler runs.
    pub fn read_vectors(&self) -> alloc::vec::Vec<u8> {
        self.save_vectors();
        // SAFETY: the page is ours, saved just now.
        unsafe { core::slice::from_raw_parts(direct(self.vectors), AREA) }.to_vec()
    }

    /// Takes the running program's vector registers from its stack. It may have written anything
    /// there: what the CPU would refuse is cleared first.
    pub fn write_vectors(&mut self, bytes: &[u8]) {
        if bytes.len() != AREA {
            return;
        }
        // SAFETY: the page is ours and larger than AREA. MXCSR's reserved bits, and everything of
        // the extended header but the bits of enabled features, are zero then: the load cannot
        // fault.
        unsafe {
            let area = direct(self.vectors);
            area.copy_from_nonoverlapping(bytes.as_ptr(), AREA);
            let control = area.add(24).cast::<u32>();
            control.write(control.read() & 0xffbf);
            let features = area.add(512).cast::<u64>();
            features.write(features.read() & XSAVE.load(Ordering::Relaxed));
            area.add(520).write_bytes(0, 56);
            self.load_vectors();
        }
    }

    /// Sets the bases of FS and GS of the running program.
    pub fn load_bases(&self) {
        // SAFETY: in the kernel the program's GS base is in the exchanged register; both values
        // are checked to be canonical where they are set.
        unsafe {
            cpu::wrmsr(cpu::msr::FS_BASE, self.fs_base);
            cpu::wrmsr(cpu::msr::KERNEL_GS_BASE, self.gs_base);
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        crate::frames::release(self.stack, self.order);
        crate::frames::release(self.vectors, 0);
    }
}

/// Goes on with `next`; returns when somebody goes on with `previous`.
///
/// # Safety
/// Both must stay where they are until then, and `previous` be the running one. No lock is held.
pub unsafe fn switch(previous: *mut Context, next: *const Context, page_table: u64) {
    assert!(
        // SAFETY: the caller's: `previous` is a live context.
        unsafe { (*previous).is_whole() },
        "a kernel stack was too small"
    );
    // SAFETY: the caller's; `pointer` of `next` was made by `start_at` or an earlier switch. Kernel
    // addresses are the same in every page table.
    unsafe {
        (*previous).save_vectors();
        (*next).load_vectors();
        (*next).load_bases();
        cpu::set_kernel_stack((*next).stack_top());
        if cpu::read_cr3() != page_table {
            cpu::write_cr3(page_table);
        }
        context_switch(&raw mut (*previous).pointer, (*next).pointer);
    }
}

/// Starts the first task; the boot stack is left for good.
///
/// # Safety
/// As for [`switch`].
pub unsafe fn start(next: *const Context, page_table: u64) -> ! {
    let mut nowhere = 0u64;
    // SAFETY: the caller's.
    unsafe {
        (*next).load_vectors();
        (*next).load_bases();
        cpu::set_kernel_stack((*next).stack_top());
        cpu::write_cr3(page_table);
        context_switch(&raw mut nowhere, (*next).pointer);
    }
    cpu::reset()
}
