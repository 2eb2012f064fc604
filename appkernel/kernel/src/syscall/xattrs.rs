//! Extended attributes: who may set and see which.

use alloc::vec::Vec;

use appkernel_core::errno::Errno;
use appkernel_core::xattr::{self, Namespace};

use super::paths::{CWD, resolve};
use super::{Call, Result, get_string, put};
use crate::fs::node::{Node, kind};
use crate::fs::watch::{self, event};
use crate::task::may;

/// `CAP_SYS_ADMIN` and `CAP_SETFCAP`.
const ADMINISTRATOR: u32 = 21;
const FILE_CAPABILITIES: u32 = 31;
const STICKY: u32 = 0o1000;

/// The calls of this family: each by path, by path of a link itself, and by descriptor.
pub fn call(c: &Call<'_>) -> Option<Result> {
    Some(match c.number {
        188..=190 => target(c, true).and_then(|file| set(c, &file)),
        191..=193 => target(c, false).and_then(|file| get(c, &file)),
        194..=196 => target(c, false).and_then(|file| list(c, &file)),
        197..=199 => target(c, true).and_then(|file| remove(c, &file)),
        _ => return None,
    })
}

/// What a call is about.
struct Target {
    /// `None`: a pipe, a socket or the like.
    node: Option<Node>,
    path: Vec<u8>,
}

fn target(c: &Call<'_>, changes: bool) -> Result<Target> {
    let how = (c.number - 188) % 3;
    if how == 2 {
        let file = c.task.used_file(c.int(0))?;
        if changes && c.task.container.is_read_only(&file.path) {
            return Err(Errno::EROFS);
        }
        return Ok(Target {
            node: file.node().cloned(),
            path: file.path.clone(),
        });
    }
    let found = resolve(c, CWD, c.arg(0), how == 0)?;
    if let Node::Proc(entry) = &found.node
        && how == 0
        && let Some(file) = entry.open_file()
    {
        return Ok(Target {
            node: file.node().cloned(),
            path: file.path.clone(),
        });
    }
    if changes && found.read_only {
        return Err(Errno::EROFS);
    }
    Ok(Target {
        node: Some(found.node),
        path: found.path,
    })
}

fn name(address: u64) -> Result<Vec<u8>> {
    let name = get_string(address, xattr::NAME_MAX + 1, Errno::ERANGE)?;
    if name.is_empty() {
        return Err(Errno::ERANGE);
    }
    Ok(name)
}

fn has_capability(c: &Call<'_>, capability: u32) -> bool {
    c.task.credentials.lock().capabilities.has(capability)
}

/// The node, if the caller may change or see its attribute of that name.
fn permitted<'a>(c: &Call<'_>, target: &'a Target, name: &[u8], write: bool) -> Result<&'a Node> {
    let refused = Err(if write { Errno::EPERM } else { Errno::ENODATA });
    let space = Namespace::of(name);
    let Some(node) = &target.node else {
        return match space? {
            Namespace::User => refused,
            _ => Err(Errno::EOPNOTSUPP),
        };
    };
    match space? {
        Namespace::Trusted if !has_capability(c, ADMINISTRATOR) => refused,
        Namespace::Security if write => {
            let needed = if name == b"security.capability" {
                FILE_CAPABILITIES
            } else {
                ADMINISTRATOR
            };
            if has_capability(c, needed) {
                Ok(node)
            } else {
                refused
            }
        }
        Namespace::User => {
            if !matches!(node.kind(), kind::REGULAR | kind::DIRECTORY) {
                return refused;
            }
            let attributes = node.attributes()?;
            let credentials = c.task.credentials.lock().clone();
            if write
                && node.is_directory()
                && attributes.mode & STICKY != 0
                && !credentials.owns(&attributes)
            {
                return Err(Errno::EPERM);
            }
            let wanted = if write { may::WRITE } else { may::READ };
            if !credentials.files_root() && !credentials.may(&attributes, wanted) {
                return Err(Errno::EACCES);
            }
            Ok(node)
        }
        _ => Ok(node),
    }
}

fn set(c: &Call<'_>, target: &Target) -> Result {
    let flags = c.uint(4);
    xattr::check_flags(flags)?;
    let name = name(c.arg(1))?;
    let size = c.arg(3);
    if size > xattr::SIZE_MAX as u64 {
        return Err(Errno::E2BIG);
    }
    let mut value = Vec::new();
    value
        .try_reserve_exact(size as usize)
        .map_err(|_| Errno::ENOMEM)?;
    value.resize(size as usize, 0);
    appkernel_hal::usercopy::read(&mut value, c.arg(2)).map_err(|_| Errno::EFAULT)?;
    let node = permitted(c, target, &name, true)?;
    node.set_attribute(&name, value, flags)?;
    watch::tell(&target.path, event::ATTRIB, node.is_directory());
    Ok(0)
}

/// Gives the program bytes, or only says how many there are.
fn give(bytes: &[u8], to: u64, size: u64) -> Result {
    if size == 0 {
        return Ok(bytes.len() as u64);
    }
    if (bytes.len() as u64) > size {
        return Err(Errno::ERANGE);
    }
    put(to, bytes)?;
    Ok(bytes.len() as u64)
}

fn get(c: &Call<'_>, target: &Target) -> Result {
    let name = name(c.arg(1))?;
    let value = permitted(c, target, &name, false)?.attribute(&name)?;
    give(&value, c.arg(2), c.arg(3))
}

fn list(c: &Call<'_>, target: &Target) -> Result {
    let names = match &target.node {
        Some(node) => node.attribute_names()?,
        None => Vec::new(),
    };
    let trusted = has_capability(c, ADMINISTRATOR);
    let names = xattr::filtered(&names, |name| match Namespace::of(name) {
        Ok(Namespace::Trusted) => trusted,
        Ok(_) => true,
        Err(_) => false,
    });
    give(&names, c.arg(1), c.arg(2))
}

fn remove(c: &Call<'_>, target: &Target) -> Result {
    let name = name(c.arg(1))?;
    let node = permitted(c, target, &name, true)?;
    node.remove_attribute(&name)?;
    watch::tell(&target.path, event::ATTRIB, node.is_directory());
    Ok(0)
}
