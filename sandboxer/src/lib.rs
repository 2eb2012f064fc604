//! The host side of Bulkhead: images, engines and `vmmctl`.

pub mod daemon;
pub mod debug;
pub mod engine;
pub mod fsutil;
pub mod hint;
pub mod image;
pub mod rundir;
pub mod spec;
pub mod timeouts;
pub mod units;
pub mod vmmctl;
