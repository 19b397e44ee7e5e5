//! The tests. Each runs in a process of its own with an empty current
//! directory, and fails by returning an error.

mod ahead;
mod apf;
mod back_end;
mod beat;
mod bench;
mod exits;
mod faulty;
mod guest;
mod host;
mod large;
mod linux;
mod pager;
mod private;
mod restore;
mod saved;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use vmpager_kvm::probe;

pub(crate) use back_end::take_part;
pub(crate) use guest::GuestLost;

/// One test.
#[derive(Debug)]
pub(crate) struct Case {
    /// Tests of one boot run one after the other in the same machine. What is
    /// heavy, or may spoil the machine for others, has a boot of its own.
    pub(crate) boot: &'static str,
    pub(crate) name: &'static str,
    /// How long it may take, in the emulator on a busy machine.
    pub(crate) limit: Duration,
    pub(crate) run: fn(&Lab) -> anyhow::Result<()>,
}

/// Every test, in the order in which they run.
pub(crate) const ALL: &[Case] = &[
    case("host", "kvm_is_there", 20, host::kvm_is_there),
    case("host", "doctor_finds_what_restores_need", 20, host::doctor_finds_what_restores_need),
    case("host", "demo_restores_every_page_on_kvm", 120, host::demo_restores_every_page_on_kvm),
    case("matrix", "large_memory_is_accepted_as_fast", 30, host::large_memory_is_accepted_as_fast),
    case("long", "a_large_vm_starts_as_fast", 900, host::a_large_vm_starts_as_fast),
    case(
        "restore",
        "linux_boots_works_and_powers_off",
        60,
        linux::linux_boots_works_and_powers_off,
    ),
    case("restore", "linux_boots_on_two_vcpus", 60, linux::linux_boots_on_two_vcpus),
    case("restore", "a_panic_of_the_guest_is_told", 60, linux::a_panic_of_the_guest_is_told),
    case("restore", "a_reset_of_the_guest_is_told", 60, linux::a_reset_of_the_guest_is_told),
    case("restore", "a_busy_vm_ends_when_told", 60, linux::a_busy_vm_ends_when_told),
    case(
        "restore",
        "a_snapshot_under_load_has_every_page",
        90,
        restore::a_snapshot_under_load_has_every_page,
    ),
    case("restore", "restored_eagerly_it_goes_on", 90, restore::restored_eagerly_it_goes_on),
    case("restore", "restored_by_mmap_it_goes_on", 90, restore::restored_by_mmap_it_goes_on),
    case(
        "restore",
        "restored_on_demand_in_process_it_goes_on",
        90,
        restore::restored_on_demand_in_process_it_goes_on,
    ),
    case(
        "restore",
        "restored_with_a_profile_and_fill_it_goes_on",
        90,
        ahead::restored_with_a_profile_and_fill_it_goes_on,
    ),
    case(
        "restore",
        "restored_through_serve_with_a_back_end_it_goes_on",
        90,
        restore::restored_through_serve_with_a_back_end_it_goes_on,
    ),
    case(
        "restore",
        "restored_through_serve_with_fill_it_goes_on",
        90,
        restore::restored_through_serve_with_fill_it_goes_on,
    ),
    case(
        "restore",
        "a_restored_guest_is_saved_and_restored_again",
        90,
        restore::a_restored_guest_is_saved_and_restored_again,
    ),
    case(
        "restore",
        "a_broken_byte_of_memory_is_found_by_the_guest",
        90,
        restore::a_broken_byte_of_memory_is_found_by_the_guest,
    ),
    case(
        "host",
        "restored_on_huge_pages_it_goes_on",
        120,
        large::restored_on_huge_pages_it_goes_on,
    ),
    case(
        "host",
        "four_vcpus_restored_on_demand_go_on",
        180,
        large::four_vcpus_restored_on_demand_go_on,
    ),
    case("many", "ten_restores_side_by_side", 150, restore::ten_restores_side_by_side),
    case("matrix", "every_access_finds_its_page", 240, exits::every_access_finds_its_page),
    case("matrix", "bench_exit_measures_every_way", 120, exits::bench_exit_measures_every_way),
    case("restore", "restored_by_exits_it_goes_on", 90, exits::restored_by_exits_it_goes_on),
    case(
        "restore",
        "restored_by_exits_with_fill_it_goes_on",
        90,
        exits::restored_by_exits_with_fill_it_goes_on,
    ),
    case(
        "restore",
        "restored_by_what_is_cheaper_it_goes_on",
        90,
        exits::restored_by_what_is_cheaper_it_goes_on,
    ),
    case(
        "restore",
        "restored_by_attributes_it_goes_on",
        90,
        exits::restored_by_attributes_it_goes_on,
    ),
    case(
        "restore",
        "restored_by_attributes_with_fill_it_goes_on",
        90,
        exits::restored_by_attributes_with_fill_it_goes_on,
    ),
    case("apf", "told_of_faults_it_goes_on", 90, apf::told_of_faults_it_goes_on),
    case(
        "apf",
        "told_of_faults_on_two_vcpus_it_goes_on",
        90,
        apf::told_of_faults_on_two_vcpus_it_goes_on,
    ),
    // Half an hour for a long run: see the case.
    case("host", "pages_are_converted_to_and_fro", 1800, private::pages_are_converted_to_and_fro),
    case(
        "host",
        "restored_lazily_pages_are_converted",
        240,
        private::restored_lazily_pages_are_converted,
    ),
    case("host", "pages_mapped_ahead_are_no_faults", 120, ahead::pages_mapped_ahead_are_no_faults),
    case("host", "pages_are_converted_in_place", 120, private::pages_are_converted_in_place),
    case("host", "pages_are_converted_by_accesses", 120, private::pages_are_converted_by_accesses),
    case("host", "vcpus_convert_the_same_pages", 240, private::vcpus_convert_the_same_pages),
    case(
        "matrix",
        "bench_convert_measures_every_way",
        240,
        private::bench_convert_measures_every_way,
    ),
    case("apf", "saved_with_tasks_asleep_it_goes_on", 120, apf::saved_with_tasks_asleep_it_goes_on),
    case(
        "apf",
        "told_of_faults_a_vcpu_goes_and_comes_back",
        90,
        apf::told_of_faults_a_vcpu_goes_and_comes_back,
    ),
    case("apf", "a_reset_with_tasks_asleep_is_told", 90, apf::a_reset_with_tasks_asleep_is_told),
    case("apf", "bench_apf_measures_every_way", 120, apf::bench_apf_measures_every_way),
    case("long", "benches_in_full", 3600, bench::benches_in_full),
    case("long", "told_of_50000_faults_it_goes_on", 1800, apf::told_of_50000_faults_it_goes_on),
    case(
        "restore",
        "restored_from_a_slow_source_it_goes_on",
        90,
        faulty::restored_from_a_slow_source_it_goes_on,
    ),
    case(
        "restore",
        "restored_from_a_source_that_fails_once_it_goes_on",
        90,
        faulty::restored_from_a_source_that_fails_once_it_goes_on,
    ),
];

const fn case(
    boot: &'static str,
    name: &'static str,
    seconds: u64,
    run: fn(&Lab) -> anyhow::Result<()>,
) -> Case {
    Case { boot, name, limit: Duration::from_secs(seconds), run }
}

/// The test with this name.
pub(crate) fn named(name: &str) -> anyhow::Result<&'static Case> {
    ALL.iter().find(|case| case.name == name).with_context(|| format!("there is no test `{name}`"))
}

/// Why Linux guests cannot run on this machine's KVM, if so.
pub(crate) fn why_no_linux() -> Option<String> {
    match probe::kvm() {
        Err(error) => Some(error.to_string()),
        Ok(kvm) if kvm.ring0_emulated() => {
            Some("this KVM emulates ring 0: Linux guests do not boot on it".into())
        }
        Ok(_) => None,
    }
}

/// What tests are given.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Lab {
    /// The program `vmpager`.
    #[arg(long)]
    pub(crate) vmpager: PathBuf,
    /// The test of all kinds of access.
    #[arg(long)]
    pub(crate) matrix: PathBuf,
    /// The guests' kernel.
    #[arg(long)]
    pub(crate) kernel: PathBuf,
    /// The emulated machine's own kernel.
    #[arg(long)]
    pub(crate) host_kernel: PathBuf,
    /// What the guests start from.
    #[arg(long)]
    pub(crate) initrd: PathBuf,
    /// A directory for the tests of one boot.
    #[arg(long)]
    pub(crate) scratch: PathBuf,
    /// This is no emulated machine.
    #[arg(long)]
    pub(crate) direct: bool,
}

impl Lab {
    /// The same, for another process.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let Self { vmpager, matrix, kernel, host_kernel, initrd, scratch, direct } = self;
        let direct = direct.then(|| "--direct".into());
        let paths = [
            ("--vmpager", vmpager),
            ("--matrix", matrix),
            ("--kernel", kernel),
            ("--host-kernel", host_kernel),
            ("--initrd", initrd),
            ("--scratch", scratch),
        ];
        paths
            .into_iter()
            .flat_map(|(name, path)| [name.into(), path.clone().into_os_string()])
            .chain(direct)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_single_words_and_unique() {
        let names: BTreeSet<&str> = ALL.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), ALL.len());
        for case in ALL {
            for word in [case.boot, case.name] {
                let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
                assert!(!word.is_empty() && word.chars().all(is_plain), "{word}");
            }
        }
    }
}
