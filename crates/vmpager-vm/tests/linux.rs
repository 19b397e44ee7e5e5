//! Linux guests that cannot be made are refused by name, on every machine. Those
//! that can are booted, saved and restored in the lab.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::PathBuf;

use common::{config, snapshot};
use vmpager_vm::{
    BootError, Cpu, LinuxBoot, LinuxConfig, LinuxVm, MAX_VCPUS, RestoreMemory, VmError,
};

fn linux() -> LinuxConfig {
    LinuxConfig {
        boot: LinuxBoot {
            kernel: PathBuf::from("/nonexistent/kernel"),
            initrd: None,
            cmdline: LinuxBoot::CMDLINE.to_owned(),
        },
        memory_bytes: 64 << 20,
        vcpus: 1,
        huge_pages: false,
    }
}

fn refused(config: &LinuxConfig) -> VmError {
    LinuxVm::boot(config, Box::new(std::io::sink())).unwrap_err()
}

#[test]
fn settings_out_of_range_are_named_with_their_values() {
    for vcpus in [0, MAX_VCPUS + 1] {
        let error = refused(&LinuxConfig { vcpus, ..linux() }).to_string();
        assert!(error.contains(&format!("vcpus {vcpus} ")), "{error}");
    }
    for memory_bytes in [0, 4097, (64 << 20) + 1] {
        let error = refused(&LinuxConfig { memory_bytes, ..linux() }).to_string();
        assert!(error.contains(&format!("memory size {memory_bytes} ")), "{error}");
    }
}

#[test]
fn a_missing_kernel_is_named() {
    let error = refused(&linux());
    assert!(matches!(error, VmError::Boot(BootError::File { .. })), "{error}");
    assert!(error.to_string().contains("/nonexistent/kernel"), "{error}");
}

#[test]
fn the_snapshot_of_the_builtin_guest_is_not_restored_as_linux() {
    let (_dir, snapshot) = snapshot(&config(Cpu::Threads));
    let console = Box::new(std::io::sink());
    let error = LinuxVm::restore(&snapshot, RestoreMemory::Mmap, console).unwrap_err();
    assert!(matches!(error, VmError::OtherGuest { .. }), "{error}");
    assert!(error.to_string().contains("state.json"), "{error}");
}
