//! FPU and vector registers: the XSAVE area of a vCPU.

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::refused;
use super::scope::StateScope;
use crate::error::VmError;

/// Its size while there are no registers beyond AVX-512.
pub(super) const LEGACY_BYTES: usize = size_of::<kvm_xsave>();

/// It is made of words.
pub(super) const WORD: usize = size_of::<u32>();

/// In a state file, the area is one string of hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(transparent)]
pub(crate) struct XsaveArea(#[serde(with = "hex")] pub(crate) Vec<u8>);

pub(super) fn save(fd: &VcpuFd, scope: &StateScope) -> Result<XsaveArea, VmError> {
    if scope.xsave_bytes == LEGACY_BYTES {
        let legacy = fd.get_xsave().map_err(refused("save the FPU"))?;
        return Ok(XsaveArea(bytes(&legacy.region, &[])));
    }
    let mut area = area(scope.xsave_bytes)?;
    // SAFETY: the area has the size KVM_CAP_XSAVE2 told for this VM, and this
    // program never asks for more features (arch_prctl), which would make it grow.
    unsafe { fd.get_xsave2(&mut area) }.map_err(refused("save the FPU"))?;
    Ok(XsaveArea(bytes(&area.as_fam_struct_ref().xsave.region, area.as_slice())))
}

pub(super) fn load(fd: &VcpuFd, saved: &XsaveArea, scope: &StateScope) -> Result<(), VmError> {
    if saved.0.len() != scope.xsave_bytes {
        return Err(VmError::Config {
            field: "bytes in a vCPU's xsave",
            value: saved.0.len() as u64,
            remedy: "restore on a processor with the same vector registers as the one that saved",
        });
    }
    let mut area = area(scope.xsave_bytes)?;
    let (legacy, beyond) = saved.0.split_at(LEGACY_BYTES);
    fill(beyond, area.as_mut_slice());
    // SAFETY: the length of the flexible array is left as it is.
    let whole = unsafe { area.as_mut_fam_struct() };
    fill(legacy, &mut whole.xsave.region);
    // SAFETY: as for `get_xsave2`, the area has the size KVM reads for this VM.
    unsafe { fd.set_xsave2(&area) }.map_err(refused("load the FPU"))
}

/// An empty area of that size.
fn area(bytes: usize) -> Result<Xsave, VmError> {
    let beyond = bytes.saturating_sub(LEGACY_BYTES) / WORD;
    Xsave::new(beyond).map_err(|_| VmError::Config {
        field: "size of KVM's XSAVE area",
        value: bytes as u64,
        remedy: "use a kernel whose KVM_CAP_XSAVE2 is at most what its processor has",
    })
}

fn bytes(legacy: &[u32], beyond: &[u32]) -> Vec<u8> {
    legacy.iter().chain(beyond).flat_map(|word| word.to_le_bytes()).collect()
}

fn fill(bytes: &[u8], words: &mut [u32]) {
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
}
