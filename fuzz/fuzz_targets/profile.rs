//! A profile of any content, its checksum made right: it is read and comes back the
//! same, or is refused with a reason.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use vmpager_store::profile::Profile;

fuzz_target!(|input: &[u8]| {
    check(input);
    check(&[input, &crc32c::crc32c(input).to_le_bytes()].concat());
});

fn check(bytes: &[u8]) {
    let profile = match Profile::decode(bytes, Path::new("profile")) {
        Ok(profile) => profile,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let again = Profile::decode(&profile.encode(), Path::new("again")).expect("its own bytes");
    assert_eq!(again, profile);
    let count: usize = profile.replay_order().iter().map(ExactSizeIterator::len).sum();
    assert_eq!(count, profile.pages().len(), "each page once");
    let mut twice = profile.clone();
    twice.merge(&profile).expect("the same memory");
    assert_eq!(twice.pages().len(), count);
}
