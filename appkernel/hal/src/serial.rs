//! First serial port: the log, and the console of programs.

use core::fmt;

use crate::cpu::{inb, outb};

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
const DATA_READY: u8 = 1;
const CAN_SEND: u8 = 0x20;

/// Writes to the port.
#[derive(Debug)]
pub struct Serial;

impl Serial {
    /// Lets the port interrupt when a byte arrives.
    pub fn enable_input() {
        // SAFETY: the port's own registers: interrupt enable, modem control (OUT2 lets it through).
        unsafe {
            outb(PORT + 1, 1);
            outb(PORT + 4, 0x0b);
        }
    }

    /// Writes bytes as they are.
    pub fn put(bytes: &[u8]) {
        for byte in bytes {
            // SAFETY: the port's registers. Bounded: a port that never gets ready loses bytes and
            // does not stop the kernel.
            unsafe {
                for _ in 0..100_000 {
                    if inb(LINE_STATUS) & CAN_SEND != 0 {
                        break;
                    }
                }
                outb(PORT, *byte);
            }
        }
    }

    /// A byte that arrived.
    pub fn get() -> Option<u8> {
        // SAFETY: the port's registers.
        unsafe { (inb(LINE_STATUS) & DATA_READY != 0).then(|| inb(PORT)) }
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.split_inclusive('\n') {
            match piece.strip_suffix('\n') {
                Some(line) => {
                    Self::put(line.as_bytes());
                    Self::put(b"\r\n");
                }
                None => Self::put(piece.as_bytes()),
            }
        }
        Ok(())
    }
}
