//! FUSE messages, as the virtio-fs device takes and gives them (protocol 7.31 and newer). What the
//! host answers is checked like any other input: lengths first.

use alloc::string::String;
use alloc::vec::Vec;

use crate::errno::Errno;

/// Bytes before each request.
pub const IN_HEADER: usize = 40;
/// Bytes before each answer.
pub const OUT_HEADER: usize = 16;
/// The root directory.
pub const ROOT: u64 = 1;
/// Longest name.
pub const NAME_MAX: usize = 255;

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "they are the protocol's names")]
pub enum Op {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Releasedir = 29,
    Create = 35,
    Rename2 = 45,
    Tmpfile = 51,
}

/// Who asks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process.
    pub pid: u32,
}

/// Collects the fields of a message.
#[derive(Debug, Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    /// An empty body.
    pub fn new() -> Self {
        Self::default()
    }
    /// Appends 32 bits.
    #[must_use]
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    /// Appends 64 bits.
    #[must_use]
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    /// Appends a name and its end.
    #[must_use]
    pub fn name(mut self, name: &[u8]) -> Self {
        self.0.extend(name);
        self.0.push(0);
        self
    }
}

/// The bytes before a request with `len` bytes of its own.
pub fn header(op: Op, node: u64, unique: u64, caller: Caller, len: usize) -> [u8; IN_HEADER] {
    let mut header = [0; IN_HEADER];
    let total = u32::try_from(IN_HEADER + len).unwrap_or(u32::MAX);
    let fields = [
        (0, total),
        (4, op as u32),
        (8, unique as u32),
        (12, (unique >> 32) as u32),
        (16, node as u32),
        (20, (node >> 32) as u32),
        (24, caller.uid),
        (28, caller.gid),
        (32, caller.pid),
    ];
    for (at, value) in fields {
        header[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    header
}

/// Checks an answer and returns what is behind its header.
///
/// # Errors
/// The error in it; `EIO` if it is not an answer to this request.
pub fn answer(bytes: &[u8], unique: u64) -> Result<&[u8], Errno> {
    let mut reader = Reader(bytes);
    let (len, error, id) = (reader.u32()?, reader.u32()?, reader.u64()?);
    if id != unique {
        return Err(Errno::EIO);
    }
    if error != 0 {
        return Err(Errno::from_negative(error.cast_signed()));
    }
    bytes.get(OUT_HEADER..len as usize).ok_or(Errno::EIO)
}

/// Takes fields out of an answer.
#[derive(Clone, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next bytes.
    ///
    /// # Errors
    /// `EIO` past the end.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Errno::EIO)?;
        self.0 = rest;
        Ok(taken)
    }
    /// The next 32 bits.
    ///
    /// # Errors
    /// `EIO` past the end.
    pub fn u32(&mut self) -> Result<u32, Errno> {
        let bytes = self.take(4)?.try_into().map_err(|_| Errno::EIO)?;
        Ok(u32::from_le_bytes(bytes))
    }
    /// The next 64 bits.
    ///
    /// # Errors
    /// `EIO` past the end.
    pub fn u64(&mut self) -> Result<u64, Errno> {
        let bytes = self.take(8)?.try_into().map_err(|_| Errno::EIO)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Attributes of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of stat(2)")]
pub struct Attributes {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    /// Access, modification, change: seconds and nanoseconds.
    pub times: [(u64, u32); 3],
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub block_size: u32,
}

impl Attributes {
    /// Reads them.
    ///
    /// # Errors
    /// `EIO` if the answer is short.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, Errno> {
        let mut attributes = Self {
            ino: reader.u64()?,
            size: reader.u64()?,
            blocks: reader.u64()?,
            ..Self::default()
        };
        for time in &mut attributes.times {
            time.0 = reader.u64()?;
        }
        for time in &mut attributes.times {
            time.1 = reader.u32()?;
        }
        attributes.mode = reader.u32()?;
        attributes.nlink = reader.u32()?;
        attributes.uid = reader.u32()?;
        attributes.gid = reader.u32()?;
        attributes.rdev = reader.u32()?;
        attributes.block_size = reader.u32()?;
        reader.u32()?;
        Ok(attributes)
    }
}

/// A name that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its node.
    pub node: u64,
    /// Nanoseconds for which name and attributes are valid (the shorter of the two).
    pub valid_ns: u64,
    /// Its attributes.
    pub attributes: Attributes,
}

impl Entry {
    /// Reads the answer to a call that makes or finds a file.
    ///
    /// # Errors
    /// `EIO` if the answer is short, `ENOENT` if it says that there is none.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, Errno> {
        Self::parse_found(reader)?.map_err(|_| Errno::ENOENT)
    }

    /// Reads the answer to a look-up: a file, or for how many nanoseconds it is certain that there
    /// is none.
    ///
    /// # Errors
    /// `EIO` if the answer is short.
    pub fn parse_found(reader: &mut Reader<'_>) -> Result<Result<Self, u64>, Errno> {
        let (node, _generation) = (reader.u64()?, reader.u64()?);
        let (entry, attr) = (reader.u64()?, reader.u64()?);
        let (entry_ns, attr_ns) = (reader.u32()?, reader.u32()?);
        let ns = |seconds: u64, ns: u32| {
            seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(ns.into())
        };
        let attributes = Attributes::parse(reader)?;
        if node == 0 {
            return Ok(Err(ns(entry, entry_ns)));
        }
        Ok(Ok(Self {
            node,
            valid_ns: ns(entry, entry_ns).min(ns(attr, attr_ns)),
            attributes,
        }))
    }
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Number of the file.
    pub ino: u64,
    /// Where the next one begins.
    pub offset: u64,
    /// Kind of file (`DT_*`).
    pub kind: u8,
    /// Its name.
    pub name: Vec<u8>,
}

/// Reads the entries of a directory.
///
/// # Errors
/// `EIO` for a name that is none.
pub fn directory(bytes: &[u8]) -> Result<Vec<DirEntry>, Errno> {
    let mut entries = Vec::new();
    let mut reader = Reader(bytes);
    while reader.0.len() >= 24 {
        let (ino, offset) = (reader.u64()?, reader.u64()?);
        let (len, kind) = (reader.u32()? as usize, reader.u32()?);
        if len == 0 || len > NAME_MAX {
            return Err(Errno::EIO);
        }
        let Ok(name) = reader.take(len) else { break };
        let name = name.to_vec();
        if name.contains(&b'/') || name.contains(&0) {
            return Err(Errno::EIO);
        }
        let padding = len.next_multiple_of(8) - len;
        let _ = reader.take(padding.min(reader.0.len()));
        entries.push(DirEntry {
            ino,
            offset,
            kind: kind as u8,
            name,
        });
    }
    Ok(entries)
}

/// The tag in a file system device's configuration.
pub fn tag(config: &[u8]) -> String {
    let end = config.iter().position(|b| *b == 0).unwrap_or(config.len());
    String::from_utf8_lossy(config.get(..end).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_checked() {
        let make = |len: u32, error: i32, unique: u64| {
            let mut bytes = Body::new()
                .u32(len)
                .u32(error.cast_unsigned())
                .u64(unique)
                .0;
            bytes.extend(b"data");
            bytes
        };
        assert_eq!(answer(&make(20, 0, 7), 7), Ok(&b"data"[..]));
        assert_eq!(answer(&make(20, 0, 8), 7), Err(Errno::EIO));
        assert_eq!(answer(&make(21, 0, 7), 7), Err(Errno::EIO));
        assert_eq!(answer(&make(3, 0, 7), 7), Err(Errno::EIO));
        assert_eq!(answer(&make(16, -2, 7), 7), Err(Errno::ENOENT));
        assert_eq!(answer(&make(16, i32::MIN, 7), 7), Err(Errno::EIO));
        assert_eq!(answer(&make(16, 0, 7)[..9], 7), Err(Errno::EIO));
    }

    #[test]
    fn directories_of_any_bytes_are_read_or_refused() {
        let mut bytes = Body::new().u64(5).u64(1).u32(3).u32(8).0;
        bytes.extend(b"abc\0\0\0\0\0");
        let one = directory(&bytes).unwrap();
        assert_eq!(
            (one.len(), one[0].name.as_slice(), one[0].kind),
            (1, &b"abc"[..], 8)
        );
        for i in 0..bytes.len() {
            for value in [0, 1, 0x2f, 0xff] {
                let mut bad = bytes.clone();
                bad[i] = value;
                let _ = directory(&bad);
                let _ = directory(&bad[..i]);
            }
        }
        bytes[24] = b'/';
        assert_eq!(directory(&bytes), Err(Errno::EIO));
    }
}
