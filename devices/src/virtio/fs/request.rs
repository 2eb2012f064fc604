//! One FUSE request: checks before the server sees it, and what the server does not know.
//!
//! The server of `fuse-backend-rs` is careful, but it trusts a few things a guest can get wrong: it
//! logs every malformed name, allocates what a size field says, and ends without an answer when a
//! message is short. So lengths are checked here first, requests that are not served end here, and
//! whatever goes wrong, the guest gets an answer and the daemon lives.

use std::io::{Read, Write};
use std::mem::size_of;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, EntryOut, InHeader, Opcode, OpenOut, OutHeader};
use fuse_backend_rs::api::filesystem::Context;
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::metrics::FsMetrics;
use super::share::Share;
use super::sys::errno;
use crate::virtio::guest_log::GuestLog;
use crate::virtio::queue::Descriptors;

/// Most descriptors of one request. The largest Linux makes has 256 pages and a few headers; more
/// than 1,024 is more than one system call takes.
const MAX_DESCRIPTORS: usize = 1024;
/// Most bytes a request or an answer may have: a mebibyte of data and room for headers.
const MAX_BYTES: u64 = MAX_BUFFER_SIZE as u64 + 0x1000;
/// `FUSE_TMPFILE`, newer than the crate's list.
const TMPFILE: u32 = 51;
const IN_HEADER: usize = size_of::<InHeader>();
const OUT_HEADER: usize = size_of::<OutHeader>();
/// Mounts per activation of the device: each is one line in the log.
const MAX_INITS: u32 = 64;

/// Requests that are never answered.
fn is_silent(opcode: u32) -> bool {
    [
        Opcode::Forget,
        Opcode::BatchForget,
        Opcode::Interrupt,
        Opcode::NotifyReply,
    ]
    .iter()
    .any(|op| *op as u32 == opcode)
}

/// What to do with a request.
enum Verdict {
    Serve,
    Copy,
    Temporary,
    Refuse(i32),
}

pub(super) struct Handler {
    pub share: Arc<Share>,
    server: Server<Arc<Share>>,
    pub metrics: FsMetrics,
    pub log: GuestLog,
    inits: u32,
}

impl std::fmt::Debug for Handler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handler")
            .field("share", &self.share)
            .field("metrics", &self.metrics)
            .finish_non_exhaustive()
    }
}

impl Handler {
    pub(super) fn new(share: Share) -> Self {
        let share = Arc::new(share);
        Self {
            server: Server::new(Arc::clone(&share)),
            share,
            metrics: FsMetrics::default(),
            log: GuestLog::new("fs"),
            inits: 0,
        }
    }

    /// The guest reset the device.
    pub(super) fn reset(&mut self) {
        self.share.clear();
        self.inits = 0;
    }

    /// Serves one request; returns how many bytes of the answer were written.
    pub(super) fn handle(&mut self, mem: &GuestMemoryMmap<()>, chain: Descriptors<'_>) -> u32 {
        self.metrics.requests += 1;
        let Some((readable, writable)) = measure(chain.clone()) else {
            self.metrics.malformed += 1;
            return 0;
        };
        let reader: Result<Reader<'_>, _> = Reader::from_descriptor_chain(mem, chain.clone());
        let writer: Result<VirtioFsWriter<'_>, _> = VirtioFsWriter::new(mem, chain);
        let (Ok(reader), Ok(writer)) = (reader, writer) else {
            self.metrics.malformed += 1;
            return 0;
        };
        let mut peek = reader.clone();
        let Ok(header) = peek.read_obj::<InHeader>() else {
            self.metrics.malformed += 1;
            return 0;
        };
        let silent = is_silent(header.opcode);
        if !silent && writable < OUT_HEADER as u64 {
            self.metrics.malformed += 1;
            return 0;
        }
        let reply = writer.clone();
        match self.judge(&header, peek.clone(), readable, writable) {
            Verdict::Refuse(_) if silent => 0,
            Verdict::Refuse(code) => answer(reply, &header, -code, &[]),
            Verdict::Copy => self.copy(&header, peek, reply),
            Verdict::Temporary => self.temporary(&header, peek, reply),
            Verdict::Serve => self.serve(&header, reader, writer, reply, silent),
        }
    }

    fn judge(
        &mut self,
        header: &InHeader,
        body: Reader<'_>,
        readable: u64,
        writable: u64,
    ) -> Verdict {
        let len = u64::from(header.len);
        if len < IN_HEADER as u64
            || len > readable
            || len > MAX_BYTES
            || readable > MAX_BYTES
            || writable > MAX_BYTES
        {
            self.metrics.malformed += 1;
            return Verdict::Refuse(libc::EINVAL);
        }
        let op = header.opcode;
        let is = |wanted: &[Opcode]| wanted.iter().any(|opcode| *opcode as u32 == op);
        if is(&[
            Opcode::Lookup,
            Opcode::Symlink,
            Opcode::Mknod,
            Opcode::Mkdir,
            Opcode::Unlink,
            Opcode::Rmdir,
            Opcode::Rename,
            Opcode::Rename2,
            Opcode::Link,
            Opcode::Create,
            Opcode::Getxattr,
            Opcode::Removexattr,
        ]) {
            // Ends with a name: the server logs what has no end.
            return if ends_with_nul(body, header.len) {
                Verdict::Serve
            } else {
                self.metrics.malformed += 1;
                Verdict::Refuse(libc::EINVAL)
            };
        }
        if is(&[Opcode::Read, Opcode::Readdir, Opcode::Readdirplus]) {
            // The size wanted has to fit into the answer (after file handle and offset).
            let room = writable - OUT_HEADER as u64;
            return match u32_at(body, 16) {
                Some(size) if u64::from(size) <= room => Verdict::Serve,
                _ => {
                    self.metrics.malformed += 1;
                    Verdict::Refuse(libc::EINVAL)
                }
            };
        }
        if is(&[Opcode::Init]) {
            self.inits += 1;
            return if self.inits > MAX_INITS {
                Verdict::Refuse(libc::EIO)
            } else {
                Verdict::Serve
            };
        }
        if is(&[Opcode::CopyFileRange]) {
            return Verdict::Copy;
        }
        if op == TMPFILE {
            return Verdict::Temporary;
        }
        if is(&[Opcode::Ioctl]) {
            return Verdict::Refuse(libc::ENOTTY);
        }
        if is(&[
            Opcode::Forget,
            Opcode::BatchForget,
            Opcode::Getattr,
            Opcode::Setattr,
            Opcode::Readlink,
            Opcode::Open,
            Opcode::Write,
            Opcode::Statfs,
            Opcode::Release,
            Opcode::Fsync,
            Opcode::Setxattr,
            Opcode::Listxattr,
            Opcode::Opendir,
            Opcode::Releasedir,
            Opcode::Fsyncdir,
            Opcode::Destroy,
            Opcode::Fallocate,
            Opcode::Lseek,
        ]) {
            return Verdict::Serve;
        }
        // ENOSYS tells the guest not to ask again: flush (nothing is held back here), access (the
        // guest's kernel checks permissions), locks (stay within the guest), poll, bmap, DAX.
        Verdict::Refuse(libc::ENOSYS)
    }

    fn serve(
        &mut self,
        header: &InHeader,
        reader: Reader<'_>,
        writer: VirtioFsWriter<'_>,
        reply: VirtioFsWriter<'_>,
        silent: bool,
    ) -> u32 {
        // The last wall: a bug in the server or in the share ends one request, not the daemon.
        let served = catch_unwind(AssertUnwindSafe(|| {
            self.server
                .handle_message(reader, Writer::VirtioFs(writer), None, None)
        }));
        match served {
            _ if silent => 0,
            Ok(Ok(len)) => match self.share.take_error() {
                Some(code) => answer(reply, header, -code, &[]),
                // The server does not count the answer to a DESTROY.
                None if len == 0 => OUT_HEADER as u32,
                None => u32::try_from(len).unwrap_or(0),
            },
            Ok(Err(_)) => {
                self.metrics.malformed += 1;
                answer(reply, header, -libc::EINVAL, &[])
            }
            Err(_) => {
                self.metrics.panics += 1;
                self.log.warn(format_args!(
                    "a bug was caught in request {} of the guest; it gets EIO",
                    header.opcode
                ));
                answer(reply, header, -libc::EIO, &[])
            }
        }
    }

    /// `FUSE_TMPFILE`: as `FUSE_CREATE`, but the name means nothing.
    fn temporary(
        &mut self,
        header: &InHeader,
        mut body: Reader<'_>,
        reply: VirtioFsWriter<'_>,
    ) -> u32 {
        let made = match body.read_obj::<CreateIn>() {
            Ok(args) => self
                .share
                .temporary(&Context::from(header), header.nodeid, args),
            Err(_) => Err(errno(libc::EINVAL)),
        };
        match made {
            Ok((entry, handle)) => {
                let open = OpenOut {
                    fh: handle,
                    ..OpenOut::default()
                };
                let mut out = EntryOut::from(entry).as_slice().to_vec();
                out.extend_from_slice(open.as_slice());
                answer(reply, header, 0, &out)
            }
            Err(error) => answer(
                reply,
                header,
                -error.raw_os_error().unwrap_or(libc::EIO),
                &[],
            ),
        }
    }

    /// `FUSE_COPY_FILE_RANGE`: handle, offset, node, handle, offset, length, flags.
    fn copy(&mut self, header: &InHeader, mut body: Reader<'_>, reply: VirtioFsWriter<'_>) -> u32 {
        let mut args = [0u64; 7];
        for arg in &mut args {
            match body.read_obj::<u64>() {
                Ok(value) => *arg = u64::from_le(value),
                Err(_) => {
                    self.metrics.malformed += 1;
                    return answer(reply, header, -libc::EINVAL, &[]);
                }
            }
        }
        let [from, from_at, to_node, to, to_at, len, _flags] = args;
        match self
            .share
            .copy_range((header.nodeid, from, from_at), (to_node, to, to_at), len)
        {
            // `struct fuse_write_out`: size and padding.
            Ok(n) => answer(reply, header, 0, &(n as u64).to_le_bytes()),
            Err(error) => answer(
                reply,
                header,
                -error.raw_os_error().unwrap_or(libc::EIO),
                &[],
            ),
        }
    }
}

/// Bytes the device can read and write, or `None` if there are too many descriptors or the chain
/// is broken.
fn measure(chain: Descriptors<'_>) -> Option<(u64, u64)> {
    let (mut readable, mut writable) = (0u64, 0u64);
    let mut complete = false;
    for (count, desc) in chain.enumerate() {
        if count == MAX_DESCRIPTORS {
            return None;
        }
        complete = !desc.has_next();
        if desc.is_write_only() {
            writable += u64::from(desc.len());
        } else {
            readable += u64::from(desc.len());
        }
    }
    complete.then_some((readable, writable))
}

fn ends_with_nul(mut body: Reader<'_>, len: u32) -> bool {
    let mut last = [1u8];
    let Some(at) = (len as usize).checked_sub(IN_HEADER + 1) else {
        return false;
    };
    body.split_at(at)
        .is_ok_and(|mut tail| tail.read_exact(&mut last).is_ok())
        && last == [0]
}

fn u32_at(mut body: Reader<'_>, at: usize) -> Option<u32> {
    body.split_at(at)
        .ok()?
        .read_obj::<u32>()
        .ok()
        .map(u32::from_le)
}

/// Writes an answer; returns its length.
fn answer(mut writer: VirtioFsWriter<'_>, header: &InHeader, error: i32, body: &[u8]) -> u32 {
    let len = (OUT_HEADER + body.len()) as u32;
    let out = OutHeader {
        len,
        error,
        unique: header.unique,
    };
    let written = writer.write_obj(out).and_then(|()| writer.write_all(body));
    if written.is_ok() { len } else { 0 }
}
