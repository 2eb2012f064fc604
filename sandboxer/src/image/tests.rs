//! Honest and hostile images.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use super::source::hex_digest;
use super::unpack::{Limits, Unpacker};
use super::*;

type Build<'a> = &'a dyn Fn(&mut tar::Builder<Vec<u8>>);

fn layer(build: Build<'_>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    build(&mut builder);
    builder.into_inner().expect("in memory")
}

/// Appends an entry with the path taken as it is; the tar crate refuses hostile ones otherwise.
fn raw(
    b: &mut tar::Builder<Vec<u8>>,
    path: &str,
    kind: tar::EntryType,
    link: &str,
    content: &[u8],
) {
    let mut h = tar::Header::new_gnu();
    let name = &mut h.as_mut_bytes()[..100];
    name[..path.len()].copy_from_slice(path.as_bytes());
    h.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    h.set_entry_type(kind);
    h.set_mode(0o755);
    h.set_size(content.len() as u64);
    h.set_cksum();
    b.append(&h, content).expect("append");
}

fn file(b: &mut tar::Builder<Vec<u8>>, path: &str, content: &str) {
    raw(b, path, tar::EntryType::Regular, "", content.as_bytes());
}

fn link(b: &mut tar::Builder<Vec<u8>>, path: &str, target: &str) {
    raw(b, path, tar::EntryType::Symlink, target, b"");
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::create_dir(dir.path().join("root")).expect("mkdir");
        fs::create_dir(dir.path().join("outside")).expect("mkdir");
        fs::write(dir.path().join("outside/secret"), "host").expect("write");
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn outside(&self) -> String {
        self.dir.path().join("outside").display().to_string()
    }

    fn apply(&self, layers: &[Vec<u8>]) -> Result<(), ImageError> {
        let limits = Limits {
            bytes: 1 << 20,
            entries: 1000,
        };
        let root = self.root();
        let mut unpacker = Unpacker::new("test", &root, limits, &|| false)?;
        for data in layers {
            unpacker.layer("layer", &data[..])?;
        }
        Ok(())
    }

    /// Whatever happened: nothing outside of the root changed.
    fn unharmed(&self) {
        let names: Vec<_> = fs::read_dir(self.dir.path().join("outside"))
            .expect("list")
            .map(|e| e.expect("entry").file_name())
            .collect();
        assert_eq!(names, ["secret"]);
        let meta = fs::metadata(self.dir.path().join("outside/secret")).expect("stat");
        assert_eq!(meta.nlink(), 1, "a hard link leads out");
        assert_eq!(
            fs::read_to_string(self.dir.path().join("outside/secret")).expect("read"),
            "host"
        );
        assert_eq!(fs::read_dir(self.dir.path()).expect("list").count(), 2);
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path)).expect("file of the image")
    }
}

#[test]
fn dot_dot_is_refused() {
    let bench = Bench::new();
    for path in ["../outside/new", "a/../../outside/new", "..", "a/.."] {
        let error = bench
            .apply(&[layer(&|b| file(b, path, "x"))])
            .expect_err(path);
        assert!(matches!(error, ImageError::Hostile { .. }), "{error}");
    }
    let error = bench
        .apply(&[layer(&|b| {
            raw(b, "h", tar::EntryType::Link, "../outside/secret", b"")
        })])
        .expect_err("hard link");
    assert!(matches!(error, ImageError::Hostile { .. }), "{error}");
    bench.unharmed();
}

#[test]
fn absolute_paths_stay_inside() {
    let bench = Bench::new();
    let target = format!("{}/new", bench.outside());
    let _ = bench.apply(&[layer(&|b| file(b, &target, "x"))]);
    bench.unharmed();
    assert!(bench.root().join(target.trim_start_matches('/')).exists());
}

#[test]
fn symlinked_parents_resolve_inside_the_image() {
    let bench = Bench::new();
    let out = bench.outside();
    // Made by the archive: an absolute link to a host directory, then a file "in" it.
    let _ = bench.apply(&[layer(&|b| {
        link(b, "a", &out);
        file(b, "a/new", "x");
    })]);
    bench.unharmed();
    let _ = bench.apply(&[layer(&|b| {
        link(b, "up", "../../../../../../../..");
        file(b, "up/outside/new", "x");
    })]);
    bench.unharmed();
    // The honest form of the same: merged /usr.
    bench
        .apply(&[
            layer(&|b| {
                raw(b, "usr/bin/", tar::EntryType::Directory, "", b"");
                link(b, "bin", "usr/bin");
            }),
            layer(&|b| file(b, "bin/tool", "tool")),
        ])
        .expect("merged usr");
    assert_eq!(bench.read("usr/bin/tool"), "tool");
    assert!(
        fs::symlink_metadata(bench.root().join("bin"))
            .expect("stat")
            .is_symlink()
    );
}

#[test]
fn a_link_planted_before_the_import_is_not_followed() {
    let bench = Bench::new();
    symlink(bench.outside(), bench.root().join("evil")).expect("symlink");
    let _ = bench.apply(&[layer(&|b| file(b, "evil/new", "x"))]);
    bench.unharmed();
    symlink(
        format!("{}/secret", bench.outside()),
        bench.root().join("target"),
    )
    .expect("symlink");
    bench
        .apply(&[layer(&|b| file(b, "target", "replaced"))])
        .expect("replaces the link");
    bench.unharmed();
    assert_eq!(bench.read("target"), "replaced");
}

#[test]
fn hard_links_cannot_reach_out() {
    let bench = Bench::new();
    let out = format!("{}/secret", bench.outside());
    assert!(
        bench
            .apply(&[layer(&|b| raw(b, "h", tar::EntryType::Link, &out, b""))])
            .is_err()
    );
    let dir = bench.outside();
    assert!(
        bench
            .apply(&[layer(&|b| {
                link(b, "d", &dir);
                raw(b, "h", tar::EntryType::Link, "d/secret", b"");
            })])
            .is_err()
    );
    bench.unharmed();
    bench
        .apply(&[layer(&|b| {
            file(b, "one", "same");
            raw(b, "two", tar::EntryType::Link, "one", b"");
        })])
        .expect("inside");
    assert_eq!(
        fs::metadata(bench.root().join("two"))
            .expect("stat")
            .nlink(),
        2
    );
}

#[test]
fn whiteouts_remove_only_inside_and_only_lower_layers() {
    let bench = Bench::new();
    let out = bench.outside();
    let _ = bench.apply(&[layer(&|b| {
        link(b, "a", &out);
        file(b, "a/.wh.secret", "");
        file(b, "a/.wh..wh..opq", "");
    })]);
    bench.unharmed();
    for name in [".wh.", ".wh..", ".wh..."] {
        assert!(
            bench.apply(&[layer(&|b| file(b, name, ""))]).is_err() || name == ".wh...",
            "{name}"
        );
    }
    bench.unharmed();
    let bench = Bench::new();
    bench
        .apply(&[
            layer(&|b| {
                file(b, "etc/old", "1");
                file(b, "etc/keep", "1");
                file(b, "opt/lower/x", "1");
            }),
            layer(&|b| {
                file(b, "etc/.wh.old", "");
                file(b, "opt/new/y", "2");
                file(b, "opt/.wh..wh..opq", "");
            }),
        ])
        .expect("applied");
    assert!(!bench.root().join("etc/old").exists() && bench.root().join("etc/keep").exists());
    assert!(!bench.root().join("opt/lower").exists());
    assert_eq!(bench.read("opt/new/y"), "2");
}

#[test]
fn directories_and_files_replace_each_other() {
    let bench = Bench::new();
    bench
        .apply(&[
            layer(&|b| {
                file(b, "a/deep/file", "1");
                file(b, "b", "file");
            }),
            layer(&|b| {
                file(b, "a", "now a file");
                file(b, "b/inside", "now a directory");
            })
            .clone(),
        ])
        .expect_err("b is a file: its child has no parent");
    bench.unharmed();
    let bench = Bench::new();
    bench
        .apply(&[
            layer(&|b| file(b, "a/deep/file", "1")),
            layer(&|b| file(b, "a", "now a file")),
        ])
        .expect("applied");
    assert_eq!(bench.read("a"), "now a file");
}

#[test]
fn limits_hold() {
    let bench = Bench::new();
    let big = "x".repeat(700 << 10);
    let error = bench
        .apply(&[layer(&|b| {
            file(b, "a", &big);
            file(b, "b", &big);
        })])
        .expect_err("too many bytes");
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    let error = bench
        .apply(&[layer(&|b| {
            for i in 0..1001 {
                file(b, &format!("f{i}"), "");
            }
        })])
        .expect_err("too many files");
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    let deep = "d/".repeat(49);
    assert!(
        bench
            .apply(&[layer(&|b| file(b, &format!("{deep}f"), ""))])
            .is_ok()
    );
}

#[test]
fn overlay_attributes_are_not_taken_from_an_image() {
    let bench = Bench::new();
    let data = layer(&|b| {
        b.append_pax_extensions([
            ("SCHILY.xattr.trusted.overlay.opaque", &b"y"[..]),
            ("SCHILY.xattr.user.overlay.redirect", &b"/etc"[..]),
            ("SCHILY.xattr.user.note", &b"kept"[..]),
        ])
        .expect("pax");
        file(b, "f", "x");
    });
    bench.apply(&[data]).expect("applied");
    let path =
        std::ffi::CString::new(bench.root().join("f").to_str().expect("utf8")).expect("path");
    let mut names = [0u8; 512];
    // SAFETY: the path is NUL-terminated and the buffer is valid for its length.
    let n = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let text = String::from_utf8_lossy(&names[..usize::try_from(n).unwrap_or(0)]).into_owned();
    assert!(!text.contains("overlay"), "{text}");
}

/// Writes an OCI layout directory and returns its path.
fn oci(dir: &Path, layers: &[Vec<u8>], media: &str, platform: (&str, &str)) -> PathBuf {
    let root = dir.join("layout");
    let blobs = root.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("mkdir");
    let put = |data: &[u8]| {
        let hex = hex_digest(data);
        fs::write(blobs.join(&hex), data).expect("write");
        hex
    };
    let config = format!(
        r#"{{"architecture":"{}","os":"{}","config":{{"Cmd":["/bin/true"],"Env":["A=b"],"Entrypoint":null}}}}"#,
        platform.1, platform.0
    );
    let config_hex = put(config.as_bytes());
    let list: Vec<String> = layers
        .iter()
        .map(|l| {
            format!(
                r#"{{"mediaType":"{media}","digest":"sha256:{}","size":{}}}"#,
                put(l),
                l.len()
            )
        })
        .collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"sha256:{config_hex}","size":{}}},"layers":[{}]}}"#,
        config.len(),
        list.join(",")
    );
    let manifest_hex = put(manifest.as_bytes());
    let nested = format!(
        r#"{{"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{manifest_hex}","size":{},"platform":{{"os":"{}","architecture":"{}"}}}}]}}"#,
        manifest.len(),
        platform.0,
        platform.1
    );
    let nested_hex = put(nested.as_bytes());
    fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write");
    fs::write(
        root.join("index.json"),
        format!(
            r#"{{"manifests":[{{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:{nested_hex}","size":{}}}]}}"#,
            nested.len()
        ),
    )
    .expect("write");
    root
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).expect("in memory");
    encoder.finish().expect("in memory")
}

fn zstd(data: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
}

fn tar_of(dir: &Path, to: &Path) {
    let mut builder = tar::Builder::new(fs::File::create(to).expect("create"));
    builder.append_dir_all(".", dir).expect("append");
    builder.finish().expect("finish");
}

#[test]
fn layouts_in_every_form_import_and_are_cached() {
    let dir = tempfile::tempdir().expect("tempdir");
    let plain = layer(&|b| file(b, "hello", "plain"));
    let layers = [
        plain,
        gzip(&layer(&|b| file(b, "gz", "gzip"))),
        zstd(&layer(&|b| file(b, "zst", "zstd"))),
    ];
    let root = oci(
        dir.path(),
        &layers,
        "application/vnd.oci.image.layer.v1.tar",
        ("linux", "amd64"),
    );
    let as_tar = dir.path().join("image.tar");
    tar_of(&root, &as_tar);
    let compressed = dir.path().join("image.tar.gz");
    fs::write(&compressed, gzip(&fs::read(&as_tar).expect("read"))).expect("write");
    for path in [&root, &as_tar, &compressed] {
        let store_dir = tempfile::tempdir().expect("tempdir");
        let store = Store::open(store_dir.path()).expect("store");
        let image = store.get(path, &mut Silent).expect("import");
        for (name, text) in [("hello", "plain"), ("gz", "gzip"), ("zst", "zstd")] {
            assert_eq!(
                fs::read_to_string(image.rootfs.join(name)).expect("read"),
                text
            );
        }
        assert_eq!(
            image.config.cmd.as_deref(),
            Some(&["/bin/true".to_owned()][..])
        );
        let marker = image.rootfs.join("marker");
        fs::write(&marker, "").expect("write");
        let again = store.get(path, &mut Silent).expect("cached");
        assert!(
            again.rootfs == image.rootfs && marker.exists(),
            "imported twice"
        );
        let left: Vec<_> = fs::read_dir(store_dir.path().join("images"))
            .expect("list")
            .collect();
        assert_eq!(left.len(), 1);
    }
}

#[test]
fn docker_archives_import() {
    let dir = tempfile::tempdir().expect("tempdir");
    let data = layer(&|b| file(b, "f", "docker"));
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"diff_ids":["sha256:{}"]}}}}"#,
        hex_digest(&data)
    );
    let path = dir.path().join("saved.tar");
    let mut builder = tar::Builder::new(Vec::new());
    file(&mut builder, "abc.json", &config);
    raw(
        &mut builder,
        "abc/layer.tar",
        tar::EntryType::Regular,
        "",
        &data,
    );
    file(
        &mut builder,
        "manifest.json",
        r#"[{"Config":"abc.json","RepoTags":["x:1"],"Layers":["abc/layer.tar"]}]"#,
    );
    fs::write(&path, builder.into_inner().expect("in memory")).expect("write");
    let store = Store::open(&dir.path().join("store")).expect("store");
    let image = store.get(&path, &mut Silent).expect("import");
    assert_eq!(
        fs::read_to_string(image.rootfs.join("f")).expect("read"),
        "docker"
    );
}

#[test]
fn damage_and_mistakes_are_named() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store_dir = dir.path().join("store");
    let store = Store::open(&store_dir).expect("store");
    let nothing_left = || {
        assert_eq!(
            fs::read_dir(store_dir.join("images"))
                .expect("list")
                .count(),
            0
        )
    };
    let kind = |path: &Path| {
        let kind = store
            .get(path, &mut Silent)
            .map(|_| ())
            .expect_err("refused")
            .kind();
        nothing_left();
        kind
    };
    assert_eq!(kind(&dir.path().join("absent.tar")), "image_not_found");
    let text = dir.path().join("text");
    fs::write(&text, "not a tar at all".repeat(100)).expect("write");
    assert_eq!(kind(&text), "image_unknown_format");
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).expect("mkdir");
    assert_eq!(kind(&empty), "image_unknown_format");

    let arm = tempfile::tempdir().expect("tempdir");
    let data = layer(&|b| file(b, "f", "x"));
    assert_eq!(
        kind(&oci(
            arm.path(),
            std::slice::from_ref(&data),
            "m",
            ("linux", "arm64")
        )),
        "image_platform"
    );

    let damaged = tempfile::tempdir().expect("tempdir");
    let root = oci(
        damaged.path(),
        std::slice::from_ref(&data),
        "m",
        ("linux", "amd64"),
    );
    let blob = root.join("blobs/sha256").join(hex_digest(&data));
    let mut changed = data.clone();
    changed[512] ^= 1;
    fs::write(&blob, &changed).expect("write");
    assert_eq!(kind(&root), "image_digest");
    fs::write(&blob, &data[..600]).expect("write");
    assert_eq!(kind(&root), "image_corrupt");
    fs::remove_file(&blob).expect("remove");
    assert_eq!(kind(&root), "image_corrupt");

    let bomb = tempfile::tempdir().expect("tempdir");
    let hostile = layer(&|b| file(b, "../../x", "x"));
    assert_eq!(
        kind(&oci(bomb.path(), &[hostile], "m", ("linux", "amd64"))),
        "image_hostile"
    );
    let wasm = tempfile::tempdir().expect("tempdir");
    assert_eq!(
        kind(&oci(
            wasm.path(),
            &[data],
            "application/wasm",
            ("linux", "amd64")
        )),
        "image_corrupt"
    );
}

#[test]
fn an_abandoned_import_is_cleaned_by_the_next() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(&dir.path().join("store")).expect("store");
    let left = dir.path().join("store/images/tmp-deadbeef");
    fs::create_dir_all(left.join("rootfs")).expect("mkdir");
    let root = oci(
        dir.path(),
        &[layer(&|b| file(b, "f", "x"))],
        "m",
        ("linux", "amd64"),
    );
    store.get(&root, &mut Silent).expect("import");
    assert!(!left.exists());
}

#[test]
fn an_interrupted_import_leaves_nothing() {
    struct Impatient;
    impl Progress for Impatient {
        fn start(&mut self, _: &str, _: u64, _: usize) {}
        fn advance(&mut self, _: u64) {}
        fn finish(&mut self, _: bool) {}
        fn stop(&self) -> bool {
            true
        }
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(&dir.path().join("store")).expect("store");
    let data = layer(&|b| {
        for i in 0..200 {
            file(b, &format!("f{i}"), "x");
        }
    });
    let root = oci(dir.path(), &[data], "m", ("linux", "amd64"));
    let error = store.get(&root, &mut Impatient).expect_err("interrupted");
    assert_eq!(error.kind(), "interrupted");
    assert_eq!(
        fs::read_dir(dir.path().join("store/images"))
            .expect("list")
            .count(),
        0
    );
}

#[test]
fn container_roots_are_writable_and_leave_the_image_alone() {
    let dir = tempfile::tempdir().expect("tempdir");
    let lower = dir.path().join("lower");
    fs::create_dir_all(lower.join("etc")).expect("mkdir");
    fs::write(lower.join("etc/f"), "image").expect("write");
    let mountpoint = dir.path().join("m");
    let upper = dir.path().join("up");
    {
        let root = ContainerRoot::create(&lower, &mountpoint, std::slice::from_ref(&upper), false)
            .expect("made");
        fs::write(mountpoint.join("etc/f"), "container").expect("write");
        assert!(["overlay", "copy"].contains(&root.form()));
    }
    assert_eq!(
        fs::read_to_string(lower.join("etc/f")).expect("read"),
        "image"
    );
    assert!(!mountpoint.exists() && !upper.exists());
}
