//! Whose faults those of a VMM's own userfaultfd are, where it says which thread
//! waits (`UFFD_FEATURE_THREAD_ID`).
//!
//! A thread is known by its name, as `/proc` has it: VMMs name the threads of
//! their vCPUs so that people find them. One that the VMM does not have at all is
//! the kernel's, which takes some faults of vCPUs on workers of its own
//! (asynchronous page faults).

use std::collections::HashMap;

/// Who missed a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The thread of a vCPU: the guest, or KVM on its behalf.
    Vcpu,
    /// Another thread of the VMM.
    Vmm,
    /// A thread of the kernel.
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

    /// Who a thread is. Asks once; should its number be another thread's later,
    /// that one is taken for it.
    pub(super) fn origin(&mut self, thread: u32) -> Origin {
        if let Some(origin) = self.known.get(&thread) {
            return *origin;
        }
        let name = std::fs::read_to_string(format!("/proc/{}/task/{thread}/comm", self.pid));
        let origin = name.map_or(Origin::Kernel, |name| of_name(name.trim_end()));
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        self.known.insert(thread, origin);
        origin
    }
}

/// `vcpu-0` here, `fc_vcpu 0`, `vcpu0` and `crosvm_vcpu0` elsewhere; QEMU has
/// `CPU 0/KVM`.
fn of_name(name: &str) -> Origin {
    let is_vcpu = name.contains("vcpu") || name.starts_with("CPU ") && name.ends_with("/KVM");
    if is_vcpu { Origin::Vcpu } else { Origin::Vmm }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_known_by_their_names() {
        for name in ["vcpu-0", "fc_vcpu 12", "vcpu1", "crosvm_vcpu3", "CPU 0/KVM"] {
            assert_eq!(of_name(name), Origin::Vcpu, "{name}");
        }
        for name in ["firecracker", "CPU 0", "api-server", "", "qemu/KVM"] {
            assert_eq!(of_name(name), Origin::Vmm, "{name}");
        }
    }

    #[test]
    fn a_thread_that_the_process_does_not_have_is_the_kernels() {
        let own = rustix::process::getpid().as_raw_pid();
        let mut threads = Threads::of(own);
        // kthreadd, or whatever else is no thread of this process.
        assert_eq!(threads.origin(2), Origin::Kernel);
        let origin = std::thread::Builder::new().name("vcpu-7".into()).spawn(move || {
            let thread = rustix::thread::gettid().as_raw_pid();
            threads.origin(u32::try_from(thread).unwrap_or(0))
        });
        let origin = origin.expect("a thread").join().expect("no panic");
        assert_eq!(origin, Origin::Vcpu);
    }
}
