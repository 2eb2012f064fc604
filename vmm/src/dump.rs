//! An ELF core of the guest: registers of each vCPU and all memory it has touched.
//!
//! Memory appears three times over the same bytes of the file, so that addresses a kernel
//! developer has at hand resolve without walking page tables: at Linux' direct map, at the
//! kernel's text mapping (our kernel is built without KASLR), and by physical address in
//! `p_paddr`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};

use crate::error::VmError;
use crate::vm::Vm;

const DIRECT_MAP: u64 = 0xFFFF_8880_0000_0000;
const KERNEL_MAP: u64 = 0xFFFF_FFFF_8000_0000;
/// The kernel's text mapping covers this much physical memory.
const KERNEL_MAP_BYTES: u64 = 1 << 30;

const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;
/// `struct elf_prstatus` on x86-64: 27 registers start at byte 112.
const PRSTATUS_BYTES: usize = 336;
const PRSTATUS_REGS: usize = 112;
const PRSTATUS_PID: usize = 32;
const PAGE: u64 = 4096;

struct Segment {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    size: u64,
}

pub(crate) fn write_core(vm: &Vm, path: &Path) -> Result<(), VmError> {
    let mut notes = Vec::new();
    for vcpu in vm.vcpus().iter() {
        let (regs, sregs) = vcpu.call(|fd| (fd.get_regs(), fd.get_sregs()))?;
        let regs = regs.map_err(VmError::kvm("KVM_GET_REGS"))?;
        let sregs = sregs.map_err(VmError::kvm("KVM_GET_SREGS"))?;
        push_note(&mut notes, &prstatus(vcpu.index, &regs, &sregs));
    }
    let io = |source| VmError::File {
        what: "core",
        path: path.into(),
        source,
    };
    // Guest memory holds secrets: nobody else may read the file.
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io)?;
    write_to(vm, &mut file, &notes).map_err(|error| {
        let _ = std::fs::remove_file(path);
        io(error)
    })
}

fn write_to(vm: &Vm, file: &mut File, notes: &[u8]) -> io::Result<()> {
    let memory = vm.memory.mmap();
    let regions: Vec<_> = memory
        .iter()
        .map(|region| {
            let in_file = region.file_offset().map_or(0, |f| f.start());
            (region.start_addr().0, region.len(), in_file)
        })
        .collect();
    let headers = 1 + regions.len() * 2;
    let notes_at = 64 + 56 * headers as u64;
    let memory_at = (notes_at + notes.len() as u64).next_multiple_of(PAGE);

    let mut segments = vec![Segment {
        kind: PT_NOTE,
        offset: notes_at,
        vaddr: 0,
        paddr: 0,
        size: notes.len() as u64,
    }];
    for (start, len, in_file) in &regions {
        segments.push(Segment {
            kind: PT_LOAD,
            offset: memory_at + in_file,
            vaddr: DIRECT_MAP + start,
            paddr: *start,
            size: *len,
        });
    }
    for (start, len, in_file) in &regions {
        segments.push(Segment {
            kind: PT_LOAD,
            offset: memory_at + in_file,
            vaddr: KERNEL_MAP.wrapping_add(*start),
            paddr: *start,
            // Regions above the mapping keep an empty entry.
            size: KERNEL_MAP_BYTES.saturating_sub(*start).min(*len),
        });
    }

    let mut head = Vec::with_capacity(notes_at as usize);
    head.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    head.extend_from_slice(&ET_CORE.to_le_bytes());
    head.extend_from_slice(&EM_X86_64.to_le_bytes());
    head.extend_from_slice(&1u32.to_le_bytes());
    head.extend_from_slice(&0u64.to_le_bytes());
    head.extend_from_slice(&64u64.to_le_bytes());
    head.extend_from_slice(&0u64.to_le_bytes());
    head.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, headers as u16, 0, 0, 0] {
        head.extend_from_slice(&half.to_le_bytes());
    }
    for segment in &segments {
        head.extend_from_slice(&segment.kind.to_le_bytes());
        head.extend_from_slice(&7u32.to_le_bytes());
        for word in [
            segment.offset,
            segment.vaddr,
            segment.paddr,
            segment.size,
            segment.size,
            if segment.kind == PT_LOAD { PAGE } else { 4 },
        ] {
            head.extend_from_slice(&word.to_le_bytes());
        }
    }
    file.write_all(&head)?;
    file.write_all(notes)?;
    // With what was added to it.
    let size = vm.memory.size() + vm.memory.room().map_or(0, |(_, bytes)| bytes);
    file.set_len(memory_at + size)?;
    copy_touched(vm.memory.file(), file, memory_at, size)
}

/// Copies the parts of the memfd that exist; the rest of the core stays a hole.
fn copy_touched(from: &File, to: &File, at: u64, size: u64) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut position = 0;
    while position < size {
        let Some(data) = seek(from, position, libc::SEEK_DATA)? else {
            break;
        };
        let end = seek(from, data, libc::SEEK_HOLE)?.unwrap_or(size).min(size);
        position = data;
        while position < end {
            let want = buffer.len().min((end - position) as usize);
            let got = from.read_at(&mut buffer[..want], position)?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&buffer[..got], at + position)?;
            position += got as u64;
        }
    }
    Ok(())
}

fn seek(file: &File, position: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: plain lseek on an open descriptor.
    let found = unsafe { libc::lseek(file.as_raw_fd(), position as libc::off_t, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            // No data after this point.
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

fn push_note(notes: &mut Vec<u8>, body: &[u8]) {
    for word in [5, body.len() as u32, NT_PRSTATUS] {
        notes.extend_from_slice(&word.to_le_bytes());
    }
    notes.extend_from_slice(b"CORE\0\0\0\0");
    notes.extend_from_slice(body);
    notes.resize(notes.len().next_multiple_of(4), 0);
}

/// `struct elf_prstatus` with the order of `struct user_regs_struct`.
fn prstatus(vcpu: u8, regs: &kvm_regs, sregs: &kvm_sregs) -> Vec<u8> {
    let mut body = vec![0; PRSTATUS_BYTES];
    let pid = u32::from(vcpu) + 1;
    body[PRSTATUS_PID..PRSTATUS_PID + 4].copy_from_slice(&pid.to_le_bytes());
    let values = [
        regs.r15,
        regs.r14,
        regs.r13,
        regs.r12,
        regs.rbp,
        regs.rbx,
        regs.r11,
        regs.r10,
        regs.r9,
        regs.r8,
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        u64::MAX,
        regs.rip,
        u64::from(sregs.cs.selector),
        regs.rflags,
        regs.rsp,
        u64::from(sregs.ss.selector),
        sregs.fs.base,
        sregs.gs.base,
        u64::from(sregs.ds.selector),
        u64::from(sregs.es.selector),
        u64::from(sregs.fs.selector),
        u64::from(sregs.gs.selector),
    ];
    for (slot, value) in body[PRSTATUS_REGS..].chunks_exact_mut(8).zip(values) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    body
}
