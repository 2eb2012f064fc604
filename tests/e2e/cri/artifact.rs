//! Images that are no Linux ones, by a pull from a registry: OCI artifacts whose layer is the module,
//! and root filesystems for the platform `wasi/wasm`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::containerd::{Node, WASM};
use bulkhead_tests::cri::proto::*;
use bulkhead_tests::cri::registry::Registry;
use bulkhead_tests::cri::{TestPod, container, log, pod};
use bulkhead_tests::env::PATIENCE;
use bulkhead_tests::wasm::{OCI_CONFIG, OciImage, WASM_CONFIG, digest};
use serde_json::{Value, json};

use super::Test;

pub const TESTS: &[Test] = &[("wasm_images", false, images)];

/// Prints a line and ends with 7; `other` ends with 9.
const SEVEN: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write"
    (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "seven\n")
  (func (export "other") (call $exit (i32.const 9)))
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 6))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))
    (call $exit (i32.const 7))))"#;

/// Media types of layers that are modules.
const MODULE: &str = "application/wasm";
const COMPONENT: &str = "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm";
const CONTENT: &str = "application/vnd.wasm.content.layer.v1+wasm";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// Configuration as of runwasi's images, with layers that have these digests when unpacked.
fn config(entrypoint: &[&str], layers: &[String]) -> Value {
    json!({
        "created": "1970-01-01T00:00:00Z", "architecture": "wasm", "os": "wasi",
        "config": {"Entrypoint": entrypoint},
        "rootfs": {"type": "layers", "diff_ids": layers},
    })
}

/// A layer with the module as `/app/seven`, a name that does not say what it is.
fn layer(dir: &Path, module: &[u8]) -> Result<Vec<u8>> {
    fs::create_dir_all(dir.join("root/app"))?;
    fs::write(dir.join("root/app/seven"), module)?;
    let output = Command::new("tar")
        .args(["--numeric-owner", "-C"])
        .arg(dir.join("root"))
        .args(["-c", "app"])
        .output()?;
    ensure!(output.status.success(), "tar failed");
    Ok(output.stdout)
}

fn images(node: &mut Node, _: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let seven = wat::parse_str(SEVEN)?;
    let tar = layer(dir.path(), &seven)?;
    let tar_id = [format!("sha256:{}", digest(&tar))];
    let bare = json!({"created": "1970-01-01T00:00:00Z", "architecture": "wasm", "os": "wasip1"});
    let layouts = dir.path().join("layouts");
    for (name, config_type, config, layers, index) in [
        // As runwasi's tools make them: the entrypoint is a name, the files are the layers.
        (
            "runwasi",
            OCI_CONFIG,
            config(&["seven.wasm"], &[]),
            (COMPONENT, &seven),
            false,
        ),
        (
            "function",
            OCI_CONFIG,
            config(&["app#other"], &[]),
            (CONTENT, &seven),
            false,
        ),
        // As the CNCF's guidance has it: no entrypoint.
        ("artifact", WASM_CONFIG, bare, (MODULE, &seven), false),
        (
            "classic",
            OCI_CONFIG,
            config(&["/app/seven"], &tar_id),
            (TAR, &tar),
            false,
        ),
        (
            "index",
            OCI_CONFIG,
            config(&["/app/seven"], &tar_id),
            (TAR, &tar),
            true,
        ),
        (
            "empty",
            OCI_CONFIG,
            config(&["seven.wasm"], &[]),
            ("text/plain", &seven),
            false,
        ),
    ] {
        let image = OciImage {
            config_type,
            config,
            layers: &[(layers.0, layers.1.as_slice())],
            index,
        };
        image.write(&layouts.join(name))?;
    }
    let registry = Registry::serve(&layouts)?;
    node.allow_plain_http(registry.address())?;
    let pod = TestPod::run(node, WASM, pod("images"))?;
    let create = |name: &str, command: &[&str]| -> Result<(String, ContainerConfig)> {
        let image = registry.image(name);
        pod.cri
            .pull(&image)
            .with_context(|| format!("pull of {name}"))?;
        let mut spec = container(name, "", command);
        spec.image = Some(ImageSpec { image });
        let c = pod.cri.create(&pod.id, &pod.config, &spec)?;
        Ok((c, spec))
    };
    for (name, command, code, words) in [
        ("runwasi", &[][..], 7, "seven\n"),
        ("function", &[], 9, ""),
        ("artifact", &["seven.wasm"], 7, "seven\n"),
        ("classic", &[], 7, "seven\n"),
    ] {
        let (c, spec) = create(name, command)?;
        pod.cri.start(&c).with_context(|| name.to_owned())?;
        let status = pod.cri.wait_exit(&c, PATIENCE)?;
        let (out, err) = log(&pod.config, &spec)?;
        ensure!(
            (status.exit_code, out.as_str()) == (code, words),
            "{name}: {status:?} {out}{err}"
        );
        pod.cri.remove(&c)?;
    }
    // What does not go, and what containerd or we say about it; quoted in docs/wasm.md.
    let refused = |name: &str, words: &str| {
        let made = create(name, &[]).and_then(|(c, _)| {
            let started = pod.cri.start(&c);
            pod.cri.remove(&c)?;
            started
        });
        let error = made.err().map(|e| format!("{e:#}")).unwrap_or_default();
        println!("{name}: {error}");
        ensure!(error.contains(words), "{name}: {error}");
        Ok(())
    };
    refused("artifact", "no command specified")?;
    refused("index", "no match for platform in manifest")?;
    refused("empty", "seven.wasm: No such file")?;
    pod.remove()
}
