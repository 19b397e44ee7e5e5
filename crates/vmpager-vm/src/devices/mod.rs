//! The devices of a Linux guest, all of them behind I/O ports: a serial port,
//! and the registers by which a guest ends.
//!
//! | ports | device | module |
//! |---|---|---|
//! | 0x3f8-0x3ff | 16550 serial port, IRQ 4 | `serial` |
//! | 0x64 | reset, by the keyboard controller's pulse; ACPI's reset register too | here |
//! | 0x600-0x605 | ACPI PM1 registers: power off | `power` |
//! | 0x505 | pvpanic: the guest's kernel has panicked | here |
//!
//! Any other port reads as ones and swallows what is written, as a bus without
//! a device does.
//!
//! **How a panic is seen.** By pvpanic if the guest has a driver for it. Small
//! kernels have none, so the console is watched as well: `Kernel panic - not
//! syncing` (or `Kernel Offset:`, which only a panic prints, should another
//! processor's output have torn the former apart) makes a later reset count as a
//! panic, and the line that ends the panic's report ends the VM. A program in the
//! guest that prints these to the console itself is believed.

mod console;
mod power;
mod serial;

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use power::Power;
use serial::{SerialPort, SerialRegisters};

pub(crate) use power::{PM1_CONTROL_PORT, PM1_EVENT_PORT, SLEEP_TYPE_S5};
pub(crate) use serial::{SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS};

/// The keyboard controller's command port, and its command to pulse the reset
/// line.
pub(crate) const RESET_PORT: u16 = 0x64;
pub(crate) const RESET_VALUE: u8 = 0xfe;

/// pvpanic's port, where QEMU has it.
pub(crate) const PANIC_PORT: u16 = 0x505;
/// "The guest has panicked": the only event offered.
const PANICKED: u8 = 1;

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestEnd {
    /// It switched itself off.
    PowerOff,
    /// It asked for a reset, which this machine takes for an end too.
    Reset,
    /// Its kernel panicked.
    Panic,
}

/// What a state file keeps of the devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DevicesState {
    serial: SerialRegisters,
    power: Power,
    panicked: bool,
}

/// The devices, shared by the threads of all vCPUs.
///
/// What the guest prints is written by the thread of the vCPU that prints it:
/// an output that blocks holds the vCPU.
#[derive(Debug)]
pub(crate) struct Ports {
    devices: Mutex<Devices>,
    /// The guest took input.
    input_taken: Condvar,
}

#[derive(Debug)]
struct Devices {
    serial: SerialPort,
    power: Power,
}

impl Ports {
    /// Devices as they are at power-on. `output` gets what the guest prints;
    /// `interrupt` is to raise [`SERIAL_IRQ`].
    pub(crate) fn new(output: Box<dyn Write + Send>, interrupt: EventFd) -> Self {
        Self::from_devices(Devices {
            serial: SerialPort::new(output, interrupt),
            power: Power::default(),
        })
    }

    /// Devices as they were when [`state`](Self::state) was called. An
    /// interrupt that the guest has not seen yet is raised again.
    ///
    /// # Errors
    ///
    /// What is wrong with the state, by the name of its field.
    pub(crate) fn from_state(
        state: &DevicesState,
        output: Box<dyn Write + Send>,
        interrupt: EventFd,
    ) -> Result<Self, String> {
        let serial = SerialPort::from_state(&state.serial, state.panicked, output, interrupt)?;
        Ok(Self::from_devices(Devices { serial, power: state.power.clone() }))
    }

    fn from_devices(devices: Devices) -> Self {
        Self { devices: Mutex::new(devices), input_taken: Condvar::new() }
    }

    /// What a state file keeps. No vCPU may run.
    pub(crate) fn state(&self) -> DevicesState {
        let devices = self.lock();
        DevicesState {
            serial: devices.serial.registers(),
            power: devices.power.clone(),
            panicked: devices.serial.has_panicked(),
        }
    }

    /// The guest reads `data.len()` bytes from a port.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        if let Some(offset) = serial::offset(port) {
            let mut devices = self.lock();
            data.fill_with(|| devices.serial.read(offset));
            self.input_taken.notify_all();
        } else if let Some(offset) = power::offset(port) {
            self.lock().power.read(offset, data);
        } else {
            data.fill(match port {
                RESET_PORT => 0, // the controller is idle
                PANIC_PORT => PANICKED,
                _ => 0xff,
            });
        }
    }

    /// The guest writes to a port, and perhaps ends by it.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Option<GuestEnd> {
        if let Some(offset) = serial::offset(port) {
            let mut devices = self.lock();
            // More bytes than one are a string instruction's.
            for byte in data {
                devices.serial.write(offset, *byte);
            }
            return devices.serial.has_reported_panic().then_some(GuestEnd::Panic);
        }
        if let Some(offset) = power::offset(port) {
            return self.lock().power.write(offset, data).then_some(GuestEnd::PowerOff);
        }
        match (port, data) {
            (RESET_PORT, [RESET_VALUE]) => Some(self.reset()),
            (PANIC_PORT, [event]) if event & PANICKED != 0 => Some(GuestEnd::Panic),
            _ => None,
        }
    }

    /// How a guest that resets itself, by a port or by a triple fault, ended:
    /// kernels do so after a panic as well.
    pub(crate) fn reset(&self) -> GuestEnd {
        if self.lock().serial.has_panicked() { GuestEnd::Panic } else { GuestEnd::Reset }
    }

    fn lock(&self) -> MutexGuard<'_, Devices> {
        // Nothing here leaves a device half changed.
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to the guest's console: what is sent is what it reads there.
#[derive(Clone, Debug)]
pub struct ConsoleInput(Arc<Ports>);

impl ConsoleInput {
    pub(crate) fn new(ports: Arc<Ports>) -> Self {
        Self(ports)
    }

    /// Sends as many of the bytes as the serial port has room for, and says how
    /// many. Waits for room for at most `timeout`: a guest that reads nothing
    /// takes nothing.
    #[must_use = "the rest is for the caller to send again"]
    pub fn send(&self, bytes: &[u8], timeout: Duration) -> usize {
        let is_full = |devices: &mut Devices| devices.serial.room() == 0;
        let devices = self.0.lock();
        let waited = self.0.input_taken.wait_timeout_while(devices, timeout, is_full);
        let (mut devices, _) = waited.unwrap_or_else(PoisonError::into_inner);
        devices.serial.receive(bytes)
    }
}

#[cfg(test)]
mod tests;
