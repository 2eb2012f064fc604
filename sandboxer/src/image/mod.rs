//! OCI images: reading, verifying, unpacking, caching, and a writable root for each container.

mod error;
pub mod fuzz;
mod layer;
mod manifest;
mod source;
mod store;
pub mod tarball;
#[cfg(test)]
mod tests;
mod unpack;
mod wasm;

pub use error::ImageError;
pub use layer::ContainerRoot;
pub use manifest::ImageConfig;
pub use source::{display_name, hex_digest};
pub use store::{Image, Progress, Silent, Store};
pub(crate) use wasm::is_module;
pub use wasm::{WasmImage, open_in_image};
