//! Which frames of memory are free, and how many own each of the others.

/// Largest block is `1 << (ORDERS - 1)` frames: 4 MiB.
pub const ORDERS: usize = 11;
/// Blocks of this order and above count as large.
const LARGE: usize = 5;
/// Large blocks that pages of programs are not made of: the kernel needs some memory in one piece,
/// also when most is in single pages.
const LARGE_KEPT: usize = 16;

/// Entry of the first frame of a free block: its order, and the blocks before and after it in the
/// list of the order.
const FREE: u64 = 1 << 63;
const LINK_BITS: u32 = 28;
const END: u32 = (1 << LINK_BITS) - 1;

const fn free_entry(order: usize, previous: u32, next: u32) -> u64 {
    FREE | (order as u64) << (2 * LINK_BITS) | (previous as u64) << LINK_BITS | next as u64
}

/// Order, previous and next of a free block's entry.
fn links(entry: u64) -> (usize, u32, u32) {
    let link = |entry: u64| (entry & u64::from(END)) as u32;
    let order = (entry >> (2 * LINK_BITS) & 15) as usize;
    (order, link(entry >> LINK_BITS), link(entry))
}

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
/// come back are kept in a list per order, are split when needed, and joined with their other half
/// when that is free too.
#[derive(Debug)]
pub struct Frames<'a> {
    /// Number of owners, or that it is free, by the first frame of a block; zero for the others.
    meta: &'a mut [u64],
    fresh: [Region; 8],
    /// Where the regions began.
    starts: [u32; 8],
    free: [u32; ORDERS],
    /// Large blocks in lists, counted as many of the smallest.
    large: usize,
    available: usize,
    total: usize,
}

impl<'a> Frames<'a> {
    /// All frames of `fresh`; `meta` needs an entry for each, of any value.
    pub fn new(meta: &'a mut [u64], mut fresh: [Region; 8]) -> Self {
        let frames = u32::try_from(meta.len()).unwrap_or(END).min(END);
        let mut total = 0;
        for region in &mut fresh {
            region.end = region.end.min(frames);
            total += region.end.saturating_sub(region.next) as usize;
        }
        Self {
            meta,
            fresh,
            starts: fresh.map(|region| region.next),
            free: [END; ORDERS],
            large: 0,
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

    /// As `allocate` of one frame, but it leaves the kernel its last large blocks.
    pub fn allocate_page(&mut self) -> Option<u32> {
        let small = (0..LARGE).any(|order| self.free[order] != END);
        let fresh = self.fresh.iter().map(|r| r.end.saturating_sub(r.next));
        let fresh: usize = fresh.map(|frames| frames as usize >> LARGE).sum();
        if !small && self.large + fresh <= LARGE_KEPT {
            return None;
        }
        if let Some(order) = (0..LARGE).find(|order| self.free[*order] != END)
            && (order == 0 || self.large + fresh <= LARGE_KEPT)
        {
            let frame = self.take_listed(order)?;
            for half in (0..order).rev() {
                self.put(frame + (1 << half), half);
            }
            *self.meta.get_mut(frame as usize)? = 1;
            self.available -= 1;
            return Some(frame);
        }
        self.allocate(0)
    }

    fn take_listed(&mut self, order: usize) -> Option<u32> {
        let head = *self.free.get(order)?;
        if head == END {
            return None;
        }
        self.unlink(head);
        Some(head)
    }

    /// Takes a free block out of its list.
    fn unlink(&mut self, frame: u32) {
        let Some(entry) = self.meta.get_mut(frame as usize) else {
            return;
        };
        let (order, previous, next) = links(*entry);
        *entry = 0;
        if let Some(entry) = self.meta.get_mut(next as usize).filter(|_| next != END) {
            let (order, _, after) = links(*entry);
            *entry = free_entry(order, previous, after);
        }
        if previous != END {
            if let Some(entry) = self.meta.get_mut(previous as usize) {
                let (order, before, _) = links(*entry);
                *entry = free_entry(order, before, next);
            }
        } else if let Some(head) = self.free.get_mut(order) {
            *head = next;
        }
        if order >= LARGE {
            self.large -= 1 << (order - LARGE);
        }
    }

    fn take_fresh(&mut self, order: usize) -> Option<u32> {
        let count = 1u32 << order.min(31);
        let aligned = |r: &Region| r.next.next_multiple_of(count);
        let at = self
            .fresh
            .iter()
            .position(|r| r.end.saturating_sub(aligned(r)) >= count && r.end > r.next)?;
        let region = self.fresh.get_mut(at)?;
        let (first, frame) = (region.next, aligned(region));
        region.next = frame + count;
        self.meta
            .get_mut(first as usize..(frame + count) as usize)?
            .fill(0);
        // What was passed over for the sake of alignment is free.
        for single in first..frame {
            self.join(single, 0);
        }
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
        let Some(head) = self.free.get_mut(order) else {
            return;
        };
        let next = core::mem::replace(head, frame);
        if let Some(meta) = self.meta.get_mut(frame as usize) {
            *meta = free_entry(order, END, next);
        }
        if let Some(entry) = self.meta.get_mut(next as usize).filter(|_| next != END) {
            let (order, _, after) = links(*entry);
            *entry = free_entry(order, frame, after);
        }
        if order >= LARGE {
            self.large += 1 << (order - LARGE);
        }
    }

    /// Makes a block free, together with its other half when that is free.
    fn join(&mut self, mut frame: u32, mut order: usize) {
        while order + 1 < ORDERS {
            let other = frame ^ (1 << order);
            let end = other + (1 << order);
            // Entries of frames that were never given out say nothing.
            let ours = |(start, region): (&u32, &Region)| *start <= other && end <= region.next;
            if !self.starts.iter().zip(&self.fresh).any(ours) {
                break;
            }
            match self.meta.get(other as usize) {
                Some(entry) if entry & FREE != 0 && links(*entry).0 == order => {}
                _ => break,
            }
            self.unlink(other);
            if let Some(entry) = self.meta.get_mut(frame as usize) {
                *entry = 0;
            }
            frame = frame.min(other);
            order += 1;
        }
        self.put(frame, order);
    }

    /// How many own a frame.
    pub fn owners(&self, frame: u32) -> u32 {
        match self.meta.get(frame as usize) {
            Some(n) if n & FREE == 0 => u32::try_from(*n).unwrap_or(u32::MAX),
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
                self.join(frame, order);
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
    fn halves_that_are_free_become_one_again() {
        let mut meta = vec![FREE; 256];
        let mut regions = [Region::default(); 8];
        regions[0] = Region { next: 5, end: 250 };
        let mut frames = Frames::new(&mut meta, regions);
        let mut got = vec![];
        while let Some(frame) = frames.allocate(0) {
            got.push(frame);
        }
        assert_eq!((got.len(), frames.allocate(1)), (245, None));
        // In any order of coming back.
        for (i, frame) in got.iter().enumerate() {
            if i % 2 == 0 {
                assert!(frames.release(*frame, 0));
            }
        }
        assert_eq!(frames.allocate(1), None);
        for (i, frame) in got.iter().enumerate() {
            if i % 2 == 1 {
                assert!(frames.release(*frame, 0));
            }
        }
        let large = frames.allocate(6).unwrap();
        assert!(large.is_multiple_of(64) && frames.available() == 245 - 64);
        assert!(frames.release(large, 6));
        while frames.allocate(0).is_some() {}
        assert_eq!(frames.available(), 0);
    }

    #[test]
    fn pages_leave_the_last_large_blocks() {
        let mut meta = vec![0; 4096];
        let mut regions = [Region::default(); 8];
        regions[0] = Region { next: 0, end: 4096 };
        let mut frames = Frames::new(&mut meta, regions);
        let mut got = vec![];
        while let Some(frame) = frames.allocate_page() {
            got.push(frame);
        }
        assert!(frames.available() >= LARGE_KEPT << LARGE);
        for _ in 0..LARGE_KEPT {
            assert!(frames.allocate(LARGE).is_some());
        }
        assert!(frames.allocate(LARGE).is_none());
        frames.release(got[7], 0);
        assert_eq!(frames.allocate_page(), Some(got[7]));
    }

    #[test]
    fn blocks_do_not_overlap_and_large_ones_are_split() {
        let mut meta = vec![0; 64];
        let mut regions = [Region::default(); 8];
        regions[0] = Region { next: 3, end: 64 };
        let mut frames = Frames::new(&mut meta, regions);
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
