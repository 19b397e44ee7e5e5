//! The reference VM: builds, prepares, saves, restores, runs and verifies.

mod convert;
mod race;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use convert::in_ranges;
use serde::{Deserialize, Serialize};
use vmpager::Pager;
use vmpager_kvm::ahead::MappedAhead;
use vmpager_kvm::exit::ExitStats;
use vmpager_sys::memory::Mapping;

use crate::checksum::checksum;
use crate::contents::Contents;
use crate::device::{Device, to_usize};
use crate::error::VmError;
use crate::filling::Filling;
use crate::kvm::{self, Builtin, Parts};
use crate::layout::{DEVICE_GPA, Layout};
use crate::memory::{GuestMemory, Memslot};
use crate::parallel::{in_parallel, split};
use crate::private::{PrivateBackend, PrivateConfig, PrivateParts, PrivateState};
use crate::report::{HostReport, RunReport};
use crate::restore::RestoreMemory;
use crate::snapshot::{Snapshot, SnapshotPaths};
use crate::state_file::{BuiltinState, Guest, VmState};
use crate::workload::Workload;
use crate::{PAGE_BYTES, PAGE_SIZE, threads};

/// What plays the guest's vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cpu {
    /// KVM where there is one, else host threads.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// Host threads, which touch the same mapping as a guest would.
    Threads,
}

/// What plays the guest's vCPUs, after [`Cpu::Auto`] was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuKind {
    /// vCPUs of KVM.
    Kvm,
    /// Threads of the host.
    Threads,
}

/// A guest to build.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Guest memory: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// What its memory holds.
    pub filling: Filling,
    /// What plays the vCPUs.
    pub cpu: Cpu,
    /// How many there are; each works on a part of the pages.
    pub vcpus: u64,
    /// Whether vCPUs of KVM have its interrupt controllers, and interrupts on:
    /// KVM then takes faults of vCPUs that wait in the kernel asynchronously.
    pub lapic: bool,
    /// Whether pages can be private to the guest, and how. Needs KVM.
    pub private: Option<PrivateConfig>,
}

impl Default for VmConfig {
    fn default() -> Self {
        let filling = Filling::Generated { seed: 1, bytes: None };
        Self {
            memory_bytes: 512 << 20,
            filling,
            cpu: Cpu::Auto,
            vcpus: 1,
            lapic: false,
            private: None,
        }
    }
}

/// What vCPUs start from.
#[derive(Clone, Copy, Debug)]
enum Start<'a> {
    New { lapic: bool },
    Saved(&'a kvm::KvmState),
}

impl<'a> Start<'a> {
    fn has_irqchip(self) -> bool {
        match self {
            Self::New { lapic } => lapic,
            Self::Saved(state) => state.machine.irqchip.is_some(),
        }
    }

    fn saved(self) -> Option<&'a kvm::KvmState> {
        match self {
            Self::New { .. } => None,
            Self::Saved(state) => Some(state),
        }
    }
}

/// A virtual machine with the built-in guest.
#[derive(Debug)]
pub struct Vm {
    // Dropped in this order: KVM lets go of memory before it is unmapped.
    machine: Option<Builtin>,
    memory: GuestMemory,
    device: Device,
    layout: Layout,
    /// Absent if contents came from a file.
    seed: Option<u64>,
    is_prepared: bool,
    /// Whether the guest has told what its pages hold since it converted some.
    is_tagged: bool,
}

impl Vm {
    /// Builds a guest and fills its memory.
    ///
    /// # Errors
    ///
    /// If the configuration cannot be used, memory cannot be mapped or filled,
    /// or KVM was asked for and refuses.
    pub fn build(config: &VmConfig) -> Result<Self, VmError> {
        let mut layout = Layout::new(config.memory_bytes, config.vcpus)?;
        if let Some(pages) = config.filling.pages()? {
            layout = layout.with_content_pages(pages)?;
        }
        let bytes = layout.memory_bytes();
        let slots = Memslot::of_builtin(bytes, config.private.is_some());
        let memory = match config.private {
            Some(private) => GuestMemory::private(bytes, slots, private, Vec::new())?,
            None => {
                let mapping = Mapping::anonymous(to_usize(bytes))
                    .map_err(|error| VmError::Memory { bytes, error })?;
                GuestMemory::new(Arc::new(mapping), slots)
            }
        };
        let mapping = &memory.mapping;
        for (page, bytes) in layout.fixed_pages(kvm::code()).iter().enumerate() {
            mapping.write(page * PAGE_BYTES, bytes);
        }
        let seed = config.filling.fill(mapping, &layout)?;
        Self::assemble(memory, layout, seed, config.cpu, Start::New { lapic: config.lapic })
    }

    /// Restores a guest. Its vCPUs may be of another kind than those that
    /// prepared it.
    ///
    /// # Errors
    ///
    /// If its memory cannot be had in that way, or KVM refuses.
    pub fn restore(snapshot: &Snapshot, memory: RestoreMemory, cpu: Cpu) -> Result<Self, VmError> {
        Self::restore_with(snapshot, memory, cpu, PrivateBackend::Auto)
    }

    /// As [`restore`](Self::restore), and says where private pages are to be, if
    /// there can be any. `Auto` is in place if some are private: up to Linux 7.2
    /// there is no way to fill a guest_memfd that the host cannot map.
    ///
    /// # Errors
    ///
    /// As for `restore`; and if private pages cannot be had there.
    pub fn restore_with(
        snapshot: &Snapshot,
        memory: RestoreMemory,
        cpu: Cpu,
        backend: PrivateBackend,
    ) -> Result<Self, VmError> {
        let state = &snapshot.state;
        let Guest::Builtin(guest) = &state.guest else {
            return Err(VmError::OtherGuest { path: snapshot.paths.state.clone(), runs: "Linux" });
        };
        let private = state.private.as_ref().map(|private| private.config(backend));
        let memory = GuestMemory::restore(snapshot, memory, private)?;
        let start = state.kvm.as_ref().map_or(Start::New { lapic: false }, Start::Saved);
        let mut vm = Self::assemble(memory, guest.layout.clone(), guest.seed, cpu, start)?;
        vm.is_prepared = true;
        Ok(vm)
    }

    fn assemble(
        memory: GuestMemory,
        layout: Layout,
        seed: Option<u64>,
        cpu: Cpu,
        start: Start<'_>,
    ) -> Result<Self, VmError> {
        let memory = memory.owned(0..layout.first);
        let shared_at = memory.private.as_ref().map_or(0, PrivateParts::shared_at);
        let device = Device::new(&layout, memory.private.is_some(), shared_at)?;
        let machine = match cpu {
            Cpu::Threads if memory.private.is_some() => {
                return Err(VmError::NotPrivate {
                    problem: "host threads reach all of it; use vCPUs of KVM",
                });
            }
            Cpu::Threads => None,
            Cpu::Kvm | Cpu::Auto => {
                let parts = Parts {
                    memory: &memory,
                    device: Some((DEVICE_GPA, device.mapping())),
                    vcpus: layout.vcpus,
                    irqchip: start.has_irqchip(),
                };
                match Builtin::new(&parts, &layout, start.saved()) {
                    Ok(machine) => Some(machine),
                    Err(VmError::NoKvm(_)) if cpu == Cpu::Auto && memory.private.is_none() => None,
                    Err(error) => return Err(error),
                }
            }
        };
        let (is_prepared, is_tagged) = (false, false);
        let mut vm = Self { machine, memory, device, layout, seed, is_prepared, is_tagged };
        if let Some(private) = vm.private().cloned() {
            vm.tag_kinds(&private);
            vm.is_tagged = false;
        }
        Ok(vm)
    }

    /// Lets the guest compute the checksum of every page, against which it
    /// verifies them in later runs, restored or not.
    ///
    /// # Errors
    ///
    /// If the guest stops unexpectedly.
    pub fn prepare(&mut self) -> Result<(), VmError> {
        let pages = self.layout.contents();
        match &mut self.machine {
            Some(machine) => {
                self.device.ask_prepare(pages);
                machine.run()?;
            }
            None => threads::prepare(&self.memory.mapping, &self.layout, pages),
        }
        self.is_prepared = true;
        Ok(())
    }

    /// Saves the guest, replacing what was at these paths.
    ///
    /// # Errors
    ///
    /// [`VmError::NotPrepared`], or if a file cannot be written.
    pub fn snapshot(&mut self, paths: &SnapshotPaths) -> Result<Snapshot, VmError> {
        if !self.is_prepared {
            return Err(VmError::NotPrepared);
        }
        let cpu = self.cpu();
        // Nobody's conversions come between kinds and contents.
        let private_memory = self.private().cloned();
        let _held = private_memory.as_ref().map(|private| private.hold());
        let private = self.private().map(|private| PrivateState::save(private)).transpose()?;
        let kvm = self.machine.as_mut().map(Builtin::save).transpose()?;
        let layout = self.layout.clone();
        let state = VmState {
            memory_bytes: layout.memory_bytes(),
            memslots: self.memory.slots.clone(),
            guest: Guest::Builtin(BuiltinState { seed: self.seed, cpu, layout }),
            kvm,
            private,
            memory_crc32c: Vec::new(),
        };
        Snapshot::write(paths, state, &self.memory)
    }

    /// Runs a workload to its end. `since` is when the clock of
    /// [`RunReport::first_instruction`] started, usually just before
    /// [`restore`](Self::restore).
    ///
    /// # Errors
    ///
    /// If the workload does not fit the guest, or the guest stops unexpectedly.
    /// Wrong pages are no error here: the report counts them.
    pub fn run(&mut self, workload: &Workload, since: Instant) -> Result<RunReport, VmError> {
        if !self.is_prepared {
            return Err(VmError::NotPrepared);
        }
        let pages = workload.pages(self.layout.contents())?;
        let Some(machine) = &mut self.machine else {
            let memory = &self.memory.mapping;
            return threads::work(memory, &self.layout, &pages, workload.write_every, since);
        };
        self.device.ask_work(&pages, workload.write_every)?;
        machine.map_ahead(&self.memory);
        let entries = machine.run()?;
        let started = entries.iter().map(|e| e.started).min().unwrap_or(since);
        let done = entries.iter().map(|e| e.done).max().unwrap_or(since);
        let (mismatches, first_mismatch) = self.device.mismatches();
        Ok(RunReport {
            first_instruction: started.saturating_duration_since(since),
            workload: done.saturating_duration_since(started),
            pages: pages.len() as u64,
            mismatches,
            first_mismatch,
            stalls: self.device.stalls(pages.len()),
        })
    }

    /// For benchmarks of exit delivery: tells it which pages a workload will
    /// touch, so that it need not find out. `false` tells it that nothing will
    /// be missing, so that each fault takes the fallback.
    ///
    /// # Errors
    ///
    /// If the workload does not fit the guest.
    pub fn foretell(&mut self, workload: &Workload, truly: bool) -> Result<(), VmError> {
        let pages = workload.pages(self.layout.contents())?;
        let gpas: Vec<u64> = pages.iter().map(|page| u64::from(*page) * PAGE_SIZE).collect();
        let parts = split(0..gpas.len() as u64, to_usize(self.layout.vcpus));
        let part = |part: Range<u64>| match truly {
            true => gpas[to_usize(part.start)..to_usize(part.end)].to_vec(),
            false => Vec::new(),
        };
        if let Some(machine) = &mut self.machine {
            machine.foretell(parts.into_iter().map(part).collect());
        }
        Ok(())
    }

    /// Touches what the guest needs beside the contents of its memory (code,
    /// page tables, stacks, checksums), so that a workload misses contents only.
    pub fn bring_fixed(&self) {
        for page in 0..self.layout.contents().start {
            self.memory.mapping.read_u64(to_usize(page * PAGE_SIZE));
        }
    }

    /// Reads all of guest memory through the host's mapping and compares it
    /// with what was generated: contents, checksum table, code and page tables.
    /// Only the stacks are left out, and private pages. Contents that came from a
    /// file are compared with the checksum table.
    pub fn verify_from_host(&self) -> HostReport {
        let memory = self.memory.host_view();
        let private = self.private().map(|private| private.private_ranges());
        let is_private = in_ranges(private.unwrap_or_default());
        (0..self.layout.end).for_each(|page| self.memory.bring(to_usize(page * PAGE_SIZE)));
        // Its own structures may be private.
        let own = &self.memory.mapping;
        let fixed = self.layout.fixed_pages(kvm::code());
        let mut wrong: Vec<u64> = (0..)
            .zip(&fixed)
            .filter(|(page, bytes)| threads::checksum_at(own, *page) != checksum(bytes))
            .map(|(page, _)| page)
            .collect();
        let layout = &self.layout;
        let pages = layout.contents();
        let contents = self.seed.map(Contents::new);
        let parts = in_parallel(pages.clone(), |part| {
            let mut bytes = [0; PAGE_BYTES];
            let is_wrong = |page: &u64| {
                let in_table = own.read_u64(to_usize(layout.sum_of(*page)));
                let generated = contents.map(|contents| {
                    contents.fill(*page, &mut bytes);
                    checksum(&bytes)
                });
                threads::checksum_at(memory, *page) != in_table
                    || generated.is_some_and(|expected| expected != in_table)
            };
            part.filter(|page| !is_private(*page)).filter(is_wrong).collect::<Vec<u64>>()
        });
        wrong.extend(parts.into_iter().flatten());
        HostReport {
            pages: fixed.len() as u64 + pages.filter(|page| !is_private(*page)).count() as u64,
            mismatches: wrong.len() as u64,
            first_mismatch: wrong.first().copied(),
        }
    }

    /// The mapping that is guest memory; byte `n` is gpa `n`.
    pub fn memory(&self) -> &Arc<Mapping> {
        &self.memory.mapping
    }

    /// What exit delivery has done on all vCPUs; `None` if their faults are not
    /// delivered so.
    pub fn exit_stats(&self) -> Option<ExitStats> {
        self.machine.as_ref().and_then(Builtin::exit_stats)
    }

    /// What came of mapping hot pages before the guest ran; `None` if that was not
    /// [wanted](crate::InProcess::map_ahead), or this KVM cannot.
    pub fn mapped_ahead(&self) -> Option<MappedAhead> {
        self.machine.as_ref().and_then(Builtin::mapped_ahead)
    }

    /// How many stage-2 faults all vCPUs have taken; `None` if they are not KVM's,
    /// or KVM does not tell.
    pub fn stage2_faults(&self) -> Option<u64> {
        self.machine.as_ref().and_then(Builtin::stage2_faults)
    }

    /// The pager in this process, if it brings this guest's memory.
    pub fn pager(&self) -> Option<&Pager> {
        self.memory.pager()
    }

    /// What plays the vCPUs.
    pub fn cpu(&self) -> CpuKind {
        if self.machine.is_some() { CpuKind::Kvm } else { CpuKind::Threads }
    }

    /// How many pages have contents, that is, can be touched by a workload.
    pub fn content_pages(&self) -> u64 {
        let pages = self.layout.contents();
        pages.end - pages.start
    }
}
