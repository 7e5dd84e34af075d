//! `kvm-shim`: a small VMM whose machines move.
fn main() {}
