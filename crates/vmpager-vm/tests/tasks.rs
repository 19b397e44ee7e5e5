//! The built-in guest of tasks: whoever brings its pages, and however it hears of
//! them, each walker finds what it should, and the task that computes ends.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use vmpager::core::ByteRange;
use vmpager::store::MemorySource;
use vmpager::store::faulty::FaultySource;
use vmpager_vm::{AsyncFaults, Delivery, ExitMechanism, TaskGuest, TaskRun, TaskWork, VmError};

const BY_EXITS: Delivery = Delivery::Exit(ExitMechanism::View);
const WORK: TaskWork = TaskWork { steps: 100_000, walkers: 4, pages: 6 };

/// `None`, and said so, where there is no such KVM.
fn run(
    guest: &TaskGuest,
    image: Vec<u8>,
    delivery: Delivery,
    async_faults: Option<AsyncFaults>,
) -> Option<TaskRun> {
    let source = FaultySource::wrap(Arc::new(MemorySource::new(image)));
    let walked = guest.walked();
    let slow = ByteRange::new(walked.start, walked.end - walked.start);
    source.delay_between(slow, Duration::from_millis(2)..=Duration::from_millis(8));
    match guest.run(source, delivery, async_faults, WORK) {
        Ok(run) => Some(run),
        Err(VmError::NoKvm(error)) => {
            vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
            None
        }
        Err(error) => panic!("{delivery:?} {async_faults:?}: {error}"),
    }
}

#[test]
fn told_or_not_the_guest_ends_with_every_page_right() {
    let guest = TaskGuest::new(8).unwrap();
    let ways = [
        (BY_EXITS, None),
        (Delivery::Userfaultfd, None),
        (BY_EXITS, Some(AsyncFaults::Never)),
        (BY_EXITS, Some(AsyncFaults::Always)),
    ];
    for (delivery, async_faults) in ways {
        let Some(run) = run(&guest, guest.image(), delivery, async_faults) else { return };
        println!("{delivery:?} {async_faults:?}: {run:?}");
        assert_eq!(run.wrong, 0, "{run:?}");
        let counts = run.told.unwrap_or_default().counts;
        // All but those whose page came just then.
        let is_told = async_faults == Some(AsyncFaults::Always);
        assert_eq!(counts.injected > 0, is_told, "{run:?}");
        assert!(counts.injected <= WORK.walkers * WORK.pages, "{run:?}");
        assert_eq!(counts.ready, counts.injected, "{run:?}");
    }
}

#[test]
fn a_wrong_page_is_found() {
    let guest = TaskGuest::new(8).unwrap();
    let mut image = guest.image();
    image[usize::try_from(guest.walked().start).unwrap() + 4096] ^= 1;
    if let Some(run) = run(&guest, image, BY_EXITS, Some(AsyncFaults::Always)) {
        assert_eq!(run.wrong, 1, "{run:?}");
    }
}
