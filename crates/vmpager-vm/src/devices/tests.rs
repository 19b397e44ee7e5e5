//! Devices as a guest's driver uses them.

use std::io;
use std::thread;
use std::time::Instant;

use super::*;

/// Output that a test can look at.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Shared {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn ports() -> (Arc<Ports>, Shared, EventFd) {
    let (output, interrupt) = (Shared::default(), interrupt());
    let ports = Ports::new(Box::new(output.clone()), interrupt.try_clone().unwrap());
    (Arc::new(ports), output, interrupt)
}

fn interrupt() -> EventFd {
    EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap()
}

fn read(ports: &Ports, port: u16) -> u8 {
    let mut data = [0];
    ports.read(port, &mut data);
    data[0]
}

/// Prints a line, and says what came of it.
fn print(ports: &Ports, line: &str) -> Option<GuestEnd> {
    line.bytes().chain([b'\n']).find_map(|byte| ports.write(SERIAL_PORT, &[byte]))
}

fn now(console: &ConsoleInput, bytes: &[u8]) -> usize {
    console.send(bytes, Duration::ZERO)
}

const DATA: u16 = SERIAL_PORT;
const INTERRUPT_ENABLE: u16 = SERIAL_PORT + 1;
const LINE_STATUS: u16 = SERIAL_PORT + 5;
const SCRATCH: u16 = SERIAL_PORT + 7;

#[test]
fn what_the_guest_prints_comes_out() {
    let (ports, output, _) = ports();
    assert_eq!(print(&ports, "hello"), None);
    assert_eq!(ports.write(DATA, b"string"), None, "rep outsb");
    assert_eq!(output.text(), "hello\nstring");
    assert_eq!(read(&ports, LINE_STATUS) & 0x60, 0x60, "ready for more");
}

#[test]
fn input_interrupts_and_is_read() {
    let (ports, _, interrupt) = ports();
    let console = ConsoleInput::new(ports.clone());
    ports.write(INTERRUPT_ENABLE, &[1]);
    assert_eq!(now(&console, b"ab"), 2);
    assert_eq!(interrupt.read().unwrap(), 1);
    assert_eq!([read(&ports, DATA), read(&ports, DATA)], *b"ab");
    assert_eq!(read(&ports, LINE_STATUS) & 1, 0, "all read");
}

#[test]
fn input_waits_for_a_guest_that_reads_and_no_longer() {
    let (ports, _, _) = ports();
    let console = ConsoleInput::new(ports.clone());
    assert_eq!(now(&console, &[b'x'; 100]), 64, "as much as the port holds");
    assert_eq!(now(&console, b"y"), 0);
    assert_eq!(console.send(b"y", Duration::from_millis(5)), 0);
    let sender = thread::spawn(move || console.send(b"yz", Duration::from_secs(60)));
    thread::sleep(Duration::from_millis(50)); // for it to wait
    let read_at = Instant::now();
    // One byte read makes room for one.
    assert_eq!(read(&ports, DATA), b'x');
    assert_eq!(sender.join().unwrap(), 1);
    assert!(read_at.elapsed() < Duration::from_secs(30), "it was told");
    let rest: Vec<u8> = (0..64).map(|_| read(&ports, DATA)).collect();
    assert_eq!((rest[62], rest[63]), (b'x', b'y'));
}

#[test]
fn sleep_type_5_switches_off_and_no_other() {
    let (ports, _, _) = ports();
    let mut control = [0; 2];
    ports.read(PM1_CONTROL_PORT, &mut control);
    assert_eq!(control, [1, 0], "in ACPI mode");
    let command = |sleep_type: u16| (1 << 13 | sleep_type << 10).to_le_bytes();
    for sleep_type in [0, 1, 4, 6, 7] {
        assert_eq!(ports.write(PM1_CONTROL_PORT, &command(sleep_type)), None, "S{sleep_type}");
    }
    // ACPICA writes the type first, then the type with the command.
    assert_eq!(ports.write(PM1_CONTROL_PORT, &(5_u16 << 10).to_le_bytes()), None);
    assert_eq!(ports.write(PM1_CONTROL_PORT, &command(5)), Some(GuestEnd::PowerOff));
    // By bytes as well.
    assert_eq!(ports.write(PM1_CONTROL_PORT + 1, &[0x20 | 5 << 2]), Some(GuestEnd::PowerOff));
    ports.read(PM1_CONTROL_PORT, &mut control);
    assert_eq!(control, [1, 5 << 2], "the command reads as zero");
}

#[test]
fn no_event_is_ever_pending() {
    let (ports, _, _) = ports();
    assert_eq!(ports.write(PM1_EVENT_PORT, &[0xff, 0xff, 0x21, 0x01]), None);
    let mut events = [0; 4];
    ports.read(PM1_EVENT_PORT, &mut events);
    assert_eq!(events, [0, 0, 0x21, 0x01], "status, enable");
    let mut beyond = [0; 4];
    ports.read(PM1_CONTROL_PORT, &mut beyond);
    assert_eq!(beyond[2..], [0xff, 0xff]);
    ports.write(PM1_CONTROL_PORT, &[0xff; 4]);
}

#[test]
fn the_reset_pulse_ends() {
    let (ports, _, _) = ports();
    assert_eq!(read(&ports, RESET_PORT), 0, "idle: kernels wait for that");
    assert_eq!(ports.write(RESET_PORT, &[0xd1]), None);
    assert_eq!(ports.write(RESET_PORT, &[RESET_VALUE]), Some(GuestEnd::Reset));
}

#[test]
fn pvpanic_ends() {
    let (ports, _, _) = ports();
    assert_eq!(read(&ports, PANIC_PORT), 1);
    assert_eq!(ports.write(PANIC_PORT, &[2]), None, "a crash kernel takes over");
    assert_eq!(ports.write(PANIC_PORT, &[1]), Some(GuestEnd::Panic));
}

#[test]
fn a_panic_is_seen_on_the_console() {
    let (ports, output, _) = ports();
    assert_eq!(print(&ports, "[    1.0] Kernel panic - not syncing: no init"), None);
    assert_eq!(print(&ports, "[    1.1] Call Trace:"), None, "it is still telling why");
    let last = "[    1.2] ---[ end Kernel panic - not syncing: no init ]---";
    assert_eq!(print(&ports, last), Some(GuestEnd::Panic));
    assert!(output.text().ends_with("no init ]---\n"), "the line is complete");
}

#[test]
fn a_reset_after_a_panic_is_one() {
    let (ports, _, _) = ports();
    assert_eq!(print(&ports, "Kernel panic - not synced: almost"), None);
    assert_eq!(ports.reset(), GuestEnd::Reset);
    assert_eq!(print(&ports, "Kernel panic - not syncing: VFS"), None);
    assert_eq!(ports.reset(), GuestEnd::Panic);
    assert_eq!(ports.write(RESET_PORT, &[RESET_VALUE]), Some(GuestEnd::Panic));
}

/// Another processor prints in between.
#[test]
fn a_panic_whose_first_line_is_torn_is_seen() {
    let (ports, _, _) = ports();
    assert_eq!(print(&ports, "Kernel panic - nohellot syncing: VFS"), None);
    assert_eq!(ports.reset(), GuestEnd::Reset);
    assert_eq!(print(&ports, "[    1.2] Kernel Offset: disabled"), None);
    assert_eq!(ports.reset(), GuestEnd::Panic);
}

#[test]
fn output_that_nobody_takes_hides_no_panic() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let ports = Ports::new(Box::new(Closed), interrupt());
    print(&ports, "Kernel panic - not syncing: VFS");
    assert_eq!(ports.reset(), GuestEnd::Panic);
}

#[test]
fn other_ports_are_a_bus_without_a_device() {
    let (ports, _, _) = ports();
    for port in [0, 0x60, 0x71, 0x2f8, SERIAL_PORT - 1, SERIAL_PORT + 8, 0x606, 0xcf8, 0xffff] {
        let mut data = [0; 4];
        ports.read(port, &mut data);
        assert_eq!(data, [0xff; 4], "{port:#x}");
        assert_eq!(ports.write(port, &[RESET_VALUE]), None);
    }
}

#[test]
fn state_goes_through_a_file_and_back() {
    let (ports, _, _) = ports();
    ports.write(INTERRUPT_ENABLE, &[1]);
    ports.write(SCRATCH, &[0x5a]);
    ports.write(PM1_EVENT_PORT + 2, &[0x20, 0x01]);
    now(&ConsoleInput::new(ports.clone()), b"typed ahead");
    print(&ports, "Kernel panic - not syncing: late");
    let saved = ports.state();
    let text = serde_json::to_string(&saved).unwrap();
    let state: DevicesState = serde_json::from_str(&text).unwrap();
    assert_eq!(state, saved);

    let interrupt = interrupt();
    let output = Box::new(io::sink());
    let restored =
        Ports::from_state(&state, output, interrupt.try_clone().unwrap()).map(Arc::new).unwrap();
    assert_eq!(restored.state(), saved);
    assert_eq!(interrupt.read().unwrap(), 1, "the guest has yet to be told of its input");
    assert_eq!(read(&restored, DATA), b't');
    assert_eq!(read(&restored, SCRATCH), 0x5a);
    assert_eq!(restored.reset(), GuestEnd::Panic);
}

#[test]
fn more_input_than_a_port_holds_is_refused() {
    let (ports, output, _) = ports();
    let mut value = serde_json::to_value(ports.state()).unwrap();
    value["serial"]["input"] = vec![0; 65].into();
    let state: DevicesState = serde_json::from_value(value).unwrap();
    let error = Ports::from_state(&state, Box::new(output), interrupt()).unwrap_err();
    assert!(error.contains("devices.serial") && error.contains("65 bytes"), "{error}");
}
