//! A file of any file system: on the share, in memory, or made by the kernel.

use alloc::sync::Arc;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::{Attributes, DirEntry};
use appkernel_core::locks::Locks;

use super::fuse::{self, Change};
use super::{memory, proc};

/// Kinds of files in a mode.
pub mod kind {
    pub const MASK: u32 = 0o170_000;
    pub const FIFO: u32 = 0o010_000;
    pub const CHARACTER: u32 = 0o020_000;
    pub const DIRECTORY: u32 = 0o040_000;
    pub const REGULAR: u32 = 0o100_000;
    pub const LINK: u32 = 0o120_000;
    pub const SOCKET: u32 = 0o140_000;
}

/// Who makes a file: its owner.
#[derive(Clone, Copy, Debug, Default)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// A file.
#[derive(Clone)]
pub enum Node {
    Share(Arc<fuse::Node>),
    Memory(Arc<memory::Node>),
    Proc(proc::Entry),
}

impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

macro_rules! each {
    ($self:ident, $node:ident => $body:expr) => {
        match $self {
            Node::Share($node) => $body,
            Node::Memory($node) => $body,
            Node::Proc($node) => $body,
        }
    };
}

impl Node {
    /// Tells it apart from all others: file system and number.
    pub fn identity(&self) -> (u64, u64) {
        match self {
            Self::Share(node) => (node.device(), node.number()),
            Self::Memory(node) => (node.device(), node.number()),
            Self::Proc(entry) => (entry.device(), entry.number()),
        }
    }

    /// Its kind, as in a mode.
    pub fn kind(&self) -> u32 {
        match self {
            Self::Share(node) => node.kind(),
            Self::Memory(node) => node.attributes().mode & kind::MASK,
            Self::Proc(entry) => entry.mode() & kind::MASK,
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind() == kind::DIRECTORY
    }

    /// Whether it is a regular file.
    pub fn is_regular(&self) -> bool {
        self.kind() == kind::REGULAR
    }

    /// Whether it is a symbolic link.
    pub fn is_link(&self) -> bool {
        self.kind() == kind::LINK
    }

    /// Its attributes.
    pub fn attributes(&self) -> Result<Attributes, Errno> {
        match self {
            Self::Share(node) => node.attributes(),
            Self::Memory(node) => Ok(node.attributes()),
            Self::Proc(entry) => Ok(entry.attributes()),
        }
    }

    /// Changes attributes.
    pub fn change(&self, change: &Change) -> Result<(), Errno> {
        match self {
            Self::Share(node) => node.change(change),
            Self::Memory(node) => node.change(change),
            // Programs that open such files with O_TRUNC cut nothing.
            Self::Proc(_) if change.size.is_some() => Ok(()),
            Self::Proc(_) => Err(Errno::EPERM),
        }
    }

    /// The file of that name in this directory.
    pub fn lookup(&self, name: &[u8]) -> Result<Self, Errno> {
        match self {
            Self::Share(node) => node.lookup(name).map(Self::Share),
            Self::Memory(node) => node.lookup(name).map(Self::Memory),
            Self::Proc(entry) => entry.lookup(name).map(Self::Proc),
        }
    }

    /// Where the link leads.
    pub fn read_link(&self) -> Result<Vec<u8>, Errno> {
        each!(self, node => node.read_link())
    }

    /// Makes a regular file; the number is a handle for writing.
    pub fn create(&self, name: &[u8], mode: u32, owner: Owner) -> Result<(Self, u64), Errno> {
        match self {
            Self::Share(node) => {
                let (node, handle) = node.create(name, mode, owner)?;
                Ok((Self::Share(node), handle))
            }
            Self::Memory(node) => {
                let made = node.make(name, kind::REGULAR | mode, 0, &[], owner)?;
                Ok((Self::Memory(made), 0))
            }
            Self::Proc(_) => Err(Errno::EACCES),
        }
    }

    /// Makes a directory.
    pub fn make_directory(&self, name: &[u8], mode: u32, owner: Owner) -> Result<(), Errno> {
        match self {
            Self::Share(node) => node.make_directory(name, mode, owner),
            Self::Memory(node) => node
                .make(name, kind::DIRECTORY | mode, 0, &[], owner)
                .map(|_| ()),
            Self::Proc(_) => Err(Errno::EPERM),
        }
    }

    /// Makes a symbolic link.
    pub fn make_link(&self, name: &[u8], target: &[u8], owner: Owner) -> Result<(), Errno> {
        match self {
            Self::Share(node) => node.make_link(name, target, owner),
            Self::Memory(node) => node
                .make(name, kind::LINK | 0o777, 0, target, owner)
                .map(|_| ()),
            Self::Proc(_) => Err(Errno::EPERM),
        }
    }

    /// Makes a fifo, socket or device file.
    pub fn make_special(
        &self,
        name: &[u8],
        mode: u32,
        rdev: u32,
        owner: Owner,
    ) -> Result<(), Errno> {
        match self {
            Self::Share(node) => node.make_special(name, mode, rdev, owner),
            Self::Memory(node) => node.make(name, mode, rdev, &[], owner).map(|_| ()),
            Self::Proc(_) => Err(Errno::EPERM),
        }
    }

    /// One more name, in this directory, for a file.
    pub fn link(&self, name: &[u8], file: &Self) -> Result<(), Errno> {
        match (self, file) {
            (Self::Share(node), Self::Share(file)) => node.link(name, file),
            (Self::Memory(node), Self::Memory(file)) => node.link(name, file),
            _ => Err(Errno::EXDEV),
        }
    }

    /// Takes a name away.
    pub fn unlink(&self, name: &[u8], directory: bool) -> Result<(), Errno> {
        match self {
            Self::Share(node) => node.unlink(name, directory),
            Self::Memory(node) => node.unlink(name, directory),
            Self::Proc(_) => Err(Errno::EPERM),
        }
    }

    /// Gives a file another name, in place of what has it.
    pub fn rename(&self, name: &[u8], to: &Self, new: &[u8]) -> Result<(), Errno> {
        match (self, to) {
            (Self::Share(node), Self::Share(to)) => node.rename(name, to, new),
            (Self::Memory(node), Self::Memory(to)) => node.rename(name, to, new),
            _ => Err(Errno::EXDEV),
        }
    }

    /// Lets two files have each other's names.
    pub fn exchange(&self, name: &[u8], to: &Self, new: &[u8]) -> Result<(), Errno> {
        match (self, to) {
            (Self::Share(node), Self::Share(to)) => node.exchange(name, to, new),
            (Self::Memory(node), Self::Memory(to)) => node.exchange(name, to, new),
            _ => Err(Errno::EXDEV),
        }
    }

    /// All entries of the directory.
    pub fn entries(&self) -> Result<Vec<DirEntry>, Errno> {
        match self {
            Self::Share(node) => node.entries(),
            Self::Memory(node) => node.entries(),
            Self::Proc(entry) => Ok(entry.entries()),
        }
    }

    /// The frame of a page of the file, which the file owns; `EFAULT` past the end.
    pub fn page(&self, index: u64) -> Result<u64, Errno> {
        match self {
            Self::Share(node) => node.page(index),
            Self::Memory(node) => node.page(index),
            Self::Proc(_) => Err(Errno::EFAULT),
        }
    }

    /// A page that is mapped so that programs can change it was changed.
    pub fn page_changed(&self, index: u64) {
        if let Self::Share(node) = self {
            node.page_changed(index);
        }
    }

    /// Passes on what programs changed through mappings.
    pub fn write_back(&self) -> Result<(), Errno> {
        match self {
            Self::Share(node) => node.write_back(),
            _ => Ok(()),
        }
    }

    /// Reads from the file; returns how many bytes there were.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::Share(node) => node.read(offset, to),
            Self::Memory(node) => Ok(node.read(offset, to)),
            Self::Proc(entry) => entry.read(offset, to),
        }
    }

    /// Opens it for writing; the handle is for `write` and `close`.
    pub fn open_for_writing(&self) -> Result<u64, Errno> {
        match self {
            Self::Share(node) => node.open_for_writing(),
            Self::Memory(_) => Ok(0),
            Self::Proc(entry) => entry.may_write().map(|()| 0),
        }
    }

    /// Writes to it; may take less than all.
    pub fn write(&self, handle: u64, offset: u64, from: &[u8]) -> Result<usize, Errno> {
        match self {
            Self::Share(node) => node.write(handle, offset, from),
            Self::Memory(node) => node.write(offset, from),
            Self::Proc(entry) => entry.write(from),
        }
    }

    /// Closes a handle.
    pub fn close(&self, handle: u64) {
        if let Self::Share(node) = self {
            node.close(handle);
        }
    }

    /// Makes sure that it is on the disk.
    pub fn sync(&self, data_only: bool, handle: Option<u64>) -> Result<(), Errno> {
        match self {
            Self::Share(node) => node.sync(data_only, handle),
            _ => Ok(()),
        }
    }

    /// Its record locks; `None` if it cannot have any.
    pub fn with_locks<T>(&self, f: impl FnOnce(&mut Locks) -> T) -> Option<T> {
        match self {
            Self::Share(node) => Some(node.with_locks(f)),
            Self::Memory(node) => Some(node.with_locks(f)),
            Self::Proc(_) => None,
        }
    }

    /// Makes a regular file without a name on this directory's file system; the number is a handle
    /// for writing. With `exclusive` it never gets a name.
    pub fn create_nameless(
        &self,
        mode: u32,
        exclusive: bool,
        owner: Owner,
    ) -> Result<(Self, u64), Errno> {
        match self {
            Self::Share(node) => {
                let (node, handle) = node.create_nameless(mode, exclusive, owner)?;
                Ok((Self::Share(node), handle))
            }
            Self::Memory(node) => {
                let made = node.make_nameless(mode, exclusive, owner)?;
                Ok((Self::Memory(made), 0))
            }
            Self::Proc(_) => Err(Errno::EOPNOTSUPP),
        }
    }

    /// Sets an extended attribute.
    pub fn set_attribute(&self, name: &[u8], value: Vec<u8>, flags: u32) -> Result<(), Errno> {
        match self {
            Self::Share(node) => node.set_attribute(name, &value, flags),
            Self::Memory(node) => node.set_attribute(name, value, flags),
            Self::Proc(_) => Err(Errno::EOPNOTSUPP),
        }
    }

    /// The value of an extended attribute.
    pub fn attribute(&self, name: &[u8]) -> Result<Vec<u8>, Errno> {
        match self {
            Self::Share(node) => node.attribute(name),
            Self::Memory(node) => node.attribute(name),
            Self::Proc(_) => Err(Errno::EOPNOTSUPP),
        }
    }

    /// Names of all extended attributes, each with its end.
    pub fn attribute_names(&self) -> Result<Vec<u8>, Errno> {
        match self {
            Self::Share(node) => node.attribute_names(),
            Self::Memory(node) => Ok(node.attribute_names()),
            Self::Proc(_) => Ok(Vec::new()),
        }
    }

    /// Takes an extended attribute away.
    pub fn remove_attribute(&self, name: &[u8]) -> Result<(), Errno> {
        match self {
            Self::Share(node) => node.remove_attribute(name),
            Self::Memory(node) => node.remove_attribute(name),
            Self::Proc(_) => Err(Errno::EOPNOTSUPP),
        }
    }

    /// Figures of the file system: type, block size, blocks, free blocks, files, free files.
    pub fn statistics(&self) -> Result<[u64; 6], Errno> {
        match self {
            Self::Share(node) => node.statistics(),
            Self::Memory(node) => Ok(node.statistics()),
            Self::Proc(entry) => Ok([entry.magic(), 4096, 0, 0, 0, 0]),
        }
    }
}
