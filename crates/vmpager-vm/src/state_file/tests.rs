//! What goes in comes out; what is damaged is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::devices::Ports;
use crate::kvm::{Irqchip, Lapic, MachineState, VcpuState};
use crate::private::PrivateState;

/// Any state, with the parts that such a machine has.
fn kvm(vcpus: usize, irqchip: bool) -> impl Strategy<Value = KvmState> {
    let parts = (any::<Irqchip>(), any::<Lapic>());
    let state = (vec(any::<VcpuState>(), vcpus), any::<MachineState>(), parts);
    state.prop_map(move |(mut vcpus, mut machine, (chips, lapic))| {
        machine.irqchip = irqchip.then_some(chips);
        for vcpu in &mut vcpus {
            vcpu.lapic = irqchip.then(|| vcpu.lapic.take().unwrap_or_else(|| lapic.clone()));
        }
        KvmState { vcpus, machine }
    })
}

/// As many as there must be, and as long as they get.
fn checksums(memory_bytes: u64) -> Vec<u32> {
    (0..pieces(memory_bytes)).map(|piece| u32::MAX - u32::try_from(piece).unwrap()).collect()
}

fn builtin() -> impl Strategy<Value = VmState> {
    let guest = (any::<Option<u64>>(), any::<bool>(), 2_u64..40, 1_u8..4, 1_u64..500);
    guest.prop_flat_map(|(seed, by_kvm, large_pages, vcpus, pages)| {
        let memory_bytes = large_pages << 21;
        let layout = Layout::new(memory_bytes, vcpus.into()).unwrap();
        let layout = layout.with_content_pages(pages).unwrap();
        let cpu = if by_kvm { CpuKind::Kvm } else { CpuKind::Threads };
        let guest = Guest::Builtin(BuiltinState { seed, cpu, layout });
        proptest::option::of(kvm(vcpus.into(), false)).prop_map(move |kvm| VmState {
            memory_bytes,
            memslots: Memslot::of_builtin(memory_bytes, true),
            guest: guest.clone(),
            kvm,
            private: Some(PrivateState {
                preserves: by_kvm,
                ranges: vec![(PAGE_SIZE, 2 * PAGE_SIZE)],
            }),
            memory_crc32c: checksums(memory_bytes),
        })
    })
}

fn linux() -> impl Strategy<Value = VmState> {
    // Below the hole for devices and above it; any text is a command line.
    let guest = (".*", 1_u64..1 << 21, 1..=MAX_VCPUS);
    guest.prop_flat_map(|(cmdline, pages, vcpus)| {
        let memory_bytes = pages * PAGE_SIZE;
        let interrupt = EventFd::new(0).unwrap();
        let devices = Ports::new(Box::new(std::io::sink()), interrupt).state();
        let guest = Guest::Linux(LinuxState { cmdline, devices });
        kvm(vcpus.into(), true).prop_map(move |kvm| VmState {
            memory_bytes,
            memslots: Memslot::around_the_hole(memory_bytes),
            guest: guest.clone(),
            kvm: Some(kvm),
            private: None,
            memory_crc32c: checksums(memory_bytes),
        })
    })
}

fn any_state() -> impl Strategy<Value = VmState> {
    prop_oneof![builtin(), linux()]
}

/// The same state every time.
fn one(strategy: impl Strategy<Value = VmState>) -> VmState {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    strategy.new_tree(&mut runner).unwrap().current()
}

fn refusal(state: &VmState) -> String {
    VmState::parse(&state.encode()).unwrap_err().to_string()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 200, ..Default::default() })]

    #[test]
    fn every_state_comes_back_as_it_was(state in any_state()) {
        let file = state.encode();
        prop_assert!(file.len() <= MAX_STATE_BYTES);
        prop_assert_eq!(VmState::parse(&file), Ok(state));
    }

    #[test]
    fn a_file_that_is_cut_short_is_refused(state in any_state(), at in any::<prop::sample::Index>()) {
        let file = state.encode();
        // Without its last newline it is whole.
        let cut = &file[..at.index(file.len() - 1)];
        prop_assert!(matches!(VmState::parse(cut), Err(StateError::Form(_))));
    }

    #[test]
    fn any_flipped_bit_is_found(state in any_state(), at in any::<prop::sample::Index>(), bit in 0_u32..8) {
        let mut file = state.encode();
        let at = at.index(file.len());
        file[at] ^= 1_u8 << bit;
        prop_assert!(VmState::parse(&file).is_err(), "byte {at}, now {:#x}", file[at]);
    }
}

#[test]
fn bytes_that_are_no_state_file_are_refused() {
    assert_eq!(VmState::parse(&vec![b' '; MAX_STATE_BYTES + 1]), Err(StateError::TooLong));
    let deep = [b"{\"version\": ".as_slice(), &vec![b'['; 100_000]].concat();
    for bytes in [b"".as_slice(), b"{}", b"\xff", b"{\"version\": \"2\"}", &deep] {
        assert!(matches!(VmState::parse(bytes), Err(StateError::Form(_))), "{bytes:?}");
    }
    let later = br#"{"version": 4, "body": {"nobody": "knows"}}"#;
    assert_eq!(VmState::parse(later), Err(StateError::Version(4)));
}

#[test]
fn checksums_that_are_none_are_refused() {
    let mut body = serde_json::to_value(one(builtin())).unwrap();
    for text in ["1826585", "182658", "1826585g"] {
        body["memory_crc32c"] = text.into();
        let error = VmState::parse(&container::seal(&body)).unwrap_err().to_string();
        assert!(error.starts_with("memory_crc32c: "), "{error}");
    }
}

#[test]
fn a_body_that_was_edited_is_refused_by_its_checksum() {
    let text = String::from_utf8(one(builtin()).encode()).unwrap();
    let edited = text.replacen("\"memory_pages\": ", "\"memory_pages\": 1", 1);
    let error = VmState::parse(edited.as_bytes()).unwrap_err();
    assert!(matches!(error, StateError::Checksum { .. }), "{error}");
    let unsealed = text.replacen("\"crc32c\": \"", "\"crc32c\": \"0", 1);
    assert!(matches!(VmState::parse(unsealed.as_bytes()), Err(StateError::Checksum { .. })));
}

#[test]
fn private_ranges_are_pages_of_memory_in_order() {
    let state = one(builtin());
    let end = state.memory_bytes;
    for ranges in [
        vec![(1, PAGE_SIZE)],
        vec![(0, 0)],
        vec![(0, PAGE_SIZE + 1)],
        vec![(end, PAGE_SIZE)],
        vec![(end - PAGE_SIZE, 2 * PAGE_SIZE)],
        vec![(u64::MAX - PAGE_SIZE + 1, PAGE_SIZE)],
        vec![(PAGE_SIZE, PAGE_SIZE), (0, PAGE_SIZE)],
        vec![(0, 2 * PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)],
    ] {
        let private = Some(PrivateState { preserves: false, ranges });
        let problem = refusal(&VmState { private, ..state.clone() });
        assert!(problem.contains("private"), "{problem}");
    }
    let private = Some(PrivateState { preserves: false, ranges: Vec::new() });
    let linux = VmState { private, ..one(linux()) };
    assert!(refusal(&linux).contains("this guest has none"));
}

/// What a body with right version and checksum is refused for.
#[track_caller]
fn refused_field(change: impl FnOnce(&mut serde_json::Value)) -> String {
    let mut body = serde_json::to_value(one(linux())).unwrap();
    change(&mut body);
    let error = VmState::parse(&container::seal(&body)).unwrap_err();
    assert!(matches!(error, StateError::Field { .. }), "{error}");
    error.to_string()
}

#[test]
fn a_field_that_is_missing_unknown_or_of_another_type_is_named_with_its_path() {
    let error = refused_field(|body| {
        let regs = body["kvm"]["vcpus"][0]["regs"].as_object_mut().unwrap();
        regs.remove("rip");
    });
    assert!(
        error.contains("kvm.vcpus[0].regs") && error.contains("missing field `rip`"),
        "{error}"
    );
    let error = refused_field(|body| body["kvm"]["machine"]["clock_ns"] = "noon".into());
    assert!(error.contains("kvm.machine.clock_ns") && error.contains("\"noon\""), "{error}");
    let error = refused_field(|body| body["guest"]["linux"]["cmdlime"] = "".into());
    assert!(error.contains("guest.linux.cmdlime") && error.contains("unknown field"), "{error}");
    let error = refused_field(|body| body["kvm"]["vcpus"][0]["mp_state"] = (1_u64 << 32).into());
    assert!(error.contains("kvm.vcpus[0].mp_state") && error.contains("4294967296"), "{error}");
    let error = refused_field(|body| body["kvm"]["vcpus"][0]["lapic"] = "00ff".into());
    assert!(error.contains("kvm.vcpus[0].lapic"), "{error}");
    let error = refused_field(|body| body["guest"] = "windows".into());
    assert!(error.contains("guest") && error.contains("windows"), "{error}");
}

#[test]
fn parts_that_do_not_fit_each_other_are_named() {
    let (linux, builtin) = (one(linux()), one(builtin().prop_filter("kvm", |s| s.kvm.is_some())));
    let change = |state: &VmState, change: fn(&mut VmState)| {
        let mut state = state.clone();
        change(&mut state);
        refusal(&state)
    };
    let error = change(&linux, |state| state.memory_bytes = 4095);
    assert!(error.contains("memory_bytes: 4095"), "{error}");
    let error = change(&linux, |state| state.memory_bytes += 4096);
    assert!(error.contains("memslots: "), "{error}");
    let error = change(&linux, |state| state.memory_crc32c.truncate(1));
    assert!(error.contains("memory_crc32c: 1 entries"), "{error}");
    let error = change(&linux, |state| state.kvm = None);
    assert!(error.contains("kvm: absent"), "{error}");
    let error = change(&linux, |state| state.kvm.as_mut().unwrap().vcpus.clear());
    assert!(error.contains("kvm.vcpus: 0 entries"), "{error}");
    let error = change(&linux, |state| state.kvm.as_mut().unwrap().vcpus[0].lapic = None);
    assert!(error.contains("kvm.vcpus[0].lapic: absent"), "{error}");
    let error = change(&linux, |state| state.kvm.as_mut().unwrap().machine.irqchip = None);
    assert!(error.contains("kvm.machine.irqchip: absent"), "{error}");
    let error = change(&builtin, |state| {
        let kvm = state.kvm.as_mut().unwrap();
        kvm.vcpus.push(kvm.vcpus[0].clone());
    });
    assert!(error.contains("kvm.vcpus: "), "{error}");
    let error = change(&builtin, |state| match &mut state.guest {
        Guest::Builtin(guest) => guest.layout.code += 1,
        Guest::Linux(_) => unreachable!("it is the built-in one"),
    });
    assert!(error.contains("guest.builtin.layout: "), "{error}");
    let error = change(&builtin, |state| match &mut state.guest {
        Guest::Builtin(guest) => guest.layout.end = u64::MAX,
        Guest::Linux(_) => unreachable!("it is the built-in one"),
    });
    assert!(error.contains("guest.builtin.layout: "), "{error}");
}
