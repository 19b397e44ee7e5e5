//! The KVM island: the only place in this crate with `unsafe`.

#![allow(unsafe_code, reason = "KVM takes raw addresses, and the program is machine code")]

mod builtin;
mod cpuid;
mod kick;
mod machine;
mod parameters;
mod private;
mod program;
mod registers;
mod state;
mod tasks;
mod trial;
mod tsc;
mod vcpu;
mod view;

pub(crate) use builtin::Builtin;
pub(crate) use kick::Kick;
pub(crate) use machine::{Machine, Parts};
pub(crate) use parameters::{Command, Gate, Parameters};
pub(crate) use private::OwnGuestMemfd;
pub(crate) use program::{EVENT_DONE, EVENT_PORT, EVENT_STARTED, code, pattern};
pub(crate) use state::KvmState;
#[cfg(test)]
pub(crate) use state::{Irqchip, Lapic, MachineState, VcpuState};
pub(crate) use tasks::{
    EVENT_TASK_ENDED, KEY, Task, ending, task_machine, task_pages, wrong_pages,
};
pub(crate) use trial::{Trial, memslot_time};
pub(crate) use tsc::nanoseconds_per_cycle;
pub(crate) use vcpu::{Answer, Stopped, Vcpu};
pub(crate) use view::view;

use crate::error::VmError;

/// For `map_err` on what KVM was asked.
fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Kvm { what, error: error.into() }
}
