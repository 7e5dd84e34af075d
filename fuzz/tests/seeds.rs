//! The targets on their seeds, without the fuzzer: they pass, and the target still gets deep.

use std::path::Path;

use blockd_fuzz::{mutate, open, operations, seeds};

#[test]
fn our_own_images_hold_in_every_state() {
    for (name, input) in seeds::own_images().into_iter().chain(seeds::own_children()) {
        println!("{name}");
        open::run(&input);
        for seed in 0..20 {
            if let Some(mutated) = mutate::mutate(&input, 64 << 10, seed) {
                open::run(&mutated);
            }
        }
    }
}

#[test]
fn images_of_the_corpus_are_refused_or_safe_to_use() {
    let Some(corpus) = std::env::var_os("BLOCKD_CORPUS") else {
        println!("SKIPPED: BLOCKD_CORPUS is not set, so no images of the corpus were looked at");
        return;
    };
    for (name, input) in seeds::corpus(Path::new(&corpus)).expect("the corpus can be read") {
        println!("{name}");
        open::run(&input);
    }
}

#[test]
fn sessions_agree_with_the_model() {
    for (name, input) in seeds::sessions() {
        println!("{name}");
        operations::run(&input);
    }
}
