//! What the host is told by WaitEvent.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bulkhead_protocol::sandbox::{Event, EventKind};
use bulkhead_protocol::types::Timestamp;
use tokio::sync::watch;

/// Events that are kept.
const KEPT: usize = 1024;
/// Events in one answer.
const AT_ONCE: usize = 256;

/// The last events.
#[derive(Default)]
pub struct Events {
    kept: Mutex<VecDeque<Event>>,
    last: watch::Sender<u64>,
}

/// A time as the protocol has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

impl Events {
    /// Adds an event.
    pub fn push(&self, kind: EventKind) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = *self.last.borrow() + 1;
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back(Event {
            sequence,
            at: Some(timestamp(SystemTime::now())),
            kind: Some(kind),
        });
        self.last.send_replace(sequence);
    }

    /// Events after `after`, waiting for one if there is none; empty after `timeout`.
    pub async fn wait(&self, after: u64, timeout: Option<Duration>) -> Vec<Event> {
        let mut last = self.last.subscribe();
        let newer = last.wait_for(|last| *last > after);
        match timeout {
            None => drop(newer.await),
            Some(timeout) => drop(tokio::time::timeout(timeout, newer).await),
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter()
            .filter(|e| e.sequence > after)
            .take(AT_ONCE)
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::sandbox::OomEvent;

    use super::*;

    #[tokio::test]
    async fn events_are_kept_in_order_and_bounded() {
        let events = std::sync::Arc::new(Events::default());
        assert!(events.wait(0, Some(Duration::ZERO)).await.is_empty());
        let waiter = tokio::spawn({
            let events = events.clone();
            async move { events.wait(0, None).await }
        });
        for n in 0..2000 {
            events.push(EventKind::Oom(OomEvent {
                container_id: n.to_string(),
                oom_kills: 1,
            }));
        }
        assert!(!waiter.await.unwrap().is_empty());
        let seen = events.wait(1990, None).await;
        assert_eq!(seen.len(), 10);
        assert_eq!(seen[0].sequence, 1991);
        // The oldest ones are gone: the gap shows it.
        assert_eq!(events.wait(0, None).await[0].sequence, 2000 - 1024 + 1);
    }
}
