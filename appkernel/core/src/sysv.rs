//! System V objects: keys and identifiers, who may do what with them, semaphores and messages.
//! What sleeps, and what is mapped, is the kernel's.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use crate::errno::Errno;

/// Make it if it is not there; and only then.
pub const CREATE: u32 = 0o1000;
/// With `CREATE`: it must not be there.
pub const EXCLUSIVE: u32 = 0o2000;
/// Do not wait.
pub const NOWAIT: u32 = 0o4000;
/// The key of an object that only its identifier finds.
pub const PRIVATE: i32 = 0;
/// Objects of a kind, at most (as Linux' limits are 32000; these are the kernel's memory).
pub const MAX_OBJECTS: usize = 1024;
/// Identifiers are a number in the table, and how often its place was used.
const PLACES: i32 = 32768;

/// Largest message.
pub const MESSAGE_MAX: usize = 8192;
/// Bytes in a queue, at first.
pub const QUEUE_BYTES: usize = 16384;
/// Semaphores of a set, operations of a call.
pub const SEMAPHORES_MAX: usize = 250;
/// Operations of one call.
pub const OPERATIONS_MAX: usize = 500;
/// Largest value of a semaphore.
pub const VALUE_MAX: i32 = 32767;

/// Who asks.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Other groups.
    pub groups: Vec<u32>,
    /// May all.
    pub root: bool,
    /// Its process.
    pub process: u32,
    /// Seconds since 1970.
    pub now: u64,
}

/// Who an object belongs to: `struct ipc_perm`.
#[derive(Clone, Debug, Default)]
pub struct Owner {
    /// Its key.
    pub key: i32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Who made it.
    pub cuid: u32,
    /// Group of who made it.
    pub cgid: u32,
    /// Permission bits.
    pub mode: u32,
    /// How often the place was used.
    pub sequence: u16,
}

impl Owner {
    /// Whether the caller may do what is `wanted`: 4 to read, 2 to change.
    pub fn may(&self, caller: &Caller, wanted: u32) -> bool {
        let in_group = |gid| caller.gid == gid || caller.groups.contains(&gid);
        let shift = if caller.uid == self.uid || caller.uid == self.cuid {
            6
        } else if in_group(self.gid) || in_group(self.cgid) {
            3
        } else {
            0
        };
        caller.root || wanted & !(self.mode >> shift) & 7 == 0
    }

    /// Whether the caller may change owners, or remove it.
    pub fn owns(&self, caller: &Caller) -> bool {
        caller.root || caller.uid == self.uid || caller.uid == self.cuid
    }
}

/// An object with its owner.
#[derive(Clone, Debug)]
pub struct Entry<T> {
    /// Whose it is.
    pub owner: Owner,
    /// Itself.
    pub it: T,
}

/// Objects of a kind.
#[derive(Debug)]
pub struct Table<T> {
    places: Vec<Option<Entry<T>>>,
    sequence: u16,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            sequence: 0,
        }
    }
}

impl<T> Table<T> {
    /// The identifier for a key: of the object that has it, or of one that is made.
    ///
    /// # Errors
    /// `ENOENT`, `EEXIST`, `EACCES`, `ENOSPC`, or what `fits` or `make` give.
    pub fn get(
        &mut self,
        key: i32,
        flags: u32,
        caller: &Caller,
        fits: impl FnOnce(&T) -> Result<(), Errno>,
        make: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<i32, Errno> {
        let known = |e: &Option<Entry<T>>| e.as_ref().is_some_and(|e| e.owner.key == key);
        if key != PRIVATE
            && let Some(place) = self.places.iter().position(known)
            && let Some(Some(entry)) = self.places.get(place)
        {
            if flags & (CREATE | EXCLUSIVE) == CREATE | EXCLUSIVE {
                return Err(Errno::EEXIST);
            }
            fits(&entry.it)?;
            // All that is asked for must be allowed: to the owner, the group, or the others.
            let wanted = (flags >> 6 | flags >> 3 | flags) & 7;
            if !entry.owner.may(caller, wanted) {
                return Err(Errno::EACCES);
            }
            return Ok(Self::identifier(place, entry.owner.sequence));
        }
        if key != PRIVATE && flags & CREATE == 0 {
            return Err(Errno::ENOENT);
        }
        let place = match self.places.iter().position(Option::is_none) {
            Some(place) => place,
            None if self.places.len() >= MAX_OBJECTS => return Err(Errno::ENOSPC),
            None => {
                self.places.push(None);
                self.places.len() - 1
            }
        };
        let it = make()?;
        self.sequence = (self.sequence + 1) & 0x7fff;
        let owner = Owner {
            key,
            uid: caller.uid,
            gid: caller.gid,
            cuid: caller.uid,
            cgid: caller.gid,
            mode: flags & 0o777,
            sequence: self.sequence,
        };
        let id = Self::identifier(place, owner.sequence);
        if let Some(slot) = self.places.get_mut(place) {
            *slot = Some(Entry { owner, it });
        }
        Ok(id)
    }

    fn identifier(place: usize, sequence: u16) -> i32 {
        i32::from(sequence)
            .wrapping_mul(PLACES)
            .wrapping_add(place as i32)
            & i32::MAX
    }

    fn place(id: i32) -> Result<usize, Errno> {
        usize::try_from(id)
            .map(|id| id % PLACES as usize)
            .map_err(|_| Errno::EINVAL)
    }

    /// The object of an identifier.
    ///
    /// # Errors
    /// `EINVAL`: there is none.
    pub fn find(&mut self, id: i32) -> Result<&mut Entry<T>, Errno> {
        let place = Self::place(id)?;
        match self.places.get_mut(place) {
            Some(Some(entry)) if Self::identifier(place, entry.owner.sequence) == id => Ok(entry),
            _ => Err(Errno::EINVAL),
        }
    }

    /// The object of a place in the table, with its identifier.
    ///
    /// # Errors
    /// `EINVAL`: there is none.
    pub fn at(&mut self, place: i32) -> Result<(i32, &mut Entry<T>), Errno> {
        let place = usize::try_from(place).map_err(|_| Errno::EINVAL)?;
        match self.places.get_mut(place) {
            Some(Some(entry)) => Ok((Self::identifier(place, entry.owner.sequence), entry)),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Takes an object out.
    ///
    /// # Errors
    /// `EINVAL`: there is none.
    pub fn remove(&mut self, id: i32) -> Result<T, Errno> {
        self.find(id)?;
        let slot = self.places.get_mut(Self::place(id)?);
        slot.and_then(Option::take)
            .map(|e| e.it)
            .ok_or(Errno::EINVAL)
    }

    /// All objects, with identifiers.
    pub fn iter(&self) -> impl Iterator<Item = (i32, &Entry<T>)> {
        let all = self.places.iter().enumerate();
        all.filter_map(|(place, e)| {
            let entry = e.as_ref()?;
            Some((Self::identifier(place, entry.owner.sequence), entry))
        })
    }

    /// The largest place in use; 0 when there is none.
    pub fn highest(&self) -> usize {
        self.places.iter().rposition(Option::is_some).unwrap_or(0)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.places.iter().flatten().count()
    }
}

/// Sets owner, group and permission bits (`IPC_SET`).
///
/// # Errors
/// `EPERM`.
pub fn set_owner(
    owner: &mut Owner,
    caller: &Caller,
    uid: u32,
    gid: u32,
    mode: u32,
) -> Result<(), Errno> {
    if !owner.owns(caller) {
        return Err(Errno::EPERM);
    }
    (owner.uid, owner.gid) = (uid, gid);
    owner.mode = owner.mode & !0o777 | mode & 0o777;
    Ok(())
}

/// A semaphore.
#[derive(Clone, Copy, Debug, Default)]
pub struct Semaphore {
    /// Its value.
    pub value: i32,
    /// Who changed it last.
    pub process: u32,
    /// Who waits for it to grow.
    pub waiting: u32,
    /// Who waits for it to be zero.
    pub waiting_zero: u32,
}

/// One operation of `semop`.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// Which semaphore.
    pub number: u16,
    /// What is added; 0 waits for zero.
    pub add: i16,
    /// Does not wait.
    pub nowait: bool,
    /// Is taken back when the process ends.
    pub undo: bool,
}

/// A set of semaphores.
#[derive(Clone, Debug, Default)]
pub struct Set {
    /// They.
    pub all: Vec<Semaphore>,
    /// When a semop and a change was last.
    pub op_time: u64,
    /// When it was last changed.
    pub change_time: u64,
    /// What the end of processes adds: process, semaphore, value.
    pub undo: Vec<(u32, u16, i32)>,
}

/// Why operations are not done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// That semaphore has to grow.
    Grow(u16),
    /// It has to become zero.
    Zero(u16),
    /// The call is wrong, or does not want to wait.
    Failed(Errno),
}

impl Set {
    /// A set of so many.
    ///
    /// # Errors
    /// `EINVAL`: none, or too many.
    pub fn new(count: usize, now: u64) -> Result<Self, Errno> {
        if count == 0 || count > SEMAPHORES_MAX {
            return Err(Errno::EINVAL);
        }
        Ok(Self {
            all: vec![Semaphore::default(); count],
            change_time: now,
            ..Self::default()
        })
    }

    /// Does all operations, or none.
    ///
    /// # Errors
    /// Why they are not done.
    pub fn operate(&mut self, operations: &[Operation], caller: &Caller) -> Result<(), Blocked> {
        let mut new = self.all.clone();
        let mut undo = self.undo.clone();
        for one in operations {
            let failed = Blocked::Failed;
            let semaphore = new
                .get_mut(usize::from(one.number))
                .ok_or(failed(Errno::EFBIG))?;
            let blocked = match one.add {
                0 => (semaphore.value != 0).then_some(Blocked::Zero(one.number)),
                add => {
                    let value = semaphore.value + i32::from(add);
                    if value > VALUE_MAX {
                        return Err(failed(Errno::ERANGE));
                    }
                    semaphore.value = value.max(0);
                    (value < 0).then_some(Blocked::Grow(one.number))
                }
            };
            if let Some(blocked) = blocked {
                return Err(if one.nowait {
                    failed(Errno::EAGAIN)
                } else {
                    blocked
                });
            }
            semaphore.process = caller.process;
            if one.undo && one.add != 0 {
                let known = undo
                    .iter_mut()
                    .find(|u| (u.0, u.1) == (caller.process, one.number));
                match known {
                    Some(known) => known.2 -= i32::from(one.add),
                    None => undo.push((caller.process, one.number, -i32::from(one.add))),
                }
            }
        }
        undo.retain(|u| u.2 != 0);
        (self.all, self.undo, self.op_time) = (new, undo, caller.now);
        Ok(())
    }

    /// A process ended: what it wanted to be taken back is. Whether anything was.
    pub fn ended(&mut self, process: u32) -> bool {
        let mut any = false;
        let (all, undo) = (&mut self.all, &mut self.undo);
        undo.retain(|(of, number, add)| {
            if *of != process {
                return true;
            }
            if let Some(semaphore) = all.get_mut(usize::from(*number)) {
                semaphore.value = (semaphore.value + add).clamp(0, VALUE_MAX);
                any = true;
            }
            false
        });
        any
    }
}

/// A queue of messages.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    messages: VecDeque<(i64, Vec<u8>)>,
    /// Bytes in it.
    pub bytes: usize,
    /// Bytes it may have.
    pub most: usize,
    /// Last send, receive and change.
    pub times: [u64; 3],
    /// Who sent last, who received last.
    pub processes: [u32; 2],
}

/// Which message is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// 0 the first; positive that type; negative the lowest up to it.
    pub kind: i64,
    /// Any but that type.
    pub except: bool,
    /// The one of that number in the queue, which stays.
    pub copy: bool,
}

impl Queue {
    /// An empty queue.
    pub fn new(now: u64) -> Self {
        Self {
            most: QUEUE_BYTES,
            times: [0, 0, now],
            ..Self::default()
        }
    }

    /// Number of messages.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Adds a message; whether there was room.
    pub fn send(&mut self, kind: i64, text: &[u8], caller: &Caller) -> bool {
        // Messages without text are the kernel's memory too: as many as bytes.
        if self.bytes + text.len() > self.most || self.messages.len() >= self.most {
            return false;
        }
        self.bytes += text.len();
        self.messages.push_back((kind, text.to_vec()));
        self.times[0] = caller.now;
        self.processes[0] = caller.process;
        true
    }

    /// Takes a message of at most `room` bytes; longer ones are cut if `cut`. `None`: there is none.
    ///
    /// # Errors
    /// `E2BIG`: it is longer.
    pub fn receive(
        &mut self,
        wanted: Wanted,
        room: usize,
        cut: bool,
        caller: &Caller,
    ) -> Result<Option<(i64, Vec<u8>)>, Errno> {
        let kinds = || self.messages.iter().map(|(kind, _)| *kind);
        let found = match wanted.kind {
            n if wanted.copy => usize::try_from(n).ok().filter(|n| *n < self.messages.len()),
            0 => (!self.messages.is_empty()).then_some(0),
            n @ 1.. if wanted.except => kinds().position(|kind| kind != n),
            n @ 1.. => kinds().position(|kind| kind == n),
            n => {
                let most = n.checked_neg().unwrap_or(i64::MAX);
                let lowest = kinds().filter(|kind| *kind <= most).min();
                lowest.and_then(|low| kinds().position(|kind| kind == low))
            }
        };
        let Some(at) = found else { return Ok(None) };
        let len = self.messages.get(at).map_or(0, |(_, text)| text.len());
        if len > room && !cut {
            return Err(Errno::E2BIG);
        }
        let message = if wanted.copy {
            self.messages.get(at).cloned()
        } else {
            self.bytes = self.bytes.saturating_sub(len);
            self.times[1] = caller.now;
            self.processes[1] = caller.process;
            self.messages.remove(at)
        };
        Ok(message.map(|(kind, mut text)| {
            text.truncate(room);
            (kind, text)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(uid: u32, root: bool) -> Caller {
        Caller {
            uid,
            gid: uid,
            root,
            process: 7,
            now: 100,
            ..Caller::default()
        }
    }

    fn get(table: &mut Table<u8>, key: i32, flags: u32, who: &Caller) -> Result<i32, Errno> {
        table.get(key, flags, who, |_| Ok(()), || Ok(1))
    }

    #[test]
    fn keys_find_what_was_made_and_permissions_count() {
        let mut table = Table::default();
        let (me, other) = (caller(5, false), caller(6, false));
        assert_eq!(get(&mut table, 9, 0, &me), Err(Errno::ENOENT));
        let id = get(&mut table, 9, CREATE | 0o600, &me).unwrap();
        assert_eq!(get(&mut table, 9, 0, &me), Ok(id));
        assert_eq!(
            get(&mut table, 9, CREATE | EXCLUSIVE, &me),
            Err(Errno::EEXIST)
        );
        assert_eq!(get(&mut table, 9, 0o400, &other), Err(Errno::EACCES));
        assert_eq!(get(&mut table, 9, 0o600, &caller(6, true)), Ok(id));
        let private = get(&mut table, PRIVATE, 0o600, &me).unwrap();
        assert_ne!(private, get(&mut table, PRIVATE, 0o600, &me).unwrap());
        assert_eq!(table.remove(id), Ok(1));
        assert!(table.find(id).is_err());
        let again = get(&mut table, 9, CREATE, &me).unwrap();
        assert!(again != id && table.find(id).is_err() && table.find(-1).is_err());
    }

    #[test]
    fn the_number_of_objects_is_limited() {
        let mut table = Table::default();
        let me = caller(0, true);
        for _ in 0..MAX_OBJECTS {
            get(&mut table, PRIVATE, 0, &me).unwrap();
        }
        assert_eq!(get(&mut table, PRIVATE, 0, &me), Err(Errno::ENOSPC));
    }

    fn op(number: u16, add: i16, undo: bool) -> Operation {
        Operation {
            number,
            add,
            nowait: false,
            undo,
        }
    }

    #[test]
    fn operations_are_done_together_or_not_at_all() {
        let mut set = Set::new(2, 0).unwrap();
        let me = caller(0, true);
        set.operate(&[op(0, 2, false), op(1, 1, true)], &me)
            .unwrap();
        assert_eq!(
            set.operate(&[op(0, -1, false), op(1, -2, false)], &me),
            Err(Blocked::Grow(1))
        );
        assert_eq!((set.all[0].value, set.all[1].value), (2, 1));
        assert_eq!(set.operate(&[op(0, 0, false)], &me), Err(Blocked::Zero(0)));
        let failed = |set: &mut Set, op| set.operate(&[op], &me);
        assert_eq!(
            failed(&mut set, op(2, 1, false)),
            Err(Blocked::Failed(Errno::EFBIG))
        );
        assert_eq!(
            failed(&mut set, op(0, i16::MAX, false)),
            Err(Blocked::Failed(Errno::ERANGE))
        );
        let mut hurried = op(0, -5, false);
        hurried.nowait = true;
        assert_eq!(
            failed(&mut set, hurried),
            Err(Blocked::Failed(Errno::EAGAIN))
        );
        assert!(set.ended(7) && !set.ended(7));
        assert_eq!(set.all[1].value, 0);
    }

    #[test]
    fn messages_are_chosen_by_type() {
        let mut queue = Queue::new(0);
        let me = caller(0, true);
        for (kind, text) in [(3, "three"), (1, "one"), (2, "two")] {
            assert!(queue.send(kind, text.as_bytes(), &me));
        }
        let wanted = |kind| Wanted {
            kind,
            except: false,
            copy: false,
        };
        let mut take = |w| queue.receive(w, 100, false, &me).unwrap().map(|m| m.0);
        assert_eq!(take(wanted(-2)), Some(1));
        assert_eq!(take(wanted(9)), None);
        let other = Wanted {
            except: true,
            ..wanted(3)
        };
        assert_eq!(take(other), Some(2));
        assert_eq!(queue.receive(wanted(0), 2, false, &me), Err(Errno::E2BIG));
        let cut = queue.receive(wanted(0), 2, true, &me).unwrap();
        assert_eq!(cut, Some((3, b"th".to_vec())));
        assert_eq!((queue.bytes, queue.len()), (0, 0));
        assert!(!queue.send(1, &[0; QUEUE_BYTES + 1], &me));
    }
}
