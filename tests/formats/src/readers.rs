//! Other people's programs that read images, as far as they are here. What each can be trusted with is said at each.
//!
//! `tests/run` installs them. One that is not here is named loudly, once a test program, and answers `None`.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use formats::Format;

/// Where `tests/tools/setup` puts what it fetches.
fn folder() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    variable("BLOCKD_TOOLS_DIR").or_else(|| Some(cache()?.join("blockd-tools"))).unwrap_or_default()
}

/// A script of `tests/tools`.
fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools").join(name)
}

/// Says once that something was left out.
fn skipped(what: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(what.to_owned()) {
        println!("SKIPPED: {what} does not run here, so nothing was compared with it");
    }
}

/// Whether a program runs; if not, says so.
fn runs(name: &str, program: impl AsRef<OsStr>, args: &[&str], node_path: Option<&Path>) -> bool {
    let mut command = Command::new(program);
    if let Some(path) = node_path {
        command.env("NODE_PATH", path);
    }
    let there = command.args(args).output().is_ok_and(|out| out.status.success());
    if !there {
        skipped(name);
    }
    there
}

/// What a command prints, or a sentence with what it said.
fn output(command: &mut Command) -> Result<Vec<u8>, String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if out.status.success() {
        return Ok(out.stdout);
    }
    let said = [&out.stdout[..], &out.stderr[..]].map(|text| {
        let text = String::from_utf8_lossy(text);
        text.chars().skip(text.chars().count().saturating_sub(600)).collect::<String>()
    });
    Err(format!("{command:?} ended with {}: {} {}", out.status, said[0].trim(), said[1].trim()))
}

/// Content as 7-Zip reads it. It knows everything but VHDXs whose size is no multiple of 4096 (with sectors of 4096: of 1 MiB),
/// finds parents in the folder of their child only, wants none to be smaller than its child, and does not replay logs.
pub fn seven_zip(image: &Path) -> Option<Result<Vec<u8>, String>> {
    runs("7-Zip (7zz)", "7zz", &["i"], None)
        .then(|| output(Command::new("7zz").args(["x", "-so", "-y"]).arg(image)))
}

/// Content as QEMU reads it: no chains, and no sectors of 4096 bytes. A VHD may have zeroes added at its end.
pub fn qemu(image: &Path, format: Format) -> Option<Result<Vec<u8>, String>> {
    runs("QEMU (qemu-img)", "qemu-img", &["--version"], None).then(|| {
        let raw = image.with_extension("as-qemu-reads-it");
        let driver = if format == Format::Vhd { "vpc" } else { "vhdx" };
        let paths = [image, &raw];
        output(Command::new("qemu-img").args(["convert", "-f", driver, "-O", "raw"]).args(paths))?;
        let data = std::fs::read(&raw).map_err(|e| e.to_string());
        let _ = std::fs::remove_file(&raw);
        data
    })
}

/// QEMU's check of a VHDX.
pub fn qemu_check(image: &Path) -> Option<Result<Vec<u8>, String>> {
    runs("QEMU (qemu-img)", "qemu-img", &["--version"], None)
        .then(|| output(Command::new("qemu-img").args(["check", "-f", "vhdx"]).arg(image)))
}

fn python() -> PathBuf {
    folder().join("python/bin/python3")
}

/// Content as libvhdi reads it: everything but VHDs with parents or another size than they had at first. It does not replay logs, and where a child says that a block
/// is zeroes it reads what the parent has; where a child has no bitmap yet, it takes other bytes for one. The image first, then its
/// parents.
pub fn libvhdi(chain: &[&Path]) -> Option<Result<Vec<u8>, String>> {
    runs("libvhdi", python(), &["-c", "import pyvhdi"], None)
        .then(|| output(Command::new(python()).arg(script("read_with_libvhdi.py")).args(chain)))
}

/// Content of a VHDX as dissect.hypervisor reads it. It finds parents by their relative paths, does not replay logs, wants no
/// parent to be smaller than its child, and takes the bits of a bitmap from whole bytes, so that of parents that have parents
/// themselves it reads too little.
pub fn dissect(image: &Path) -> Option<Result<Vec<u8>, String>> {
    runs("dissect.hypervisor", python(), &["-c", "import dissect.hypervisor.disk.vhdx"], None)
        .then(|| output(Command::new(python()).arg(script("read_with_dissect.py")).arg(image)))
}

fn vhd_lib(verb: &str, paths: &[&Path]) -> Option<Result<Vec<u8>, String>> {
    let modules = folder().join("node/node_modules");
    runs("vhd-lib (node)", "node", &["-e", "require('vhd-lib')"], Some(&modules)).then(|| {
        let mut command = Command::new("node");
        output(command.env("NODE_PATH", modules).arg(script("chains_with_vhd_lib.js")).arg(verb).args(paths))
    })
}

/// Has vhd-lib write the content of a chain of VHDs on a dynamic one, all of one block size, to `target` as a dynamic VHD.
pub fn vhd_lib_flatten(target: &Path, chain: &[&Path]) -> Option<Result<Vec<u8>, String>> {
    vhd_lib("flatten", &[&[target], chain].concat())
}

/// Has vhd-lib write what a differencing VHD has of its own into its parent.
pub fn vhd_lib_merge(child: &Path, parent: &Path) -> Option<Result<Vec<u8>, String>> {
    vhd_lib("merge", &[child, parent])
}

/// The verdict of blktap's `vhd-util check` on a dynamic or differencing VHD. There is no package of it in today's
/// distributions: it is used where the machine has it.
pub fn vhd_util_check(image: &Path) -> Option<Result<Vec<u8>, String>> {
    let there = Command::new("vhd-util").output().is_ok();
    if !there {
        skipped("vhd-util (of blktap, in no package; to be put on the PATH)");
    }
    there.then(|| output(Command::new("vhd-util").args(["check", "-n"]).arg(image)))
}
