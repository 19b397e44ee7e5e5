//! A state file of any content: whatever it is, nothing panics, and what is
//! accepted comes back from its own encoding as it was.
//!
//! The first byte of the input says whether the rest is a whole file (`f`) or
//! the body of one, to be given a version and a checksum that are right: a fuzzer
//! does not find those by itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmpager_vm::VmState;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, bytes)) = input.split_first() else { return };
    if kind == b'f' {
        check(bytes);
    } else {
        check(&sealed(bytes));
    }
});

/// Accepted or refused, but never a panic; and what is accepted is sound.
fn check(file: &[u8]) {
    match VmState::parse(file) {
        Ok(state) => {
            assert!(state.memory_bytes() > 0);
            assert!(state.vcpus() > 0);
            assert_eq!(VmState::parse(&state.encode()).as_ref(), Ok(&state));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn sealed(body: &[u8]) -> Vec<u8> {
    // The checksum is that of the value, without the white space around it.
    let body = body.trim_ascii();
    let head = format!("{{\"version\":3,\"crc32c\":\"{:#010x}\",\"body\":", crc32c::crc32c(body));
    [head.as_bytes(), body, b"}"].concat()
}
