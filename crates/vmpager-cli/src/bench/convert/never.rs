//! What it costs a VM that its memory could be private, if it never is.
//!
//! A VM is saved with no page private, and restored lazily from a warm file; its
//! guest touches pages, each once, in random order, a page per fault. The same is done
//! to a plain VM whose memory is of the same sort, a memfd, and to one with the memory
//! that plain VMs have, anonymous.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use serde::Serialize;
use vmpager::{GuestRange, NeighbourPolicy, Pager};
use vmpager_store::RawFile;
use vmpager_sys::memfd;
use vmpager_sys::memory::Mapping;
use vmpager_vm::{
    Cpu, InProcess, PrivateBackend, RestoreMemory, Snapshot, SnapshotPaths, Vm, Workload,
};

use super::{MEMORY, build, name};
use crate::bench::{median, round, to_f64};
use crate::output;
use crate::restore::{Cache, prepare_cache};
use crate::scratch::Scratch;

/// Faults served a second, in thousands.
#[derive(Debug, Serialize)]
pub(super) struct NeverRow {
    backend: &'static str,
    kfaults_s: f64,
    /// A plain VM's, its memory a memfd too.
    plain_memfd_kfaults_s: f64,
    /// A plain VM's, its memory anonymous.
    plain_anonymous_kfaults_s: f64,
    ratio_memfd: f64,
    ratio_anonymous: f64,
}

/// One row for each back-end, all of which can be restored lazily.
pub(super) fn rows(
    backends: &[PrivateBackend],
    rounds: u32,
    faults: u64,
) -> anyhow::Result<Vec<NeverRow>> {
    let scratch = Scratch::new(None, 2 * MEMORY)?;
    let save = |name: &str, backend| {
        let dir = scratch.path().join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let mut vm = build(backend, 1)?;
        vm.prepare()?;
        anyhow::Ok(vm.snapshot(&SnapshotPaths::in_dir(dir))?)
    };
    let plain = save("plain", None)?;
    // Which back-end had none of its pages private makes no difference.
    let saved = save("private", Some(PrivateBackend::InPlace))?;
    let (mut memfd, mut anonymous) = (Vec::new(), Vec::new());
    let mut private = vec![Vec::new(); backends.len()];
    for seed in 0..rounds {
        for snapshot in [&plain, &saved] {
            prepare_cache(&snapshot.paths().memory, Cache::Warm)?;
        }
        let workload = Workload { touches: Some(faults), seed: seed.into(), ..Workload::default() };
        for (backend, rates) in backends.iter().zip(&mut private) {
            rates.push(kfaults_s(in_process(&saved, *backend)?, &workload)?);
        }
        let (vm, _pager) = in_memfd(&plain)?;
        memfd.push(kfaults_s(vm, &workload)?);
        anonymous.push(kfaults_s(in_process(&plain, PrivateBackend::Auto)?, &workload)?);
    }
    let [memfd, anonymous] = [memfd, anonymous].map(median);
    let row = |(backend, rates): (&PrivateBackend, Vec<f64>)| {
        let rate = median(rates);
        NeverRow {
            backend: name(*backend),
            kfaults_s: round(rate),
            plain_memfd_kfaults_s: round(memfd),
            plain_anonymous_kfaults_s: round(anonymous),
            ratio_memfd: round(rate / memfd),
            ratio_anonymous: round(rate / anonymous),
        }
    };
    Ok(backends.iter().zip(private).map(row).collect())
}

fn in_process(snapshot: &Snapshot, backend: PrivateBackend) -> anyhow::Result<Vm> {
    let lazily = InProcess { neighbours: NeighbourPolicy::Off, ..InProcess::default() };
    Ok(Vm::restore_with(snapshot, RestoreMemory::InProcess(lazily), Cpu::Kvm, backend)?)
}

/// The same with memory of its own making.
fn in_memfd(snapshot: &Snapshot) -> anyhow::Result<(Vm, Pager)> {
    let bytes = snapshot.memory_bytes();
    let memfd = memfd::sealed("guest-memory", bytes)?;
    let len = usize::try_from(bytes).context("guest memory")?;
    let memory = Arc::new(Mapping::file_shared(memfd.as_fd(), len)?);
    let pager = Pager::builder(RawFile::open(&snapshot.paths().memory)?)
        .region(&GuestRange::of_mapping(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()?;
    Ok((Vm::restore(snapshot, RestoreMemory::Prepared(memory), Cpu::Kvm)?, pager))
}

fn kfaults_s(mut vm: Vm, workload: &Workload) -> anyhow::Result<f64> {
    vm.bring_fixed();
    let report = vm.run(workload, Instant::now())?;
    if report.mismatches > 0 {
        bail!("{} wrong pages of {}", report.mismatches, report.pages);
    }
    Ok(to_f64(report.pages) / report.workload.as_secs_f64() / 1e3)
}

pub(super) fn show(rows: &[NeverRow]) -> anyhow::Result<()> {
    output::line("\nVMs that never convert, restored lazily (faults a second):")?;
    for row in rows {
        output::line(&format!(
            "{:>19}: {:.1} k/s; plain {:.1} k/s on a memfd ({:.2}x), {:.1} k/s on anonymous \
             memory ({:.2}x)",
            row.backend,
            row.kfaults_s,
            row.plain_memfd_kfaults_s,
            row.ratio_memfd,
            row.plain_anonymous_kfaults_s,
            row.ratio_anonymous,
        ))?;
    }
    Ok(())
}
