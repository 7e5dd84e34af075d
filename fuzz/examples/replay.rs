//! Runs inputs again without the fuzzer: `replay open|operations FILE-OR-FOLDER...`. Says which of them fail, and how many.

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let run = match arguments.next().as_deref().and_then(|name| name.to_str()) {
        Some("open") => blockd_fuzz::open::run,
        Some("operations") => blockd_fuzz::operations::run,
        _ => return Err(std::io::Error::other("usage: replay open|operations FILE-OR-FOLDER...")),
    };
    let mut inputs = Vec::new();
    for path in arguments {
        collect(Path::new(&path), &mut inputs)?;
    }
    let mut failed = 0;
    for path in &inputs {
        let bytes = std::fs::read(path)?;
        if catch_unwind(|| run(&bytes)).is_err() {
            println!("fails: {}", path.display());
            failed += 1;
        }
    }
    println!("{} inputs, {failed} failed", inputs.len());
    if failed == 0 { Ok(()) } else { Err(std::io::Error::other("some inputs fail")) }
}

fn collect(path: &Path, inputs: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if !path.is_dir() {
        inputs.push(path.to_owned());
        return Ok(());
    }
    for entry in std::fs::read_dir(path)? {
        collect(&entry?.path(), inputs)?;
    }
    Ok(())
}
