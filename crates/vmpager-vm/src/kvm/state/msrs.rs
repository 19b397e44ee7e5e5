//! Model-specific registers: which are state, and the order that restores them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::refused;
use super::scope::StateScope;
use crate::error::VmError;

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
/// Its low byte is the number of machine-check banks.
const MCG_CAP: u32 = 0x179;
/// Four registers for each bank.
const MC0_CTL: u32 = 0x400;
/// Memory types, which KVM keeps but does not list: eight variable ranges, the
/// fixed ranges, the default.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// What KVM lists, and is not state. Writing the wall clock (by its old and its
/// new number) makes KVM write the time of day into guest memory: a restored
/// guest has not asked for it, and its memory would differ from the snapshot.
/// Another write acknowledges an async page fault. And `0x12` is the
/// paravirtual clock by its old number.
const NO_STATE: [u32; 4] = [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d07];
/// Hyper-V's, which KVM lists too; no guest here is offered Hyper-V. Some count
/// time.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// KVM's own registers: clock, async page faults, steal time, end of interrupt.
const PARAVIRTUAL: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;
/// The vector of async page faults, and what enables them. Both are KVM's as long
/// as KVM plays that device: whoever plays it instead keeps their values, and KVM
/// must not load them.
const ASYNC_PF_INTERRUPT: u32 = 0x4b56_4d06;
const ASYNC_PF_ENABLE: u32 = 0x4b56_4d02;

/// Whether a register that is state is one of the device's for async page faults.
pub(crate) fn is_async_pf(index: u32) -> bool {
    [ASYNC_PF_ENABLE, ASYNC_PF_INTERRUPT].contains(&index)
}

/// How many are read or written at a time: less than `KVM_MAX_MSR_ENTRIES`.
const BATCH: usize = 128;

/// One register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(deny_unknown_fields)]
pub(crate) struct Msr {
    pub(crate) index: u32,
    pub(crate) value: u64,
}

/// When a register is loaded. The paravirtual clock and the deadline are
/// counted in TSC cycles, so they come after it. Async page faults use their
/// interrupt vector from the moment they are enabled.
fn stage(index: u32) -> u8 {
    match index {
        TSC => 1,
        ASYNC_PF_INTERRUPT => 2,
        TSC_DEADLINE => 3,
        index if PARAVIRTUAL.contains(&index) => 3,
        _ => 0,
    }
}

/// All that are state, in the order in which they load.
pub(super) fn save(fd: &VcpuFd, scope: &StateScope) -> Result<Vec<Msr>, VmError> {
    let banks = match read(fd, &[MCG_CAP])?[..] {
        [cap] => u32::from(cap.value.to_le_bytes()[0]),
        _ => 0,
    };
    let mut indices = scope.msrs.clone();
    indices.extend(MTRRS.into_iter().flatten());
    indices.extend(MC0_CTL..MC0_CTL + 4 * banks);
    indices.retain(|index| !NO_STATE.contains(index) && !HYPER_V.contains(index));
    indices.sort_unstable_by_key(|index| (stage(*index), *index));
    indices.dedup();
    read(fd, &indices)
}

/// Reads registers, leaving out those that this vCPU does not have: KVM lists
/// what the host has.
fn read(fd: &VcpuFd, mut indices: &[u32]) -> Result<Vec<Msr>, VmError> {
    let mut found = Vec::new();
    while !indices.is_empty() {
        let wanted = &indices[..indices.len().min(BATCH)];
        let entries: Vec<_> = wanted
            .iter()
            .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
            .collect();
        let mut batch = batch(&entries)?;
        let count = fd.get_msrs(&mut batch).map_err(refused("save MSRs"))?.min(wanted.len());
        let read = batch.as_slice().iter().take(count);
        found.extend(read.map(|msr| Msr { index: msr.index, value: msr.data }));
        // The one at which KVM stopped is not there.
        let done = if count < wanted.len() { count + 1 } else { count };
        indices = &indices[done..];
    }
    Ok(found)
}

/// Writes those that differ. KVM lists some that it lets nobody write as this
/// vCPU is, or whose write it takes for a guest's use of what they control: these
/// have their saved value already.
pub(super) fn load(fd: &VcpuFd, saved: &[Msr], scope: &StateScope) -> Result<(), VmError> {
    let is_kvms = |msr: &&Msr| scope.async_pf || !is_async_pf(msr.index);
    let saved: Vec<Msr> = saved.iter().filter(is_kvms).copied().collect();
    let indices: Vec<u32> = saved.iter().map(|msr| msr.index).collect();
    let own = read(fd, &indices)?;
    let differing: Vec<Msr> = saved.into_iter().filter(|msr| !own.contains(msr)).collect();
    for wanted in differing.chunks(BATCH) {
        let entries: Vec<_> = wanted
            .iter()
            .map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() })
            .collect();
        let count = fd.set_msrs(&batch(&entries)?).map_err(refused("load MSRs"))?;
        if let Some(refused) = wanted.get(count) {
            return Err(VmError::Msr { index: refused.index, value: refused.value });
        }
    }
    Ok(())
}

fn batch(entries: &[kvm_msr_entry]) -> Result<Msrs, VmError> {
    Msrs::from_entries(entries).map_err(|_| VmError::Config {
        field: "MSRs in a batch",
        value: entries.len() as u64,
        remedy: "use at most 256",
    })
}
