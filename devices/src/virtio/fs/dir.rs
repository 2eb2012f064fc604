//! Reading a directory piecewise.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::RawFd;

use fuse_backend_rs::abi::fuse_abi::EntryOut;

use super::sys;

/// Bytes of entries fetched at once.
const BUFFER: usize = 8192;
/// `struct linux_dirent64` up to the name: inode, next offset, record length, type.
const HEAD: usize = 19;
/// `struct fuse_dirent` up to the name.
const FUSE_HEAD: usize = 24;

/// Entries fetched from the host that the guest has not taken yet.
#[derive(Debug, Default)]
pub(super) struct DirStream {
    buffer: Vec<u8>,
    start: usize,
    /// Offset at which the buffer starts, as the guest names it.
    at: u64,
}

/// One entry.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub ino: u64,
    /// Offset of the entry after it.
    pub next: u64,
    pub kind: u8,
    pub name: CString,
    record: usize,
}

impl Item {
    pub(super) fn is_dot(&self) -> bool {
        matches!(self.name.as_bytes(), b"." | b"..")
    }

    /// Bytes it takes in an answer.
    pub(super) fn reply_len(&self, plus: bool) -> usize {
        let plain = (FUSE_HEAD + self.name.as_bytes().len()).next_multiple_of(8);
        plain + if plus { size_of::<EntryOut>() } else { 0 }
    }
}

impl DirStream {
    /// Continues at `offset`: where the last answer ended (no call needed), or anywhere else.
    pub(super) fn seek(&mut self, fd: RawFd, offset: u64) -> io::Result<()> {
        if offset != 0 && offset == self.at {
            return Ok(());
        }
        self.buffer.clear();
        self.start = 0;
        let to = i64::try_from(offset).map_err(|_| sys::errno(libc::EINVAL))?;
        sys::lseek(fd, to, libc::SEEK_SET)?;
        self.at = offset;
        Ok(())
    }

    /// The next entry, without taking it.
    pub(super) fn peek(&mut self, fd: RawFd) -> io::Result<Option<Item>> {
        if self.start >= self.buffer.len() {
            self.start = 0;
            self.buffer.resize(BUFFER, 0);
            let n = sys::getdents(fd, &mut self.buffer).inspect_err(|_| self.buffer.clear())?;
            self.buffer.truncate(n);
            if n == 0 {
                // At the end the memory is given back.
                self.buffer = Vec::new();
                return Ok(None);
            }
        }
        // What the host's kernel wrote is well formed; if it ever were not, reading stops.
        let parsed = self.parse();
        if parsed.is_none() {
            self.buffer.clear();
        }
        Ok(parsed)
    }

    fn parse(&self) -> Option<Item> {
        let rest = self.buffer.get(self.start..)?;
        let ino = u64::from_ne_bytes(*rest.first_chunk::<8>()?);
        let next = u64::from_ne_bytes(*rest.get(8..)?.first_chunk::<8>()?);
        let record = usize::from(u16::from_ne_bytes(*rest.get(16..)?.first_chunk::<2>()?));
        let kind = *rest.get(18)?;
        let name = rest.get(HEAD..record)?;
        let end = name.iter().position(|byte| *byte == 0)?;
        let name = CString::new(name.get(..end)?).ok()?;
        Some(Item {
            ino,
            next,
            kind,
            name,
            record,
        })
    }

    /// Takes the entry `peek` returned.
    pub(super) fn advance(&mut self) {
        if let Some(item) = self.parse() {
            self.start += item.record;
            self.at = item.next;
        }
    }
}
