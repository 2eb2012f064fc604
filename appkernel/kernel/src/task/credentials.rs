//! Who a program is, and what it may do.

use alloc::vec::Vec;

use appkernel_core::capabilities::Capabilities;
use appkernel_core::fuse::Attributes;

use crate::fs::node::{Owner, kind};

/// Users and groups of a task.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    pub uid: u32,
    pub euid: u32,
    pub suid: u32,
    pub gid: u32,
    pub egid: u32,
    pub sgid: u32,
    pub groups: Vec<u32>,
    /// Who it is for files: the effective ones unless it says otherwise (setfsuid).
    pub fsuid: u32,
    pub fsgid: u32,
    pub capabilities: Capabilities,
}

/// Permission bits, as in a mode.
pub mod may {
    pub const READ: u32 = 4;
    pub const WRITE: u32 = 2;
    pub const EXECUTE: u32 = 1;
}

impl Credentials {
    /// Of a user and a group.
    pub fn of(uid: u32, gid: u32, groups: Vec<u32>) -> Self {
        Self {
            uid,
            euid: uid,
            suid: uid,
            gid,
            egid: gid,
            sgid: gid,
            groups,
            fsuid: uid,
            fsgid: gid,
            capabilities: Capabilities::of(uid == 0),
        }
    }

    /// Whether it is root.
    pub fn is_root(&self) -> bool {
        self.euid == 0
    }

    /// Whether it is root where files are concerned.
    pub fn files_root(&self) -> bool {
        self.is_root() && self.fsuid == 0
    }

    /// Who owns what it makes.
    pub fn owner(&self) -> Owner {
        Owner {
            uid: self.fsuid,
            gid: self.fsgid,
        }
    }

    /// Sets real, effective and saved user.
    pub fn set_users(&mut self, new: [u32; 3]) {
        let old = [self.uid, self.euid, self.suid];
        self.capabilities.users_changed(old, new);
        [self.uid, self.euid, self.suid] = new;
        self.fsuid = self.euid;
    }

    /// Whether it is in a group, where files are concerned.
    pub fn in_group(&self, gid: u32) -> bool {
        self.fsgid == gid || self.groups.contains(&gid)
    }

    /// Whether the permission bits of a file let it do what is `wanted`.
    pub fn may(&self, file: &Attributes, wanted: u32) -> bool {
        if self.files_root() {
            // Root may all, but executes only what somebody may.
            return wanted & may::EXECUTE == 0
                || file.mode & kind::MASK == kind::DIRECTORY
                || file.mode & 0o111 != 0;
        }
        let shift = if self.fsuid == file.uid {
            6
        } else if self.in_group(file.gid) {
            3
        } else {
            0
        };
        wanted & !(file.mode >> shift) & 7 == 0
    }

    /// Whether it may change mode and owner of a file.
    pub fn owns(&self, file: &Attributes) -> bool {
        self.files_root() || self.fsuid == file.uid
    }
}
