//! Files: file systems, and the walk along paths.

pub mod console;
pub mod dev;
pub mod file;
pub mod fuse;
pub mod memory;
pub mod node;
pub mod pipe;
pub mod proc;
pub mod proc_text;
pub mod pty;
pub mod settings;
pub mod virtio;
pub mod watch;

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::NAME_MAX;

use crate::container::Container;
use crate::task::{self, Credentials, may};
use node::Node;

/// As Linux.
const MAX_LINKS: usize = 40;
/// Longest path with its end.
pub const PATH_MAX: usize = 4096;

/// A path that was walked.
#[derive(Clone)]
pub struct Found {
    /// Without links, dots and repeated slashes.
    pub path: Vec<u8>,
    pub node: Node,
    /// The mount it is on cannot be written.
    pub read_only: bool,
}

/// A directory and a name in it that need not exist.
pub struct Place {
    pub directory: Node,
    pub name: Vec<u8>,
    /// Path of the directory.
    pub parent: Vec<u8>,
    /// What is there.
    pub found: Option<Found>,
    /// The path ended with a slash: only a directory will do.
    pub slash: bool,
    /// The mount of the directory cannot be written.
    pub read_only: bool,
}

impl Place {
    /// The directory, to change what is in it.
    pub fn writable(&self) -> Result<&Node, Errno> {
        if self.read_only {
            return Err(Errno::EROFS);
        }
        Ok(&self.directory)
    }

    /// Canonical path of the name.
    pub fn path(&self) -> Vec<u8> {
        let mut path = self.parent.clone();
        if path != b"/" {
            path.push(b'/');
        }
        path.extend(&self.name);
        path
    }
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    path.split(|b| *b == b'/')
        .filter(|c| !c.is_empty() && *c != b".")
        .map(<[u8]>::to_vec)
}

/// Walks a path from `cwd` (canonical).
///
/// # Errors
/// As path_resolution(7): `ENOENT`, `ENOTDIR`, `ELOOP`, `ENAMETOOLONG`, or the file system's error.
pub fn resolve(
    container: &Container,
    cwd: &[u8],
    path: &[u8],
    follow: bool,
) -> Result<Found, Errno> {
    found_at(walk(container, cwd, path, follow)?)
}

/// What a walk led to, which must be there.
pub fn found_at(place: Place) -> Result<Found, Errno> {
    let found = place.found.ok_or(Errno::ENOENT)?;
    if place.slash && !found.node.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    Ok(found)
}

/// Where a walk is: nodes from the root, with the length of the path up to each.
struct Walk<'a> {
    container: &'a Container,
    path: Vec<u8>,
    stack: Vec<(Node, usize, bool)>,
    root: (Node, bool),
}

impl<'a> Walk<'a> {
    fn new(container: &'a Container) -> Result<Self, Errno> {
        let root = container.mount_at(b"/").ok_or(Errno::ENOENT)?;
        Ok(Self {
            container,
            path: Vec::new(),
            stack: Vec::new(),
            root,
        })
    }

    fn at(&self) -> (&Node, bool) {
        self.stack
            .last()
            .map_or((&self.root.0, self.root.1), |(node, _, read_only)| {
                (node, *read_only)
            })
    }

    /// The path of where it is.
    fn path(&self) -> Vec<u8> {
        if self.path.is_empty() {
            b"/".to_vec()
        } else {
            self.path.clone()
        }
    }

    fn up(&mut self) {
        if let Some((_, len, _)) = self.stack.pop() {
            self.path.truncate(len);
        }
    }

    fn restart(&mut self) {
        self.stack.clear();
        self.path.clear();
    }

    /// What has that name here, and whether it is on a mount that cannot be written. Mounts hide
    /// what is below them.
    fn look(&mut self, name: &[u8]) -> Result<(Node, bool), Errno> {
        let len = self.path.len();
        self.path.push(b'/');
        self.path.extend(name);
        let mounted = self.container.mount_at(&self.path);
        self.path.truncate(len);
        if let Some(found) = mounted {
            return Ok(found);
        }
        let (at, read_only) = self.at();
        at.lookup(name).map(|node| (node, read_only))
    }

    fn down(&mut self, name: &[u8], node: Node, read_only: bool) {
        let len = self.path.len();
        self.path.push(b'/');
        self.path.extend(name);
        self.stack.push((node, len, read_only));
    }
}

/// Walks to the last name of a path, which may be missing; links in it are followed if `follow`.
///
/// # Errors
/// As `resolve`.
pub fn walk(container: &Container, cwd: &[u8], path: &[u8], follow: bool) -> Result<Place, Errno> {
    let me = task::current();
    let credentials = me.credentials.lock().clone();
    walk_as(container, cwd, path, follow, &credentials)
}

/// As `walk`, with the rights of somebody else.
///
/// # Errors
/// As `resolve`; also `EACCES`: a directory on the way may not be searched.
pub fn walk_as(
    container: &Container,
    cwd: &[u8],
    path: &[u8],
    follow: bool,
    credentials: &Credentials,
) -> Result<Place, Errno> {
    let root = task::current().place.lock().root.clone();
    if path.is_empty() {
        return Err(Errno::ENOENT);
    }
    if path.len() >= PATH_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    let mut todo: VecDeque<Vec<u8>> = VecDeque::new();
    // The way to where it starts is not asked about: the caller is there already.
    let start = if path.starts_with(b"/") { &root } else { cwd };
    todo.extend(components(start));
    let mut trusted = todo.len();
    todo.extend(components(path));
    let slash = path.ends_with(b"/") || path.ends_with(b"/.");
    let mut walk = Walk::new(container)?;
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        if name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if !walk.at().0.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        if trusted > 0 {
            trusted -= 1;
        } else if !credentials.files_root()
            && !credentials.may(&walk.at().0.attributes()?, may::EXECUTE)
        {
            return Err(Errno::EACCES);
        }
        if name == b".." {
            if root.is_empty() || walk.path() != root {
                walk.up();
            }
            continue;
        }
        let last = todo.is_empty();
        let (node, read_only) = match walk.look(&name) {
            Ok(found) => found,
            Err(Errno::ENOENT) if last => {
                let (directory, read_only) = walk.at();
                return Ok(Place {
                    directory: directory.clone(),
                    parent: walk.path(),
                    name,
                    found: None,
                    slash,
                    read_only,
                });
            }
            Err(e) => return Err(e),
        };
        if node.is_link() && (!last || follow || slash) && !(last && proc::is_open_file(&node)) {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::ELOOP);
            }
            let target = node.read_link()?;
            if target.starts_with(b"/") {
                walk.restart();
            }
            for component in components(&target).rev() {
                todo.push_front(component);
            }
            if target.starts_with(b"/") {
                for component in components(&root).rev() {
                    todo.push_front(component);
                    trusted += 1;
                }
            }
            continue;
        }
        if last {
            let (directory, directory_read_only) = walk.at();
            let (directory, parent) = (directory.clone(), walk.path());
            walk.down(&name, node.clone(), read_only);
            return Ok(Place {
                directory,
                parent,
                name,
                found: Some(Found {
                    path: walk.path(),
                    node,
                    read_only,
                }),
                slash,
                read_only: directory_read_only,
            });
        }
        walk.down(&name, node, read_only);
    }
    // The path ended in the root, or by "..".
    let (node, read_only) = walk.at();
    Ok(Place {
        directory: node.clone(),
        parent: walk.path(),
        name: Vec::new(),
        found: Some(Found {
            path: walk.path(),
            node: node.clone(),
            read_only,
        }),
        slash,
        read_only,
    })
}
