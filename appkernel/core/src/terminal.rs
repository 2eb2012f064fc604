//! The line discipline of terminals (termios(3)): what becomes of the bytes that are typed, and of
//! those that programs write.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// Input flags.
mod input {
    pub const INLCR: u32 = 0o100;
    pub const IGNCR: u32 = 0o200;
    pub const ICRNL: u32 = 0o400;
}
/// Output flags.
mod output {
    pub const OPOST: u32 = 1;
    pub const ONLCR: u32 = 4;
}
/// Local flags.
mod local {
    pub const ISIG: u32 = 1;
    pub const ICANON: u32 = 2;
    pub const ECHO: u32 = 0o10;
    pub const ECHOE: u32 = 0o20;
    pub const ECHOK: u32 = 0o40;
    pub const ECHONL: u32 = 0o100;
    pub const NOFLSH: u32 = 0o200;
    pub const ECHOCTL: u32 = 0o1000;
    pub const IEXTEN: u32 = 0o100_000;
}
/// Places of control characters.
mod control {
    pub const INTR: usize = 0;
    pub const QUIT: usize = 1;
    pub const ERASE: usize = 2;
    pub const KILL: usize = 3;
    pub const EOF: usize = 4;
    pub const MIN: usize = 6;
    pub const SUSP: usize = 10;
    pub const EOL: usize = 11;
    pub const WERASE: usize = 14;
    pub const LNEXT: usize = 15;
}
const SIGINT: u8 = 2;
const SIGQUIT: u8 = 3;
const SIGTSTP: u8 = 20;
/// Longest line; what is typed beyond it is lost.
const MAX_LINE: usize = 4096;

/// What a typed byte does besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The programs in front get this signal.
    Signal(u8),
}

/// A terminal's settings, and the input that waits.
#[derive(Clone, Debug)]
pub struct Discipline {
    flags: [u32; 4],
    line_number: u8,
    control: [u8; 19],
    /// The line that is being edited.
    line: Vec<u8>,
    /// The next byte is taken as it is.
    literal: bool,
    /// Lines, or pieces without line editing. An empty one is the end of the file.
    ready: VecDeque<Vec<u8>>,
}

impl Default for Discipline {
    fn default() -> Self {
        Self {
            // ICRNL, IXON; OPOST, ONLCR; 38400 bit/s, 8 bits, receiver; the usual local ones.
            flags: [0o2400, 5, 0o277, 0o105_073],
            line_number: 0,
            control: [
                3, 28, 127, 21, 4, 0, 1, 0, 17, 19, 26, 0, 18, 15, 23, 22, 0, 0, 0,
            ],
            line: Vec::new(),
            literal: false,
            ready: VecDeque::new(),
        }
    }
}

impl Discipline {
    /// Bytes of the settings as programs see them (the kernel's `struct termios`).
    pub const SETTINGS: usize = 36;

    /// The settings.
    pub fn settings(&self) -> [u8; Self::SETTINGS] {
        let mut bytes = [0; Self::SETTINGS];
        for (slot, flags) in bytes.chunks_exact_mut(4).zip(self.flags) {
            slot.copy_from_slice(&flags.to_le_bytes());
        }
        bytes[16] = self.line_number;
        bytes[17..].copy_from_slice(&self.control);
        bytes
    }

    /// Changes the settings.
    pub fn set(&mut self, bytes: &[u8; Self::SETTINGS]) {
        let was_canonical = self.has(local::ICANON);
        for (flags, slot) in self.flags.iter_mut().zip(bytes.chunks_exact(4)) {
            *flags = u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]);
        }
        self.line_number = bytes[16];
        self.control.copy_from_slice(&bytes[17..]);
        if was_canonical && !self.has(local::ICANON) && !self.line.is_empty() {
            let line = core::mem::take(&mut self.line);
            self.ready.push_back(line);
        }
    }

    fn has(&self, flag: u32) -> bool {
        self.flags[3] & flag != 0
    }

    fn is(&self, byte: u8, place: usize) -> bool {
        self.control[place] == byte && byte != 0
    }

    /// The character that ends a file.
    pub fn end_character(&self) -> u8 {
        self.control[control::EOF]
    }

    /// Bytes that wait, edited or not.
    pub fn waiting(&self) -> usize {
        self.line.len() + self.readable()
    }

    /// Bytes that can be read.
    pub fn readable(&self) -> usize {
        self.ready.iter().map(Vec::len).sum()
    }

    /// Whether the next read gives the end of the file.
    pub fn at_end(&self) -> bool {
        self.ready.front().is_some_and(Vec::is_empty)
    }

    /// Forgets what was typed.
    pub fn flush(&mut self) {
        self.line.clear();
        self.ready.clear();
    }

    fn echo(&self, byte: u8, output: &mut VecDeque<u8>) {
        let shown = self.has(local::ECHO) || byte == b'\n' && self.has(local::ECHONL);
        if !shown {
            return;
        }
        if self.has(local::ECHOCTL) && (byte < 32 || byte == 127) && !matches!(byte, b'\n' | b'\t')
        {
            output.extend([b'^', byte ^ 0x40]);
        } else {
            self.written(&[byte], output);
        }
    }

    fn erase(&mut self, output: &mut VecDeque<u8>) -> bool {
        // A character of more than one byte goes as a whole.
        let mut last = None;
        while let Some(byte) = self.line.pop() {
            last = Some(byte);
            if byte & 0xc0 != 0x80 {
                break;
            }
        }
        let Some(byte) = last else { return false };
        if self.has(local::ECHO) && self.has(local::ECHOE) {
            let columns = if byte < 32 && self.has(local::ECHOCTL) {
                2
            } else {
                1
            };
            for _ in 0..columns {
                output.extend(b"\x08 \x08");
            }
        }
        true
    }

    fn finish_line(&mut self) {
        let line = core::mem::take(&mut self.line);
        if self.ready.len() < MAX_LINE {
            self.ready.push_back(line);
        }
    }

    /// A byte is typed. What is echoed goes to `output`.
    pub fn typed(&mut self, byte: u8, output: &mut VecDeque<u8>) -> Effect {
        if core::mem::take(&mut self.literal) {
            self.echo(byte, output);
            self.keep(byte);
            return Effect::None;
        }
        let byte = match byte {
            b'\r' if self.flags[0] & input::IGNCR != 0 => return Effect::None,
            b'\r' if self.flags[0] & input::ICRNL != 0 => b'\n',
            b'\n' if self.flags[0] & input::INLCR != 0 => b'\r',
            byte => byte,
        };
        if self.has(local::ISIG) {
            for (place, signal) in [
                (control::INTR, SIGINT),
                (control::QUIT, SIGQUIT),
                (control::SUSP, SIGTSTP),
            ] {
                if self.is(byte, place) {
                    if !self.has(local::NOFLSH) {
                        self.flush();
                    }
                    self.echo(byte, output);
                    return Effect::Signal(signal);
                }
            }
        }
        if !self.has(local::ICANON) {
            self.echo(byte, output);
            self.keep(byte);
            return Effect::None;
        }
        if self.is(byte, control::ERASE) {
            self.erase(output);
        } else if self.is(byte, control::WERASE) && self.has(local::IEXTEN) {
            while self.line.last() == Some(&b' ') && self.erase(output) {}
            while self.line.last().is_some_and(|b| *b != b' ') && self.erase(output) {}
        } else if self.is(byte, control::KILL) {
            while self.erase(output) {}
            if self.has(local::ECHOK) && !self.has(local::ECHOE) {
                output.push_back(b'\n');
            }
        } else if self.is(byte, control::EOF) {
            self.finish_line();
        } else if self.is(byte, control::LNEXT) && self.has(local::IEXTEN) {
            self.literal = true;
        } else {
            self.echo(byte, output);
            self.keep(byte);
            if byte == b'\n' || self.is(byte, control::EOL) {
                self.finish_line();
            }
        }
        Effect::None
    }

    fn keep(&mut self, byte: u8) {
        if self.has(local::ICANON) {
            // The last place is for the end of the line.
            if self.line.len() < MAX_LINE - 1 || byte == b'\n' {
                self.line.push(byte);
            }
        } else if self.readable() < MAX_LINE {
            match self.ready.back_mut() {
                Some(piece) if !piece.is_empty() => piece.push(byte),
                _ => self.ready.push_back(alloc::vec![byte]),
            }
        }
    }

    /// What a read of `room` bytes gets; `None` if it has to wait.
    pub fn read(&mut self, room: usize) -> Option<Vec<u8>> {
        if room == 0 {
            return Some(Vec::new());
        }
        if self.has(local::ICANON) {
            let mut line = self.ready.pop_front()?;
            if line.len() > room {
                let rest = line.split_off(room);
                self.ready.push_front(rest);
            }
            return Some(line);
        }
        let mut bytes = Vec::new();
        while bytes.len() < room
            && let Some(mut piece) = self.ready.pop_front()
        {
            let taken = piece.len().min(room - bytes.len());
            let rest = piece.split_off(taken);
            bytes.extend(piece);
            if !rest.is_empty() {
                self.ready.push_front(rest);
            }
        }
        (!bytes.is_empty() || self.control[control::MIN] == 0).then_some(bytes)
    }

    /// A program writes.
    pub fn written(&self, bytes: &[u8], output: &mut VecDeque<u8>) {
        let lines = output::OPOST | output::ONLCR;
        if self.flags[1] & lines != lines {
            output.extend(bytes);
            return;
        }
        for byte in bytes {
            if *byte == b'\n' {
                output.push_back(b'\r');
            }
            output.push_back(*byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::String;

    use super::*;

    fn text(output: &mut VecDeque<u8>) -> String {
        let bytes: Vec<u8> = output.drain(..).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn type_all(discipline: &mut Discipline, text: &[u8]) -> (String, Vec<Effect>) {
        let mut output = VecDeque::new();
        let effects = text
            .iter()
            .map(|b| discipline.typed(*b, &mut output))
            .filter(|e| *e != Effect::None)
            .collect();
        (self::text(&mut output), effects)
    }

    #[test]
    fn lines_are_edited_and_echoed() {
        let mut d = Discipline::default();
        let (echo, _) = type_all(&mut d, b"helx\x7flo wrld\x17world\r");
        assert_eq!(d.read(100).unwrap(), b"hello world\n");
        assert!(
            echo.starts_with("helx\x08 \x08lo wrld\x08 \x08"),
            "{echo:?}"
        );
        assert!(echo.ends_with("world\r\n"), "{echo:?}");
        assert_eq!(d.read(100), None);
        type_all(&mut d, b"gone\x15ab\x04");
        assert_eq!(d.read(1).unwrap(), b"a");
        assert_eq!(d.read(1).unwrap(), b"b");
        type_all(&mut d, b"\x04");
        assert!(d.at_end());
        assert_eq!(d.read(10).unwrap(), b"");
    }

    #[test]
    fn control_characters_are_signals() {
        let mut d = Discipline::default();
        let (echo, effects) = type_all(&mut d, b"ab\x03");
        assert_eq!(effects, [Effect::Signal(SIGINT)]);
        assert_eq!(echo, "ab^C");
        assert_eq!(d.waiting(), 0);
    }

    #[test]
    fn raw_bytes_pass_at_once() {
        let mut d = Discipline::default();
        let mut settings = d.settings();
        settings[12..16].copy_from_slice(&0u32.to_le_bytes());
        settings[0..8].fill(0);
        d.set(&settings);
        assert_eq!(d.settings(), settings);
        let (echo, effects) = type_all(&mut d, b"\x03\r\x7f");
        assert!(echo.is_empty() && effects.is_empty());
        assert_eq!(d.read(2).unwrap(), b"\x03\r");
        assert_eq!(d.read(2).unwrap(), b"\x7f");
        assert_eq!(d.read(2), None);
        let mut output = VecDeque::new();
        d.written(b"a\n", &mut output);
        assert_eq!(text(&mut output), "a\n");
    }

    #[test]
    fn input_without_a_reader_is_bounded() {
        let mut d = Discipline::default();
        for _ in 0..10 * MAX_LINE {
            type_all(&mut d, b"x");
        }
        assert!(d.waiting() <= MAX_LINE);
    }
}
