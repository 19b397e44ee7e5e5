//! What the tests of the VM share.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::time::Instant;

use tempfile::TempDir;
use vmpager_vm::{
    Cpu, Filling, RestoreMemory, RunReport, Snapshot, SnapshotPaths, Vm, VmConfig, VmError,
    Workload,
};

pub(crate) const MEMORY: u64 = 16 << 20;
pub(crate) const SEED: u64 = 11;

/// The kinds of vCPU this machine has; prints which tests it cannot run.
pub(crate) fn cpus() -> Vec<Cpu> {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => vec![Cpu::Kvm, Cpu::Threads],
        Err(error) => {
            vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
            vec![Cpu::Threads]
        }
    }
}

pub(crate) fn config(cpu: Cpu) -> VmConfig {
    let filling = Filling::Generated { seed: SEED, bytes: None };
    VmConfig { memory_bytes: MEMORY, filling, cpu, ..VmConfig::default() }
}

/// A prepared guest's snapshot.
pub(crate) fn snapshot(config: &VmConfig) -> (TempDir, Snapshot) {
    let dir = TempDir::new().unwrap();
    let mut vm = Vm::build(config).unwrap();
    vm.prepare().unwrap();
    let snapshot = vm.snapshot(&SnapshotPaths::in_dir(dir.path())).unwrap();
    (dir, snapshot)
}

pub(crate) fn restore_and_run(
    snapshot: &Snapshot,
    memory: RestoreMemory,
    cpu: Cpu,
    workload: &Workload,
) -> Result<(Vm, RunReport), VmError> {
    let since = Instant::now();
    let mut vm = Vm::restore(snapshot, memory, cpu)?;
    let report = vm.run(workload, since)?;
    Ok((vm, report))
}
