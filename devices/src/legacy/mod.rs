//! The few non-virtio devices a Linux guest needs.

pub mod i8042;
pub mod rtc;
pub mod serial;
pub mod sleep;

pub use i8042::I8042;
pub use rtc::Rtc;
pub use serial::{FdSink, Serial};
pub use sleep::Sleep;
