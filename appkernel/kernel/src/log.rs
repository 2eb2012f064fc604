//! The log: lines on the serial port.

use core::fmt::{Arguments, Write};

use appkernel_hal::clock;
use appkernel_hal::serial::Serial;

/// Writes a line with the time since the start.
pub fn line(text: Arguments<'_>) {
    let us = clock::monotonic_ns() / 1000;
    // The port takes everything.
    let _ = writeln!(
        Serial,
        "[{:5}.{:06}] {text}",
        us / 1_000_000,
        us % 1_000_000
    );
}

/// Writes a line to the log.
#[macro_export]
macro_rules! log {
    ($($arg:tt)*) => { $crate::log::line(format_args!($($arg)*)) };
}
