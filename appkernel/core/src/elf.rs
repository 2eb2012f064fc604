//! ELF programs. The file is hostile: whatever its numbers say, reading them is safe, and what is
//! not a program of this machine is refused as Linux refuses it.

use alloc::vec::Vec;

use crate::errno::Errno;

/// Bytes of the file header.
pub const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Linux refuses tables larger than a page's worth too (64 KiB there).
const MAX_SEGMENTS: u16 = 64;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const USER_END: u64 = 0x7fff_ffff_f000;
const PAGE: u64 = 4096;

/// What the file header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// First instruction, before relocation.
    pub entry: u64,
    /// May be put at any address.
    pub relocatable: bool,
    /// Where the table of segments lies in the file.
    pub table_offset: u64,
    /// Its entries.
    pub count: u16,
}

/// A part of the file that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Address, before relocation.
    pub address: u64,
    /// Place in the file.
    pub offset: u64,
    /// Bytes from the file.
    pub file_bytes: u64,
    /// Bytes in memory; the rest is zeros.
    pub memory_bytes: u64,
    /// Readable 4, writable 2, executable 1.
    pub flags: u32,
}

/// The segments of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    /// To be mapped, in ascending order of addresses.
    pub load: Vec<Segment>,
    /// Place and bytes of the dynamic loader's name in the file.
    pub interpreter: Option<(u64, u64)>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Header {
    /// Reads the file header.
    ///
    /// # Errors
    /// `ENOEXEC` if it is not a program for this machine.
    pub fn parse(bytes: &[u8]) -> Result<Self, Errno> {
        // As Linux: neither class nor byte order are looked at, the machine says it all.
        let ident = [0x7f, b'E', b'L', b'F'];
        let header = Self {
            entry: u64_at(bytes, 24),
            relocatable: u16_at(bytes, 16) == ET_DYN,
            table_offset: u64_at(bytes, 32),
            count: u16_at(bytes, 56),
        };
        if bytes.len() < HEADER
            || !bytes.starts_with(&ident)
            || !matches!(u16_at(bytes, 16), ET_EXEC | ET_DYN)
            || u16_at(bytes, 18) != MACHINE_X86_64
            || usize::from(u16_at(bytes, 54)) != PROGRAM_HEADER
            || header.count == 0
            || header.count > MAX_SEGMENTS
        {
            return Err(Errno::ENOEXEC);
        }
        Ok(header)
    }

    /// Bytes of the table of segments.
    pub fn table_bytes(&self) -> usize {
        usize::from(self.count) * PROGRAM_HEADER
    }
}

impl Segments {
    /// Reads the table of segments.
    ///
    /// # Errors
    /// `ENOEXEC` if it holds nothing to map, or what cannot be mapped.
    pub fn parse(table: &[u8]) -> Result<Self, Errno> {
        let mut segments = Self::default();
        let mut end = 0;
        for entry in table.chunks_exact(PROGRAM_HEADER) {
            let segment = Segment {
                flags: u32_at(entry, 4),
                offset: u64_at(entry, 8),
                address: u64_at(entry, 16),
                file_bytes: u64_at(entry, 32),
                memory_bytes: u64_at(entry, 40),
            };
            match u32_at(entry, 0) {
                PT_LOAD if segment.memory_bytes > 0 => {
                    let last = segment
                        .address
                        .checked_add(segment.memory_bytes)
                        .filter(|last| *last <= USER_END)
                        .ok_or(Errno::ENOEXEC)?;
                    if segment.address < end
                        || segment.file_bytes > segment.memory_bytes
                        || segment.offset % PAGE != segment.address % PAGE
                        || segment.offset.checked_add(segment.file_bytes).is_none()
                    {
                        return Err(Errno::ENOEXEC);
                    }
                    end = last;
                    segments.load.push(segment);
                }
                PT_INTERP => segments.interpreter = Some((segment.offset, segment.file_bytes)),
                _ => {}
            }
        }
        if segments.load.is_empty() {
            return Err(Errno::ENOEXEC);
        }
        Ok(segments)
    }

    /// Address the table of segments has in memory, before relocation.
    pub fn table_address(&self, header: &Header) -> u64 {
        self.load
            .iter()
            .find(|s| {
                (s.offset..s.offset.saturating_add(s.file_bytes)).contains(&header.table_offset)
            })
            .map_or(0, |s| s.address + (header.table_offset - s.offset))
    }

    /// First and last address, rounded to pages.
    pub fn extent(&self) -> (u64, u64) {
        let start = self.load.first().map_or(0, |s| s.address & !(PAGE - 1));
        let end = self.load.last().map_or(0, |s| s.address + s.memory_bytes);
        (start, end.next_multiple_of(PAGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> (Vec<u8>, Header) {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let header = Header::parse(&program).unwrap();
        (program, header)
    }

    #[test]
    fn this_test_is_a_program() {
        let (program, header) = own();
        assert!(header.relocatable);
        let at = header.table_offset as usize;
        let segments = Segments::parse(&program[at..at + header.table_bytes()]).unwrap();
        let (offset, len) = segments.interpreter.unwrap();
        let name = &program[offset as usize..(offset + len) as usize];
        assert!(name.starts_with(b"/lib64/ld-linux"));
        assert_eq!(segments.table_address(&header), header.table_offset);
        assert!(segments.load.iter().any(|s| s.flags & 1 != 0));
    }

    #[test]
    fn no_lie_in_a_header_does_harm() {
        let (program, header) = own();
        let at = header.table_offset as usize;
        let table = program[at..at + header.table_bytes()].to_vec();
        for i in 0..table.len() {
            for value in [0, 0x7f, 0xff] {
                let mut bad = table.clone();
                bad[i] = value;
                if let Ok(segments) = Segments::parse(&bad) {
                    let (start, end) = segments.extent();
                    assert!(start < end && end <= USER_END, "byte {i} = {value}");
                }
            }
        }
        for i in 0..HEADER {
            let mut bad = program[..HEADER].to_vec();
            bad[i] ^= 0xff;
            let _ = Header::parse(&bad);
        }
        assert_eq!(Header::parse(&program[..63]), Err(Errno::ENOEXEC));
        assert_eq!(Header::parse(b"#!/bin/sh"), Err(Errno::ENOEXEC));
        assert_eq!(Segments::parse(&[0; 56]), Err(Errno::ENOEXEC));
    }
}
