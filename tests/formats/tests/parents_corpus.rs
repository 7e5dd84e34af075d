//! Real chains by path, and images made by people who want another file opened.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod gate;

use std::path::{Path, PathBuf};

use formats::{ErrorKind, OpenOptions, open};
use formats_tests::corpus::{corpus, sha256_of, table, unpack};
use gate::{refused, within};
use tempfile::TempDir;

/// Unpacks what `wanted` says of a folder of the corpus. Returns the paths by name.
fn unpacked(from: &Path, to: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(from).unwrap() {
        let packed = entry.unwrap().path();
        let name = packed.file_name().unwrap().to_str().unwrap().trim_end_matches(".bz2").to_owned();
        if wanted(&name) {
            let path = to.join(name);
            std::fs::write(&path, unpack(&packed).unwrap()).unwrap();
            paths.push(path);
        }
    }
    paths.sort();
    paths
}

#[test]
fn a_real_chain_is_found_by_its_own_paths_inside_the_folder() {
    let Some(corpus) = corpus("chain") else { return };
    let folder = TempDir::new().unwrap();
    let paths = unpacked(&corpus.join("blktap-libvhd"), folder.path(), |name| name.ends_with(".vhd"));
    assert!(!paths.is_empty());
    let mut chains = 0;
    for row in table(&corpus.join("manifest.tsv")).unwrap() {
        let Some(name) = row[0].strip_prefix("blktap-libvhd/") else { continue };
        let path = folder.path().join(name.trim_end_matches(".bz2"));
        let image = open(&path, &within([folder.path()])).unwrap();
        assert_eq!(sha256_of(&*image), row[7], "{name}");
        if let Some(chain) = image.as_chain() {
            chains += 1;
            assert!(chain.layers().len() >= 2);
            let e = refused(&path, &OpenOptions::read_only());
            assert!(e.to_string().contains("no folder was named"), "{e}");
        }
    }
    assert!(chains > 0, "none of them is differencing");
}

#[test]
fn hostile_children_are_refused_by_path() {
    let Some(corpus) = corpus("hostile child") else { return };
    let folder = TempDir::new().unwrap();
    let is_child = |name: &str| {
        name.starts_with('d') || ["v40", "v42", "v44", "v46"].iter().any(|n| name.starts_with(n))
    };
    let paths = unpacked(&corpus.join("hostile"), folder.path(), is_child);
    assert!(paths.len() >= 10, "{paths:?}");
    for path in &paths {
        let name = path.file_name().unwrap().to_str().unwrap();
        let (nothing_named, named) = (OpenOptions::read_only(), within([folder.path()]));
        for options in [&nothing_named, &named, &OpenOptions { read_only: false, ..named.clone() }] {
            let e = refused(path, options);
            let expected = [ErrorKind::Parent, ErrorKind::Corrupt, ErrorKind::Unsupported];
            assert!(expected.contains(&e.kind), "{name}: {e}");
        }
        let e = refused(path, &named).to_string();
        match &name[..3] {
            "d00" | "v40" => assert!(e.contains("is not there"), "{name}: {e}"),
            "d02" => assert!(e.contains("circle") || e.contains("has the id"), "{name}: {e}"),
            "d04" | "d06" | "v44" => {
                assert!(e.contains("is not there") || e.contains("out of"), "{name}: {e}")
            }
            _ => {}
        }
        println!("{name}: {e}");
    }
}
