//! Bytes that wait in a queue, moved as they lie in memory.

use alloc::collections::VecDeque;

/// Adds bytes at the end, all or none: false when there is no memory for them in one piece, which is no
/// reason to end a kernel.
#[must_use]
pub fn add(queue: &mut VecDeque<u8>, from: &[u8]) -> bool {
    let fits = queue.try_reserve(from.len()).is_ok();
    if fits {
        queue.extend(from);
    }
    fits
}

/// Takes the first bytes out of the queue, as many as there is room for; gives how many.
pub fn take(queue: &mut VecDeque<u8>, to: &mut [u8]) -> usize {
    let count = copy(queue, to);
    queue.drain(..count);
    count
}

/// Copies the first bytes of the queue, as many as there is room for; gives how many.
pub fn copy(queue: &VecDeque<u8>, to: &mut [u8]) -> usize {
    let (first, second) = queue.as_slices();
    let mut done = 0;
    for part in [first, second] {
        let count = part.len().min(to.len() - done);
        if let (Some(to), Some(from)) = (to.get_mut(done..done + count), part.get(..count)) {
            to.copy_from_slice(from);
        }
        done += count;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_in_order_also_where_the_queue_wraps() {
        let mut queue = VecDeque::with_capacity(8);
        queue.extend([0, 0, 0, 0, 0, 1]);
        let mut to = [9; 5];
        assert_eq!(take(&mut queue, &mut to), 5);
        assert!(add(&mut queue, &[2, 3, 4, 5, 6]));
        assert!(!queue.as_slices().1.is_empty(), "it does not wrap");
        assert_eq!(copy(&queue, &mut to), 5);
        assert_eq!(to, [1, 2, 3, 4, 5]);
        assert_eq!(take(&mut queue, &mut to), 5);
        assert_eq!(take(&mut queue, &mut to), 1);
        assert_eq!((to[0], queue.len()), (6, 0));
        assert_eq!(take(&mut queue, &mut []), 0);
    }
}
