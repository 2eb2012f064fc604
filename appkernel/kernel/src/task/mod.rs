//! Processes and threads, and who runs.
//!
//! The kernel is not interrupted for another task: a task gives up the CPU where it sleeps, and at
//! the end of a time slice while its program runs. Lock order: memory, open files, then what is
//! below them (nodes, pipes), then `SCHEDULER`; under it only a task's `links` and a container's `share`.

mod credentials;
mod end;
pub mod limits;
mod ready;
mod schedule;
mod scheduling;

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_hal::context::Context;
use appkernel_hal::sync::Mutex;
use appkernel_hal::trap::Frame;
use appkernel_hal::{clock, cpu};

use crate::container::Container;
use crate::exec::Image;
use crate::fs::file::{File, Files};
use crate::mm::Mm;
use crate::signal::{Handlers, Pending};

pub use credentials::{Credentials, may};
pub use end::*;
pub use limits::Limits;
pub use schedule::*;
pub use scheduling::{Asked, Scheduling, policy};

/// Most tasks at once: what a fork bomb gets before `EAGAIN`.
const MAX_TASKS: usize = 4096;

/// What a task waits for: any number that both sides know; the address of what is waited for, or
/// one of these.
pub type Channel = usize;
/// A child changes its state; plus its parent's number.
pub const CHILD: Channel = 0x1_0000_0000;
/// Time passes.
pub const TIME: Channel = 0x2_0000_0000;
/// Any file becomes readable or writable.
pub const FILES: Channel = 0x3_0000_0000;
/// Something happens that the agent has to look at.
pub const AGENT: Channel = 0x4_0000_0000;
/// Packets come or are to go.
pub const NETWORK: Channel = 0x5_0000_0000;
/// Semaphores, messages and their like change.
pub const OBJECTS: Channel = 0x6_0000_0000;
/// A thread of a process ends; plus the process' number.
pub const ENDS: Channel = 0x7_0000_0000;
/// Of tasks that wait for nothing: not started yet, or ended.
const NEVER: Channel = usize::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    Sleeping(Channel),
    /// By a signal; goes on by another.
    Stopped,
    Zombie(i32),
}

/// What can change of a task, other than by the task itself.
#[derive(Debug, Default)]
pub struct Links {
    /// Parent process.
    pub parent: u32,
    /// Process group.
    pub group: u32,
    /// Session.
    pub session: u32,
    /// Signal that stopped the process, until its parent was told; and whether it goes on again.
    pub stopped: Option<u8>,
    pub is_stopped: bool,
    pub continued: bool,
    /// What it used and what those it waited for used.
    pub used: Used,
    pub children: Used,
    /// What the process registered for by membarrier.
    pub barriers: u32,
    /// Orphans among its descendants become its children (PR_SET_CHILD_SUBREAPER).
    pub reaps: bool,
    /// It runs another program since it was made: its parent no longer chooses its group.
    pub executed: bool,
}

/// What processes used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// Nanoseconds of the CPU, of threads that ended.
    pub cpu_ns: u64,
    /// Most pages of memory, as far as they were counted.
    pub pages: u64,
}

impl Used {
    /// With what another one used.
    pub fn add(&mut self, other: Self) {
        self.cpu_ns = self.cpu_ns.saturating_add(other.cpu_ns);
        self.pages = self.pages.max(other.pages);
    }
}

/// Where a process is in the tree of files.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Current directory, canonical.
    pub cwd: Vec<u8>,
    /// Where its paths start (chroot); empty for the container's root.
    pub root: Vec<u8>,
    /// Mode bits that new files do not get.
    pub umask: u32,
    /// The program.
    pub exe: Vec<u8>,
    /// How gladly it is ended when there is no memory: -1000 (not) to 1000.
    pub oom_score_adj: i32,
}

/// A thread; a process is the threads of the same `process`.
pub struct Task {
    /// Its number.
    pub id: u32,
    /// Its process' number: that of its first thread.
    pub process: u32,
    /// Where it lives.
    pub container: Arc<Container>,
    /// Who it is.
    pub credentials: Mutex<Credentials>,
    /// Its name, as /proc shows it.
    pub name: Mutex<Vec<u8>>,
    /// Nanoseconds it had the CPU.
    pub cpu_ns: AtomicU64,
    /// When it was made, since the machine's start.
    pub started_ns: u64,
    context: UnsafeCell<Context>,
    /// Physical address of its page table.
    root: AtomicU64,
    mm: Mutex<Option<Arc<Mutex<Mm>>>>,
    /// Open files.
    pub files: Mutex<Arc<Mutex<Files>>>,
    /// Directory and mask.
    pub place: Arc<Mutex<Place>>,
    /// Parent and groups, of the process.
    pub links: Arc<Mutex<Links>>,
    /// What the process may have of things.
    pub limits: Arc<Mutex<Limits>>,
    /// Signals that wait, and the mask.
    pub pending: Mutex<Pending>,
    /// What signals do.
    pub handlers: Mutex<Arc<Mutex<Handlers>>>,
    /// Cleared, and waited for, when the thread ends.
    pub clear_tid: AtomicU64,
    /// Where the list of locks is that others get if the thread ends with them (set_robust_list(2)).
    pub robust_list: AtomicU64,
    /// A parent sleeps until this task has its own memory (vfork).
    pub vfork: Mutex<bool>,
    /// What it asked for by prctl.
    pub asked: Mutex<Asked>,
    /// How it wants to be scheduled.
    pub scheduling: Mutex<Scheduling>,
}

// SAFETY: the context is touched by the scheduler only, with interrupts off on the only CPU, and by
// the task itself.
unsafe impl Sync for Task {}

struct Scheduler {
    tasks: BTreeMap<u32, (Arc<Task>, State)>,
    ready: ready::Ready,
    current: u32,
    /// The task of that number.
    running: Arc<Task>,
    /// Threads that ended; their stacks are freed by whoever runs next.
    dead: Vec<u32>,
}

static SCHEDULER: Mutex<Option<Scheduler>> = Mutex::new(None);

fn with<T>(f: impl FnOnce(&mut Scheduler) -> T) -> T {
    match SCHEDULER.lock().as_mut() {
        Some(scheduler) => f(scheduler),
        None => panic!("a task is needed before there is one"),
    }
}

/// How a new task differs from the one that makes it.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneOptions {
    /// Same memory.
    pub share_memory: bool,
    /// Same open files.
    pub share_files: bool,
    /// Same handlers.
    pub share_handlers: bool,
    /// A thread of the same process.
    pub thread: bool,
    /// Its parent is the caller's, not the caller.
    pub sibling: bool,
    /// Stack pointer; 0 for the same.
    pub stack: u64,
    /// Base of FS.
    pub tls: Option<u64>,
    /// Where the new task's number is cleared at its end.
    pub clear_tid: u64,
    /// The parent waits until the child has its own memory.
    pub vfork: bool,
}

/// A thread of the kernel, which is no process.
fn kernel_task(
    container: &Arc<Container>,
    id: u32,
    name: &[u8],
    entry: extern "C" fn() -> !,
) -> Option<Arc<Task>> {
    let context = Context::kernel_thread(entry)?;
    Some(Arc::new(Task {
        id,
        process: id,
        container: Arc::clone(container),
        credentials: Mutex::default(),
        name: Mutex::new(name.to_vec()),
        cpu_ns: AtomicU64::new(0),
        started_ns: 0,
        context: UnsafeCell::new(context),
        root: AtomicU64::new(appkernel_hal::boot::kernel_pml4()),
        mm: Mutex::new(None),
        files: Mutex::default(),
        place: Arc::new(Mutex::new(Place::default())),
        links: Arc::new(Mutex::new(Links::default())),
        limits: Arc::default(),
        pending: Mutex::new(Pending::default()),
        handlers: Mutex::default(),
        clear_tid: AtomicU64::new(0),
        robust_list: AtomicU64::new(0),
        vfork: Mutex::new(false),
        asked: Mutex::default(),
        scheduling: Mutex::default(),
    }))
}

/// Starts the scheduler with a thread of the kernel, which runs until it sleeps.
pub fn init(container: &Arc<Container>, entry: extern "C" fn() -> !) -> Option<Arc<Task>> {
    let task = kernel_task(container, 0, b"kernel", entry)?;
    let mut tasks = BTreeMap::new();
    tasks.insert(0, (Arc::clone(&task), State::Ready));
    *SCHEDULER.lock() = Some(Scheduler {
        tasks,
        ready: ready::Ready::default(),
        current: 0,
        running: Arc::clone(&task),
        dead: Vec::new(),
    });
    Some(task)
}

/// Starts one more thread of the kernel; `None` if there is no memory for it.
pub fn kernel_thread(name: &[u8], entry: extern "C" fn() -> !) -> Option<()> {
    let container = find_any(0)?.container.clone();
    let id = with(|s| container.new_id(|id| s.tasks.contains_key(&id)));
    let task = kernel_task(&container, id, name, entry)?;
    with(|s| {
        s.ready.push_back(id, &task.container);
        s.tasks.insert(id, (task, State::Ready));
    });
    Some(())
}

/// A process that the kernel starts.
pub struct New<'a> {
    pub container: &'a Arc<Container>,
    pub image: Image,
    pub files: Files,
    pub credentials: Credentials,
    pub cwd: Vec<u8>,
    pub umask: u32,
    pub limits: Limits,
    /// What it runs never gets more rights.
    pub no_new_privileges: bool,
}

/// Last part of a path, as the name of a task.
fn name_of(path: &[u8]) -> Vec<u8> {
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    name.iter().copied().take(15).collect()
}

impl Task {
    /// A process without a parent, that waits to be started.
    pub fn make(mut new: New<'_>) -> Result<Arc<Self>, Errno> {
        new.image.set_credentials(&mut new.credentials);
        let asked = Asked {
            no_new_privileges: new.no_new_privileges,
            ..Asked::default()
        };
        let context = Context::new(new.image.frame()).ok_or(Errno::ENOMEM)?;
        let root = new.image.mm.root();
        let id = with(|s| new.container.new_id(|id| s.tasks.contains_key(&id)));
        let task = Arc::new(Self {
            id,
            process: id,
            container: Arc::clone(new.container),
            credentials: Mutex::new(new.credentials),
            name: Mutex::new(name_of(&new.image.called)),
            cpu_ns: AtomicU64::new(0),
            started_ns: clock::monotonic_ns(),
            context: UnsafeCell::new(context),
            root: AtomicU64::new(root),
            mm: Mutex::new(Some(Arc::new(Mutex::new(new.image.mm)))),
            files: Mutex::new(Arc::new(Mutex::new(new.files))),
            place: Arc::new(Mutex::new(Place {
                cwd: new.cwd,
                root: Vec::new(),
                umask: new.umask,
                exe: new.image.path,
                oom_score_adj: 0,
            })),
            links: Arc::new(Mutex::new(Links {
                group: id,
                session: id,
                ..Links::default()
            })),
            limits: Arc::new(Mutex::new(new.limits)),
            pending: Mutex::new(Pending::default()),
            handlers: Mutex::default(),
            clear_tid: AtomicU64::new(0),
            robust_list: AtomicU64::new(0),
            vfork: Mutex::new(false),
            asked: Mutex::new(asked),
            scheduling: Mutex::default(),
        });
        with(|s| {
            s.tasks
                .insert(id, (Arc::clone(&task), State::Sleeping(NEVER)));
        });
        Ok(task)
    }

    /// Its memory.
    pub fn mm(&self) -> Arc<Mutex<Mm>> {
        match &*self.mm.lock() {
            Some(mm) => Arc::clone(mm),
            None => panic!("task {} ended and has no memory any more", self.id),
        }
    }

    /// Its memory, if it has not ended.
    pub fn memory(&self) -> Option<Arc<Mutex<Mm>>> {
        self.mm.lock().clone()
    }

    /// Its open files.
    pub fn files(&self) -> Arc<Mutex<Files>> {
        Arc::clone(&self.files.lock())
    }

    /// Its handlers.
    pub fn handlers(&self) -> Arc<Mutex<Handlers>> {
        Arc::clone(&self.handlers.lock())
    }

    /// An open file of it.
    pub fn file(&self, fd: i32) -> Result<Arc<File>, Errno> {
        self.files().lock().get(fd)
    }

    /// An open file of it that is more than a name (`O_PATH`).
    pub fn used_file(&self, fd: i32) -> Result<Arc<File>, Errno> {
        let file = self.file(fd)?;
        if file.flags() & crate::fs::file::flag::PATH != 0 {
            return Err(Errno::EBADF);
        }
        Ok(file)
    }

    /// The context of the running task.
    #[expect(
        clippy::mut_from_ref,
        reason = "one CPU; only the running task asks, for itself"
    )]
    pub fn own_context(&self) -> &mut Context {
        // SAFETY: see the implementation of Sync.
        unsafe { &mut *self.context.get() }
    }

    /// Registers of its program.
    pub fn frame(&self) -> Frame {
        // SAFETY: the frame lies at the top of the kernel stack while the task is in the kernel.
        unsafe { *self.own_context().frame() }
    }

    /// Whether the container and the user may have one more task.
    fn may_clone(&self) -> Result<(), Errno> {
        let most = self.container.pids_max.load(Ordering::Relaxed);
        let own = self.limits.lock().soft(limits::PROCESSES);
        let (uid, root) = {
            let credentials = self.credentials.lock();
            (credentials.uid, credentials.is_root())
        };
        if most == u64::MAX && (own == u64::MAX || root) {
            return Ok(());
        }
        let tasks = tasks_of(&self.container);
        let of_user = || {
            tasks
                .iter()
                .filter(|t| t.credentials.lock().uid == uid)
                .count() as u64
        };
        if tasks.len() as u64 >= most || !root && of_user() >= own {
            return Err(Errno::EAGAIN);
        }
        Ok(())
    }

    /// Makes a task like this one, which goes on at `frame`; returns its number.
    pub fn clone(&self, options: &CloneOptions) -> Result<u32, Errno> {
        // Who has to end makes nothing new: what ends all that are there ends them for good.
        if self.pending.lock().ending.is_some() {
            return Err(Errno::EINTR);
        }
        let count = with(|s| s.tasks.len());
        if count >= MAX_TASKS {
            return Err(Errno::EAGAIN);
        }
        self.may_clone()?;
        let mut frame = self.frame();
        frame.rax = 0;
        if options.stack != 0 {
            frame.rsp = options.stack;
        }
        let mut context = Context::new(frame).ok_or(Errno::ENOMEM)?;
        let own = self.own_context();
        own.save_vectors();
        context.copy_vectors(own);
        context.fs_base = options.tls.unwrap_or(own.fs_base);
        context.gs_base = own.gs_base;
        let mm = if options.share_memory {
            self.mm()
        } else {
            Arc::new(Mutex::new(self.mm().lock().fork()?))
        };
        let files = if options.share_files {
            self.files()
        } else {
            let copy = self.files().lock().duplicate()?;
            Arc::new(Mutex::new(copy))
        };
        let handlers = if options.share_handlers {
            self.handlers()
        } else {
            let copy = self.handlers().lock().clone();
            Arc::new(Mutex::new(copy))
        };
        let id = with(|s| self.container.new_id(|id| s.tasks.contains_key(&id)));
        let links = if options.thread {
            Arc::clone(&self.links)
        } else {
            let own = self.links.lock();
            Arc::new(Mutex::new(Links {
                parent: match options.sibling {
                    true => own.parent,
                    false => self.process,
                },
                group: own.group,
                session: own.session,
                ..Links::default()
            }))
        };
        let place = if options.thread {
            Arc::clone(&self.place)
        } else {
            let copy = self.place.lock().clone();
            Arc::new(Mutex::new(copy))
        };
        let limits = if options.thread {
            Arc::clone(&self.limits)
        } else {
            let copy = *self.limits.lock();
            Arc::new(Mutex::new(copy))
        };
        let mask = self.pending.lock().mask;
        let root = mm.lock().root();
        let task = Arc::new(Self {
            id,
            process: if options.thread { self.process } else { id },
            container: Arc::clone(&self.container),
            credentials: Mutex::new(self.credentials.lock().clone()),
            name: Mutex::new(self.name.lock().clone()),
            cpu_ns: AtomicU64::new(0),
            started_ns: clock::monotonic_ns(),
            context: UnsafeCell::new(context),
            root: AtomicU64::new(root),
            mm: Mutex::new(Some(mm)),
            files: Mutex::new(files),
            place,
            links,
            limits,
            pending: Mutex::new(Pending::with_mask(mask)),
            handlers: Mutex::new(handlers),
            clear_tid: AtomicU64::new(options.clear_tid),
            robust_list: AtomicU64::new(0),
            vfork: Mutex::new(options.vfork),
            asked: Mutex::new(self.asked.lock().inherited()),
            scheduling: Mutex::new(self.scheduling.lock().inherited()),
        });
        self.container.charge.add(end::PAGES_OF_TASK as u64);
        with(|s| {
            s.ready.push_back(id, &task.container);
            s.tasks.insert(id, (task, State::Ready));
        });
        Ok(id)
    }

    /// The running task goes on with another program: `frame` is where.
    pub fn replace(&self, image: Image) {
        let frame = image.frame();
        let mm = Arc::new(Mutex::new(image.mm));
        let root = mm.lock().root();
        self.root.store(root, Ordering::Relaxed);
        // SAFETY: the new table has the kernel in its upper half as all have.
        unsafe { cpu::write_cr3(root) };
        let old = self.mm.lock().replace(mm);
        drop(old);
        *self.name.lock() = name_of(&image.called);
        self.place.lock().exe = image.path;
        let context = self.own_context();
        context.fs_base = 0;
        context.gs_base = 0;
        context.load_bases();
        context.reset_vectors();
        // SAFETY: the frame at the top of this task's kernel stack, which the return path reads.
        unsafe { *context.frame() = frame };
        self.clear_tid.store(0, Ordering::Relaxed);
        self.robust_list.store(0, Ordering::Relaxed);
        self.links.lock().executed = true;
        self.has_own_memory();
    }

    fn has_own_memory(&self) {
        let waiting = core::mem::take(&mut *self.vfork.lock());
        if waiting {
            wake(core::ptr::from_ref(&self.vfork) as Channel);
        }
    }
}

/// The running task.
pub fn current() -> Arc<Task> {
    with(|s| Arc::clone(&s.running))
}

fn find_any(id: u32) -> Option<Arc<Task>> {
    with(|s| s.tasks.get(&id).map(|(task, _)| Arc::clone(task)))
}

/// A task by its number; the kernel's own threads are none that could be asked for.
pub fn find(id: u32) -> Option<Arc<Task>> {
    let is_kernel = |t: &Arc<Task>| t.started_ns == 0;
    find_any(id).filter(|task| !is_kernel(task))
}

/// All tasks that run or sleep.
pub fn living() -> Vec<Arc<Task>> {
    with(|s| {
        // An ended task has no memory any more; threads of the kernel never had.
        let alive = s
            .tasks
            .values()
            .filter(|(task, _)| task.mm.lock().is_some());
        alive.map(|(task, _)| Arc::clone(task)).collect()
    })
}

/// All tasks of a container, also those that ended and that somebody has to wait for.
pub fn tasks_of(container: &Container) -> Vec<Arc<Task>> {
    with(|s| {
        let own = s
            .tasks
            .iter()
            .filter(|(id, _)| container.has(**id) && !s.dead.contains(id));
        own.map(|(_, (task, _))| Arc::clone(task)).collect()
    })
}

/// Number of tasks.
pub fn count() -> usize {
    with(|s| s.tasks.len())
}

/// Threads of a process that live.
pub fn threads(process: u32) -> usize {
    living().iter().filter(|t| t.process == process).count()
}

/// How /proc names the state of a task.
pub fn state_letter(id: u32) -> char {
    with(|s| match s.tasks.get(&id) {
        Some((_, State::Zombie(_))) | None => 'Z',
        Some((_, State::Stopped)) => 'T',
        Some((_, State::Sleeping(_))) if s.current != id => 'S',
        _ => 'R',
    })
}

/// Nanoseconds that the threads of a process had the CPU.
pub fn process_cpu_ns(process: u32) -> u64 {
    let threads = living();
    let own = threads.iter().filter(|t| t.process == process);
    let alive: u64 = own.map(|t| t.cpu_ns.load(Ordering::Relaxed)).sum();
    let ended = find(process).map_or(0, |t| t.links.lock().used.cpu_ns);
    alive + ended
}

/// Number of the terminal of a session, 0 without.
pub fn terminal_number(_session: u32) -> u32 {
    0
}
