//! Kernels: a bzImage as it is, or with its KVM modules from a Debian package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use super::tool;

/// What a stock kernel needs for a `/dev/kvm` on the lab's AMD CPU.
const WANTED: &str = "kvm_amd";

/// A module to load.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    /// The module, decompressed.
    pub(super) object: Vec<u8>,
}

/// A kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    image: PathBuf,
    release: String,
    modules: Vec<Module>,
    /// Where a package was unpacked.
    _unpacked: Option<tempfile::TempDir>,
}

impl Kernel {
    /// Opens a bzImage, a Debian kernel package, or a directory one was
    /// unpacked into. Packages are unpacked below `target`.
    pub(super) fn open(path: &Path, target: &Path) -> anyhow::Result<Self> {
        let open = || -> anyhow::Result<Self> {
            if path.is_dir() {
                return Self::unpacked(path, None);
            }
            let mut magic = [0; 8];
            let mut file = fs::File::open(path)?;
            std::io::Read::read_exact(&mut file, &mut magic).context("it is too short")?;
            if magic != *b"!<arch>\n" {
                let release = release(path)?;
                return Ok(Self {
                    image: path.into(),
                    release,
                    modules: Vec::new(),
                    _unpacked: None,
                });
            }
            let dir = tempfile::Builder::new().prefix("kernel-").tempdir_in(target)?;
            tool::output(Command::new("dpkg-deb").arg("-x").arg(path).arg(dir.path()), "dpkg")?;
            let root = dir.path().to_path_buf();
            Self::unpacked(&root, Some(dir))
        };
        open().with_context(|| format!("the kernel {}", path.display()))
    }

    fn unpacked(root: &Path, dir: Option<tempfile::TempDir>) -> anyhow::Result<Self> {
        let boot = root.join("boot");
        let is_image = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
        };
        let mut images = entries(&boot)?;
        images.retain(is_image);
        let [image] = &images[..] else {
            bail!("{} has {} files vmlinuz-*, not one", boot.display(), images.len());
        };
        let release = release(image)?;
        let modules = modules(root, &release)?;
        Ok(Self { image: image.clone(), release, modules, _unpacked: dir })
    }

    /// The bzImage.
    pub(super) fn image(&self) -> &Path {
        &self.image
    }

    /// What `uname -r` says there.
    pub(super) fn release(&self) -> &str {
        &self.release
    }

    /// The modules to load, in an order in which they can be.
    pub(super) fn modules(&self) -> &[Module] {
        &self.modules
    }
}

/// The release in the header of a bzImage (Linux, `arch/x86/boot.rst`: magic
/// at 0x202, `kernel_version` at 0x20e, from 0x200).
fn release(image: &Path) -> anyhow::Result<String> {
    let bytes = fs::read(image).with_context(|| format!("reading {}", image.display()))?;
    if bytes.get(0x202..0x206) != Some(b"HdrS") {
        bail!("{} is no bzImage", image.display());
    }
    let at = bytes.get(0x20e..0x210).map_or(0, |at| usize::from(at[0]) | usize::from(at[1]) << 8);
    let text = bytes.get(at + 0x200..).unwrap_or_default();
    let end = text.iter().take(256).position(|&b| b == 0 || b == b' ').unwrap_or(0);
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

fn entries(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let list = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    Ok(list.collect::<Result<Vec<_>, _>>()?.into_iter().map(|entry| entry.path()).collect())
}

/// The wanted module after those it depends on; none if it is built in.
fn modules(root: &Path, release: &str) -> anyhow::Result<Vec<Module>> {
    let places = ["lib/modules", "usr/lib/modules"].map(|dir| root.join(dir).join(release));
    let dir = places.iter().find(|dir| dir.is_dir()).context("its modules are missing")?;
    let built_in = fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
    let built_in: Vec<String> = built_in.lines().filter_map(|l| module_name(l.as_ref())).collect();
    let mut files = Vec::new();
    walk(&dir.join("kernel"), &mut files)?;

    let mut loaded: Vec<Module> = Vec::new();
    let mut todo = vec![WANTED.to_owned()];
    while let Some(name) = todo.last() {
        if built_in.contains(name) || loaded.iter().any(|module| module.name == *name) {
            todo.pop();
            continue;
        }
        let file = files.iter().find(|file| module_name(file).as_ref() == Some(name));
        let file = file.with_context(|| format!("the module {name} is missing"))?;
        let object = decompressed(file)?;
        let missing: Vec<String> = depends(&object)
            .into_iter()
            .filter(|name| !built_in.contains(name) && loaded.iter().all(|m| m.name != *name))
            .collect();
        if missing.is_empty() {
            loaded.push(Module { name: name.clone(), object });
        } else if missing.iter().any(|name| todo.contains(name)) {
            bail!("the module {name} depends on itself");
        } else {
            todo.extend(missing);
        }
    }
    Ok(loaded)
}

/// `…/kvm-amd.ko.xz` is the module `kvm_amd`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, _) = name.split_once(".ko")?;
    Some(stem.replace('-', "_"))
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for path in entries(dir)? {
        if path.is_dir() { walk(&path, files)? } else { files.push(path) }
    }
    Ok(())
}

fn decompressed(file: &Path) -> anyhow::Result<Vec<u8>> {
    match file.extension().and_then(|end| end.to_str()) {
        Some("ko") => fs::read(file).with_context(|| format!("reading {}", file.display())),
        Some("xz") => tool::output(Command::new("xz").arg("-dc").arg(file), "xz-utils"),
        Some("zst") => tool::output(Command::new("zstd").arg("-dcq").arg(file), "zstd"),
        _ => bail!("{} is compressed in a way not known here", file.display()),
    }
}

/// The names after `depends=` among the module's information strings.
fn depends(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = object[at + KEY.len()..].split(|&b| b == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A package as Debian lays it out, with empty modules but for what they
    /// say of each other.
    fn package() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        let modules = dir.path().join("lib/modules/6.1.0-test/kernel/virt");
        fs::create_dir_all(&modules).expect("a directory");
        fs::create_dir_all(dir.path().join("boot")).expect("a directory");
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e] = 0x80; // 0x280 from the beginning
        image[0x280..0x290].copy_from_slice(b"6.1.0-test (you)");
        fs::write(dir.path().join("boot/vmlinuz-6.1.0-test"), image).expect("an image");
        for (file, depends) in
            [("kvm-amd.ko", "kvm,ccp"), ("kvm.ko", "irqbypass"), ("irqbypass.ko", "")]
        {
            let text = format!("x\0license=GPL\0depends={depends}\0name=x\0");
            fs::write(modules.join(file), text).expect("a module");
        }
        let built_in = dir.path().join("lib/modules/6.1.0-test/modules.builtin");
        fs::write(built_in, "kernel/drivers/crypto/ccp/ccp.ko\n").expect("a list");
        dir
    }

    #[test]
    fn modules_come_after_those_they_need() {
        let package = package();
        let kernel = Kernel::open(package.path(), package.path()).expect("a kernel");
        assert_eq!(kernel.release(), "6.1.0-test");
        let names: Vec<&str> = kernel.modules().iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["irqbypass", "kvm", "kvm_amd"]);
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        let package = package();
        let file = package.path().join("not-a-kernel");
        fs::write(&file, vec![7; 0x400]).expect("a file");
        let error = format!("{:#}", Kernel::open(&file, package.path()).expect_err("no kernel"));
        assert!(error.contains("not-a-kernel is no bzImage"), "{error}");
        fs::remove_file(package.path().join("lib/modules/6.1.0-test/kernel/virt/irqbypass.ko"))
            .expect("it was there");
        let error = Kernel::open(package.path(), package.path()).expect_err("a module is missing");
        assert!(format!("{error:#}").contains("the module irqbypass is missing"), "{error:#}");
    }
}
