//! Extended attributes of files of the share, and files without a name. The host says which names
//! a guest may use (`user.` and a few others), so nothing is decided here.

use alloc::sync::Arc;
use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::fuse::{Body, Entry, IN_HEADER, Op, Reader};
use appkernel_core::xattr;

use super::super::node::{Owner, kind};
use super::super::virtio::REQUEST_MAX;
use super::Node;

/// A host that does not know a request has no attributes, or no such files.
fn unsupported(error: Errno) -> Errno {
    match error {
        Errno::ENOSYS => Errno::EOPNOTSUPP,
        other => other,
    }
}

/// A copy of an answer: there may be no memory for it in one piece.
fn copied(answer: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(answer.len())
        .map_err(|_| Errno::ENOMEM)?;
    copy.extend(answer);
    Ok(copy)
}

impl Node {
    /// Sets an extended attribute.
    pub fn set_attribute(&self, name: &[u8], value: &[u8], flags: u32) -> Result<(), Errno> {
        let body = Body::new().u32(value.len() as u32).u32(flags).name(name);
        if IN_HEADER + body.0.len() + value.len() > REQUEST_MAX {
            return Err(Errno::ENOSPC);
        }
        self.fuse()?
            .call(Op::Setxattr, self.id, &body.0, value, 16, |_| Ok(()))
            .map_err(unsupported)?;
        self.state.lock().valid_until = 0;
        Ok(())
    }

    /// The value of an extended attribute.
    pub fn attribute(&self, name: &[u8]) -> Result<Vec<u8>, Errno> {
        let body = Body::new().u32(xattr::SIZE_MAX as u32).u32(0).name(name);
        self.fuse()?
            .call(Op::Getxattr, self.id, &body.0, &[], xattr::SIZE_MAX, copied)
            .map_err(unsupported)
    }

    /// Names of all extended attributes, each with its end.
    pub fn attribute_names(&self) -> Result<Vec<u8>, Errno> {
        let body = Body::new().u32(xattr::SIZE_MAX as u32).u32(0);
        let names = self.fuse()?.call(
            Op::Listxattr,
            self.id,
            &body.0,
            &[],
            xattr::SIZE_MAX,
            copied,
        );
        match names {
            Err(Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(Vec::new()),
            other => other,
        }
    }

    /// Takes an extended attribute away.
    pub fn remove_attribute(&self, name: &[u8]) -> Result<(), Errno> {
        let body = Body::new().name(name);
        self.fuse()?
            .call(Op::Removexattr, self.id, &body.0, &[], 16, |_| Ok(()))
            .map_err(unsupported)?;
        self.state.lock().valid_until = 0;
        Ok(())
    }

    /// Makes a file without a name on the file system of this directory, and opens it for writing.
    /// With `exclusive` it never gets a name.
    pub fn create_nameless(
        &self,
        mode: u32,
        exclusive: bool,
        owner: Owner,
    ) -> Result<(Arc<Self>, u64), Errno> {
        const EXCLUSIVE: u32 = 0o200;
        let fuse = self.fuse()?;
        // Those before it that nobody has open any more: the host keeps them until it is told.
        fuse.forget_removed();
        let flags = 2 | if exclusive { EXCLUSIVE } else { 0 };
        let body = Body::new()
            .u32(flags)
            .u32(mode | kind::REGULAR)
            .u32(0)
            .u32(0)
            .name(b"#");
        let (entry, handle) = fuse
            .call_as(
                owner,
                Op::Tmpfile,
                self.id,
                &[&body.0, &[]],
                144,
                |answer| {
                    let mut reader = Reader(answer);
                    Ok((Entry::parse(&mut reader)?, reader.u64()?))
                },
            )
            .map_err(unsupported)?;
        let node = fuse.enter(&entry);
        fuse.removed.lock().push(node.id);
        Ok((node, handle))
    }
}
