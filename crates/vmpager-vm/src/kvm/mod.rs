//! The KVM island: the only place in this crate with `unsafe`.

#![allow(unsafe_code, reason = "KVM takes raw addresses, and the program is machine code")]

mod machine;
mod program;
mod registers;
mod tsc;
mod view;

pub(crate) use machine::Machine;
pub(crate) use program::{Command, Parameters, code};
pub(crate) use registers::VcpuState;
pub(crate) use tsc::nanoseconds_per_cycle;
pub(crate) use view::view;
