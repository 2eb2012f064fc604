//! The console: what programs write goes to the serial port, what arrives there they can read.

use alloc::collections::VecDeque;

use appkernel_hal::serial::Serial;
use appkernel_hal::sync::Mutex;

use crate::task;

/// Typed ahead, at most; more is lost, as on a terminal.
const MAX_INPUT: usize = 4096;

static INPUT: Mutex<VecDeque<u8>> = Mutex::new(VecDeque::new());

/// Takes what arrived; called by the port's interrupt and before reads.
pub fn input() {
    let mut any = false;
    {
        let mut input = INPUT.lock();
        while let Some(byte) = Serial::get() {
            if input.len() < MAX_INPUT {
                input.push_back(if byte == b'\r' { b'\n' } else { byte });
                any = true;
            }
        }
    }
    if any {
        task::wake(task::FILES);
    }
}

/// Whether there is something to read.
pub fn readable() -> bool {
    input();
    !INPUT.lock().is_empty()
}

/// Takes a line, or as much as there is; `None` if there is nothing. Ctrl-D ends a file.
pub fn take(room: usize) -> Option<alloc::vec::Vec<u8>> {
    const END: u8 = 4;
    let mut input = INPUT.lock();
    if input.is_empty() {
        return None;
    }
    let mut line = alloc::vec::Vec::new();
    while line.len() < room {
        match input.pop_front() {
            Some(END) | None => break,
            Some(byte) => line.push(byte),
        }
        if line.last() == Some(&b'\n') {
            break;
        }
    }
    Some(line)
}
