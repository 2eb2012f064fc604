//! System calls: the way from number to family, and what is counted and printed about them.

pub mod futex;

mod attributes;
pub mod events;
pub mod file_locks;
pub mod files;
mod info;
mod memory;
mod more;
mod mounts;
mod moves;
mod opens;
mod others;
mod paths;
mod pidfds;
mod polls;
mod processes;
mod scheduling;
mod signals;
mod socket_options;
mod sockets;
pub mod sysv;
mod timers;
mod users;
mod watches;
mod xattrs;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use appkernel_core::errno::Errno;
use appkernel_core::syscalls::{self, Support};
use appkernel_core::trace;
use appkernel_hal::sync::Mutex;
use appkernel_hal::trap::Frame;
use appkernel_hal::usercopy;

pub use processes::take_over;

use crate::log;
use crate::signal;
use crate::task::{self, Task};

/// What a call gives: a number for the program.
pub type Result<T = u64> = core::result::Result<T, Errno>;

static TRACE: AtomicBool = AtomicBool::new(false);
static UNKNOWN: AtomicU64 = AtomicU64::new(0);
/// Task, number, two arguments; and where the next one goes.
type Last = ([(u32, u64, u64, u64); 16], usize);
/// The last calls: task, number, first arguments. For the end of the kernel's log.
static LAST: Mutex<Last> = Mutex::new(([(0, 0, 0, 0); 16], 0));

/// Prints each call, if wanted.
pub fn trace(on: bool) {
    TRACE.store(on, Ordering::Relaxed);
}

/// Calls that were made and are not there.
pub fn unknown() -> u64 {
    UNKNOWN.load(Ordering::Relaxed)
}

/// Prints the last calls, oldest first.
pub fn print_last() {
    let Some(last) = LAST.try_lock() else { return };
    for i in 0..last.0.len() {
        let (task, number, first, second) = last.0[(last.1 + i) % last.0.len()];
        if task != 0 {
            let name = syscalls::find(number).map_or("?", |call| call.name);
            log!("  task {task:#x}: {name}({first:#x}, {second:#x}, ...)");
        }
    }
}

/// A call with its arguments.
pub struct Call<'a> {
    pub number: u64,
    pub args: [u64; 6],
    pub task: &'a Task,
}

impl Call<'_> {
    /// An argument.
    pub fn arg(&self, i: usize) -> u64 {
        self.args.get(i).copied().unwrap_or(0)
    }
    /// An argument of 32 bits.
    pub fn int(&self, i: usize) -> i32 {
        self.arg(i) as i32
    }
    /// An argument of 32 bits without sign.
    pub fn uint(&self, i: usize) -> u32 {
        self.arg(i) as u32
    }
}

/// Called by the entry code.
#[unsafe(no_mangle)]
extern "C" fn kernel_syscall(frame: &mut Frame) {
    let number = frame.rax;
    let args = [
        frame.rdi, frame.rsi, frame.rdx, frame.r10, frame.r8, frame.r9,
    ];
    {
        let task = task::current();
        {
            let mut last = LAST.lock();
            let at = last.1;
            last.0[at] = (task.id, number, args[0], args[1]);
            last.1 = (at + 1) % last.0.len();
        }
        let call = Call {
            number,
            args,
            task: &task,
        };
        task::make_room(&task.container);
        let traced = TRACE.load(Ordering::Relaxed).then(|| describe(&call));
        let result = dispatch(&call, frame);
        if let Some(line) = traced {
            print(line, result);
        }
        if let Some(value) = match result {
            Ok(value) => value,
            Err(e) => Some((i64::from(e.0).wrapping_neg()).cast_unsigned()),
        } {
            frame.rax = value;
        }
    }
    signal::deliver(frame);
}

/// The call with its arguments, before it is made: a successful execve leaves nothing of them.
fn describe(call: &Call<'_>) -> String {
    let mut line = String::new();
    let _ = write!(line, "{} ", crate::container::visible(call.task.id));
    let _ = match syscalls::find(call.number) {
        Some(known) => write!(line, "{}(", known.name),
        None => write!(line, "syscall_{:#x}(", call.number),
    };
    for (i, letter) in trace::signature(call.number).bytes().enumerate() {
        let value = call.arg(i);
        let text = match letter {
            b'p' => match get_path(value) {
                Ok(path) => trace::quoted(&path),
                Err(_) => trace::number(b'x', value),
            },
            _ => trace::number(letter, value),
        };
        let _ = write!(line, "{}{text}", if i > 0 { ", " } else { "" });
    }
    line
}

fn print(mut line: String, result: Result<Option<u64>>) {
    const MANY: u64 = 1 << 16;
    let _ = match result {
        Ok(Some(value)) if value < MANY => write!(line, ") = {value}"),
        Ok(Some(value)) => write!(line, ") = {value:#x}"),
        Ok(None) => write!(line, ") = ?"),
        Err(e) => write!(line, ") = -1 {}", e.name()),
    };
    log!("{line}");
}

/// Makes the call; `None` if it set all registers itself.
fn dispatch(call: &Call<'_>, frame: &mut Frame) -> Result<Option<u64>> {
    if syscalls::support(call.number) == Support::Missing {
        UNKNOWN.fetch_add(1, Ordering::Relaxed);
        return Err(Errno::ENOSYS);
    }
    match call.number {
        15 => signals::sigreturn(call, frame).map(|()| None),
        59 => processes::execve(call, frame).map(|()| None),
        322 => processes::execveat(call, frame).map(|()| None),
        _ => one(call).map(Some),
    }
}

/// Calls that only administrators of a machine may make, which no container's program is.
fn refused(c: &Call<'_>) -> Option<Result> {
    syscalls::is_refused(c.number).then_some(Err(Errno::EPERM))
}

type Family = fn(&Call<'_>) -> Option<Result>;

/// Who is asked for a call, one after the other.
static FAMILIES: [Family; 22] = [
    files::call,
    memory::call,
    paths::call,
    attributes::call,
    polls::call,
    processes::call,
    signals::call,
    info::call,
    users::call,
    sockets::call,
    events::call,
    more::call,
    watches::call,
    sysv::call,
    scheduling::call,
    timers::call,
    mounts::call,
    pidfds::call,
    xattrs::call,
    opens::call,
    others::call,
    refused,
];

/// Who answered a number the last time, plus one: asked first.
static ANSWERED: [AtomicU8; syscalls::NUMBERS] = [const { AtomicU8::new(0) }; syscalls::NUMBERS];

fn one(call: &Call<'_>) -> Result {
    let answered = ANSWERED.get(call.number as usize);
    let first = answered.map_or(0, |a| usize::from(a.load(Ordering::Relaxed)));
    if let Some(family) = first.checked_sub(1).and_then(|i| FAMILIES.get(i))
        && let Some(result) = family(call)
    {
        return result;
    }
    for (index, family) in FAMILIES.iter().enumerate() {
        if let Some(result) = family(call) {
            if let Some(answered) = answered {
                answered.store(index as u8 + 1, Ordering::Relaxed);
            }
            return result;
        }
    }
    // The table and the families disagree: a mistake of ours, but none to end the machine for.
    UNKNOWN.fetch_add(1, Ordering::Relaxed);
    Err(Errno::ENOSYS)
}

/// Reads a plain value of `N` bytes from the program.
pub fn get<const N: usize>(address: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    usercopy::read(&mut bytes, address).map_err(|_| Errno::EFAULT)?;
    Ok(bytes)
}

/// Reads a 64-bit number.
pub fn get_u64(address: u64) -> Result {
    get(address).map(u64::from_le_bytes)
}

/// Writes bytes to the program.
pub fn put(address: u64, bytes: &[u8]) -> Result<()> {
    usercopy::write(address, bytes).map_err(|_| Errno::EFAULT)
}

/// Writes 64-bit numbers in a row.
pub fn put_words(address: u64, words: &[u64]) -> Result<()> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    put(address, &bytes)
}

/// Reads bytes up to a zero, at most `max` with it.
pub fn get_string(address: u64, max: usize, too_long: Errno) -> Result<Vec<u8>> {
    let mut string = Vec::new();
    let mut at = address;
    loop {
        // Never across a page that the string may not reach.
        let room = (4096 - (at % 4096) as usize).min(256);
        let mut piece = [0; 256];
        let piece = piece.get_mut(..room).unwrap_or_default();
        usercopy::read(piece, at).map_err(|_| Errno::EFAULT)?;
        let end = piece.iter().position(|b| *b == 0);
        string.extend(piece.iter().take(end.unwrap_or(room)));
        if string.len() >= max {
            return Err(too_long);
        }
        if end.is_some() {
            return Ok(string);
        }
        at += room as u64;
    }
}

/// Reads a path.
pub fn get_path(address: u64) -> Result<Vec<u8>> {
    get_string(address, crate::fs::PATH_MAX, Errno::ENAMETOOLONG)
}

/// Reads a time in nanoseconds from a `timespec`.
pub fn get_timespec(address: u64) -> Result {
    let (seconds, ns) = (get_u64(address)?, get_u64(address.wrapping_add(8))?);
    if seconds > i64::MAX.cast_unsigned() || ns >= 1_000_000_000 {
        return Err(Errno::EINVAL);
    }
    Ok(seconds.saturating_mul(1_000_000_000).saturating_add(ns))
}
