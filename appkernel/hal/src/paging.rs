//! Page tables of programs.

use crate::boot::kernel_pml4;
use crate::{PAGE, USER_END, cpu, direct, frames};

/// The page is there.
pub const PRESENT: u64 = 1;
/// It may be written.
pub const WRITABLE: u64 = 2;
/// Programs may use it.
pub const USER: u64 = 4;
/// It may not be executed.
pub const NO_EXECUTE: u64 = 1 << 63;
/// Ours: more than one address space has it; make a copy before writing.
pub const COPY_ON_WRITE: u64 = 1 << 9;
/// Ours: the frame is a file's too, which frees it when nobody has it mapped and it is in the way.
pub const OF_FILE: u64 = 1 << 10;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Physical address in an entry.
pub const fn frame_of(entry: u64) -> u64 {
    entry & ADDRESS
}

/// There is no memory for a page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory;

/// The page table of one address space. It owns the frames that are mapped in it.
#[derive(Debug)]
pub struct PageTable {
    root: u64,
}

fn table(physical: u64) -> *mut u64 {
    direct(physical).cast()
}

impl PageTable {
    /// An empty one, with the kernel in its upper half.
    pub fn new() -> Option<Self> {
        let root = frames::allocate_user()?;
        // SAFETY: both are page tables of 512 entries; the kernel's upper half never changes.
        unsafe {
            table(root)
                .add(256)
                .copy_from_nonoverlapping(table(kernel_pml4()).add(256), 256);
        }
        Some(Self { root })
    }

    /// Physical address, for the CPU.
    pub fn root(&self) -> u64 {
        self.root
    }

    fn entry(&mut self, address: u64, create: bool) -> Option<*mut u64> {
        if address >= USER_END {
            return None;
        }
        let mut at = self.root;
        for level in [39, 30, 21] {
            let index = (address >> level & 511) as usize;
            // SAFETY: an index below 512 in a table that is this address space's own.
            let slot = unsafe { table(at).add(index) };
            // SAFETY: as above.
            let mut entry = unsafe { slot.read() };
            if entry & PRESENT == 0 {
                if !create {
                    return None;
                }
                entry = frames::allocate_user()? | PRESENT | WRITABLE | USER;
                // SAFETY: as above.
                unsafe { slot.write(entry) };
            }
            at = frame_of(entry);
        }
        // SAFETY: as above.
        Some(unsafe { table(at).add((address >> 12 & 511) as usize) })
    }

    /// The entry for an address; 0 if there is none.
    pub fn get(&mut self, address: u64) -> u64 {
        self.entry(address, false)
            // SAFETY: a slot of a table of ours.
            .map_or(0, |slot| unsafe { slot.read() })
    }

    /// Puts a frame (which it then owns) at an address, in place of what was there.
    ///
    /// # Errors
    /// No memory for the tables; the frame stays the caller's.
    pub fn set(&mut self, address: u64, entry: u64) -> Result<(), NoMemory> {
        let slot = self.entry(address, true).ok_or(NoMemory)?;
        // SAFETY: a slot of a table of ours.
        let old = unsafe { slot.replace(entry) };
        cpu::invalidate(address);
        if old & PRESENT != 0 && frame_of(old) != frame_of(entry) {
            frames::release(frame_of(old), 0);
        }
        Ok(())
    }

    /// Visits the entries that are there from `start` to `end`; the visitor may change them.
    pub fn visit(&mut self, start: u64, end: u64, mut f: impl FnMut(u64, &mut u64)) {
        let mut address = start;
        let end = end.min(USER_END);
        while address < end {
            // Skips what has no table at the level where it is missing.
            let mut at = self.root;
            let mut skip = None;
            for level in [39u32, 30, 21] {
                // SAFETY: an index below 512 in a table of ours.
                let entry = unsafe { table(at).add((address >> level & 511) as usize).read() };
                if entry & PRESENT == 0 {
                    skip = Some(level);
                    break;
                }
                at = frame_of(entry);
            }
            if let Some(level) = skip {
                address = ((address >> level) + 1) << level;
                continue;
            }
            // All of the last table that is wanted, without looking for it again.
            let last = ((address >> 21) + 1) << 21;
            while address < end.min(last) {
                // SAFETY: as above; the reference ends with the call.
                let slot = unsafe { &mut *table(at).add((address >> 12 & 511) as usize) };
                if *slot & PRESENT != 0 {
                    f(address, slot);
                }
                address += PAGE;
            }
        }
    }

    /// Puts the entries of a range into another table, which then owns the frames too. With
    /// `copy_on_write` neither may write them any more; the CPU may still believe it can until
    /// `cpu::forget_programs`.
    ///
    /// # Errors
    /// No memory for the other's tables; what is there already stays there.
    pub fn share_with(
        &mut self,
        other: &mut Self,
        (start, end): (u64, u64),
        copy_on_write: bool,
    ) -> Result<(), NoMemory> {
        // The other's last table, and the addresses it is for.
        let mut last: Option<(u64, *mut u64)> = None;
        let mut result = Ok(());
        self.visit(start, end, |address, entry| {
            if result.is_err() {
                return;
            }
            let first = match last {
                Some((of, first)) if of == address >> 21 => first,
                _ => match other.entry(address & !0x1f_ffff, true) {
                    Some(first) => {
                        last = Some((address >> 21, first));
                        first
                    }
                    None => {
                        result = Err(NoMemory);
                        return;
                    }
                },
            };
            if copy_on_write {
                *entry = (*entry & !WRITABLE) | COPY_ON_WRITE;
            }
            frames::share(frame_of(*entry));
            // SAFETY: an index below 512 in a table of the other's own; nothing was there, as the
            // areas of one address space do not overlap and the other is new.
            unsafe { first.add((address >> 12 & 511) as usize).write(*entry) };
        });
        result
    }

    /// Takes out and frees what is mapped from `start` to `end`.
    pub fn clear(&mut self, start: u64, end: u64) {
        self.visit(start, end, |address, entry| {
            frames::release(frame_of(*entry), 0);
            *entry = 0;
            cpu::invalidate(address);
        });
    }
}

impl Drop for PageTable {
    fn drop(&mut self) {
        // No CPU uses it, so nothing has to be forgotten: another one was loaded since.
        free(self.root, 4);
    }
}

/// Frees what an entry of a level leads to: a page (0), or a table and all below it.
fn free(at: u64, level: u32) {
    if level > 0 {
        let entries = if level == 4 { 256 } else { 512 };
        for index in 0..entries {
            // SAFETY: an index below 512 in a table of ours, which nobody uses any more.
            let entry = unsafe { table(at).add(index).read() };
            if entry & PRESENT != 0 {
                free(frame_of(entry), level - 1);
            }
        }
    }
    frames::release(at, 0);
}
