//! inotify files. What happens is told by path, by whoever does it: changes of the host to a share
//! are not seen.

use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::any::Any;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use appkernel_core::errno::Errno;
use appkernel_core::watch::Watches;
pub use appkernel_core::watch::event;
use appkernel_hal::sync::Mutex;

use super::file::{Object, Ready};
use crate::task;

/// Files of this kind, at most.
const MOST: usize = 128;

/// An inotify file.
pub struct Inotify {
    /// The container whose paths it watches.
    container: u32,
    watches: Mutex<Watches>,
    arrived: AtomicU64,
}

static ALL: Mutex<Vec<Weak<Inotify>>> = Mutex::new(Vec::new());
/// How many there are: nothing is looked at without any.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// A new one for the running task.
///
/// # Errors
/// `EMFILE`: there are too many.
pub fn make() -> Result<Arc<Inotify>, Errno> {
    let mut all = ALL.lock();
    all.retain(|i| i.strong_count() > 0);
    if all.len() >= MOST {
        return Err(Errno::EMFILE);
    }
    let inotify = Arc::new(Inotify {
        container: task::current().container.number,
        watches: Mutex::default(),
        arrived: AtomicU64::new(0),
    });
    all.push(Arc::downgrade(&inotify));
    COUNT.store(all.len(), Ordering::Relaxed);
    Ok(inotify)
}

fn with_watching(f: impl Fn(&mut Watches) -> bool) {
    if COUNT.load(Ordering::Relaxed) == 0 {
        return;
    }
    let container = task::current().container.number;
    let all: Vec<Arc<Inotify>> = ALL.lock().iter().filter_map(Weak::upgrade).collect();
    let mut any = false;
    for inotify in all.iter().filter(|i| i.container == container) {
        if f(&mut inotify.watches.lock()) {
            inotify.arrived.fetch_add(1, Ordering::Relaxed);
            any = true;
        }
    }
    if any {
        task::wake(task::FILES);
    }
}

/// Something happened to a path of the running task's container.
pub fn tell(path: &[u8], event: u32, directory: bool) {
    if !path.is_empty() {
        with_watching(|watches| watches.tell(path, event, directory, 0));
    }
}

/// A name was taken away.
pub fn gone(path: &[u8], directory: bool) {
    with_watching(|watches| watches.gone(path, directory));
}

/// A path has another name.
pub fn moved(from: &[u8], to: &[u8], directory: bool) {
    static COOKIE: AtomicU32 = AtomicU32::new(1);
    if COUNT.load(Ordering::Relaxed) == 0 {
        return;
    }
    let cookie = COOKIE.fetch_add(1, Ordering::Relaxed);
    with_watching(|watches| {
        let left = watches.tell(from, event::MOVED_FROM, directory, cookie);
        let came = watches.tell(to, event::MOVED_TO, directory, cookie);
        let itself = watches.tell(from, event::MOVE_SELF, directory, 0);
        watches.moved(from, to);
        left || came || itself
    });
}

impl Inotify {
    /// Watches a path; gives the number of the watch.
    ///
    /// # Errors
    /// As inotify_add_watch(2).
    pub fn add(&self, path: &[u8], mask: u32) -> Result<i32, Errno> {
        self.watches.lock().add(path, mask)
    }

    /// Watches a path no more.
    ///
    /// # Errors
    /// `EINVAL`: there is no such watch.
    pub fn remove(&self, number: i32) -> Result<(), Errno> {
        self.watches.lock().remove(number)?;
        self.arrived.fetch_add(1, Ordering::Relaxed);
        task::wake(task::FILES);
        Ok(())
    }

    /// Bytes that can be read.
    pub fn waiting(&self) -> usize {
        self.watches.lock().waiting()
    }
}

impl Object for Inotify {
    fn read(&self, to: &mut [u8], wait: bool) -> Result<usize, Errno> {
        let attempt = || self.watches.lock().take(to.len());
        let bytes = if wait {
            task::wait_for(task::FILES, attempt)?
        } else {
            attempt().unwrap_or(Err(Errno::EAGAIN))
        }?;
        for (slot, byte) in to.iter_mut().zip(&bytes) {
            *slot = *byte;
        }
        Ok(bytes.len())
    }

    fn ready(&self) -> Ready {
        Ready {
            readable: self.waiting() > 0,
            ..Ready::default()
        }
    }

    fn progress(&self) -> (u64, u64) {
        (self.arrived.load(Ordering::Relaxed), 0)
    }

    fn name(&self) -> String {
        String::from("anon_inode:inotify")
    }

    fn closed(&self) {
        let mut all = ALL.lock();
        all.retain(|i| !core::ptr::eq(i.as_ptr(), self));
        COUNT.store(all.len(), Ordering::Relaxed);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
