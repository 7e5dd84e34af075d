//! Sharing within one worker: counted without atomic operations, so that workers do not fight over a count that each
//! request would touch.

use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

/// What all clones of a [`Local`] hold together.
#[derive(Debug)]
struct Held<T>(Arc<T>);

/// One worker's hold on something that other threads share too.
#[derive(Debug)]
pub struct Local<T>(Rc<Held<T>>);

impl<T> Local<T> {
    /// Takes the hold; the one atomic count of all its clones.
    pub fn new(shared: Arc<T>) -> Self {
        Self(Rc::new(Held(shared)))
    }

    /// What is shared with other threads.
    pub fn shared(&self) -> &Arc<T> {
        &self.0.0
    }
}

impl<T> Clone for Local<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Deref for Local<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0.0
    }
}
