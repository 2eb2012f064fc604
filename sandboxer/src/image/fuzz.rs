//! Entry points for fuzzing what reads images: no input may panic, hang, take much memory or
//! touch anything outside of a temporary directory.

use std::io::Read;

use super::manifest::{DockerEntry, ImageFile, Index, Manifest};
use super::source;
use super::tarball::TarReader;
use super::unpack::{Limits, Unpacker};

/// Most bytes a fuzzed input may unpack to.
const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    entries: 256,
};

/// Any bytes as a tar archive.
pub fn fuzz_tar(data: &[u8]) {
    let mut reader = TarReader::new(data);
    for _ in 0..LIMITS.entries {
        match reader.next_entry() {
            Ok(Some(_)) => {
                let _ = std::io::copy(&mut reader.by_ref().take(4096), &mut std::io::sink());
            }
            _ => return,
        }
    }
}

/// Any bytes as a layer (compressed or not), unpacked below `dir`, an empty directory.
pub fn fuzz_layer(data: &[u8], dir: &std::path::Path) {
    let Ok(mut unpacker) = Unpacker::new("fuzz", dir, LIMITS, &|| false) else {
        return;
    };
    let compression = source::Compression::detect(data.get(..4).unwrap_or(data));
    let _ = match compression {
        Ok(Some(compression)) => {
            let plain = compression.decode(data).take(4 * LIMITS.bytes);
            unpacker.layer("layer", plain)
        }
        _ => unpacker.layer("layer", data),
    };
}

/// Any bytes as the JSON documents of an image.
pub fn fuzz_manifest(data: &[u8]) {
    let _ = serde_json::from_slice::<Index>(data);
    let _ = serde_json::from_slice::<Manifest>(data);
    let _ = serde_json::from_slice::<Vec<DockerEntry>>(data);
    let _ = serde_json::from_slice::<ImageFile>(data);
}

/// Any bytes as an image file: archive, index, manifest, layers. `dir` is an empty directory.
pub fn fuzz_image(data: &[u8], dir: &std::path::Path) {
    let path = dir.join("image.tar");
    if std::fs::write(&path, data).is_ok() {
        let _ = source::open(&path, dir, LIMITS.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn arbitrary_bytes_do_no_harm(data in proptest::collection::vec(any::<u8>(), 0..3000), head in 0usize..4) {
            let mut data = data;
            let magic: &[u8] = [&[][..], &[0x1f, 0x8b, 8], &[0x28, 0xb5, 0x2f, 0xfd], b"{\"manifests\":["][head];
            data.splice(0..0, magic.iter().copied());
            fuzz_tar(&data);
            fuzz_manifest(&data);
            let dir = tempfile::tempdir().expect("tempdir");
            let root = dir.path().join("root");
            std::fs::create_dir(&root).expect("mkdir");
            fuzz_layer(&data, &root);
            fuzz_image(&data, dir.path());
        }
    }
}
