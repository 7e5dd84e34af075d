//! Places at which tests let a daemon die: before and after each storage operation that decides who may serve an image.

#[cfg(not(test))]
#[inline]
pub(super) fn step() {}

#[cfg(test)]
pub(super) use counted::{Died, die_after, step};

#[cfg(test)]
mod counted {
    use std::cell::Cell;

    /// What the death of a daemon unwinds with.
    #[derive(Debug)]
    pub(in crate::daemon) struct Died;

    thread_local! {
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// The thread passes so many steps and dies at the next one. `None`: it lives.
    pub(in crate::daemon) fn die_after(steps: Option<u32>) {
        LEFT.set(steps);
    }

    /// Dies here if it is time. From then on every further step dies too: what is dead does nothing more.
    pub(in crate::daemon) fn step() {
        match LEFT.get() {
            None => {}
            Some(0) if std::thread::panicking() => {}
            Some(0) => std::panic::resume_unwind(Box::new(Died)),
            Some(left) => LEFT.set(Some(left - 1)),
        }
    }
}
