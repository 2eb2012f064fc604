//! Capabilities of a program (capabilities(7)), without ambient ones and without those of files.

use crate::errno::Errno;

/// All that containers usually have.
const CONTAINER: u64 = 0xa804_25fb;
/// The last one there is.
pub const LAST: u64 = 40;
/// Changes groups.
pub const SETGID: u32 = 6;
/// Changes users.
pub const SETUID: u32 = 7;
/// Drops capabilities from the bounding set.
pub const SETPCAP: u32 = 8;

/// The sets of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// What it may make effective.
    pub permitted: u64,
    /// What counts.
    pub effective: u64,
    /// Kept and given back.
    pub inheritable: u64,
    /// What it can ever get.
    pub bounding: u64,
    /// The permitted ones stay when root becomes somebody else.
    pub keep: bool,
}

impl Default for Capabilities {
    /// Those of root.
    fn default() -> Self {
        Self::of(true)
    }
}

impl Capabilities {
    /// Those of root, or of somebody else.
    pub fn of(root: bool) -> Self {
        let all = if root { CONTAINER } else { 0 };
        Self {
            permitted: all,
            effective: all,
            inheritable: 0,
            bounding: CONTAINER,
            keep: false,
        }
    }

    /// Whether one counts.
    pub fn has(&self, number: u32) -> bool {
        self.effective >> number & 1 != 0
    }

    /// Real, effective and saved user have changed.
    pub fn users_changed(&mut self, old: [u32; 3], new: [u32; 3]) {
        if old.contains(&0) && !new.contains(&0) && !self.keep {
            self.permitted = 0;
            self.effective = 0;
        }
        match (old[1], new[1]) {
            (0, 1..) => self.effective = 0,
            (1.., 0) => self.effective = self.permitted,
            _ => {}
        }
    }

    /// A new program starts for a real and an effective user.
    pub fn program(&mut self, user: u32, effective: u32) {
        let root = user == 0 || effective == 0;
        self.permitted = if root {
            self.bounding | self.inheritable
        } else {
            0
        };
        self.effective = if effective == 0 { self.permitted } else { 0 };
        self.keep = false;
    }

    /// Sets what a program wants (capset).
    ///
    /// # Errors
    /// `EPERM`: more than it may have.
    pub fn set(&mut self, effective: u64, permitted: u64, inheritable: u64) -> Result<(), Errno> {
        let within = |set: u64, of: u64| set & !of == 0;
        if !within(permitted, self.permitted)
            || !within(effective, permitted)
            || !within(inheritable, self.inheritable | self.permitted)
        {
            return Err(Errno::EPERM);
        }
        self.permitted = permitted;
        self.effective = effective;
        self.inheritable = inheritable;
        Ok(())
    }

    /// Takes one out of what it can ever get.
    ///
    /// # Errors
    /// `EINVAL`: there is no such one; `EPERM`: it may not.
    pub fn drop_bounding(&mut self, number: u64) -> Result<(), Errno> {
        if number > LAST {
            return Err(Errno::EINVAL);
        }
        if !self.has(SETPCAP) {
            return Err(Errno::EPERM);
        }
        self.bounding &= !(1 << number);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_becomes_somebody_else_loses_them_unless_it_keeps_them() {
        let mut root = Capabilities::of(true);
        root.users_changed([0; 3], [1, 1, 1]);
        assert_eq!((root.permitted, root.effective), (0, 0));
        let mut keeps = Capabilities::of(true);
        keeps.keep = true;
        keeps.users_changed([0; 3], [1, 1, 1]);
        assert_eq!((keeps.permitted, keeps.effective), (CONTAINER, 0));
        assert_eq!(keeps.set(1 << SETGID, 1 << SETGID, 0), Ok(()));
        assert!(keeps.has(SETGID) && !keeps.has(SETUID));
        assert_eq!(keeps.set(1 << SETUID, 1 << SETUID, 0), Err(Errno::EPERM));
        let mut back = Capabilities::of(true);
        back.users_changed([0; 3], [0, 1, 0]);
        assert_eq!((back.permitted, back.effective), (CONTAINER, 0));
        back.users_changed([0, 1, 0], [0; 3]);
        assert_eq!(back.effective, CONTAINER);
    }

    #[test]
    fn programs_of_root_get_them_again_but_for_what_was_dropped() {
        let mut some = Capabilities::of(true);
        assert_eq!(some.drop_bounding(LAST + 1), Err(Errno::EINVAL));
        assert_eq!(some.drop_bounding(0), Ok(()));
        assert_eq!(some.set(0, 0, 0), Ok(()));
        assert_eq!(some.drop_bounding(1), Err(Errno::EPERM));
        some.program(0, 0);
        assert_eq!(some.effective, CONTAINER & !1);
        some.program(1, 1);
        assert_eq!((some.permitted, some.effective), (0, 0));
        // A set-user-id program.
        some.program(1, 0);
        assert_eq!(some.effective, CONTAINER & !1);
    }
}
