//! Record locks of files (fcntl): who has which bytes.

use alloc::vec::Vec;

use crate::errno::Errno;

/// Locks on one file, at most: a program that takes every other byte gets `ENOLCK`.
const MAX_LOCKS: usize = 4096;

/// The owner that stands for an open file: processes have small numbers.
pub const fn of_file(number: u64) -> u64 {
    1 << 63 | number
}

/// Bytes somebody has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// The process, or the open file ([`of_file`]).
    pub owner: u64,
    /// Nobody else may have any of them.
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Byte past the last.
    pub end: u64,
}

impl Lock {
    fn overlaps(&self, start: u64, end: u64) -> bool {
        self.start < end && start < self.end
    }
}

/// The locks on one file.
#[derive(Debug, Default)]
pub struct Locks(Vec<Lock>);

impl Locks {
    /// A lock of another process that is in the way.
    pub fn conflict(&self, wanted: &Lock) -> Option<Lock> {
        self.0
            .iter()
            .filter(|l| {
                l.owner != wanted.owner
                    && l.overlaps(wanted.start, wanted.end)
                    && (l.exclusive || wanted.exclusive)
            })
            // The first in the file, as Linux tells it.
            .min_by_key(|l| l.start)
            .copied()
    }

    /// Takes a lock, in place of what the process has of these bytes.
    ///
    /// # Errors
    /// `EAGAIN` if another process is in the way, `ENOLCK` if there are too many.
    pub fn take(&mut self, wanted: Lock) -> Result<(), Errno> {
        if self.conflict(&wanted).is_some() {
            return Err(Errno::EAGAIN);
        }
        if self.0.len() + 2 > MAX_LOCKS {
            return Err(Errno::ENOLCK);
        }
        self.release(wanted.owner, wanted.start, wanted.end);
        // Neighbours of the same kind become one.
        let mut joined = wanted;
        self.0.retain(|l| {
            let same = l.owner == joined.owner && l.exclusive == joined.exclusive;
            let touches = l.start <= joined.end && joined.start <= l.end;
            if same && touches {
                joined.start = joined.start.min(l.start);
                joined.end = joined.end.max(l.end);
            }
            !(same && touches)
        });
        self.0.push(joined);
        Ok(())
    }

    /// Gives bytes back; whether there were any.
    pub fn release(&mut self, owner: u64, start: u64, end: u64) -> bool {
        let mut rest = Vec::new();
        let before = self.0.len();
        self.0.retain(|lock| {
            if lock.owner != owner || !lock.overlaps(start, end) {
                return true;
            }
            for (from, to) in [
                (lock.start, start.min(lock.end)),
                (end.max(lock.start), lock.end),
            ] {
                if from < to {
                    rest.push(Lock {
                        start: from,
                        end: to,
                        ..*lock
                    });
                }
            }
            false
        });
        let any = self.0.len() != before;
        self.0.extend(rest);
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(owner: u64, exclusive: bool, start: u64, end: u64) -> Lock {
        Lock {
            owner,
            exclusive,
            start,
            end,
        }
    }

    #[test]
    fn readers_share_and_writers_do_not() {
        let mut locks = Locks::default();
        locks.take(lock(1, false, 0, 10)).unwrap();
        locks.take(lock(2, false, 5, 15)).unwrap();
        assert_eq!(locks.take(lock(1, true, 5, 6)), Err(Errno::EAGAIN));
        locks.take(lock(1, true, 0, 5)).unwrap();
        assert_eq!(locks.conflict(&lock(2, false, 4, 5)).unwrap().owner, 1);
        assert_eq!(locks.conflict(&lock(3, false, 5, 20)), None);
    }

    #[test]
    fn neighbours_of_one_kind_are_one_and_the_first_in_the_file_is_told() {
        let mut locks = Locks::default();
        locks.take(lock(1, false, 10, 20)).unwrap();
        locks.take(lock(1, true, 20, 30)).unwrap();
        locks.take(lock(1, false, 0, 10)).unwrap();
        let first = locks.conflict(&lock(2, true, 0, 100)).unwrap();
        assert_eq!((first.start, first.end, first.exclusive), (0, 20, false));
        locks.take(lock(1, true, 0, 20)).unwrap();
        let all = locks.conflict(&lock(2, true, 0, 100)).unwrap();
        assert_eq!((all.start, all.end), (0, 30));
        // An open file is somebody else than the process with its number.
        assert!(locks.take(lock(of_file(1), true, 5, 6)).is_err());
    }

    #[test]
    fn a_hole_in_a_lock_leaves_both_sides() {
        let mut locks = Locks::default();
        locks.take(lock(1, true, 0, u64::MAX)).unwrap();
        assert!(locks.release(1, 10, 20));
        assert_eq!(locks.conflict(&lock(2, true, 10, 20)), None);
        assert!(locks.conflict(&lock(2, true, 9, 10)).is_some());
        assert!(locks.conflict(&lock(2, true, 20, 21)).is_some());
        assert!(locks.release(1, 0, u64::MAX) && !locks.release(1, 0, u64::MAX));
    }
}
