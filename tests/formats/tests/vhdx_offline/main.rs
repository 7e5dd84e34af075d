//! What is done to VHDXs that nobody uses: resizing, compacting, relinking, checking and repairing them. Read back with a
//! small reader of its own, which knows nothing of the codec.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod checking;
mod compacting;
mod crashes;
mod image;
mod layers;
mod patching;
mod relinking;
mod repairing;
mod resizing;
mod tools;
