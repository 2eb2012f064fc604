//! Extended attributes: their names, and those of one file in memory.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::errno::Errno;

/// Longest name, without its end.
pub const NAME_MAX: usize = 255;
/// Largest value, and longest list of names.
pub const SIZE_MAX: usize = 65536;
/// Bytes that all attributes of one file in memory may have: names and values are the kernel's memory.
const FILE_MAX: usize = 128 << 10;
/// What an attribute takes besides its bytes, roughly.
const OVERHEAD: usize = 64;
/// In the flags of setxattr: there must be none of that name, or there must be one.
const CREATE: u32 = 1;
const REPLACE: u32 = 2;

/// To whom a name belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// `user.`: whoever may read or write the file.
    User,
    /// `trusted.`: who may administer the system.
    Trusted,
    /// `security.`: for the kernel's own rules.
    Security,
}

impl Namespace {
    /// That of a name.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: no file system has such attributes (access control lists among them);
    /// `EINVAL`: nothing follows the prefix.
    pub fn of(name: &[u8]) -> Result<Self, Errno> {
        for (prefix, space) in [
            (&b"user."[..], Self::User),
            (b"trusted.", Self::Trusted),
            (b"security.", Self::Security),
        ] {
            match name.strip_prefix(prefix) {
                Some(b"") => return Err(Errno::EINVAL),
                Some(_) => return Ok(space),
                None => {}
            }
        }
        Err(Errno::EOPNOTSUPP)
    }
}

/// Checks the flags of setxattr.
///
/// # Errors
/// `EINVAL`: others than the two there are.
pub fn check_flags(flags: u32) -> Result<(), Errno> {
    if flags & !(CREATE | REPLACE) != 0 {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

/// The attributes of a file in memory.
#[derive(Clone, Debug, Default)]
pub struct Attributes {
    values: BTreeMap<Vec<u8>, Vec<u8>>,
    bytes: usize,
}

fn bytes(name: &[u8], value: &[u8]) -> usize {
    name.len() + value.len() + OVERHEAD
}

impl Attributes {
    /// Sets one.
    ///
    /// # Errors
    /// `EEXIST`, `ENODATA`: as the flags want it; `ENOSPC`: there are too many.
    pub fn set(&mut self, name: &[u8], value: Vec<u8>, flags: u32) -> Result<(), Errno> {
        let old = self.values.get(name);
        if flags & CREATE != 0 && old.is_some() {
            return Err(Errno::EEXIST);
        }
        if flags & REPLACE != 0 && old.is_none() {
            return Err(Errno::ENODATA);
        }
        let freed = old.map_or(0, |old| bytes(name, old));
        let after = self.bytes - freed + bytes(name, &value);
        if after > FILE_MAX {
            return Err(Errno::ENOSPC);
        }
        self.values.insert(name.to_vec(), value);
        self.bytes = after;
        Ok(())
    }

    /// The value of one.
    ///
    /// # Errors
    /// `ENODATA`: there is none of that name.
    pub fn get(&self, name: &[u8]) -> Result<&[u8], Errno> {
        self.values
            .get(name)
            .map(Vec::as_slice)
            .ok_or(Errno::ENODATA)
    }

    /// Takes one away.
    ///
    /// # Errors
    /// `ENODATA`: there is none of that name.
    pub fn remove(&mut self, name: &[u8]) -> Result<(), Errno> {
        let old = self.values.remove(name).ok_or(Errno::ENODATA)?;
        self.bytes -= bytes(name, &old);
        Ok(())
    }

    /// All names, each with its end.
    pub fn list(&self) -> Vec<u8> {
        let mut names = Vec::new();
        for name in self.values.keys() {
            names.extend(name);
            names.push(0);
        }
        names
    }

    /// Bytes of the kernel's memory, roughly.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Those names of a list (each with its end) that `keep` wants.
pub fn filtered(list: &[u8], keep: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut names = Vec::new();
    for name in list.split_inclusive(|b| *b == 0) {
        if keep(name.strip_suffix(b"\0").unwrap_or(name)) {
            names.extend(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_belong_to_somebody_or_are_refused() {
        assert_eq!(Namespace::of(b"user.a"), Ok(Namespace::User));
        assert_eq!(Namespace::of(b"trusted.a.b"), Ok(Namespace::Trusted));
        assert_eq!(Namespace::of(b"security.x"), Ok(Namespace::Security));
        assert_eq!(Namespace::of(b"user."), Err(Errno::EINVAL));
        for name in [
            &b"user"[..],
            b"",
            b"other.x",
            b"system.posix_acl_access",
            b"USER.a",
        ] {
            assert_eq!(Namespace::of(name), Err(Errno::EOPNOTSUPP));
        }
        assert_eq!(check_flags(3), Ok(()));
        assert_eq!(check_flags(4), Err(Errno::EINVAL));
    }

    #[test]
    fn attributes_are_kept_and_bounded() {
        let mut all = Attributes::default();
        assert_eq!(all.set(b"user.a", b"1".to_vec(), CREATE), Ok(()));
        assert_eq!(
            all.set(b"user.a", b"2".to_vec(), CREATE),
            Err(Errno::EEXIST)
        );
        assert_eq!(
            all.set(b"user.b", b"2".to_vec(), REPLACE),
            Err(Errno::ENODATA)
        );
        assert_eq!(all.set(b"user.a", b"three".to_vec(), REPLACE), Ok(()));
        assert_eq!(all.get(b"user.a"), Ok(&b"three"[..]));
        assert_eq!(all.set(b"user.b", Vec::new(), 0), Ok(()));
        assert_eq!(all.list(), b"user.a\0user.b\0");
        assert_eq!(filtered(&all.list(), |n| n != b"user.a"), b"user.b\0");
        assert_eq!(all.remove(b"user.a"), Ok(()));
        assert_eq!(all.remove(b"user.a"), Err(Errno::ENODATA));
        assert_eq!(all.get(b"user.a"), Err(Errno::ENODATA));
        // As much as may be, and not a byte is lost by replacing.
        for _ in 0..100 {
            assert_eq!(all.set(b"user.big", alloc::vec![0; SIZE_MAX], 0), Ok(()));
        }
        assert_eq!(
            all.set(b"user.bigger", alloc::vec![0; SIZE_MAX], 0),
            Err(Errno::ENOSPC)
        );
        assert_eq!(all.remove(b"user.big"), Ok(()));
        assert_eq!(all.remove(b"user.b"), Ok(()));
        assert_eq!(all.bytes(), 0);
    }
}
