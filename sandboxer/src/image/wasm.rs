//! WebAssembly programs in images: artifacts (a layer that is the module itself) and root
//! filesystems with a `.wasm` entrypoint.

use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use sha2::{Digest, Sha256};

use super::manifest::ImageConfig;
use super::source::{self, Found, Layer, Source, Wanted};
use super::store::{Progress, Store};
use super::{Image, ImageError};
use crate::fsutil;

/// What a path given by the user holds.
#[derive(Debug)]
pub enum WasmImage {
    /// The program itself.
    File(PathBuf),
    /// An artifact: the program, and how the image wants it to be run.
    Artifact {
        /// Name for people.
        name: String,
        /// The module, in the store.
        file: PathBuf,
        /// Often empty.
        config: ImageConfig,
    },
    /// A root filesystem; the program is found in it by the entrypoint.
    Root(Image),
}

/// Media types of layers that are modules or components: those of the OCI artifact guidance, of
/// runwasi and of its predecessors.
pub(crate) fn is_module(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/wasm"
            | "application/vnd.wasm.content.layer.v1+wasm"
            | "application/vnd.module.wasm.content.layer.v1+wasm"
            | "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm"
    )
}

impl Store {
    /// Finds the WebAssembly program at `path`: a file that begins as one, or an image.
    ///
    /// # Errors
    /// See [`ImageError`]. Nothing is left behind.
    pub fn get_wasm(
        &self,
        path: &Path,
        progress: &mut dyn Progress,
    ) -> Result<WasmImage, ImageError> {
        if begins_as_wasm(path) {
            return Ok(WasmImage::File(path.to_owned()));
        }
        let name = source::display_name(path);
        match source::open_for(Wanted::Wasm, path, self.root(), self.max_bytes())? {
            Source::Directory(rootfs) => Ok(WasmImage::Root(Image {
                name,
                id: String::new(),
                rootfs,
                config: ImageConfig::default(),
            })),
            Source::Image(found) => match found.layers.iter().find(|l| is_module(&l.media_type)) {
                Some(layer) => Ok(WasmImage::Artifact {
                    file: self.extract(&name, &found, layer)?,
                    config: found.file.config.clone().unwrap_or_default(),
                    name,
                }),
                None => Ok(WasmImage::Root(self.take(&name, &found, progress)?)),
            },
        }
    }

    /// Copies a layer that is a module into the store, under its digest.
    fn extract(&self, image: &str, found: &Found, layer: &Layer) -> Result<PathBuf, ImageError> {
        let directory = self.root().join("modules");
        let fail = |e: io::Error| {
            ImageError::io(
                format!(
                    "image {image}: copying its module to {}",
                    directory.display()
                ),
                e,
            )
        };
        if layer.size > self.max_bytes() {
            return Err(ImageError::TooLarge {
                image: image.to_owned(),
                what: layer.path.clone(),
                limit: format!("{} bytes", self.max_bytes()),
            });
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(fail)?;
        let target = |digest: &str| directory.join(format!("{digest}.wasm"));
        // Written under its digest only after that was checked.
        if let Some(known) = layer.digest.as_deref().map(target)
            && known.is_file()
        {
            return Ok(known);
        }
        let temporary = directory.join(format!(".{}.tmp", std::process::id()));
        let mut from = found.blobs.open_layer(image, layer)?;
        let mut to = File::create(&temporary).map_err(fail)?;
        let mut hash = Sha256::new();
        let copied = io::copy(&mut Tee(&mut from, &mut hash), &mut to);
        let actual = source::to_hex(&hash.finalize());
        let result = copied.map_err(fail).and_then(|_| match &layer.digest {
            Some(expected) if *expected != actual => Err(ImageError::BadDigest {
                image: image.to_owned(),
                blob: layer.path.clone(),
                expected: expected.clone(),
                actual: actual.clone(),
            }),
            _ => std::fs::rename(&temporary, target(&actual)).map_err(fail),
        });
        if result.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        result.map(|()| target(&actual))
    }
}

/// Opens a file of an unpacked image as the container would see it: links, absolute ones too, are
/// followed within the image.
///
/// # Errors
/// There is no such file.
pub fn open_in_image(rootfs: &Path, path: &Path) -> io::Result<OwnedFd> {
    let root = fsutil::open_dir(rootfs)?;
    fsutil::open_in_root(
        &root,
        path.as_os_str(),
        OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK,
    )
}

fn begins_as_wasm(path: &Path) -> bool {
    let mut magic = [0; 4];
    path.is_file()
        && File::open(path)
            .and_then(|mut f| f.read_exact(&mut magic))
            .is_ok()
        && magic == *b"\0asm"
}

struct Tee<'a, R>(&'a mut R, &'a mut Sha256);

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read(buffer)?;
        self.1.update(buffer.get(..n).unwrap_or_default());
        Ok(n)
    }
}
