//! The file systems that the lab and its guests start from. Not compressed:
//! unpacking would be emulated, loading is not.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::Context;

use super::build::{self, Programs};
use super::kernel::Kernel;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// Where both kinds of init mount things.
const MOUNT_POINTS: [&str; 4] = ["dev", "proc", "sys", "tmp"];

/// Writes the lab's own: its init, the program, the modules to load, and what
/// its guests start from.
pub(super) fn host(
    path: &Path,
    programs: &Programs,
    host: &Kernel,
    guest: &Kernel,
) -> anyhow::Result<()> {
    let mut archive = Archive::create(path)?;
    archive.directories(&MOUNT_POINTS)?;
    archive.directories(&["bin", "lab", "lab/modules"])?;
    archive.copy("init", PROGRAM, &programs.lab)?;
    archive.copy("bin/vmpager", PROGRAM, &programs.vmpager)?;
    archive.copy("bin/matrix", PROGRAM, &programs.matrix)?;
    archive.libraries(&[&programs.lab, &programs.vmpager, &programs.matrix])?;
    for (number, module) in host.modules().iter().enumerate() {
        let name = format!("lab/modules/{number:02}-{}.ko", module.name);
        archive.add(&name, FILE, &module.object)?;
    }
    archive.copy("lab/kernel", FILE, guest.image())?;
    archive.copy("lab/host-kernel", FILE, host.image())?;
    let inner = path.with_extension("guest");
    self::guest(&inner, programs)?;
    archive.copy("lab/guest-initramfs", FILE, &inner)?;
    archive.finish()
}

/// Writes a guest's: its init, and what that is linked to.
pub(super) fn guest(path: &Path, programs: &Programs) -> anyhow::Result<()> {
    let mut archive = Archive::create(path)?;
    archive.directories(&MOUNT_POINTS)?;
    archive.copy("init", PROGRAM, &programs.lab)?;
    archive.libraries(&[&programs.lab])?;
    archive.finish()
}

/// A path's name in an archive; the root has none.
fn inside(path: &Path) -> Option<&str> {
    path.strip_prefix("/").ok()?.to_str().filter(|name| !name.is_empty())
}

/// A cpio archive of the kind Linux unpacks ("newc").
struct Archive<'a> {
    path: &'a Path,
    out: BufWriter<File>,
    inode: u32,
}

impl<'a> Archive<'a> {
    fn create(path: &'a Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
        Ok(Self { path, out: BufWriter::new(file), inode: 0 })
    }

    fn directories(&mut self, names: &[&str]) -> anyhow::Result<()> {
        names.iter().try_for_each(|name| self.add(name, DIRECTORY, &[]))
    }

    /// What programs are linked to, where they look for it.
    fn libraries(&mut self, programs: &[&Path]) -> anyhow::Result<()> {
        let mut libraries = BTreeSet::new();
        for program in programs {
            libraries.extend(build::libraries(program)?);
        }
        let mut made = BTreeSet::new();
        for library in &libraries {
            let mut parents: Vec<&Path> = library.ancestors().skip(1).collect();
            parents.reverse();
            for parent in parents.into_iter().filter_map(inside) {
                if made.insert(parent) {
                    self.add(parent, DIRECTORY, &[])?;
                }
            }
            let name = inside(library);
            let name = name.with_context(|| format!("the name of {}", library.display()))?;
            self.copy(name, PROGRAM, library)?;
        }
        Ok(())
    }

    fn copy(&mut self, name: &str, mode: u32, from: &Path) -> anyhow::Result<()> {
        let bytes = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        self.add(name, mode, &bytes)
    }

    fn add(&mut self, name: &str, mode: u32, bytes: &[u8]) -> anyhow::Result<()> {
        let at = || format!("writing {name} to {}", self.path.display());
        let len = u32::try_from(bytes.len()).with_context(at)?;
        self.inode += 1;
        let entry = cpio::newc::Builder::new(name).ino(self.inode).mode(mode);
        let write = |out: &mut BufWriter<File>| -> io::Result<()> {
            let mut entry = entry.write(out, len);
            entry.write_all(bytes)?;
            entry.finish().map(|_| ())
        };
        write(&mut self.out).with_context(at)
    }

    fn finish(self) -> anyhow::Result<()> {
        cpio::newc::trailer(self.out)
            .and_then(|mut out| out.flush())
            .with_context(|| format!("writing {}", self.path.display()))
    }
}
