//! What tests of wasm sandboxes share.

pub mod daemon;

pub use bulkhead_fixtures::component::{HELLO_BODY, http_component, wit};

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Media types of the OCI.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// What artifacts have in its place.
pub const WASM_CONFIG: &str = "application/vnd.wasm.config.v0+json";

/// An image that is none of Linux.
#[derive(Debug)]
pub struct OciImage<'a> {
    /// Media type of its configuration.
    pub config_type: &'a str,
    /// Its configuration.
    pub config: serde_json::Value,
    /// Media types and contents of its layers.
    pub layers: &'a [(&'a str, &'a [u8])],
    /// Its manifest is in an index that names the platform.
    pub index: bool,
}

impl OciImage<'_> {
    /// Writes it as an OCI layout.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, layout: &Path) -> Result<()> {
        const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
        const INDEX: &str = "application/vnd.oci.image.index.v1+json";
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        let blob = |kind: &str, data: &[u8]| -> Result<serde_json::Value> {
            let hex = digest(data);
            fs::write(blobs.join(&hex), data)?;
            Ok(json!({"mediaType": kind, "digest": format!("sha256:{hex}"), "size": data.len()}))
        };
        let layers = self.layers.iter();
        let layers: Vec<_> = layers
            .map(|(kind, data)| blob(kind, data))
            .collect::<Result<_>>()?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": blob(self.config_type, &serde_json::to_vec(&self.config)?)?,
            "layers": layers,
        });
        let mut top = blob(MANIFEST, &serde_json::to_vec(&manifest)?)?;
        let platform = json!({
            "os": self.config["os"], "architecture": self.config["architecture"],
        });
        top["platform"] = platform;
        if self.index {
            let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [top]});
            top = blob(INDEX, &serde_json::to_vec(&index)?)?;
        }
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [top]});
        fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
        fs::write(
            layout.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )?;
        Ok(())
    }
}

/// SHA-256 in hexadecimal digits.
pub fn digest(data: &[u8]) -> String {
    let bytes = Sha256::digest(data);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes an OCI layout whose only layer is a module, as `wasm-to-oci` and `oras` make them.
///
/// # Errors
/// It cannot be written.
pub fn oci_artifact(layout: &Path, media_type: &str, module: &[u8]) -> Result<()> {
    let image = OciImage {
        config_type: WASM_CONFIG,
        config: json!({
            "created": "1970-01-01T00:00:00Z", "architecture": "wasm", "os": "wasip1",
            "layerDigests": [format!("sha256:{}", digest(module))],
        }),
        layers: &[(media_type, module)],
        index: false,
    };
    image.write(layout)
}
