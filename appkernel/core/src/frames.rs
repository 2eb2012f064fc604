//! Which frames of memory are free, and how many own each of the others.

/// Largest block is `1 << (ORDERS - 1)` frames: 4 MiB.
pub const ORDERS: usize = 11;
/// In a free block's entry: the rest is the next free block of the order.
const FREE: u32 = 1 << 31;
const END: u32 = FREE - 1;

/// Frames that were never used, from `next` to `end`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Region {
    /// First frame.
    pub next: u32,
    /// Frame past the last.
    pub end: u32,
}

/// The allocator. Frames never used are handed out in order, without touching anything of the
/// others, so that a fresh machine's memory stays with the host until it is needed. Blocks that
/// come back are kept in a list per order; they are split when needed and not joined again.
#[derive(Debug)]
pub struct Frames<'a> {
    /// Number of owners, or link of a free block, by frame.
    meta: &'a mut [u32],
    fresh: [Region; 8],
    free: [u32; ORDERS],
    available: usize,
    total: usize,
}

impl<'a> Frames<'a> {
    /// All frames of `fresh`; `meta` needs an entry for each, of any value.
    pub fn new(meta: &'a mut [u32], mut fresh: [Region; 8]) -> Self {
        let frames = u32::try_from(meta.len()).unwrap_or(END).min(END);
        let mut total = 0;
        for region in &mut fresh {
            region.end = region.end.min(frames);
            total += region.end.saturating_sub(region.next) as usize;
        }
        Self {
            meta,
            fresh,
            free: [END; ORDERS],
            available: total,
            total,
        }
    }

    /// Frames in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Frames nobody has.
    pub fn available(&self) -> usize {
        self.available
    }

    /// `1 << order` frames in a row with one owner; the first one's number.
    pub fn allocate(&mut self, order: usize) -> Option<u32> {
        let frame = self
            .take_listed(order)
            .or_else(|| self.take_fresh(order))
            .or_else(|| self.take_split(order))?;
        *self.meta.get_mut(frame as usize)? = 1;
        self.available -= 1 << order;
        Some(frame)
    }

    fn take_listed(&mut self, order: usize) -> Option<u32> {
        let head = self.free.get_mut(order)?;
        if *head == END {
            return None;
        }
        let frame = *head;
        *head = self.meta.get(frame as usize)? & !FREE;
        Some(frame)
    }

    fn take_fresh(&mut self, order: usize) -> Option<u32> {
        let count = 1u32 << order.min(31);
        let region = self
            .fresh
            .iter_mut()
            .find(|r| r.end.saturating_sub(r.next) >= count)?;
        let frame = region.next;
        region.next += count;
        Some(frame)
    }

    fn take_split(&mut self, order: usize) -> Option<u32> {
        let larger = (order + 1..ORDERS).find(|o| self.free[*o] != END)?;
        let frame = self.take_listed(larger)?;
        // Keeps the first part, gives back the second half of each size.
        for half in (order..larger).rev() {
            self.put(frame + (1 << half), half);
        }
        Some(frame)
    }

    fn put(&mut self, frame: u32, order: usize) {
        if let (Some(meta), Some(head)) =
            (self.meta.get_mut(frame as usize), self.free.get_mut(order))
        {
            *meta = FREE | *head;
            *head = frame;
        }
    }

    /// How many own a frame.
    pub fn owners(&self, frame: u32) -> u32 {
        match self.meta.get(frame as usize) {
            Some(n) if n & FREE == 0 => *n,
            _ => 0,
        }
    }

    /// One more owner.
    pub fn share(&mut self, frame: u32) {
        if let Some(owners) = self.meta.get_mut(frame as usize) {
            debug_assert!(*owners & FREE == 0 && *owners > 0);
            *owners += 1;
        }
    }

    /// One owner less. Returns whether it was the last, so that the block is free again.
    pub fn release(&mut self, frame: u32, order: usize) -> bool {
        match self.meta.get_mut(frame as usize) {
            // Freeing what is free would put it into the list twice: a mistake of the kernel.
            Some(owners) if *owners & FREE != 0 || *owners == 0 => {
                debug_assert!(false, "frame {frame} freed twice");
                false
            }
            Some(owners) if *owners > 1 => {
                *owners -= 1;
                false
            }
            Some(_) => {
                self.put(frame, order);
                self.available += 1 << order;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::vec;

    use super::*;

    fn regions() -> [Region; 8] {
        let mut regions = [Region::default(); 8];
        regions[0] = Region { next: 3, end: 40 };
        regions[1] = Region { next: 50, end: 64 };
        regions
    }

    #[test]
    fn every_frame_is_given_out_once_and_comes_back() {
        let mut meta = vec![7; 64];
        let mut frames = Frames::new(&mut meta, regions());
        assert_eq!(frames.total(), 51);
        for _ in 0..3 {
            let mut got = BTreeSet::new();
            while let Some(frame) = frames.allocate(0) {
                assert!(got.insert(frame));
            }
            assert_eq!(got.len(), 51);
            assert!(
                got.iter()
                    .all(|f| (3..40).contains(f) || (50..64).contains(f))
            );
            assert_eq!(frames.available(), 0);
            for frame in got {
                assert!(frames.release(frame, 0));
            }
        }
    }

    #[test]
    fn blocks_do_not_overlap_and_large_ones_are_split() {
        let mut meta = vec![0; 64];
        let mut frames = Frames::new(&mut meta, regions());
        let large = frames.allocate(5).unwrap();
        assert_eq!(frames.allocate(5), None);
        while frames.allocate(0).is_some() {}
        assert!(frames.release(large, 5));
        let mut got = BTreeSet::new();
        while let Some(frame) = frames.allocate(1) {
            assert!(got.insert(frame) && got.insert(frame + 1));
        }
        assert_eq!(got, (large..large + 32).collect());
    }

    #[test]
    fn a_shared_frame_lives_until_its_last_owner() {
        let mut meta = vec![0; 64];
        let mut frames = Frames::new(&mut meta, regions());
        let frame = frames.allocate(0).unwrap();
        frames.share(frame);
        assert_eq!(frames.owners(frame), 2);
        assert!(!frames.release(frame, 0));
        assert!(frames.release(frame, 0));
        assert_eq!(frames.owners(frame), 0);
    }
}
