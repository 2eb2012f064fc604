//! Compiled programs on disk.
//!
//! Loading machine code runs it, so an entry is used only if it is ours: the directory and its
//! files belong to us and nobody else may enter, and each entry carries a MAC by a key that lies
//! beside it. The MAC over the content is checked once; a stamp (again under a MAC) then says that
//! the file with this inode, size and change time is good. The change time cannot be set by
//! anybody but the kernel.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use crate::config::CacheConfig;
use crate::error::WasmError;

/// A file whose times are younger than this when it is hashed may change again without its times
/// showing it.
const SETTLED: Duration = Duration::from_secs(2);
const DIGEST: usize = 32;
const IDENTITY: usize = 5 * 8;
/// Content MAC, identity, MAC of both.
const STAMP: usize = DIGEST + IDENTITY + DIGEST;
/// Most files that say which content another file has.
const MAX_SOURCES: usize = 4096;

/// A SHA-256 digest.
pub(crate) type Sha = [u8; DIGEST];

/// The cache's directory, opened and checked.
#[derive(Debug)]
pub(crate) struct DiskCache {
    directory: PathBuf,
    max_bytes: u64,
    key: Sha,
}

/// RFC 2104 with SHA-256.
struct Hmac {
    inner: Sha256,
    outer: Sha256,
}

impl Hmac {
    fn new(key: &Sha) -> Self {
        let pad = |byte: u8| {
            let mut block = [byte; 64];
            for (b, k) in block.iter_mut().zip(key) {
                *b ^= k;
            }
            Sha256::new().chain_update(block)
        };
        Self {
            inner: pad(0x36),
            outer: pad(0x5c),
        }
    }

    fn finish(self) -> Sha {
        self.outer
            .chain_update(self.inner.finalize())
            .finalize()
            .into()
    }
}

/// What tells one state of a file from another.
fn identity(meta: &fs::Metadata) -> [u8; IDENTITY] {
    let parts = [
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime().wrapping_mul(1_000_000_000).cast_unsigned()
            ^ meta.mtime_nsec().cast_unsigned(),
        meta.ctime().wrapping_mul(1_000_000_000).cast_unsigned()
            ^ meta.ctime_nsec().cast_unsigned(),
    ];
    let mut out = [0; IDENTITY];
    for (chunk, part) in out.chunks_exact_mut(8).zip(parts) {
        chunk.copy_from_slice(&part.to_le_bytes());
    }
    out
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

/// Hashes a file that is read to its end, but not beyond `limit` bytes.
pub(crate) fn read_limited(file: &File, limit: u64) -> io::Result<Vec<u8>> {
    let size = file.metadata()?.len().min(limit);
    let mut data = Vec::new();
    data.try_reserve_exact(usize::try_from(size).unwrap_or(usize::MAX))
        .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    file.take(limit.saturating_add(1)).read_to_end(&mut data)?;
    Ok(data)
}

fn private_file(path: &Path) -> io::Result<(File, fs::Metadata)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let meta = file.metadata()?;
    let ours = meta.is_file()
        && meta.uid() == nix::unistd::geteuid().as_raw()
        && meta.mode() & 0o077 == 0
        && meta.nlink() == 1;
    if !ours {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the file does not belong to us alone",
        ));
    }
    Ok((file, meta))
}

impl DiskCache {
    /// Opens the cache, making directory and key if they are missing.
    pub(crate) fn open(config: &CacheConfig) -> Result<Self, WasmError> {
        let directory = &config.directory;
        let fail = |e| WasmError::io(format!("module cache {}", directory.display()), e);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(fail)?;
        let meta = fs::symlink_metadata(directory).map_err(fail)?;
        if !meta.is_dir()
            || meta.uid() != nix::unistd::geteuid().as_raw()
            || meta.mode() & 0o077 != 0
        {
            return Err(fail(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "must be a directory of our own with mode 0700: machine code is loaded from it",
            )));
        }
        let key = Self::key(directory).map_err(fail)?;
        Ok(Self {
            directory: directory.clone(),
            max_bytes: config.max_bytes,
            key,
        })
    }

    /// Reads the key; two processes that make it at once agree on the first.
    fn key(directory: &Path) -> io::Result<Sha> {
        let path = directory.join("key");
        for _ in 0..2 {
            match private_file(&path) {
                Ok((mut file, _)) => {
                    let mut key = [0; DIGEST];
                    file.read_exact(&mut key)?;
                    return Ok(key);
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
            let mut key = [0; DIGEST];
            File::open("/dev/urandom")?.read_exact(&mut key)?;
            let temporary = Temporary::create(directory, &key)?;
            let keep = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
            let here = nix::fcntl::AT_FDCWD;
            match nix::fcntl::renameat2(here, &temporary.0, here, &path, keep) {
                Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    fn mac(&self, parts: &[&[u8]]) -> Sha {
        let mut mac = Hmac::new(&self.key);
        for part in parts {
            mac.inner.update(part);
        }
        mac.finish()
    }

    fn content_mac(&self, key: &Sha, file: &File) -> io::Result<Sha> {
        let mut mac = Hmac::new(&self.key);
        mac.inner.update(b"content");
        // An entry of one program under the name of another is no good either.
        mac.inner.update(key);
        let mut file = file;
        let mut buffer = vec![0; 1 << 18];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(mac.finish()),
                n => mac.inner.update(buffer.get(..n).unwrap_or_default()),
            }
        }
    }

    fn path(&self, key: &Sha, suffix: &str) -> PathBuf {
        self.directory.join(format!("{}.{suffix}", hex(key)))
    }

    /// The compiled program under `key`, verified. `None` if there is none that can be trusted.
    pub(crate) fn get(&self, key: &Sha) -> Option<File> {
        let (file, meta) = private_file(&self.path(key, "cwasm")).ok()?;
        let stamp_path = self.path(key, "stamp");
        let (mut stamp_file, _) = private_file(&stamp_path).ok()?;
        let mut stamp = [0; STAMP];
        stamp_file.read_exact(&mut stamp).ok()?;
        let (record, mac) = stamp.split_at(DIGEST + IDENTITY);
        if self.mac(&[b"stamp", key, record]) != *mac {
            return None;
        }
        let (content, known) = record.split_at(DIGEST);
        if identity(&meta) != *known {
            // Copied or restored: the content decides, and is remembered.
            if self.content_mac(key, &file).ok()? != *content {
                return None;
            }
            let content: Sha = content.try_into().ok()?;
            let _ = self.write_stamp(key, &content, &meta);
        }
        // The least recently used go first.
        let _ = stamp_file.set_modified(SystemTime::now());
        Some(file)
    }

    /// Waits until no other process compiles for this cache. It ends when the file is closed.
    pub(crate) fn turn(&self) -> Result<File, WasmError> {
        let path = self.directory.join("compiling.lock");
        let taken = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .and_then(|file| {
                file.lock()?;
                Ok(file)
            });
        taken.map_err(|e| WasmError::io(format!("module cache {}", path.display()), e))
    }

    fn write_stamp(&self, key: &Sha, content: &Sha, meta: &fs::Metadata) -> io::Result<()> {
        let mut record = content.to_vec();
        record.extend(identity(meta));
        let mac = self.mac(&[b"stamp", key, &record]);
        record.extend(mac);
        let temporary = Temporary::create(&self.directory, &record)?;
        temporary.rename(&self.path(key, "stamp"))
    }

    /// Stores a compiled program and gives back the file to load it from.
    pub(crate) fn put(&self, key: &Sha, code: &File) -> io::Result<File> {
        self.make_room(code.metadata()?.len())?;
        let temporary = Temporary::copy(&self.directory, code)?;
        // Of what is written there, not of what was to be.
        let content = self.content_mac(key, &File::open(&temporary.0)?)?;
        let path = self.path(key, "cwasm");
        temporary.rename(&path)?;
        let (file, meta) = private_file(&path)?;
        self.write_stamp(key, &content, &meta)?;
        Ok(file)
    }

    /// Removes an entry that turned out to be unusable.
    pub(crate) fn remove(&self, key: &Sha) {
        let _ = fs::remove_file(self.path(key, "stamp"));
        let _ = fs::remove_file(self.path(key, "cwasm"));
    }

    /// Removes the least recently used until `size` bytes fit; also what killed writers left.
    fn make_room(&self, size: u64) -> io::Result<()> {
        let mut entries: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        let mut total = size;
        for entry in fs::read_dir(&self.directory)?.flatten() {
            let path = entry.path();
            let Ok(meta) = entry.metadata() else { continue };
            let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            match path.extension().and_then(|e| e.to_str()) {
                Some("cwasm") => {
                    let used = fs::metadata(path.with_extension("stamp"))
                        .and_then(|m| m.modified())
                        .unwrap_or(SystemTime::UNIX_EPOCH);
                    total = total.saturating_add(meta.len());
                    entries.push((used, meta.len(), path));
                }
                Some("tmp")
                    if modified
                        .elapsed()
                        .is_ok_and(|age| age > Duration::from_secs(600)) =>
                {
                    let _ = fs::remove_file(path);
                }
                _ => {}
            }
        }
        entries.sort();
        for (_, bytes, path) in entries {
            if total <= self.max_bytes {
                break;
            }
            let _ = fs::remove_file(path.with_extension("stamp"));
            let _ = fs::remove_file(&path);
            total = total.saturating_sub(bytes);
        }
        Ok(())
    }

    fn source_path(&self, meta: &fs::Metadata) -> PathBuf {
        let name = self.mac(&[b"source", &identity(meta)]);
        self.directory.join(format!("{}.source", hex(&name)))
    }

    /// The digest of a file that was hashed before and has not changed since.
    pub(crate) fn known_digest(&self, meta: &fs::Metadata) -> Option<Sha> {
        let (mut file, _) = private_file(&self.source_path(meta)).ok()?;
        let mut record = [0; 2 * DIGEST];
        file.read_exact(&mut record).ok()?;
        let (digest, mac) = record.split_at(DIGEST);
        (self.mac(&[b"digest", &identity(meta), digest]) == *mac)
            .then(|| digest.try_into().ok())
            .flatten()
    }

    /// Remembers a file's digest, unless the file is too young to tell its next change.
    pub(crate) fn remember_digest(&self, meta: &fs::Metadata, digest: &Sha) {
        let settled =
            |t: io::Result<SystemTime>| t.is_ok_and(|t| t.elapsed().is_ok_and(|age| age > SETTLED));
        let changed = u64::try_from(meta.ctime())
            .ok()
            .and_then(|s| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(s + 1)))
            .ok_or_else(|| io::ErrorKind::InvalidData.into());
        if !settled(meta.modified()) || !settled(changed) {
            return;
        }
        let mut record = digest.to_vec();
        record.extend(self.mac(&[b"digest", &identity(meta), digest]));
        let _ = Temporary::create(&self.directory, &record)
            .and_then(|t| t.rename(&self.source_path(meta)));
        self.trim_sources();
    }

    fn trim_sources(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return;
        };
        let mut sources: Vec<(SystemTime, OsString)> = entries
            .flatten()
            .filter(|e| e.path().extension().is_some_and(|x| x == "source"))
            .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.file_name())))
            .collect();
        if sources.len() > MAX_SOURCES {
            sources.sort();
            for (_, name) in sources.iter().take(sources.len() / 2) {
                let _ = fs::remove_file(self.directory.join(name));
            }
        }
    }
}

/// Entry point for fuzzing: an entry whose files somebody else has changed or replaced is what was put
/// in, or none. `directory` is one for this alone. The first byte chooses the file, each three after it
/// a byte to change; or, from the first byte's upper half on, the rest is the file.
///
/// # Panics
/// Other code than was put in would be loaded.
pub fn fuzz_cache(data: &[u8], directory: &Path) {
    const KEY: Sha = [7; DIGEST];
    const CODE: &[u8] = b"what the compiler made";
    let config = CacheConfig {
        directory: directory.to_owned(),
        max_bytes: 1 << 20,
    };
    let ([choice, rest @ ..], Ok(cache)) = (data, DiskCache::open(&config)) else {
        return;
    };
    let put = || -> io::Result<()> {
        let code = Temporary::create(directory, CODE)?;
        cache.put(&KEY, &File::open(&code.0)?).map(drop)
    };
    if put().is_err() {
        return;
    }
    let suffix = if choice & 1 == 0 { "cwasm" } else { "stamp" };
    let path = cache.path(&KEY, suffix);
    let mut content = fs::read(&path).unwrap_or_default();
    if *choice < 128 {
        for change in rest.as_chunks::<3>().0 {
            let [low, high, value] = *change;
            let at = usize::from(u16::from_le_bytes([low, high])) % content.len().max(1);
            if let Some(byte) = content.get_mut(at) {
                *byte ^= value;
            }
        }
    } else {
        content = rest.to_vec();
    }
    // Another file in its place: the stamp goes by inode and times, as nobody but us may write to it.
    let replaced = Temporary::create(directory, &content).and_then(|new| new.rename(&path));
    if replaced.is_ok()
        && let Some(mut file) = cache.get(&KEY)
    {
        let mut got = Vec::new();
        // Where its checksum was taken, it stands at its end.
        let read = file.rewind().and_then(|()| file.read_to_end(&mut got));
        assert!(read.is_ok() && got == CODE, "other code: {got:?}");
    }
    cache.remove(&KEY);
}

/// A file that appears under its name when complete, or not at all.
struct Temporary(PathBuf);

impl Temporary {
    fn create(directory: &Path, content: &[u8]) -> io::Result<Self> {
        Self::write(directory, |file| file.write_all(content))
    }

    /// The whole of a file, wherever it stands.
    fn copy(directory: &Path, from: &File) -> io::Result<Self> {
        let mut from = from;
        from.rewind()?;
        Self::write(directory, |file| io::copy(&mut from, file).map(drop))
    }

    fn write(
        directory: &Path,
        content: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> io::Result<Self> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = directory.join(format!("{}-{number}.tmp", std::process::id()));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)?;
        let made = Self(path);
        content(&mut file)?;
        Ok(made)
    }

    fn rename(&self, to: &Path) -> io::Result<()> {
        fs::rename(&self.0, to)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn cache(directory: &Path, max_bytes: u64) -> DiskCache {
        DiskCache::open(&CacheConfig {
            directory: directory.to_owned(),
            max_bytes,
        })
        .expect("opens")
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(content).expect("written");
        file
    }

    fn content(file: Option<File>) -> Option<Vec<u8>> {
        read_limited(&file?, 1 << 20).ok()
    }

    #[test]
    fn hmac_is_the_standard_one() {
        // RFC 4231, test case 2 padded to our key length: "Jefe" and zeros are the same key.
        let mut key = [0; DIGEST];
        key[..4].copy_from_slice(b"Jefe");
        let mut mac = Hmac::new(&key);
        mac.inner.update(b"what do ya want for nothing?");
        assert_eq!(
            hex(&mac.finish()),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn entries_survive_and_are_verified() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("cache");
        let one = cache(&path, 1 << 20);
        let key = [7; DIGEST];
        assert!(one.get(&key).is_none());
        one.put(&key, &file(b"machine code")).expect("stored");
        assert_eq!(
            content(cache(&path, 1 << 20).get(&key)).as_deref(),
            Some(b"machine code".as_slice())
        );
        // Copied elsewhere with its key: still good, by content.
        let copy = dir.path().join("copy");
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&copy)
            .expect("mkdir");
        for entry in fs::read_dir(&path).expect("list").flatten() {
            fs::copy(entry.path(), copy.join(entry.file_name())).expect("copy");
        }
        assert!(cache(&copy, 1 << 20).get(&key).is_some());
        // Changed behind our back: refused, whatever the times say.
        let entry = one.path(&key, "cwasm");
        let times = fs::metadata(&entry)
            .expect("stat")
            .modified()
            .expect("mtime");
        fs::write(&entry, b"machine c0de").expect("write");
        File::options()
            .write(true)
            .open(&entry)
            .and_then(|f| f.set_modified(times))
            .expect("utimes");
        assert!(one.get(&key).is_none());
        // Under another program's name: refused.
        one.put(&key, &file(b"machine code")).expect("stored");
        let other = [8; DIGEST];
        for suffix in ["cwasm", "stamp"] {
            fs::copy(one.path(&key, suffix), one.path(&other, suffix)).expect("copy");
        }
        assert!(one.get(&other).is_none());
    }

    #[test]
    fn foreign_files_and_directories_are_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("cache");
        let one = cache(&path, 1 << 20);
        let key = [7; DIGEST];
        one.put(&key, &file(b"code")).expect("stored");
        let entry = one.path(&key, "cwasm");
        fs::set_permissions(&entry, fs::Permissions::from_mode(0o644)).expect("chmod");
        assert!(one.get(&key).is_none());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        let error = DiskCache::open(&CacheConfig {
            directory: path.clone(),
            max_bytes: 1,
        })
        .expect_err("open to others");
        assert!(error.to_string().contains("0700"), "{error}");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).expect("symlink");
        assert!(
            DiskCache::open(&CacheConfig {
                directory: link,
                max_bytes: 1
            })
            .is_err()
        );
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("cache");
        let one = cache(&path, 250);
        let keys = [[1; DIGEST], [2; DIGEST], [3; DIGEST]];
        let stamp_time = |key: &Sha, seconds| {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            File::options()
                .write(true)
                .open(one.path(key, "stamp"))
                .and_then(|f| f.set_modified(time))
                .expect("utimes");
        };
        one.put(&keys[0], &file(&[0; 100])).expect("stored");
        stamp_time(&keys[0], 1000);
        one.put(&keys[1], &file(&[0; 100])).expect("stored");
        stamp_time(&keys[1], 2000);
        assert!(one.get(&keys[0]).is_some(), "use makes it young again");
        one.put(&keys[2], &file(&[0; 100])).expect("stored");
        assert!(one.get(&keys[1]).is_none());
        assert!(one.get(&keys[0]).is_some() && one.get(&keys[2]).is_some());
    }

    #[test]
    fn digests_are_remembered_for_settled_files_only() {
        let dir = tempfile::tempdir().expect("tempdir");
        let one = cache(&dir.path().join("cache"), 1 << 20);
        let file = dir.path().join("young");
        fs::write(&file, b"x").expect("write");
        let meta = fs::metadata(&file).expect("stat");
        one.remember_digest(&meta, &[9; DIGEST]);
        assert_eq!(one.known_digest(&meta), None, "may still change");
        let old = fs::metadata("/usr/bin/env").expect("stat");
        one.remember_digest(&old, &[9; DIGEST]);
        assert_eq!(one.known_digest(&old), Some([9; DIGEST]));
    }
}
