//! The JSON documents inside an image, read tolerantly: unknown fields are ignored, `null` means
//! absent, as exporters differ.

use serde::{Deserialize, Serialize};

/// OCI index or Docker manifest list.
#[derive(Debug, Deserialize)]
pub struct Index {
    /// The manifests (or nested indexes).
    #[serde(default)]
    pub manifests: Vec<Descriptor>,
}

/// Points to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    #[serde(default)]
    pub media_type: String,
    /// `sha256:<hex>`.
    pub digest: String,
    /// Length in bytes.
    pub size: u64,
    /// For which machine, in an index.
    #[serde(default)]
    pub platform: Option<Platform>,
}

/// A machine and operating system.
#[derive(Debug, Clone, Deserialize)]
pub struct Platform {
    /// `amd64`, `arm64`, …
    #[serde(default)]
    pub architecture: String,
    /// `linux`, …
    #[serde(default)]
    pub os: String,
}

/// OCI or Docker schema 2 image manifest.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    /// The configuration blob.
    pub config: Descriptor,
    /// Layers, lowest first.
    #[serde(default)]
    pub layers: Vec<Descriptor>,
}

/// One image in a docker-archive's `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DockerEntry {
    /// Path of the configuration in the archive.
    pub config: String,
    /// Paths of the layers, lowest first.
    #[serde(default)]
    pub layers: Vec<String>,
}

/// The image's configuration blob.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct ImageFile {
    /// Machine the image is for.
    #[serde(default)]
    pub architecture: String,
    /// Operating system the image is for.
    #[serde(default)]
    pub os: String,
    /// How to run it.
    #[serde(default)]
    pub config: Option<ImageConfig>,
    /// Digests of the uncompressed layers.
    #[serde(default)]
    pub rootfs: Option<RootFs>,
}

/// Digests of the uncompressed layers.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RootFs {
    /// `sha256:<hex>`, lowest first.
    #[serde(default)]
    pub diff_ids: Vec<String>,
}

/// How an image wants to be run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ImageConfig {
    /// `user[:group]`, names or numbers.
    #[serde(default)]
    pub user: Option<String>,
    /// `KEY=value`.
    #[serde(default)]
    pub env: Option<Vec<String>>,
    /// Fixed part of the command.
    #[serde(default)]
    pub entrypoint: Option<Vec<String>>,
    /// Default arguments, or the command if there is no entrypoint.
    #[serde(default)]
    pub cmd: Option<Vec<String>>,
    /// Working directory.
    #[serde(default)]
    pub working_dir: Option<String>,
    /// Signal that asks the program to end.
    #[serde(default)]
    pub stop_signal: Option<String>,
}
