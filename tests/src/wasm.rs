//! What tests of wasm sandboxes share.

pub mod daemon;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::json;
use sha2::{Digest, Sha256};

/// The interfaces of `wasi:http`, as the source of the library we link has them.
///
/// # Errors
/// The library's source is not where cargo keeps it.
pub fn wit() -> Result<PathBuf> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--offline",
            // Packages of other platforms are not downloaded.
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
            "--manifest-path",
        ])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .output()
        .context("cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let manifest = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "wasmtime-wasi-http")
        .and_then(|package| package["manifest_path"].as_str())
        .context("wasmtime-wasi-http is no dependency")?;
    Ok(Path::new(manifest).with_file_name("wit"))
}

/// Writes an OCI layout whose only layer is a module, as `wasm-to-oci` and `oras` make them.
///
/// # Errors
/// It cannot be written.
pub fn oci_artifact(layout: &Path, media_type: &str, module: &[u8]) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let blob = |data: &[u8]| -> Result<String> {
        let hex: String = Sha256::digest(data)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        fs::write(blobs.join(&hex), data)?;
        Ok(format!("sha256:{hex}"))
    };
    let config = serde_json::to_vec(&json!({
        "created": "1970-01-01T00:00:00Z", "architecture": "wasm", "os": "wasip1",
        "layerDigests": [blob(module)?],
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.wasm.config.v0+json",
            "digest": blob(&config)?, "size": config.len(),
        },
        "layers": [{"mediaType": media_type, "digest": blob(module)?, "size": module.len()}],
    }))?;
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": blob(&manifest)?, "size": manifest.len(),
            "platform": {"architecture": "wasm", "os": "wasip1"},
        }],
    }))?;
    fs::write(layout.join("index.json"), index)?;
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    Ok(())
}

/// An HTTP component as small as they come, in WebAssembly text: answers every request with one
/// line. What it costs is the host's work.
const HELLO: &str = r#"(module
  (import "wasi:http/types@0.2.12" "[constructor]fields" (func $fields (result i32)))
  (import "wasi:http/types@0.2.12" "[constructor]outgoing-response"
    (func $response (param i32) (result i32)))
  (import "wasi:http/types@0.2.12" "[method]outgoing-response.body" (func $body (param i32 i32)))
  (import "wasi:http/types@0.2.12" "[method]outgoing-body.write" (func $write (param i32 i32)))
  (import "wasi:http/types@0.2.12" "[static]outgoing-body.finish"
    (func $finish (param i32 i32 i32 i32)))
  (import "wasi:http/types@0.2.12" "[static]response-outparam.set"
    (func $set (param i32 i32 i32 i32 i64 i32 i32 i32 i32)))
  (import "wasi:http/types@0.2.12" "[resource-drop]incoming-request" (func $drop-request (param i32)))
  (import "wasi:io/streams@0.2.12" "[method]output-stream.blocking-write-and-flush"
    (func $flush (param i32 i32 i32 i32)))
  (import "wasi:io/streams@0.2.12" "[resource-drop]output-stream" (func $drop-stream (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 1024) "hello from a component\n")
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 4096))
  (func (export "wasi:http/incoming-handler@0.2.12#handle") (param $request i32) (param $out i32)
    (local $made i32) (local $its-body i32) (local $stream i32)
    (local.set $made (call $response (call $fields)))
    (call $body (local.get $made) (i32.const 64))
    (local.set $its-body (i32.load (i32.const 68)))
    (call $set (local.get $out) (i32.const 0) (local.get $made) (i32.const 0) (i64.const 0)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))
    (call $write (local.get $its-body) (i32.const 64))
    (local.set $stream (i32.load (i32.const 68)))
    (call $flush (local.get $stream) (i32.const 1024) (i32.const 23) (i32.const 80))
    (call $drop-stream (local.get $stream))
    (call $finish (local.get $its-body) (i32.const 0) (i32.const 0) (i32.const 128))
    (call $drop-request (local.get $request))))"#;

/// What [`http_component`] answers.
pub const HELLO_BODY: &str = "hello from a component\n";

/// A small HTTP component (`wasi:http/proxy` 0.2.12).
///
/// # Errors
/// The interfaces in `wit` are not those it was written for.
pub fn http_component(wit: &Path) -> Result<Vec<u8>> {
    let mut module = wat::parse_str(HELLO)?;
    let mut resolve = wit_parser::Resolve::default();
    let (package, _) = resolve.push_dir(wit)?;
    let world = resolve.select_world(&[package], Some("wasi:http/proxy@0.2.12"))?;
    wit_component::embed_component_metadata(
        &mut module,
        &resolve,
        world,
        wit_component::StringEncoding::UTF8,
    )?;
    wit_component::ComponentEncoder::default()
        .module(&module)?
        .validate(true)
        .encode()
}
