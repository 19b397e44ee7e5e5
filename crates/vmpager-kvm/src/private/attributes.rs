//! The attribute by which KVM knows a private page.

use std::io;
use std::ops::Range;

use kvm_bindings::{KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_memory_attributes};
use kvm_ioctls::VmFd;

/// Gives pages of these guest-physical addresses the attribute, or takes it from
/// them (`KVM_SET_MEMORY_ATTRIBUTES`): vCPUs that had them mapped have not, on
/// return.
pub(super) fn set_private(vm: &VmFd, range: &Range<u64>, is_private: bool) -> io::Result<()> {
    let attributes = if is_private { u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) } else { 0 };
    let size = range.end - range.start;
    let wanted = kvm_memory_attributes { address: range.start, size, attributes, flags: 0 };
    loop {
        match vm.set_memory_attributes(wanted).map_err(io::Error::from) {
            // A signal came in between.
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            set => return set,
        }
    }
}
