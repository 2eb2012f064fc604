//! Transfers between disk and guest memory, those of one turn at once.
//!
//! A guest that asks for several things at a time expects the disk to work on them at a time. The
//! requests of one turn go to the host's kernel by one io_uring call, and the turn ends when all of
//! them have: between turns nothing is in flight, so reset, pause and save have nothing to wait for.
//! A single request, and a host without io_uring, take the ordinary system calls.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, types};
use vm_memory::GuestAddress;

use super::disk::Disk;

/// A read or write whose buffers and place have been checked.
#[derive(Debug)]
pub(super) struct Transfer {
    /// The chain it came in.
    pub head: u16,
    /// Where the guest wants the status.
    pub status_at: GuestAddress,
    /// To the disk.
    pub write: bool,
    /// The file, which the disk keeps open.
    pub fd: RawFd,
    /// First byte in it.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Its pointers in [`Batch::iovecs`].
    pub iovecs: Range<usize>,
    /// How it ended; `Ok` until it fails.
    pub result: io::Result<()>,
}

/// Most transfers that one call takes; more are worked on after each other.
const RING: u32 = 64;
/// Kernel threads of a disk, for each of two kinds: a guest must not be able to make many.
const WORKERS: u32 = 2;
/// Pointers that are kept room for between turns; a guest's largest turn is not.
const KEPT_IOVECS: usize = 1024;

/// The transfers of one turn; empty between turns.
#[derive(Default)]
pub(super) struct Batch {
    pub transfers: Vec<Transfer>,
    pub iovecs: Vec<libc::iovec>,
    /// The host's queue. `None`: there is no disk yet, or the host has no io_uring for us.
    ring: Option<Box<IoUring>>,
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch")
            .field("transfers", &self.transfers.len())
            .field("ring", &self.ring.is_some())
            .finish_non_exhaustive()
    }
}

// SAFETY: the pointers are made and used within one call of `Blk::work`; between calls they are
// leftovers that nothing reads.
unsafe impl Send for Batch {}

/// A ring that reads and writes and can do nothing else: by a ring like any other, files could be
/// opened that a filter of system calls keeps its thread from.
fn reads_and_writes_only() -> io::Result<Box<IoUring>> {
    let ring = IoUring::builder().setup_r_disabled().build(RING)?;
    let submitter = ring.submitter();
    // Kernel threads for what it cannot do without waiting. An older kernel has no such limit but
    // its own.
    let _ = submitter.register_iowq_max_workers(&mut [WORKERS; 2]);
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
    ])?;
    submitter.register_enable_rings()?;
    Ok(Box::new(ring))
}

impl Batch {
    /// Makes the ring, for a disk that has come. Not on the thread that serves requests: it may
    /// not.
    pub(super) fn prepare(&mut self) {
        if self.ring.is_none() {
            self.ring = reads_and_writes_only()
                .inspect_err(|error| {
                    log::info!("blk: no io_uring ({error}): one request after the other");
                })
                .ok();
        }
    }

    /// Carries all transfers out and notes how each ended. Returns how many of them went by
    /// io_uring.
    ///
    /// The pointers must be into guest memory that stays mapped for the whole call, and the files
    /// those of `_disk`, which keeps them open.
    pub(super) fn run(&mut self, _disk: &Disk) -> u64 {
        let mut by_ring = 0;
        if self.transfers.len() > 1
            && let Some(ring) = &mut self.ring
        {
            for chunk in self.transfers.chunks_mut(RING as usize) {
                by_ring += at_once(ring, chunk, &mut self.iovecs);
            }
            return by_ring;
        }
        for transfer in &mut self.transfers {
            transfer.result = one(transfer, 0, &mut self.iovecs);
        }
        by_ring
    }

    pub(super) fn clear(&mut self) {
        self.transfers.clear();
        self.iovecs.clear();
        self.iovecs.shrink_to(KEPT_IOVECS);
    }
}

/// Hands `transfers` to the kernel together and waits for all of them. Returns how many it took.
fn at_once(ring: &mut IoUring, transfers: &mut [Transfer], iovecs: &mut [libc::iovec]) -> u64 {
    let mut taken = 0usize;
    for (index, transfer) in transfers.iter().enumerate() {
        let part = iovecs.get(transfer.iovecs.clone()).unwrap_or_default();
        let (pointer, count) = (part.as_ptr(), part.len());
        // More pointers than one call takes: left to `one`.
        if count == 0 || count > libc::UIO_MAXIOV as usize {
            break;
        }
        let (file, count, offset) = (types::Fd(transfer.fd), count as u32, transfer.offset);
        let entry = if transfer.write {
            opcode::Writev::new(file, pointer, count)
                .offset(offset)
                .build()
        } else {
            opcode::Readv::new(file, pointer, count)
                .offset(offset)
                .build()
        };
        // SAFETY: the pointers lead into guest memory that the caller keeps mapped, their array is
        // not touched before all transfers have completed (the loop below ends no earlier), and no
        // Rust reference to guest memory exists for the kernel to race with.
        if unsafe { ring.submission().push(&entry.user_data(index as u64)) }.is_err() {
            break;
        }
        taken += 1;
    }
    // Bytes done of each, or why not; a transfer that was cut short is finished by `one`.
    let mut outcomes: Vec<i32> = vec![0; taken];
    let mut completed = 0;
    while completed < taken {
        // To return while the kernel may still write to the guest's pages would be unsound: a call
        // that fails is made again, and what has completed is counted in any case.
        if ring.submit_and_wait(1).is_err() {
            std::thread::yield_now();
        }
        for completion in ring.completion() {
            if let Some(outcome) = usize::try_from(completion.user_data())
                .ok()
                .and_then(|index| outcomes.get_mut(index))
            {
                *outcome = completion.result();
                completed += 1;
            }
        }
    }
    for (index, transfer) in transfers.iter_mut().enumerate() {
        transfer.result = match outcomes.get(index).copied() {
            Some(done) if u64::try_from(done) == Ok(transfer.bytes) => Ok(()),
            // The file has become shorter than the disk.
            Some(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Some(done @ 1..) => one(transfer, done as u64, iovecs),
            Some(error) if matches!(-error, libc::EINTR | libc::EAGAIN | libc::ECANCELED) => {
                one(transfer, 0, iovecs)
            }
            Some(error) => Err(io::Error::from_raw_os_error(-error)),
            None => one(transfer, 0, iovecs),
        };
    }
    taken as u64
}

/// Carries one transfer out from byte `done` on.
fn one(transfer: &Transfer, done: u64, iovecs: &mut [libc::iovec]) -> io::Result<()> {
    let fd = transfer.fd;
    let mut offset = transfer.offset + done;
    let mut left = transfer.bytes - done;
    let mut rest = iovecs.get_mut(transfer.iovecs.clone()).unwrap_or_default();
    rest = advance(rest, done as usize);
    while left > 0 {
        let parts = rest.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        // SAFETY: every entry lies within guest memory, which the caller keeps mapped; the kernel's
        // copy may race with the guest, but no Rust reference to that memory exists.
        let n = unsafe {
            if transfer.write {
                libc::pwritev(fd, rest.as_ptr(), parts, offset as libc::off_t)
            } else {
                libc::preadv(fd, rest.as_ptr(), parts, offset as libc::off_t)
            }
        };
        match usize::try_from(n) {
            // The file has become shorter than the disk.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                offset += n as u64;
                left = left.saturating_sub(n as u64);
                rest = advance(rest, n);
            }
            Err(_) => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
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
