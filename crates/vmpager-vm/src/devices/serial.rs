//! The serial port: a 16550 by the crate `vm-superio`, its interrupt an
//! eventfd.

use std::io::{self, Write};
use std::ops::Range;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::console::Console;

/// COM1: `ttyS0` to Linux.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// How many ports it has.
pub(crate) const SERIAL_PORTS: u8 = 8;
/// Its interrupt.
pub(crate) const SERIAL_IRQ: u32 = 4;

const PORTS: Range<u16> = SERIAL_PORT..SERIAL_PORT + SERIAL_PORTS as u16;

/// Which register a port is, if it is the serial port's.
pub(super) fn offset(port: u16) -> Option<u8> {
    PORTS.contains(&port).then(|| (port - SERIAL_PORT).to_le_bytes()[0])
}

#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The registers, and the input that the guest has not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SerialRegisters {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl From<SerialState> for SerialRegisters {
    fn from(state: SerialState) -> Self {
        Self {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }
}

impl From<&SerialRegisters> for SerialState {
    fn from(saved: &SerialRegisters) -> Self {
        let [baud_divisor_low, baud_divisor_high] = saved.divisor;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.input.clone(),
        }
    }
}

/// The serial port with the console at its other end.
#[derive(Debug)]
pub(super) struct SerialPort(Serial<Interrupt, NoEvents, Console>);

impl SerialPort {
    pub(super) fn new(output: Box<dyn Write + Send>, interrupt: EventFd) -> Self {
        Self(Serial::new(Interrupt(interrupt), Console::new(output, false)))
    }

    pub(super) fn from_state(
        saved: &SerialRegisters,
        panicked: bool,
        output: Box<dyn Write + Send>,
        interrupt: EventFd,
    ) -> Result<Self, String> {
        let console = Console::new(output, panicked);
        Serial::from_state(&saved.into(), Interrupt(interrupt), NoEvents, console)
            .map(Self)
            .map_err(|error| {
                format!("devices.serial ({} bytes of input): {error}", saved.input.len())
            })
    }

    pub(super) fn registers(&self) -> SerialRegisters {
        self.0.state().into()
    }

    pub(super) fn read(&mut self, offset: u8) -> u8 {
        self.0.read(offset)
    }

    pub(super) fn write(&mut self, offset: u8, byte: u8) {
        // What cannot be written to the output is lost, as on a line that nobody
        // listens to; an eventfd's counter takes 2^64 interrupts.
        let _ = self.0.write(offset, byte);
    }

    /// Bytes of input it can take.
    pub(super) fn room(&self) -> usize {
        self.0.fifo_capacity()
    }

    /// Takes input, and says how much.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> usize {
        let bytes = &bytes[..bytes.len().min(self.room())];
        self.0.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Whether the guest's kernel has said that it panicked.
    pub(super) fn has_panicked(&self) -> bool {
        self.0.writer().has_panicked()
    }

    /// Whether it has said all that it says then.
    pub(super) fn has_reported_panic(&self) -> bool {
        self.0.writer().has_reported_panic()
    }
}
