//! The areas of an address space: what is mapped where. `F` stands for what an area shows.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

const PAGE: u64 = 4096;

/// Readable.
pub const READ: u8 = 1;
/// Writable.
pub const WRITE: u8 = 2;
/// Executable.
pub const EXECUTE: u8 = 4;

/// What an area shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing<F> {
    /// Zeros, until written.
    Zero,
    /// A file from this place on.
    File(F, u64),
}

/// A range of pages of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area<F> {
    /// First address.
    pub start: u64,
    /// Address past the last.
    pub end: u64,
    /// [`READ`], [`WRITE`], [`EXECUTE`].
    pub protection: u8,
    /// Changes are everybody's.
    pub shared: bool,
    /// What it shows.
    pub backing: Backing<F>,
}

impl<F: Clone> Area<F> {
    fn from(&self, start: u64) -> Self {
        let mut area = self.clone();
        if let Backing::File(_, offset) = &mut area.backing {
            *offset += start - self.start;
        }
        area.start = start;
        area
    }
}

/// The areas of one address space; they do not overlap.
#[derive(Clone, Debug)]
pub struct Areas<F> {
    map: BTreeMap<u64, Area<F>>,
}

impl<F> Default for Areas<F> {
    fn default() -> Self {
        Self {
            map: BTreeMap::new(),
        }
    }
}

impl<F: Clone> Areas<F> {
    /// Number of areas.
    pub fn count(&self) -> usize {
        self.map.len()
    }

    /// All of them, by address.
    pub fn iter(&self) -> impl Iterator<Item = &Area<F>> {
        self.map.values()
    }

    /// The area that holds an address.
    pub fn find(&self, address: u64) -> Option<&Area<F>> {
        let (_, area) = self.map.range(..=address).next_back()?;
        (address < area.end).then_some(area)
    }

    /// Areas that touch the range.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = &Area<F>> {
        let first = self.find(start).map_or(start, |area| area.start);
        self.map.range(first..end.max(first)).map(|(_, area)| area)
    }

    /// Whether the whole range is mapped.
    pub fn covers(&self, start: u64, end: u64) -> bool {
        let mut at = start;
        for area in self.within(start, end) {
            if area.start > at {
                return false;
            }
            at = area.end;
        }
        at >= end
    }

    /// The first address from `start` on that is not mapped.
    pub fn covered_to(&self, start: u64) -> u64 {
        let mut at = start;
        while let Some(area) = self.find(at) {
            at = area.end;
        }
        at
    }

    /// Adds an area, in place of what is there.
    pub fn insert(&mut self, area: Area<F>) {
        if area.start < area.end {
            self.remove(area.start, area.end);
            self.map.insert(area.start, area);
        }
    }

    fn split(&mut self, at: u64) {
        let Some(area) = self.find(at) else { return };
        if area.start == at {
            return;
        }
        let (start, right) = (area.start, area.from(at));
        if let Some(left) = self.map.get_mut(&start) {
            left.end = at;
        }
        self.map.insert(at, right);
    }

    /// Takes the range out.
    pub fn remove(&mut self, start: u64, end: u64) {
        self.change(start, end, |_| false);
    }

    /// Changes the protection of what is mapped in the range.
    pub fn protect(&mut self, start: u64, end: u64, protection: u8) {
        self.change(start, end, |area| {
            area.protection = protection;
            true
        });
    }

    fn change(&mut self, start: u64, end: u64, mut f: impl FnMut(&mut Area<F>) -> bool) {
        if start >= end {
            return;
        }
        self.split(start);
        self.split(end);
        let inside: Vec<u64> = self.map.range(start..end).map(|(at, _)| *at).collect();
        for at in inside {
            if let Some(area) = self.map.get_mut(&at)
                && !f(area)
            {
                self.map.remove(&at);
            }
        }
    }

    /// The highest free range of so many bytes below `top` and not below `bottom`.
    pub fn find_free(&self, bytes: u64, bottom: u64, top: u64) -> Option<u64> {
        let mut end = top;
        for area in self.map.values().rev() {
            if area.start >= end {
                continue;
            }
            let gap = area.end.min(end).max(bottom);
            if end.saturating_sub(gap) >= bytes {
                break;
            }
            end = area.start;
        }
        let start = end.checked_sub(bytes)? & !(PAGE - 1);
        (start >= bottom && self.within(start, start + bytes).next().is_none()).then_some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(start: u64, end: u64) -> Area<char> {
        Area {
            start: start * PAGE,
            end: end * PAGE,
            protection: READ,
            shared: false,
            backing: Backing::File('f', start * PAGE),
        }
    }

    fn shown(areas: &Areas<char>) -> Vec<(u64, u64, u8)> {
        areas
            .iter()
            .map(|a| {
                assert_eq!(a.backing, Backing::File('f', a.start));
                (a.start / PAGE, a.end / PAGE, a.protection)
            })
            .collect()
    }

    #[test]
    fn holes_and_protections_split_areas_and_their_offsets() {
        let mut areas = Areas::default();
        areas.insert(area(10, 20));
        areas.remove(12 * PAGE, 14 * PAGE);
        assert_eq!(shown(&areas), [(10, 12, 1), (14, 20, 1)]);
        areas.protect(11 * PAGE, 16 * PAGE, READ | WRITE);
        assert_eq!(
            shown(&areas),
            [(10, 11, 1), (11, 12, 3), (14, 16, 3), (16, 20, 1)]
        );
        assert!(!areas.covers(10 * PAGE, 20 * PAGE));
        assert!(areas.covers(14 * PAGE, 20 * PAGE));
        assert_eq!(areas.covered_to(11 * PAGE), 12 * PAGE);
        assert_eq!(areas.covered_to(15 * PAGE), 20 * PAGE);
        assert_eq!(areas.covered_to(13 * PAGE), 13 * PAGE);
        areas.insert(area(11, 17));
        assert_eq!(shown(&areas), [(10, 11, 1), (11, 17, 1), (17, 20, 1)]);
        assert!(areas.find(20 * PAGE).is_none() && areas.find(20 * PAGE - 1).is_some());
    }

    #[test]
    fn free_ranges_are_found_from_the_top() {
        let mut areas = Areas::default();
        let free = |areas: &Areas<char>, pages| {
            areas
                .find_free(pages * PAGE, 5 * PAGE, 30 * PAGE)
                .map(|a| a / PAGE)
        };
        assert_eq!(free(&areas, 25), Some(5));
        assert_eq!(free(&areas, 26), None);
        areas.insert(area(27, 29));
        areas.insert(area(10, 20));
        assert_eq!(free(&areas, 1), Some(29));
        assert_eq!(free(&areas, 2), Some(25));
        assert_eq!(free(&areas, 7), Some(20));
        assert_eq!(free(&areas, 8), None);
        assert_eq!(free(&areas, 5), Some(22));
        areas.insert(area(25, 40));
        assert_eq!(free(&areas, 5), Some(20));
    }
}
