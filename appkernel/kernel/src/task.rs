//! Processes and threads, and who runs.
//!
//! The kernel is not interrupted for another task: a task gives up the CPU where it sleeps, and at
//! the end of a time slice while its program runs. Lock order: memory, open files, then what is
//! below them (nodes, pipes), then `SCHEDULER`; under it only a task's `links`.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_hal::context::{self, Context};
use appkernel_hal::sync::Mutex;
use appkernel_hal::trap::Frame;
use appkernel_hal::{boot, clock, cpu, usercopy};

use crate::exec::Image;
use crate::fs::file::{File, Files};
use crate::mm::{Access, Mm};
use crate::signal::{Handlers, Pending};
use crate::start;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    Sleeping(Channel),
    Zombie(i32),
}

/// What can change of a task, other than by the task itself.
#[derive(Debug)]
pub struct Links {
    /// Parent process.
    pub parent: u32,
    /// Process group.
    pub group: u32,
    /// Session.
    pub session: u32,
}

/// Where a process is in the tree of files.
#[derive(Clone, Debug)]
pub struct Place {
    /// Current directory, canonical.
    pub cwd: Vec<u8>,
    /// Mode bits that new files do not get.
    pub umask: u32,
    /// The program.
    pub exe: Vec<u8>,
}

/// A thread; a process is the threads of the same `process`.
pub struct Task {
    /// Its number.
    pub id: u32,
    /// Its process' number: that of its first thread.
    pub process: u32,
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
    /// Signals that wait, and the mask.
    pub pending: Mutex<Pending>,
    /// What signals do.
    pub handlers: Mutex<Arc<Mutex<Handlers>>>,
    /// Cleared, and waited for, when the thread ends.
    pub clear_tid: AtomicU64,
    /// A parent sleeps until this task has its own memory (vfork).
    pub vfork: Mutex<bool>,
}

// SAFETY: the context is touched by the scheduler only, with interrupts off on the only CPU, and by
// the task itself.
unsafe impl Sync for Task {}

struct Scheduler {
    tasks: BTreeMap<u32, (Arc<Task>, State)>,
    ready: VecDeque<u32>,
    current: u32,
    next_id: u32,
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
    /// Stack pointer; 0 for the same.
    pub stack: u64,
    /// Base of FS.
    pub tls: Option<u64>,
    /// Where the new task's number is cleared at its end.
    pub clear_tid: u64,
    /// The parent waits until the child has its own memory.
    pub vfork: bool,
}

impl Task {
    /// The first program.
    pub fn first(image: Image, console: &Arc<File>, cwd: Vec<u8>) -> Option<Arc<Self>> {
        let context = Context::new(image.frame())?;
        let mut files = Files::default();
        for _ in 0..3 {
            files.insert(Arc::clone(console), 0, false).ok()?;
        }
        let root = image.mm.root();
        let task = Arc::new(Self {
            id: 1,
            process: 1,
            context: UnsafeCell::new(context),
            root: AtomicU64::new(root),
            mm: Mutex::new(Some(Arc::new(Mutex::new(image.mm)))),
            files: Mutex::new(Arc::new(Mutex::new(files))),
            place: Arc::new(Mutex::new(Place {
                cwd,
                umask: 0o22,
                exe: image.path,
            })),
            links: Arc::new(Mutex::new(Links {
                parent: 0,
                group: 1,
                session: 1,
            })),
            pending: Mutex::new(Pending::default()),
            handlers: Mutex::new(Arc::new(Mutex::new(Handlers::default()))),
            clear_tid: AtomicU64::new(0),
            vfork: Mutex::new(false),
        });
        let mut tasks = BTreeMap::new();
        tasks.insert(1, (Arc::clone(&task), State::Ready));
        *SCHEDULER.lock() = Some(Scheduler {
            tasks,
            ready: VecDeque::new(),
            current: 1,
            next_id: 2,
            dead: Vec::new(),
        });
        Some(task)
    }

    /// Its memory.
    pub fn mm(&self) -> Arc<Mutex<Mm>> {
        match &*self.mm.lock() {
            Some(mm) => Arc::clone(mm),
            None => panic!("task {} ended and has no memory any more", self.id),
        }
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

    /// Makes a task like this one, which goes on at `frame`; returns its number.
    pub fn clone(&self, options: &CloneOptions) -> Result<u32, Errno> {
        let count = with(|s| s.tasks.len());
        if count >= MAX_TASKS {
            return Err(Errno::EAGAIN);
        }
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
            let copy = self.files().lock().duplicate();
            Arc::new(Mutex::new(copy))
        };
        let handlers = if options.share_handlers {
            self.handlers()
        } else {
            let copy = self.handlers().lock().clone();
            Arc::new(Mutex::new(copy))
        };
        let id = with(|s| {
            loop {
                let id = s.next_id;
                s.next_id = if id >= 0x3f_ffff { 2 } else { id + 1 };
                if !s.tasks.contains_key(&id) {
                    return id;
                }
            }
        });
        let links = if options.thread {
            Arc::clone(&self.links)
        } else {
            let own = self.links.lock();
            Arc::new(Mutex::new(Links {
                parent: self.process,
                group: own.group,
                session: own.session,
            }))
        };
        let place = if options.thread {
            Arc::clone(&self.place)
        } else {
            let copy = self.place.lock().clone();
            Arc::new(Mutex::new(copy))
        };
        let mask = self.pending.lock().mask;
        let root = mm.lock().root();
        let task = Arc::new(Self {
            id,
            process: if options.thread { self.process } else { id },
            context: UnsafeCell::new(context),
            root: AtomicU64::new(root),
            mm: Mutex::new(Some(mm)),
            files: Mutex::new(files),
            place,
            links,
            pending: Mutex::new(Pending::with_mask(mask)),
            handlers: Mutex::new(handlers),
            clear_tid: AtomicU64::new(options.clear_tid),
            vfork: Mutex::new(options.vfork),
        });
        with(|s| {
            s.tasks.insert(id, (task, State::Ready));
            s.ready.push_back(id);
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
        self.place.lock().exe = image.path;
        let context = self.own_context();
        context.fs_base = 0;
        context.gs_base = 0;
        context.load_bases();
        context.reset_vectors();
        // SAFETY: the frame at the top of this task's kernel stack, which the return path reads.
        unsafe { *context.frame() = frame };
        self.clear_tid.store(0, Ordering::Relaxed);
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
    with(|s| match s.tasks.get(&s.current) {
        Some((task, _)) => Arc::clone(task),
        None => panic!("the running task is not in the table"),
    })
}

/// A task by its number.
pub fn find(id: u32) -> Option<Arc<Task>> {
    with(|s| s.tasks.get(&id).map(|(task, _)| Arc::clone(task)))
}

/// All tasks that run or sleep.
pub fn living() -> Vec<Arc<Task>> {
    with(|s| {
        let alive = s
            .tasks
            .values()
            .filter(|(_, state)| !matches!(state, State::Zombie(_)));
        alive.map(|(task, _)| Arc::clone(task)).collect()
    })
}

/// Number of tasks.
pub fn count() -> usize {
    with(|s| s.tasks.len())
}

/// A page fault of the running task; whether the page is there now.
pub fn fault(address: u64, access: Access) -> bool {
    let running = SCHEDULER.lock().is_some();
    if !running {
        return false;
    }
    let mm = current().mm();
    let result = mm.lock().fault(address, access);
    match result {
        Ok(()) => true,
        Err(Errno::ENOMEM) => {
            out_of_memory();
            // Tried again, unless it was this one that had to go: a copy in the kernel then ends
            // at this byte, and the task on its way back.
            yield_now();
            current().pending.lock().ending.is_none()
        }
        Err(_) => false,
    }
}

/// Whether the running task has to end.
pub fn is_ending() -> bool {
    current().pending.lock().ending.is_some()
}

/// There is no memory for a program's page: pages of files go first, then the process that has most.
fn out_of_memory() {
    if crate::fs::root().is_ok_and(|root| root.shrink() > 0) {
        return;
    }
    let candidates = living();
    if candidates.iter().any(|t| t.pending.lock().ending.is_some()) {
        // One is on its way out already.
        return;
    }
    let mut worst: Option<(usize, Arc<Task>)> = None;
    for task in candidates {
        let Some(mm) = task.mm.lock().clone() else {
            continue;
        };
        let pages = mm.lock().resident();
        // The first process only when there is no other: its end is the machine's.
        let weight = if task.process == 1 { 0 } else { pages };
        if worst.as_ref().is_none_or(|(most, _)| weight > *most) {
            worst = Some((weight, task));
        }
    }
    if let Some((pages, task)) = worst {
        crate::log!(
            "out of memory: ending process {} ({} KiB)",
            task.process,
            pages * 4
        );
        end_process(task.process, crate::signal::Signal::KILL.0.into());
    }
}

/// Starts the first task.
pub fn start(task: Arc<Task>) -> ! {
    let context: *const Context = task.context.get();
    let root = task.root.load(Ordering::Relaxed);
    drop(task);
    // SAFETY: the task is in the table, which keeps its context in place.
    unsafe { context::start(context, root) }
}

/// Lets others run; returns when this task is chosen again.
fn schedule() {
    let dead: Vec<Arc<Task>> = with(|s| {
        let current = s.current;
        let ids: Vec<u32> = s.dead.extract_if(.., |id| *id != current).collect();
        ids.iter()
            .filter_map(|id| s.tasks.remove(id))
            .map(|(task, _)| task)
            .collect()
    });
    drop(dead);
    let (previous, next, root) = loop {
        let choice = with(|s| {
            let previous = s.current;
            let id = s.ready.pop_front()?;
            let from = s.tasks.get(&previous).map(|(task, _)| task.context.get())?;
            let to = s
                .tasks
                .get(&id)
                .map(|(task, _)| (task.context.get(), task.root.load(Ordering::Relaxed)))?;
            s.current = id;
            Some((from, to.0, to.1))
        });
        match choice {
            Some(choice) => break choice,
            // Nobody can run: the next interrupt may change that.
            None => cpu::idle(),
        }
    };
    if previous != next {
        // SAFETY: both contexts are kept in place by the table of tasks (an ended one by `dead`
        // until somebody else runs); `previous` is the running one. No lock is held.
        unsafe { context::switch(previous, next, root) };
    }
}

/// The end of a time slice.
pub fn yield_now() {
    let alone = with(|s| {
        if s.ready.is_empty() {
            return true;
        }
        let id = s.current;
        s.ready.push_back(id);
        false
    });
    if !alone {
        schedule();
    }
}

/// Sleeps until somebody calls `wake` with the same channel. No lock may be held.
pub fn sleep(channel: Channel) {
    with(|s| {
        let id = s.current;
        if let Some((_, state)) = s.tasks.get_mut(&id) {
            *state = State::Sleeping(channel);
        }
    });
    schedule();
}

/// Sleeps until `ready` gives something; `EINTR` if a signal comes first.
pub fn wait_for<T>(channel: Channel, mut ready: impl FnMut() -> Option<T>) -> Result<T, Errno> {
    loop {
        if let Some(value) = ready() {
            return Ok(value);
        }
        if current().pending.lock().deliverable() {
            return Err(Errno::EINTR);
        }
        sleep(channel);
    }
}

/// As `wait_for`, with a point of monotonic time after which it gives up: `ETIMEDOUT`.
pub fn wait_until<T>(
    channel: Channel,
    deadline_ns: Option<u64>,
    mut ready: impl FnMut() -> Option<T>,
) -> Result<T, Errno> {
    let Some(deadline) = deadline_ns else {
        return wait_for(channel, ready);
    };
    let id = current().id;
    TIMERS.lock().push((deadline, id));
    let result = wait_for(channel, || match ready() {
        Some(value) => Some(Ok(value)),
        None if clock::monotonic_ns() >= deadline => Some(Err(Errno::ETIMEDOUT)),
        None => None,
    });
    TIMERS
        .lock()
        .retain(|(at, of)| (*at, *of) != (deadline, id));
    result?
}

static TIMERS: Mutex<Vec<(u64, u32)>> = Mutex::new(Vec::new());

/// Wakes tasks whose time has come; called by the timer. The timer may come while the kernel idles
/// or a program runs, so no lock is held then.
pub fn wake_sleepers() {
    let now = clock::monotonic_ns();
    let due: Vec<u32> = TIMERS
        .lock()
        .iter()
        .filter(|(at, _)| *at <= now)
        .map(|(_, id)| *id)
        .collect();
    for id in due {
        wake_task(id);
    }
}

/// Wakes one task, whatever it waits for; it will look again.
pub fn wake_task(id: u32) {
    with(|s| {
        if let Some((_, state @ State::Sleeping(_))) = s.tasks.get_mut(&id) {
            *state = State::Ready;
            s.ready.push_back(id);
        }
    });
}

/// Wakes all that sleep on the channel. An interrupt may come before there is any task.
pub fn wake(channel: Channel) {
    if let Some(s) = SCHEDULER.lock().as_mut() {
        for (id, (_, state)) in &mut s.tasks {
            if *state == State::Sleeping(channel) {
                *state = State::Ready;
                s.ready.push_back(*id);
            }
        }
    }
}

/// Sleeps until the child of a vfork has its own memory or ended.
pub fn wait_vfork(child: u32) {
    let Some(task) = find(child) else { return };
    let channel = core::ptr::from_ref(&task.vfork) as Channel;
    while *task.vfork.lock() {
        sleep(channel);
    }
}

/// How a task ends: the status `wait` gives.
pub fn exited(code: i32) -> i32 {
    (code & 0xff) << 8
}

/// Tells all threads of a process to end; they do on their way back to the program.
pub fn end_process(process: u32, status: i32) {
    for task in living() {
        if task.process == process {
            task.pending.lock().ending.get_or_insert(status);
            wake_task(task.id);
        }
    }
}

/// Ends the running thread, and the process with its last one. The caller holds nothing: its stack
/// is never unwound.
pub fn exit_thread(status: i32) -> ! {
    leave(status);
    schedule();
    panic!("an ended task ran again")
}

fn leave(status: i32) {
    let me = current();
    let address = me.clear_tid.swap(0, Ordering::Relaxed);
    if address != 0 && usercopy::write(address, &0u32.to_le_bytes()).is_ok() {
        crate::syscall::futex::wake_at(address, u32::MAX);
    }
    me.has_own_memory();
    // Files are closed now, not when somebody waits for the task.
    let files = core::mem::take(&mut *me.files.lock());
    for file in files.lock().all() {
        crate::syscall::files::drop_locks(file, me.process);
    }
    drop(files);
    let siblings = living()
        .iter()
        .filter(|t| t.process == me.process && t.id != me.id)
        .count();
    if siblings == 0 && me.process == 1 {
        start::ended(if status & 0x7f == 0 {
            (status >> 8) as u8
        } else {
            128 + (status & 0x7f) as u8
        });
    }
    let parent = me.links.lock().parent;
    let (id, process) = (me.id, me.process);
    // The memory goes with the last task that uses it; from here the kernel's own table is in use.
    me.root.store(boot::kernel_pml4(), Ordering::Relaxed);
    // SAFETY: the kernel's own table.
    unsafe { cpu::write_cr3(boot::kernel_pml4()) };
    let mm = me.mm.lock().take();
    drop(mm);
    drop(me);
    if siblings == 0 {
        // The process' number is that of its first thread, which stays until it is waited for.
        with(|s| {
            for (task, _) in s.tasks.values() {
                if task.id != task.process {
                    continue;
                }
                let mut links = task.links.lock();
                if links.parent == process {
                    links.parent = 1;
                }
            }
            if let Some((_, state)) = s.tasks.get_mut(&process) {
                *state = State::Zombie(status);
            }
        });
        if id != process {
            bury(id);
        }
        if let Some(parent) = find(parent) {
            crate::signal::send(&parent, crate::signal::Signal::CHLD);
        }
        wake(CHILD + parent as usize);
        wake(CHILD + 1);
    } else if id == process {
        // A first thread that ended before the others is kept, asleep for ever, as Linux keeps it.
        with(|s| {
            if let Some((_, state)) = s.tasks.get_mut(&id) {
                *state = State::Sleeping(usize::MAX);
            }
        });
    } else {
        bury(id);
    }
}

/// An ended thread; its stack is in use until the next one runs.
fn bury(id: u32) {
    with(|s| {
        if let Some((_, state)) = s.tasks.get_mut(&id) {
            *state = State::Sleeping(usize::MAX);
            s.dead.push(id);
        }
    });
}

/// A child that ended: its number and status. With `reap` it is gone then.
pub fn find_zombie(matches: impl Fn(&Task) -> bool, reap: bool) -> Option<(u32, i32)> {
    let found = with(|s| {
        s.tasks.values().find_map(|(task, state)| match state {
            State::Zombie(status) if matches(task) => Some((task.id, *status)),
            _ => None,
        })
    })?;
    if reap {
        let gone = with(|s| s.tasks.remove(&found.0));
        drop(gone);
    }
    Some(found)
}

/// Whether a process has a child that matches.
pub fn has_child(matches: impl Fn(&Task) -> bool) -> bool {
    with(|s| {
        s.tasks
            .values()
            .any(|(task, _)| task.id == task.process && matches(task))
    })
}
