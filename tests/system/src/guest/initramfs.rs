//! A guest's root file system: busybox, kernel modules, programs of this machine with their libraries, and an init script;
//! packed as a "newc" cpio archive, which is what the kernel unpacks.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::Setup;

/// What a root holds beside busybox.
pub(super) struct Contents<'a> {
    /// The only process.
    pub init: &'a str,
    /// Kernel modules to load; what they need comes along.
    pub modules: &'a [&'a str],
    /// Programs of this machine, to be in the path; their libraries come along.
    pub programs: Vec<PathBuf>,
    /// Other files, by their names without the first slash.
    pub files: Vec<(&'a str, Vec<u8>)>,
}

pub(super) fn pack(setup: &Setup, contents: &Contents<'_>) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in ["proc", "sys", "dev", "mnt", "tmp", "etc", "bin", "modules"] {
        archive.dir(dir);
    }
    archive.node("dev/console", 0o20600, b"", (5, 1));
    archive.file("init", 0o755, contents.init.as_bytes());
    archive.file("etc/mtab", 0o644, b"");
    // An archive takes each name once: programs of this machine go before busybox's of the same name.
    for program in &contents.programs {
        add_program(&mut archive, program)?;
    }
    archive.file("bin/busybox", 0o755, &read(&setup.busybox)?);
    for applet in applets(&setup.busybox)? {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    let modules = Modules::index(&setup.modules)?.with_dependencies(contents.modules)?;
    let mut order = String::new();
    for (name, content) in &modules {
        archive.file(&format!("modules/{name}.ko"), 0o644, content);
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    for (name, content) in &contents.files {
        archive.file(name, 0o644, content);
    }
    Ok(archive.finish())
}

/// A program that is installed on this machine.
pub(super) fn installed(name: &str, package: &str) -> Result<PathBuf> {
    let folders = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    let mut paths = folders.iter().map(|folder| Path::new(folder).join(name));
    paths.find(|path| path.is_file()).with_context(|| format!("no {name} (package {package})"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn applets(busybox: &Path) -> Result<Vec<String>> {
    let output = Command::new(busybox).arg("--list").output().context("busybox --list")?;
    let list = String::from_utf8(output.stdout)?;
    // busybox itself is on the list and would become a link to itself.
    Ok(list.lines().filter(|name| *name != "busybox").map(str::to_owned).collect())
}

fn add_program(archive: &mut Archive, path: &Path) -> Result<()> {
    let name = path.file_name().and_then(|name| name.to_str()).context("a program has a name")?;
    archive.file(&format!("bin/{name}"), 0o755, &without_symbols(path)?);
    let output = Command::new("ldd").arg(path).output().context("ldd")?;
    for line in String::from_utf8(output.stdout)?.lines() {
        let library = line.split_whitespace().find(|word| word.starts_with('/'));
        if let Some(library) = library {
            archive.file(library.trim_start_matches('/'), 0o755, &read(Path::new(library))?);
        }
    }
    Ok(())
}

/// Symbols make up most of a program's file, and the guest holds all of it in memory. Without the tool they stay.
fn without_symbols(path: &Path) -> Result<Vec<u8>> {
    let stripped = tempfile::NamedTempFile::new()?;
    let status = Command::new("strip").arg("-o").arg(stripped.path()).arg(path).status();
    if status.is_ok_and(|status| status.success()) { read(stripped.path()) } else { read(path) }
}

/// Kernel modules by name.
struct Modules {
    files: HashMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    fn index(base: &Path) -> Result<Self> {
        let list = std::fs::read_to_string(base.join("modules.builtin"))
            .with_context(|| format!("{}/modules.builtin", base.display()))?;
        let builtin = list.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let mut files = HashMap::new();
        let mut folders = vec![base.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    files.insert(name, entry.path());
                }
            }
        }
        Ok(Self { files, builtin })
    }

    /// The modules and what they need, in the order in which they have to be loaded.
    fn with_dependencies(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut order = Vec::new();
        for name in wanted {
            self.add(name, &mut order)?;
        }
        Ok(order)
    }

    fn add(&self, name: &str, order: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        if self.builtin.contains(name) || order.iter().any(|(known, _)| known == name) {
            return Ok(());
        }
        let path = self.files.get(name).with_context(|| format!("the kernel has no module {name}"))?;
        let content = unpack(path)?;
        for dependency in depends(&content) {
            self.add(&dependency, order)?;
        }
        order.push((name.to_owned(), content));
        Ok(())
    }
}

fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    Some(file.split_once(".ko")?.0.replace('-', "_"))
}

pub(super) fn unpack(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|e| e.to_str()) {
        Some("ko") => return read(path),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => bail!("{}: unknown kind of compression", path.display()),
    };
    let output = Command::new(tool).arg("-dc").arg(path).output().with_context(|| format!("run {tool}"))?;
    ensure!(output.status.success(), "{tool} can't unpack {}", path.display());
    Ok(output.stdout)
}

/// The names after `depends=` in a module's .modinfo section.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else { return Vec::new() };
    let value = &module[at + key.len()..];
    let value = value.split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|s| !s.is_empty()).map(|s| s.replace('-', "_")).collect()
}

/// A cpio archive of the kind "newc": a header of 13 numbers in hexadecimal, the name, the content; each padded to 4.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    fn dir(&mut self, name: &str) {
        let mut path = String::new();
        for part in name.split('/').filter(|part| !part.is_empty()) {
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(part);
            let path = path.clone();
            self.node(&path, 0o40755, b"", (0, 0));
        }
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        if let Some((dir, _)) = name.rsplit_once('/') {
            self.dir(dir);
        }
        self.node(name, 0o100_000 | mode, content, (0, 0));
    }

    fn link(&mut self, name: &str, target: &str) {
        self.node(name, 0o120_777, target.as_bytes(), (0, 0));
    }

    fn node(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        if self.names.insert(name.to_owned()) {
            self.append(name, mode, content, device);
        }
    }

    fn append(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.inode += 1;
        let length = u32::try_from(content.len()).expect("files of an initramfs are small");
        let name_length = u32::try_from(name.len() + 1).expect("names are short");
        let fields = [self.inode, mode, 0, 0, 1, 0, length, 0, 0, device.0, device.1, name_length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.append("TRAILER!!!", 0, b"", (0, 0));
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_each_folder_once_and_ends_with_a_trailer() {
        let mut archive = Archive::default();
        archive.file("a/b/c", 0o644, b"12345");
        archive.file("a/b/d", 0o644, b"");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 5);
        assert!(text.contains("TRAILER!!!"));
        assert!(text.starts_with("07070100000001000041ED"));
    }

    #[test]
    fn dependencies_are_read_from_a_module() {
        assert_eq!(depends(b"x\0license=GPL\0depends=virtio,virtio-ring\0y"), ["virtio", "virtio_ring"]);
        assert!(depends(b"x\0depends=\0y").is_empty());
        assert_eq!(module_name(Path::new("kernel/a/virtio-blk.ko.xz")).unwrap(), "virtio_blk");
    }
}
