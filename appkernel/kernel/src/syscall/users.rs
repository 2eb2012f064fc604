//! Calls on users and groups.

use alloc::vec::Vec;

use appkernel_core::capabilities::{Capabilities, SETGID, SETUID};
use appkernel_core::errno::Errno;

use super::{Call, Result, get, put};
use crate::task;

/// As Linux (`NGROUPS_MAX`).
const MAX_GROUPS: u64 = 65536;
const KEEP: u32 = u32::MAX;

/// The calls of this family.
pub fn call(c: &Call<'_>) -> Option<Result> {
    let own = || c.task.credentials.lock().clone();
    Some(match c.number {
        102 => Ok(own().uid.into()),
        104 => Ok(own().gid.into()),
        107 => Ok(own().euid.into()),
        108 => Ok(own().egid.into()),
        105 => {
            let id = c.uint(0);
            if own().capabilities.has(SETUID) {
                set_users(c, [id, id, id])
            } else {
                set_users(c, [KEEP, id, KEEP])
            }
        }
        106 => {
            let id = c.uint(0);
            if own().capabilities.has(SETGID) {
                set_groups_of(c, [id, id, id])
            } else {
                set_groups_of(c, [KEEP, id, KEEP])
            }
        }
        113 => {
            let saved = if c.uint(0) != KEEP || c.uint(1) != KEEP && c.uint(1) != own().uid {
                if c.uint(1) == KEEP {
                    own().euid
                } else {
                    c.uint(1)
                }
            } else {
                KEEP
            };
            let own = own();
            let (ruid, euid) = (c.uint(0), c.uint(1));
            // The saved one is no choice for the real one.
            let may = own.capabilities.has(SETUID);
            let real_ok = may || ruid == KEEP || [own.uid, own.euid].contains(&ruid);
            if !real_ok || !may && euid != KEEP && ![own.uid, own.euid, own.suid].contains(&euid) {
                return Some(Err(Errno::EPERM));
            }
            set_users(c, [c.uint(0), c.uint(1), saved])
        }
        114 => {
            let saved = if c.uint(0) != KEEP || c.uint(1) != KEEP && c.uint(1) != own().gid {
                if c.uint(1) == KEEP {
                    own().egid
                } else {
                    c.uint(1)
                }
            } else {
                KEEP
            };
            set_groups_of(c, [c.uint(0), c.uint(1), saved])
        }
        115 => groups(c),
        116 => set_groups(c),
        117 => set_users(c, [c.uint(0), c.uint(1), c.uint(2)]),
        118 => {
            let own = own();
            put_ids(c, [own.uid, own.euid, own.suid])
        }
        119 => set_groups_of(c, [c.uint(0), c.uint(1), c.uint(2)]),
        120 => {
            let own = own();
            put_ids(c, [own.gid, own.egid, own.sgid])
        }
        122 => {
            let mut own = c.task.credentials.lock();
            let (old, id) = (own.fsuid, c.uint(0));
            if own.is_root() || [own.uid, own.euid, own.suid, own.fsuid].contains(&id) {
                // It is no user at all: only asked for.
                own.fsuid = if id == KEEP { old } else { id };
            }
            Ok(old.into())
        }
        123 => {
            let mut own = c.task.credentials.lock();
            let (old, id) = (own.fsgid, c.uint(0));
            if own.is_root() || [own.gid, own.egid, own.sgid, own.fsgid].contains(&id) {
                own.fsgid = if id == KEEP { old } else { id };
            }
            Ok(old.into())
        }
        125 => capabilities(c),
        126 => set_capabilities(c),
        _ => return None,
    })
}

fn put_ids(c: &Call<'_>, ids: [u32; 3]) -> Result {
    for (i, id) in ids.into_iter().enumerate() {
        put(c.arg(i), &id.to_le_bytes())?;
    }
    Ok(0)
}

/// Who has the capability becomes anybody; others change between what they are already.
fn chosen(wanted: [u32; 3], now: [u32; 3], root: bool) -> Result<[u32; 3]> {
    let mut new = now;
    for (slot, id) in new.iter_mut().zip(wanted) {
        if id == KEEP {
            continue;
        }
        if !root && !now.contains(&id) {
            return Err(Errno::EPERM);
        }
        *slot = id;
    }
    Ok(new)
}

fn set_users(c: &Call<'_>, wanted: [u32; 3]) -> Result {
    let mut own = c.task.credentials.lock();
    let now = [own.uid, own.euid, own.suid];
    let new = chosen(wanted, now, own.capabilities.has(SETUID))?;
    own.set_users(new);
    Ok(0)
}

fn set_groups_of(c: &Call<'_>, wanted: [u32; 3]) -> Result {
    let mut own = c.task.credentials.lock();
    let now = [own.gid, own.egid, own.sgid];
    let may = own.capabilities.has(SETGID);
    [own.gid, own.egid, own.sgid] = chosen(wanted, now, may)?;
    own.fsgid = own.egid;
    Ok(0)
}

fn groups(c: &Call<'_>) -> Result {
    let groups = c.task.credentials.lock().groups.clone();
    let room = c.arg(0) & 0xffff_ffff;
    if room == 0 {
        return Ok(groups.len() as u64);
    }
    if room < groups.len() as u64 {
        return Err(Errno::EINVAL);
    }
    let bytes: Vec<u8> = groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    put(c.arg(1), &bytes)?;
    Ok(groups.len() as u64)
}

fn set_groups(c: &Call<'_>) -> Result {
    let count = c.arg(0) & 0xffff_ffff;
    if count > MAX_GROUPS {
        return Err(Errno::EINVAL);
    }
    if !c.task.credentials.lock().capabilities.has(SETGID) {
        return Err(Errno::EPERM);
    }
    let mut groups = Vec::new();
    for i in 0..count {
        groups.push(u32::from_le_bytes(get(c.arg(1).wrapping_add(i * 4))?));
    }
    c.task.credentials.lock().groups = groups;
    Ok(0)
}

/// How many halves of each set a version of the structure has, and the process it is about.
fn header(c: &Call<'_>) -> Result<(usize, u32)> {
    const VERSION_1: u32 = 0x1998_0330;
    const VERSION_2: u32 = 0x2007_1026;
    const VERSION_3: u32 = 0x2008_0522;
    let version = u32::from_le_bytes(get(c.arg(0))?);
    let halves = match version {
        VERSION_1 => 1,
        VERSION_2 | VERSION_3 => 2,
        _ => {
            put(c.arg(0), &VERSION_3.to_le_bytes())?;
            return Err(Errno::EINVAL);
        }
    };
    let process = u32::from_le_bytes(get(c.arg(0).wrapping_add(4))?);
    Ok((halves, process))
}

/// capget(2).
fn capabilities(c: &Call<'_>) -> Result {
    let (halves, process) = match header(c) {
        // Only the version was asked for.
        Err(Errno::EINVAL) if c.arg(1) == 0 => return Ok(0),
        other => other?,
    };
    let own: Capabilities = match process {
        // Negative numbers.
        0x8000_0000.. => return Err(Errno::EINVAL),
        0 => c.task.credentials.lock().capabilities,
        id => {
            let task = task::find(c.task.container.id(id)).ok_or(Errno::ESRCH)?;
            let credentials = task.credentials.lock();
            credentials.capabilities
        }
    };
    if c.arg(1) == 0 {
        return Ok(0);
    }
    let mut bytes = Vec::new();
    for half in 0..halves {
        for set in [own.effective, own.permitted, own.inheritable] {
            bytes.extend(((set >> (32 * half)) as u32).to_le_bytes());
        }
    }
    put(c.arg(1), &bytes)?;
    Ok(0)
}

/// capset(2): of the caller itself.
fn set_capabilities(c: &Call<'_>) -> Result {
    let (halves, process) = header(c)?;
    if process != 0 && c.task.container.id(process) != c.task.id {
        return Err(Errno::EPERM);
    }
    let mut sets = [0u64; 3];
    for half in 0..halves {
        for (i, set) in sets.iter_mut().enumerate() {
            let at = c.arg(1).wrapping_add((half * 12 + i * 4) as u64);
            *set |= u64::from(u32::from_le_bytes(get(at)?)) << (32 * half);
        }
    }
    let mut own = c.task.credentials.lock();
    own.capabilities.set(sets[0], sets[1], sets[2])?;
    Ok(0)
}
