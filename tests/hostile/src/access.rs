//! Loads and stores of any width anywhere, which the compiler neither drops nor splits.

use core::arch::asm;

use crate::chance::Chance;

/// Loads or stores 1, 2, 4 or 8 bytes at `at`.
///
/// # Safety
/// The address must be mapped and hold nothing that Rust code relies on.
pub unsafe fn anyhow(at: *mut u8, chance: &mut Chance) {
    let value = chance.number();
    // SAFETY: the caller's.
    unsafe {
        match chance.below(8) {
            0 => asm!("mov {:l}, byte ptr [{}]", out(reg_abcd) _, in(reg) at, options(nostack)),
            1 => asm!("mov {:x}, word ptr [{}]", out(reg) _, in(reg) at, options(nostack)),
            2 => asm!("mov {:e}, dword ptr [{}]", out(reg) _, in(reg) at, options(nostack)),
            3 => asm!("mov {}, qword ptr [{}]", out(reg) _, in(reg) at, options(nostack)),
            4 => asm!("mov byte ptr [{}], {:l}", in(reg) at, in(reg_abcd) value, options(nostack)),
            5 => asm!("mov word ptr [{}], {:x}", in(reg) at, in(reg) value, options(nostack)),
            6 => asm!("mov dword ptr [{}], {:e}", in(reg) at, in(reg) value, options(nostack)),
            _ => asm!("mov qword ptr [{}], {}", in(reg) at, in(reg) value, options(nostack)),
        }
    }
}
