//! The host side of Bulkhead: images, engines and `vmmctl`.

pub mod fsutil;
pub mod hint;
pub mod image;
