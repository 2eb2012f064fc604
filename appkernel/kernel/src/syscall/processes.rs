//! Calls on processes and threads.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use appkernel_core::errno::Errno;
use appkernel_hal::trap::Frame;
use appkernel_hal::{USER_END, usercopy};

use super::{Call, Result, get_path, get_string, get_u64, put, put_words};
use crate::container::visible;
use crate::exec::{self, ARGUMENTS_MAX};
use crate::fs;
use crate::signal::Signal;
use crate::task::{self, CloneOptions, Task, Used};

/// Flags of clone.
mod flag {
    pub const VM: u64 = 0x100;
    pub const FS: u64 = 0x200;
    pub const FILES: u64 = 0x400;
    pub const SIGHAND: u64 = 0x800;
    pub const PIDFD: u64 = 0x1000;
    pub const VFORK: u64 = 0x4000;
    pub const PARENT: u64 = 0x8000;
    pub const THREAD: u64 = 0x1_0000;
    pub const SYSVSEM: u64 = 0x4_0000;
    pub const SETTLS: u64 = 0x8_0000;
    pub const PARENT_SETTID: u64 = 0x10_0000;
    pub const CHILD_CLEARTID: u64 = 0x20_0000;
    pub const DETACHED: u64 = 0x40_0000;
    /// Nobody traces, and all share the way to the disk.
    pub const UNTRACED: u64 = 0x80_0000;
    pub const IO: u64 = 0x8000_0000;
    pub const CHILD_SETTID: u64 = 0x100_0000;
    pub const KNOWN: u64 = 0xff
        | VM
        | FS
        | FILES
        | SIGHAND
        | PIDFD
        | VFORK
        | PARENT
        | THREAD
        | SYSVSEM
        | SETTLS
        | PARENT_SETTID
        | CHILD_CLEARTID
        | DETACHED
        | CHILD_SETTID
        | UNTRACED
        | IO;
}

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        24 => {
            task::yield_now();
            Ok(0)
        }
        39 => Ok(visible(c.task.process).into()),
        // The descriptor of a process goes where a thread's number would.
        56 => clone(
            c,
            &CloneArguments {
                flags: c.arg(0),
                stack: c.arg(1),
                parent_tid: c.arg(2),
                child_tid: c.arg(3),
                tls: c.arg(4),
                pidfd: c.arg(2),
            },
        ),
        57 => clone(c, &CloneArguments::default()),
        58 => clone(
            c,
            &CloneArguments {
                flags: flag::VM | flag::VFORK,
                ..CloneArguments::default()
            },
        ),
        435 => clone3(c),
        60 => {
            c.task
                .pending
                .lock()
                .ending
                .get_or_insert(task::exited(c.int(0)));
            Ok(0)
        }
        61 => wait4(c),
        247 => waitid(c),
        109 => set_group(c),
        110 => Ok(visible(c.task.links.lock().parent).into()),
        111 => Ok(visible(c.task.links.lock().group).into()),
        112 => set_session(c),
        121 => process(c).map(|t| visible(t.links.lock().group).into()),
        124 => process(c).map(|t| visible(t.links.lock().session).into()),
        158 => arch(c),
        186 => Ok(visible(c.task.id).into()),
        202 => super::futex::futex(c),
        218 => {
            c.task.clear_tid.store(c.arg(0), Ordering::Relaxed);
            Ok(visible(c.task.id).into())
        }
        231 => {
            task::end_process(c.task.process, task::exited(c.int(0)));
            Ok(0)
        }
        273 if c.arg(1) != 24 => Err(Errno::EINVAL),
        273 => {
            c.task.robust_list.store(c.arg(0), Ordering::Relaxed);
            Ok(0)
        }
        274 => robust_list(c),
        272 => unshare(c),
        _ => return None,
    })
}

/// get_robust_list(2).
fn robust_list(c: &Call<'_>) -> Result {
    let id = match c.uint(0) {
        0 => c.task.id,
        id => c.task.container.id(id),
    };
    let task = task::find(id).ok_or(Errno::ESRCH)?;
    if task.process != c.task.process && !c.task.credentials.lock().is_root() {
        return Err(Errno::EPERM);
    }
    let list = task.robust_list.load(Ordering::Relaxed);
    put(c.arg(2), &24u64.to_le_bytes())?;
    put(c.arg(1), &list.to_le_bytes())?;
    Ok(0)
}

/// What clone and clone3 are asked for.
#[derive(Clone, Copy, Debug, Default)]
struct CloneArguments {
    flags: u64,
    stack: u64,
    parent_tid: u64,
    child_tid: u64,
    tls: u64,
    pidfd: u64,
}

/// clone3(2): the same in a structure.
fn clone3(c: &Call<'_>) -> Result {
    /// Bytes of the structure in its first version, and as it is known here.
    const FIRST: u64 = 64;
    const WHOLE: usize = 88;
    let size = c.arg(1);
    if size < FIRST {
        return Err(Errno::EINVAL);
    }
    if size > 4096 {
        return Err(Errno::E2BIG);
    }
    let mut bytes = alloc::vec![0; size as usize];
    usercopy::read(&mut bytes, c.arg(0)).map_err(|_| Errno::EFAULT)?;
    if bytes.iter().skip(WHOLE).any(|b| *b != 0) {
        return Err(Errno::E2BIG);
    }
    let word = |i: usize| {
        let part = bytes.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok());
        part.map_or(0, u64::from_le_bytes)
    };
    let (flags, exit_signal, stack, stack_bytes) = (word(0), word(4), word(5), word(6));
    // What is in the flags' first byte with clone has its own place here.
    if flags & 0xff != 0 || exit_signal > 64 || (stack == 0) != (stack_bytes == 0) {
        return Err(Errno::EINVAL);
    }
    // Nobody chooses the numbers of processes here.
    if word(8) != 0 || word(9) != 0 {
        return Err(Errno::EINVAL);
    }
    let top = stack
        .checked_add(stack_bytes)
        .filter(|top| *top <= USER_END);
    clone(
        c,
        &CloneArguments {
            flags: flags | exit_signal,
            stack: top.ok_or(Errno::EINVAL)?,
            parent_tid: word(3),
            child_tid: word(2),
            tls: word(7),
            pidfd: word(1),
        },
    )
}

fn clone(c: &Call<'_>, arguments: &CloneArguments) -> Result {
    let CloneArguments {
        flags,
        stack,
        parent_tid,
        child_tid,
        tls,
        pidfd,
    } = *arguments;
    let has = |bit| flags & bit != 0;
    let thread = has(flag::THREAD);
    if flags & !flag::KNOWN != 0
        || thread && !(has(flag::VM) && has(flag::SIGHAND))
        || has(flag::SIGHAND) && !has(flag::VM)
        || tls >= USER_END
        || has(flag::PIDFD) && (thread || has(flag::DETACHED))
        || has(flag::PIDFD) && has(flag::PARENT_SETTID) && pidfd == parent_tid
        // The first process has no parent for a sibling.
        || has(flag::PARENT) && !thread && visible(c.task.process) == 1
    {
        return Err(Errno::EINVAL);
    }
    // Where the descriptor goes must be there before there is a process.
    if has(flag::PIDFD) {
        put(pidfd, &0u32.to_le_bytes())?;
    }
    let options = CloneOptions {
        share_memory: has(flag::VM),
        share_files: has(flag::FILES),
        share_handlers: has(flag::SIGHAND),
        thread,
        sibling: has(flag::PARENT),
        stack,
        tls: has(flag::SETTLS).then_some(tls),
        clear_tid: if has(flag::CHILD_CLEARTID) {
            child_tid
        } else {
            0
        },
        vfork: has(flag::VFORK),
    };
    let id = c.task.clone(&options)?;
    let shown = visible(id);
    // There is a task now, whatever becomes of these.
    if has(flag::PARENT_SETTID) {
        let _ = put(parent_tid, &shown.to_le_bytes());
    }
    let child = task::find(id);
    if has(flag::CHILD_SETTID)
        && let Some(mm) = child.as_ref().and_then(|child| child.memory())
    {
        let _ = mm.lock().write(child_tid, &shown.to_le_bytes());
    }
    if has(flag::PIDFD)
        && let Some(child) = &child
    {
        let fd = super::pidfds::make(c, child, 0).unwrap_or(u64::MAX) as u32;
        let _ = put(pidfd, &fd.to_le_bytes());
    }
    drop(child);
    if options.vfork {
        task::wait_vfork(id);
    }
    Ok(shown.into())
}

/// unshare(2): there are no namespaces to make.
fn unshare(c: &Call<'_>) -> Result {
    const NAMESPACES: u64 = 0x7e02_0080;
    let known = flag::FS | flag::FILES | flag::SYSVSEM | flag::VM | flag::SIGHAND | flag::THREAD;
    let flags = c.arg(0);
    if flags & !(known | NAMESPACES) != 0 {
        return Err(Errno::EINVAL);
    }
    if flags & NAMESPACES != 0 {
        return Err(Errno::EPERM);
    }
    let shared = flags & (flag::VM | flag::SIGHAND | flag::THREAD) != 0;
    if shared && task::threads(c.task.process) > 1 {
        return Err(Errno::EINVAL);
    }
    if flags & flag::FILES != 0 {
        let copy = c.task.files().lock().duplicate()?;
        *c.task.files.lock() = alloc::sync::Arc::new(appkernel_hal::sync::Mutex::new(copy));
    }
    Ok(0)
}

fn strings(at: u64, total: &mut usize) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    if at == 0 {
        return Ok(all);
    }
    loop {
        let pointer = get_u64(at.wrapping_add(all.len() as u64 * 8))?;
        if pointer == 0 {
            return Ok(all);
        }
        let string = get_string(pointer, exec::ARGUMENT_MAX, Errno::E2BIG)?;
        *total += string.len() + 9;
        if *total > ARGUMENTS_MAX {
            return Err(Errno::E2BIG);
        }
        all.push(string);
    }
}

/// execve(2): sets the registers of the new program.
pub fn execve(c: &Call<'_>, frame: &mut Frame) -> Result<()> {
    let cwd = c.task.place.lock().cwd.clone();
    execute(c, frame, (get_path(c.arg(0))?, cwd), (c.arg(1), c.arg(2)))
}

/// execveat(2).
pub fn execveat(c: &Call<'_>, frame: &mut Frame) -> Result<()> {
    use super::paths::{AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW};
    let flags = c.uint(4);
    if flags & !(AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0 {
        return Err(Errno::EINVAL);
    }
    let path = get_path(c.arg(1))?;
    let (path, cwd) = if path.is_empty() && flags & AT_EMPTY_PATH != 0 {
        // By its number: it may have no name.
        c.task.file(c.int(0))?;
        let path = alloc::format!("/proc/self/fd/{}", c.int(0)).into_bytes();
        (path, b"/".to_vec())
    } else {
        let cwd = super::paths::base(c, c.int(0), &path)?;
        if flags & AT_SYMLINK_NOFOLLOW != 0
            && fs::resolve(&c.task.container, &cwd, &path, false)?
                .node
                .is_link()
        {
            return Err(Errno::ELOOP);
        }
        (path, cwd)
    };
    execute(c, frame, (path, cwd), (c.arg(2), c.arg(3)))
}

/// The program at a path (from a directory), with arguments and environment at these addresses.
fn execute(
    c: &Call<'_>,
    frame: &mut Frame,
    (path, cwd): (Vec<u8>, Vec<u8>),
    (arguments, environment): (u64, u64),
) -> Result<()> {
    let mut total = 0;
    let request = exec::Request {
        path,
        arguments: strings(arguments, &mut total)?,
        environment: strings(environment, &mut total)?,
    };
    let credentials = c.task.credentials.lock().clone();
    let asked = *c.task.asked.lock();
    let context = exec::Context {
        container: &c.task.container,
        cwd: &cwd,
        credentials: &credentials,
        random: exec::is_random(asked.persona),
        may_become: !asked.no_new_privileges,
    };
    let image = match exec::replace(&request, context) {
        Ok(image) => image,
        Err(exec::Failure::Refused(error)) => return Err(error),
        Err(exec::Failure::Fatal) => {
            task::end_process(c.task.process, Signal::SEGV.0.into());
            return Ok(());
        }
    };
    if task::threads(c.task.process) > 1 {
        return pass_on(c, image);
    }
    begin(c.task, image, frame);
    Ok(())
}

/// The program of a process with one thread goes on with another.
fn begin(task: &Task, image: exec::Image, frame: &mut Frame) {
    // Others may have the same table (CLONE_FILES without CLONE_THREAD): it is its own now.
    let copy = task.files().lock().duplicate();
    let Ok(copy) = copy else {
        // There is no way back to the old program.
        task::end_process(task.process, Signal::KILL.0.into());
        return;
    };
    let files = alloc::sync::Arc::new(appkernel_hal::sync::Mutex::new(copy));
    let closing = files.lock().take_closing();
    let shared = core::mem::replace(&mut *task.files.lock(), files);
    drop(shared);
    drop(closing);
    let handlers = task.handlers().lock().clone();
    let own = alloc::sync::Arc::new(appkernel_hal::sync::Mutex::new(handlers));
    own.lock().reset();
    *task.handlers.lock() = own;
    task.pending.lock().stack = (0, 0);
    image.set_credentials(&mut task.credentials.lock());
    crate::alarms::forget_made(task.process);
    *frame = image.frame();
    task.replace(image);
}

/// execve(2) of a thread among others: they end, and the process' first thread, whose number is the
/// process', goes on with the program.
fn pass_on(c: &Call<'_>, image: exec::Image) -> Result<()> {
    let first = task::find(c.task.process).filter(|t| t.memory().is_some());
    // One that ended before the others has nothing to go on with.
    let first = first.ok_or(Errno::EAGAIN)?;
    // `first` may be the caller: one lock at a time.
    let (mask, ends) = {
        let pending = c.task.pending.lock();
        (pending.mask, pending.ending.is_some())
    };
    let credentials = c.task.credentials.lock().clone();
    {
        let mut pending = first.pending.lock();
        // Another thread was faster: this one ends with the rest.
        if ends || pending.next.is_some() {
            return Err(Errno::EAGAIN);
        }
        pending.next = Some(alloc::boxed::Box::new(image));
        pending.mask = mask;
        pending.saved_mask = None;
    }
    *first.credentials.lock() = credentials;
    task::end_other_threads(c.task.process);
    Ok(())
}

/// On the way back to a program: another one was passed on to this thread. Whether it is that one now
/// that `frame` goes to.
pub fn take_over(task: &Task, frame: &mut Frame) -> bool {
    let next = task.pending.lock().next.take();
    let Some(image) = next else { return false };
    let me = task.process;
    // The others are on their way out; they have the old memory.
    while task::threads(me) > 1 {
        if task.pending.lock().ending.is_some() {
            return false;
        }
        task::end_other_threads(me);
        task::sleep(task::ENDS + me as usize);
    }
    begin(task, *image, frame);
    true
}

const NOHANG: u32 = 1;
const UNTRACED: u32 = 2;
const EXITED: u32 = 4;
const CONTINUED: u32 = 8;
const NOWAIT: u32 = 0x0100_0000;

/// What happened to a child.
#[derive(Clone, Copy)]
enum Event {
    Ended(i32),
    Stopped(u8),
    Continued,
}

/// Waits for a child of `who` (as wait4 has it); `None` if there is nothing yet and `NOHANG`.
fn wait(c: &Call<'_>, who: i32, options: u32) -> Result<Option<(u32, Event, Used)>> {
    let me = c.task.process;
    let group = c.task.links.lock().group;
    let container = &c.task.container;
    let matches = move |task: &Task| {
        if task.id == c.task.id {
            return false;
        }
        let links = task.links.lock();
        links.parent == me
            && task.process != me
            && match who {
                -1 => true,
                0 => links.group == group,
                1.. => task.id == container.id(who.unsigned_abs()),
                _ => links.group == container.id(who.unsigned_abs()),
            }
    };
    let changed = || {
        task::living().into_iter().find_map(|child| {
            if child.id != child.process || !matches(&child) {
                return None;
            }
            let mut links = child.links.lock();
            if options & UNTRACED != 0
                && let Some(signal) = links.stopped
            {
                if options & NOWAIT == 0 {
                    links.stopped = None;
                }
                return Some((child.id, Event::Stopped(signal), Used::default()));
            }
            if options & CONTINUED != 0 && links.continued {
                if options & NOWAIT == 0 {
                    links.continued = false;
                }
                return Some((child.id, Event::Continued, Used::default()));
            }
            None
        })
    };
    let look = || {
        if options & EXITED != 0
            && let Some((id, status, used)) = task::find_zombie(matches, options & NOWAIT == 0)
        {
            if options & NOWAIT == 0 {
                c.task.links.lock().children.add(used);
            }
            return Some(Ok((id, Event::Ended(status), used)));
        }
        if let Some(found) = changed() {
            return Some(Ok(found));
        }
        (!task::has_child(matches)).then_some(Err(Errno::ECHILD))
    };
    if options & NOHANG != 0 {
        return look().transpose();
    }
    task::wait_for(task::CHILD + me as usize, look)?.map(Some)
}

/// As `struct rusage` has it: all time as the program's own, and the memory in KiB.
pub fn usage(used: Used) -> [u64; 18] {
    let us = used.cpu_ns / 1000;
    let mut words = [0; 18];
    words[0] = us / 1_000_000;
    words[1] = us % 1_000_000;
    words[4] = used.pages * 4;
    words
}

fn wait4(c: &Call<'_>) -> Result {
    let options = c.uint(2);
    if options & !(NOHANG | UNTRACED | CONTINUED | 0xe000_0000) != 0 {
        return Err(Errno::EINVAL);
    }
    if c.int(0) == i32::MIN {
        return Err(Errno::ESRCH);
    }
    let Some((id, event, used)) = wait(c, c.int(0), options | EXITED)? else {
        return Ok(0);
    };
    let status = match event {
        Event::Ended(status) => status,
        Event::Stopped(signal) => i32::from(signal) << 8 | 0x7f,
        Event::Continued => 0xffff,
    };
    if c.arg(1) != 0 {
        put(c.arg(1), &status.to_le_bytes())?;
    }
    if c.arg(3) != 0 {
        put_words(c.arg(3), &usage(used))?;
    }
    Ok(visible(id).into())
}

fn waitid(c: &Call<'_>) -> Result {
    let who = match (c.uint(0), c.int(1)) {
        (0, _) => -1,
        (1, id @ 1..) => id,
        (2, 0) => 0,
        (2, id @ 1..) => -id,
        (3, fd @ 0..) => {
            let file = c.task.used_file(fd)?;
            let pid = file.object::<super::pidfds::PidFd>().ok_or(Errno::EBADF)?;
            let process = pid.process().ok_or(Errno::ECHILD)?;
            visible(process).cast_signed()
        }
        _ => return Err(Errno::EINVAL),
    };
    let options = c.uint(3);
    if options & (EXITED | UNTRACED | CONTINUED) == 0 {
        return Err(Errno::EINVAL);
    }
    let mut words = [0u64; 16];
    if let Some((id, event, used)) = wait(c, who, options)? {
        if c.arg(4) != 0 {
            put_words(c.arg(4), &usage(used))?;
        }
        let (code, status) = match event {
            Event::Ended(status) if status & 0x7f == 0 => (1, (status >> 8) as u32),
            Event::Ended(status) => (2, status as u32 & 0x7f),
            Event::Stopped(signal) => (5, signal.into()),
            Event::Continued => (6, 18),
        };
        words[0] = 17;
        words[1] = code;
        words[2] = visible(id).into();
        words[3] = status.into();
    }
    if c.arg(2) != 0 {
        put_words(c.arg(2), &words)?;
    }
    Ok(0)
}

/// The process a call names; 0 is its own.
fn process(c: &Call<'_>) -> Result<alloc::sync::Arc<Task>> {
    let id = match c.uint(0) {
        0 => c.task.process,
        id => c.task.container.id(id),
    };
    task::find(id)
        .filter(|t| t.id == t.process)
        .ok_or(Errno::ESRCH)
}

fn set_group(c: &Call<'_>) -> Result {
    let task = process(c)?;
    let group = match c.int(1) {
        ..0 => return Err(Errno::EINVAL),
        0 => task.id,
        group => c.task.container.id(group.unsigned_abs()),
    };
    let session = c.task.links.lock().session;
    let links = task.links.lock();
    if task.process != c.task.process && links.parent != c.task.process {
        return Err(Errno::ESRCH);
    }
    if links.session != session || links.session == task.id {
        return Err(Errno::EPERM);
    }
    if task.process != c.task.process && links.executed {
        return Err(Errno::EACCES);
    }
    drop(links);
    // A group that is there, in the same session, or a new one of its own.
    let is_there = || {
        task::living().iter().any(|t| {
            let links = t.links.lock();
            links.group == group && links.session == session
        })
    };
    if group != task.id && !is_there() {
        return Err(Errno::EPERM);
    }
    let mut links = task.links.lock();
    links.group = group;
    Ok(0)
}

fn set_session(c: &Call<'_>) -> Result {
    // A group of its number may be there without it.
    let taken = |t: &alloc::sync::Arc<task::Task>| t.links.lock().group == c.task.process;
    if task::living().iter().any(taken) {
        return Err(Errno::EPERM);
    }
    let mut links = c.task.links.lock();
    links.group = c.task.process;
    links.session = c.task.process;
    Ok(visible(c.task.process).into())
}

fn arch(c: &Call<'_>) -> Result {
    let (code, value) = (c.uint(0), c.arg(1));
    let context = c.task.own_context();
    match code {
        0x1001 | 0x1002 => {
            if value >= USER_END {
                return Err(Errno::EPERM);
            }
            if code == 0x1001 {
                context.gs_base = value;
            } else {
                context.fs_base = value;
            }
            context.load_bases();
        }
        0x1003 => put(value, &context.fs_base.to_le_bytes())?,
        0x1004 => put(value, &context.gs_base.to_le_bytes())?,
        // Whether CPUID works, and that it cannot be made to fail: no processor feature for it here.
        0x1011 => return Ok(1),
        0x1012 => return Err(Errno::ENODEV),
        _ => return Err(Errno::EINVAL),
    }
    Ok(0)
}
