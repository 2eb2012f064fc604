//! Client of a virtio-fs share: nodes, names, and the cache of their pages.

mod extended;
mod pages;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use appkernel_core::cmdline::Device;
use appkernel_core::errno::Errno;
use appkernel_core::fuse::{
    self as wire, Attributes, Body, Caller, DirEntry, Entry, OUT_HEADER, Op, ROOT, Reader,
};
use appkernel_core::locks::Locks;
use appkernel_hal::sync::Mutex;
use appkernel_hal::{PAGE, clock, frames};

use super::memory::new_device;
use super::node::{Owner, kind};
use super::virtio::{Caller as Channel, Transport};
use crate::log;

const DEVICE_TYPE: u32 = 26;
const TAG_LEN: u64 = 36;
/// Bytes read at once, also ahead of what is wanted.
const READ_CHUNK: u64 = 64 << 10;
/// Bytes written at once.
pub const WRITE_CHUNK: usize = 32 << 10;
/// Files kept open for reading pages; beyond it they are closed after each read.
const KEPT_HANDLES: usize = 1024;
/// Names remembered, at most: some 10 MiB.
const MAX_NAMES: usize = 65536;
/// Node number of a name that is known not to be there.
const NOTHING: u64 = 0;
/// Entries of one directory, at most.
const MAX_ENTRIES: usize = 1 << 20;
/// What is valid for so long is changed by nobody else: a list of a directory is kept then. Such a
/// promise is made for a day, others for a second.
const PROMISE_NS: u64 = 3600 * 1_000_000_000;
/// Entries of a directory whose list is kept, at most.
const KEPT_ENTRIES: usize = 256;
/// Directories whose list is kept, at most.
const KEPT_LISTS: usize = 128;
/// Longest target of a link that is kept.
const KEPT_TARGET: usize = 128;
const O_DIRECTORY: u32 = 0o200_000;
/// In `setattr`.
mod valid {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 2;
    pub const GID: u32 = 4;
    pub const SIZE: u32 = 8;
    pub const ATIME: u32 = 16;
    pub const MTIME: u32 = 32;
}

/// A change of attributes; `None` stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    /// Nanoseconds since 1970.
    pub atime: Option<u64>,
    pub mtime: Option<u64>,
}

/// By directory and name: the node, and until when this is valid.
type Names = BTreeMap<(u64, Vec<u8>), (u64, u64)>;

/// A mounted share.
pub struct Fuse {
    tag: String,
    /// Number of the file system, as `stat` shows it.
    number: u64,
    device: Mutex<(Channel, u64)>,
    nodes: Mutex<BTreeMap<u64, Arc<Node>>>,
    names: Mutex<Names>,
    handles: Mutex<usize>,
    /// Nodes without a name: the host keeps them open until they are forgotten.
    removed: Mutex<Vec<u64>>,
    /// Directories whose list is kept, the oldest first.
    lists: Mutex<VecDeque<u64>>,
    me: Weak<Self>,
}

/// All shares that are mounted.
static ALL: Mutex<Vec<Arc<Fuse>>> = Mutex::new(Vec::new());

/// The mounted share of a tag.
pub fn mounted(tag: &str) -> Option<Arc<Fuse>> {
    ALL.lock().iter().find(|fuse| fuse.tag == tag).cloned()
}

/// Frees pages of the cache that nobody has mapped.
pub fn shrink_all() -> usize {
    let all = ALL.lock().clone();
    all.iter().map(|fuse| fuse.shrink()).sum()
}

/// The same in the middle of anything: what is locked is left alone.
pub fn shrink_in_need() -> bool {
    let Some(all) = ALL.try_lock() else {
        return false;
    };
    let mut freed = 0;
    for fuse in all.iter() {
        let Some(nodes) = fuse.nodes.try_lock() else {
            continue;
        };
        freed += nodes.values().map(|node| node.shrink()).sum::<usize>();
    }
    freed > 0
}

/// A file of the share.
pub struct Node {
    fuse: Weak<Fuse>,
    id: u64,
    state: Mutex<NodeState>,
}

#[derive(Default)]
struct NodeState {
    attributes: Attributes,
    valid_until: u64,
    /// The times that the host gives next are of our own writing.
    changed_by_us: bool,
    /// Where the link leads. A link is never changed, only replaced by another file.
    target: Option<Vec<u8>>,
    /// What is in the directory, where the host promised that only we change it.
    entries: Option<Arc<Vec<DirEntry>>>,
    /// The host said of this file that only we change it.
    ours_alone: bool,
    /// Frames by page number.
    pages: BTreeMap<u64, u64>,
    /// Pages that programs can change through mappings, and the handle to write them back with.
    /// They stay so while the file is known: nobody tells when such a page is changed again.
    dirty: BTreeSet<u64>,
    write_handle: Option<u64>,
    /// How often the host has named it to us: so often it is to be forgotten.
    lookups: u64,
    /// Shared mappings of the file.
    mappings: usize,
    handle: Option<u64>,
    locks: Locks,
}

impl Fuse {
    /// Tag of the share behind a device, if there is one.
    pub fn tag_of(device: &Device, ram_end: u64) -> Option<String> {
        let (transport, kind) = Transport::find(device, ram_end)?;
        if kind != DEVICE_TYPE {
            return None;
        }
        let config: Vec<u8> = (0..TAG_LEN).map(|i| transport.config(i)).collect();
        Some(wire::tag(&config))
    }

    /// Mounts the share behind a device; `None` if it is not one, or does not work.
    pub fn probe(device: &Device, ram_end: u64) -> Option<Arc<Self>> {
        let tag = Self::tag_of(device, ram_end)?;
        let (transport, _) = Transport::find(device, ram_end)?;
        let channel = Channel::start(transport, 2)?;
        let fuse = Arc::new_cyclic(|me| Self {
            tag,
            number: new_device(),
            device: Mutex::new((channel, 0)),
            nodes: Mutex::new(BTreeMap::new()),
            names: Mutex::new(BTreeMap::new()),
            handles: Mutex::new(0),
            removed: Mutex::default(),
            lists: Mutex::default(),
            me: Weak::clone(me),
        });
        let body = Body::new().u32(7).u32(31).u32(READ_CHUNK as u32).u32(0);
        match fuse.call(Op::Init, 0, &body.0, &[], 64, |answer| {
            let mut reader = Reader(answer);
            Ok((reader.u32()?, reader.u32()?))
        }) {
            Ok((7, 27..)) => {}
            Ok((major, minor)) => {
                log!(
                    "share {:?}: speaks FUSE {major}.{minor}, 7.27 or newer is needed",
                    fuse.tag
                );
                return None;
            }
            Err(e) => {
                log!("share {:?}: cannot be mounted: {}", fuse.tag, e.name());
                return None;
            }
        }
        let root = Arc::new(Node {
            fuse: Arc::downgrade(&fuse),
            id: ROOT,
            state: Mutex::new(NodeState::default()),
        });
        fuse.nodes.lock().insert(ROOT, Arc::clone(&root));
        root.attributes().ok()?;
        ALL.lock().push(Arc::clone(&fuse));
        Some(fuse)
    }

    /// Its root directory.
    pub fn root(&self) -> Arc<Node> {
        match self.nodes.lock().get(&ROOT) {
            Some(root) => Arc::clone(root),
            None => panic!("the root of a share is never dropped"),
        }
    }

    fn call<T>(
        &self,
        op: Op,
        node: u64,
        body: &[u8],
        data: &[u8],
        room: usize,
        f: impl FnOnce(&[u8]) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.call_as(Owner::default(), op, node, &[body, data], room, f)
    }

    /// As `call`; what is made by it belongs to `owner`.
    fn call_as<T>(
        &self,
        owner: Owner,
        op: Op,
        node: u64,
        parts: &[&[u8]; 2],
        room: usize,
        f: impl FnOnce(&[u8]) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut device = self.device.lock();
        device.1 += 1;
        let unique = device.1;
        let caller = Caller {
            uid: owner.uid,
            gid: owner.gid,
            pid: 0,
        };
        let [body, data] = parts;
        let header = wire::header(op, node, unique, caller, body.len() + data.len());
        let answer = device.0.call(&[&header, body, data], OUT_HEADER + room)?;
        f(wire::answer(answer, unique)?)
    }

    /// Frees pages of the cache that nobody has mapped.
    pub fn shrink(&self) -> usize {
        let nodes: Vec<_> = self.nodes.lock().values().map(Arc::clone).collect();
        nodes.iter().map(|node| node.shrink()).sum()
    }

    fn enter(&self, entry: &Entry) -> Arc<Node> {
        let node = {
            let mut nodes = self.nodes.lock();
            let made = || {
                Arc::new(Node {
                    fuse: Weak::clone(&self.me),
                    id: entry.node,
                    state: Mutex::new(NodeState::default()),
                })
            };
            Arc::clone(nodes.entry(entry.node).or_insert_with(made))
        };
        let mut state = node.state.lock();
        state.lookups += 1;
        state.update(entry.attributes, entry.valid_ns);
        drop(state);
        node
    }

    fn node(&self, id: u64) -> Option<Arc<Node>> {
        self.nodes.lock().get(&id).map(Arc::clone)
    }

    /// The node of that name in a directory, if it is known.
    fn known(&self, directory: u64, name: &[u8]) -> Option<Arc<Node>> {
        let key = (directory, name.to_vec());
        let (id, _) = self.names.lock().get(&key).copied()?;
        self.node(id)
    }

    /// A node has lost a name; with the last one it is forgotten, as soon as nobody uses it.
    fn lost_name(&self, node: Option<Arc<Node>>) {
        if let Some(node) = node {
            let last = {
                let mut state = node.state.lock();
                state.valid_until = 0;
                let is_directory = state.attributes.mode & kind::MASK == kind::DIRECTORY;
                is_directory || state.attributes.nlink <= 1
            };
            if last {
                self.removed.lock().push(node.id);
            }
        }
        self.forget_removed();
    }

    /// Tells the host of removed nodes that nobody uses any more: it keeps a descriptor for each,
    /// and has a limit of these.
    fn forget_removed(&self) {
        let mut gone = Vec::new();
        {
            let (mut removed, mut nodes) = (self.removed.lock(), self.nodes.lock());
            removed.retain(|id| match nodes.get(id) {
                Some(node) if Arc::strong_count(node) == 1 => {
                    gone.extend(nodes.remove(id));
                    false
                }
                found => found.is_some(),
            });
        }
        for node in gone {
            let (lookups, handles) = {
                let mut state = node.state.lock();
                let handles = [state.handle.take(), state.write_handle.take()];
                (state.lookups, handles)
            };
            if handles[0].is_some() {
                let mut kept = self.handles.lock();
                *kept = kept.saturating_sub(1);
            }
            for handle in handles.into_iter().flatten() {
                node.release_handle(Op::Release, handle);
            }
            let mut names = self.names.lock();
            let below: Vec<_> = names
                .range((node.id, Vec::new())..(node.id.saturating_add(1), Vec::new()))
                .map(|(key, _)| key.clone())
                .collect();
            for key in below {
                names.remove(&key);
            }
            drop(names);
            let body = Body::new().u64(lookups);
            // There is no answer to this one.
            let _ = self.call(Op::Forget, node.id, &body.0, &[], 16, |_| Ok(()));
        }
    }
}

impl NodeState {
    fn update(&mut self, attributes: Attributes, valid_ns: u64) {
        let same = |a: &Attributes| (a.size, a.times[1]);
        let ours = core::mem::take(&mut self.changed_by_us);
        let expected = ours && attributes.size == self.attributes.size;
        if same(&attributes) != same(&self.attributes) && !expected {
            // Changed by the host, or by us: what is cached may be old.
            self.drop_pages(0);
        }
        self.ours_alone = valid_ns >= PROMISE_NS;
        self.attributes = attributes;
        self.valid_until = clock::monotonic_ns().saturating_add(valid_ns);
    }

    fn drop_pages(&mut self, from: u64) {
        let dropped = self.pages.split_off(&from);
        for (index, frame) in dropped {
            // A page that programs change through a mapping is the file: it is not read again.
            if self.dirty.contains(&index) {
                self.pages.insert(index, frame);
            } else {
                frames::release(frame, 0);
            }
        }
    }
}

impl Drop for NodeState {
    fn drop(&mut self) {
        self.dirty.clear();
        self.drop_pages(0);
    }
}

impl Node {
    /// Frees pages of the cache that nobody has mapped.
    fn shrink(&self) -> usize {
        // A node in use is skipped: it may be the one that needs the memory.
        let Some(mut state) = self.state.try_lock() else {
            return 0;
        };
        let mut freed = 0;
        let NodeState { pages, dirty, .. } = &mut *state;
        pages.retain(|index, frame| {
            if frames::owners(*frame) > 1 || dirty.contains(index) {
                return true;
            }
            frames::release(*frame, 0);
            freed += 1;
            false
        });
        freed
    }

    fn fuse(&self) -> Result<Arc<Fuse>, Errno> {
        self.fuse.upgrade().ok_or(Errno::EIO)
    }

    /// Its kind, as in a mode.
    pub fn kind(&self) -> u32 {
        self.state.lock().attributes.mode & kind::MASK
    }

    /// Number of the file system.
    pub fn device(&self) -> u64 {
        self.fuse.upgrade().map_or(0, |fuse| fuse.number)
    }

    /// Number in it.
    pub fn number(&self) -> u64 {
        self.id
    }

    /// Its attributes; asks the host if they are old.
    pub fn attributes(&self) -> Result<Attributes, Errno> {
        {
            let state = self.state.lock();
            if clock::monotonic_ns() < state.valid_until {
                return Ok(state.attributes);
            }
        }
        let body = Body::new().u32(0).u32(0).u64(0);
        self.attribute_call(Op::Getattr, &body)
    }

    fn attribute_call(&self, op: Op, body: &Body) -> Result<Attributes, Errno> {
        let (attributes, valid) = self
            .fuse()?
            .call(op, self.id, &body.0, &[], 104, |answer| {
                let mut reader = Reader(answer);
                let (seconds, ns) = (reader.u64()?, reader.u32()?);
                reader.u32()?;
                let valid = seconds
                    .saturating_mul(1_000_000_000)
                    .saturating_add(ns.into());
                Ok((Attributes::parse(&mut reader)?, valid))
            })?;
        self.state.lock().update(attributes, valid);
        Ok(attributes)
    }

    /// Changes attributes.
    pub fn change(&self, change: &Change) -> Result<(), Errno> {
        let mut flags = 0;
        for (given, flag) in [
            (change.mode.is_some(), valid::MODE),
            (change.uid.is_some(), valid::UID),
            (change.gid.is_some(), valid::GID),
            (change.size.is_some(), valid::SIZE),
            (change.atime.is_some(), valid::ATIME),
            (change.mtime.is_some(), valid::MTIME),
        ] {
            if given {
                flags |= flag;
            }
        }
        let (atime, mtime) = (change.atime.unwrap_or(0), change.mtime.unwrap_or(0));
        const SECOND: u64 = 1_000_000_000;
        let body = Body::new()
            .u32(flags)
            .u32(0)
            .u64(0)
            .u64(change.size.unwrap_or(0))
            .u64(0)
            .u64(atime / SECOND)
            .u64(mtime / SECOND)
            .u64(0)
            .u32((atime % SECOND) as u32)
            .u32((mtime % SECOND) as u32)
            .u32(0)
            .u32(change.mode.unwrap_or(0))
            .u32(0)
            .u32(change.uid.unwrap_or(0))
            .u32(change.gid.unwrap_or(0))
            .u32(0);
        self.attribute_call(Op::Setattr, &body)?;
        // A page that is mapped stays; what is past the new end of it is zeros.
        if let Some(size) = change.size
            && let Some(frame) = self.state.lock().pages.get(&(size / PAGE))
        {
            // SAFETY: the cache owns the frame, and the state is locked.
            let bytes = unsafe { frames::bytes(*frame) };
            bytes
                .get_mut((size % PAGE) as usize..)
                .unwrap_or_default()
                .fill(0);
        }
        Ok(())
    }

    fn entry_call(&self, owner: Owner, op: Op, body: &[u8]) -> Result<Arc<Node>, Errno> {
        let fuse = self.fuse()?;
        let entry = fuse.call_as(owner, op, self.id, &[body, &[]], 128, |answer| {
            Entry::parse(&mut Reader(answer))
        })?;
        Ok(fuse.enter(&entry))
    }

    /// The file of that name in this directory.
    pub fn lookup(&self, name: &[u8]) -> Result<Arc<Node>, Errno> {
        let fuse = self.fuse()?;
        let key = (self.id, name.to_vec());
        let cached = fuse.names.lock().get(&key).copied();
        if let Some((id, until)) = cached
            && clock::monotonic_ns() < until
        {
            if id == NOTHING {
                return Err(Errno::ENOENT);
            }
            if let Some(node) = fuse.nodes.lock().get(&id) {
                return Ok(Arc::clone(node));
            }
        }
        let body = Body::new().name(name);
        let found = fuse.call(Op::Lookup, self.id, &body.0, &[], 128, |answer| {
            Entry::parse_found(&mut Reader(answer))
        })?;
        let (number, valid_ns) = match &found {
            Ok(entry) => (entry.node, entry.valid_ns),
            Err(missing_ns) => (NOTHING, *missing_ns),
        };
        let until = clock::monotonic_ns().saturating_add(valid_ns);
        let mut names = fuse.names.lock();
        // A cache: what was asked for long ago may be asked for again.
        if names.len() >= MAX_NAMES {
            names.clear();
        }
        names.insert(key, (number, until));
        drop(names);
        match found {
            Ok(entry) => Ok(fuse.enter(&entry)),
            Err(_) => Err(Errno::ENOENT),
        }
    }

    fn forget_name(&self, name: &[u8]) {
        if let Ok(fuse) = self.fuse() {
            fuse.names.lock().remove(&(self.id, name.to_vec()));
        }
        let mut state = self.state.lock();
        state.valid_until = 0;
        state.entries = None;
    }

    /// Where the link leads.
    pub fn read_link(&self) -> Result<Vec<u8>, Errno> {
        if let Some(target) = self.state.lock().target.clone() {
            return Ok(target);
        }
        let target =
            self.fuse()?
                .call(Op::Readlink, self.id, &[], &[], super::PATH_MAX, |answer| {
                    Ok(answer.to_vec())
                })?;
        if target.len() <= KEPT_TARGET {
            self.state.lock().target = Some(target.clone());
        }
        Ok(target)
    }

    fn open_handle(&self, op: Op, flags: u32) -> Result<u64, Errno> {
        let body = Body::new().u32(flags).u32(0);
        self.fuse()?
            .call(op, self.id, &body.0, &[], 16, |answer| Reader(answer).u64())
    }

    fn release_handle(&self, op: Op, handle: u64) {
        let body = Body::new().u64(handle).u32(0).u32(0).u64(0);
        // Nothing can be done about a host that cannot close a file.
        let _ = self
            .fuse()
            .and_then(|f| f.call(op, self.id, &body.0, &[], 16, |_| Ok(())));
    }

    /// Opens it for writing; the handle is for `write` and `close`.
    pub fn open_for_writing(&self) -> Result<u64, Errno> {
        self.open_handle(Op::Open, 2)
    }

    /// Closes a handle.
    pub fn close(&self, handle: u64) {
        self.release_handle(Op::Release, handle);
    }

    /// Makes a file and opens it for writing.
    pub fn create(&self, name: &[u8], mode: u32, owner: Owner) -> Result<(Arc<Node>, u64), Errno> {
        let fuse = self.fuse()?;
        // O_RDWR | O_CREAT | O_EXCL: whoever made it in the meantime is not overwritten.
        let body = Body::new()
            .u32(0o302)
            .u32(mode | kind::REGULAR)
            .u32(0)
            .u32(0)
            .name(name);
        let (entry, handle) =
            fuse.call_as(owner, Op::Create, self.id, &[&body.0, &[]], 144, |answer| {
                let mut reader = Reader(answer);
                Ok((Entry::parse(&mut reader)?, reader.u64()?))
            })?;
        self.forget_name(name);
        Ok((fuse.enter(&entry), handle))
    }

    /// Makes a directory.
    pub fn make_directory(&self, name: &[u8], mode: u32, owner: Owner) -> Result<(), Errno> {
        self.entry_call(owner, Op::Mkdir, &Body::new().u32(mode).u32(0).name(name).0)?;
        self.forget_name(name);
        Ok(())
    }

    /// Makes a symbolic link.
    pub fn make_link(&self, name: &[u8], target: &[u8], owner: Owner) -> Result<(), Errno> {
        self.entry_call(owner, Op::Symlink, &Body::new().name(name).name(target).0)?;
        self.forget_name(name);
        Ok(())
    }

    /// Makes a fifo or a socket. Device files of the host are none of a program's business.
    pub fn make_special(
        &self,
        name: &[u8],
        mode: u32,
        rdev: u32,
        owner: Owner,
    ) -> Result<(), Errno> {
        if !matches!(mode & kind::MASK, kind::FIFO | kind::SOCKET) {
            return Err(Errno::EPERM);
        }
        let body = Body::new().u32(mode).u32(rdev).u32(0).u32(0).name(name);
        self.entry_call(owner, Op::Mknod, &body.0)?;
        self.forget_name(name);
        Ok(())
    }

    /// One more name, in this directory, for a file.
    pub fn link(&self, name: &[u8], file: &Self) -> Result<(), Errno> {
        self.entry_call(
            Owner::default(),
            Op::Link,
            &Body::new().u64(file.id).name(name).0,
        )?;
        self.forget_name(name);
        file.state.lock().valid_until = 0;
        // It may have had none.
        if let Ok(fuse) = self.fuse() {
            fuse.removed.lock().retain(|id| *id != file.id);
        }
        Ok(())
    }

    /// Takes a name away.
    pub fn unlink(&self, name: &[u8], directory: bool) -> Result<(), Errno> {
        let op = if directory { Op::Rmdir } else { Op::Unlink };
        let body = Body::new().name(name);
        let fuse = self.fuse()?;
        fuse.call(op, self.id, &body.0, &[], 16, |_| Ok(()))?;
        let node = fuse.known(self.id, name);
        self.forget_name(name);
        fuse.lost_name(node);
        Ok(())
    }

    /// Gives a file another name.
    pub fn rename(&self, name: &[u8], to: &Self, new: &[u8]) -> Result<(), Errno> {
        let body = Body::new().u64(to.id).name(name).name(new);
        let fuse = self.fuse()?;
        let (from, replaced) = (fuse.known(self.id, name), fuse.known(to.id, new));
        fuse.call(Op::Rename, self.id, &body.0, &[], 16, |_| Ok(()))?;
        self.forget_name(name);
        to.forget_name(new);
        if let Some(from) = &from {
            from.state.lock().valid_until = 0;
        }
        // Two names of one file: nothing has changed then.
        let same = |a: &Arc<Self>| from.as_ref().is_some_and(|from| from.id == a.id);
        fuse.lost_name(replaced.filter(|node| !same(node)));
        Ok(())
    }

    /// Lets two files have each other's names.
    pub fn exchange(&self, name: &[u8], to: &Self, new: &[u8]) -> Result<(), Errno> {
        const EXCHANGE: u64 = 2;
        let body = Body::new().u64(to.id).u64(EXCHANGE).name(name).name(new);
        let fuse = self.fuse()?;
        let both = [fuse.known(self.id, name), fuse.known(to.id, new)];
        fuse.call(Op::Rename2, self.id, &body.0, &[], 16, |_| Ok(()))?;
        self.forget_name(name);
        to.forget_name(new);
        for node in both.iter().flatten() {
            node.state.lock().valid_until = 0;
        }
        Ok(())
    }

    /// All entries of the directory.
    pub fn entries(&self) -> Result<Vec<DirEntry>, Errno> {
        if let Some(kept) = &self.state.lock().entries {
            return Ok(Vec::clone(kept));
        }
        let handle = self.open_handle(Op::Opendir, O_DIRECTORY)?;
        let result = self.read_entries(handle);
        self.release_handle(Op::Releasedir, handle);
        let entries = result?;
        let fuse = self.fuse()?;
        let mut lists = fuse.lists.lock();
        let alone = self.state.lock().ours_alone;
        if alone && entries.len() <= KEPT_ENTRIES {
            lists.retain(|id| *id != self.id);
            lists.push_back(self.id);
            self.state.lock().entries = Some(Arc::new(entries.clone()));
            let oldest = (lists.len() > KEPT_LISTS).then(|| lists.pop_front());
            drop(lists);
            if let Some(node) = oldest.flatten().and_then(|id| fuse.node(id)) {
                node.state.lock().entries = None;
            }
        }
        Ok(entries)
    }

    fn read_entries(&self, handle: u64) -> Result<Vec<DirEntry>, Errno> {
        let mut all: Vec<DirEntry> = Vec::new();
        while all.len() < MAX_ENTRIES {
            let offset = all.last().map_or(0, |e| e.offset);
            let room = 32 << 10;
            let body = Body::new()
                .u64(handle)
                .u64(offset)
                .u32(room)
                .u32(0)
                .u64(0)
                .u32(0)
                .u32(0);
            let fuse = self.fuse()?;
            let more = fuse.call(
                Op::Readdir,
                self.id,
                &body.0,
                &[],
                room as usize,
                wire::directory,
            )?;
            if more.is_empty() {
                break;
            }
            // In one piece: of a very large directory there is none.
            all.try_reserve(more.len()).map_err(|_| Errno::ENOMEM)?;
            all.extend(more);
        }
        Ok(all)
    }

    /// Its record locks.
    pub fn with_locks<T>(&self, f: impl FnOnce(&mut Locks) -> T) -> T {
        f(&mut self.state.lock().locks)
    }

    /// Figures of the file system: type, block size, blocks, free blocks, files, free files.
    pub fn statistics(&self) -> Result<[u64; 6], Errno> {
        const FUSE_MAGIC: u64 = 0x6573_5546;
        self.fuse()?
            .call(Op::Statfs, self.id, &[], &[], 80, |answer| {
                let mut reader = Reader(answer);
                let (blocks, free, _) = (reader.u64()?, reader.u64()?, reader.u64()?);
                let (files, files_free) = (reader.u64()?, reader.u64()?);
                let block = reader.u32()?;
                Ok([FUSE_MAGIC, block.into(), blocks, free, files, files_free])
            })
    }
}
