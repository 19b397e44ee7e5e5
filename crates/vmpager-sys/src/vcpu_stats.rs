//! What KVM counts of a vCPU: the descriptor to read it from, `KVM_GET_STATS_FD`
//! (`Documentation/virt/kvm/api.rst`; Linux 5.14).

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, opcode};

/// `KVM_GET_STATS_FD`: no argument, a descriptor as the return value.
struct GetStatsFd;

const GET_STATS_FD: Opcode = opcode::none(0xAE, 0xCE);

const _: () = assert!(GET_STATS_FD == 0xAECE);

// SAFETY: the opcode takes no argument and has no output but the returned descriptor,
// which nobody else owns.
unsafe impl Ioctl for GetStatsFd {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        GET_STATS_FD
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: on success the kernel returns a new descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

/// Where the counters of a vCPU are read, as often as wanted; the layout is the kernel
/// document's.
///
/// # Errors
///
/// What the kernel says: `ENOTTY` before Linux 5.14, `EMFILE` if no descriptor is left.
pub fn open(vcpu: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the reference keeps whoever owns the descriptor, so that it is open for
    // the time of this call.
    let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // SAFETY: it makes a descriptor and touches no memory of this process.
    Ok(unsafe { ioctl::ioctl(vcpu, GetStatsFd) }?)
}
