//! Whether this user can use KVM, and what the KVM behind it can do.
//!
//! Facts only; the program says what they mean and what to do about them.
//! Probing opens the device, asks for its extensions and closes it: no VM is
//! created.

use std::ffi::CString;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use kvm_bindings as kb;
use kvm_ioctls::{Kvm, VmFd};

/// The only version of the KVM interface there has been since Linux 2.6.22.
pub const API_VERSION: i32 = 12;

/// Bit of [`KvmReport::memory_attributes`]: memory can be private to the guest.
pub const ATTRIBUTE_PRIVATE: u64 = 1 << 3;

/// Bits of [`KvmReport::guest_memfd_flags`]: a guest_memfd can be mapped, and
/// starts out shared.
pub const GUEST_MEMFD_MMAP: u32 = 1 << 0;
/// See [`GUEST_MEMFD_MMAP`].
pub const GUEST_MEMFD_INIT_SHARED: u32 = 1 << 1;

/// Bit of [`KvmReport::vm_types`]: VMs with private memory and no hardware
/// behind it.
pub const VM_TYPE_SW_PROTECTED: u32 = 1 << kb::KVM_X86_SW_PROTECTED_VM;

/// `KVM_CAP_GUEST_MEMFD_FLAGS`, newer than the bindings.
const CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// What a working KVM offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmReport {
    /// The device that was opened.
    pub path: PathBuf,
    /// `KVM_GET_API_VERSION`; always [`API_VERSION`].
    pub api_version: i32,
    /// Which part of KVM drives the CPU.
    pub vendor: Option<Vendor>,
    /// Whether guest memory is mapped by the CPU's second-stage tables (EPT,
    /// NPT) rather than by shadow page tables; `None` if it cannot be told.
    pub nested_paging: Option<bool>,
    /// `KVM_CAP_SYNC_REGS`: the `KVM_SYNC_X86_*` register sets in the run page.
    pub sync_regs: u32,
    /// `KVM_CAP_MEMORY_FAULT_INFO`.
    pub memory_fault_info: bool,
    /// `KVM_CAP_MEMORY_ATTRIBUTES`: the attributes pages can carry.
    pub memory_attributes: u64,
    /// `KVM_CAP_GUEST_MEMFD`.
    pub guest_memfd: bool,
    /// `KVM_CAP_GUEST_MEMFD_FLAGS`: the flags `KVM_CREATE_GUEST_MEMFD` takes.
    pub guest_memfd_flags: u32,
    /// `KVM_CAP_VM_TYPES`: a bit for each type of VM; 0 on kernels older than
    /// the question, which have type 0 only.
    pub vm_types: u32,
    /// `KVM_CAP_X86_MSR_FILTER`.
    pub msr_filter: bool,
    /// `KVM_CAP_X86_USER_SPACE_MSR`: the reasons for which an MSR access can
    /// exit to userspace.
    pub user_space_msr: u32,
    /// `KVM_CAP_EXCEPTION_PAYLOAD`.
    pub exception_payload: bool,
    /// `KVM_CAP_EXIT_HYPERCALL`: a bit for each hypercall that can exit.
    pub exit_hypercall: u32,
    /// `KVM_CAP_PRE_FAULT_MEMORY`.
    pub pre_fault_memory: bool,
    /// `KVM_CAP_IRQCHIP`: interrupt controllers in the kernel.
    pub irqchip: bool,
    /// `KVM_CAP_NR_VCPUS`: vCPUs a VM should have at most.
    pub recommended_vcpus: u32,
    /// `KVM_CAP_MAX_VCPUS`: vCPUs a VM may have.
    pub max_vcpus: u32,
}

impl KvmReport {
    /// Whether guest code in ring 0 runs in an emulator: Linux guests are then
    /// slow or do not boot, while the built-in guest, which works in ring 3,
    /// runs natively.
    pub fn ring0_emulated(&self) -> bool {
        self.vendor == Some(Vendor::Pvm)
    }

    /// Whether Linux guests can run: they need ring 0 and KVM's interrupt
    /// controllers.
    pub fn boots_linux(&self) -> bool {
        self.irqchip && !self.ring0_emulated()
    }

    /// Whether accesses to chosen pages of ordinary memory can be made to exit
    /// with their exact guest-physical address.
    pub fn exact_memory_faults(&self) -> bool {
        self.memory_attributes & ATTRIBUTE_PRIVATE != 0
            && self.vm_types & VM_TYPE_SW_PROTECTED != 0
            && self.nested_paging != Some(false)
    }
}

/// The module that drives the CPU for KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// `kvm_intel`: VMX.
    Intel,
    /// `kvm_amd`: SVM.
    Amd,
    /// `kvm_pvm`: no virtualisation by the CPU at all; for machines that are
    /// themselves guests without nested virtualisation.
    Pvm,
}

impl Vendor {
    /// The module's name.
    pub fn module(self) -> &'static str {
        match self {
            Self::Intel => "kvm_intel",
            Self::Amd => "kvm_amd",
            Self::Pvm => "kvm_pvm",
        }
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.module())
    }
}

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmProbeError {
    /// The device is not there, or has no driver.
    #[error("{}: there is no KVM here; {}", path.display(), absent_remedy(*cpu))]
    Absent {
        /// Where it should be.
        path: PathBuf,
        /// What this CPU's flags say KVM would use; `None` if it offers no
        /// virtualisation.
        cpu: Option<Vendor>,
    },
    /// This user may not open the device.
    #[error(
        "{}: not permitted ({error}); grant it: sudo setfacl -m u:$USER:rw {}",
        path.display(), path.display()
    )]
    NotPermitted {
        /// The device.
        path: PathBuf,
        /// The system's own words.
        error: io::Error,
    },
    /// Opening failed for another reason.
    #[error("{}: opening it failed: {error}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// The system's own words.
        error: io::Error,
    },
    /// What is there is not KVM.
    #[error("{}: not a KVM device; expected the character device 10:232", path.display())]
    NotKvm {
        /// What was opened.
        path: PathBuf,
    },
    /// It speaks another version of the interface.
    #[error("{}: KVM API version {found}, vmpager needs {API_VERSION}", path.display())]
    ApiVersion {
        /// The device.
        path: PathBuf,
        /// The version it reports.
        found: i32,
    },
}

fn absent_remedy(cpu: Option<Vendor>) -> String {
    match cpu {
        Some(vendor) => format!("load it: sudo modprobe {vendor}"),
        None => "this CPU shows no virtualisation: enable it in the firmware, or nested \
                 virtualisation in the hypervisor this machine runs on"
            .to_owned(),
    }
}

/// Where the probe looks, so that a test can show it another machine.
#[derive(Clone, Debug)]
pub struct KvmPaths {
    /// Usually `/dev/kvm`.
    pub device: PathBuf,
    /// Usually `/sys/module`.
    pub modules: PathBuf,
    /// Usually `/proc/cpuinfo`.
    pub cpuinfo: PathBuf,
}

impl Default for KvmPaths {
    fn default() -> Self {
        Self {
            device: "/dev/kvm".into(),
            modules: "/sys/module".into(),
            cpuinfo: "/proc/cpuinfo".into(),
        }
    }
}

/// Probes KVM on this machine.
///
/// # Errors
///
/// Why it cannot be used, with the remedy.
pub fn kvm() -> Result<KvmReport, KvmProbeError> {
    kvm_at(&KvmPaths::default())
}

/// Probes KVM by the given device, with its modules described at `paths`.
///
/// # Errors
///
/// As [`kvm`].
pub fn kvm_at(paths: &KvmPaths) -> Result<KvmReport, KvmProbeError> {
    let kvm = open(paths)?;
    let vendor = vendor(paths);
    let cap = |number: u32| {
        let answer = kvm.check_extension_raw(number.into());
        u32::try_from(answer).unwrap_or(0)
    };
    Ok(KvmReport {
        path: paths.device.clone(),
        api_version: API_VERSION,
        vendor,
        nested_paging: nested_paging(&paths.modules, vendor),
        sync_regs: cap(kb::KVM_CAP_SYNC_REGS),
        memory_fault_info: cap(kb::KVM_CAP_MEMORY_FAULT_INFO) > 0,
        memory_attributes: cap(kb::KVM_CAP_MEMORY_ATTRIBUTES).into(),
        guest_memfd: cap(kb::KVM_CAP_GUEST_MEMFD) > 0,
        guest_memfd_flags: cap(CAP_GUEST_MEMFD_FLAGS),
        vm_types: cap(kb::KVM_CAP_VM_TYPES),
        msr_filter: cap(kb::KVM_CAP_X86_MSR_FILTER) > 0,
        user_space_msr: cap(kb::KVM_CAP_X86_USER_SPACE_MSR),
        exception_payload: cap(kb::KVM_CAP_EXCEPTION_PAYLOAD) > 0,
        exit_hypercall: cap(kb::KVM_CAP_EXIT_HYPERCALL),
        pre_fault_memory: cap(kb::KVM_CAP_PRE_FAULT_MEMORY) > 0,
        irqchip: cap(kb::KVM_CAP_IRQCHIP) > 0,
        recommended_vcpus: cap(kb::KVM_CAP_NR_VCPUS),
        max_vcpus: cap(kb::KVM_CAP_MAX_VCPUS),
    })
}

/// The flags that guest_memfds of a VM of this type can have
/// (`KVM_CAP_GUEST_MEMFD_FLAGS`): 0 before Linux 6.18. VMs with private memory have no
/// [`GUEST_MEMFD_INIT_SHARED`].
pub fn guest_memfd_flags(vm: &VmFd) -> u32 {
    u32::try_from(vm.check_extension_raw(CAP_GUEST_MEMFD_FLAGS.into())).unwrap_or(0)
}

fn open(paths: &KvmPaths) -> Result<Kvm, KvmProbeError> {
    let path = || paths.device.clone();
    let absent = || KvmProbeError::Absent { path: path(), cpu: cpu_vendor(&paths.cpuinfo) };
    match fs::metadata(&paths.device) {
        // Opening something else could wait for ever (a FIFO).
        Ok(meta) if !meta.file_type().is_char_device() => {
            return Err(KvmProbeError::NotKvm { path: path() });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(absent()),
        _ => {}
    }
    let name = CString::new(paths.device.as_os_str().as_bytes())
        .map_err(|error| KvmProbeError::Open { path: path(), error: error.into() })?;
    let kvm = Kvm::new_with_path(name).map_err(|errno| {
        let error = io::Error::from_raw_os_error(errno.errno());
        match error.kind() {
            io::ErrorKind::NotFound => absent(),
            io::ErrorKind::PermissionDenied => KvmProbeError::NotPermitted { path: path(), error },
            // The node is there, and nothing behind it.
            _ if matches!(errno.errno(), ENXIO | ENODEV) => absent(),
            _ => KvmProbeError::Open { path: path(), error },
        }
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        found if found < 0 => Err(KvmProbeError::NotKvm { path: path() }),
        found => Err(KvmProbeError::ApiVersion { path: path(), found }),
    }
}

const ENXIO: i32 = 6;
const ENODEV: i32 = 19;

/// Which vendor module is at work, whether or not this user may use it.
// Built-in ones are all listed, whether or not they suit the CPU, so a loaded
// one goes first, then the one whose instructions the CPU has.
pub fn vendor(paths: &KvmPaths) -> Option<Vendor> {
    let listed = |vendor: Vendor| paths.modules.join(vendor.module());
    let present: Vec<Vendor> = [Vendor::Intel, Vendor::Amd, Vendor::Pvm]
        .into_iter()
        .filter(|&vendor| listed(vendor).is_dir())
        .collect();
    let loaded = |&&vendor: &&Vendor| listed(vendor).join("initstate").exists();
    let cpu = cpu_vendor(&paths.cpuinfo);
    let suited = present.iter().find(|&&vendor| Some(vendor) == cpu);
    let without = present.iter().find(|&&vendor| vendor == Vendor::Pvm);
    present.iter().find(loaded).or(suited).or(without).or(present.first()).copied()
}

/// What the CPU's flags say KVM can be built on.
fn cpu_vendor(cpuinfo: &Path) -> Option<Vendor> {
    let text = fs::read_to_string(cpuinfo).ok()?;
    let flags = text.lines().find(|line| line.starts_with("flags"))?;
    let (_, flags) = flags.split_once(':')?;
    flags.split_whitespace().find_map(|flag| match flag {
        "vmx" => Some(Vendor::Intel),
        "svm" => Some(Vendor::Amd),
        _ => None,
    })
}

fn nested_paging(modules: &Path, vendor: Option<Vendor>) -> Option<bool> {
    let parameter = match vendor? {
        Vendor::Intel => "kvm_intel/parameters/ept",
        Vendor::Amd => "kvm_amd/parameters/npt",
        Vendor::Pvm => return Some(false),
    };
    let text = fs::read_to_string(modules.join(parameter)).ok()?;
    Some(matches!(text.trim(), "Y" | "1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine described by files, removed at the end of the test.
    struct FakeMachine {
        root: PathBuf,
        paths: KvmPaths,
    }

    impl FakeMachine {
        fn new(name: &str, flags: &str) -> Self {
            let root =
                std::env::temp_dir().join(format!("vmpager-kvm-{name}-{}", std::process::id()));
            let modules = root.join("module");
            fs::create_dir_all(&modules).unwrap();
            let cpuinfo = root.join("cpuinfo");
            fs::write(&cpuinfo, format!("processor\t: 0\nflags\t\t: fpu {flags} sse\n")).unwrap();
            let paths = KvmPaths { device: root.join("kvm"), modules, cpuinfo };
            Self { root, paths }
        }

        fn built_in(&self, module: &str) {
            fs::create_dir_all(self.paths.modules.join(module).join("parameters")).unwrap();
        }
    }

    impl Drop for FakeMachine {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.root);
        }
    }

    #[test]
    fn this_machine() {
        match kvm() {
            Ok(report) => {
                assert_eq!(report.api_version, API_VERSION);
                assert!(report.max_vcpus > 0 && report.recommended_vcpus > 0, "{report:?}");
                assert!(report.vendor.is_some(), "{report:?}");
            }
            Err(error) => vmpager_testing::skipped(&format!("{error}")),
        }
    }

    #[test]
    fn an_absent_device_names_the_module_to_load() {
        let intel = FakeMachine::new("absent-vmx", "vmx");
        let error = kvm_at(&intel.paths).unwrap_err();
        assert!(matches!(error, KvmProbeError::Absent { cpu: Some(Vendor::Intel), .. }));
        assert!(error.to_string().contains("modprobe kvm_intel"), "{error}");

        let none = FakeMachine::new("absent-none", "hypervisor");
        let error = kvm_at(&none.paths).unwrap_err();
        assert!(matches!(error, KvmProbeError::Absent { cpu: None, .. }));
        assert!(error.to_string().contains("firmware"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_kvm_is_refused() {
        let machine = FakeMachine::new("other", "svm");
        fs::write(&machine.paths.device, "").unwrap();
        assert!(matches!(kvm_at(&machine.paths), Err(KvmProbeError::NotKvm { .. })));
        let null = KvmPaths { device: "/dev/null".into(), ..machine.paths.clone() };
        assert!(matches!(kvm_at(&null), Err(KvmProbeError::NotKvm { .. })));
        let nul_byte = KvmPaths { device: "a\0b".into(), ..machine.paths.clone() };
        assert!(kvm_at(&nul_byte).is_err());
    }

    #[test]
    fn the_module_at_work_is_told_from_the_ones_built_in() {
        let both = FakeMachine::new("vendor", "svm");
        assert_eq!(vendor(&both.paths), None);
        both.built_in("kvm_intel");
        both.built_in("kvm_amd");
        assert_eq!(vendor(&both.paths), Some(Vendor::Amd), "the CPU has svm");
        both.built_in("kvm_pvm");
        assert_eq!(vendor(&both.paths), Some(Vendor::Amd), "built in, not needed");
        fs::write(both.paths.modules.join("kvm_pvm/initstate"), "live\n").unwrap();
        assert_eq!(vendor(&both.paths), Some(Vendor::Pvm), "only one module can be loaded");

        let guest = FakeMachine::new("vendor-pvm", "hypervisor");
        guest.built_in("kvm_intel");
        guest.built_in("kvm_pvm");
        assert_eq!(vendor(&guest.paths), Some(Vendor::Pvm), "the CPU has neither");
    }

    #[test]
    fn nested_paging_is_the_modules_word() {
        let machine = FakeMachine::new("paging", "svm");
        machine.built_in("kvm_amd");
        let read = || nested_paging(&machine.paths.modules, Some(Vendor::Amd));
        assert_eq!(read(), None);
        for (text, expected) in [("Y\n", true), ("1\n", true), ("N\n", false), ("0\n", false)] {
            fs::write(machine.paths.modules.join("kvm_amd/parameters/npt"), text).unwrap();
            assert_eq!(read(), Some(expected), "{text}");
        }
        assert_eq!(nested_paging(&machine.paths.modules, Some(Vendor::Pvm)), Some(false));
    }
}
