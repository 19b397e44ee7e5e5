//! vmpager's reference microVM: one machine on KVM, for two guests.
//!
//! A [`LinuxVm`] boots Linux, from a kernel to a console and power off. It is
//! saved to a [`Snapshot`] while it runs, and any number of VMs come back from
//! that one, their memory read at once, mapped, or left to a pager in this
//! process or another.
//!
//! A [`Vm`] runs the built-in guest, whose every page is known, to touch, time
//! and verify it; also on hosts that cannot boot Linux, and by host threads where
//! there is no KVM. It is built from a seed, prepared (the guest computes the
//! checksum of every page of its memory), saved, and restored in the same ways.
//! The restored guest then runs a [`Workload`]: it touches pages in an order of
//! the caller's choice, times each first access, and verifies each page against
//! the checksum it computed itself.
//!
//! ```no_run
//! use std::time::Instant;
//! use vmpager_vm::{Cpu, RestoreMemory, Snapshot, SnapshotPaths, Vm, VmConfig, Workload};
//!
//! # fn main() -> Result<(), vmpager_vm::VmError> {
//! let paths = SnapshotPaths::in_dir("snapshots");
//! let mut vm = Vm::build(&VmConfig { memory_bytes: 512 << 20, ..VmConfig::default() })?;
//! vm.prepare()?;
//! vm.snapshot(&paths)?;
//!
//! let since = Instant::now();
//! let snapshot = Snapshot::open(&paths)?;
//! let mut vm = Vm::restore(&snapshot, RestoreMemory::Mmap, Cpu::Auto)?;
//! let report = vm.run(&Workload { touches: Some(24_576), ..Workload::default() }, since)?;
//! assert_eq!(report.mismatches, 0);
//! # Ok(())
//! # }
//! ```
//!
//! | module | what |
//! |---|---|
//! | `contents`, `filling` | what memory holds |
//! | `checksum` | a page's checksum, the same on host and guest |
//! | `layout` | where the guest's own structures lie |
//! | `memory` | guest memory and its memslots |
//! | `private` | memory that can be private to the guest |
//! | `linux` | a Linux kernel, its initrd and tables, brought into memory |
//! | `devices` | a Linux guest's serial port, and how it ends |
//! | `kvm` | machine, vCPUs, registers, the guest's program |
//! | `threads` | the same work by host threads |
//! | `workload`, `report` | what the guest is asked, what it answers |
//! | `state_file` | all of a saved VM but its memory, versioned and checked |
//! | `pieces` | the checksums of a memory file |
//! | `snapshot`, `restore` | state and memory files, and the ways back from them |
//! | `costs` | what the kernel asks here for what a restore needs |
//! | `bringer` | what a vCPU's thread brings pages by |
//! | `vm` | the VM with the built-in guest |
//! | `tasks` | a built-in guest that runs another task while one waits for a page |
//! | `run` | vCPU threads of a Linux guest |
//! | `linux_vm` | the VM with a Linux guest |

#![deny(unsafe_code)]

mod bringer;
mod checksum;
mod contents;
mod costs;
mod device;
mod devices;
mod error;
mod filling;
mod kvm;
mod layout;
mod linux;
mod linux_vm;
mod memory;
mod parallel;
mod peer;
mod pieces;
mod private;
mod report;
mod restore;
mod run;
mod snapshot;
mod state_file;
mod tasks;
mod threads;
mod vm;
mod workload;

pub use checksum::checksum;
pub use contents::{Contents, Kind};
pub use costs::{DeliveryCosts, memslot_cost};
pub use devices::{ConsoleInput, GuestEnd};
pub use error::VmError;
pub use filling::Filling;
pub use linux::{BootError, LinuxBoot, MAX_VCPUS};
pub use linux_vm::{LinuxConfig, LinuxVm};
pub use peer::OnRefusal;
pub use private::{ConvertReport, ConvertWorkload, PrivateBackend, PrivateConfig};
pub use report::{HostReport, RunReport, Stalls};
pub use restore::{AsyncFaults, Delivery, InProcess, RestoreMemory};
pub use snapshot::{Snapshot, SnapshotPaths};
pub use state_file::{MAX_STATE_BYTES, StateError, VmState};
pub use tasks::{TaskGuest, TaskRun, TaskWork};
pub use vm::{Cpu, CpuKind, Vm, VmConfig};
pub use workload::{Order, Workload};

pub use vmpager::core::convert::Contents as ConvertedContents;
pub use vmpager_kvm::ahead::MappedAhead;
pub use vmpager_kvm::apf::{ApfStats, Refusal};
pub use vmpager_kvm::exit::{ExitStats, Mechanism as ExitMechanism};

/// Bytes in a page of the guest.
pub const PAGE_BYTES: usize = 4096;
/// The same, for addresses.
pub(crate) const PAGE_SIZE: u64 = 4096;
