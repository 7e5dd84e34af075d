//! Writes the seeds of both targets: `make-seeds FOLDER` fills `FOLDER/open` and `FOLDER/operations`.

use std::path::{Path, PathBuf};

use blockd_fuzz::seeds::{self, Seed};

fn main() -> std::io::Result<()> {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(std::io::Error::other("usage: make-seeds FOLDER"));
    };
    let mut images = seeds::own_images();
    images.extend(seeds::own_children());
    match std::env::var_os("BLOCKD_CORPUS") {
        Some(corpus) => images.extend(seeds::corpus(Path::new(&corpus))?),
        None => {
            println!("SKIPPED: BLOCKD_CORPUS is not set, so no real or hostile images are among the seeds")
        }
    }
    write(&folder.join("open"), &images)?;
    write(&folder.join("operations"), &seeds::sessions())
}

fn write(folder: &Path, seeds: &[Seed]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (name, bytes) in seeds {
        std::fs::write(folder.join(name), bytes)?;
    }
    println!(
        "{}: {} seeds, {} bytes",
        folder.display(),
        seeds.len(),
        seeds.iter().map(|(_, b)| b.len()).sum::<usize>()
    );
    Ok(())
}
