//! Mapping guest memory for a vCPU before it is touched: `KVM_PRE_FAULT_MEMORY`
//! (`Documentation/virt/kvm/api.rst`; Linux 6.11).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::{self, Opcode, Updater, opcode};

/// The argument, as in `linux/kvm.h`.
#[derive(Debug, Default)]
#[repr(C)]
struct PreFault {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

const PRE_FAULT: Opcode = opcode::read_write::<PreFault>(0xAE, 0xD5);

const _: () = assert!(PRE_FAULT == 0xC040_AED5);

/// Has KVM map so many bytes at a gpa, both whole pages, for a vCPU that does not run,
/// as if it had just read there. Pages that are missing are waited for. Returns how many
/// bytes are mapped now: fewer than were asked for, but some, if something came in between.
///
/// # Errors
///
/// What the kernel says if it mapped nothing: `EOPNOTSUPP` without nested paging, `ENOENT`
/// where there is no memslot, `EFAULT` if memory cannot be had, `EINTR` on a signal,
/// `EAGAIN` if memslots are being changed.
pub fn pre_fault(vcpu: &impl AsRawFd, gpa: u64, bytes: u64) -> io::Result<u64> {
    let mut range = PreFault { gpa, size: bytes, ..PreFault::default() };
    // SAFETY: the reference keeps whoever owns the descriptor, so that it is open for
    // the time of this call.
    let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // SAFETY: the opcode has the size of its argument, which is all that it reads and
    // writes in this process.
    let call = unsafe { Updater::<PRE_FAULT, PreFault>::new(&mut range) };
    // SAFETY: on a vCPU it changes nothing but KVM's page tables, to what the guest would
    // find by itself; other descriptors do not know it.
    unsafe { ioctl::ioctl(vcpu, call) }?;
    // The kernel leaves there what it did not get to.
    Ok(bytes.saturating_sub(range.size))
}
