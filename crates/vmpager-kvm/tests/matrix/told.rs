//! Asynchronous page faults on a real vCPU, in each situation in which they may go
//! wrong, by each mechanism that makes the exits.

use std::thread;

use vmpager_core::apf::{IN_FLIGHT, Refusal};
use vmpager_kvm::exit::Mechanism;

use super::telling::{AREA, INPUT, OTHER_AREA, STRING_PORT, Step, Task, World, content};
use super::{BOTH, INTERRUPTS, PAGE, modes, only_ring_3};

const SLOW: u64 = 0x28_0000;
const AREA_PAGE: u64 = AREA & !0xfff;
/// A word in that page which is 0, for tasks that read something.
const IDLE: u64 = AREA_PAGE + 0x800;

fn slow(number: u64) -> u64 {
    SLOW + number * PAGE
}

/// A test for each mechanism there is, of a guest with so many slow pages, whose
/// device is on and has woken all.
fn with(pages: u64, test: impl Fn(&mut World)) {
    let pages: Vec<u64> = (0..pages).map(slow).collect();
    for mechanism in BOTH {
        if let Some(mut world) = World::new(mechanism, &pages) {
            wake_all(&mut world);
            test(&mut world);
        }
    }
}

/// The same where a processor does what the guest's kernel does.
fn with_kernel(pages: u64, test: impl Fn(&mut World)) {
    match vmpager_kvm::probe::kvm().map(|kvm| only_ring_3(&kvm)) {
        Ok(None) => with(pages, test),
        Ok(Some(why)) => vmpager_testing::skipped(why),
        Err(error) => vmpager_testing::skipped(&error.to_string()),
    }
}

/// The first that a guest hears of its device.
fn wake_all(world: &mut World) {
    let step = world.read(IDLE);
    let task = ready(step, u32::MAX);
    world.take();
    ends(world.go_on(&task), 0);
}

fn ends(step: Step, read: u64) {
    assert!(matches!(step, Step::End(value) if value == read), "{}", step.name());
}

fn ready(step: Step, token: u32) -> Task {
    match step {
        Step::Ready(word, task) if word == token => task,
        other => panic!("{}, not ready {token:#x}", other.name()),
    }
}

fn parks(step: Step) {
    assert!(matches!(step, Step::Parked), "{}", step.name());
}

fn waits(step: Step) {
    assert!(matches!(step, Step::Waits), "{}", step.name());
}

/// So far the guest was told of so many faults, and that so many pages came.
fn told(world: &World, injected: u64, posted: u64) {
    let counts = world.stats().counts;
    assert_eq!((counts.injected, counts.ready), (injected, posted), "{counts:?}");
}

#[test]
fn another_task_runs_until_the_page_is_ready() {
    with(2, |world| {
        let (token, task) = world.read(slow(0)).told();
        ends(world.read(IDLE), 0);
        world.pages.release(slow(0));
        let other = ready(world.read(IDLE), token);
        world.take();
        ends(world.go_on(&other), 0);
        ends(world.go_on(&task), content(slow(0)));
        told(world, 1, 1);
    });
}

/// Nothing could be told of it before: for one vCPU that costs an exit less.
#[test]
fn for_a_page_that_comes_while_a_token_is_not_acknowledged_nobody_calls() {
    with(2, |world| {
        let (first, one) = world.read(slow(0)).told();
        let (second, two) = world.read(slow(1)).told();
        world.pages.release(slow(0));
        assert_eq!(world.calls(), 1);
        let other = ready(world.read(IDLE), first);
        world.pages.release(slow(1));
        assert_eq!(world.calls(), 1);
        world.take();
        let other = ready(world.go_on(&other), second);
        world.take();
        ends(world.go_on(&other), 0);
        ends(world.go_on(&one), content(slow(0)));
        ends(world.go_on(&two), content(slow(1)));
        told(world, 2, 2);
    });
}

#[test]
fn with_interrupts_off_the_vcpu_waits() {
    with(1, |world| {
        waits(world.read_with(slow(0), |regs| regs.rflags &= !INTERRUPTS));
        world.pages.release(slow(0));
        ends(world.run(), content(slow(0)));
        assert_eq!(world.refused(Refusal::InterruptsOff), 1);
        told(world, 0, 0);
    });
}

#[test]
fn in_the_kernel_the_vcpu_is_parked() {
    with_kernel(1, |world| {
        parks(world.read_in_kernel(slow(0)));
        world.pages.release(slow(0));
        ends(world.run(), content(slow(0)));
        assert_eq!(world.refused(Refusal::Kernel), 1);
        told(world, 0, 0);
    });
}

/// An interrupt that the task raises itself, and an exception, whose stack is missing.
#[test]
fn during_the_delivery_of_an_event_the_vcpu_waits() {
    const STACK: u64 = modes::IST_STACK - PAGE;
    // int 0x80; ud2
    for code in [b"\xcd\x80", b"\x0f\x0b"] {
        with_kernel(1, |world| {
            if world.is_by(Mechanism::Attributes) {
                // A page that was given back is the userfaultfd's there.
                return;
            }
            world.pages.take_away(STACK);
            waits(world.execute(code, |_| ()));
            world.pages.release(STACK);
            let step = world.run();
            assert!(matches!(step, Step::Event), "{}", step.name());
            assert_eq!(world.refused(Refusal::Event), 1);
            told(world, 0, 0);
        });
    }
}

/// Missing when another page is, when it is touched itself, and when a page came.
#[test]
fn the_page_of_the_area_itself_may_be_missing() {
    with(2, |world| {
        if world.is_by(Mechanism::Attributes) {
            return;
        }
        world.pages.take_away(AREA_PAGE);
        parks(world.read(slow(0)));
        world.pages.release(slow(0));
        ends(world.run(), content(slow(0)));
        parks(world.read(IDLE));
        world.pages.release(AREA_PAGE);
        ends(world.run(), 0);
        assert_eq!(world.refused(Refusal::AreaMissing), 2);
        told(world, 0, 0);

        let (token, task) = world.read(slow(1)).told();
        world.pages.take_away(AREA_PAGE);
        world.pages.release(slow(1));
        // The word is looked at before the next entry, which waits for it.
        let pages = world.pages.clone();
        thread::scope(|scope| {
            scope.spawn(|| {
                pages.wait_until_asked(AREA_PAGE);
                pages.release(AREA_PAGE);
            });
            let other = ready(world.read(slow(0)), token);
            world.take();
            ends(world.go_on(&other), content(slow(0)));
        });
        ends(world.go_on(&task), content(slow(1)));
        told(world, 1, 1);
    });
}

/// KVM itself reads and writes the memory of these, and waits for it: nobody is told
/// of that, and a page that comes meanwhile is told of afterwards.
#[test]
fn during_a_string_of_input_or_output_kvm_waits() {
    // rep outsb; rep insb
    for (code, is_output) in [(b"\xf3\x6e", true), (b"\xf3\x6c", false)] {
        with(2, |world| {
            let (token, task) = world.read(slow(0)).told();
            let pages = world.pages.clone();
            let step = thread::scope(|scope| {
                scope.spawn(|| {
                    pages.wait_until_asked(slow(1));
                    pages.release(slow(0));
                    pages.release(slow(1));
                });
                world.execute(code, |regs| {
                    (regs.rsi, regs.rdi) = (slow(1), slow(1));
                    (regs.rcx, regs.rdx) = (8, STRING_PORT.into());
                })
            });
            // Told of between two bytes, or by the next entry.
            let step = match step {
                Step::Ready(..) => {
                    let string = ready(step, token);
                    world.take();
                    world.go_on(&string)
                }
                step => step,
            };
            assert!(matches!(step, Step::End(_)), "{}", step.name());
            if is_output {
                assert_eq!(world.said, content(slow(1)).to_le_bytes());
            } else {
                let mut heard = [0; 8];
                pages.memory.read(super::offset(slow(1)), &mut heard);
                assert_eq!(heard, [INPUT; 8]);
            }
            if world.stats().counts.ready == 0 {
                let idle = ready(world.read(IDLE), token);
                world.take();
                ends(world.go_on(&idle), 0);
            }
            ends(world.go_on(&task), content(slow(0)));
            told(world, 1, 1);
        });
    }
}

/// In the middle of an instruction that repeats, which goes on there.
#[test]
fn during_a_string_move_the_guest_is_told() {
    with(2, |world| {
        world.pages.release(slow(0));
        // rep movsb, over the end of the page
        let step = world.execute(b"\xf3\xa4", |regs| {
            (regs.rsi, regs.rdi) = (slow(1) - 16, 0x20_0000);
            regs.rcx = 24;
        });
        let (token, task) = step.told();
        world.pages.release(slow(1));
        let step = world.go_on(&task);
        let task = ready(step, token);
        world.take();
        let step = world.go_on(&task);
        assert!(matches!(step, Step::End(_)), "{}", step.name());
        assert_eq!(world.pages.memory.read_u64(0x20_0010), content(slow(1)));
        told(world, 1, 1);
    });
}

/// And a second task on a page that the guest was told of parks, as the last does.
#[test]
fn of_64_pages_the_guest_is_told_and_for_the_65th_the_vcpu_parks() {
    let last = IN_FLIGHT as u64;
    with(last + 1, |world| {
        let mut asleep: Vec<(u32, Task)> = Vec::new();
        for number in 0..last {
            asleep.push(world.read(slow(number)).told());
        }
        parks(world.read(slow(7)));
        assert_eq!(world.refused(Refusal::InFlight), 1);
        parks(world.read(slow(last)));
        assert_eq!(world.refused(Refusal::Full), 1);
        // One comes, which makes room for the one that is parked.
        world.pages.release(slow(5));
        let (token, task) = asleep.remove(5);
        let parked = ready(world.run(), token);
        world.take();
        asleep.push(world.go_on(&parked).told());
        ends(world.go_on(&task), content(slow(5)));
        // In another order than that in which they were missed.
        let order = |number: u64| (number * 29) % (last + 1);
        (0..=last).filter(|n| order(*n) != 5).for_each(|n| world.pages.release(slow(order(n))));
        wake(world, asleep);
        told(world, last + 1, last + 1);
    });
}

/// The guest goes on until all of these tasks have ended.
fn wake(world: &mut World, mut asleep: Vec<(u32, Task)>) {
    let (mut step, mut reads) = (world.read(IDLE), IDLE);
    let mut runnable = Vec::new();
    loop {
        match step {
            Step::Ready(token, interrupted) => {
                world.take();
                let at = asleep.iter().position(|(sleeps_on, _)| *sleeps_on == token);
                runnable.push(interrupted);
                runnable.push(asleep.remove(at.expect("a sleeper")).1);
            }
            step => ends(step, if reads == IDLE { 0 } else { content(reads) }),
        }
        let Some(task) = runnable.pop() else { break };
        reads = task.reads();
        step = world.go_on(&task);
    }
    assert!(asleep.is_empty(), "{} sleep for ever", asleep.len());
}

#[test]
fn a_page_that_comes_while_the_guest_is_about_to_be_told_is_not_told() {
    with(1, |world| {
        world.pages.release_when_looked_at(slow(0));
        ends(world.read(slow(0)), content(slow(0)));
        told(world, 0, 0);
    });
}

#[test]
fn what_comes_after_the_device_was_turned_off_is_not_told() {
    with(2, |world| {
        let tasks = [world.read(slow(0)).told(), world.read(slow(1)).told()];
        world.turn_off();
        world.pages.release(slow(0));
        world.pages.release(slow(1));
        for (number, (_, task)) in (0..).zip(&tasks) {
            ends(world.go_on(task), content(slow(number)));
        }
        told(world, 2, 0);
        assert_eq!(world.stats().counts.late, 2);
    });
}

/// Another kernel, with an area of its own, hears of nothing from before.
#[test]
fn turned_on_anew_the_device_wakes_all_and_knows_nothing_of_before() {
    with(3, |world| {
        let (old, _) = world.read(slow(0)).told();
        let (posted, _) = world.read(slow(1)).told();
        // One is on its way, and not taken.
        world.pages.release(slow(1));
        let _ = ready(world.read(IDLE), posted);
        world.end_interrupt();
        world.turn_on(OTHER_AREA);
        world.pages.release(slow(0));
        wake_all(world);
        let (new, task) = world.read(slow(2)).told();
        assert!(new != old && new != posted, "{new:#x}");
        world.pages.release(slow(2));
        let task = ready(world.go_on(&task), new);
        world.take();
        ends(world.go_on(&task), content(slow(2)));
        told(world, 3, 2);
        assert_eq!(world.stats().counts.late, 1);
    });
}

/// INIT turns the device off, and nothing says so.
#[test]
fn after_an_init_with_tasks_asleep_nobody_is_told() {
    with(2, |world| {
        let (old, _) = world.read(slow(0)).told();
        world.send_init();
        let step = world.run();
        assert!(matches!(step, Step::Reset), "{}", step.name());
        world.pages.release(slow(0));
        for _ in 0..3 {
            let step = world.run();
            assert!(matches!(step, Step::Reset), "{}", step.name());
        }
        told(world, 1, 0);
        assert_eq!(world.stats().inits, 1);
        // Its kernel turns all on again.
        world.turn_on_local_apic();
        world.turn_on(AREA);
        wake_all(world);
        let (new, task) = world.read(slow(1)).told();
        assert_ne!(new, old);
        world.pages.release(slow(1));
        let task = ready(world.go_on(&task), new);
        world.take();
        ends(world.go_on(&task), content(slow(1)));
        told(world, 2, 1);
    });
}
