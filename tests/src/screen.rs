//! A guest's console that tests can wait on.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex};

use bulkhead_vmm::Console;

use crate::env::PATIENCE;

/// A console that tests can wait on.
#[derive(Clone, Debug, Default)]
pub struct Screen(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Write for Screen {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.0.lock().unwrap().extend_from_slice(data);
        self.0.1.notify_all();
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Screen {
    /// The VM's console.
    pub fn console(&self) -> Console {
        Console::Writer(Box::new(self.clone()))
    }

    /// What was written so far.
    ///
    /// # Panics
    /// When a writer panicked.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap()).into_owned()
    }

    /// Waits until `sign` is on the screen.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_for(&self, sign: &str) {
        let shown = |text: &[u8]| text.windows(sign.len()).any(|w| w == sign.as_bytes());
        let (text, timeout) = self
            .0
            .1
            .wait_timeout_while(self.0.0.lock().unwrap(), PATIENCE, |text| !shown(text))
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "no {sign:?} on the console within {PATIENCE:?}:\n{}",
            String::from_utf8_lossy(&text)
        );
    }
}
