//! Builds what the crate embeds.
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
}
