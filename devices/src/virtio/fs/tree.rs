//! The files the guest knows of.
//!
//! A node is made by a lookup and lives until the guest forgets it. It remembers where it was
//! found (parent and name); a descriptor is opened only when one is needed, checked against the
//! identity seen at the lookup, and may be closed again, least recently used first. Names change
//! with the guest's own renames; a file the guest removes keeps its descriptor until it is
//! forgotten. If the host moves a file away, the guest gets `ESTALE` and looks it up again.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::config::FsLimits;
use super::sys::{self, Stat, errno};

/// Node id of the shared directory itself.
pub(super) const ROOT: u64 = 1;
/// Longest chain of directories followed to open a node again. `PATH_MAX` allows 2,048; more means
/// that the host moved directories into each other's place.
const MAX_DEPTH: usize = 4096;

/// What makes a file itself on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    dev: u64,
    ino: u64,
    mount: u64,
}

impl FileId {
    pub(super) fn of(stat: &Stat) -> Self {
        Self {
            dev: stat.st.st_dev,
            ino: stat.st.st_ino,
            mount: stat.mount,
        }
    }
}

/// What a file looked like when it was last opened: if it still does, the guest's cached pages
/// are still right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    size: i64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Version {
    pub(super) fn of(stat: &Stat) -> Self {
        let st = &stat.st;
        Self {
            size: st.st_size,
            mtime: (st.st_mtime, st.st_mtime_nsec),
            ctime: (st.st_ctime, st.st_ctime_nsec),
        }
    }
}

#[derive(Debug)]
pub(super) struct Node {
    /// `None` after a restore that did not find the file.
    pub id: Option<FileId>,
    /// `S_IFMT` bits.
    pub kind: u32,
    /// Lookups the guest has not forgotten.
    pub lookups: u64,
    /// Nodes found below this one, and open handles.
    pub uses: u64,
    pub parent: u64,
    pub name: CString,
    fd: Option<Arc<OwnedFd>>,
    /// Parent and name lead here no more: the descriptor is the only way.
    pub detached: bool,
    used_at: u64,
    pub version: Option<Version>,
}

#[derive(Debug)]
pub(super) struct Tree {
    nodes: HashMap<u64, Node>,
    by_id: HashMap<FileId, u64>,
    next: u64,
    /// Nodes with a descriptor.
    open: Vec<u64>,
    clock: u64,
    root_mount: u64,
    pub limits: FsLimits,
    pub limit_hits: u64,
    limit_logged: bool,
}

impl Tree {
    pub(super) fn new(root: OwnedFd, limits: FsLimits) -> io::Result<Self> {
        let stat = sys::stat_fd(root.as_raw_fd())?;
        if !stat.is_dir() {
            return Err(errno(libc::ENOTDIR));
        }
        let id = FileId::of(&stat);
        let node = Node {
            id: Some(id),
            kind: stat.kind(),
            // Never forgotten.
            lookups: 1,
            uses: 1,
            parent: ROOT,
            name: CString::default(),
            fd: Some(Arc::new(root)),
            detached: true,
            used_at: 0,
            version: None,
        };
        Ok(Self {
            nodes: HashMap::from([(ROOT, node)]),
            by_id: HashMap::from([(id, ROOT)]),
            next: ROOT + 1,
            open: Vec::new(),
            clock: 0,
            root_mount: stat.mount,
            limits,
            limit_hits: 0,
            limit_logged: false,
        })
    }

    /// Forgets everything but the root: the guest has unmounted or reset the device.
    pub(super) fn clear(&mut self) {
        self.nodes.retain(|id, _| *id == ROOT);
        self.by_id.retain(|_, id| *id == ROOT);
        self.open.clear();
        if let Some(root) = self.nodes.get_mut(&ROOT) {
            root.uses = 1;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn open_count(&self) -> usize {
        self.open.len()
    }

    pub(super) fn get(&self, id: u64) -> io::Result<&Node> {
        self.nodes.get(&id).ok_or_else(|| errno(libc::ESTALE))
    }

    pub(super) fn get_mut(&mut self, id: u64) -> io::Result<&mut Node> {
        self.nodes.get_mut(&id).ok_or_else(|| errno(libc::ESTALE))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&u64, &Node)> {
        self.nodes.iter()
    }

    pub(super) fn next_id(&self) -> u64 {
        self.next
    }

    /// A limit of the share was hit: counted, and logged once.
    pub(super) fn limit(&mut self, what: &str, value: usize) -> io::Error {
        self.limit_hits += 1;
        if !self.limit_logged {
            self.limit_logged = true;
            log::warn!(
                "fs: the guest reached the share's limit of {value} {what}; it sees ENFILE (raise the limit if the workload needs more)"
            );
        }
        errno(libc::ENFILE)
    }

    /// Inode number shown to the guest. Files of other mounts below the share get other numbers
    /// than those of the share's own file system, or two roots numbered 2 would look like a loop.
    pub(super) fn shown_ino(&self, mount: u64, ino: u64) -> u64 {
        if mount == self.root_mount {
            ino
        } else {
            ino ^ ((mount.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48 | 1) << 48)
        }
    }

    /// The node of a file just seen as `name` in `parent`, made if it is new, with one more lookup.
    pub(super) fn found(&mut self, parent: u64, name: &CStr, stat: &Stat) -> io::Result<u64> {
        let id = FileId::of(stat);
        if let Some(known) = self.by_id.get(&id).copied()
            && let Some(node) = self.nodes.get_mut(&known)
            && node.kind == stat.kind()
        {
            node.lookups = node.lookups.saturating_add(1);
            // The name that works now, if the old one may not.
            if known != ROOT
                && (node.parent != parent || node.name.as_c_str() != name)
                && !self.is_below(parent, known)
            {
                self.relocate(known, parent, name);
            }
            return Ok(known);
        }
        if self.nodes.len() >= self.limits.nodes {
            return Err(self.limit("known files", self.limits.nodes));
        }
        let node = self.next;
        self.nodes.try_reserve(1).map_err(|_| errno(libc::ENOMEM))?;
        self.next += 1;
        self.nodes.insert(
            node,
            Node {
                id: Some(id),
                kind: stat.kind(),
                lookups: 1,
                uses: 0,
                parent,
                name: name.to_owned(),
                fd: None,
                detached: false,
                used_at: 0,
                version: None,
            },
        );
        self.add_use(parent);
        // A node of the same id but another kind is a file number used again: the old one is gone.
        self.by_id.insert(id, node);
        Ok(node)
    }

    /// The node of a new file without a name: its descriptor is the only way to it.
    pub(super) fn add_nameless(
        &mut self,
        parent: u64,
        stat: &Stat,
        fd: OwnedFd,
    ) -> io::Result<u64> {
        // Any name will do; it is never looked up.
        let id = self.found(parent, c"(nameless)", stat)?;
        if let Err(error) = self.keep(id, Arc::new(fd)) {
            self.forget(id, 1);
            return Err(error);
        }
        self.detach(Some(id));
        Ok(id)
    }

    /// Puts a saved node back. Its file is not looked at yet.
    pub(super) fn insert_saved(
        &mut self,
        id: u64,
        parent: u64,
        name: CString,
        kind: u32,
        lookups: u64,
    ) {
        if id == ROOT {
            return;
        }
        self.next = self.next.max(id.saturating_add(1));
        let node = Node {
            id: None,
            kind,
            lookups,
            uses: 0,
            parent,
            name,
            fd: None,
            detached: false,
            used_at: 0,
            version: None,
        };
        self.nodes.insert(id, node);
    }

    /// After all saved nodes are in: counts uses and finds the files again.
    pub(super) fn settle_saved(&mut self, next: u64) {
        self.next = self.next.max(next);
        let mut ids: Vec<u64> = self
            .nodes
            .keys()
            .copied()
            .filter(|id| *id != ROOT)
            .collect();
        ids.sort_unstable();
        for id in &ids {
            let parent = self.nodes.get(id).map_or(ROOT, |node| node.parent);
            if self.nodes.contains_key(&parent) {
                self.add_use(parent);
            } else if let Some(node) = self.nodes.get_mut(id) {
                node.parent = ROOT;
                node.detached = true;
                self.add_use(ROOT);
            }
        }
        for id in ids {
            let seen = self
                .locate(id)
                .and_then(|(dir, name)| sys::stat_at(dir.as_raw_fd(), &name));
            let Some(node) = self.nodes.get_mut(&id) else {
                continue;
            };
            match seen {
                Ok(stat)
                    if stat.kind() == node.kind && !self.by_id.contains_key(&FileId::of(&stat)) =>
                {
                    node.id = Some(FileId::of(&stat));
                    self.by_id.insert(FileId::of(&stat), id);
                }
                _ => node.detached = true,
            }
        }
    }

    pub(super) fn add_use(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.uses += 1;
        }
    }

    pub(super) fn drop_use(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.uses = node.uses.saturating_sub(1);
        }
        self.collect(id);
    }

    pub(super) fn forget(&mut self, id: u64, count: u64) {
        if id == ROOT {
            return;
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        self.collect(id);
    }

    /// Drops a node nobody refers to, and then its parent if that was the last reason to keep it.
    fn collect(&mut self, id: u64) {
        let mut id = id;
        while id != ROOT
            && self
                .nodes
                .get(&id)
                .is_some_and(|node| node.lookups == 0 && node.uses == 0)
        {
            let Some(node) = self.nodes.remove(&id) else {
                return;
            };
            if let Some(file) = node.id
                && self.by_id.get(&file) == Some(&id)
            {
                self.by_id.remove(&file);
            }
            if node.fd.is_some()
                && let Some(at) = self.open.iter().position(|open| *open == id)
            {
                self.open.swap_remove(at);
            }
            id = node.parent;
            if let Some(parent) = self.nodes.get_mut(&id) {
                parent.uses = parent.uses.saturating_sub(1);
            }
        }
    }

    /// Whether `node` is `ancestor` or below it, as far as names tell.
    fn is_below(&self, node: u64, ancestor: u64) -> bool {
        let mut at = node;
        for _ in 0..MAX_DEPTH {
            if at == ancestor {
                return true;
            }
            if at == ROOT {
                return false;
            }
            match self.nodes.get(&at) {
                Some(node) => at = node.parent,
                None => return false,
            }
        }
        true
    }

    /// The node is now to be found as `name` in `parent`.
    pub(super) fn relocate(&mut self, id: u64, parent: u64, name: &CStr) {
        if id == ROOT || !self.nodes.contains_key(&parent) {
            return;
        }
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let old = node.parent;
        node.parent = parent;
        node.name = name.to_owned();
        node.detached = false;
        self.add_use(parent);
        self.drop_use(old);
    }

    /// The known node of a file, if any.
    pub(super) fn known(&self, stat: &Stat) -> Option<u64> {
        self.by_id.get(&FileId::of(stat)).copied()
    }

    /// `name` in `parent` is about to go away: if it is the name a node is found by, keeps the
    /// file reachable by its descriptor. Nothing is changed yet for others.
    pub(super) fn before_removal(
        &mut self,
        parent: u64,
        dir: &OwnedFd,
        name: &CStr,
    ) -> Option<u64> {
        let stat = sys::stat_at(dir.as_raw_fd(), name).ok()?;
        let id = self.known(&stat)?;
        let node = self.nodes.get(&id)?;
        if node.detached || node.parent != parent || node.name.as_c_str() != name {
            return None;
        }
        // Without a descriptor to spare the node merely becomes stale.
        let _ = self.fd(id);
        Some(id)
    }

    /// The name of `before_removal` is gone.
    pub(super) fn detach(&mut self, id: Option<u64>) {
        if let Some(node) = id.and_then(|id| self.nodes.get_mut(&id)) {
            node.detached = true;
        }
    }

    /// Where a node is found: its parent's descriptor and its name.
    fn locate(&mut self, id: u64) -> io::Result<(Arc<OwnedFd>, CString)> {
        let node = self.get(id)?;
        if node.detached {
            return Err(errno(libc::ESTALE));
        }
        let (parent, name) = (node.parent, node.name.clone());
        Ok((self.fd(parent)?, name))
    }

    /// Attributes of a node, without opening it if that can be avoided.
    pub(super) fn stat(&mut self, id: u64) -> io::Result<Stat> {
        if let Some(fd) = self.get(id)?.fd.clone() {
            let stat = sys::stat_fd(fd.as_raw_fd())?;
            self.rekey(id, &stat);
            return Ok(stat);
        }
        let (dir, name) = self.locate(id)?;
        let stat = match sys::stat_at(dir.as_raw_fd(), &name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                return Err(errno(libc::ESTALE));
            }
            other => other?,
        };
        self.verify(id, &stat)?;
        Ok(stat)
    }

    /// A file may change its identity while it stays itself: overlayfs with layers on different
    /// file systems shows another number once it has copied a file up.
    fn rekey(&mut self, id: u64, stat: &Stat) {
        let now = FileId::of(stat);
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        if node.id == Some(now) || id == ROOT {
            return;
        }
        let before = node.id.replace(now);
        if let Some(before) = before
            && self.by_id.get(&before) == Some(&id)
        {
            self.by_id.remove(&before);
        }
        self.by_id.entry(now).or_insert(id);
    }

    /// After a change that makes overlayfs copy a file up: learns its new identity, if it has one.
    pub(super) fn changed(&mut self, id: u64) {
        if self.nodes.get(&id).is_some_and(|node| node.fd.is_some()) {
            let _ = self.stat(id);
        }
    }

    fn verify(&self, id: u64, stat: &Stat) -> io::Result<()> {
        let node = self.get(id)?;
        if node.id == Some(FileId::of(stat)) && node.kind == stat.kind() {
            Ok(())
        } else {
            Err(errno(libc::ESTALE))
        }
    }

    /// A node's `O_PATH` descriptor, opened if it is not.
    pub(super) fn fd(&mut self, id: u64) -> io::Result<Arc<OwnedFd>> {
        // Up to the first directory that is open, then down again.
        let mut closed = Vec::new();
        let mut at = id;
        let mut dir = loop {
            self.clock += 1;
            let clock = self.clock;
            let node = self.get_mut(at)?;
            node.used_at = clock;
            if let Some(fd) = &node.fd {
                break Arc::clone(fd);
            }
            if node.detached || closed.len() >= MAX_DEPTH {
                return Err(errno(libc::ESTALE));
            }
            closed.push(at);
            at = node.parent;
        };
        while let Some(at) = closed.pop() {
            let name = &self.get(at)?.name;
            let opened = match sys::open_path(dir.as_raw_fd(), name) {
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) =>
                {
                    return Err(errno(libc::ESTALE));
                }
                other => other?,
            };
            self.verify(at, &sys::stat_fd(opened.as_raw_fd())?)?;
            dir = Arc::new(opened);
            self.keep(at, Arc::clone(&dir))?;
        }
        Ok(dir)
    }

    fn keep(&mut self, id: u64, fd: Arc<OwnedFd>) -> io::Result<()> {
        if self.open.len() >= self.limits.node_fds {
            self.close_oldest();
        }
        // Descriptors of removed files cannot be closed: a guest that removes files and never
        // forgets them is stopped at twice the budget.
        if self.open.len() >= self.limits.node_fds.saturating_mul(2) {
            return Err(self.limit("descriptors for removed files", self.limits.node_fds));
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.fd = Some(fd);
            self.open.push(id);
        }
        Ok(())
    }

    /// Closes an eighth of the descriptors that can be opened again, the oldest.
    fn close_oldest(&mut self) {
        let mut candidates: Vec<(u64, u64)> = self
            .open
            .iter()
            .filter_map(|id| {
                self.nodes
                    .get(id)
                    .filter(|node| !node.detached)
                    .map(|node| (node.used_at, *id))
            })
            .collect();
        let count = (self.limits.node_fds / 8).max(1).min(candidates.len());
        if count == 0 {
            return;
        }
        candidates.select_nth_unstable(count - 1);
        for (_, id) in candidates.iter().take(count) {
            if let Some(node) = self.nodes.get_mut(id) {
                node.fd = None;
            }
        }
        let nodes = &self.nodes;
        self.open
            .retain(|id| nodes.get(id).is_some_and(|node| node.fd.is_some()));
    }
}
