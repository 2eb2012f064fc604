//! Sparse messages: to the kernel's log as PID 1, to standard error elsewhere.

use std::fmt::Arguments;
use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// How serious a message is, with the kernel's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Something failed.
    Error = 3,
    /// Something is odd.
    Warning = 4,
    /// What happens.
    Info = 6,
    /// Details.
    Debug = 7,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Warning as u8);
static KMSG: OnceLock<File> = OnceLock::new();

/// Sets the least serious level that is logged.
pub fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Sends messages to the kernel's log from now on, if there is one.
pub fn use_kmsg() {
    if let Ok(file) = File::options().write(true).open("/dev/kmsg") {
        let _ = KMSG.set(file);
    }
}

/// Logs a message. Never fails: there is nobody to tell.
pub fn log(level: Level, message: Arguments<'_>) {
    if level as u8 > LEVEL.load(Ordering::Relaxed) {
        return;
    }
    // One write: a record of /dev/kmsg is one write, and cannot be longer than about 1 KiB.
    let mut line: String = format!("agent: {message}").replace('\n', "; ");
    let mut end = line.len().min(900);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.truncate(end);
    match KMSG.get() {
        Some(mut file) => {
            let _ = file.write_all(format!("<{}>{line}\n", level as u8).as_bytes());
        }
        None => {
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

/// Logs an error.
#[macro_export]
macro_rules! error {
    ($($arg:tt)*) => { $crate::log::log($crate::log::Level::Error, format_args!($($arg)*)) };
}
/// Logs a warning.
#[macro_export]
macro_rules! warning {
    ($($arg:tt)*) => { $crate::log::log($crate::log::Level::Warning, format_args!($($arg)*)) };
}
/// Logs what happens.
#[macro_export]
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::log($crate::log::Level::Info, format_args!($($arg)*)) };
}
