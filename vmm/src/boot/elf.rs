//! What is read of an ELF kernel before it is loaded.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use super::read_up_to;
use crate::error::VmError;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const MACHINE_X86_64: u64 = 62;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// Notes of a kernel are some hundred bytes; more is not read.
const NOTES_MAX: u64 = 64 << 10;

/// What the headers of an ELF kernel say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Headers {
    /// Physical address of the entry point.
    pub(super) entry: u64,
    /// A note tells that this is Linux, so the entry point takes Linux' boot parameters.
    pub(super) is_linux: bool,
}

/// Reads the headers; leaves `file` at its start.
///
/// # Errors
/// Another machine's file, or a segment that reaches past the end of the file: a truncated copy
/// would otherwise boot into zeros and triple-fault.
pub(super) fn read(file: &mut File, path: &Path) -> Result<Headers, VmError> {
    let headers = scan(file, path);
    file.seek(SeekFrom::Start(0)).map_err(io(path))?;
    headers
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> VmError {
    |source| VmError::File {
        what: "kernel",
        path: path.into(),
        source,
    }
}

fn scan(file: &mut File, path: &Path) -> Result<Headers, VmError> {
    let bad = |reason: &str| VmError::BadFile {
        what: "kernel",
        path: path.into(),
        reason: reason.into(),
    };
    let io = io(path);
    let len = file.metadata().map_err(&io)?.len();
    let mut header = [0u8; HEADER];
    if read_up_to(file, &mut header).map_err(&io)? < header.len() {
        return Err(bad("is truncated: its ELF header is incomplete"));
    }
    let (table, size, count) = (
        number(&header, 32, 8),
        number(&header, 54, 2),
        number(&header, 56, 2),
    );
    if number(&header, 18, 2) != MACHINE_X86_64 || size < PROGRAM_HEADER as u64 {
        return Err(bad("is an ELF file, but not for x86-64"));
    }
    let mut is_linux = false;
    for index in 0..count {
        let at = table.saturating_add(index * size);
        let mut entry = [0u8; PROGRAM_HEADER];
        file.seek(SeekFrom::Start(at)).map_err(&io)?;
        if read_up_to(file, &mut entry).map_err(&io)? < entry.len() {
            return Err(bad("is truncated: its program headers are incomplete"));
        }
        let kind = number(&entry, 0, 4);
        let (offset, bytes) = (number(&entry, 8, 8), number(&entry, 32, 8));
        if kind == PT_LOAD && offset.saturating_add(bytes) > len {
            return Err(bad(
                "is truncated: a segment reaches past the end of the file",
            ));
        }
        if kind == PT_NOTE {
            let mut notes = vec![0u8; bytes.min(NOTES_MAX) as usize];
            file.seek(SeekFrom::Start(offset)).map_err(&io)?;
            let got = read_up_to(file, &mut notes).map_err(&io)?;
            is_linux |= has_note_of(notes.get(..got).unwrap_or_default(), b"Linux\0");
        }
    }
    Ok(Headers {
        entry: number(&header, 24, 8),
        is_linux,
    })
}

/// Little-endian number of `size` bytes at `at`, which lie inside of a header of fixed size.
fn number(header: &[u8], at: usize, size: usize) -> u64 {
    header[at..at + size]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Whether one of the notes has that owner.
fn has_note_of(mut notes: &[u8], owner: &[u8]) -> bool {
    while let Some((head, rest)) = notes.split_first_chunk::<12>() {
        let name = number(head, 0, 4) as usize;
        let padded = |n: usize| n.saturating_add(3) & !3;
        if rest.get(..name) == Some(owner) {
            return true;
        }
        let next = padded(name).saturating_add(padded(number(head, 4, 4) as usize));
        notes = rest.get(next..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_walked_and_lies_about_lengths_end_the_walk() {
        let mut notes = Vec::new();
        for (owner, data) in [(&b"GNU\0"[..], &[1u8; 20][..]), (b"Linux\0", b"x")] {
            notes.extend((owner.len() as u32).to_le_bytes());
            notes.extend((data.len() as u32).to_le_bytes());
            notes.extend(3u32.to_le_bytes());
            notes.extend(owner);
            notes.resize(notes.len().next_multiple_of(4), 0);
            notes.extend(data);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        assert!(has_note_of(&notes, b"Linux\0"));
        assert!(!has_note_of(&notes, b"Xen\0"));
        notes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(!has_note_of(&notes, b"Linux\0"));
        assert!(!has_note_of(&notes[..30], b"Linux\0"));
    }
}
