//! A tar reader for untrusted archives.
//!
//! Reads ustar, pax and GNU long names from a plain byte stream. Everything an archive can choose
//! is bounded: header extensions are read into at most [`MAX_EXTENSION_BYTES`], so that a
//! gigabyte "path" in a few compressed bytes cannot take the host's memory.

use std::io::{self, Read};

const BLOCK: usize = 512;
/// Longest pax header, GNU long name or long link accepted. Linux paths end at 4 KiB; extended
/// attributes at 64 KiB each.
pub const MAX_EXTENSION_BYTES: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// Ordinary file with content.
    File,
    /// Another name of a file in the archive or below it.
    HardLink,
    /// Symbolic link.
    Symlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Directory.
    Directory,
    /// Named pipe.
    Fifo,
    /// A type byte this reader does not know.
    Other(u8),
}

/// One archive entry's header, extensions applied.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Path as in the archive, bytes without meaning until checked.
    pub path: Vec<u8>,
    /// Link target of hard and symbolic links.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, including set-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Content length in bytes.
    pub size: u64,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Major number of device nodes.
    pub dev_major: u32,
    /// Minor number of device nodes.
    pub dev_minor: u32,
    /// Extended attributes (`SCHILY.xattr.*`).
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// Offset of the content in the stream.
    pub offset: u64,
}

/// Reads entries one after another; the content of the current one through [`Read`].
#[derive(Debug)]
pub struct TarReader<R> {
    inner: R,
    position: u64,
    content_left: u64,
    padding: u64,
    done: bool,
}

#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
    xattrs: Vec<(String, Vec<u8>)>,
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl<R: Read> TarReader<R> {
    /// Starts at the first header of an uncompressed archive.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            position: 0,
            content_left: 0,
            padding: 0,
            done: false,
        }
    }

    /// The next entry, or `None` at the end of the archive. What is left of the current entry's
    /// content is skipped.
    ///
    /// # Errors
    /// The stream's own errors; `InvalidData` and `UnexpectedEof` for a malformed archive.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        self.next_with(|reader, bytes| {
            let copied = io::copy(&mut (&mut *reader).take(bytes), &mut io::sink())?;
            if copied == bytes {
                Ok(())
            } else {
                Err(truncated())
            }
        })
    }

    fn next_with(
        &mut self,
        mut skip: impl FnMut(&mut R, u64) -> io::Result<()>,
    ) -> io::Result<Option<Entry>> {
        if self.done {
            return Ok(None);
        }
        let rest = self.content_left.saturating_add(self.padding);
        if rest > 0 {
            skip(&mut self.inner, rest)?;
            self.advance(rest)?;
            self.content_left = 0;
            self.padding = 0;
        }
        let mut ext = Extensions::default();
        loop {
            let mut header = [0u8; BLOCK];
            if !self.read_header(&mut header)? {
                self.done = true;
                return Ok(None);
            }
            if header.iter().all(|b| *b == 0) {
                // Two zero blocks end an archive; one is enough, as other readers take it.
                self.done = true;
                return Ok(None);
            }
            check_sum(&header)?;
            let size = number(&header[124..136], "size")?;
            match header[156] {
                b'x' => parse_pax(&self.read_extension(size)?, &mut ext)?,
                b'g' => {
                    self.read_extension(size)?;
                }
                b'L' => ext.path = Some(until_nul(&self.read_extension(size)?).to_vec()),
                b'K' => ext.link = Some(until_nul(&self.read_extension(size)?).to_vec()),
                kind => return self.entry(&header, kind, size, ext).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        type_byte: u8,
        header_size: u64,
        ext: Extensions,
    ) -> io::Result<Entry> {
        let mut kind = match type_byte {
            b'0' | 0 | b'7' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::Char,
            b'4' => EntryKind::Block,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => EntryKind::Other(other),
        };
        let path = match ext.path {
            Some(path) => path,
            None => header_path(header),
        };
        if kind == EntryKind::File && path.ends_with(b"/") {
            // Archives older than POSIX mark directories so.
            kind = EntryKind::Directory;
        }
        // Only files and unknown types carry content; a size on the others (hard links written by
        // some tools) announces none.
        let size = match kind {
            EntryKind::File | EntryKind::Other(_) => ext.size.unwrap_or(header_size),
            _ => 0,
        };
        self.content_left = size;
        self.padding = padding(size);
        Ok(Entry {
            path,
            link: ext
                .link
                .unwrap_or_else(|| until_nul(&header[157..257]).to_vec()),
            kind,
            mode: u32::try_from(number(&header[100..108], "mode")? & 0o7777).unwrap_or(0),
            uid: match ext.uid {
                Some(uid) => uid,
                None => id(&header[108..116], "uid")?,
            },
            gid: match ext.gid {
                Some(gid) => gid,
                None => id(&header[116..124], "gid")?,
            },
            size,
            mtime: match ext.mtime {
                Some(mtime) => mtime,
                None => i64::try_from(number(&header[136..148], "mtime").unwrap_or(0)).unwrap_or(0),
            },
            dev_major: id(&header[329..337], "device").unwrap_or(0),
            dev_minor: id(&header[337..345], "device").unwrap_or(0),
            xattrs: ext.xattrs,
            offset: self.position,
        })
    }

    /// True when a whole header was read, false at a clean end of the stream.
    fn read_header(&mut self, header: &mut [u8; BLOCK]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut header[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(truncated()),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.advance(BLOCK as u64)?;
        Ok(true)
    }

    fn read_extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION_BYTES {
            return Err(bad(format!(
                "a header extension of {size} bytes (limit {MAX_EXTENSION_BYTES})"
            )));
        }
        let with_padding = size + padding(size);
        let mut data = Vec::new();
        (&mut self.inner)
            .take(with_padding)
            .read_to_end(&mut data)?;
        if data.len() as u64 != with_padding {
            return Err(truncated());
        }
        self.advance(with_padding)?;
        data.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        Ok(data)
    }

    fn advance(&mut self, bytes: u64) -> io::Result<()> {
        self.position = self
            .position
            .checked_add(bytes)
            .ok_or_else(|| bad("archive size overflows"))?;
        Ok(())
    }

    /// Gives the stream back, positioned after what was read.
    pub fn into_inner(self) -> R {
        self.inner
    }
}

impl<R: Read + io::Seek> TarReader<R> {
    /// Like [`Self::next_entry`], jumping over contents: for finding the blobs of a large image.
    ///
    /// # Errors
    /// As [`Self::next_entry`].
    pub fn next_entry_seek(&mut self) -> io::Result<Option<Entry>> {
        self.next_with(|reader, bytes| {
            let bytes = i64::try_from(bytes).map_err(|_| bad("entry size overflows"))?;
            reader.seek_relative(bytes)
        })
    }
}

impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.content_left == 0 || buf.is_empty() {
            return Ok(0);
        }
        let most = usize::try_from(self.content_left)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let n = self.inner.read(&mut buf[..most])?;
        if n == 0 {
            return Err(truncated());
        }
        self.content_left -= n as u64;
        self.advance(n as u64)?;
        Ok(n)
    }
}

fn truncated() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the archive ends in the middle of an entry (truncated)",
    )
}

fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn until_nul(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    &field[..end]
}

fn header_path(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&header[0..100]);
    // The prefix field exists in POSIX headers only; GNU ones use its place for times.
    let prefix = if &header[257..263] == b"ustar\0" {
        until_nul(&header[345..500])
    } else {
        &[]
    };
    if prefix.is_empty() {
        return name.to_vec();
    }
    let mut path = prefix.to_vec();
    path.push(b'/');
    path.extend_from_slice(name);
    path
}

fn check_sum(header: &[u8; BLOCK]) -> io::Result<()> {
    let stored = number(&header[148..156], "checksum")?;
    let sum: u64 = header
        .iter()
        .enumerate()
        .map(|(i, b)| u64::from(if (148..156).contains(&i) { b' ' } else { *b }))
        .sum();
    if stored == sum {
        Ok(())
    } else {
        Err(bad("a tar header's checksum does not match"))
    }
}

/// A numeric header field: octal text, or GNU base-256 for large values.
fn number(field: &[u8], what: &str) -> io::Result<u64> {
    if let Some((first, rest)) = field.split_first()
        && first & 0x80 != 0
    {
        if *first != 0x80 {
            return Err(bad(format!(
                "a negative or oversized {what} in a tar header"
            )));
        }
        return rest
            .iter()
            .try_fold(0u64, |value, b| {
                value.checked_mul(256)?.checked_add(u64::from(*b))
            })
            .ok_or_else(|| bad(format!("an oversized {what} in a tar header")));
    }
    let text = until_nul(field);
    let text = text.trim_ascii();
    if text.is_empty() {
        return Ok(0);
    }
    text.iter()
        .try_fold(0u64, |value, b| match b {
            b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(b - b'0')),
            _ => None,
        })
        .ok_or_else(|| bad(format!("an unreadable {what} in a tar header")))
}

fn id(field: &[u8], what: &str) -> io::Result<u32> {
    u32::try_from(number(field, what)?)
        .map_err(|_| bad(format!("an oversized {what} in a tar header")))
}

/// pax records: `LENGTH KEY=VALUE\n`, LENGTH counting the whole record.
fn parse_pax(mut data: &[u8], ext: &mut Extensions) -> io::Result<()> {
    while !data.is_empty() {
        let space = data
            .iter()
            .take(20)
            .position(|b| *b == b' ')
            .ok_or_else(|| bad("a pax record without length"))?;
        let length: usize = std::str::from_utf8(&data[..space])
            .ok()
            .and_then(|s| s.parse().ok())
            .filter(|n| *n > space + 1 && *n <= data.len())
            .ok_or_else(|| bad("a pax record with a wrong length"))?;
        let record = &data[space + 1..length];
        let record = record.strip_suffix(b"\n").unwrap_or(record);
        data = &data[length..];
        let Some(eq) = record.iter().position(|b| *b == b'=') else {
            return Err(bad("a pax record without '='"));
        };
        let (key, value) = (&record[..eq], &record[eq + 1..]);
        let text = || std::str::from_utf8(value).map_err(|_| bad("a pax number that is not text"));
        let parsed = |what: &str| bad(format!("an unreadable pax {what}"));
        match key {
            b"path" => ext.path = Some(value.to_vec()),
            b"linkpath" => ext.link = Some(value.to_vec()),
            b"size" => ext.size = Some(text()?.parse().map_err(|_| parsed("size"))?),
            b"uid" => ext.uid = Some(text()?.parse().map_err(|_| parsed("uid"))?),
            b"gid" => ext.gid = Some(text()?.parse().map_err(|_| parsed("gid"))?),
            b"mtime" => {
                let whole = text()?.split('.').next().unwrap_or("0");
                ext.mtime = Some(whole.parse().map_err(|_| parsed("mtime"))?);
            }
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err(bad(
                    "a sparse file (GNU.sparse) is not supported in image layers",
                ));
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.")
                    && let Ok(name) = std::str::from_utf8(name)
                {
                    ext.xattrs.push((name.to_owned(), value.to_vec()));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn archive(build: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        build(&mut builder);
        builder.into_inner().expect("in memory")
    }

    #[test]
    fn reads_what_the_tar_crate_writes() {
        let long = format!("dir/{}/file", "x".repeat(180));
        let data = archive(|b| {
            let mut h = tar::Header::new_gnu();
            h.set_size(5);
            h.set_mode(0o4755);
            h.set_uid(70_000);
            h.set_mtime(1_700_000_000);
            b.append_data(&mut h, "a.txt", &b"hello"[..])
                .expect("append");
            b.append_data(&mut h, &long, &b"world"[..]).expect("append");
            let mut l = tar::Header::new_gnu();
            l.set_entry_type(tar::EntryType::Symlink);
            l.set_size(0);
            b.append_link(&mut l, "s", "a.txt").expect("append");
        });
        let mut reader = TarReader::new(&data[..]);
        let first = reader.next_entry().expect("header").expect("entry");
        assert_eq!(
            (first.path.as_slice(), first.size, first.mode),
            (&b"a.txt"[..], 5, 0o4755)
        );
        assert_eq!((first.uid, first.mtime), (70_000, 1_700_000_000));
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("content");
        assert_eq!(text, "hello");
        let second = reader.next_entry().expect("header").expect("entry");
        assert_eq!(second.path, long.as_bytes());
        let third = reader.next_entry().expect("header").expect("entry");
        assert_eq!(
            (third.kind, third.link.as_slice()),
            (EntryKind::Symlink, &b"a.txt"[..])
        );
        assert!(reader.next_entry().expect("end").is_none());
    }

    #[test]
    fn offsets_lead_to_the_content() {
        let data = archive(|b| {
            for name in ["one", "two"] {
                let mut h = tar::Header::new_gnu();
                h.set_size(3);
                b.append_data(&mut h, name, name.as_bytes())
                    .expect("append");
            }
        });
        let mut reader = TarReader::new(io::Cursor::new(&data));
        while let Some(entry) = reader.next_entry_seek().expect("entry") {
            let at = usize::try_from(entry.offset).expect("small");
            assert_eq!(&data[at..at + 3], &entry.path[..]);
        }
    }

    #[test]
    fn pax_attributes_and_limits() {
        let mut ext = Extensions::default();
        parse_pax(b"28 SCHILY.xattr.user.a=bcde\n16 path=some/p\n", &mut ext)
            .expect_err("length is wrong");
        let mut ext = Extensions::default();
        parse_pax(b"29 SCHILY.xattr.user.a=bcdef\n16 path=some/pa\n", &mut ext)
            .expect("well formed");
        assert_eq!(ext.xattrs, vec![("user.a".to_owned(), b"bcdef".to_vec())]);
        assert_eq!(ext.path.as_deref(), Some(&b"some/pa"[..]));
        assert!(parse_pax(b"9999999999 x=y\n", &mut Extensions::default()).is_err());
        assert!(parse_pax(b"3 x", &mut Extensions::default()).is_err());
    }

    #[test]
    fn a_gigantic_extension_is_refused_before_it_is_read() {
        let mut h = tar::Header::new_gnu();
        h.set_entry_type(tar::EntryType::GNULongName);
        h.set_size(1 << 40);
        h.set_cksum();
        let endless = h.as_bytes().chain(io::repeat(b'a'));
        let error = TarReader::new(endless).next_entry().expect_err("refused");
        assert!(error.to_string().contains("header extension"), "{error}");
    }

    #[test]
    fn truncation_is_an_error() {
        let data = archive(|b| {
            let mut h = tar::Header::new_gnu();
            h.set_size(2000);
            b.append_data(&mut h, "a", io::repeat(1).take(2000))
                .expect("append");
        });
        let mut reader = TarReader::new(&data[..1024]);
        reader.next_entry().expect("header");
        assert!(reader.next_entry().is_err());
    }

    proptest! {
        #[test]
        fn never_panics(data in proptest::collection::vec(any::<u8>(), 0..4096), fix in any::<bool>()) {
            let mut data = data;
            if fix && data.len() >= BLOCK {
                // A right checksum lets arbitrary fields through to the parser.
                data[148..156].copy_from_slice(b"        ");
                let sum: u32 = data[..BLOCK].iter().map(|b| u32::from(*b)).sum();
                data[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
            let mut reader = TarReader::new(&data[..]);
            for _ in 0..20 {
                match reader.next_entry() {
                    Ok(Some(_)) => {}
                    _ => break,
                }
            }
        }
    }
}
