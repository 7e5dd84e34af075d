//! `kvm-shim`: runs virtual machines whose disks blockd serves, and moves them.

fn main() -> std::process::ExitCode {
    shim::cli::main()
}
