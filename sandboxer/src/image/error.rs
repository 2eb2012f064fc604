//! Why an image cannot be used.

use std::path::PathBuf;

/// Every failure names the image or the entry in it, what is wrong and, where there is one, the
/// remedy.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Nothing exists at the path.
    #[error("image {}: no such file or directory{hint}", path.display())]
    NotFound {
        /// The path as given.
        path: PathBuf,
        /// Empty, or ` (did you mean …?)`.
        hint: String,
    },
    /// The path holds something else than an image.
    #[error("image {}: {reason}; give an OCI layout (directory or tar), a docker-archive tar or a root filesystem directory", path.display())]
    NotAnImage {
        /// The path as given.
        path: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// The image is not for this machine.
    #[error(
        "image {image}: has no linux/amd64 variant, only {found}; export it with --platform linux/amd64"
    )]
    NoPlatform {
        /// Image name.
        image: String,
        /// Platforms in the image.
        found: String,
    },
    /// A blob's content is not what its digest says.
    #[error(
        "image {image}: {blob} is damaged: expected {expected}, content has {actual}; export or copy the image again"
    )]
    BadDigest {
        /// Image name.
        image: String,
        /// Which blob.
        blob: String,
        /// Digest written in the image.
        expected: String,
        /// Digest of the content.
        actual: String,
    },
    /// The image contradicts itself or its format.
    #[error("image {image}: {what}: {reason}")]
    Corrupt {
        /// Image name.
        image: String,
        /// Which part.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A layer entry tries to leave the root filesystem or is otherwise hostile.
    #[error("image {image}: {layer}: entry {entry:?} refused: {reason}")]
    Hostile {
        /// Image name.
        image: String,
        /// Which layer.
        layer: String,
        /// Entry path as in the archive, shortened.
        entry: String,
        /// Why it is refused.
        reason: String,
    },
    /// A limit that keeps a hostile image from filling the host was reached.
    #[error(
        "image {image}: {what} exceeds the limit of {limit}; raise it with BULKHEAD_IMAGE_MAX_BYTES if the image is trusted"
    )]
    TooLarge {
        /// Image name.
        image: String,
        /// What is too large.
        what: String,
        /// The limit with its unit.
        limit: String,
    },
    /// The host refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on which object.
        what: String,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// The user interrupted the import.
    #[error("image {image}: import interrupted")]
    Interrupted {
        /// Image name.
        image: String,
    },
}

impl ImageError {
    /// A word for programs, stable across versions.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "image_not_found",
            Self::NotAnImage { .. } => "image_unknown_format",
            Self::NoPlatform { .. } => "image_platform",
            Self::BadDigest { .. } => "image_digest",
            Self::Corrupt { .. } => "image_corrupt",
            Self::Hostile { .. } => "image_hostile",
            Self::TooLarge { .. } => "image_too_large",
            Self::Io { .. } => "image_io",
            Self::Interrupted { .. } => "interrupted",
        }
    }

    pub(crate) fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source,
        }
    }
}
