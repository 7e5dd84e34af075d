//! What happened, for `GET /v1/events`: a ring of the last events that any number of readers follow at their own pace.
//!
//! A reader keeps nothing but the number of the last event that it saw. So a slow one costs nobody anything: what falls
//! out of the ring before it comes by, it misses, and sees that by the gap in the numbers.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockd_api::Event;
use tokio::sync::watch;

use super::clock;

/// Events that are kept.
pub const EVENTS_MAX: usize = 1000;

/// The ring of events.
#[derive(Debug)]
pub struct Events {
    ring: Mutex<VecDeque<Event>>,
    news: watch::Sender<News>,
}

/// What followers wait for.
#[derive(Debug, Clone, Copy, Default)]
struct News {
    last_seq: u64,
    closed: bool,
}

impl Default for Events {
    fn default() -> Self {
        Self { ring: Mutex::default(), news: watch::Sender::new(News::default()) }
    }
}

impl Events {
    /// Adds an event; from any thread.
    pub fn push(&self, kind: &str, disk: Option<&str>, job: Option<&str>, message: impl Into<String>) {
        let mut ring = self.ring();
        let seq = self.news.borrow().last_seq + 1;
        if ring.len() == EVENTS_MAX {
            ring.pop_front();
        }
        ring.push_back(Event {
            seq,
            time: clock::now(),
            kind: kind.to_owned(),
            disk: disk.map(str::to_owned),
            job: job.map(str::to_owned),
            message: message.into(),
        });
        // Under the ring's lock, so that numbers are told in their order.
        self.news.send_modify(|news| news.last_seq = seq);
    }

    /// The events after number `seq` that are still kept, oldest first; 0 for all.
    pub fn since(&self, seq: u64) -> Vec<Event> {
        self.ring().iter().filter(|e| e.seq > seq).cloned().collect()
    }

    /// Ends every stream of events: the daemon ends.
    pub fn close(&self) {
        self.news.send_modify(|news| news.closed = true);
    }

    /// Follows the events from the oldest that is kept.
    pub fn follow(&self) -> Follower {
        Follower { news: self.news.subscribe(), seen: 0 }
    }

    fn ring(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One reader's place in the stream.
#[derive(Debug)]
pub struct Follower {
    news: watch::Receiver<News>,
    seen: u64,
}

impl Follower {
    /// The events since the last call, as soon as there are any; `None` when the daemon ends.
    pub async fn next(&mut self, events: &Events) -> Option<Vec<Event>> {
        loop {
            let News { closed, .. } = *self.news.borrow_and_update();
            let batch = events.since(self.seen);
            if let Some(last) = batch.last() {
                self.seen = last.seq;
                return Some(batch);
            }
            if closed || self.news.changed().await.is_err() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_thousand_are_kept_and_numbers_show_the_gap() {
        let events = Events::default();
        for n in 0..1500 {
            events.push("disk-attached", Some("a"), None, format!("{n}"));
        }
        let kept = events.since(0);
        assert_eq!(kept.len(), EVENTS_MAX);
        assert_eq!((kept[0].seq, kept[999].seq), (501, 1500));
        assert_eq!(events.since(1499).len(), 1);
        assert!(events.since(1500).is_empty());
    }

    #[tokio::test]
    async fn a_follower_sees_every_event_once_and_then_the_end() {
        let events = std::sync::Arc::new(Events::default());
        events.push("disk-attached", Some("a"), None, "before");
        let mut follower = events.follow();
        let writer = std::thread::spawn({
            let events = events.clone();
            move || {
                for n in 0..500 {
                    events.push("job-state", Some("a"), Some("m1"), format!("{n}"));
                }
                events.close();
            }
        });
        let mut seen = Vec::new();
        while let Some(batch) = follower.next(&events).await {
            seen.extend(batch.into_iter().map(|e| e.seq));
        }
        writer.join().expect("the writer does not panic");
        assert_eq!(seen, (1..=501).collect::<Vec<_>>());
    }
}
