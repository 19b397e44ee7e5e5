//! What is restored: a snapshot made for the purpose, or one that is given.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, bail};
use vmpager::core::PageSource;
use vmpager_store::RawFile;
use vmpager_store::image::{Image, MemoryInput, PackOptions};
use vmpager_store::profile::Profile;
use vmpager_vm::{Filling, Snapshot, SnapshotPaths, Vm, VmConfig};

use super::{OTHER_SEED, RestoreArgs, SEED};
use crate::restore::{Mode, Work, record};
use crate::scratch::Scratch;
use crate::size;
use crate::vm_process::cpu_name;

/// A snapshot to restore.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) paths: SnapshotPaths,
    /// Removed at the end, with the snapshot that was made in it.
    pub(super) scratch: Scratch,
    pub(super) guest: &'static str,
    /// What plays the vCPU.
    pub(super) vm: &'static str,
    pub(super) memory_bytes: u64,
    /// Bytes of memory that are no holes of its file.
    pub(super) contents_bytes: u64,
    /// How many pages the built-in guest touches.
    pub(super) touches: u64,
}

/// How many pages the built-in guest touches by default.
const TOUCHES: u64 = 24_576;

impl Subject {
    /// The snapshot of a guest made with that much memory.
    pub(super) fn make(args: &RestoreArgs, memory_bytes: u64) -> anyhow::Result<Self> {
        let filling = Filling::Generated { seed: 1, bytes: args.filled };
        Self::built_in(args, memory_bytes, filling, "built-in")
    }

    /// The snapshot that is given. Where Linux cannot run, its memory becomes
    /// that of the built-in guest, which touches and verifies it.
    pub(super) fn given(args: &RestoreArgs, state: &Path, memory: &Path) -> anyhow::Result<Self> {
        let paths = SnapshotPaths { state: state.to_owned(), memory: memory.to_owned() };
        let snapshot = Snapshot::open(&paths)?;
        if !snapshot.is_linux() {
            bail!(
                "{} is the state of a built-in guest; leave out --state, and one is made",
                state.display()
            );
        }
        let memory_bytes = snapshot.memory_bytes();
        if !vmpager_kvm::probe::kvm().is_ok_and(|kvm| kvm.boots_linux()) {
            let filling = Filling::File(memory.to_owned());
            let guest = "built-in, with a Linux guest's memory";
            return Self::built_in(args, with_room(memory_bytes), filling, guest);
        }
        let scratch = Scratch::new(args.dir.as_deref(), 0)?;
        // Beside it its image is made, and removed at the end.
        let linked = scratch.path().join("memory.raw");
        std::os::unix::fs::symlink(std::path::absolute(memory)?, &linked)?;
        let paths = SnapshotPaths { memory: linked, ..paths };
        let (guest, vm) = ("linux", "kvm");
        let contents_bytes = std::fs::metadata(memory)?.blocks() * 512;
        Ok(Self { paths, scratch, guest, vm, memory_bytes, contents_bytes, touches: 0 })
    }

    /// The snapshot of a built-in guest, with these contents of its memory.
    pub(super) fn with_contents(args: &RestoreArgs, memory: &Path) -> anyhow::Result<Self> {
        let len = std::fs::metadata(memory)
            .with_context(|| format!("the memory file {}", memory.display()))?
            .len();
        let filling = Filling::File(memory.to_owned());
        Self::built_in(args, with_room(len), filling, "built-in, with the given memory")
    }

    fn built_in(
        args: &RestoreArgs,
        memory_bytes: u64,
        filling: Filling,
        guest: &'static str,
    ) -> anyhow::Result<Self> {
        let scratch = Scratch::new(args.dir.as_deref(), args.filled.unwrap_or(memory_bytes))?;
        let paths = SnapshotPaths::in_dir(scratch.path());
        let config =
            VmConfig { memory_bytes, filling, cpu: args.cpu.into(), ..VmConfig::default() };
        let mut vm = Vm::build(&config)
            .with_context(|| format!("a guest of {}", size::show(memory_bytes)))?;
        vm.prepare()?;
        vm.snapshot(&paths)?;
        let pages = vm.content_pages();
        let touches = args.touches.unwrap_or(TOUCHES.min(pages));
        let (vm, contents_bytes) = (cpu_name(vm.cpu()), pages * 4096);
        Ok(Self { paths, scratch, guest, vm, memory_bytes, contents_bytes, touches })
    }
}

impl Subject {
    /// Makes the profiles and images that these ways to restore need.
    pub(super) fn prepare(
        &self,
        args: &RestoreArgs,
        modes: &[Mode],
        work: &dyn Fn(u64) -> Work,
    ) -> anyhow::Result<()> {
        for mode in modes {
            if let Some(profile) = mode.profile(&self.paths)
                && !profile.exists()
            {
                let seed = if *mode == Mode::OnDemandWrong { OTHER_SEED } else { SEED };
                record(&self.paths, self.scratch.path(), &work(seed), &profile)?;
            }
            if let Some(image) = mode.image(&self.paths)
                && !image.exists()
            {
                self.pack(args, *mode, &image)?;
            }
        }
        Ok(())
    }

    fn pack(&self, args: &RestoreArgs, mode: Mode, image: &Path) -> anyhow::Result<()> {
        let memory = MemoryInput::raw(&self.paths.memory)?;
        let mut options =
            PackOptions::default().codec(args.codec.into()).frame_bytes(args.frame_size);
        if let Some(profile) = mode.profile(&self.paths) {
            options = options.first(Profile::open_for(profile, &memory)?.replay_order());
        }
        let progress = &mut |_| ControlFlow::Continue(());
        match mode.base(&self.paths) {
            None => options.pack(&memory, image, progress)?,
            Some(base) => {
                let before = self.scratch.path().join("before.raw");
                change_some(&self.paths.memory, &before)?;
                options.pack(&MemoryInput::raw(&before)?, &base, progress)?;
                std::fs::remove_file(&before)?;
                options.diff(&*Image::open(&base)?, &memory, image, progress)?
            }
        };
        Ok(())
    }
}

/// Copies memory, with another byte in each eighth page that has contents.
fn change_some(from: &Path, to: &Path) -> anyhow::Result<()> {
    let at = || format!("making {}", to.display());
    std::fs::copy(from, to).with_context(at)?;
    let file = File::options().read(true).write(true).open(to).with_context(at)?;
    let (mut byte, mut changed) = ([0], 0);
    let source = RawFile::open(from)?;
    let mut data = Vec::new();
    let mut start = 0;
    source.visit_zero_ranges(&mut |hole| {
        data.push(start..hole.start);
        start = hole.end();
    });
    data.push(start..source.len());
    for page in data.into_iter().flat_map(|range| range.step_by(4096)) {
        changed += 1;
        if changed % 8 == 0 {
            file.read_exact_at(&mut byte, page + 100).with_context(at)?;
            file.write_all_at(&[byte[0] ^ 1], page + 100).with_context(at)?;
        }
    }
    Ok(())
}

/// Memory for as much contents and the built-in guest's own structures, which
/// are eight bytes a page and little else.
fn with_room(contents: u64) -> u64 {
    (contents + contents / 256 + (4 << 20)).next_multiple_of(2 << 20)
}
