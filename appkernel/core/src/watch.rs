//! inotify: what is watched, and the events that wait to be read (inotify(7)). Watched are paths.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::errno::Errno;

/// Events and flags.
#[expect(missing_docs, reason = "they are the system's names")]
pub mod event {
    pub const ACCESS: u32 = 1;
    pub const MODIFY: u32 = 2;
    pub const ATTRIB: u32 = 4;
    pub const CLOSE_WRITE: u32 = 8;
    pub const CLOSE_NOWRITE: u32 = 0x10;
    pub const OPEN: u32 = 0x20;
    pub const MOVED_FROM: u32 = 0x40;
    pub const MOVED_TO: u32 = 0x80;
    pub const CREATE: u32 = 0x100;
    pub const DELETE: u32 = 0x200;
    pub const DELETE_SELF: u32 = 0x400;
    pub const MOVE_SELF: u32 = 0x800;
    pub const ALL: u32 = 0xfff;
    pub const OVERFLOW: u32 = 0x4000;
    pub const IGNORED: u32 = 0x8000;
    pub const ONLY_DIRECTORY: u32 = 0x0100_0000;
    pub const DONT_FOLLOW: u32 = 0x0200_0000;
    pub const MASK_CREATE: u32 = 0x1000_0000;
    pub const MASK_ADD: u32 = 0x2000_0000;
    pub const IS_DIRECTORY: u32 = 0x4000_0000;
    pub const ONE_SHOT: u32 = 0x8000_0000;
}
use event::*;

/// Events that only whoever watches the directory sees.
const OF_DIRECTORY: u32 = MOVED_FROM | MOVED_TO | CREATE | DELETE;
/// Events that only whoever watches the file itself sees.
const OF_ITSELF: u32 = DELETE_SELF | MOVE_SELF;
/// Events that wait, and paths that are watched, at most.
const MAX_QUEUED: usize = 4096;
const MAX_WATCHES: usize = 4096;
const HEADER: usize = 16;

#[derive(Debug)]
struct Watch {
    number: i32,
    path: Vec<u8>,
    mask: u32,
}

/// The watches of one inotify file, and its events.
#[derive(Debug, Default)]
pub struct Watches {
    list: Vec<Watch>,
    queue: VecDeque<Vec<u8>>,
    last: i32,
}

fn bytes(number: i32, mask: u32, cookie: u32, name: &[u8]) -> Vec<u8> {
    let len = if name.is_empty() {
        0
    } else {
        (name.len() + 1).next_multiple_of(HEADER)
    };
    let mut bytes = Vec::with_capacity(HEADER + len);
    bytes.extend(number.to_le_bytes());
    for word in [mask, cookie, len as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(name);
    bytes.resize(HEADER + len, 0);
    bytes
}

impl Watches {
    /// Watches a path, or changes what is wanted of it; gives the watch's number.
    ///
    /// # Errors
    /// `EINVAL`: no event is wanted; `EEXIST`: it is watched, and only a new watch would do;
    /// `ENOSPC`: too many.
    pub fn add(&mut self, path: &[u8], mask: u32) -> Result<i32, Errno> {
        if mask & ALL == 0 {
            return Err(Errno::EINVAL);
        }
        if let Some(known) = self.list.iter_mut().find(|w| w.path == path) {
            if mask & MASK_CREATE != 0 {
                return Err(Errno::EEXIST);
            }
            let kept = if mask & MASK_ADD != 0 { known.mask } else { 0 };
            known.mask = kept | mask;
            return Ok(known.number);
        }
        if self.list.len() >= MAX_WATCHES {
            return Err(Errno::ENOSPC);
        }
        self.last = self.last.checked_add(1).ok_or(Errno::ENOSPC)?;
        self.list.push(Watch {
            number: self.last,
            path: path.to_vec(),
            mask,
        });
        Ok(self.last)
    }

    /// Watches a path no more.
    ///
    /// # Errors
    /// `EINVAL`: there is no such watch.
    pub fn remove(&mut self, number: i32) -> Result<(), Errno> {
        let at = self.list.iter().position(|w| w.number == number);
        self.list.remove(at.ok_or(Errno::EINVAL)?);
        self.put(bytes(number, IGNORED, 0, b""));
        Ok(())
    }

    fn put(&mut self, event: Vec<u8>) {
        // The same again says nothing.
        if self.queue.back() == Some(&event) {
            return;
        }
        match self.queue.len() {
            ..MAX_QUEUED => self.queue.push_back(event),
            MAX_QUEUED => self.queue.push_back(bytes(-1, OVERFLOW, 0, b"")),
            _ => {}
        }
    }

    /// Something happened to a path; whether anybody here wants to know.
    pub fn tell(&mut self, path: &[u8], event: u32, directory: bool, cookie: u32) -> bool {
        self.spread(path, event, directory, cookie, event & OF_ITSELF == 0)
    }

    /// A name was taken away; whether anybody here wants to know.
    pub fn gone(&mut self, path: &[u8], directory: bool) -> bool {
        // The file has one name less, which its directory is not told.
        let fewer = !directory && self.spread(path, ATTRIB, false, 0, false);
        let itself = self.tell(path, DELETE_SELF, directory, 0);
        self.tell(path, DELETE, directory, 0) || itself || fewer
    }

    fn spread(
        &mut self,
        path: &[u8],
        event: u32,
        directory: bool,
        cookie: u32,
        to_parent: bool,
    ) -> bool {
        let cut = path.iter().rposition(|b| *b == b'/').unwrap_or(0);
        let (parent, name) = path.split_at(cut);
        let parent = if parent.is_empty() { b"/" } else { parent };
        let name = name.get(1..).unwrap_or_default();
        let extra = if directory { IS_DIRECTORY } else { 0 };
        let mut found = Vec::new();
        let mut over = Vec::new();
        for watch in &self.list {
            let of_child = to_parent && watch.path == parent && !name.is_empty();
            let of_self = watch.path == path && event & OF_DIRECTORY == 0;
            if watch.mask & event != 0 && (of_child || of_self) {
                let name = if of_child { name } else { b"" };
                // What happens to itself is told without its kind.
                let extra = if event & OF_ITSELF != 0 { 0 } else { extra };
                found.push(bytes(watch.number, event | extra, cookie, name));
                if watch.mask & ONE_SHOT != 0 {
                    over.push(watch.number);
                }
            }
            if event & DELETE_SELF != 0 && watch.path == path {
                over.push(watch.number);
            }
        }
        let any = !found.is_empty() || !over.is_empty();
        for event in found {
            self.put(event);
        }
        for number in over {
            let _ = self.remove(number);
        }
        any
    }

    /// A watched path has another name now.
    pub fn moved(&mut self, from: &[u8], to: &[u8]) {
        for watch in self.list.iter_mut().filter(|w| w.path == from) {
            watch.path = to.to_vec();
        }
    }

    /// Bytes that wait.
    pub fn waiting(&self) -> usize {
        self.queue.iter().map(Vec::len).sum()
    }

    /// Takes whole events, at most `room` bytes; `None` if there are none.
    ///
    /// # Errors
    /// `EINVAL`: not even the first one fits.
    pub fn take(&mut self, room: usize) -> Option<Result<Vec<u8>, Errno>> {
        let mut all = Vec::new();
        if self.queue.front()?.len() > room {
            return Some(Err(Errno::EINVAL));
        }
        while let Some(event) = self.queue.pop_front_if(|e| all.len() + e.len() <= room) {
            all.extend(event);
        }
        Some(Ok(all))
    }
}

#[cfg(test)]
mod tests {
    use std::prelude::v1::*;

    use super::*;

    /// Number, event, cookie and name of each.
    fn events(bytes: &[u8]) -> Vec<(i32, u32, u32, String)> {
        let mut rest = bytes;
        let mut all = Vec::new();
        while !rest.is_empty() {
            let word = |i: usize| u32::from_le_bytes(rest[i * 4..i * 4 + 4].try_into().unwrap());
            let end = HEADER + word(3) as usize;
            let name: Vec<u8> = rest[HEADER..end]
                .iter()
                .copied()
                .take_while(|b| *b != 0)
                .collect();
            all.push((
                word(0) as i32,
                word(1),
                word(2),
                String::from_utf8(name).unwrap(),
            ));
            rest = &rest[end..];
        }
        all
    }

    #[test]
    fn directories_and_files_are_told_what_they_asked_for() {
        let mut watches = Watches::default();
        let dir = watches
            .add(b"/d", CREATE | DELETE | MOVED_TO | CLOSE_WRITE)
            .unwrap();
        let file = watches.add(b"/d/f", MODIFY | DELETE_SELF).unwrap();
        assert!(watches.tell(b"/d/f", CREATE, false, 0));
        assert!(watches.tell(b"/d/f", MODIFY, false, 0));
        watches.tell(b"/d/f", MODIFY, false, 0);
        assert!(!watches.tell(b"/d/f", OPEN, false, 0));
        assert!(!watches.tell(b"/d/e/f", CREATE, false, 0));
        watches.tell(b"/d/sub", CREATE, true, 0);
        watches.tell(b"/d/g", MOVED_TO, false, 7);
        watches.gone(b"/d/f", false);
        assert_eq!(watches.take(8), Some(Err(Errno::EINVAL)));
        let all = events(&watches.take(4096).unwrap().unwrap());
        let name = String::from;
        assert_eq!(
            all,
            [
                (dir, CREATE, 0, name("f")),
                (file, MODIFY, 0, name("")),
                (dir, CREATE | IS_DIRECTORY, 0, name("sub")),
                (dir, MOVED_TO, 7, name("g")),
                (file, DELETE_SELF, 0, name("")),
                (file, IGNORED, 0, name("")),
                (dir, DELETE, 0, name("f")),
            ]
        );
        assert_eq!(watches.take(4096), None);
        assert_eq!(watches.remove(file), Err(Errno::EINVAL));
        assert_eq!(watches.add(b"/d", MASK_CREATE | OPEN), Err(Errno::EEXIST));
        assert_eq!(watches.add(b"/d", MASK_ADD | OPEN), Ok(dir));
        assert!(watches.tell(b"/d/x", OPEN, false, 0) && watches.tell(b"/d/x", CREATE, false, 0));
    }

    #[test]
    fn what_nobody_reads_ends_in_an_overflow() {
        let mut watches = Watches::default();
        let number = watches.add(b"/", CREATE | DELETE).unwrap();
        for i in 0..3 * MAX_QUEUED {
            let event = if i % 2 == 0 { CREATE } else { DELETE };
            watches.tell(b"/a", event, false, 0);
        }
        let mut count = 0;
        let mut last = (0, 0, 0, String::new());
        while let Some(bytes) = watches.take(64) {
            for event in events(&bytes.unwrap()) {
                count += 1;
                last = event;
            }
        }
        assert_eq!(
            (count, last),
            (MAX_QUEUED + 1, (-1, OVERFLOW, 0, String::new()))
        );
        assert!(watches.tell(b"/a", CREATE, false, 0) && watches.waiting() > 0);
        let once = watches.add(b"/b", ATTRIB | ONE_SHOT).unwrap();
        watches.tell(b"/b", ATTRIB, false, 0);
        assert!(!watches.tell(b"/b", ATTRIB, false, 0) && once != number);
        assert_eq!(watches.add(b"/c", 0), Err(Errno::EINVAL));
    }
}
