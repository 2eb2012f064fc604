//! Loading a kernel and handing over to it.
//!
//! Two ways in, chosen from the file: Linux, as ELF or as bzImage, starts in long mode with its
//! boot parameters ("64-bit boot protocol"); any other ELF kernel with a PVH note starts in 32-bit
//! protected mode with an `hvm_start_info`. Linux has that note too, but its PVH entry looks for
//! Xen at 256 CPUID leaves, an exit each: about a seventh of all exits of a boot.

mod acpi;
mod elf;
mod linux64;
mod mptable;
mod pvh;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::config::VmConfig;
use crate::error::VmError;
use crate::layout;
use crate::memory::VmMemory;

pub(crate) use linux64::GDT as LINUX64_GDT;

/// How the boot vCPU enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode, EBX points to the start info.
    Pvh {
        /// Physical address of the first instruction.
        address: u64,
    },
    /// Long mode with identity mapping, RSI points to the boot parameters.
    Linux64 {
        /// Address of the first instruction.
        address: u64,
    },
}

/// What was loaded, for `inspect` and for pre-faulting.
#[derive(Clone, Copy, Debug)]
pub struct Loaded {
    /// Where to enter.
    pub entry: Entry,
    /// Guest physical range of the kernel image (start, end).
    pub kernel: (u64, u64),
    /// Guest physical range of the initramfs.
    pub initramfs: Option<(u64, u64)>,
}

/// Where a virtio-mmio device is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VirtioPlace {
    /// Guest physical address of its registers.
    pub(crate) address: u64,
    /// Its interrupt line.
    pub(crate) irq: u32,
}

/// Loads kernel, initramfs, command line and boot tables, which tell of the devices in `virtio`.
///
/// # Errors
/// Names the file that is missing, unreadable, not a kernel, or too large for the memory.
pub(crate) fn load(
    memory: &VmMemory,
    config: &VmConfig,
    cmdline: &str,
    virtio: &[VirtioPlace],
) -> Result<Loaded, VmError> {
    let (result, elf) = load_kernel(memory, &config.kernel)?;
    let kernel = (result.kernel_load.raw_value(), result.kernel_end);
    let initramfs = config
        .initramfs
        .as_deref()
        .map(|path| load_initramfs(memory, path, kernel.1))
        .transpose()?;

    if cmdline.len() + 1 > layout::CMDLINE_MAX {
        return Err(VmError::Config {
            what: "cmdline",
            reason: format!(
                "{} bytes are longer than the kernel takes ({}): shorten it or use fewer devices",
                cmdline.len(),
                layout::CMDLINE_MAX - 1
            ),
        });
    }
    if cmdline.bytes().any(|b| b == 0) {
        return Err(VmError::Config {
            what: "cmdline",
            reason: "holds a zero byte".into(),
        });
    }
    memory.put(layout::CMDLINE_ADDR, cmdline.as_bytes())?;
    memory.put(layout::CMDLINE_ADDR + cmdline.len() as u64, &[0])?;
    let mut lines = vec![layout::SERIAL_IRQ];
    lines.extend(virtio.iter().map(|place| place.irq));
    memory.put(
        layout::MPTABLE_ADDR,
        &mptable::build(config.most_vcpus(), &lines),
    )?;
    memory.put(layout::ACPI_ADDR, &acpi::build(config.most_vcpus(), virtio))?;

    let entry = match (elf, result.pvh_boot_cap) {
        (Some(elf), PvhBootCapability::PvhEntryPresent(address)) if !elf.is_linux => {
            pvh::write(memory, initramfs)?;
            Entry::Pvh {
                address: address.raw_value(),
            }
        }
        (elf, _) => {
            linux64::write(memory, initramfs, cmdline.len(), result.setup_header)?;
            // 64-bit entry of a bzImage: 0x200 past the start of its protected-mode part. An ELF
            // file's "start" is whatever it claims to be.
            let address = elf.map_or_else(|| kernel.0.saturating_add(0x200), |elf| elf.entry);
            if !(kernel.0..kernel.1).contains(&address) {
                return Err(VmError::BadFile {
                    what: "kernel",
                    path: config.kernel.clone(),
                    reason: format!("its entry point {address:#x} is outside of it"),
                });
            }
            Entry::Linux64 { address }
        }
    };
    Ok(Loaded {
        entry,
        kernel,
        initramfs,
    })
}

/// Tries to load a kernel into a throw-away memory of `memory_mib` MiB: tells whether a file is a
/// kernel this VM can boot, without KVM.
///
/// # Errors
/// As for a VM that is built with it.
pub fn try_load(kernel: &Path, memory_mib: u64) -> Result<(), VmError> {
    let memory = VmMemory::new(memory_mib, false)?;
    let config = VmConfig {
        kernel: kernel.into(),
        memory_mib,
        ..VmConfig::default()
    };
    load(&memory, &config, "", &[]).map(|_| ())
}

fn open(what: &'static str, path: &Path) -> Result<File, VmError> {
    let file = File::open(path).map_err(|source| VmError::File {
        what,
        path: path.into(),
        source,
    })?;
    let metadata = file.metadata().map_err(|source| VmError::File {
        what,
        path: path.into(),
        source,
    })?;
    if !metadata.is_file() {
        return Err(VmError::BadFile {
            what,
            path: path.into(),
            reason: "is not a regular file".into(),
        });
    }
    Ok(file)
}

/// The kernel, and what its ELF headers say if it has any.
fn load_kernel(
    memory: &VmMemory,
    path: &Path,
) -> Result<(KernelLoaderResult, Option<elf::Headers>), VmError> {
    let bad = |reason: String| VmError::BadFile {
        what: "kernel",
        path: path.into(),
        reason,
    };
    let mut file = open("kernel", path)?;
    let mut head = [0; 0x206];
    let got = read_up_to(&mut file, &mut head).map_err(|source| VmError::File {
        what: "kernel",
        path: path.into(),
        source,
    })?;
    file.seek(SeekFrom::Start(0))
        .map_err(|source| VmError::File {
            what: "kernel",
            path: path.into(),
            source,
        })?;
    let high = Some(GuestAddress(layout::HIGH_RAM_START));
    let head = &head[..got];
    if head.starts_with(b"\x7fELF") {
        let headers = elf::read(&mut file, path)?;
        let result = Elf::load(memory.mmap(), None, &mut file, high).map_err(|e| {
            bad(format!(
                "is not an x86-64 kernel this VM can boot ({e}): is it truncated, or is the VM's \
                 memory ({} MiB) too small for it?",
                memory.size() >> 20
            ))
        })?;
        Ok((result, Some(headers)))
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        check_bzimage_extent(&file, head, path)?;
        let result = BzImage::load(memory.mmap(), None, &mut file, high).map_err(|e| {
            bad(format!(
                "is not a bzImage this VM can boot ({e}): is the VM's memory ({} MiB) too small \
                 for it?",
                memory.size() >> 20
            ))
        })?;
        Ok((result, None))
    } else {
        Err(bad(
            "is neither an ELF kernel (vmlinux) nor a bzImage: give one of these".into(),
        ))
    }
}

/// Refuses a bzImage that is shorter than its header says (boot protocol: `setup_sects`,
/// `syssize`).
fn check_bzimage_extent(file: &File, head: &[u8], path: &Path) -> Result<(), VmError> {
    let len = file
        .metadata()
        .map_err(|source| VmError::File {
            what: "kernel",
            path: path.into(),
            source,
        })?
        .len();
    let setup_sects = match head.get(0x1F1).copied().unwrap_or(0) {
        0 => 4,
        n => u64::from(n),
    };
    let syssize = head.get(0x1F4..0x1F8).map_or(0, |b| {
        u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    });
    if (setup_sects + 1) * 512 + syssize * 16 > len + 15 {
        return Err(VmError::BadFile {
            what: "kernel",
            path: path.into(),
            reason: format!(
                "is truncated: its header announces {} bytes, the file has {len}",
                (setup_sects + 1) * 512 + syssize * 16
            ),
        });
    }
    Ok(())
}

fn load_initramfs(memory: &VmMemory, path: &Path, kernel_end: u64) -> Result<(u64, u64), VmError> {
    let mut file = open("initramfs", path)?;
    let io = |source| VmError::File {
        what: "initramfs",
        path: path.into(),
        source,
    };
    let len = file.metadata().map_err(io)?.len();
    // As high as possible, but below 2 GiB, the limit every kernel takes.
    let top = memory.low_end().min(0x7FFF_F000);
    let start = top
        .checked_sub(len)
        .map(|start| start & !0xFFF)
        .filter(|start| *start >= kernel_end.saturating_add(1 << 20))
        .ok_or_else(|| VmError::BadFile {
            what: "initramfs",
            path: path.into(),
            reason: format!(
                "{} MiB do not fit beside the kernel in {} MiB of memory: give the VM more",
                len.div_ceil(1 << 20),
                memory.size() >> 20
            ),
        })?;
    memory
        .mmap()
        .read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
        .map_err(|e| VmError::BadFile {
            what: "initramfs",
            path: path.into(),
            reason: format!("cannot be read into guest memory: {e}"),
        })?;
    Ok((start, start + len))
}

/// Reads until `buffer` is full or the file ends.
fn read_up_to(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn refused(content: &[u8]) -> String {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let memory = VmMemory::new(64, false).unwrap();
        load_kernel(&memory, file.path()).unwrap_err().to_string()
    }

    #[test]
    fn names_what_is_wrong_with_a_kernel() {
        assert!(refused(b"#!/bin/sh\n").contains("neither an ELF kernel"));
        assert!(refused(b"").contains("neither an ELF kernel"));
        assert!(refused(b"\x7fELF").contains("truncated"));
        let mut elf = vec![0u8; 64];
        elf[..4].copy_from_slice(b"\x7fELF");
        elf[18] = 40;
        assert!(refused(&elf).contains("not for x86-64"));
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        assert!(refused(&elf).contains("program headers are incomplete"));
        let mut segment = vec![0u8; 56];
        segment[0] = 1;
        segment[32] = 200;
        elf.extend_from_slice(&segment);
        assert!(refused(&elf).contains("reaches past the end"));
        let mut bz = vec![0u8; 0x400];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        bz[0x1F5] = 1;
        assert!(refused(&bz).contains("is truncated"));
    }

    #[test]
    fn an_entry_point_at_the_end_of_the_address_space_is_refused() {
        let mut elf = vec![0u8; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16] = 2;
        elf[18] = 62;
        elf[20] = 1;
        elf[24..32].copy_from_slice(&(u64::MAX - 0xff).to_le_bytes());
        elf[32] = 64;
        elf[54] = 56;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&elf).unwrap();
        let error = try_load(file.path(), 64).unwrap_err().to_string();
        assert!(error.contains("entry point"), "{error}");
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let memory = VmMemory::new(16, false).unwrap();
        let error = load_kernel(&memory, Path::new("/no/such/kernel")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel /no/such/kernel: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn an_initramfs_must_leave_room_for_the_kernel() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(15 << 20).unwrap();
        let memory = VmMemory::new(16, false).unwrap();
        let error = load_initramfs(&memory, file.path(), 0x10_0000).unwrap_err();
        assert!(error.to_string().contains("give the VM more"), "{error}");
        let memory = VmMemory::new(64, false).unwrap();
        let (start, end) = load_initramfs(&memory, file.path(), 0x10_0000).unwrap();
        assert_eq!((end - start, start % 4096), (15 << 20, 0));
    }
}
