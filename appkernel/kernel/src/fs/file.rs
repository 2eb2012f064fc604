//! Open files and their numbers.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::sync::atomic::{AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_core::fuse::DirEntry;
use appkernel_hal::cpu;
use appkernel_hal::serial::Serial;
use appkernel_hal::sync::Mutex;

use super::console;
use super::dev::{self, Device};
use super::node::{Node, kind};
use super::pipe::{End, Pipe};
use super::watch;
use crate::task;

/// Open flags.
pub mod flag {
    pub const ACCESS: u32 = 3;
    pub const WRITE_ONLY: u32 = 1;
    pub const CREATE: u32 = 0o100;
    pub const EXCLUSIVE: u32 = 0o200;
    pub const TRUNCATE: u32 = 0o1000;
    pub const APPEND: u32 = 0o2000;
    pub const NONBLOCK: u32 = 0o4000;
    pub const DIRECTORY: u32 = 0o200_000;
    pub const NOFOLLOW: u32 = 0o400_000;
    pub const CLOEXEC: u32 = 0o2_000_000;
    pub const PATH: u32 = 0o10_000_000;
}

/// What follows the path of a file that has no name any more.
pub const DELETED: &[u8] = b" (deleted)";

/// How far a file is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    pub readable: bool,
    pub writable: bool,
    /// The other side is gone.
    pub hung_up: bool,
    /// The other side will send no more.
    pub ended: bool,
    pub error: bool,
}

/// An open thing that is no file of a file system.
pub trait Object: Send + Sync {
    /// Reads; `wait` until there is something.
    fn read(&self, _to: &mut [u8], _wait: bool) -> Result<usize, Errno> {
        Err(Errno::EINVAL)
    }
    /// Writes; `wait` until there is room.
    fn write(&self, _from: &[u8], _wait: bool) -> Result<usize, Errno> {
        Err(Errno::EINVAL)
    }
    /// How far it is ready.
    fn ready(&self) -> Ready;
    /// Counts what came to be read, and what room came for writing: to tell that there was
    /// something new though it is as ready as before.
    fn progress(&self) -> (u64, u64) {
        (0, 0)
    }
    /// As /proc shows it.
    fn name(&self) -> String;
    /// As `stat` shows it.
    fn mode(&self) -> u32 {
        0o600
    }
    /// Device number, of a terminal.
    fn rdev(&self) -> u32 {
        0
    }
    /// No open file means it any more.
    fn closed(&self) {}
    /// Itself, for calls that are for one kind only.
    fn as_any(&self) -> &dyn Any;
}

/// What is open.
pub enum Kind {
    Console,
    Device(Device),
    Pipe(Arc<Pipe>, End),
    /// A regular file, with a handle if it may be written.
    Regular(Node, Option<u64>),
    /// A directory and its entries once they were asked for.
    Directory(Node, Mutex<Option<Vec<DirEntry>>>),
    Object(Arc<dyn Object>),
}

/// An open file; several numbers may mean the same.
pub struct File {
    pub kind: Kind,
    /// Its path; empty if it has none.
    pub path: Vec<u8>,
    flags: Mutex<u32>,
    pub offset: Mutex<u64>,
    /// Tells it from all others; who gets signals for it, and which.
    pub number: u64,
    pub owner: Mutex<(i32, i32)>,
    pub signal: Mutex<i32>,
}

static NEXT: AtomicU64 = AtomicU64::new(1);

impl File {
    /// Opens what is given, with these flags.
    pub fn new(kind: Kind, flags: u32) -> Self {
        Self::at(kind, flags, Vec::new())
    }

    /// Opens what is at a path.
    pub fn at(kind: Kind, flags: u32, path: Vec<u8>) -> Self {
        Self {
            kind,
            path,
            flags: Mutex::new(flags),
            offset: Mutex::new(0),
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            owner: Mutex::default(),
            signal: Mutex::default(),
        }
    }

    /// Whether opening its path again gives the same.
    pub fn has_path(&self) -> bool {
        !self.path.is_empty()
            && !matches!(self.kind, Kind::Pipe(..) | Kind::Object(_))
            && !self.is_nameless()
    }

    /// Whether it is a file whose names are all gone, or that never had one.
    fn is_nameless(&self) -> bool {
        match &self.kind {
            Kind::Regular(node @ (Node::Share(_) | Node::Memory(_)), _) => {
                self.path.ends_with(DELETED) || node.attributes().is_ok_and(|a| a.nlink == 0)
            }
            _ => false,
        }
    }

    /// As /proc shows it.
    pub fn name(&self) -> Vec<u8> {
        if !self.path.is_empty() {
            let mut path = self.path.clone();
            if self.is_nameless() && !path.ends_with(DELETED) {
                path.extend(DELETED);
            }
            return path;
        }
        match &self.kind {
            Kind::Console => b"/dev/console".to_vec(),
            Kind::Device(device) => format!("/dev/{device:?}").to_lowercase().into_bytes(),
            Kind::Pipe(pipe, _) => format!("pipe:[{}]", pipe.number()).into_bytes(),
            Kind::Object(object) => object.name().into_bytes(),
            Kind::Regular(..) | Kind::Directory(..) => b"/ (deleted)".to_vec(),
        }
    }

    /// The thing, if it is of this type.
    pub fn object<T: 'static>(&self) -> Option<&T> {
        match &self.kind {
            Kind::Object(object) => object.as_any().downcast_ref(),
            _ => None,
        }
    }

    /// Mode and device number, of what is no file of a file system.
    pub fn special(&self) -> (u32, u32) {
        match &self.kind {
            Kind::Console => (kind::CHARACTER | 0o620, dev::number(5, 1)),
            Kind::Device(device) => (kind::CHARACTER | 0o666, device.number()),
            Kind::Pipe(..) => (kind::FIFO | 0o600, 0),
            Kind::Object(object) => (object.mode(), object.rdev()),
            Kind::Regular(..) | Kind::Directory(..) => (0, 0),
        }
    }

    /// Its flags.
    pub fn flags(&self) -> u32 {
        *self.flags.lock()
    }

    /// Sets those flags that can change.
    pub fn set_flags(&self, flags: u32) {
        const CHANGEABLE: u32 = flag::APPEND | flag::NONBLOCK;
        let mut own = self.flags.lock();
        *own = (*own & !CHANGEABLE) | (flags & CHANGEABLE);
    }

    /// Whether calls wait.
    pub fn waits(&self) -> bool {
        self.flags() & flag::NONBLOCK == 0
    }

    /// Whether it is open for reading.
    pub fn may_read(&self) -> bool {
        self.flags() & (flag::ACCESS | flag::PATH) != flag::WRITE_ONLY
            && self.flags() & flag::PATH == 0
    }

    /// Whether it is open for writing.
    pub fn may_write(&self) -> bool {
        self.flags() & flag::ACCESS != 0
    }

    /// The node it shows, if it is of a file system.
    pub fn node(&self) -> Option<&Node> {
        match &self.kind {
            Kind::Regular(node, _) | Kind::Directory(node, ..) => Some(node),
            _ => None,
        }
    }

    /// How far it is ready.
    pub fn ready(&self) -> Ready {
        match &self.kind {
            Kind::Console => Ready {
                readable: console::readable(),
                writable: true,
                ..Ready::default()
            },
            Kind::Pipe(pipe, end) => pipe.ready(*end),
            Kind::Object(object) => object.ready(),
            _ => Ready {
                readable: true,
                writable: true,
                ..Ready::default()
            },
        }
    }

    /// As `Object::progress`.
    pub fn progress(&self) -> (u64, u64) {
        match &self.kind {
            Kind::Pipe(pipe, _) => pipe.progress(),
            Kind::Object(object) => object.progress(),
            _ => (0, 0),
        }
    }

    /// Reads at the file's own place, or at another.
    pub fn read(&self, to: &mut [u8], at: Option<u64>) -> Result<usize, Errno> {
        if !self.may_read() {
            return Err(Errno::EBADF);
        }
        match &self.kind {
            Kind::Console => self.read_console(to),
            Kind::Device(device) => match device {
                Device::Null => Ok(0),
                Device::Zero | Device::Full => {
                    to.fill(0);
                    Ok(to.len())
                }
                Device::Random => {
                    cpu::random(to);
                    Ok(to.len())
                }
            },
            Kind::Pipe(_, End::Write) => Err(Errno::EBADF),
            Kind::Pipe(..) if at.is_some() => Err(Errno::ESPIPE),
            Kind::Pipe(pipe, _) => pipe.read(to, self.waits()),
            Kind::Regular(node, _) => {
                let offset = at.unwrap_or(*self.offset.lock());
                let count = node.read(offset, to)?;
                watch::tell(&self.path, watch::event::ACCESS, false);
                if at.is_none() {
                    *self.offset.lock() = offset + count as u64;
                }
                Ok(count)
            }
            Kind::Directory(..) => Err(Errno::EISDIR),
            Kind::Object(_) if at.is_some() => Err(Errno::ESPIPE),
            Kind::Object(object) => object.read(to, self.waits()),
        }
    }

    fn read_console(&self, to: &mut [u8]) -> Result<usize, Errno> {
        let line = if self.waits() {
            console::input();
            task::wait_for(task::FILES, || console::take(to.len()))?
        } else {
            console::input();
            console::take(to.len()).ok_or(Errno::EAGAIN)?
        };
        for (slot, byte) in to.iter_mut().zip(&line) {
            *slot = *byte;
        }
        Ok(line.len())
    }

    /// Writes at the file's own place, or at another; may take less than all.
    pub fn write(&self, from: &[u8], at: Option<u64>) -> Result<usize, Errno> {
        if !self.may_write() {
            return Err(Errno::EBADF);
        }
        match &self.kind {
            Kind::Console => {
                for line in from.split_inclusive(|b| *b == b'\n') {
                    match line.split_last() {
                        Some((b'\n', text)) => {
                            Serial::put(text);
                            Serial::put(b"\r\n");
                        }
                        _ => Serial::put(line),
                    }
                }
                Ok(from.len())
            }
            Kind::Device(Device::Full) => Err(Errno::ENOSPC),
            Kind::Device(_) => Ok(from.len()),
            Kind::Pipe(_, End::Read) | Kind::Regular(_, None) => Err(Errno::EBADF),
            Kind::Pipe(..) if at.is_some() => Err(Errno::ESPIPE),
            Kind::Pipe(pipe, _) => pipe.write(from, self.waits()),
            Kind::Regular(node, Some(handle)) => {
                // To the end also where a place is given, as Linux does.
                let offset = match at {
                    _ if self.flags() & flag::APPEND != 0 => node.attributes()?.size,
                    Some(at) => at,
                    None => *self.offset.lock(),
                };
                let count = node.write(*handle, offset, from)?;
                watch::tell(&self.path, watch::event::MODIFY, false);
                if at.is_none() {
                    *self.offset.lock() = offset + count as u64;
                }
                Ok(count)
            }
            Kind::Directory(..) => Err(Errno::EISDIR),
            Kind::Object(_) if at.is_some() => Err(Errno::ESPIPE),
            Kind::Object(object) => object.write(from, self.waits()),
        }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        crate::syscall::file_locks::file_closed(self);
        match &self.kind {
            Kind::Pipe(pipe, end) => pipe.close(*end),
            Kind::Regular(node, Some(handle)) => {
                node.close(*handle);
                watch::tell(&self.path, watch::event::CLOSE_WRITE, false);
            }
            Kind::Regular(_, None) => {
                watch::tell(&self.path, watch::event::CLOSE_NOWRITE, false);
            }
            Kind::Directory(..) => watch::tell(&self.path, watch::event::CLOSE_NOWRITE, true),
            Kind::Object(object) => object.closed(),
            _ => {}
        }
    }
}

/// Open files of a process, at most.
pub const MAX_FILES: usize = 4096;

/// The open files of a process, by number.
pub struct Files(Vec<Option<(Arc<File>, bool)>>, usize);

impl Default for Files {
    fn default() -> Self {
        Self(Vec::new(), MAX_FILES)
    }
}

impl Files {
    /// A copy for a child, if there is memory for it.
    pub fn duplicate(&self) -> Result<Self, Errno> {
        let mut files = Vec::new();
        files
            .try_reserve_exact(self.0.len())
            .map_err(|_| Errno::ENOMEM)?;
        files.extend(self.0.iter().cloned());
        Ok(Self(files, self.1))
    }

    /// New numbers are below this from now on.
    pub fn set_limit(&mut self, limit: u64) {
        self.1 = usize::try_from(limit).map_or(MAX_FILES, |n| n.min(MAX_FILES));
    }

    fn slot(&self, fd: i32) -> Option<&(Arc<File>, bool)> {
        self.0.get(usize::try_from(fd).ok()?)?.as_ref()
    }

    /// The file of that number.
    pub fn get(&self, fd: i32) -> Result<Arc<File>, Errno> {
        self.slot(fd)
            .map(|(file, _)| Arc::clone(file))
            .ok_or(Errno::EBADF)
    }

    /// Whether it is closed by execve.
    pub fn closes_on_exec(&self, fd: i32) -> Result<bool, Errno> {
        self.slot(fd).map(|(_, close)| *close).ok_or(Errno::EBADF)
    }

    /// Sets whether it is.
    pub fn set_close_on_exec(&mut self, fd: i32, close: bool) -> Result<(), Errno> {
        let index = usize::try_from(fd).map_err(|_| Errno::EBADF)?;
        match self.0.get_mut(index) {
            Some(Some(slot)) => {
                slot.1 = close;
                Ok(())
            }
            _ => Err(Errno::EBADF),
        }
    }

    /// Gives a file the lowest free number from `from` on.
    pub fn insert(&mut self, file: Arc<File>, from: usize, close: bool) -> Result<i32, Errno> {
        // Open files are the kernel's memory.
        if appkernel_hal::frames::is_scarce() {
            return Err(Errno::ENFILE);
        }
        let index = (from..self.1)
            .find(|i| !matches!(self.0.get(*i), Some(Some(_))))
            .ok_or(Errno::EMFILE)?;
        self.put(index, file, close)?;
        Ok(index as i32)
    }

    fn put(
        &mut self,
        index: usize,
        file: Arc<File>,
        close: bool,
    ) -> Result<Option<Arc<File>>, Errno> {
        if let Some(more @ 1..) = (index + 1).checked_sub(self.0.len()) {
            // A flood of files may have taken the last large piece of memory.
            self.0.try_reserve(more).map_err(|_| Errno::ENOMEM)?;
            self.0.resize_with(index + 1, || None);
        }
        let slot = self.0.get_mut(index).ok_or(Errno::EBADF)?;
        Ok(slot.replace((file, close)).map(|(file, _)| file))
    }

    /// Gives a file that number; what had it comes back, to be dropped without the lock.
    pub fn replace(
        &mut self,
        fd: i32,
        file: Arc<File>,
        close: bool,
    ) -> Result<Option<Arc<File>>, Errno> {
        let index = usize::try_from(fd)
            .ok()
            .filter(|i| *i < self.1)
            .ok_or(Errno::EBADF)?;
        self.put(index, file, close)
    }

    /// Takes a number back; the file comes back, to be dropped without the lock.
    pub fn remove(&mut self, fd: i32) -> Result<Arc<File>, Errno> {
        let index = usize::try_from(fd).map_err(|_| Errno::EBADF)?;
        let slot = self.0.get_mut(index).and_then(Option::take);
        slot.map(|(file, _)| file).ok_or(Errno::EBADF)
    }

    /// Numbers in use.
    pub fn numbers(&self) -> Vec<u32> {
        let used = self.0.iter().enumerate().filter(|(_, slot)| slot.is_some());
        used.map(|(i, _)| i as u32).collect()
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Arc<File>> {
        self.0.iter().flatten().map(|(file, _)| file)
    }

    /// Takes out what execve closes.
    pub fn take_closing(&mut self) -> Vec<Arc<File>> {
        let closing = self
            .0
            .iter_mut()
            .filter(|slot| matches!(slot, Some((_, true))));
        closing
            .filter_map(Option::take)
            .map(|(file, _)| file)
            .collect()
    }
}
