//! The cache of unpacked images.
//!
//! `images/<id>/rootfs` holds the merged layers of one image, `images/<id>/image.json` what is
//! known about it. An image appears by an atomic rename when it is complete and verified; an
//! import that was killed leaves a `tmp-<id>` directory that the next import removes.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::ImageError;
use super::manifest::ImageConfig;
use super::source::{self, Compression, Found, Layer, Source};
use super::unpack::{Limits, Unpacker};
use crate::fsutil;

/// Largest unpacked image unless `BULKHEAD_IMAGE_MAX_BYTES` says otherwise: 32 GiB.
const DEFAULT_MAX_BYTES: u64 = 32 << 30;
/// Most files of one image; large distribution images have some 300,000.
const MAX_ENTRIES: u64 = 5_000_000;

/// Told how an import goes on.
pub trait Progress {
    /// An import begins; `bytes` is what will be read from the image.
    fn start(&mut self, image: &str, bytes: u64, layers: usize);
    /// So many bytes more were read.
    fn advance(&mut self, bytes: u64);
    /// The import is over, well or not.
    fn finish(&mut self, complete: bool);
    /// True when the user wants it to end.
    fn stop(&self) -> bool;
}

/// Says nothing and never stops.
#[derive(Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&mut self, _image: &str, _bytes: u64, _layers: usize) {}
    fn advance(&mut self, _bytes: u64) {}
    fn finish(&mut self, _complete: bool) {}
    fn stop(&self) -> bool {
        false
    }
}

/// An image ready to be used.
#[derive(Debug, Clone)]
pub struct Image {
    /// Name for people: the last part of the path it came from.
    pub name: String,
    /// Digest in hex; empty for a plain directory.
    pub id: String,
    /// The unpacked root filesystem. Never written to.
    pub rootfs: PathBuf,
    /// How it wants to be run.
    pub config: ImageConfig,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    name: String,
    config: ImageConfig,
    bytes: u64,
    layers: usize,
}

/// Version of `image.json`; others are imported again.
const RECORD_VERSION: u32 = 1;

/// A directory of unpacked images.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    max_bytes: u64,
}

impl Store {
    /// The store at `root`, made if missing.
    ///
    /// # Errors
    /// The directory cannot be made or locked.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        use std::os::unix::fs::DirBuilderExt;
        for sub in ["images", "locks"] {
            // Unpacked images hold set-id programs: nobody else may walk in.
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(root.join(sub)).map_err(|e| {
                ImageError::io(format!("image store {}: cannot be made (choose another place with --root or BULKHEAD_ROOT)", root.display()), e)
            })?;
        }
        let max_bytes = std::env::var("BULKHEAD_IMAGE_MAX_BYTES")
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or(DEFAULT_MAX_BYTES);
        Ok(Self {
            root: root.to_owned(),
            max_bytes,
        })
    }

    /// Where the store lives by default: `/var/lib/bulkhead` for root, the user's cache otherwise.
    pub fn default_root() -> PathBuf {
        if let Some(root) = std::env::var_os("BULKHEAD_ROOT").filter(|r| !r.is_empty()) {
            return root.into();
        }
        if nix::unistd::geteuid().is_root() {
            return "/var/lib/bulkhead".into();
        }
        match std::env::var_os("XDG_CACHE_HOME").filter(|d| !d.is_empty()) {
            Some(cache) => PathBuf::from(cache).join("bulkhead"),
            None => std::env::home_dir()
                .unwrap_or_else(std::env::temp_dir)
                .join(".cache/bulkhead"),
        }
    }

    /// The directory of the store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the image at `path` ready: from the cache, or by importing it.
    ///
    /// # Errors
    /// See [`ImageError`]. Nothing is left behind.
    pub fn get(&self, path: &Path, progress: &mut dyn Progress) -> Result<Image, ImageError> {
        let name = source::display_name(path);
        match source::open(path, &self.root, self.max_bytes)? {
            Source::Directory(rootfs) => Ok(Image {
                name,
                id: String::new(),
                rootfs,
                config: ImageConfig::default(),
            }),
            Source::Image(found) => self.take(&name, &found, progress),
        }
    }

    /// The unpacked image, from the cache or by importing it.
    pub(super) fn take(
        &self,
        name: &str,
        found: &Found,
        progress: &mut dyn Progress,
    ) -> Result<Image, ImageError> {
        match self.cached(&found.id, name) {
            Some(image) => Ok(image),
            None => self.import(name, found, progress),
        }
    }

    pub(super) fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    fn cached(&self, id: &str, name: &str) -> Option<Image> {
        let dir = self.root.join("images").join(id);
        let record: Record =
            serde_json::from_slice(&std::fs::read(dir.join("image.json")).ok()?).ok()?;
        (record.version == RECORD_VERSION).then(|| Image {
            name: name.to_owned(),
            id: id.to_owned(),
            rootfs: dir.join("rootfs"),
            config: record.config,
        })
    }

    fn import(
        &self,
        name: &str,
        found: &Found,
        progress: &mut dyn Progress,
    ) -> Result<Image, ImageError> {
        let io_error = |what: &str, e| {
            ImageError::io(
                format!("image {name}: {what} in {}", self.root.display()),
                e,
            )
        };
        // Two imports of one image: the second waits and then finds it in the cache.
        let lock = self.root.join("locks").join(&found.id);
        let _lock = fsutil::lock(&lock, true).map_err(|e| io_error("taking the import lock", e))?;
        if let Some(image) = self.cached(&found.id, name) {
            return Ok(image);
        }
        let finished = self.root.join("images").join(&found.id);
        let temporary = self.root.join("images").join(format!("tmp-{}", found.id));
        let clean = |dir: &Path| {
            fsutil::remove_dir(dir).map_err(|e| io_error("removing an unfinished import", e))
        };
        self.remove_abandoned(&found.id);
        clean(&temporary)?;
        clean(&finished)?;
        let rootfs = temporary.join("rootfs");
        std::fs::create_dir_all(&rootfs).map_err(|e| io_error("making a directory", e))?;
        let bytes = found
            .layers
            .iter()
            .map(|l| l.size)
            .fold(0u64, u64::saturating_add);
        progress.start(name, bytes, found.layers.len());
        let result = self.unpack(name, found, &rootfs, progress);
        progress.finish(result.is_ok());
        let result = result.and_then(|()| {
            let record = Record {
                version: RECORD_VERSION,
                name: name.to_owned(),
                config: found.file.config.clone().unwrap_or_default(),
                bytes,
                layers: found.layers.len(),
            };
            let json = serde_json::to_vec_pretty(&record)
                .map_err(|e| io_error("writing image.json", e.into()))?;
            fsutil::write_atomically(&temporary.join("image.json"), &json, 0o600)
                .and_then(|()| std::fs::rename(&temporary, &finished))
                .map_err(|e| io_error("finishing the import", e))
        });
        if let Err(e) = result {
            let _ = fsutil::remove_dir(&temporary);
            return Err(e);
        }
        self.cached(&found.id, name)
            .ok_or_else(|| io_error("reading back the import", io::ErrorKind::NotFound.into()))
    }

    fn unpack(
        &self,
        name: &str,
        found: &Found,
        rootfs: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), ImageError> {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(rootfs, std::fs::Permissions::from_mode(0o755))
            .map_err(|e| ImageError::io(format!("image {name}: {}", rootfs.display()), e))?;
        let progress = std::cell::RefCell::new(progress);
        let stop = || progress.borrow().stop();
        let limits = Limits {
            bytes: self.max_bytes,
            entries: MAX_ENTRIES,
        };
        let mut unpacker = Unpacker::new(name, rootfs, limits, &stop)?;
        let diff_ids = found
            .file
            .rootfs
            .as_ref()
            .map(|r| r.diff_ids.as_slice())
            .unwrap_or_default();
        for (number, layer) in found.layers.iter().enumerate() {
            let label = format!("layer {} of {}", number + 1, found.layers.len());
            let advance = |n| progress.borrow_mut().advance(n);
            unpack_layer(
                name,
                &label,
                found,
                layer,
                diff_ids.get(number),
                &mut unpacker,
                &advance,
            )?;
        }
        Ok(())
    }

    /// Removes what killed imports of other images left. Their locks are free then.
    fn remove_abandoned(&self, own: &str) {
        for entry in std::fs::read_dir(self.root.join("images"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(id) = name.strip_prefix("tmp-") else {
                continue;
            };
            if id == own {
                continue;
            }
            if let Ok(_lock) = fsutil::lock(&self.root.join("locks").join(id), false) {
                let _ = fsutil::remove_dir(&entry.path());
            }
        }
    }
}

fn unpack_layer(
    image: &str,
    label: &str,
    found: &Found,
    layer: &Layer,
    diff_id: Option<&String>,
    unpacker: &mut Unpacker<'_>,
    advance: &dyn Fn(u64),
) -> Result<(), ImageError> {
    let corrupt = |e: io::Error| ImageError::Corrupt {
        image: image.to_owned(),
        what: label.to_owned(),
        reason: e.to_string(),
    };
    let mut stored = Hashed::new(found.blobs.open_layer(image, layer)?, Some(advance));
    let mut magic = [0u8; 4];
    let got = read_up_to(&mut stored, &mut magic).map_err(corrupt)?;
    let mut plain_hash = None;
    let compression = Compression::detect(&magic[..got]).map_err(corrupt)?;
    let whole = io::Cursor::new(&magic[..got]).chain(&mut stored);
    match compression {
        Some(compression) => {
            let mut plain = Hashed::new(compression.decode(whole), None);
            unpacker.layer(label, &mut plain)?;
            plain_hash = Some(plain.digest());
        }
        None => unpacker.layer(label, whole)?,
    }
    // A decompressor may stop before the end of the blob; the digest covers all of it.
    io::copy(&mut stored, &mut io::sink()).map_err(corrupt)?;
    let stored_hash = stored.digest();
    let check = |blob: String, expected: &str, actual: &str| {
        if expected == actual {
            return Ok(());
        }
        Err(ImageError::BadDigest {
            image: image.to_owned(),
            blob,
            expected: expected.to_owned(),
            actual: actual.to_owned(),
        })
    };
    if let Some(expected) = &layer.digest {
        check(format!("{label} ({})", layer.path), expected, &stored_hash)?;
    }
    if let Some(expected) = diff_id.and_then(|d| d.strip_prefix("sha256:")) {
        let actual = plain_hash.as_deref().unwrap_or(&stored_hash);
        check(
            format!("{label} (unpacked)"),
            &expected.to_ascii_lowercase(),
            actual,
        )?;
    }
    Ok(())
}

fn read_up_to(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// Hashes what is read through it.
struct Hashed<'a, R> {
    inner: R,
    hash: Sha256,
    advance: Option<&'a dyn Fn(u64)>,
}

impl<'a, R: Read> Hashed<'a, R> {
    fn new(inner: R, advance: Option<&'a dyn Fn(u64)>) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            advance,
        }
    }

    fn digest(self) -> String {
        source::to_hex(&self.hash.finalize())
    }
}

impl<R: Read> Read for Hashed<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hash.update(&buf[..n]);
        if let Some(advance) = self.advance {
            advance(n as u64);
        }
        Ok(n)
    }
}
