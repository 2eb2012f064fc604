//! Requests: what they ask for and how it is done.

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Bytes, GuestMemoryMmap};

use super::device::Metrics;
use super::disk::{Disk, ID_LEN, SECTOR};
use crate::virtio::queue::{
    Buffers, pop_last_byte, push_iovecs, read_front, skip_front, total, write_front,
};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

pub(super) const S_OK: u8 = 0;
pub(super) const S_IOERR: u8 = 1;
pub(super) const S_UNSUPP: u8 = 2;

/// Length of a request's header.
const HEADER: usize = 16;
/// Length of one range in a discard or write-zeroes request.
const RANGE: usize = 16;

/// Data of one request, in bytes: bounds the time the device's thread is away for it.
pub(super) const MAX_BYTES: u64 = 32 << 20;
/// Ranges of a discard request.
pub(super) const MAX_DISCARD_RANGES: u32 = 16;
/// Sectors of one discarded range.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Ranges of a write-zeroes request.
pub(super) const MAX_ZERO_RANGES: u32 = 1;
/// Sectors of a zeroed range: where the host cannot do it by itself, they are written.
pub(super) const MAX_ZERO_SECTORS: u32 = (MAX_BYTES / SECTOR) as u32;

static ZEROES: [u8; 16 << 10] = [0; 16 << 10];

/// How a request failed.
enum Failure {
    /// The request makes no sense or the host could not do it.
    Io,
    /// Not a request of this device.
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

/// Carries out the request in `buffers` and writes its status; returns the number of bytes written
/// to the guest's buffers.
pub(super) fn execute(
    disk: Option<&Disk>,
    mem: &GuestMemoryMmap<()>,
    buffers: &mut Buffers,
    iovecs: &mut Vec<libc::iovec>,
    write_through: bool,
    metrics: &mut Metrics,
) -> u32 {
    // The status is the last byte the device may write. Without it the request cannot be answered.
    let Some(status_at) = pop_last_byte(&mut buffers.writable) else {
        metrics.errors += 1;
        return 0;
    };
    let result = match disk {
        Some(disk) => run(disk, mem, buffers, iovecs, write_through, metrics),
        None => Err(Failure::Io),
    };
    let (status, written) = match result {
        Ok(written) => (S_OK, written),
        Err(failure) => {
            metrics.errors += 1;
            let status = match failure {
                Failure::Io => S_IOERR,
                Failure::Unsupported => S_UNSUPP,
            };
            (status, 0)
        }
    };
    match mem.write_slice(&[status], status_at) {
        Ok(()) => written + 1,
        Err(_) => 0,
    }
}

fn run(
    disk: &Disk,
    mem: &GuestMemoryMmap<()>,
    buffers: &mut Buffers,
    iovecs: &mut Vec<libc::iovec>,
    write_through: bool,
    metrics: &mut Metrics,
) -> Result<u32, Failure> {
    let mut header = [0; HEADER];
    // Drivers may lay a request out over buffers as they like (virtio 1.2, 2.7.4).
    if read_front(mem, &buffers.readable, &mut header) != HEADER
        || !skip_front(&mut buffers.readable, HEADER as u64)
    {
        return Err(Failure::Io);
    }
    let [a, b, c, d, .., s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let kind = u32::from_le_bytes([a, b, c, d]);
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let writes = matches!(kind, T_OUT | T_DISCARD | T_WRITE_ZEROES);
    if writes && disk.read_only {
        return Err(Failure::Io);
    }
    match kind {
        T_IN => {
            let count = total(&buffers.writable);
            transfer(disk, mem, sector, count, &buffers.writable, iovecs, false)?;
            metrics.reads += 1;
            metrics.read_bytes += count;
            Ok(count as u32)
        }
        T_OUT => {
            let count = total(&buffers.readable);
            transfer(disk, mem, sector, count, &buffers.readable, iovecs, true)?;
            if write_through {
                disk.file.sync_data()?;
            }
            metrics.writes += 1;
            metrics.write_bytes += count;
            Ok(0)
        }
        T_FLUSH => {
            if !disk.read_only {
                disk.file.sync_data()?;
            }
            metrics.flushes += 1;
            Ok(0)
        }
        T_GET_ID => {
            if total(&buffers.writable) < ID_LEN as u64 {
                return Err(Failure::Io);
            }
            Ok(write_front(mem, &buffers.writable, &disk.id) as u32)
        }
        T_DISCARD | T_WRITE_ZEROES => {
            ranges(disk, mem, buffers, kind == T_DISCARD)?;
            if write_through {
                disk.file.sync_data()?;
            }
            metrics.discards += 1;
            Ok(0)
        }
        _ => Err(Failure::Unsupported),
    }
}

/// Moves data between the disk and guest memory, without a copy in between.
fn transfer(
    disk: &Disk,
    mem: &GuestMemoryMmap<()>,
    sector: u64,
    count: u64,
    segments: &[crate::virtio::queue::Segment],
    iovecs: &mut Vec<libc::iovec>,
    write: bool,
) -> Result<(), Failure> {
    if !count.is_multiple_of(SECTOR) || count > MAX_BYTES {
        return Err(Failure::Io);
    }
    let mut offset = disk.range(sector, count).ok_or(Failure::Io)?;
    iovecs.clear();
    let covered = push_iovecs(mem, segments, count, iovecs).map_err(|_| Failure::Io)?;
    let mut left = covered;
    let mut rest = iovecs.as_mut_slice();
    while left > 0 {
        let fd = disk.file.as_raw_fd();
        let parts = rest.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        // SAFETY: every entry lies within guest memory, which `mem` keeps mapped; the kernel's
        // copy may race with the guest, but no Rust reference to that memory exists.
        let n = unsafe {
            if write {
                libc::pwritev(fd, rest.as_ptr(), parts, offset as libc::off_t)
            } else {
                libc::preadv(fd, rest.as_ptr(), parts, offset as libc::off_t)
            }
        };
        match usize::try_from(n) {
            // The file has become shorter than the disk.
            Ok(0) => return Err(Failure::Io),
            Ok(n) => {
                offset += n as u64;
                left = left.saturating_sub(n as u64);
                rest = advance(rest, n);
            }
            Err(_) => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e.into());
                }
            }
        }
    }
    Ok(())
}

/// Leaves out the first `n` bytes.
fn advance(iovecs: &mut [libc::iovec], mut n: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    for iovec in iovecs.iter_mut() {
        if n < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(n).cast();
            iovec.iov_len -= n;
            break;
        }
        n -= iovec.iov_len;
        whole += 1;
    }
    &mut iovecs[whole..]
}

/// Discards or zeroes the ranges a request lists.
fn ranges(
    disk: &Disk,
    mem: &GuestMemoryMmap<()>,
    buffers: &mut Buffers,
    discard: bool,
) -> Result<(), Failure> {
    let (max_ranges, max_sectors) = if discard {
        (MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS)
    } else {
        (MAX_ZERO_RANGES, MAX_ZERO_SECTORS)
    };
    let len = total(&buffers.readable);
    let count = len / RANGE as u64;
    if !len.is_multiple_of(RANGE as u64) || count == 0 || count > u64::from(max_ranges) {
        return Err(Failure::Io);
    }
    for _ in 0..count {
        let mut range = [0; RANGE];
        if read_front(mem, &buffers.readable, &mut range) != RANGE {
            return Err(Failure::Io);
        }
        skip_front(&mut buffers.readable, RANGE as u64);
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            n0,
            n1,
            n2,
            n3,
            f0,
            f1,
            f2,
            f3,
        ] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // Bit 0 is "unmap", of which a discard knows nothing (5.2.6.2).
        if flags > u32::from(!discard) {
            return Err(Failure::Unsupported);
        }
        if sectors > max_sectors {
            return Err(Failure::Io);
        }
        let bytes = u64::from(sectors) * SECTOR;
        let start = disk.range(sector, bytes).ok_or(Failure::Io)?;
        if bytes == 0 {
            continue;
        }
        if discard {
            match punch(disk, start, bytes) {
                // A discard is a hint; a host that cannot use it has nothing to do.
                Err(e) if unsupported(&e) => {}
                other => other?,
            }
        } else {
            zero(disk, start, bytes, flags & 1 != 0)?;
        }
    }
    Ok(())
}

fn unsupported(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

fn fallocate(disk: &Disk, mode: libc::c_int, start: u64, bytes: u64) -> io::Result<()> {
    loop {
        // SAFETY: no memory is involved.
        let r = unsafe {
            libc::fallocate(
                disk.file.as_raw_fd(),
                mode | libc::FALLOC_FL_KEEP_SIZE,
                start as libc::off_t,
                bytes as libc::off_t,
            )
        };
        if r == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

fn punch(disk: &Disk, start: u64, bytes: u64) -> io::Result<()> {
    fallocate(disk, libc::FALLOC_FL_PUNCH_HOLE, start, bytes)
}

/// Makes a range read as zeroes: by punching a hole if the guest allows that, by marking it, or by
/// writing.
fn zero(disk: &Disk, start: u64, bytes: u64, unmap: bool) -> io::Result<()> {
    if unmap && punch(disk, start, bytes).is_ok() {
        return Ok(());
    }
    match fallocate(disk, libc::FALLOC_FL_ZERO_RANGE, start, bytes) {
        Err(e) if unsupported(&e) => {}
        other => return other,
    }
    use std::os::unix::fs::FileExt;
    let mut done = 0;
    while done < bytes {
        let chunk = (bytes - done).min(ZEROES.len() as u64) as usize;
        disk.file.write_all_at(&ZEROES[..chunk], start + done)?;
        done += chunk as u64;
    }
    Ok(())
}
