//! Requests: what they ask for and how it is done.

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::batch::{Batch, Transfer};
use super::device::Metrics;
use super::disk::{Disk, ID_LEN, SECTOR};
use crate::virtio::queue::{
    Buffers, Segment, pop_last_byte, push_iovecs, read_front, skip_front, total, write_front,
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

/// Begins the request in `buffers`, which came in the chain `head`. Reads and writes go into the
/// batch (`None`); everything else is done at once, its status is written, and the number of bytes
/// written to the guest's buffers returned.
pub(super) fn begin(
    disk: Option<&Disk>,
    mem: &GuestMemoryMmap<()>,
    head: u16,
    buffers: &mut Buffers,
    batch: &mut Batch,
    write_through: bool,
    metrics: &mut Metrics,
) -> Option<u32> {
    // The status is the last byte the device may write. Without it the request cannot be answered.
    let Some(status_at) = pop_last_byte(&mut buffers.writable) else {
        metrics.errors += 1;
        return Some(0);
    };
    let result = match disk {
        Some(disk) => run(
            disk,
            mem,
            head,
            status_at,
            buffers,
            batch,
            write_through,
            metrics,
        ),
        None => Err(Failure::Io),
    };
    match result {
        Ok(None) => None,
        Ok(Some(written)) => Some(answer(mem, status_at, Ok(written), metrics)),
        Err(failure) => Some(answer(mem, status_at, Err(failure), metrics)),
    }
}

/// Writes the status of a request; returns the number of bytes written to the guest's buffers.
fn answer(
    mem: &GuestMemoryMmap<()>,
    status_at: GuestAddress,
    result: Result<u32, Failure>,
    metrics: &mut Metrics,
) -> u32 {
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

/// Carries out what is in the batch and calls `done` with each chain and the bytes written to it.
pub(super) fn finish(
    disk: Option<&Disk>,
    mem: &GuestMemoryMmap<()>,
    batch: &mut Batch,
    write_through: bool,
    metrics: &mut Metrics,
    mut done: impl FnMut(u16, u32),
) {
    if let Some(disk) = disk
        && !batch.transfers.is_empty()
    {
        metrics.by_io_uring += batch.run(disk);
        // Who does not know of flushes gets what they are for with every write (5.2.6.2).
        let wrote = batch.transfers.iter().any(|t| t.write);
        let synced = if wrote && write_through {
            disk.file.sync_data().is_ok()
        } else {
            true
        };
        for transfer in &batch.transfers {
            let result = if transfer.result.is_err() || transfer.write && !synced {
                Err(Failure::Io)
            } else if transfer.write {
                metrics.writes += 1;
                metrics.write_bytes += transfer.bytes;
                Ok(0)
            } else {
                metrics.reads += 1;
                metrics.read_bytes += transfer.bytes;
                // At most `MAX_BYTES`.
                Ok(transfer.bytes as u32)
            };
            done(
                transfer.head,
                answer(mem, transfer.status_at, result, metrics),
            );
        }
    }
    batch.clear();
}

/// What a read or write is to do.
struct Wish {
    head: u16,
    status_at: GuestAddress,
    sector: u64,
    write: bool,
}

#[expect(clippy::too_many_arguments)]
fn run(
    disk: &Disk,
    mem: &GuestMemoryMmap<()>,
    head: u16,
    status_at: GuestAddress,
    buffers: &mut Buffers,
    batch: &mut Batch,
    write_through: bool,
    metrics: &mut Metrics,
) -> Result<Option<u32>, Failure> {
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
        T_IN | T_OUT => {
            let write = kind == T_OUT;
            let segments = if write {
                &buffers.readable
            } else {
                &buffers.writable
            };
            let wish = Wish {
                head,
                status_at,
                sector,
                write,
            };
            transfer(disk, mem, segments, batch, wish)?;
            Ok(None)
        }
        T_FLUSH => {
            if !disk.read_only {
                disk.file.sync_data()?;
            }
            metrics.flushes += 1;
            Ok(Some(0))
        }
        T_GET_ID => {
            if total(&buffers.writable) < ID_LEN as u64 {
                return Err(Failure::Io);
            }
            Ok(Some(write_front(mem, &buffers.writable, &disk.id) as u32))
        }
        T_DISCARD | T_WRITE_ZEROES => {
            ranges(disk, mem, buffers, kind == T_DISCARD)?;
            if write_through {
                disk.file.sync_data()?;
            }
            metrics.discards += 1;
            Ok(Some(0))
        }
        _ => Err(Failure::Unsupported),
    }
}

/// Checks a read or write and puts it into the batch.
fn transfer(
    disk: &Disk,
    mem: &GuestMemoryMmap<()>,
    segments: &[Segment],
    batch: &mut Batch,
    wish: Wish,
) -> Result<(), Failure> {
    let bytes = total(segments);
    if !bytes.is_multiple_of(SECTOR) || bytes > MAX_BYTES {
        return Err(Failure::Io);
    }
    let (fd, offset) = disk.range(wish.sector, bytes).ok_or(Failure::Io)?;
    let first = batch.iovecs.len();
    // Pointers of a request that turns out wrong stay behind unused, until the turn ends.
    let covered = push_iovecs(mem, segments, bytes, &mut batch.iovecs).map_err(|_| Failure::Io)?;
    if covered != bytes {
        return Err(Failure::Io);
    }
    batch.transfers.push(Transfer {
        head: wish.head,
        status_at: wish.status_at,
        write: wish.write,
        fd,
        offset,
        bytes,
        iovecs: first..batch.iovecs.len(),
        result: Ok(()),
    });
    Ok(())
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
        // Only what can be written comes here, and that is one file.
        let (_, start) = disk.range(sector, bytes).ok_or(Failure::Io)?;
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
