//! Warnings of the VMM and the devices, on stderr as `vmmctl` says everything else.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Stderr;

static STDERR: Stderr = Stderr;

/// Whether stderr is a terminal. Asked once, at the start: threads of a VM, which warn too, may not
/// make the system call that tells.
static TERMINAL: AtomicBool = AtomicBool::new(false);

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let what = match record.level() {
            Level::Error | Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug | Level::Trace => "debug",
        };
        // The guest's terminal may be in raw mode: a bare line feed would leave stairs there.
        let end = if TERMINAL.load(Ordering::Relaxed) {
            "\r\n"
        } else {
            "\n"
        };
        // Not eprint!, which panics when stderr is closed.
        let _ = write!(io::stderr(), "vmmctl: {what}: {}{end}", record.args());
    }

    fn flush(&self) {}
}

/// Shows warnings, and more with each `-v`.
pub(super) fn init(verbose: u8) {
    TERMINAL.store(io::stderr().is_terminal(), Ordering::Relaxed);
    if log::set_logger(&STDERR).is_ok() {
        log::set_max_level(match verbose {
            0 => LevelFilter::Warn,
            1 => LevelFilter::Info,
            _ => LevelFilter::Debug,
        });
    }
}
