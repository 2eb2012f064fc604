//! Files in memory (tmpfs): /tmp, /dev, /dev/shm, and files without a name.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_core::fuse::{Attributes, DirEntry, NAME_MAX};
use appkernel_core::locks::Locks;
use appkernel_core::xattr;
use appkernel_hal::sync::Mutex;
use appkernel_hal::{PAGE, clock, frames};

use super::fuse::Change;
use super::node::{Owner, kind};
use crate::container::Charge;

/// Largest file: what fits into the arithmetic of pages with room to spare.
const MAX_SIZE: u64 = 1 << 46;
/// Names in one file system, at most: they are the kernel's memory.
const MAX_NODES: u64 = 65536;

/// Bytes of extended attributes in one file system, at most: they are the kernel's memory too.
const MAX_EXTENDED: u64 = 1 << 20;

static NEXT_DEVICE: AtomicU64 = AtomicU64::new(0x100);

/// A device number for a file system.
pub fn new_device() -> u64 {
    NEXT_DEVICE.fetch_add(1, Ordering::Relaxed)
}

/// What the files of one file system have in common.
struct Shared {
    device: u64,
    /// Most pages, and those in use.
    limit: u64,
    used: AtomicU64,
    nodes: AtomicU64,
    next: AtomicU64,
    /// Bytes of extended attributes.
    extended: AtomicU64,
    /// Whose memory it is.
    charge: Arc<Charge>,
}

impl Shared {
    /// Pages of its files were freed.
    fn gave_back(&self, pages: usize) {
        self.used.fetch_sub(pages as u64, Ordering::Relaxed);
        self.charge.take_from_files(pages as u64);
    }
}

enum Content {
    File(BTreeMap<u64, u64>),
    Directory(BTreeMap<Vec<u8>, Arc<Node>>),
    Link(Vec<u8>),
    Special,
}

struct State {
    attributes: Attributes,
    content: Content,
    locks: Locks,
    extended: xattr::Attributes,
    /// It was made without a name, and may get one.
    linkable: bool,
    /// What cannot be done with it any more ([`seal`]).
    seals: u32,
    /// Mappings through which it can be changed.
    mappings: usize,
}

/// What memfd_create(2)'s files can be kept from, for good.
pub mod seal {
    pub const SEAL: u32 = 1;
    pub const SHRINK: u32 = 2;
    pub const GROW: u32 = 4;
    pub const WRITE: u32 = 8;
    pub const FUTURE_WRITE: u32 = 0x10;
    pub const EXEC: u32 = 0x20;
    /// All of them.
    pub const ALL: u32 = 0x3f;
}

/// A file in memory.
pub struct Node {
    shared: Arc<Shared>,
    number: u64,
    state: Mutex<State>,
}

fn now() -> (u64, u32) {
    let ns = clock::realtime_ns();
    (ns / 1_000_000_000, (ns % 1_000_000_000) as u32)
}

/// A new file system of at most `bytes` that is no container's; gives its root.
pub fn new(bytes: Option<u64>, mode: u32) -> Arc<Node> {
    new_for(&Arc::default(), bytes, mode)
}

/// A new file system of at most `bytes`, which count for a container; gives its root.
pub fn new_for(charge: &Arc<Charge>, bytes: Option<u64>, mode: u32) -> Arc<Node> {
    let (total, _) = frames::statistics();
    let limit = bytes.map_or(total as u64 / 2, |b| b.div_ceil(PAGE));
    let shared = Arc::new(Shared {
        device: new_device(),
        limit,
        used: AtomicU64::new(0),
        nodes: AtomicU64::new(1),
        next: AtomicU64::new(2),
        extended: AtomicU64::new(0),
        charge: Arc::clone(charge),
    });
    node(&shared, 1, kind::DIRECTORY | mode, 0, &[], Owner::default())
}

/// A file without a name, of the running task's container.
pub fn anonymous(owner: Owner) -> Arc<Node> {
    let root = new_for(&crate::task::current().container.charge, None, 0);
    node(&root.shared, 2, kind::REGULAR | 0o777, 0, &[], owner)
}

/// A file without a name that is made of these frames, and owns them.
pub fn of_frames(frames: Vec<u64>) -> Arc<Node> {
    let root = new(None, 0);
    let file = node(
        &root.shared,
        2,
        kind::REGULAR | 0o444,
        0,
        &[],
        Owner::default(),
    );
    let mut state = file.state.lock();
    state.attributes.size = frames.len() as u64 * PAGE;
    let count = frames.len() as u64;
    state.content = Content::File((0..).zip(frames).collect());
    drop(state);
    file.shared.used.fetch_add(count, Ordering::Relaxed);
    file
}

fn node(
    shared: &Arc<Shared>,
    number: u64,
    mode: u32,
    rdev: u32,
    target: &[u8],
    owner: Owner,
) -> Arc<Node> {
    let content = match mode & kind::MASK {
        kind::REGULAR => Content::File(BTreeMap::new()),
        kind::DIRECTORY => Content::Directory(BTreeMap::new()),
        kind::LINK => Content::Link(target.to_vec()),
        _ => Content::Special,
    };
    let attributes = Attributes {
        ino: number,
        mode,
        rdev,
        nlink: if mode & kind::MASK == kind::DIRECTORY {
            2
        } else {
            1
        },
        uid: owner.uid,
        gid: owner.gid,
        size: target.len() as u64,
        block_size: PAGE as u32,
        times: [now(); 3],
        ..Attributes::default()
    };
    Arc::new(Node {
        shared: Arc::clone(shared),
        number,
        state: Mutex::new(State {
            attributes,
            content,
            locks: Locks::default(),
            extended: xattr::Attributes::default(),
            linkable: false,
            seals: seal::SEAL,
            mappings: 0,
        }),
    })
}

/// A file that somebody else owns or that changes does not give its rights to others any more.
fn drop_privileges(attributes: &mut Attributes) {
    const SET_USER: u32 = 0o4000;
    const SET_GROUP: u32 = 0o2010;
    if attributes.mode & kind::MASK == kind::DIRECTORY {
        return;
    }
    attributes.mode &= !SET_USER;
    // Without the group's right to execute it, the bit means something else.
    if attributes.mode & SET_GROUP == SET_GROUP {
        attributes.mode &= !0o2000;
    }
}

/// Makes zeros of a part of a page; the caller has the file locked that owns it.
fn make_zeros(frame: u64, from: usize, to: usize) {
    // SAFETY: the file owns the frame, and is locked.
    let bytes = unsafe { frames::bytes(frame) };
    if let Some(part) = bytes.get_mut(from..to) {
        part.fill(0);
    }
}

impl State {
    fn touch(&mut self) {
        let now = now();
        self.attributes.times[1] = now;
        self.attributes.times[2] = now;
    }

    fn directory(&mut self) -> Result<&mut BTreeMap<Vec<u8>, Arc<Node>>, Errno> {
        match &mut self.content {
            Content::Directory(entries) => Ok(entries),
            _ => Err(Errno::ENOTDIR),
        }
    }
}

impl Node {
    /// Number of the file system.
    pub fn device(&self) -> u64 {
        self.shared.device
    }

    /// Number in it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its attributes.
    pub fn attributes(&self) -> Attributes {
        let state = self.state.lock();
        let mut attributes = state.attributes;
        if let Content::File(pages) = &state.content {
            attributes.blocks = pages.len() as u64 * (PAGE / 512);
        }
        attributes
    }

    /// What cannot be done with it any more.
    pub fn seals(&self) -> u32 {
        self.state.lock().seals
    }

    /// Of a new file: others may follow, unless `seals` says not.
    pub fn begin_seals(&self, seals: u32) {
        self.state.lock().seals = seals;
    }

    /// Adds to what cannot be done with it.
    ///
    /// # Errors
    /// `EINVAL`: unknown. `EPERM`: there can be no more. `EBUSY`: somebody has mapped it to change it.
    pub fn add_seals(&self, seals: u32) -> Result<(), Errno> {
        if seals & !seal::ALL != 0 {
            return Err(Errno::EINVAL);
        }
        let mut state = self.state.lock();
        if state.seals & seal::SEAL != 0 {
            return Err(Errno::EPERM);
        }
        if seals & seal::WRITE != 0 && state.mappings > 0 {
            return Err(Errno::EBUSY);
        }
        state.seals |= seals;
        Ok(())
    }

    /// There is one more mapping through which it can be changed.
    pub fn mapped(&self) {
        self.state.lock().mappings += 1;
    }

    /// There is one less.
    pub fn unmapped(&self) {
        let mut state = self.state.lock();
        state.mappings = state.mappings.saturating_sub(1);
    }

    /// Changes attributes.
    pub fn change(&self, change: &Change) -> Result<(), Errno> {
        if let Some(size) = change.size {
            self.resize(size)?;
        }
        let mut state = self.state.lock();
        let (seals, attributes) = (state.seals, &mut state.attributes);
        if let Some(mode) = change.mode {
            if seals & seal::EXEC != 0 && (mode ^ attributes.mode) & 0o111 != 0 {
                return Err(Errno::EPERM);
            }
            attributes.mode = attributes.mode & kind::MASK | mode & 0o7777;
        }
        if change.uid.is_some() || change.gid.is_some() {
            drop_privileges(attributes);
        }
        attributes.uid = change.uid.unwrap_or(attributes.uid);
        attributes.gid = change.gid.unwrap_or(attributes.gid);
        for (slot, time) in [(0, change.atime), (1, change.mtime)] {
            if let Some(ns) = time {
                attributes.times[slot] = (ns / 1_000_000_000, (ns % 1_000_000_000) as u32);
            }
        }
        attributes.times[2] = now();
        Ok(())
    }

    fn resize(&self, size: u64) -> Result<(), Errno> {
        if size > MAX_SIZE {
            return Err(Errno::EFBIG);
        }
        let mut state = self.state.lock();
        let (seals, old) = (state.seals, state.attributes.size);
        if size < old && seals & seal::SHRINK != 0 || size > old && seals & seal::GROW != 0 {
            return Err(Errno::EPERM);
        }
        let Content::File(pages) = &mut state.content else {
            return Err(Errno::EINVAL);
        };
        let gone = pages.split_off(&size.div_ceil(PAGE));
        // What lies behind the end must be zeros if the file grows again.
        if !size.is_multiple_of(PAGE)
            && let Some(frame) = pages.get(&(size / PAGE))
        {
            make_zeros(*frame, (size % PAGE) as usize, PAGE as usize);
        }
        state.attributes.size = size;
        state.touch();
        drop(state);
        self.shared.gave_back(gone.len());
        for frame in gone.into_values() {
            frames::release(frame, 0);
        }
        Ok(())
    }

    /// Makes zeros of a part of the file, and gives back its pages but those that are mapped.
    ///
    /// # Errors
    /// `EPERM`: it cannot be written any more.
    pub fn punch(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut state = self.state.lock();
        if state.seals & (seal::WRITE | seal::FUTURE_WRITE) != 0 {
            return Err(Errno::EPERM);
        }
        let Content::File(pages) = &mut state.content else {
            return Err(Errno::EINVAL);
        };
        let mut gone = Vec::new();
        let within: Vec<u64> = pages
            .range(start / PAGE..end.div_ceil(PAGE))
            .map(|(index, _)| *index)
            .collect();
        for index in within {
            let Some(frame) = pages.get(&index).copied() else {
                continue;
            };
            let (from, to) = (start.max(index * PAGE), end.min((index + 1) * PAGE));
            if to - from == PAGE && frames::owners(frame) == 1 {
                pages.remove(&index);
                gone.push(frame);
                continue;
            }
            let inside = (from % PAGE) as usize;
            make_zeros(frame, inside, inside + (to - from) as usize);
        }
        state.touch();
        drop(state);
        self.shared.gave_back(gone.len());
        for frame in gone {
            frames::release(frame, 0);
        }
        Ok(())
    }

    /// The file of that name in this directory.
    pub fn lookup(&self, name: &[u8]) -> Result<Arc<Self>, Errno> {
        let mut state = self.state.lock();
        let entries = state.directory()?;
        entries.get(name).map(Arc::clone).ok_or(Errno::ENOENT)
    }

    /// Where the link leads.
    pub fn read_link(&self) -> Result<Vec<u8>, Errno> {
        match &self.state.lock().content {
            Content::Link(target) => Ok(target.clone()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Makes a file of any kind.
    pub fn make(
        &self,
        name: &[u8],
        mode: u32,
        rdev: u32,
        target: &[u8],
        owner: Owner,
    ) -> Result<Arc<Self>, Errno> {
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if self.shared.nodes.load(Ordering::Relaxed) >= MAX_NODES || frames::is_scarce() {
            return Err(Errno::ENOSPC);
        }
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let made = node(&self.shared, number, mode, rdev, target, owner);
        let mut state = self.state.lock();
        if state.attributes.nlink == 0 {
            // Removed, but somebody is in it still.
            return Err(Errno::ENOENT);
        }
        let entries = state.directory()?;
        if entries.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        entries.insert(name.to_vec(), Arc::clone(&made));
        if mode & kind::MASK == kind::DIRECTORY {
            state.attributes.nlink += 1;
        }
        state.touch();
        self.shared.nodes.fetch_add(1, Ordering::Relaxed);
        Ok(made)
    }

    /// Makes a file without a name; with `exclusive` it never gets one.
    pub fn make_nameless(
        &self,
        mode: u32,
        exclusive: bool,
        owner: Owner,
    ) -> Result<Arc<Self>, Errno> {
        if frames::is_scarce() {
            return Err(Errno::ENOSPC);
        }
        {
            let mut state = self.state.lock();
            state.directory()?;
            if state.attributes.nlink == 0 {
                return Err(Errno::ENOENT);
            }
        }
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let made = node(&self.shared, number, kind::REGULAR | mode, 0, &[], owner);
        let mut state = made.state.lock();
        state.attributes.nlink = 0;
        state.linkable = !exclusive;
        drop(state);
        Ok(made)
    }

    /// Changes the extended attributes, and counts what they take.
    fn change_extended(
        &self,
        f: impl FnOnce(&mut xattr::Attributes) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let before = state.extended.bytes() as u64;
        f(&mut state.extended)?;
        let after = state.extended.bytes() as u64;
        state.attributes.times[2] = now();
        let all = &self.shared.extended;
        all.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
        Ok(())
    }

    /// Sets an extended attribute.
    pub fn set_attribute(&self, name: &[u8], value: Vec<u8>, flags: u32) -> Result<(), Errno> {
        let more = (name.len() + value.len()) as u64;
        let used = self.shared.extended.load(Ordering::Relaxed);
        if used + more > MAX_EXTENDED || frames::is_scarce() {
            return Err(Errno::ENOSPC);
        }
        self.change_extended(|all| all.set(name, value, flags))
    }

    /// Takes an extended attribute away.
    pub fn remove_attribute(&self, name: &[u8]) -> Result<(), Errno> {
        self.change_extended(|all| all.remove(name))
    }

    /// The value of an extended attribute.
    pub fn attribute(&self, name: &[u8]) -> Result<Vec<u8>, Errno> {
        let state = self.state.lock();
        let value = state.extended.get(name)?;
        let mut copy = Vec::new();
        copy.try_reserve_exact(value.len())
            .map_err(|_| Errno::ENOMEM)?;
        copy.extend(value);
        Ok(copy)
    }

    /// Names of all extended attributes, each with its end.
    pub fn attribute_names(&self) -> Vec<u8> {
        self.state.lock().extended.list()
    }

    /// One more name, in this directory, for a file.
    pub fn link(&self, name: &[u8], file: &Arc<Self>) -> Result<(), Errno> {
        if !Arc::ptr_eq(&self.shared, &file.shared) {
            return Err(Errno::EXDEV);
        }
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        {
            let state = file.state.lock();
            if state.attributes.mode & kind::MASK == kind::DIRECTORY {
                return Err(Errno::EPERM);
            }
            if state.attributes.nlink == 0 && !state.linkable {
                return Err(Errno::ENOENT);
            }
        }
        let mut state = self.state.lock();
        let entries = state.directory()?;
        if entries.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        entries.insert(name.to_vec(), Arc::clone(file));
        state.touch();
        drop(state);
        self.shared.nodes.fetch_add(1, Ordering::Relaxed);
        let mut state = file.state.lock();
        state.attributes.nlink = state.attributes.nlink.saturating_add(1);
        state.linkable = false;
        state.attributes.times[2] = now();
        Ok(())
    }

    /// Takes a name away.
    pub fn unlink(&self, name: &[u8], directory: bool) -> Result<(), Errno> {
        let file = self.lookup(name)?;
        {
            let mut inner = file.state.lock();
            match (&inner.content, directory) {
                (Content::Directory(entries), true) if !entries.is_empty() => {
                    return Err(Errno::ENOTEMPTY);
                }
                (Content::Directory(_), false) => return Err(Errno::EISDIR),
                (Content::Directory(_), true) => inner.attributes.nlink = 0,
                (_, true) => return Err(Errno::ENOTDIR),
                _ => inner.attributes.nlink = inner.attributes.nlink.saturating_sub(1),
            }
        }
        let gone = {
            let mut state = self.state.lock();
            let gone = state.directory()?.remove(name);
            if directory {
                state.attributes.nlink = state.attributes.nlink.saturating_sub(1);
            }
            state.touch();
            gone
        };
        self.shared.nodes.fetch_sub(1, Ordering::Relaxed);
        drop(gone);
        drop(file);
        Ok(())
    }

    /// Gives a file another name, in place of what has it. That the new place is not below the file
    /// itself, the caller has made sure of.
    pub fn rename(&self, name: &[u8], to: &Arc<Self>, new: &[u8]) -> Result<(), Errno> {
        if !Arc::ptr_eq(&self.shared, &to.shared) {
            return Err(Errno::EXDEV);
        }
        if new.is_empty() || new.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        let file = self.lookup(name)?;
        let is_directory = file.attributes().mode & kind::MASK == kind::DIRECTORY;
        match to.lookup(new) {
            Ok(other) if Arc::ptr_eq(&other, &file) => return Ok(()),
            Ok(other) => {
                let other_is = other.attributes().mode & kind::MASK == kind::DIRECTORY;
                match (is_directory, other_is) {
                    (true, false) => return Err(Errno::ENOTDIR),
                    (false, true) => return Err(Errno::EISDIR),
                    _ => to.unlink(new, other_is)?,
                }
            }
            Err(Errno::ENOENT) => {}
            Err(e) => return Err(e),
        }
        {
            let mut state = self.state.lock();
            state.directory()?.remove(name);
            if is_directory {
                state.attributes.nlink = state.attributes.nlink.saturating_sub(1);
            }
            state.touch();
        }
        let mut state = to.state.lock();
        state.directory()?.insert(new.to_vec(), file);
        if is_directory {
            state.attributes.nlink += 1;
        }
        state.touch();
        Ok(())
    }

    /// Lets two files have each other's names. That neither is below the other, the caller has made
    /// sure of.
    pub fn exchange(&self, name: &[u8], to: &Arc<Self>, new: &[u8]) -> Result<(), Errno> {
        if !Arc::ptr_eq(&self.shared, &to.shared) {
            return Err(Errno::EXDEV);
        }
        let (here, there) = (self.lookup(name)?, to.lookup(new)?);
        let is_directory =
            |node: &Self| u32::from(node.attributes().mode & kind::MASK == kind::DIRECTORY);
        let (lost, won) = (is_directory(&here), is_directory(&there));
        {
            let mut state = self.state.lock();
            state.directory()?.insert(name.to_vec(), there);
            let links = &mut state.attributes.nlink;
            *links = links.saturating_sub(lost) + won;
            state.touch();
        }
        let mut state = to.state.lock();
        state.directory()?.insert(new.to_vec(), here);
        let links = &mut state.attributes.nlink;
        *links = links.saturating_sub(won) + lost;
        state.touch();
        Ok(())
    }

    /// All entries of the directory.
    pub fn entries(&self) -> Result<Vec<DirEntry>, Errno> {
        let mut state = self.state.lock();
        let children = state.directory()?;
        let mut all = Vec::new();
        // In one piece: of a very large directory there may be none.
        all.try_reserve_exact(children.len() + 2)
            .map_err(|_| Errno::ENOMEM)?;
        let mut add = |name: &[u8], ino: u64, mode: u32| {
            all.push(DirEntry {
                ino,
                offset: 0,
                kind: (mode >> 12) as u8,
                name: name.to_vec(),
            });
        };
        add(b".", self.number, kind::DIRECTORY);
        add(b"..", self.number, kind::DIRECTORY);
        for (name, node) in children {
            add(name, node.number, node.attributes().mode);
        }
        Ok(all)
    }

    fn take_page(&self) -> Result<u64, Errno> {
        if self.shared.used.load(Ordering::Relaxed) >= self.shared.limit {
            return Err(Errno::ENOSPC);
        }
        if !self.shared.charge.add_to_files() {
            return Err(Errno::ENOSPC);
        }
        let Some(frame) = frames::allocate_user() else {
            self.shared.charge.take_from_files(1);
            return Err(Errno::ENOMEM);
        };
        self.shared.used.fetch_add(1, Ordering::Relaxed);
        Ok(frame)
    }

    /// The frame of a page, made if there is none; `EFAULT` past the end.
    pub fn page(&self, index: u64) -> Result<u64, Errno> {
        let mut state = self.state.lock();
        if index >= state.attributes.size.div_ceil(PAGE) {
            return Err(Errno::EFAULT);
        }
        let Content::File(pages) = &mut state.content else {
            return Err(Errno::EFAULT);
        };
        if let Some(frame) = pages.get(&index) {
            return Ok(*frame);
        }
        let frame = self.take_page()?;
        pages.insert(index, frame);
        Ok(frame)
    }

    /// Whether a page is more than a hole.
    pub fn has_page(&self, index: u64) -> bool {
        match &self.state.lock().content {
            Content::File(pages) => pages.contains_key(&index),
            _ => false,
        }
    }

    /// Reads; holes are zeros.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> usize {
        let state = self.state.lock();
        let Content::File(pages) = &state.content else {
            return 0;
        };
        let end = state
            .attributes
            .size
            .min(offset.saturating_add(to.len() as u64));
        let mut at = offset;
        while at < end {
            let inside = (at % PAGE) as usize;
            let len = (PAGE as usize - inside).min((end - at) as usize);
            let done = (at - offset) as usize;
            let Some(to) = to.get_mut(done..done + len) else {
                break;
            };
            match pages.get(&(at / PAGE)) {
                // SAFETY: the file owns the frame, and is locked.
                Some(frame) => match unsafe { frames::bytes(*frame) }.get(inside..inside + len) {
                    Some(from) => to.copy_from_slice(from),
                    None => break,
                },
                None => to.fill(0),
            }
            at += len as u64;
        }
        end.saturating_sub(offset) as usize
    }

    /// Writes; the file grows as needed.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<usize, Errno> {
        let end = offset.saturating_add(from.len() as u64);
        if end > MAX_SIZE {
            return Err(Errno::EFBIG);
        }
        let mut state = self.state.lock();
        let sealed = state.seals & (seal::WRITE | seal::FUTURE_WRITE) != 0
            || state.seals & seal::GROW != 0 && end > state.attributes.size;
        if sealed && !from.is_empty() {
            return Err(Errno::EPERM);
        }
        if state.attributes.mode & 0o6000 != 0
            && !crate::task::current().credentials.lock().is_root()
        {
            drop_privileges(&mut state.attributes);
        }
        let mut done = 0;
        while done < from.len() {
            let at = offset + done as u64;
            let inside = (at % PAGE) as usize;
            let len = (PAGE as usize - inside).min(from.len() - done);
            let Content::File(pages) = &mut state.content else {
                return Err(Errno::EINVAL);
            };
            let frame = match pages.get(&(at / PAGE)) {
                Some(frame) => *frame,
                None => match self.take_page() {
                    Ok(frame) => {
                        pages.insert(at / PAGE, frame);
                        frame
                    }
                    Err(_) if done > 0 => break,
                    Err(e) => return Err(e),
                },
            };
            // SAFETY: the file owns the frame, and is locked.
            let bytes = unsafe { frames::bytes(frame) };
            if let (Some(to), Some(from)) = (
                bytes.get_mut(inside..inside + len),
                from.get(done..done + len),
            ) {
                to.copy_from_slice(from);
            }
            done += len;
        }
        state.attributes.size = state.attributes.size.max(offset + done as u64);
        state.touch();
        Ok(done)
    }

    /// Its record locks.
    pub fn with_locks<T>(&self, f: impl FnOnce(&mut Locks) -> T) -> T {
        f(&mut self.state.lock().locks)
    }

    /// Figures of the file system.
    pub fn statistics(&self) -> [u64; 6] {
        const TMPFS_MAGIC: u64 = 0x0102_1994;
        let used = self.shared.used.load(Ordering::Relaxed);
        let nodes = self.shared.nodes.load(Ordering::Relaxed);
        [
            TMPFS_MAGIC,
            PAGE,
            self.shared.limit,
            self.shared.limit.saturating_sub(used),
            MAX_NODES,
            MAX_NODES.saturating_sub(nodes),
        ]
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Deep trees are taken apart here, not by recursion: a program chooses their depth, and
        // kernel stacks are small.
        let mut todo: Vec<Arc<Self>> = Vec::new();
        let take = |node: &mut Self, todo: &mut Vec<Arc<Self>>| {
            let mut state = node.state.lock();
            let extended = state.extended.bytes() as u64;
            node.shared.extended.fetch_sub(extended, Ordering::Relaxed);
            state.extended = xattr::Attributes::default();
            match &mut state.content {
                Content::Directory(entries) => {
                    todo.extend(core::mem::take(entries).into_values());
                }
                Content::File(pages) => {
                    let pages = core::mem::take(pages);
                    node.shared.gave_back(pages.len());
                    for frame in pages.into_values() {
                        frames::release(frame, 0);
                    }
                }
                _ => {}
            }
        };
        take(self, &mut todo);
        while let Some(node) = todo.pop() {
            if let Some(mut node) = Arc::into_inner(node) {
                take(&mut node, &mut todo);
            }
        }
    }
}
