//! Whose faults those of a VMM's own userfaultfd are, where it says which thread
//! waits (`UFFD_FEATURE_THREAD_ID`).
//!
//! A thread is known by its name, as `/proc` has it: VMMs name the threads of
//! their vCPUs so that people find them, and the kernel names those that work for
//! it in a VMM's process (vhost, io_uring). One that the VMM does not have at all is
//! the kernel's, too, which takes some faults of vCPUs on workers of its own
//! (asynchronous page faults).
//!
//! What a vCPU's thread misses is the guest's or KVM's own (its walk of the guest's
//! page tables, its emulator, its clock pages). A message does not tell the one from
//! the other: both wait in `KVM_RUN`, and neither has a flag. But where vCPUs leave
//! the guest on missing pages, the guest's do not come by the userfaultfd at all;
//! what is left is KVM's own, or the VMM's, whose code may run on that thread
//! between two entries. Which of the two the thread's system call tells, if this
//! process may see it. (An exit that cannot be named has the guest wait as KVM does,
//! once: counted as KVM's.)

use std::collections::HashMap;

/// Who missed a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The thread of a vCPU: the guest, or KVM on its behalf.
    Vcpu,
    /// Another thread of the VMM.
    Vmm,
    /// The kernel: KVM on a vCPU's thread, where the guest's own accesses are exits,
    /// or one of the kernel's threads.
    Kernel,
}

/// More threads than this are not remembered.
const MAX_KNOWN: usize = 4096;

/// The threads of a process.
#[derive(Debug)]
pub(super) struct Threads {
    pid: i32,
    known: HashMap<u32, Origin>,
}

impl Threads {
    pub(super) fn of(pid: i32) -> Self {
        Self { pid, known: HashMap::new() }
    }

    /// Whose a fault is that this thread waits for, while vCPUs leave the guest on
    /// missing pages (`exits`) or wait for them.
    pub(super) fn origin(&mut self, thread: u32, exits: bool) -> Origin {
        match self.known(thread) {
            Origin::Vcpu if exits => {
                let call = std::fs::read_to_string(self.file(thread, "syscall"));
                call.map_or(Origin::Kernel, |call| beside_exits(&call))
            }
            origin => origin,
        }
    }

    fn file(&self, thread: u32, name: &str) -> String {
        format!("/proc/{}/task/{thread}/{name}", self.pid)
    }

    /// Who a thread is. Asks once; should its number be another thread's later,
    /// that one is taken for it.
    fn known(&mut self, thread: u32) -> Origin {
        if let Some(origin) = self.known.get(&thread) {
            return *origin;
        }
        let name = std::fs::read_to_string(self.file(thread, "comm"));
        let origin = name.map_or(Origin::Kernel, |name| of_name(name.trim_end()));
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        self.known.insert(thread, origin);
        origin
    }
}

/// `vcpu-0` here, `fc_vcpu 0`, `vcpu0` and `crosvm_vcpu0` elsewhere; QEMU has
/// `CPU 0/KVM`. The kernel has `vhost-PID`, `iou-wrk-PID` and `iou-sqp-PID`.
fn of_name(name: &str) -> Origin {
    let is_number = |rest: &str| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit());
    let of_kernel =
        |prefix: &&str| name.strip_prefix(*prefix).is_some_and(|rest| is_number(rest.trim_end()));
    if name.contains("vcpu") || name.starts_with("CPU ") && name.ends_with("/KVM") {
        Origin::Vcpu
    } else if ["vhost-", "iou-wrk-", "iou-sqp-"].iter().any(of_kernel) {
        Origin::Kernel
    } else {
        Origin::Vmm
    }
}

/// Whose a fault of a vCPU's thread is that is no access of the guest's, by what
/// `/proc/PID/task/TID/syscall` says of it: the number of the call it is in and what
/// that was given, or -1 outside of any.
fn beside_exits(call: &str) -> Origin {
    let mut words = call.split_ascii_whitespace();
    let (number, request) = (words.next(), words.nth(1));
    let is_ioctl = number.and_then(|n| n.parse().ok()) == Some(libc::SYS_ioctl);
    match number {
        // It is asleep and cannot be told for running, but by a race.
        Some("running") | None => Origin::Kernel,
        Some(_) if is_ioctl && request == Some(KVM_RUN) => Origin::Kernel,
        Some(_) => Origin::Vmm,
    }
}

/// `_IO(0xae, 0x80)` (Documentation/virt/kvm/api.rst), as `/proc` prints it.
const KVM_RUN: &str = "0xae80";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_known_by_their_names() {
        for name in ["vcpu-0", "fc_vcpu 12", "vcpu1", "crosvm_vcpu3", "CPU 0/KVM"] {
            assert_eq!(of_name(name), Origin::Vcpu, "{name}");
        }
        for name in ["firecracker", "CPU 0", "api-server", "", "qemu/KVM", "vhost-", "vhost-user-1"]
        {
            assert_eq!(of_name(name), Origin::Vmm, "{name}");
        }
        for name in ["vhost-4711", "iou-wrk-12", "iou-sqp-1"] {
            assert_eq!(of_name(name), Origin::Kernel, "{name}");
        }
    }

    #[test]
    fn a_thread_that_the_process_does_not_have_is_the_kernels() {
        let own = rustix::process::getpid().as_raw_pid();
        let mut threads = Threads::of(own);
        // kthreadd, or whatever else is no thread of this process.
        assert_eq!(threads.origin(2, false), Origin::Kernel);
        let origin = std::thread::Builder::new().name("vcpu-7".into()).spawn(move || {
            let thread = rustix::thread::gettid().as_raw_pid();
            threads.origin(u32::try_from(thread).unwrap_or(0), false)
        });
        let origin = origin.expect("a thread").join().expect("no panic");
        assert_eq!(origin, Origin::Vcpu);
    }

    #[test]
    fn what_a_vcpus_thread_misses_beside_its_exits_is_kvms_own_or_the_vmms() {
        for (call, origin) in [
            ("16 0xd 0xae80 0x0 0x7f 0x0 0x0 0x7ffc 0x7f31\n", Origin::Kernel),
            // Another request of KVM's, read(2), none.
            ("16 0xd 0xae01 0x0 0x7f 0x0 0x0 0x7ffc 0x7f31\n", Origin::Vmm),
            ("0 0x3 0xae80 0xae80 0x7f 0x0 0x0 0x7ffc 0x7f31\n", Origin::Vmm),
            ("-1 0x7ffc 0x7f31\n", Origin::Vmm),
            ("running\n", Origin::Kernel),
            ("", Origin::Kernel),
        ] {
            assert_eq!(beside_exits(call), origin, "{call}");
        }
    }
}
