//! Memory attributes: pages that KVM takes for private to the guest.
//!
//! In a software-protected VM, a page with `KVM_MEMORY_ATTRIBUTE_PRIVATE` is to
//! come from the guest_memfd of its memslot. Where the memslot has none, an access
//! of a vCPU ends `KVM_RUN` with `KVM_EXIT_MEMORY_FAULT`, before the memory behind
//! is looked at (`Documentation/virt/kvm/api.rst`). So a page that is missing
//! carries the attribute until it is in place.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_VM_TYPES, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_X86_SW_PROTECTED_VM, kvm_memory_attributes,
};
use kvm_ioctls::{Kvm, VmFd};

use super::{ExitError, GpaRange, refused};
use crate::candidates::PAGE_BYTES;

/// As many pages as are cleared at most at a time: those of 2 MiB. More would
/// hold up the VM's other faults.
const BATCH: u64 = 512;

/// The VM whose missing pages carry the attribute, and which of them do.
#[derive(Debug)]
pub(super) struct Attributes {
    vm: Arc<VmFd>,
    /// A bit for each page of the mapping: it exits.
    private: Vec<AtomicU64>,
}

/// What this mechanism needs and a KVM lacks, if anything.
pub(super) fn lacks(kvm: &Kvm) -> Option<&'static str> {
    let answer = |cap: u32| u64::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
    if answer(KVM_CAP_VM_TYPES) & (1 << KVM_X86_SW_PROTECTED_VM) == 0 {
        return Some("software-protected VMs");
    }
    let private = u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE);
    (answer(KVM_CAP_MEMORY_ATTRIBUTES) & private == 0).then_some("memory attributes")
}

impl Attributes {
    /// Has all pages of these slots exit. `vm` is software-protected.
    pub(super) fn new(vm: Arc<VmFd>, slots: &[GpaRange]) -> Result<Self, ExitError> {
        let end = slots.iter().map(|slot| slot.offset + slot.len).max().unwrap_or(0);
        let words = end.div_ceil(PAGE_BYTES * u64::from(u64::BITS));
        let attributes = Self { vm, private: (0..words).map(|_| AtomicU64::new(0)).collect() };
        for slot in slots {
            let private = u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE);
            attributes.set(slot.gpa, slot.len, private)?;
            for page in pages(slot) {
                let (word, bit) = place(page);
                if let Some(word) = attributes.private.get(word) {
                    word.fetch_or(bit, Ordering::Relaxed);
                }
            }
        }
        Ok(attributes)
    }

    fn set(&self, address: u64, size: u64, attributes: u64) -> Result<(), ExitError> {
        let wanted = kvm_memory_attributes { address, size, attributes, flags: 0 };
        let set = self.vm.set_memory_attributes(wanted);
        set.map_err(refused("change the attributes of guest memory"))
    }

    /// Whether accesses to a page of the mapping exit.
    fn exits(&self, page: u64) -> bool {
        let (word, bit) = place(page);
        self.private.get(word).is_some_and(|word| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Ends the exits of a page that is in place, and of those around it, in the
    /// same 2 MiB of the guest's, for which `is_present` says so too. Whether
    /// there was anything to end.
    pub(super) fn clear(
        &self,
        slot: &GpaRange,
        gpa: u64,
        is_present: impl Fn(u64) -> bool,
    ) -> Result<bool, ExitError> {
        let to_page = |gpa: u64| (slot.offset + (gpa - slot.gpa)) / PAGE_BYTES;
        let page = to_page(gpa);
        if !self.exits(page) {
            return Ok(false);
        }
        let batch = BATCH * PAGE_BYTES;
        let start = (gpa / batch * batch).max(slot.gpa);
        let end = (gpa / batch * batch + batch).min(slot.gpa + slot.len);
        let alike = |page: &u64| self.exits(*page) && is_present(page * PAGE_BYTES);
        let before = (to_page(start)..page).rev().take_while(alike).count() as u64;
        let after = (page + 1..to_page(end)).take_while(alike).count() as u64;
        let run = page - before..page + after + 1;
        let first = slot.gpa + (run.start * PAGE_BYTES - slot.offset);
        self.set(first, (run.end - run.start) * PAGE_BYTES, 0)?;
        self.forget(run);
        Ok(true)
    }

    /// Afterwards, not before: a vCPU that is told "does not exit" must be able
    /// to rely on it.
    fn forget(&self, run: Range<u64>) {
        for page in run {
            let (word, bit) = place(page);
            if let Some(word) = self.private.get(word) {
                word.fetch_and(!bit, Ordering::Release);
            }
        }
    }
}

fn pages(slot: &GpaRange) -> Range<u64> {
    slot.offset / PAGE_BYTES..(slot.offset + slot.len) / PAGE_BYTES
}

/// Where a page's bit is.
fn place(page: u64) -> (usize, u64) {
    let bits = u64::from(u64::BITS);
    (usize::try_from(page / bits).unwrap_or(usize::MAX), 1 << (page % bits))
}
