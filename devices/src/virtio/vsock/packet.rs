//! The packet header and access to the guest's buffers (virtio 1.2, 5.10.6).

use libc::{c_void, iovec};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory as _, GuestMemoryMmap};

/// Length of the header in bytes.
pub(super) const HEADER_LEN: usize = 44;
/// The well-known address of the host.
pub(super) const HOST_CID: u64 = 2;
/// Stream sockets, the only type offered.
pub(super) const TYPE_STREAM: u16 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
/// Most segments taken of one chain. Linux uses at most 18 (a header and the fragments of 64 KiB);
/// a hostile chain may name 65,535.
pub(super) const MAX_SEGMENTS: usize = 256;

/// What a packet asks for (`VIRTIO_VSOCK_OP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    /// The operation of a number; `None` for one this device does not know.
    pub(super) const fn from_u16(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    const fn to_u16(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// `struct virtio_vsock_hdr`, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Length of the payload in bytes.
    pub len: u32,
    pub socket_type: u16,
    pub op: u16,
    pub flags: u32,
    /// Receive buffer of the sender, in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of its receive buffer so far, wrapping.
    pub fwd_cnt: u32,
}

fn u16_at(bytes: &[u8; HEADER_LEN], at: usize) -> u16 {
    let mut raw = [0; 2];
    raw.copy_from_slice(&bytes[at..at + 2]);
    u16::from_le_bytes(raw)
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

impl Header {
    /// A packet of the host to the guest, without credit fields and payload.
    pub(super) fn to_guest(op: Op, guest_cid: u64, host_port: u32, guest_port: u32) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            len: 0,
            socket_type: TYPE_STREAM,
            op: op.to_u16(),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64_at(bytes, 0),
            dst_cid: u64_at(bytes, 8),
            src_port: u32_at(bytes, 16),
            dst_port: u32_at(bytes, 20),
            len: u32_at(bytes, 24),
            socket_type: u16_at(bytes, 28),
            op: u16_at(bytes, 30),
            flags: u32_at(bytes, 32),
            buf_alloc: u32_at(bytes, 36),
            fwd_cnt: u32_at(bytes, 40),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Which half of a chain to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Buffers the guest filled.
    DeviceReads,
    /// Buffers the guest gave to be filled.
    DeviceWrites,
}

/// Appends the buffers of `chain` to `out` as host memory and returns their length in bytes, or
/// `None` if an address lies outside guest memory. At most [`MAX_SEGMENTS`] buffers are taken;
/// what follows them is treated as not there.
///
/// The segments point into guest memory and stay valid while `mem` is borrowed: the caller must
/// not keep them longer than the guard `mem` comes from. The guest may change the bytes at any
/// time, so they are only ever copied with raw pointers or by the kernel.
pub(super) fn segments(
    mem: &GuestMemoryMmap<()>,
    chain: DescriptorChain<&GuestMemoryMmap<()>>,
    access: Access,
    out: &mut Vec<iovec>,
) -> Option<usize> {
    let mut total = 0usize;
    let first = out.len();
    for desc in chain {
        if desc.is_write_only() != (access == Access::DeviceWrites) {
            // Device-readable buffers come first (virtio 1.2, 2.7.4.2); a read-only buffer after
            // a writable one is out of order and ignored.
            continue;
        }
        let len = usize::try_from(desc.len()).ok()?;
        for slice in mem.get_slices(desc.addr(), len) {
            let Ok(slice) = slice else {
                out.truncate(first);
                return None;
            };
            if slice.is_empty() {
                continue;
            }
            if out.len() - first == MAX_SEGMENTS {
                return Some(total);
            }
            out.push(iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast::<c_void>(),
                iov_len: slice.len(),
            });
            total = total.checked_add(slice.len())?;
        }
    }
    Some(total)
}

/// Copies the start of `segments` into `bytes`; false if they are too short.
pub(super) fn copy_from(segments: &[iovec], bytes: &mut [u8]) -> bool {
    let mut rest = bytes;
    for segment in segments {
        let n = rest.len().min(segment.iov_len);
        let (now, later) = rest.split_at_mut(n);
        // SAFETY: the segment was made by `segments` from guest memory that is still mapped (the
        // caller holds the guard), `n` is within both sides, and guest memory never overlaps
        // memory that Rust references point to.
        unsafe {
            std::ptr::copy_nonoverlapping(segment.iov_base.cast::<u8>(), now.as_mut_ptr(), n)
        };
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    rest.is_empty()
}

/// Copies `bytes` to the start of `segments`; false if they are too short.
pub(super) fn copy_to(segments: &[iovec], bytes: &[u8]) -> bool {
    let mut rest = bytes;
    for segment in segments {
        let n = rest.len().min(segment.iov_len);
        let (now, later) = rest.split_at(n);
        // SAFETY: as in `copy_from`, with the sides swapped; the segment is writable guest memory.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), segment.iov_base.cast::<u8>(), n) };
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    rest.is_empty()
}

/// Narrows `segments` in place to `len` bytes after the first `skip`; false if they are too short.
pub(super) fn narrow(segments: &mut Vec<iovec>, skip: usize, len: usize) -> bool {
    let mut skip = skip;
    let mut left = len;
    segments.retain_mut(|segment| {
        let skipped = skip.min(segment.iov_len);
        skip -= skipped;
        let kept = left.min(segment.iov_len - skipped);
        left -= kept;
        // `wrapping_add` stays inside the segment: `skipped` is at most its length.
        segment.iov_base = segment
            .iov_base
            .cast::<u8>()
            .wrapping_add(skipped)
            .cast::<c_void>();
        segment.iov_len = kept;
        kept > 0
    });
    skip == 0 && left == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iov(bytes: &mut [u8]) -> iovec {
        iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }
    }

    #[test]
    fn header_round_trip() {
        let mut header = Header::to_guest(Op::Data, 0x1_0000_0003, 1024, 0x8000_0001);
        header.len = 77;
        header.flags = 3;
        header.buf_alloc = 65536;
        header.fwd_cnt = u32::MAX;
        assert_eq!(Header::parse(&header.encode()), header);
        // Byte positions as in the specification's struct.
        assert_eq!(&header.encode()[28..32], &[1, 0, 5, 0]);
    }

    #[test]
    fn narrowing_and_copying_across_segments() {
        let (mut a, mut b, mut c) = ([1u8, 2, 3], [4u8], [5u8, 6, 7]);
        let all = vec![iov(&mut a), iov(&mut b), iov(&mut c)];
        let mut out = [0; 5];
        assert!(copy_from(&all, &mut out));
        assert_eq!(out, [1, 2, 3, 4, 5]);
        assert!(!copy_from(&all, &mut [0; 8]));

        let mut part = all.clone();
        assert!(narrow(&mut part, 2, 3));
        let mut out = [0; 3];
        assert!(copy_from(&part, &mut out));
        assert_eq!(out, [3, 4, 5]);
        assert!(!narrow(&mut all.clone(), 3, 5));
        assert!(!narrow(&mut all.clone(), 8, 0));
        assert!(narrow(&mut all.clone(), 7, 0));

        assert!(copy_to(&part, &[9, 8, 7]));
        assert_eq!((a, b, c), ([1, 2, 9], [8], [7, 6, 7]));
    }

    #[test]
    fn unknown_operations() {
        assert_eq!(Op::from_u16(0), None);
        assert_eq!(Op::from_u16(8), None);
        for op in 1..=7 {
            assert_eq!(Op::from_u16(op).map(Op::to_u16), Some(op));
        }
    }
}
