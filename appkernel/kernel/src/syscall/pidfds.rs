//! Files that stand for processes: pidfd_open and its kin.

use alloc::string::String;
use alloc::sync::{Arc, Weak};
use core::any::Any;

use appkernel_core::errno::Errno;

use super::{Call, Result, signals};
use crate::fs::file::{File, Kind, Object, Ready, flag};
use crate::signal::Signal;
use crate::task::{self, Task};

/// A process; its number may be another's once nobody waits for it any more.
pub struct PidFd {
    first: Weak<Task>,
}

impl PidFd {
    /// Its first thread, as long as somebody may wait for it.
    fn task(&self) -> Option<Arc<Task>> {
        self.first.upgrade()
    }

    /// The process' number, while it lives.
    fn living(&self) -> Option<u32> {
        let process = self.task()?.process;
        (task::threads(process) > 0).then_some(process)
    }

    /// The process' number, also when it has ended and its parent has not been told.
    pub fn process(&self) -> Option<u32> {
        self.task().map(|task| task.process)
    }
}

impl Object for PidFd {
    fn ready(&self) -> Ready {
        Ready {
            readable: self.living().is_none(),
            ..Ready::default()
        }
    }

    fn name(&self) -> String {
        String::from("anon_inode:[pidfd]")
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        424 => send(c),
        434 => open(c),
        438 => take_file(c),
        _ => return None,
    })
}

/// A new descriptor for a process, given by its first thread.
///
/// # Errors
/// `EMFILE`, `ENFILE`.
pub fn make(c: &Call<'_>, first: &Arc<Task>, flags: u32) -> Result {
    let object = PidFd {
        first: Arc::downgrade(first),
    };
    let file = Arc::new(File::new(
        Kind::Object(Arc::new(object)),
        2 | flags & flag::NONBLOCK,
    ));
    let fd = c.task.files().lock().insert(file, 0, true)?;
    Ok(fd as u64)
}

/// pidfd_open(2).
fn open(c: &Call<'_>) -> Result {
    let id = c.int(0);
    if c.uint(1) & !flag::NONBLOCK != 0 || id <= 0 {
        return Err(Errno::EINVAL);
    }
    let found = task::find(c.task.container.id(id.unsigned_abs())).ok_or(Errno::ESRCH)?;
    // A thread of a process is none.
    if found.id != found.process {
        return Err(Errno::EINVAL);
    }
    make(c, &found, c.uint(1))
}

fn of(c: &Call<'_>) -> Result<Arc<Task>> {
    let file = c.task.used_file(c.int(0))?;
    let pid = file.object::<PidFd>().ok_or(Errno::EBADF)?;
    pid.task().ok_or(Errno::ESRCH)
}

/// pidfd_send_signal(2).
fn send(c: &Call<'_>) -> Result {
    if c.uint(3) != 0 {
        return Err(Errno::EINVAL);
    }
    let to = of(c)?;
    let number = c.arg(1) & 0xffff_ffff;
    if number != 0 {
        Signal::parse(number)?;
    }
    if task::threads(to.process) == 0 {
        return Err(Errno::ESRCH);
    }
    signals::to_process(c, &to, number, c.arg(2))
}

/// pidfd_getfd(2): who may send signals to a process of the same user may have its files.
fn take_file(c: &Call<'_>) -> Result {
    if c.uint(2) != 0 {
        return Err(Errno::EINVAL);
    }
    let from = of(c)?;
    if !signals::permitted(c, &from) {
        return Err(Errno::EPERM);
    }
    let file = from.file(c.int(1))?;
    let fd = c.task.files().lock().insert(file, 0, true)?;
    Ok(fd as u64)
}
