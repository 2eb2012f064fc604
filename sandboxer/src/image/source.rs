//! Finding an image's parts in what the user gave: an OCI layout (directory or tar), a
//! docker-archive tar, or a root filesystem directory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::ImageError;
use super::manifest::{Descriptor, DockerEntry, ImageFile, Index, Manifest};
use super::tarball::{EntryKind, TarReader};

/// JSON documents above this are refused; the largest real manifests are some tens of KiB.
const MAX_JSON_BYTES: u64 = 8 << 20;
/// An index may point to an index, but not for ever.
const MAX_INDEX_DEPTH: u32 = 4;
/// Entries of an image archive (not of its layers).
const MAX_ARCHIVE_ENTRIES: usize = 100_000;

/// Layers and configuration of one image, found but not yet unpacked.
#[derive(Debug)]
pub struct Found {
    /// Identity of the image: manifest digest in OCI form, a digest over the configuration for a
    /// docker-archive. Lower-case hex.
    pub id: String,
    /// Parsed configuration blob.
    pub file: ImageFile,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
    /// Where blobs are read from.
    pub blobs: Blobs,
}

/// One layer blob.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Where it is in the image.
    pub path: String,
    /// Expected sha256 of the blob as stored, if the image says so.
    pub digest: Option<String>,
    /// Length of the blob as stored.
    pub size: u64,
    /// Declared media type; empty in docker archives.
    pub media_type: String,
}

/// Where the files of an image are.
#[derive(Debug)]
pub enum Blobs {
    /// A directory.
    Directory(PathBuf),
    /// A tar archive and the places of its files.
    Tar {
        /// The open archive.
        file: File,
        /// Normalised path to (offset, length).
        index: HashMap<String, (u64, u64)>,
    },
}

impl Blobs {
    /// Opens one file of the image.
    fn open(&self, name: &str) -> io::Result<(Box<dyn Read + '_>, u64)> {
        match self {
            Self::Directory(root) => {
                let path = root.join(clean(name).ok_or(io::ErrorKind::InvalidInput)?);
                let file = File::open(path)?;
                let meta = file.metadata()?;
                if !meta.is_file() {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "not a file"));
                }
                Ok((Box::new(file), meta.len()))
            }
            Self::Tar { file, index } => {
                let name = clean(name).ok_or(io::ErrorKind::InvalidInput)?;
                let (offset, size) = *index
                    .get(&*name.to_string_lossy())
                    .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "not in the archive"))?;
                let mut file = file;
                file.seek(SeekFrom::Start(offset))?;
                Ok((Box::new(file.take(size)), size))
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Directory(root) => root.join(name).is_file(),
            Self::Tar { index, .. } => index.contains_key(name),
        }
    }

    /// Opens a layer blob and says how long it is.
    ///
    /// # Errors
    /// The blob is missing or of another length than the manifest says.
    pub fn open_layer(&self, image: &str, layer: &Layer) -> Result<Box<dyn Read + '_>, ImageError> {
        let (reader, size) = self
            .open(&layer.path)
            .map_err(|e| missing(image, &layer.path, e))?;
        if size != layer.size {
            return Err(ImageError::Corrupt {
                image: image.to_owned(),
                what: layer.path.clone(),
                reason: format!("is {size} bytes long, the manifest says {}", layer.size),
            });
        }
        Ok(reader)
    }

    fn read_small(&self, image: &str, name: &str) -> Result<Vec<u8>, ImageError> {
        let (reader, size) = self.open(name).map_err(|e| missing(image, name, e))?;
        if size > MAX_JSON_BYTES {
            return Err(ImageError::TooLarge {
                image: image.to_owned(),
                what: name.to_owned(),
                limit: format!("{} MiB", MAX_JSON_BYTES >> 20),
            });
        }
        let mut data = Vec::new();
        reader
            .take(MAX_JSON_BYTES)
            .read_to_end(&mut data)
            .map_err(|e| ImageError::io(format!("image {image}: reading {name}"), e))?;
        Ok(data)
    }

    fn read_blob(&self, image: &str, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let (path, hex) = blob_path(image, &descriptor.digest)?;
        let data = self.read_small(image, &path)?;
        let actual = hex_digest(&data);
        if actual != hex {
            return Err(ImageError::BadDigest {
                image: image.to_owned(),
                blob: path,
                expected: hex,
                actual,
            });
        }
        Ok(data)
    }
}

/// sha256 in lower-case hex.
pub fn hex_digest(data: &[u8]) -> String {
    to_hex(&Sha256::digest(data))
}

/// Bytes in lower-case hex.
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut out, b| {
            let _ = write!(out, "{b:02x}");
            out
        })
}

fn missing(image: &str, name: &str, e: io::Error) -> ImageError {
    if e.kind() == io::ErrorKind::NotFound {
        ImageError::Corrupt {
            image: image.to_owned(),
            what: name.to_owned(),
            reason: "is named in the image but not in it (incomplete export?)".into(),
        }
    } else {
        ImageError::io(format!("image {image}: reading {name}"), e)
    }
}

/// `sha256:<hex>` to the blob's path; anything else could name a file outside of the layout.
fn blob_path(image: &str, digest: &str) -> Result<(String, String), ImageError> {
    match digest.split_once(':') {
        Some(("sha256", hex)) if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
            let hex = hex.to_ascii_lowercase();
            Ok((format!("blobs/sha256/{hex}"), hex))
        }
        _ => Err(ImageError::Corrupt {
            image: image.to_owned(),
            what: "manifest".into(),
            reason: format!("digest {:?} is not a sha256 digest", shorten(digest)),
        }),
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

/// A relative path without `.`, `..` and leading slashes.
fn clean(name: &str) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for part in Path::new(name).components() {
        match part {
            Component::Normal(part) => out.push(part),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    (!out.as_os_str().is_empty()).then_some(out)
}

/// What a path turned out to be.
#[derive(Debug)]
pub enum Source {
    /// An image with layers.
    Image(Box<Found>),
    /// A root filesystem to be used as it is.
    Directory(PathBuf),
}

/// For which kind of sandbox an image is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A Linux root filesystem.
    Linux,
    /// A WebAssembly module, as an artifact or in a root filesystem.
    Wasm,
}

impl Wanted {
    /// How well an image for this platform fits: 0 is not at all.
    fn rank(self, os: &str, architecture: &str) -> u8 {
        let linux = matches!(os, "" | "linux") && matches!(architecture, "" | "amd64" | "x86_64");
        let wasm = matches!(architecture, "wasm" | "wasm32") || os.starts_with("wasi");
        match self {
            Self::Wasm if wasm => 2,
            Self::Linux | Self::Wasm if linux => 1,
            _ => 0,
        }
    }
}

/// Finds out what `path` is and reads the image's documents. `scratch` takes the decompressed
/// copy of a compressed archive.
///
/// # Errors
/// See [`ImageError`].
pub fn open(path: &Path, scratch: &Path, max_bytes: u64) -> Result<Source, ImageError> {
    let source = open_for(Wanted::Linux, path, scratch, max_bytes)?;
    if let Source::Image(found) = &source
        && let Some(wasm) = found.layers.iter().find(|l| l.media_type.contains("wasm"))
    {
        return Err(ImageError::Corrupt {
            image: display_name(path),
            what: "layer".into(),
            reason: format!(
                "is a WebAssembly module ({}), not a Linux root filesystem; run it with vmmctl wasm run",
                shorten(&wasm.media_type)
            ),
        });
    }
    Ok(source)
}

/// As [`open`], for one kind of sandbox.
///
/// # Errors
/// See [`ImageError`].
pub fn open_for(
    wanted: Wanted,
    path: &Path,
    scratch: &Path,
    max_bytes: u64,
) -> Result<Source, ImageError> {
    let image = display_name(path);
    let meta = std::fs::metadata(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => ImageError::NotFound {
            path: path.to_owned(),
            hint: crate::hint::sibling(path),
        },
        _ => ImageError::io(format!("image {}", path.display()), e),
    })?;
    let blobs = if meta.is_dir() {
        if !path.join("index.json").is_file() && !path.join("manifest.json").is_file() {
            let mut entries = std::fs::read_dir(path)
                .map_err(|e| ImageError::io(format!("image {}", path.display()), e))?;
            if entries.next().is_none() {
                return Err(ImageError::NotAnImage {
                    path: path.to_owned(),
                    reason: "is an empty directory".into(),
                });
            }
            let full = path
                .canonicalize()
                .map_err(|e| ImageError::io(format!("image {}", path.display()), e))?;
            return Ok(Source::Directory(full));
        }
        Blobs::Directory(path.to_owned())
    } else if meta.is_file() {
        open_tar(path, &image, scratch, max_bytes)?
    } else {
        return Err(ImageError::NotAnImage {
            path: path.to_owned(),
            reason: "is neither a file nor a directory".into(),
        });
    };
    let found = if blobs.has("index.json") {
        find_oci(wanted, &image, blobs)?
    } else if blobs.has("manifest.json") {
        find_docker(wanted, &image, blobs)?
    } else {
        return Err(ImageError::NotAnImage {
            path: path.to_owned(),
            reason: "has neither index.json (OCI layout) nor manifest.json (docker save)".into(),
        });
    };
    Ok(Source::Image(Box::new(found)))
}

/// The name shown to the user: the last part of the path.
pub fn display_name(path: &Path) -> String {
    path.canonicalize()
        .ok()
        .as_deref()
        .unwrap_or(path)
        .file_name()
        .map_or_else(
            || path.display().to_string(),
            |n| n.to_string_lossy().into_owned(),
        )
}

fn open_tar(path: &Path, image: &str, scratch: &Path, max_bytes: u64) -> Result<Blobs, ImageError> {
    let io_error = |e| ImageError::io(format!("image {}", path.display()), e);
    let mut file = File::open(path).map_err(io_error)?;
    let mut magic = [0u8; 4];
    let got = file.read(&mut magic).map_err(io_error)?;
    file.seek(SeekFrom::Start(0)).map_err(io_error)?;
    if let Some(compression) = Compression::detect(&magic[..got]).map_err(io_error)? {
        file = decompressed(compression.decode(&file), image, scratch, max_bytes)?;
    }
    let mut reader = TarReader::new(BufReader::new(&file));
    let mut index = HashMap::new();
    let mut links: Vec<(String, String)> = Vec::new();
    let total = file.metadata().map_err(io_error)?.len();
    loop {
        let entry = match reader.next_entry_seek() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(e) if index.is_empty() => {
                return Err(ImageError::NotAnImage {
                    path: path.to_owned(),
                    reason: format!("is not a tar archive ({e})"),
                });
            }
            Err(e) => {
                return Err(ImageError::Corrupt {
                    image: image.to_owned(),
                    what: "archive".into(),
                    reason: e.to_string(),
                });
            }
        };
        if index.len() + links.len() >= MAX_ARCHIVE_ENTRIES {
            return Err(ImageError::TooLarge {
                image: image.to_owned(),
                what: "the number of files in the archive".into(),
                limit: MAX_ARCHIVE_ENTRIES.to_string(),
            });
        }
        let Some(name) = std::str::from_utf8(&entry.path).ok().and_then(clean) else {
            continue;
        };
        let name = name.to_string_lossy().into_owned();
        match entry.kind {
            EntryKind::File => {
                if entry
                    .offset
                    .checked_add(entry.size)
                    .is_none_or(|end| end > total)
                {
                    return Err(ImageError::Corrupt {
                        image: image.to_owned(),
                        what: name,
                        reason: "reaches beyond the end of the archive (truncated?)".into(),
                    });
                }
                index.insert(name, (entry.offset, entry.size));
            }
            // Old `docker save` writes a repeated layer as a link to the first one.
            EntryKind::Symlink | EntryKind::HardLink => {
                if let Ok(link) = std::str::from_utf8(&entry.link) {
                    let target = if entry.kind == EntryKind::Symlink {
                        join(&name, link)
                    } else {
                        clean(link)
                    };
                    if let Some(target) = target {
                        links.push((name, target.to_string_lossy().into_owned()));
                    }
                }
            }
            _ => {}
        }
    }
    for (name, target) in links {
        if let Some(place) = index.get(&target).copied() {
            index.entry(name).or_insert(place);
        }
    }
    drop(reader);
    Ok(Blobs::Tar { file, index })
}

/// Resolves a symlink inside an archive by its text; nothing on the host is looked at.
fn join(name: &str, link: &str) -> Option<PathBuf> {
    let mut out: Vec<&str> = name.split('/').collect();
    out.pop();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                out.pop()?;
            }
            part => out.push(part),
        }
    }
    Some(out.iter().collect())
}

/// How a blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    /// Judges by the first four bytes: declared media types are often wrong.
    pub(super) fn detect(magic: &[u8]) -> io::Result<Option<Self>> {
        let unsupported = |name: &str| {
            let text = format!("{name} compression is not supported, use gzip or zstd");
            Err(io::Error::new(io::ErrorKind::Unsupported, text))
        };
        match magic {
            [0x1f, 0x8b, ..] => Ok(Some(Self::Gzip)),
            [0x28, 0xb5, 0x2f, 0xfd] => Ok(Some(Self::Zstd)),
            [b'B', b'Z', b'h', ..] => unsupported("bzip2"),
            [0xfd, b'7', b'z', b'X'] => unsupported("xz"),
            _ => Ok(None),
        }
    }

    pub(super) fn decode<'a, R: Read + 'a>(self, reader: R) -> Box<dyn Read + 'a> {
        let reader = BufReader::with_capacity(64 << 10, reader);
        match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
            Self::Zstd => Box::new(ZstdFrames::new(reader)),
        }
    }
}

/// All frames of a zstd stream one after another (pzstd and `zstd:chunked` write several).
struct ZstdFrames<R: Read> {
    state: Option<ZstdState<R>>,
}

enum ZstdState<R: Read> {
    Between(BufReader<R>),
    Inside(Box<ruzstd::decoding::StreamingDecoder<BufReader<R>, ruzstd::decoding::FrameDecoder>>),
}

impl<R: Read> ZstdFrames<R> {
    fn new(reader: BufReader<R>) -> Self {
        Self {
            state: Some(ZstdState::Between(reader)),
        }
    }
}

impl<R: Read> Read for ZstdFrames<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        use std::io::BufRead;
        let bad = |e: String| io::Error::new(io::ErrorKind::InvalidData, format!("zstd: {e}"));
        if buf.is_empty() {
            return Ok(0);
        }
        while let Some(state) = self.state.take() {
            match state {
                ZstdState::Between(mut reader) => {
                    let head = reader.fill_buf()?;
                    if head.is_empty() {
                        return Ok(0);
                    }
                    // Skippable frame: 0x184D2A5? and a length.
                    if head.len() >= 8 && head[1..4] == [0x2a, 0x4d, 0x18] && head[0] & 0xf0 == 0x50
                    {
                        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
                        io::copy(
                            &mut (&mut reader).take(u64::from(length) + 8),
                            &mut io::sink(),
                        )?;
                        self.state = Some(ZstdState::Between(reader));
                        continue;
                    }
                    let decoder = ruzstd::decoding::StreamingDecoder::new(reader)
                        .map_err(|e| bad(e.to_string()))?;
                    self.state = Some(ZstdState::Inside(Box::new(decoder)));
                }
                ZstdState::Inside(mut decoder) => {
                    let n = decoder.read(buf)?;
                    if n > 0 {
                        self.state = Some(ZstdState::Inside(decoder));
                        return Ok(n);
                    }
                    self.state = Some(ZstdState::Between(decoder.into_inner()));
                }
            }
        }
        Ok(0)
    }
}

/// Decompresses a whole archive into an unnamed file: blobs are read at random.
fn decompressed(
    mut from: impl Read,
    image: &str,
    scratch: &Path,
    max_bytes: u64,
) -> Result<File, ImageError> {
    let io_error = |e| {
        ImageError::io(
            format!("image {image}: decompressing into {}", scratch.display()),
            e,
        )
    };
    let path = scratch.join(format!(".archive-{}", std::process::id()));
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .map_err(io_error)?;
    std::fs::remove_file(&path).map_err(io_error)?;
    let copied = io::copy(
        &mut (&mut from).take(max_bytes.saturating_add(1)),
        &mut file,
    )
    .map_err(io_error)?;
    if copied > max_bytes {
        return Err(ImageError::TooLarge {
            image: image.to_owned(),
            what: "the decompressed archive".into(),
            limit: format!("{max_bytes} bytes"),
        });
    }
    file.flush().map_err(io_error)?;
    file.seek(SeekFrom::Start(0)).map_err(io_error)?;
    Ok(file)
}

fn parse<T: DeserializeOwned>(image: &str, what: &str, data: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(data).map_err(|e| ImageError::Corrupt {
        image: image.to_owned(),
        what: what.to_owned(),
        reason: format!("unreadable JSON: {e}"),
    })
}

fn is_index(media_type: &str) -> bool {
    media_type.ends_with("image.index.v1+json") || media_type.ends_with("manifest.list.v2+json")
}

fn find_oci(wanted: Wanted, image: &str, blobs: Blobs) -> Result<Found, ImageError> {
    let mut index: Index = parse(image, "index.json", &blobs.read_small(image, "index.json")?)?;
    let mut seen: Vec<String> = Vec::new();
    for _ in 0..MAX_INDEX_DEPTH {
        let Some(descriptor) = choose(wanted, &index.manifests, &mut seen) else {
            break;
        };
        let data = blobs.read_blob(image, &descriptor)?;
        let nested = is_index(&descriptor.media_type)
            || (descriptor.media_type.is_empty()
                && serde_json::from_slice::<Index>(&data).is_ok_and(|i| !i.manifests.is_empty()));
        if nested {
            index = parse(image, "nested index", &data)?;
            continue;
        }
        let manifest: Manifest = parse(image, "manifest", &data)?;
        let (_, id) = blob_path(image, &descriptor.digest)?;
        let file: ImageFile = parse(
            image,
            "configuration",
            &blobs.read_blob(image, &manifest.config)?,
        )?;
        check_platform(wanted, image, &file)?;
        let layers = manifest
            .layers
            .iter()
            .map(|layer| {
                let (path, hex) = blob_path(image, &layer.digest)?;
                Ok(Layer {
                    path,
                    digest: Some(hex),
                    size: layer.size,
                    media_type: layer.media_type.clone(),
                })
            })
            .collect::<Result<Vec<_>, ImageError>>()?;
        return Ok(Found {
            id,
            file,
            layers,
            blobs,
        });
    }
    Err(ImageError::NoPlatform {
        image: image.to_owned(),
        found: if seen.is_empty() {
            "an empty index".into()
        } else {
            seen.join(", ")
        },
    })
}

/// Takes the entry that fits best; entries without platform are taken if nothing better exists.
fn choose(wanted: Wanted, manifests: &[Descriptor], seen: &mut Vec<String>) -> Option<Descriptor> {
    let mut best: Option<(u8, &Descriptor)> = None;
    let mut fallback = None;
    for descriptor in manifests {
        match &descriptor.platform {
            Some(p) if !p.architecture.is_empty() => {
                let rank = wanted.rank(&p.os, &p.architecture);
                if rank > best.map_or(0, |(rank, _)| rank) {
                    best = Some((rank, descriptor));
                }
                let name = shorten(&format!("{}/{}", p.os, p.architecture));
                if rank == 0 && seen.len() < 16 && !seen.contains(&name) {
                    seen.push(name);
                }
            }
            _ => fallback = fallback.or(Some(descriptor)),
        }
    }
    best.map(|(_, descriptor)| descriptor).or(fallback).cloned()
}

fn check_platform(wanted: Wanted, image: &str, file: &ImageFile) -> Result<(), ImageError> {
    if wanted.rank(&file.os, &file.architecture) > 0 {
        return Ok(());
    }
    Err(ImageError::NoPlatform {
        image: image.to_owned(),
        found: shorten(&format!("{}/{}", file.os, file.architecture)),
    })
}

fn find_docker(wanted: Wanted, image: &str, blobs: Blobs) -> Result<Found, ImageError> {
    let entries: Vec<DockerEntry> = parse(
        image,
        "manifest.json",
        &blobs.read_small(image, "manifest.json")?,
    )?;
    let entry = entries
        .into_iter()
        .next()
        .ok_or_else(|| ImageError::Corrupt {
            image: image.to_owned(),
            what: "manifest.json".into(),
            reason: "names no image".into(),
        })?;
    let config = blobs.read_small(image, &entry.config)?;
    let file: ImageFile = parse(image, "configuration", &config)?;
    check_platform(wanted, image, &file)?;
    let layers = entry
        .layers
        .iter()
        .map(|path| {
            let (_, size) = blobs.open(path).map_err(|e| missing(image, path, e))?;
            Ok(Layer {
                path: path.clone(),
                digest: None,
                size,
                media_type: String::new(),
            })
        })
        .collect::<Result<Vec<_>, ImageError>>()?;
    if layers.len()
        != file
            .rootfs
            .as_ref()
            .map_or(layers.len(), |r| r.diff_ids.len())
    {
        return Err(ImageError::Corrupt {
            image: image.to_owned(),
            what: "manifest.json".into(),
            reason: "the number of layers differs from the configuration's".into(),
        });
    }
    Ok(Found {
        id: hex_digest(&config),
        file,
        layers,
        blobs,
    })
}
