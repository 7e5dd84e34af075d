//! Grace periods: waiting until all I/O that was mapped under an old state of the world has ended.
//!
//! Whoever maps guest I/O (a queue worker, the copier) owns a [`GateShard`] and enters it before it looks at the
//! disk's route or at an image's map, and leaves it when the I/O has ended. [`Gate::wait`] returns when every I/O that
//! had entered before the call has left, without ever holding up new I/O: two counters a shard, of which new entries
//! use one and the waiter drains the other (the scheme is known as sleepable RCU).
//!
//! ```text
//!   worker:  enter(gen) ── load route, map ── I/O in flight ── leave(gen)
//!   waiter:  change route ── gen ^= 1 ── wait until count[old] == 0 ── once more (for who read gen just before)
//! ```

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Counters of one owner, alone on their cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counters {
    in_flight: [AtomicUsize; 2],
}

/// All who map I/O of one disk.
#[derive(Debug, Default)]
pub struct Gate {
    generation: AtomicUsize,
    shards: Mutex<Vec<Arc<Counters>>>,
    /// Only one waiter flips the generation at a time.
    waiting: Mutex<()>,
}

/// One owner's side of the gate. Dropping it while I/O is inside is a bug.
#[derive(Debug)]
pub struct GateShard {
    gate: Arc<Gate>,
    counters: Arc<Counters>,
}

/// What `enter` hands out and `leave` takes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "an entry that never leaves blocks every later grace period"]
pub struct GateEntry(u8);

impl Gate {
    /// Registers a new owner.
    pub fn shard(self: &Arc<Self>) -> GateShard {
        let counters = Arc::new(Counters::default());
        self.shards.lock().unwrap_or_else(PoisonError::into_inner).push(counters.clone());
        GateShard { gate: self.clone(), counters }
    }

    /// Returns when all that had entered before the call has left. New entries go on meanwhile.
    pub fn wait(&self) {
        let _one = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // Twice: an owner may have read the generation just before the first flip and count itself only after it was
        // looked at; it is found by the second round.
        for _ in 0..2 {
            let old = self.generation.fetch_xor(1, Ordering::SeqCst) & 1;
            let mut pause = Duration::from_micros(20);
            while self.in_flight(old) != 0 {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(1));
            }
        }
    }

    fn in_flight(&self, generation: usize) -> usize {
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        shards.iter().map(|s| s.in_flight[generation].load(Ordering::SeqCst)).sum()
    }
}

impl GateShard {
    /// To be called before the route or a map is looked at.
    pub fn enter(&self) -> GateEntry {
        let generation = self.gate.generation.load(Ordering::SeqCst) & 1;
        // SeqCst: the count must be visible before anything that is read under it.
        self.counters.in_flight[generation].fetch_add(1, Ordering::SeqCst);
        GateEntry(generation as u8)
    }

    /// To be called when the I/O has ended.
    pub fn leave(&self, entry: GateEntry) {
        let before = self.counters.in_flight[usize::from(entry.0)].fetch_sub(1, Ordering::SeqCst);
        assert!(before > 0, "left the gate more often than entered");
    }
}

impl Drop for GateShard {
    fn drop(&mut self) {
        let mut shards = self.gate.shards.lock().unwrap_or_else(PoisonError::into_inner);
        shards.retain(|s| !Arc::ptr_eq(s, &self.counters));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn a_wait_returns_only_after_earlier_entries_have_left() {
        let gate = Arc::new(Gate::default());
        let shard = gate.shard();
        let entry = shard.enter();
        let done = Arc::new(AtomicBool::new(false));
        let waiter = {
            let (gate, done) = (gate.clone(), done.clone());
            std::thread::spawn(move || {
                gate.wait();
                done.store(true, Ordering::SeqCst);
            })
        };
        std::thread::sleep(Duration::from_millis(20));
        assert!(!done.load(Ordering::SeqCst));
        let later = shard.enter();
        shard.leave(entry);
        // `later` may have entered under the generation that the second round drains; both orders must end.
        std::thread::sleep(Duration::from_millis(20));
        shard.leave(later);
        waiter.join().expect("the waiter ends");
    }

    #[test]
    fn what_is_replaced_is_never_used_after_the_wait() {
        let gate = Arc::new(Gate::default());
        let current = Arc::new(AtomicUsize::new(0));
        let freed: Arc<Vec<AtomicBool>> = Arc::new((0..2001).map(|_| AtomicBool::new(false)).collect());
        let stop = Arc::new(AtomicBool::new(false));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (gate, current, freed, stop) =
                    (gate.clone(), current.clone(), freed.clone(), stop.clone());
                std::thread::spawn(move || {
                    let shard = gate.shard();
                    while !stop.load(Ordering::Relaxed) {
                        let entry = shard.enter();
                        let seen = current.load(Ordering::SeqCst);
                        std::hint::spin_loop();
                        assert!(!freed[seen].load(Ordering::SeqCst));
                        shard.leave(entry);
                    }
                })
            })
            .collect();
        for version in 1..=200 {
            let old = current.swap(version, Ordering::SeqCst);
            gate.wait();
            freed[old].store(true, Ordering::SeqCst);
        }
        stop.store(true, Ordering::Relaxed);
        for r in readers {
            r.join().expect("no reader saw freed state");
        }
    }
}
