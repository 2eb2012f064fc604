//! Files: the share that is the root, a few devices, and the walk along paths.

pub mod console;
pub mod file;
pub mod fuse;
pub mod pipe;
pub mod virtio;

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::NAME_MAX;
use appkernel_hal::sync::Mutex;

use fuse::{Fuse, Node};

/// As Linux.
const MAX_LINKS: usize = 40;
/// Longest path with its end.
pub const PATH_MAX: usize = 4096;

static ROOT: Mutex<Option<Arc<Fuse>>> = Mutex::new(None);

/// The share becomes the root.
pub fn mount_root(fuse: Arc<Fuse>) {
    *ROOT.lock() = Some(fuse);
}

/// Whether there is a root.
pub fn has_root() -> bool {
    ROOT.lock().is_some()
}

/// The root's file system.
pub fn root() -> Result<Arc<Fuse>, Errno> {
    ROOT.lock().clone().ok_or(Errno::ENOENT)
}

/// Devices the kernel makes itself, under /dev.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Null,
    Zero,
    Full,
    Random,
    Console,
}

impl Device {
    fn by_name(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"null" => Self::Null,
            b"zero" => Self::Zero,
            b"full" => Self::Full,
            b"random" | b"urandom" => Self::Random,
            b"console" | b"tty" => Self::Console,
            _ => return None,
        })
    }

    /// Number as in Linux (major and minor, as stat gives them).
    pub fn number(self) -> u64 {
        match self {
            Self::Null => 0x103,
            Self::Zero => 0x105,
            Self::Full => 0x107,
            Self::Random => 0x109,
            Self::Console => 0x501,
        }
    }
}

/// What a path leads to.
#[derive(Clone)]
pub enum What {
    Node(Arc<Node>),
    Device(Device),
}

/// A path that was walked.
#[derive(Clone)]
pub struct Found {
    /// Without links, dots and repeated slashes.
    pub path: Vec<u8>,
    pub what: What,
}

impl Found {
    /// The node of the share.
    pub fn node(&self) -> Result<Arc<Node>, Errno> {
        match &self.what {
            What::Node(node) => Ok(Arc::clone(node)),
            What::Device(_) => Err(Errno::EACCES),
        }
    }
}

/// A directory and a name in it that need not exist.
pub struct Place {
    pub directory: Arc<Node>,
    pub name: Vec<u8>,
    /// What is there.
    pub found: Option<Found>,
    /// The path ended with a slash: only a directory will do.
    pub slash: bool,
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    path.split(|b| *b == b'/')
        .filter(|c| !c.is_empty() && *c != b".")
        .map(<[u8]>::to_vec)
}

fn joined(stack: &[(Vec<u8>, Arc<Node>)], last: Option<&[u8]>) -> Vec<u8> {
    let mut path = Vec::new();
    for name in stack.iter().map(|(name, _)| name.as_slice()).chain(last) {
        path.push(b'/');
        path.extend(name);
    }
    if path.is_empty() {
        path.push(b'/');
    }
    path
}

/// Walks a path from `cwd` (canonical).
///
/// # Errors
/// As path_resolution(7): `ENOENT`, `ENOTDIR`, `ELOOP`, `ENAMETOOLONG`, or the share's error.
pub fn resolve(cwd: &[u8], path: &[u8], follow: bool) -> Result<Found, Errno> {
    let place = walk(cwd, path, follow)?;
    let found = place.found.ok_or(Errno::ENOENT)?;
    if place.slash && !matches!(&found.what, What::Node(n) if n.is_directory()) {
        return Err(Errno::ENOTDIR);
    }
    Ok(found)
}

/// Walks to the last name of a path, which may be missing; links in it are followed if `follow`.
///
/// # Errors
/// As `resolve`.
pub fn walk(cwd: &[u8], path: &[u8], follow: bool) -> Result<Place, Errno> {
    if path.is_empty() {
        return Err(Errno::ENOENT);
    }
    if path.len() >= PATH_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    let root = root()?.root();
    let mut todo: VecDeque<Vec<u8>> = VecDeque::new();
    if !path.starts_with(b"/") {
        todo.extend(components(cwd));
    }
    todo.extend(components(path));
    let slash = path.ends_with(b"/") || path.ends_with(b"/.");
    let mut stack: Vec<(Vec<u8>, Arc<Node>)> = Vec::new();
    let mut links = 0;
    let mut at = Arc::clone(&root);
    while let Some(name) = todo.pop_front() {
        if name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if !at.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        if name == b".." {
            stack.pop();
            at = stack
                .last()
                .map_or_else(|| Arc::clone(&root), |(_, node)| Arc::clone(node));
            continue;
        }
        // Devices are there whether the image has a /dev or not.
        if stack.is_empty()
            && name == b"dev"
            && todo.len() == 1
            && let Some(device) = todo.front().and_then(|n| Device::by_name(n))
        {
            let last = todo.pop_front().unwrap_or_default();
            let path = [b"/dev/".as_slice(), &last].concat();
            return Ok(Place {
                directory: root,
                name: last,
                found: Some(Found {
                    path,
                    what: What::Device(device),
                }),
                slash,
            });
        }
        let last = todo.is_empty();
        let node = match at.lookup(&name) {
            Ok(node) => node,
            Err(Errno::ENOENT) if last => {
                return Ok(Place {
                    directory: at,
                    name,
                    found: None,
                    slash,
                });
            }
            Err(e) => return Err(e),
        };
        if node.is_link() && (!last || follow || slash) {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::ELOOP);
            }
            let target = node.read_link()?;
            if target.starts_with(b"/") {
                stack.clear();
                at = Arc::clone(&root);
            }
            for component in components(&target).rev() {
                todo.push_front(component);
            }
            continue;
        }
        if last {
            let path = joined(&stack, Some(&name));
            return Ok(Place {
                directory: at,
                name,
                found: Some(Found {
                    path,
                    what: What::Node(node),
                }),
                slash,
            });
        }
        stack.push((name, Arc::clone(&node)));
        at = node;
    }
    // The path ended in the root, or by "..".
    let path = joined(&stack, None);
    Ok(Place {
        directory: Arc::clone(&at),
        name: Vec::new(),
        found: Some(Found {
            path,
            what: What::Node(at),
        }),
        slash,
    })
}
