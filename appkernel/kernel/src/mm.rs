//! The memory of a process: areas, and pages that come when they are touched.

use alloc::sync::Arc;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::vma::{Area, Areas, Backing, EXECUTE, READ, WRITE};
use appkernel_hal::paging::{
    COPY_ON_WRITE, NO_EXECUTE, OF_FILE, PRESENT, PageTable, USER, WRITABLE, frame_of,
};
use appkernel_hal::{PAGE, cpu, frames};

use crate::fs::fuse;
use crate::fs::node::Node;

/// Mappings are placed below, or somewhat lower; the stack lies above.
pub const MMAP_TOP: u64 = 0x7fff_0000_0000;
/// Top of the stack, or somewhat lower.
pub const STACK_TOP: u64 = 0x7fff_ffff_e000;
/// Bytes of the stack.
pub const STACK_BYTES: u64 = 8 << 20;
/// No mapping below, so that null pointers fault (Linux' `vm.mmap_min_addr`).
pub const LOWEST: u64 = 0x1_0000;
/// As Linux' `vm.max_map_count`.
const MAX_AREAS: usize = 65530;
/// A child finds zeros there (MADV_WIPEONFORK).
pub const WIPED: u8 = 1;
/// A child has nothing there (MADV_DONTFORK).
pub const KEPT_BACK: u8 = 2;

/// What lies around a page that is touched: as much as the host gives at once.
const AROUND: u64 = 16 * PAGE;

/// Parts of a page, as `Mm::weight` counts them.
pub const WHOLE: u64 = 1024;

/// What a program wanted to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Execute,
}

impl Access {
    /// Protections of which one is enough.
    fn needs(self) -> u8 {
        match self {
            Self::Read => READ | WRITE | EXECUTE,
            Self::Write => WRITE,
            Self::Execute => EXECUTE,
        }
    }
}

/// A file that is mapped.
pub struct Mapping {
    /// The file.
    pub node: Node,
    /// Its path, for /proc.
    pub path: Vec<u8>,
    /// Changes go to the file.
    shared: bool,
}

impl Mapping {
    /// A mapping of a file.
    pub fn new(node: Node, path: Vec<u8>, shared: bool) -> Arc<Self> {
        match (&node, shared) {
            (Node::Share(node), true) => node.mapped(),
            (Node::Memory(node), true) => node.mapped(),
            _ => {}
        }
        Arc::new(Self { node, path, shared })
    }

    /// Whether changes go to the file.
    pub fn is_shared(&self) -> bool {
        self.shared
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match (&self.node, self.shared) {
            (Node::Share(node), true) => node.unmapped(),
            (Node::Memory(node), true) => node.unmapped(),
            _ => {}
        }
    }
}

/// The memory of a process.
pub struct Mm {
    table: PageTable,
    /// What is mapped.
    pub areas: Areas<Arc<Mapping>>,
    /// Address and length of arguments and of environment, on the stack.
    pub arguments: (u64, u64),
    pub environment: (u64, u64),
    /// The same of the auxiliary vector.
    pub auxiliary: (u64, u64),
    /// Start of the heap.
    pub brk_start: u64,
    /// Where mappings are placed below, and where the stack ends.
    pub mmap_top: u64,
    pub stack_top: u64,
    /// End of the heap.
    pub brk: u64,
    /// What programs asked to stay (mlock): it is there, and nothing is ever swapped out.
    locked: Areas<()>,
    /// What a child does not get (madvise(2)); in place of the protection: how.
    at_fork: Areas<()>,
    /// What is mapped from now on stays too.
    pub lock_future: bool,
}

impl Mm {
    /// Pages that are there: what ending the process would give back, at most.
    pub fn resident(&mut self) -> usize {
        let mut pages = 0;
        self.table
            .visit(0, appkernel_hal::USER_END, |_, _| pages += 1);
        pages
    }

    /// What it has of pages that are no file's, in parts of a page: all of its own, and its share of
    /// those that others have too.
    pub fn weight(&mut self) -> u64 {
        let mut parts = 0;
        self.table.visit(0, appkernel_hal::USER_END, |_, entry| {
            let owners = frames::owners(frame_of(*entry)).max(1);
            // A page that its file has given up is the process' own.
            if *entry & OF_FILE == 0 || owners == 1 {
                parts += WHOLE / u64::from(owners);
            }
        });
        parts
    }
}

impl Mm {
    /// Nothing is mapped.
    pub fn new() -> Result<Self, Errno> {
        Ok(Self {
            table: PageTable::new().ok_or(Errno::ENOMEM)?,
            areas: Areas::default(),
            arguments: (0, 0),
            environment: (0, 0),
            auxiliary: (0, 0),
            brk_start: 0,
            mmap_top: MMAP_TOP,
            stack_top: STACK_TOP,
            brk: 0,
            locked: Areas::default(),
            at_fork: Areas::default(),
            lock_future: false,
        })
    }

    /// Physical address of the page table.
    pub fn root(&self) -> u64 {
        self.table.root()
    }

    /// Adds an area, in place of what is there.
    pub fn map(&mut self, area: Area<Arc<Mapping>>) -> Result<(), Errno> {
        if self.areas.count() >= MAX_AREAS {
            return Err(Errno::ENOMEM);
        }
        self.table.clear(area.start, area.end);
        self.locked.remove(area.start, area.end);
        self.at_fork.remove(area.start, area.end);
        let (start, end) = (area.start, area.end);
        self.areas.insert(area);
        if self.lock_future {
            self.lock(start, end);
        }
        Ok(())
    }

    /// Takes a range out.
    pub fn unmap(&mut self, start: u64, end: u64) -> Result<(), Errno> {
        if self.areas.count() >= MAX_AREAS {
            return Err(Errno::ENOMEM);
        }
        self.areas.remove(start, end);
        self.locked.remove(start, end);
        self.at_fork.remove(start, end);
        self.table.clear(start, end);
        Ok(())
    }

    /// Says what becomes of a range in a child: [`WIPED`], [`KEPT_BACK`], or 0 for a copy of it.
    pub fn set_at_fork(&mut self, start: u64, end: u64, how: u8) -> Result<(), Errno> {
        if how == WIPED {
            let private = |a: &Area<_>| !a.shared && matches!(a.backing, Backing::Zero);
            if !self.areas.within(start, end).all(private) {
                return Err(Errno::EINVAL);
            }
        }
        if self.at_fork.count() >= MAX_AREAS {
            return Err(Errno::ENOMEM);
        }
        match how {
            0 => self.at_fork.remove(start, end),
            _ => self.at_fork.insert(Area {
                start,
                end,
                protection: how,
                shared: false,
                backing: Backing::Zero,
            }),
        }
        Ok(())
    }

    /// Marks a range as one that stays.
    pub fn lock(&mut self, start: u64, end: u64) {
        if self.locked.count() < MAX_AREAS {
            self.locked.insert(Area {
                start,
                end,
                protection: 0,
                shared: false,
                backing: Backing::Zero,
            });
        }
    }

    /// Takes the mark away.
    pub fn unlock(&mut self, start: u64, end: u64) {
        self.locked.remove(start, end);
    }

    /// Bytes that are marked, in a range.
    pub fn locked_bytes(&self, start: u64, end: u64) -> u64 {
        let parts = self.locked.within(start, end);
        parts
            .map(|a| a.end.min(end).saturating_sub(a.start.max(start)))
            .sum()
    }

    /// Brings all pages of a range that programs may touch; gives how many there are.
    ///
    /// # Errors
    /// As `fault`, but for what nobody may touch.
    pub fn populate(&mut self, start: u64, end: u64) -> Result<u64, Errno> {
        let areas: Vec<_> = self
            .areas
            .within(start, end)
            .filter(|a| a.protection != 0)
            .map(|a| (a.start.max(start), a.end.min(end), a.protection, a.shared))
            .collect();
        let mut count = 0;
        for (from, to, protection, shared) in areas {
            let access = if protection & WRITE != 0 && !shared {
                Access::Write
            } else {
                Access::Read
            };
            let mut page = from;
            while page < to {
                match self.fault(page, access) {
                    Ok(()) => count += 1,
                    // Past the end of a file: so is what follows, which may be very much.
                    Err(Errno::EFAULT) => break,
                    Err(e) => return Err(e),
                }
                page += PAGE;
            }
        }
        Ok(count)
    }

    /// Whether the page at an address is in memory: mapped, or in the cache of its file.
    pub fn is_resident(&mut self, address: u64) -> bool {
        if self.table.get(address) & PRESENT != 0 {
            return true;
        }
        let Some(area) = self.areas.find(address) else {
            return false;
        };
        let Backing::File(file, offset) = &area.backing else {
            return false;
        };
        let index = (offset + (address - area.start)) / PAGE;
        match &file.node {
            Node::Share(node) => {
                let mut found = false;
                node.cached_pages(index, index + 1, |_, _| found = true);
                found
            }
            Node::Memory(node) => node.has_page(index),
            _ => false,
        }
    }

    /// Drops the contents of private pages: zeros, or the file's, come back at the next touch.
    pub fn discard(&mut self, start: u64, end: u64) {
        let ranges: alloc::vec::Vec<_> = self
            .areas
            .within(start, end)
            .filter(|a| !a.shared)
            .map(|a| (a.start.max(start), a.end.min(end)))
            .collect();
        for (start, end) in ranges {
            self.table.clear(start, end);
        }
    }

    /// Changes what may be done with a range.
    pub fn protect(&mut self, start: u64, end: u64, protection: u8) -> Result<(), Errno> {
        if self.areas.count() >= MAX_AREAS {
            return Err(Errno::ENOMEM);
        }
        // What is before a hole changes all the same.
        let whole = end;
        let end = self.areas.covered_to(start).min(end);
        self.areas.protect(start, end, protection);
        // Pages that may do less than before lose it now; more comes by faults.
        self.table.visit(start, end, |address, entry| {
            if protection & WRITE == 0 {
                *entry &= !WRITABLE;
            }
            if protection & EXECUTE == 0 {
                *entry |= NO_EXECUTE;
            } else {
                *entry &= !NO_EXECUTE;
            }
            if protection == 0 {
                *entry &= !USER;
            } else {
                *entry |= USER;
            }
            cpu::invalidate(address);
        });
        if end < whole {
            return Err(Errno::ENOMEM);
        }
        Ok(())
    }

    /// A copy for a child: both have the same pages until one writes.
    pub fn fork(&mut self) -> Result<Self, Errno> {
        let mut child = Self {
            table: PageTable::new().ok_or(Errno::ENOMEM)?,
            areas: self.areas.clone(),
            arguments: self.arguments,
            environment: self.environment,
            auxiliary: self.auxiliary,
            brk_start: self.brk_start,
            mmap_top: self.mmap_top,
            stack_top: self.stack_top,
            brk: self.brk,
            // A child has none of it.
            locked: Areas::default(),
            lock_future: false,
            at_fork: self.at_fork.clone(),
        };
        let mut result = Ok(());
        for area in self.areas.iter() {
            let range = (area.start, area.end);
            result = self
                .table
                .share_with(&mut child.table, range, !area.shared)
                .map_err(|_| Errno::ENOMEM);
            if result.is_err() {
                break;
            }
        }
        for range in self.at_fork.iter() {
            child.table.clear(range.start, range.end);
            if range.protection == KEPT_BACK {
                child.areas.remove(range.start, range.end);
                child.at_fork.remove(range.start, range.end);
            }
        }
        // Also when it failed: what was shared may not be written any more.
        cpu::forget_programs();
        result.map(|()| child)
    }

    /// The frame behind an address of a shared mapping; `None` for memory of the process alone.
    pub fn shared_frame(&mut self, address: u64) -> Result<Option<u64>, Errno> {
        let area = self.areas.find(address).ok_or(Errno::EFAULT)?;
        if !area.shared {
            return Ok(None);
        }
        if self.table.get(address) & PRESENT == 0 {
            self.fault(address, Access::Read)?;
        }
        Ok(Some(frame_of(self.table.get(address))))
    }

    /// Whether what is mapped at an address allows the access; `None` if nothing is.
    pub fn allows(&self, address: u64, access: Access) -> Option<bool> {
        let area = self.areas.find(address)?;
        Some(area.protection & access.needs() != 0)
    }

    /// Brings the page at an address.
    ///
    /// # Errors
    /// `EFAULT` if nothing is mapped there or it does not allow the access, `ENOMEM`, or why the
    /// file cannot be read.
    pub fn fault(&mut self, address: u64, access: Access) -> Result<(), Errno> {
        let page = address & !(PAGE - 1);
        let area = self.areas.find(page).ok_or(Errno::EFAULT)?.clone();
        if area.protection & access.needs() == 0 {
            return Err(Errno::EFAULT);
        }
        let mut flags = PRESENT | USER;
        if area.protection & EXECUTE == 0 {
            flags |= NO_EXECUTE;
        }
        let writable = area.protection & WRITE != 0;
        let old = self.table.get(page);
        if old & PRESENT != 0 {
            if let (Backing::File(file, offset), Access::Write, true) =
                (&area.backing, access, area.shared)
            {
                file.node
                    .page_changed((offset + (page - area.start)) / PAGE);
            }
            return self.upgrade(
                page,
                old,
                flags,
                access == Access::Write,
                writable,
                area.shared,
            );
        }
        let (frame, flags) = match &area.backing {
            Backing::Zero => {
                let frame = frames::allocate_user().ok_or(Errno::ENOMEM)?;
                (frame, if writable { flags | WRITABLE } else { flags })
            }
            Backing::File(file, offset) => {
                let index = (offset + (page - area.start)) / PAGE;
                let cached = file.node.page(index)?;
                if area.shared {
                    frames::share(cached);
                    if access == Access::Write {
                        file.node.page_changed(index);
                        (cached, flags | OF_FILE | WRITABLE)
                    } else {
                        (cached, flags | OF_FILE)
                    }
                } else if access == Access::Write {
                    (copy(cached)?, flags | WRITABLE)
                } else {
                    frames::share(cached);
                    (cached, flags | OF_FILE | COPY_ON_WRITE)
                }
            }
        };
        self.table.set(page, frame | flags).map_err(|_| {
            frames::release(frame, 0);
            Errno::ENOMEM
        })?;
        if let Backing::File(file, offset) = &area.backing
            && let Node::Share(node) = &file.node
            && access != Access::Write
        {
            self.bring_neighbours(page, &area, node, *offset, flags);
        }
        Ok(())
    }

    /// The page of a file was brought: those around it that are in the cache come along, since each
    /// fault costs more than they do.
    fn bring_neighbours(
        &mut self,
        page: u64,
        area: &Area<Arc<Mapping>>,
        node: &fuse::Node,
        offset: u64,
        flags: u64,
    ) {
        let window = page / AROUND * AROUND;
        let (start, end) = (window.max(area.start), (window + AROUND).min(area.end));
        let first = (offset + (start - area.start)) / PAGE;
        let last = (offset + (end - area.start)) / PAGE;
        let table = &mut self.table;
        node.cached_pages(first, last, |index, frame| {
            let address = start + (index - first) * PAGE;
            if address == page || table.get(address) & PRESENT != 0 {
                return;
            }
            frames::share(frame);
            if table.set(address, frame | flags).is_err() {
                frames::release(frame, 0);
            }
        });
    }

    /// The page is there, but not with all rights the area gives.
    fn upgrade(
        &mut self,
        page: u64,
        old: u64,
        flags: u64,
        write: bool,
        writable: bool,
        shared: bool,
    ) -> Result<(), Errno> {
        let frame = frame_of(old);
        if !write {
            let kept = old & (WRITABLE | COPY_ON_WRITE | OF_FILE);
            return self
                .table
                .set(page, frame | flags | kept)
                .map_err(|_| Errno::ENOMEM);
        }
        if !writable {
            return Err(Errno::EFAULT);
        }
        if shared || frames::owners(frame) == 1 {
            let kept = if shared { old & OF_FILE } else { 0 };
            return self
                .table
                .set(page, frame | flags | kept | WRITABLE)
                .map_err(|_| Errno::ENOMEM);
        }
        let copy = copy(frame)?;
        self.table.set(page, copy | flags | WRITABLE).map_err(|_| {
            frames::release(copy, 0);
            Errno::ENOMEM
        })
    }

    /// Reads memory that may belong to a process that does not run, as far as it is there; gives
    /// how many bytes that were.
    pub fn read(&mut self, address: u64, to: &mut [u8]) -> usize {
        let mut done = 0;
        while done < to.len() {
            let at = address.saturating_add(done as u64);
            if self.table.get(at) & PRESENT == 0 && self.fault(at, Access::Read).is_err() {
                break;
            }
            let offset = (at % PAGE) as usize;
            let len = (PAGE as usize - offset).min(to.len() - done);
            // SAFETY: the frame is mapped in this memory, which is locked; nobody runs with it now.
            let frame = unsafe { frames::bytes(frame_of(self.table.get(at))) };
            if let (Some(from), Some(to)) = (
                frame.get(offset..offset + len),
                to.get_mut(done..done + len),
            ) {
                to.copy_from_slice(from);
            }
            done += len;
        }
        done
    }

    /// Moves pages to another place of the same length, with their contents.
    pub fn move_pages(&mut self, from: u64, to: u64, len: u64) -> Result<(), Errno> {
        let mut moved: Vec<(u64, u64)> = Vec::new();
        self.table.visit(from, from + len, |address, entry| {
            moved.push((address, *entry))
        });
        for (address, entry) in &moved {
            // One owner more for the time that both places have it.
            frames::share(frame_of(*entry));
            if self.table.set(to + (address - from), *entry).is_err() {
                frames::release(frame_of(*entry), 0);
                return Err(Errno::ENOMEM);
            }
        }
        self.table.clear(from, from + len);
        Ok(())
    }

    /// Passes on what was changed in mapped files of a range.
    pub fn write_back(&mut self, start: u64, end: u64) -> Result<(), Errno> {
        let files: Vec<Arc<Mapping>> = self
            .areas
            .within(start, end)
            .filter(|a| a.shared)
            .filter_map(|a| match &a.backing {
                Backing::File(file, _) => Some(Arc::clone(file)),
                Backing::Zero => None,
            })
            .collect();
        files.iter().try_for_each(|file| file.node.write_back())
    }

    /// Writes to memory that may belong to a process that does not run, as far as it is mapped.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes.len() {
            let at = address + done as u64;
            if self.table.get(at) & (PRESENT | WRITABLE) != PRESENT | WRITABLE {
                self.fault(at, Access::Write)?;
            }
            let offset = (at % PAGE) as usize;
            let len = (PAGE as usize - offset).min(bytes.len() - done);
            // SAFETY: the frame is mapped in this memory, which is locked; nobody runs with it now.
            let frame = unsafe { frames::bytes(frame_of(self.table.get(at))) };
            if let (Some(to), Some(from)) = (
                frame.get_mut(offset..offset + len),
                bytes.get(done..done + len),
            ) {
                to.copy_from_slice(from);
            }
            done += len;
        }
        Ok(())
    }
}

fn copy(from: u64) -> Result<u64, Errno> {
    let frame = frames::allocate_user_unwritten().ok_or(Errno::ENOMEM)?;
    // SAFETY: the new frame is ours alone; the other is only read, and nobody writes it meanwhile.
    let (to, from) = unsafe { (frames::bytes(frame), frames::bytes(from)) };
    to.copy_from_slice(from);
    Ok(frame)
}
