//! The bar of an image import, on a terminal only.

use std::io::Write;
use std::time::{Duration, Instant};

use super::signals::Signals;
use crate::image::Progress;

const WIDTH: u64 = 20;
const REDRAW: Duration = Duration::from_millis(50);

/// Draws on standard error.
#[derive(Debug)]
pub struct Bar<'a> {
    signals: &'a Signals,
    enabled: bool,
    title: String,
    total: u64,
    done: u64,
    drawn: Option<Instant>,
}

impl<'a> Bar<'a> {
    /// A bar that ends the import when the user presses Ctrl-C.
    pub fn new(signals: &'a Signals) -> Self {
        let enabled = super::terminal::fancy_stderr();
        Self {
            signals,
            enabled,
            title: String::new(),
            total: 0,
            done: 0,
            drawn: None,
        }
    }

    fn draw(&mut self) {
        if !self.enabled || self.drawn.is_some_and(|t| t.elapsed() < REDRAW) {
            return;
        }
        self.drawn = Some(Instant::now());
        let line = self.line();
        let _ = write!(std::io::stderr(), "\r{line}\x1b[K");
    }

    fn line(&self) -> String {
        let filled = (self.done.min(self.total) * WIDTH)
            .checked_div(self.total)
            .unwrap_or(WIDTH);
        let bar: String = (0..WIDTH)
            .map(|i| if i < filled { '█' } else { '░' })
            .collect();
        format!("{}  {bar} {}", self.title, size(self.done))
    }
}

/// `41.2 MB`.
fn size(bytes: u64) -> String {
    let tenths = bytes / 100_000;
    format!("{}.{} MB", tenths / 10, tenths % 10)
}

impl Progress for Bar<'_> {
    fn start(&mut self, image: &str, bytes: u64, layers: usize) {
        let plural = if layers == 1 { "" } else { "s" };
        self.title = format!("importing {image}  {layers} layer{plural}");
        self.total = bytes;
        self.draw();
    }

    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        self.draw();
    }

    fn finish(&mut self, complete: bool) {
        if !self.enabled {
            return;
        }
        if complete {
            let _ = writeln!(std::io::stderr(), "\r{}\x1b[K", self.line());
        } else {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }

    fn stop(&self) -> bool {
        self.signals.interrupted()
    }
}
