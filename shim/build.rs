//! Builds what the crate embeds: the test guest, a program of its own without an operating system.
//!
//! It is compiled for the host's own target, since it needs nothing of it but the instruction set, and linked by the same C
//! compiler as everything else. So neither another target nor an assembler has to be installed.

use std::path::Path;
use std::process::Command;

fn main() {
    for path in ["build.rs", "guest"] {
        println!("cargo:rerun-if-changed={path}");
    }
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("cargo did not set {name}"));
    let target = variable("TARGET");
    assert!(target.starts_with("x86_64-"), "the shim runs x86-64 machines only, not on {target}");
    let source = Path::new(&variable("CARGO_MANIFEST_DIR")).join("guest");
    let output = Path::new(&variable("OUT_DIR")).join("selftest.elf");

    let mut rustc = Command::new(variable("RUSTC"));
    rustc
        .args(["--crate-name", "selftest", "--crate-type", "bin", "--edition", "2024"])
        .args(["--target", &target]);
    for option in [
        "opt-level=3",
        "codegen-units=1",
        "panic=abort",
        "debuginfo=0",
        "strip=symbols",
        // Arithmetic that goes wrong has to be seen: it is a program that finds errors.
        "overflow-checks=on",
        "target-cpu=x86-64",
        "relocation-model=static",
        "code-model=small",
        "relro-level=off",
        "force-unwind-tables=no",
        "link-arg=-nostartfiles",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-Wl,--build-id=none",
        "link-arg=-Wl,-z,max-page-size=4096",
    ] {
        rustc.args(["-C", option]);
    }
    rustc.args(["-C", "link-arg=-T", "-C"]).arg(format!("link-arg={}", source.join("image.ld").display()));
    // The message of a panic says where it was, but not where that is on this machine.
    rustc.arg(format!("--remap-path-prefix={}=guest", source.display()));
    if let Ok(linker) = std::env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    rustc.arg("-o").arg(&output).arg(source.join("main.rs"));
    let result = rustc.output().unwrap_or_else(|error| panic!("cannot run {rustc:?}: {error}"));
    let said = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "the test guest does not build; {rustc:?} said:\n{said}");
    for line in said.lines() {
        println!("cargo:warning={line}");
    }
}
