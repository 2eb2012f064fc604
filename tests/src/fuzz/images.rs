//! Kernels and images that somebody gives us.

use std::fs;
use std::io::Write;

use bulkhead_sandboxer::image::{Silent, Store};

use super::hex;

/// A file given as kernel.
pub fn kernel(data: &[u8]) {
    let Ok(mut file) = tempfile::NamedTempFile::new() else {
        return;
    };
    if file.write_all(data).is_ok() {
        let _ = bulkhead_vmm::boot::try_load(file.path(), 32);
    }
}

/// An ELF file and a bzImage.
pub fn kernel_seeds() -> Vec<Vec<u8>> {
    let mut bzimage = vec![0; 4096];
    bzimage[0x1F1] = 1;
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206] = 0x0F;
    bzimage[0x207] = 2;
    bzimage[0x211] = 1;
    vec![
        bulkhead_fixtures::tiny_guest::elf(bulkhead_fixtures::tiny_guest::Kind::Marker),
        bzimage,
    ]
}

/// A file given as image.
pub fn image(data: &[u8]) {
    let Ok(dir) = tempfile::tempdir() else {
        return;
    };
    let file = dir.path().join("image.tar");
    if fs::write(&file, data).is_err() {
        return;
    }
    if let Ok(store) = Store::open(&dir.path().join("store")) {
        let _ = store.get(&file, &mut Silent);
    }
}

/// A small OCI layout as tar, with one layer.
pub fn image_seeds() -> Vec<Vec<u8>> {
    let layer = tar(&[("file", b"hello"), ("dir/inner", b"x")]);
    let layer_digest = hex(&layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/file"]}},"rootfs":{{"type":"layers","diff_ids":["sha256:{layer_digest}"]}}}}"#
    );
    let config_digest = hex(config.as_bytes());
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{config_digest}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:{layer_digest}","size":{}}}]}}"#,
        config.len(),
        layer.len()
    );
    let manifest_digest = hex(manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{manifest_digest}","size":{}}}]}}"#,
        manifest.len()
    );
    let blob = |digest: &str| format!("blobs/sha256/{digest}");
    vec![
        tar(&[
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
            ("index.json", index.as_bytes()),
            (&blob(&manifest_digest), manifest.as_bytes()),
            (&blob(&config_digest), config.as_bytes()),
            (&blob(&layer_digest), &layer),
        ]),
        tar(&[
            (
                "manifest.json",
                br#"[{"Config":"c.json","RepoTags":["a:b"],"Layers":["l.tar"]}]"#,
            ),
            ("c.json", config.as_bytes()),
            ("l.tar", &layer),
        ]),
    ]
}

/// A ustar archive.
fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content) in files {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[108..115].copy_from_slice(b"0000000");
        header[116..123].copy_from_slice(b"0000000");
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[148..156].fill(b' ');
        header[156] = b'0';
        header[257..263].copy_from_slice(b"ustar\0");
        header[263..265].copy_from_slice(b"00");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}
