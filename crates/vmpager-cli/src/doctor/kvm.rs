//! KVM: whether this user has it, and what it can do.

use rustix::io::Errno;
use vmpager_kvm::probe::{
    GUEST_MEMFD_INIT_SHARED, GUEST_MEMFD_MMAP, KvmProbeError, KvmReport, Vendor,
};

use super::{Check, errno_name, found};

const NO_GUESTS: &str = "no VM can be run; demo and tests use threads in place of vCPUs";
const KVM_FIRST: &str = "make KVM work first, see kvm.device";
const REAL_KVM: &str = "use a machine with kvm_intel or kvm_amd: bare metal, or nested \
                        virtualisation enabled";

/// All findings about KVM. The module at work is known even where the device
/// is closed to this user.
pub(super) fn checks(kvm: &Result<KvmReport, KvmProbeError>, vendor: Option<Vendor>) -> Vec<Check> {
    let report = kvm.as_ref().ok();
    let mut checks =
        vec![device(kvm), module(vendor), ring0(report), linux(report), paging(report)];
    checks.extend(CAPABILITIES.iter().map(|capability| capability.check(report)));
    checks.push(max_vcpus(report));
    checks
}

fn device(kvm: &Result<KvmReport, KvmProbeError>) -> Check {
    let finding = |value: String| found("kvm.device", "/dev/kvm", value);
    match kvm {
        Ok(report) => {
            finding(format!("API version {}", report.api_version)).ok("this user can run VMs")
        }
        Err(KvmProbeError::Absent { cpu: Some(vendor), .. }) => finding("absent".to_owned())
            .missing(
                NO_GUESTS,
                format!(
                    "sudo modprobe {vendor}; in a container, hand the device in (docker: --device \
                     /dev/kvm)"
                ),
            ),
        Err(KvmProbeError::Absent { cpu: None, .. }) => finding("absent".to_owned()).missing(
            NO_GUESTS,
            "enable virtualisation in the firmware, or nested virtualisation in the hypervisor \
             this machine runs on; in a container, hand the device in (docker: --device /dev/kvm)",
        ),
        Err(KvmProbeError::NotPermitted { error, .. }) => {
            let errno = Errno::from_io_error(error).unwrap_or(Errno::ACCESS);
            let remedy = if errno == Errno::PERM {
                "let the container have the device (docker: --device /dev/kvm)"
            } else {
                "sudo setfacl -m u:$USER:rw /dev/kvm; for good: sudo usermod -aG kvm $USER, where \
                 the group kvm owns it"
            };
            finding(format!("not permitted: {}", errno_name(errno))).missing(NO_GUESTS, remedy)
        }
        Err(KvmProbeError::Open { error, .. }) => finding(format!("cannot be opened: {error}"))
            .missing(NO_GUESTS, "see the kernel's log: sudo dmesg | grep -i kvm"),
        Err(KvmProbeError::NotKvm { .. }) => finding("something else".to_owned())
            .missing(NO_GUESTS, "sudo rm /dev/kvm && sudo mknod -m 660 /dev/kvm c 10 232"),
        Err(KvmProbeError::ApiVersion { found: version, .. }) => {
            finding(format!("API version {version}"))
                .missing(NO_GUESTS, "use Linux 2.6.22 or later")
        }
    }
}

fn module(vendor: Option<Vendor>) -> Check {
    let finding = |value: &str| found("kvm.module", "module", value);
    match vendor {
        Some(vendor @ (Vendor::Intel | Vendor::Amd)) => {
            finding(vendor.module()).ok("guests run on the CPU's own virtualisation")
        }
        Some(Vendor::Pvm) => finding(Vendor::Pvm.module()).limited(
            "guests run without help of the CPU: exits are slow, and so is ring 0",
            REAL_KVM,
        ),
        None => finding("none seen")
            .missing("what drives the CPU is unknown", "sudo modprobe kvm_intel (or kvm_amd)"),
    }
}

fn ring0(kvm: Option<&KvmReport>) -> Check {
    let finding = |value: &str| found("kvm.ring0", "guest ring 0", value);
    match kvm {
        Some(kvm) if kvm.ring0_emulated() => finding("emulated").limited(
            "kernels run slowly in it; the built-in guest works in ring 3, which is native",
            REAL_KVM,
        ),
        Some(kvm) if kvm.vendor.is_some() => finding("native").ok("guests run at full speed"),
        Some(_) => finding("unknown").limited(
            "Linux guests may be slow; the built-in guest, which works in ring 3, is not",
            REAL_KVM,
        ),
        None => finding("unknown").missing(NO_GUESTS, KVM_FIRST),
    }
}

fn linux(kvm: Option<&KvmReport>) -> Check {
    let finding = |value: &str| found("kvm.linux", "Linux guests", value);
    let instead = "the built-in guest is used instead, and tests with Linux guests skip themselves";
    match kvm {
        Some(kvm) if kvm.boots_linux() => {
            finding("boot").ok("vmpager vm run boots them, and tests use them")
        }
        Some(kvm) if kvm.ring0_emulated() => finding("do not boot").limited(
            instead,
            format!("{REAL_KVM}; or the lab, which emulates one: cargo xtask lab"),
        ),
        Some(_) => finding("do not boot").limited(instead, "see kvm.irqchip"),
        None => finding("do not boot").missing(NO_GUESTS, KVM_FIRST),
    }
}

fn paging(kvm: Option<&KvmReport>) -> Check {
    let finding = |value: &str| found("kvm.paging", "guest memory mapped", value);
    let Some(kvm) = kvm else {
        return finding("unknown").missing(NO_GUESTS, KVM_FIRST);
    };
    match (kvm.nested_paging, kvm.vendor) {
        (Some(true), _) => finding("by the CPU (EPT, NPT)")
            .ok("a page is mapped once, whatever the guest does with its page tables"),
        (nested, vendor) => {
            let remedy = match vendor {
                Some(Vendor::Intel) => {
                    "sudo modprobe -r kvm_intel && sudo modprobe kvm_intel ept=1"
                }
                Some(Vendor::Amd) => "sudo modprobe -r kvm_amd && sudo modprobe kvm_amd npt=1",
                _ => REAL_KVM,
            };
            let value = if nested.is_some() { "by shadow page tables" } else { "unknown" };
            finding(value).limited(
                "changes of guest page tables cost exits; no memory attributes, no pre-fault",
                remedy,
            )
        }
    }
}

fn max_vcpus(kvm: Option<&KvmReport>) -> Check {
    let finding = |value: String| found("kvm.max_vcpus", "vCPUs of a VM", value);
    match kvm {
        Some(KvmReport { recommended_vcpus, max_vcpus, .. }) => {
            finding(format!("{recommended_vcpus} recommended, {max_vcpus} at most"))
                .ok("bounds the built-in guest's vCPUs")
        }
        None => finding("unknown".to_owned()).missing(NO_GUESTS, KVM_FIRST),
    }
}

/// A capability of KVM, and the words for both cases.
struct Capability {
    id: &'static str,
    label: &'static str,
    /// What it says of itself, `None` if it is not offered.
    value: fn(&KvmReport) -> Option<String>,
    /// What vmpager does with it.
    with: &'static str,
    /// What it cannot do without it.
    without: &'static str,
    /// Where it is offered.
    remedy: &'static str,
}

impl Capability {
    fn check(&self, kvm: Option<&KvmReport>) -> Check {
        let finding = |value: String| found(self.id, self.label, value);
        let Some(kvm) = kvm else {
            return finding("unknown".to_owned()).missing(self.without, KVM_FIRST);
        };
        match (self.value)(kvm) {
            Some(value) => finding(value).ok(self.with),
            None => finding("not offered".to_owned()).missing(self.without, self.remedy),
        }
    }
}

fn yes(offered: bool) -> Option<String> {
    offered.then(|| "offered".to_owned())
}

fn bits(mask: impl Into<u64>) -> Option<String> {
    let mask = mask.into();
    (mask != 0).then(|| format!("{mask:#x}"))
}

fn guest_memfd_flags(kvm: &KvmReport) -> Option<String> {
    let names = [(GUEST_MEMFD_MMAP, "MMAP"), (GUEST_MEMFD_INIT_SHARED, "INIT_SHARED")];
    let known = names.iter().filter(|(bit, _)| kvm.guest_memfd_flags & bit != 0);
    let names: Vec<&str> = known.map(|(_, name)| *name).collect();
    bits(kvm.guest_memfd_flags).map(|mask| match names.as_slice() {
        [] => mask,
        names => names.join(", "),
    })
}

fn vm_types(kvm: &KvmReport) -> Option<String> {
    const NAMES: [&str; 6] = ["default", "sw-protected", "sev", "sev-es", "snp", "tdx"];
    let types: Vec<String> = (0..u32::BITS)
        .zip(0_usize..)
        .filter(|(bit, _)| kvm.vm_types & (1 << bit) != 0)
        .map(|(bit, index)| {
            NAMES.get(index).map_or(format!("type {bit}"), |name| (*name).to_owned())
        })
        .collect();
    (!types.is_empty()).then(|| types.join(", "))
}

const CAPABILITIES: &[Capability] = &[
    Capability {
        id: "kvm.irqchip",
        label: "in-kernel irqchip",
        value: |kvm| yes(kvm.irqchip),
        with: "interrupts are delivered without an exit; KVM takes some faults asynchronously",
        without: "Linux guests need an interrupt controller in the VMM",
        remedy: "use a kernel built with CONFIG_KVM_IOAPIC=y",
    },
    Capability {
        id: "kvm.sync_regs",
        label: "SYNC_REGS",
        value: |kvm| bits(kvm.sync_regs),
        with: "registers come with each exit on a missing page, without more system calls",
        without: "each exit on a missing page costs three more system calls (vm restore \
                  --delivery exit)",
        remedy: "use Linux 4.17 or later on x86-64",
    },
    Capability {
        id: "kvm.memory_fault_info",
        label: "MEMORY_FAULT_INFO",
        value: |kvm| yes(kvm.memory_fault_info),
        with: "an exit for private memory carries its guest address",
        without: "no exit for a missing page carries its address",
        remedy: "use Linux 6.8 or later",
    },
    Capability {
        id: "kvm.memory_attributes",
        label: "MEMORY_ATTRIBUTES",
        value: |kvm| bits(kvm.memory_attributes),
        with: "in sw-protected VMs (see kvm.vm_types), vCPUs can exit with the address of a \
               missing page: vm restore --delivery exit --exit-mechanism attributes",
        without: "vCPUs that exit on a missing page have it found by decoding: vm restore \
                  --delivery exit",
        remedy: "use Linux 6.8 or later, built with CONFIG_KVM_SW_PROTECTED_VM=y, and nested paging",
    },
    Capability {
        id: "kvm.guest_memfd",
        label: "GUEST_MEMFD",
        value: |kvm| yes(kvm.guest_memfd),
        with: "in sw-protected VMs (see kvm.vm_types), private pages of a guest are in memory \
               that the VMM cannot map: vm run --private-memory",
        without: "private pages stay in place: vm run --private-memory=in-place",
        remedy: "use Linux 6.18 or later, or 6.8 built with CONFIG_KVM_SW_PROTECTED_VM=y",
    },
    Capability {
        id: "kvm.guest_memfd_flags",
        label: "GUEST_MEMFD_FLAGS",
        value: guest_memfd_flags,
        with: "not used yet: guest_memfd memory can be filled through a mapping",
        without: "not used yet: guest_memfd memory cannot be mapped to fill it",
        remedy: "use Linux 6.18 or later",
    },
    Capability {
        id: "kvm.vm_types",
        label: "VM types",
        value: vm_types,
        with: "sw-protected ones, if listed, can have pages that exit with their address",
        without: "only default VMs, without private memory",
        remedy: "use Linux 6.8 or later",
    },
    Capability {
        id: "kvm.msr_filter",
        label: "MSR filter",
        value: |kvm| yes(kvm.msr_filter && kvm.user_space_msr != 0),
        with: "not used yet: the pager can play the async page fault device",
        without: "not used yet: async page faults stay with the kernel",
        remedy: "use Linux 5.10 or later",
    },
    Capability {
        id: "kvm.exception_payload",
        label: "EXCEPTION_PAYLOAD",
        value: |kvm| yes(kvm.exception_payload),
        with: "not used yet: page-not-present can be injected with its token",
        without: "not used yet: async page faults stay with the kernel",
        remedy: "use Linux 4.20 or later",
    },
    Capability {
        id: "kvm.exit_hypercall",
        label: "EXIT_HYPERCALL",
        value: |kvm| bits(kvm.exit_hypercall),
        with: "a guest can ask for private or shared pages: vm run --private-memory",
        without: "a guest can ask for private or shared pages by a port only",
        remedy: "use Linux 5.14 or later",
    },
    Capability {
        id: "kvm.pre_fault_memory",
        label: "PRE_FAULT_MEMORY",
        value: |kvm| yes(kvm.pre_fault_memory),
        with: "pages in place are mapped before they are touched: --delivery exit, --profile",
        without: "the first touch of a page that is in place is a stage-2 fault all the same",
        remedy: "use Linux 6.11 or later with nested paging",
    },
];

#[cfg(test)]
mod tests {
    use vmpager_kvm::probe::{KvmPaths, kvm_at};

    use super::*;
    use crate::doctor::State;

    #[test]
    fn without_the_device_everything_is_missing_with_a_remedy() {
        let paths = KvmPaths { device: "/nonexistent/kvm".into(), ..KvmPaths::default() };
        let checks = checks(&kvm_at(&paths), None);
        assert_eq!(checks[0].id, "kvm.device");
        for check in &checks {
            assert_eq!(check.state, State::Missing, "{check:?}");
            assert!(check.remedy.as_deref().is_some_and(|text| !text.is_empty()), "{check:?}");
        }
    }

    #[test]
    fn the_remedy_follows_from_why_the_device_is_closed() {
        let path = || "/dev/kvm".into();
        let denied = |errno| KvmProbeError::NotPermitted {
            path: path(),
            error: std::io::Error::from_raw_os_error(errno),
        };
        let (eperm, eacces) = (1, 13);
        for (error, wanted) in [
            (denied(eacces), "setfacl -m u:$USER:rw /dev/kvm"),
            (denied(eperm), "--device /dev/kvm"),
            (KvmProbeError::Absent { path: path(), cpu: Some(Vendor::Amd) }, "modprobe kvm_amd"),
            (KvmProbeError::Absent { path: path(), cpu: None }, "firmware"),
            (KvmProbeError::NotKvm { path: path() }, "mknod"),
        ] {
            let check = device(&Err(error));
            assert_eq!(check.state, State::Missing);
            assert!(check.remedy.as_deref().unwrap().contains(wanted), "{check:?}");
        }
    }

    #[test]
    fn an_emulated_ring_0_is_said_plainly() {
        let kvm = report(Vendor::Pvm, false);
        let check = ring0(Some(&kvm));
        assert_eq!((check.state, check.value.as_str()), (State::Limited, "emulated"));
        assert!(check.consequence.contains("built-in guest"), "{check:?}");
        assert_eq!(paging(Some(&kvm)).state, State::Limited);
        assert_eq!(ring0(Some(&report(Vendor::Intel, true))).state, State::Ok);
    }

    #[test]
    fn it_is_said_where_linux_guests_do_not_boot_and_what_is_used_instead() {
        let check = linux(Some(&report(Vendor::Pvm, false)));
        assert_eq!((check.state, check.value.as_str()), (State::Limited, "do not boot"));
        assert!(check.consequence.contains("built-in guest"), "{check:?}");
        assert!(check.remedy.as_deref().unwrap().contains("cargo xtask lab"), "{check:?}");
        let mut kvm = report(Vendor::Amd, true);
        assert_eq!(linux(Some(&kvm)).state, State::Ok);
        kvm.irqchip = false;
        assert!(linux(Some(&kvm)).remedy.as_deref().unwrap().contains("kvm.irqchip"));
    }

    #[test]
    fn masks_are_spelled_out() {
        let mut kvm = report(Vendor::Amd, true);
        assert_eq!(vm_types(&kvm), None);
        kvm.vm_types = 0b100_0011;
        assert_eq!(vm_types(&kvm).as_deref(), Some("default, sw-protected, type 6"));
        kvm.guest_memfd_flags = 3;
        assert_eq!(guest_memfd_flags(&kvm).as_deref(), Some("MMAP, INIT_SHARED"));
    }

    fn report(vendor: Vendor, nested_paging: bool) -> KvmReport {
        KvmReport {
            path: "/dev/kvm".into(),
            api_version: vmpager_kvm::probe::API_VERSION,
            vendor: Some(vendor),
            nested_paging: Some(nested_paging),
            sync_regs: 7,
            memory_fault_info: false,
            memory_attributes: 0,
            guest_memfd: false,
            guest_memfd_flags: 0,
            vm_types: 0,
            msr_filter: true,
            user_space_msr: 7,
            exception_payload: true,
            exit_hypercall: 0,
            pre_fault_memory: false,
            irqchip: true,
            recommended_vcpus: 8,
            max_vcpus: 1024,
        }
    }
}
