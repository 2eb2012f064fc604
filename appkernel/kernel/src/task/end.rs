//! How tasks end.

use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use appkernel_core::errno::Errno;
use appkernel_hal::sync::{Mutex, any_taken};
use appkernel_hal::{boot, cpu, usercopy};

use super::{
    AGENT, CHILD, ENDS, FILES, NEVER, SCHEDULER, State, Task, Used, charge, current, find, go_on,
    living, schedule, wake, wake_task, with, yield_now,
};
use crate::container::{Container, visible};
use crate::mm::Access;
use crate::signal::Signal;
use crate::start;

/// A page fault of the running task; whether the page is there now.
pub fn fault(address: u64, access: Access) -> bool {
    let running = SCHEDULER.lock().is_some();
    if !running {
        return false;
    }
    // Threads of the kernel have no memory of programs.
    let Some(mm) = current().memory() else {
        return false;
    };
    let result = mm.lock().fault(address, access);
    match result {
        Ok(()) => {
            let me = current();
            me.container.charge.add(1);
            if !me.container.charge.is_over() {
                return true;
            }
            let was_ending = is_ending();
            keep_limit(&me.container);
            // If it is this one that has to go, a copy of the kernel's ends here, and the task on its
            // way back. One on its way out still has last words: it clears its number.
            was_ending || !is_ending()
        }
        Err(Errno::ENOMEM) => {
            out_of_memory();
            // A copy of the kernel's with something locked: whoever is to end cannot run before that is
            // free again. The copy ends here.
            if any_taken() {
                return false;
            }
            // Tried again, unless it was this one that had to go: a copy in the kernel then ends
            // at this byte, and the task on its way back.
            yield_now();
            current().pending.lock().ending.is_none()
        }
        Err(_) => false,
    }
}

/// The signal, and what it is told, for a page that could not be had.
pub fn fault_signal(address: u64, access: Access) -> (Signal, i32) {
    const NOTHING_THERE: i32 = 1;
    const NOT_ALLOWED: i32 = 2;
    const NO_FILE_THERE: i32 = 2;
    let allowed = current()
        .memory()
        .and_then(|mm| mm.lock().allows(address, access));
    match allowed {
        None => (Signal::SEGV, NOTHING_THERE),
        Some(false) => (Signal::SEGV, NOT_ALLOWED),
        // Mapped, allowed, and not to be had: past the end of its file, or the host cannot read it.
        Some(true) => (Signal::BUS, NO_FILE_THERE),
    }
}

/// Whether the running task has to end.
pub fn is_ending() -> bool {
    current().pending.lock().ending.is_some()
}

/// Pages that the kernel keeps for a task: its stack, and its vector registers.
pub(super) const PAGES_OF_TASK: usize = 5;

/// Pages that count for a container's limit, as in Linux' memory cgroups: those of its programs that
/// are no file's, files in memory, and what the kernel keeps for each task. The cache of files does
/// not count: it goes when there is need.
pub fn pages_of(container: &Container) -> u64 {
    let tasks = super::tasks_of(container);
    // Memory that several have (threads, and a child before its execve) counts once.
    let mut seen = BTreeSet::new();
    let mut parts = 0;
    for mm in tasks.iter().filter_map(|t| t.memory()) {
        if seen.insert(Arc::as_ptr(&mm) as usize) {
            parts += mm.lock().weight();
        }
    }
    parts / crate::mm::WHOLE + container.charge.in_files() + (tasks.len() * PAGES_OF_TASK) as u64
}

/// Tells one of a container's processes to end if they have more memory than they may.
fn keep_limit(container: &Container) {
    if !container.charge.is_over() {
        return;
    }
    let mut tasks = living();
    tasks.retain(|t| container.has(t.id));
    if tasks.iter().any(|t| t.pending.lock().ending.is_some()) {
        // One is on its way out already.
        return;
    }
    container.charge.counted(pages_of(container));
    if container.charge.is_over() {
        end_worst(tasks, Some(container));
    }
}

/// There is no memory for a program's page: pages of files go first, then the process that has most.
fn out_of_memory() {
    if crate::fs::fuse::shrink_all() > 0 {
        return;
    }
    let candidates = living();
    if candidates.iter().any(|t| t.pending.lock().ending.is_some()) {
        // One is on its way out already.
        return;
    }
    end_worst(candidates, None);
}

/// A program is about to ask the kernel for something. What the kernel keeps for programs (open
/// files, sockets, what waits in them) may have used up half of its reserve: then as above, before the
/// kernel itself has nothing left.
pub fn make_room(container: &Container) {
    if appkernel_hal::frames::is_critical() {
        out_of_memory();
    }
    // Files in memory count when they are written, which no fault tells of.
    keep_limit(container);
}

/// Pages that an open file may keep of the kernel's, roughly.
const PAGES_OF_FILE: usize = 4;

/// Tells the process that has most memory to end; `limit` is the container's whose own limit it is.
fn end_worst(candidates: Vec<Arc<Task>>, limit: Option<&Container>) {
    let mut worst: Option<((bool, bool, usize), Arc<Task>)> = None;
    for task in candidates {
        let Some(mm) = task.mm.lock().clone() else {
            continue;
        };
        // Whoever asks may hold the lock.
        let files = task.files();
        let files = files.try_lock().map_or(0, |files| files.numbers().len());
        let pages = mm.lock().resident() + files * PAGES_OF_FILE;
        // A container's first process only when there is no other: its end is the container's.
        let adjusted = task.place.lock().oom_score_adj;
        let (total, _) = appkernel_hal::frames::statistics();
        let more = (total as i64).saturating_mul(adjusted.into()) / 1000;
        let score = (pages as i64).saturating_add(more).max(0).unsigned_abs() as usize;
        let weight = (visible(task.process) != 1, adjusted > -1000, score);
        if worst.as_ref().is_none_or(|(most, _)| weight > *most) {
            worst = Some((weight, task));
        }
    }
    if let Some((_, task)) = worst {
        let pages = task.memory().map_or(0, |mm| mm.lock().resident());
        let (id, own) = (visible(task.process), pages * 4);
        match limit.map(|container| (&container.name, container.charge.figures())) {
            Some((name, (has, most))) => crate::log!(
                "container {name}: out of memory, {} of {} KiB: ending process {id} ({own} KiB)",
                has * 4,
                most * 4
            ),
            None => crate::log!("out of memory: ending process {id} ({own} KiB)"),
        }
        task.container.oom_kills.fetch_add(1, Ordering::Relaxed);
        end_process(task.process, crate::signal::Signal::KILL.0.into());
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
            go_on(task.id);
            wake_task(task.id);
        }
    }
}

/// Tells all threads of a process but its first to end.
pub fn end_other_threads(process: u32) {
    for task in living() {
        if task.process == process && task.id != process {
            task.pending.lock().ending.get_or_insert(0);
        }
        if task.process == process {
            go_on(task.id);
            wake_task(task.id);
        }
    }
}

/// Ends the running thread, and the process with its last one. The caller holds nothing: its stack
/// is never unwound.
pub fn exit_thread(status: i32) -> ! {
    leave(status);
    schedule::schedule();
    panic!("an ended task ran again")
}

/// Who gets the children of a process that ends: the next above it that has asked for them, or the
/// first process.
fn reaper(parent: u32, first: u32) -> u32 {
    let mut next = parent;
    // Parents are older than their children: there are no rings.
    while let Some(task) = find(next).filter(|_| next != 0 && next != first) {
        // The lock is not held when the next is looked for: that takes others.
        let (reaps, above) = {
            let links = task.links.lock();
            (links.reaps, links.parent)
        };
        if reaps {
            return next;
        }
        next = above;
    }
    first
}

fn leave(status: i32) {
    let me = current();
    let list = me.robust_list.swap(0, Ordering::Relaxed);
    if list != 0 {
        crate::syscall::futex::let_go(list);
    }
    let address = me.clear_tid.swap(0, Ordering::Relaxed);
    if address != 0 && usercopy::write(address, &0u32.to_le_bytes()).is_ok() {
        crate::syscall::futex::wake_at(address, u32::MAX);
    }
    me.has_own_memory();
    // Files are closed now, not when somebody waits for the task.
    let files = core::mem::take(&mut *me.files.lock());
    if Arc::strong_count(&files) == 1 {
        for file in files.lock().all() {
            crate::syscall::file_locks::drop_locks(file, me.process);
        }
    }
    drop(files);
    charge();
    let siblings = living()
        .iter()
        .filter(|t| t.process == me.process && t.id != me.id)
        .count();
    let first = visible(me.process) == 1;
    if siblings == 0 && first && me.container.number == 0 {
        start::ended(if status & 0x7f == 0 {
            (status >> 8) as u8
        } else {
            128 + (status & 0x7f) as u8
        });
    }
    let parent = me.links.lock().parent;
    let container = Arc::clone(&me.container);
    let (id, process) = (me.id, me.process);
    // The memory goes with the last task that uses it; from here the kernel's own table is in use.
    me.root.store(boot::kernel_pml4(), Ordering::Relaxed);
    // SAFETY: the kernel's own table.
    unsafe { cpu::write_cr3(boot::kernel_pml4()) };
    let mm = me.mm.lock().take();
    {
        // Only of the last thread: counting takes as long as there are pages.
        let last = mm.as_ref().filter(|mm| Arc::strong_count(mm) == 1);
        let pages = last.map_or(0, |mm| mm.lock().resident() as u64);
        me.links.lock().used.add(Used {
            cpu_ns: me.cpu_ns.load(Ordering::Relaxed),
            pages,
        });
    }
    drop(mm);
    drop(me);
    if siblings > 0 {
        wake(ENDS + process as usize);
        if id == process {
            // A first thread that ended before the others is kept, asleep for ever, as Linux does.
            with(|s| {
                if let Some((_, state)) = s.tasks.get_mut(&id) {
                    *state = State::Sleeping(NEVER);
                }
            });
        } else {
            bury(id);
        }
        return;
    }
    crate::alarms::forget(process);
    crate::syscall::sysv::ended(&container, process);
    // Nobody's namespace outlives its first process.
    if first {
        for task in living() {
            if container.has(task.id) && task.process != process {
                end_process(task.process, crate::signal::Signal::KILL.0.into());
            }
        }
    }
    let orphans_parent = if first {
        0
    } else {
        reaper(parent, container.id(1))
    };
    let mut gone: Vec<Arc<Task>> = Vec::new();
    // Children that want to be told.
    let mut left_alone = Vec::new();
    // The process' number is that of its first thread, which stays until it is waited for.
    with(|s| {
        let mut orphans = Vec::new();
        for (task, state) in s.tasks.values() {
            if task.id != task.process {
                continue;
            }
            let mut links = task.links.lock();
            if links.parent == process {
                links.parent = orphans_parent;
                let wanted = task.asked.lock().death_signal;
                if let Ok(signal) = crate::signal::Signal::parse(wanted.into()) {
                    left_alone.push((task.id, signal));
                }
                if orphans_parent == 0 && matches!(state, State::Zombie(_)) {
                    orphans.push(task.id);
                }
            }
        }
        for orphan in orphans {
            gone.extend(s.tasks.remove(&orphan).map(|(task, _)| task));
        }
        if let Some((_, state)) = s.tasks.get_mut(&process) {
            *state = State::Zombie(status);
        }
    });
    drop(gone);
    for (child, signal) in left_alone {
        let info = crate::signal::Info {
            id: process,
            ..crate::signal::Info::default()
        };
        crate::signal::send_process(child, signal, info);
    }
    if id != process {
        bury(id);
    }
    match find(parent).filter(|_| parent != 0) {
        Some(parent) => {
            let ignores = crate::signal::child_ended(&parent, process, status);
            if ignores {
                bury_process(process, id);
            }
            wake(CHILD + parent.process as usize);
            wake(CHILD + orphans_parent as usize);
            wake(FILES);
        }
        None => {
            // Nobody waits for it but whoever started it from outside.
            bury_process(process, id);
            EXITS.lock().push((process, status));
            wake(AGENT);
            wake(FILES);
        }
    }
}

/// Processes without a parent that ended, and how.
static EXITS: Mutex<Vec<(u32, i32)>> = Mutex::new(Vec::new());

/// Takes the processes that ended since the last time.
pub fn take_exits() -> Vec<(u32, i32)> {
    core::mem::take(&mut *EXITS.lock())
}

/// An ended process that nobody will wait for; `id` is its thread that still runs on its stack.
fn bury_process(process: u32, id: u32) {
    if process == id {
        bury(id);
    } else {
        let gone = with(|s| s.tasks.remove(&process));
        drop(gone);
    }
}

/// An ended thread; its stack is in use until the next one runs.
fn bury(id: u32) {
    with(|s| {
        if let Some((_, state)) = s.tasks.get_mut(&id) {
            *state = State::Sleeping(NEVER);
            s.dead.push(id);
        }
    });
}

/// A child that ended: its number, its status, and what it and its children used. With `reap` it is gone
/// then.
pub fn find_zombie(matches: impl Fn(&Task) -> bool, reap: bool) -> Option<(u32, i32, Used)> {
    let found = with(|s| {
        s.tasks.values().find_map(|(task, state)| match state {
            State::Zombie(status) if matches(task) => {
                let mut used = task.links.lock().used;
                used.add(task.links.lock().children);
                Some((task.id, *status, used))
            }
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
        let buried = |id| s.dead.contains(&id);
        s.tasks
            .values()
            .any(|(task, _)| task.id == task.process && !buried(task.id) && matches(task))
    })
}

/// Whether a process has ended and waits for its parent.
pub fn is_zombie(id: u32) -> bool {
    with(|s| matches!(s.tasks.get(&id), Some((_, State::Zombie(_)))))
}

/// Whether `take_exits` would give any.
pub fn has_exits() -> bool {
    !EXITS.lock().is_empty()
}
