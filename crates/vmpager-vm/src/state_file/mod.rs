//! The state file: all of a saved VM but its memory, as JSON.
//!
//! ```text
//! {
//!   "version": 3,
//!   "crc32c": "0x1b7a3c5d",
//!   "body": {
//!     "memory_bytes": …, "memslots": […], "guest": {…}, "kvm": {…}, "private": {…},
//!     "memory_crc32c": "1b7a3c5d…"
//!   }
//! }
//! ```
//!
//! The checksum is that of the body's bytes as they stand in the file, from its
//! opening to its closing brace. Nothing of the body is looked at before version
//! and checksum are right; then everything in it must be known, be of its type
//! and fit the rest. `private` is there if memory could be private to the guest, and
//! has the ranges that were. `memory_crc32c` has the checksum of each 2 MiB of the memory
//! file, in eight hexadecimal digits each.

mod checksums;
mod container;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub(crate) use self::container::MAX_MEMORY_BYTES;
pub use self::container::{MAX_STATE_BYTES, StateError};
use crate::PAGE_SIZE;
use crate::devices::DevicesState;
use crate::kvm::KvmState;
use crate::layout::Layout;
use crate::linux::MAX_VCPUS;
use crate::memory::Memslot;
use crate::pieces::pieces;
use crate::private::PrivateState;
use crate::vm::CpuKind;

/// All of a saved VM but its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    pub(crate) memory_bytes: u64,
    /// Where in guest-physical memory the bytes of the memory file are.
    pub(crate) memslots: Vec<Memslot>,
    pub(crate) guest: Guest,
    /// Absent if host threads prepared the built-in guest, which then starts
    /// afresh.
    pub(crate) kvm: Option<KvmState>,
    /// Which of the built-in guest's memory was private, if it could be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) private: Option<PrivateState>,
    /// The checksums of the memory file's pieces; a snapshot has them once its
    /// memory is written.
    #[serde(with = "checksums")]
    pub(crate) memory_crc32c: Vec<u32>,
}

/// What runs in the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub(crate) enum Guest {
    Builtin(BuiltinState),
    Linux(LinuxState),
}

/// What is to be known of the built-in guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BuiltinState {
    /// Of the contents; absent if they were taken from a file.
    pub(crate) seed: Option<u64>,
    /// What prepared it.
    pub(crate) cpu: CpuKind,
    pub(crate) layout: Layout,
}

/// What is to be known of a Linux guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LinuxState {
    /// What it was booted with.
    pub(crate) cmdline: String,
    pub(crate) devices: DevicesState,
}

impl VmState {
    /// Reads a state file's bytes.
    ///
    /// # Errors
    ///
    /// What is wrong with them, naming the field.
    pub fn parse(bytes: &[u8]) -> Result<Self, StateError> {
        let state: Self = container::open(bytes)?;
        state.check()?;
        Ok(state)
    }

    /// The bytes of its state file.
    pub fn encode(&self) -> Vec<u8> {
        container::seal(self)
    }

    /// Size of guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u64 {
        match (&self.guest, &self.kvm) {
            (Guest::Builtin(guest), _) => guest.layout.vcpus,
            (Guest::Linux(_), kvm) => kvm.as_ref().map_or(0, |kvm| kvm.vcpus.len() as u64),
        }
    }

    /// Whether its parts fit each other.
    fn check(&self) -> Result<(), StateError> {
        let bytes = self.memory_bytes;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(StateError::field(
                "memory_bytes",
                format!("{bytes} is no number of pages"),
            ));
        }
        let memslots = match &self.guest {
            Guest::Builtin(_) => Memslot::of_builtin(bytes, self.private.is_some()),
            Guest::Linux(_) => Memslot::around_the_hole(bytes),
        };
        if self.memslots != memslots {
            let problem = format!(
                "memory_bytes {bytes} is divided into {memslots:?}, not {:?}",
                self.memslots
            );
            return Err(StateError::field("memslots", problem));
        }
        let checksums = self.memory_crc32c.len() as u64;
        if checksums != pieces(bytes) {
            let problem = format!(
                "{checksums} entries, but memory_bytes {bytes} has {} pieces of 2 MiB",
                pieces(bytes)
            );
            return Err(StateError::field("memory_crc32c", problem));
        }
        let private = self.private.as_ref();
        let problem = match &self.guest {
            Guest::Builtin(_) => private.and_then(|private| private.problem(&self.memslots)),
            Guest::Linux(_) => private.map(|_| "there, but this guest has none".to_owned()),
        };
        if let Some(problem) = problem {
            return Err(StateError::field("private", problem));
        }
        match &self.guest {
            Guest::Builtin(guest) => self.check_builtin(guest),
            Guest::Linux(_) => self.check_linux(),
        }
    }

    fn check_builtin(&self, guest: &BuiltinState) -> Result<(), StateError> {
        let layout = &guest.layout;
        let pages = layout.end.saturating_sub(layout.first);
        let expected = Layout::new(self.memory_bytes, layout.vcpus)
            .and_then(|all| all.with_content_pages(pages))
            .map_err(|error| StateError::field("guest.builtin.layout", error.to_string()))?;
        if *layout != expected {
            let problem = format!(
                "memory_bytes {} is laid out as {expected:?}, not {layout:?}",
                self.memory_bytes
            );
            return Err(StateError::field("guest.builtin.layout", problem));
        }
        match &self.kvm {
            Some(kvm) => check_kvm(kvm, layout.vcpus..=layout.vcpus, false),
            None => Ok(()),
        }
    }

    fn check_linux(&self) -> Result<(), StateError> {
        let Some(kvm) = &self.kvm else {
            return Err(StateError::field("kvm", "absent, but only KVM runs Linux".to_owned()));
        };
        check_kvm(kvm, 1..=MAX_VCPUS.into(), true)
    }
}

fn check_kvm(
    kvm: &KvmState,
    vcpus: std::ops::RangeInclusive<u64>,
    irqchip: bool,
) -> Result<(), StateError> {
    let count = kvm.vcpus.len() as u64;
    if !vcpus.contains(&count) {
        let problem =
            format!("{count} entries, but this guest has {} to {}", vcpus.start(), vcpus.end());
        return Err(StateError::field("kvm.vcpus", problem));
    }
    let presence = |found: bool| match (found, irqchip) {
        (true, false) => Some("there, but this guest has no interrupt controller".to_owned()),
        (false, true) => Some("absent, but this guest has interrupt controllers".to_owned()),
        _ => None,
    };
    if let Some(problem) = presence(kvm.machine.irqchip.is_some()) {
        return Err(StateError::field("kvm.machine.irqchip", problem));
    }
    for (i, vcpu) in kvm.vcpus.iter().enumerate() {
        if let Some(problem) = presence(vcpu.lapic.is_some()) {
            return Err(StateError::field(format!("kvm.vcpus[{i}].lapic"), problem));
        }
    }
    Ok(())
}
