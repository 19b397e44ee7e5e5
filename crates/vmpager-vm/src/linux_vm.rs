//! A Linux guest: boots, pauses, is saved, comes back, ends.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};
use vmpager::Pager;
use vmpager_kvm::ahead::MappedAhead;
use vmpager_kvm::apf::ApfStats;
use vmpager_kvm::exit::ExitStats;
use vmpager_sys::memory::Mapping;

use crate::devices::{ConsoleInput, GuestEnd, Ports, SERIAL_IRQ};
use crate::error::VmError;
use crate::kvm::{Machine, Parts, view};
use crate::linux::{self, LinuxBoot};
use crate::memory::GuestMemory;
use crate::restore::RestoreMemory;
use crate::run::{End, Running};
use crate::snapshot::{Snapshot, SnapshotPaths};
use crate::state_file::{Guest, LinuxState, StateError, VmState};

/// A Linux guest to boot.
#[derive(Clone, Debug)]
pub struct LinuxConfig {
    /// Kernel, initrd, command line.
    pub boot: LinuxBoot,
    /// Guest memory: a multiple of the page size.
    pub memory_bytes: u64,
    /// How many vCPUs: 1 to [`linux::MAX_VCPUS`].
    pub vcpus: u8,
    /// Whether memory is made of hugetlb pages of 2 MiB.
    pub huge_pages: bool,
}

/// A virtual machine with a Linux guest.
///
/// It is made paused, and dropped at any time: its vCPUs are stopped first.
#[derive(Debug)]
pub struct LinuxVm {
    // Dropped in this order: vCPUs stop, KVM lets go of memory, it is unmapped.
    running: Option<Running>,
    machine: Machine,
    ports: Arc<Ports>,
    end: Arc<End>,
    memory: GuestMemory,
    cmdline: String,
}

impl LinuxVm {
    /// Makes a VM whose guest is about to boot. `console` gets what the guest
    /// prints.
    ///
    /// # Errors
    ///
    /// If the configuration cannot be used, memory cannot be had, a file is not
    /// what it should be, or KVM refuses.
    pub fn boot(config: &LinuxConfig, console: Box<dyn Write + Send>) -> Result<Self, VmError> {
        if !(1..=linux::MAX_VCPUS).contains(&config.vcpus) {
            return Err(VmError::Config {
                field: "vcpus",
                value: config.vcpus.into(),
                remedy: "use 1 to 8 vCPUs",
            });
        }
        let memory = GuestMemory::memfd(config.memory_bytes, config.huge_pages)?;
        let entry = linux::load(&view(&memory)?, &config.boot, config.vcpus)?;
        let machine = machine(&memory, config.vcpus.into())?;
        machine.set_linux_entry(&entry)?;
        let interrupt = serial_interrupt(&machine)?;
        let ports = Ports::new(console, interrupt);
        Self::paused(machine, ports, memory, config.boot.cmdline.clone())
    }

    /// Restores a guest, which goes on from where it was saved once it is
    /// resumed. Any number of VMs can be restored from one snapshot.
    ///
    /// # Errors
    ///
    /// If the snapshot is not that of a Linux guest, its memory cannot be had in
    /// that way, or KVM refuses its state.
    pub fn restore(
        snapshot: &Snapshot,
        memory: RestoreMemory,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, VmError> {
        let path = &snapshot.paths.state;
        let (Guest::Linux(guest), Some(kvm)) = (&snapshot.state.guest, &snapshot.state.kvm) else {
            return Err(VmError::OtherGuest { path: path.clone(), runs: "the built-in program" });
        };
        let memory = GuestMemory::restore(snapshot, memory, None)?;
        let mut machine = machine(&memory, snapshot.vcpus())?;
        machine.load(kvm)?;
        // After the interrupt controllers: a device raises what it had raised.
        let interrupt = serial_interrupt(&machine)?;
        let ports = Ports::from_state(&guest.devices, console, interrupt).map_err(|problem| {
            let problem = StateError::field("guest.linux", problem);
            VmError::State { path: path.clone(), problem }
        })?;
        Self::paused(machine, ports, memory, guest.cmdline.clone())
    }

    fn paused(
        machine: Machine,
        ports: Ports,
        memory: GuestMemory,
        cmdline: String,
    ) -> Result<Self, VmError> {
        let (ports, end) = (Arc::new(ports), Arc::new(End::new()?));
        Ok(Self { running: None, machine, ports, end, memory, cmdline })
    }

    /// Saves the guest, replacing what was at these paths. A guest that runs is
    /// paused for it, and runs on afterwards.
    ///
    /// # Errors
    ///
    /// [`VmError::Ended`] if it has ended; or if KVM refuses, or a file cannot
    /// be written.
    pub fn snapshot(&mut self, paths: &SnapshotPaths) -> Result<Snapshot, VmError> {
        let was_running = self.is_running();
        self.pause();
        let saved = self.save(paths);
        if was_running && !self.end.has_ended() {
            self.resume()?;
        }
        saved
    }

    fn save(&mut self, paths: &SnapshotPaths) -> Result<Snapshot, VmError> {
        if self.end.has_ended() {
            return Err(VmError::Ended);
        }
        let state = VmState {
            memory_bytes: self.memory.mapping.len() as u64,
            memslots: self.memory.slots.clone(),
            kvm: Some(self.machine.save()?),
            guest: Guest::Linux(LinuxState {
                cmdline: self.cmdline.clone(),
                devices: self.ports.state(),
            }),
            private: None,
            memory_crc32c: Vec::new(),
        };
        // Memory comes last: to answer, KVM may write to it.
        Snapshot::write(paths, state, &self.memory)
    }

    /// Lets the guest run, until it ends or is paused. A guest that runs already
    /// runs on.
    ///
    /// # Errors
    ///
    /// [`VmError::Ended`] if it has ended; or if a thread cannot be had.
    pub fn resume(&mut self) -> Result<(), VmError> {
        if self.end.has_ended() {
            return Err(VmError::Ended);
        }
        if self.running.is_none() {
            self.machine.tell_of_pause()?;
            self.machine.map_ahead(&self.memory);
            let running = Running::start(&mut self.machine.vcpus, &self.ports, &self.end)
                .map_err(VmError::Thread)?;
            self.running = Some(running);
        }
        Ok(())
    }

    /// Stops the guest where it is. Between two instructions: what was asked of
    /// devices is done.
    pub fn pause(&mut self) {
        if let Some(running) = self.running.take() {
            self.machine.vcpus = running.stop();
        }
    }

    /// Whether the guest's vCPUs run. They do not once it has ended and
    /// [`wait`](Self::wait) has said so.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Waits until the guest ends, and stops its vCPUs; `None` if it has not
    /// ended by then. Its end is told once.
    ///
    /// # Errors
    ///
    /// [`VmError::Exit`] if a vCPU cannot go on.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<GuestEnd>, VmError> {
        let until = Instant::now() + timeout;
        while !self.end.has_ended() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let left =
                Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(VmError::Eventfd(error.into())),
            }
        }
        self.pause();
        self.end.take().transpose()
    }

    /// The way to the guest's console.
    pub fn console(&self) -> ConsoleInput {
        ConsoleInput::new(self.ports.clone())
    }

    /// When a vCPU first entered the guest.
    pub fn entered(&self) -> Option<Instant> {
        self.end.entered()
    }

    /// The mapping that is guest memory. Above the hole for devices, gpas are a
    /// GiB higher than offsets.
    pub fn memory(&self) -> &Arc<Mapping> {
        &self.memory.mapping
    }

    /// What exit delivery has done on all vCPUs; `None` while they run, or if
    /// their faults are not delivered so.
    pub fn exit_stats(&self) -> Option<ExitStats> {
        self.machine.exit_stats()
    }

    /// What the guest's device for asynchronous page faults has done on all vCPUs;
    /// `None` while they run, or if vmpager does not play it.
    pub fn async_fault_stats(&self) -> Option<ApfStats> {
        self.machine.async_fault_stats()
    }

    /// What came of mapping hot pages before the guest ran; `None` if that was not
    /// [wanted](crate::InProcess::map_ahead), or this KVM cannot.
    pub fn mapped_ahead(&self) -> Option<MappedAhead> {
        self.machine.mapped_ahead()
    }

    /// How many stage-2 faults all vCPUs have taken so far; `None` while they
    /// run, or if KVM does not tell.
    pub fn stage2_faults(&self) -> Option<u64> {
        if self.is_running() { None } else { self.machine.stage2_faults() }
    }

    /// The pager in this process, if it brings this guest's memory.
    pub fn pager(&self) -> Option<&Pager> {
        self.memory.pager()
    }
}

/// Readable once the guest has ended, to wait for it among other things; then
/// ask [`LinuxVm::wait`].
impl AsFd for LinuxVm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

fn machine(memory: &GuestMemory, vcpus: u64) -> Result<Machine, VmError> {
    Machine::new(&Parts { memory, device: None, vcpus, irqchip: true })
}

/// What raises the serial port's interrupt.
fn serial_interrupt(machine: &Machine) -> Result<EventFd, VmError> {
    let interrupt = EventFd::new(EFD_CLOEXEC).map_err(VmError::Eventfd)?;
    machine.connect_interrupt(&interrupt, SERIAL_IRQ)?;
    Ok(interrupt)
}
