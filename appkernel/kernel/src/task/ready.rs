//! Tasks that could run: those of one container in turn, containers by their shares of the CPU.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;

use crate::container::Container;

/// The tasks of a container.
struct Group {
    container: Arc<Container>,
    queue: VecDeque<u32>,
}

/// Tasks that could run, by their containers' numbers.
#[derive(Default)]
pub(super) struct Ready {
    /// Those that are next before all others, as far as their containers may run.
    first: VecDeque<(u32, Arc<Container>)>,
    groups: BTreeMap<u32, Group>,
    /// What the container chosen last had had: who comes anew has had no less.
    least_ns: u64,
}

/// Who is next.
pub(super) enum Next {
    Task(u32),
    /// Nobody before this time, when a container's next period begins.
    After(u64),
    Nobody,
}

impl Ready {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty() && self.groups.is_empty()
    }

    /// A task is next after the others of its container.
    pub fn push_back(&mut self, id: u32, container: &Arc<Container>) {
        let least = self.least_ns;
        let group = self.groups.entry(container.number).or_insert_with(|| {
            container.share.lock().join(least);
            Group {
                container: Arc::clone(container),
                queue: VecDeque::new(),
            }
        });
        group.queue.push_back(id);
    }

    /// A task is next.
    pub fn push_front(&mut self, id: u32, container: &Arc<Container>) {
        self.first.push_front((id, Arc::clone(container)));
    }

    /// Takes the one who is next.
    pub fn pop(&mut self, now_ns: u64) -> Next {
        while let Some((id, container)) = self.first.pop_front() {
            if container.share.lock().waits_until(now_ns).is_none() {
                return Next::Task(id);
            }
            self.push_back(id, &container);
        }
        let mut best: Option<(u64, u32)> = None;
        let mut until = u64::MAX;
        for (number, group) in &self.groups {
            let mut share = group.container.share.lock();
            if let Some(time) = share.waits_until(now_ns) {
                until = until.min(time);
                continue;
            }
            // The kernel's own threads come first: the others wait for what they do.
            let had = if *number == 0 { 0 } else { share.virtual_ns() };
            if best.is_none_or(|(least, _)| had < least) {
                best = Some((had, *number));
            }
        }
        let Some((had, number)) = best else {
            return if until == u64::MAX {
                Next::Nobody
            } else {
                Next::After(until)
            };
        };
        self.least_ns = self.least_ns.max(had);
        let Some(group) = self.groups.get_mut(&number) else {
            return Next::Nobody;
        };
        let id = group.queue.pop_front();
        if group.queue.is_empty() {
            self.groups.remove(&number);
        }
        id.map_or(Next::Nobody, Next::Task)
    }
}
