use std::time::Duration;

use super::*;
use crate::remote::Problem;

/// Two objects of 100 frames of 1000 bytes each; every tenth frame is far from the
/// one before.
struct Two;

impl Places for Two {
    fn object_of(&self, frame: u32) -> usize {
        frame as usize / 100
    }

    fn frames_of(&self, object: usize) -> Range<u32> {
        let first = u32::try_from(object).unwrap() * 100;
        first..first + 100
    }

    fn place(&self, frame: u32) -> Range<u64> {
        let start = u64::from(frame % 100) * 1000 + u64::from(frame % 100 / 10) * 2 * GAP;
        start..start + 1000
    }
}

fn error() -> RemoteError {
    RemoteError { url: "u".into(), problem: Problem::NoRanges }
}

fn ask(queue: &mut Queue<u32>) -> Option<Batch> {
    match queue.next(&Two, |_| None) {
        Next::Ask(batch) => Some(batch),
        Next::Wait(_) => None,
    }
}

fn packed() -> Packed {
    Arc::new(vec![0; 1000])
}

fn want(queue: &mut Queue<u32>, frames: &[u32], priority: Priority, who: u32) {
    assert!(queue.want(frames, priority, Instant::now(), &Two, who).is_none());
}

#[test]
fn the_most_urgent_goes_first_and_takes_its_neighbours_along() {
    let mut queue = Queue::new();
    want(&mut queue, &[30, 31, 33], Priority::Fill, 1);
    want(&mut queue, &[75], Priority::Prefetch, 2);
    want(&mut queue, &[5], Priority::Demand, 3);
    want(&mut queue, &[6, 9, 10, 105], Priority::Fill, 4);
    let frames = |batch: Batch| (batch.object, batch.frames, batch.priority);
    let mut asked = || frames(ask(&mut queue).unwrap());
    assert_eq!(asked(), (0, 5..10, Priority::Demand), "not over the gap");
    assert_eq!(asked(), (0, 75..76, Priority::Prefetch));
    assert_eq!(asked(), (0, 30..34, Priority::Fill));
    assert_eq!(asked(), (0, 10..11, Priority::Fill));
    assert_eq!(asked(), (1, 105..106, Priority::Fill));
    assert!(ask(&mut queue).is_none());
}

#[test]
fn each_frame_is_asked_for_once_and_goes_to_all_who_want_it() {
    let mut queue = Queue::new();
    want(&mut queue, &[1, 2], Priority::Fill, 1);
    let batch = ask(&mut queue).unwrap();
    want(&mut queue, &[2], Priority::Demand, 2);
    assert!(ask(&mut queue).is_none(), "it is on its way");
    assert_eq!(queue.arrived(1, &packed()).len(), 0);
    let ended = queue.arrived(2, &packed());
    let mut who: Vec<_> = ended.iter().map(|ended| ended.who).collect();
    who.sort_unstable();
    assert_eq!(who, [1, 2]);
    assert!(ended.iter().all(|ended| ended.result.as_ref().unwrap().contains_key(&2)));
    queue.request_ended(&batch);
    assert_eq!((queue.ahead_bytes, queue.running), (0, [0; 3]));
}

#[test]
fn the_fill_leaves_room_for_demands() {
    let mut queue = Queue::new();
    for nth in 0..9 {
        // Far from each other.
        want(&mut queue, &[nth * 10], Priority::Fill, nth);
    }
    let fills = std::iter::from_fn(|| ask(&mut queue)).count();
    assert_eq!(fills, FILL_REQUESTS);
    queue.promote(80, Priority::Demand);
    assert_eq!(ask(&mut queue).unwrap().frames, 80..81);
}

#[test]
fn those_who_wait_too_long_are_told_of_whatever_is_on_its_way() {
    let mut queue = Queue::new();
    let (early, late) = (Instant::now(), Instant::now() + Duration::from_secs(1));
    assert!(queue.want(&[1, 2], Priority::Demand, early, &Two, 1).is_none());
    assert!(queue.want(&[50], Priority::Fill, late, &Two, 2).is_none());
    assert!(queue.prefetch(60, early, &Two), "nobody waits for it");
    let batch = ask(&mut queue).unwrap();
    assert_eq!((queue.longest(), queue.late(early)), (Some(early), vec![1, 2]));
    let ended: Vec<_> = [1, 2].into_iter().flat_map(|it| queue.give_up(it, &error())).collect();
    assert_eq!(ended.len(), 1, "one waited for both");
    assert_eq!((queue.longest(), queue.late(early)), (Some(late), vec![]));
    // What comes all the same is kept for the next one.
    assert!(queue.arrived(1, &packed()).is_empty());
    assert!(queue.take_staged(1).is_some());
    queue.request_ended(&batch);
    assert!(queue.failed(2..3, 0..100, false, &error()).is_empty());
    assert_eq!(queue.running, [0; 3]);
}

#[test]
fn what_failed_is_asked_for_again_until_somebody_gives_up() {
    let mut queue = Queue::new();
    want(&mut queue, &[1, 2], Priority::Demand, 1);
    let batch = ask(&mut queue).unwrap();
    queue.request_ended(&batch);
    assert!(queue.failed(1..3, 0..100, false, &error()).is_empty());
    assert_eq!(ask(&mut queue).unwrap(), batch);
    queue.request_ended(&batch);
    let ended = queue.failed(1..3, 0..100, true, &error());
    assert_eq!(ended.len(), 1, "one waited for both");
    assert!(ended[0].result.is_err() && ask(&mut queue).is_none());
    assert!(queue.tickets.is_empty() && queue.ahead_bytes == 0);
}

#[test]
fn servers_that_are_left_alone_keep_no_other_waiting() {
    let mut queue = Queue::new();
    want(&mut queue, &[1], Priority::Demand, 1);
    want(&mut queue, &[101], Priority::Fill, 2);
    let until = Instant::now();
    let away = |object: usize| (object == 0).then_some(until);
    let Next::Ask(batch) = queue.next(&Two, away) else { panic!("one is not away") };
    assert_eq!(batch.object, 1);
    assert_eq!(queue.next(&Two, away), Next::Wait(Some(until)));
}

#[test]
fn what_nobody_asked_for_yet_is_bounded_and_given_once() {
    let mut queue: Queue<u32> = Queue::new();
    let now = Instant::now();
    assert!(queue.prefetch(7, now, &Two) && queue.prefetch(7, now, &Two));
    assert_eq!(queue.ahead_bytes, 1000);
    let batch = ask(&mut queue).unwrap();
    queue.arrived(7, &packed());
    queue.request_ended(&batch);
    assert_eq!(queue.ahead_bytes, 1000, "staged");
    let got = queue.want(&[7], Priority::Demand, now, &Two, 1).unwrap();
    assert!(got.result.unwrap().contains_key(&7));
    assert_eq!((queue.ahead_bytes, queue.staged.len()), (0, 0));

    let large = Arc::new(vec![0; STAGED_BYTES / 4]);
    for frame in 0..100 {
        queue.arrived(frame, &large);
        assert!(queue.ahead_bytes <= STAGED_BYTES);
    }
    assert_eq!(queue.staged.len(), 4);
    assert!(queue.staged.contains_key(&99) && queue.staged_order.len() < 100);
    assert!(!queue.prefetch(150, now, &Two), "there is no room");
    // A fetch ahead that fails is forgotten.
    queue.take_staged(99);
    assert!(queue.prefetch(150, now, &Two));
    let batch = ask(&mut queue).unwrap();
    assert!(queue.failed(batch.frames, 100..200, false, &error()).is_empty());
    assert!(queue.wanted.is_empty() && queue.turns.is_empty());
}

/// Any order of events leaves nothing behind, and everybody gets what he wants.
#[test]
fn random_orders_of_events_end_with_nothing_left() {
    let mut state = 7_u64;
    let mut draw = move |below: u32| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u32::try_from(state % u64::from(below)).unwrap()
    };
    let mut queue = Queue::new();
    let (mut running, mut waiting, mut next): (Vec<Batch>, Vec<u32>, u32) = Default::default();
    let end = |waiting: &mut Vec<u32>, ended: Vec<Ended<u32>>| {
        for Ended { who, .. } in ended {
            let at = waiting.iter().position(|waits| *waits == who).unwrap();
            waiting.swap_remove(at);
        }
    };
    for step in 0..20_000 {
        match draw(if step < 15_000 { 7 } else { 2 }) {
            0 => running.extend(ask(&mut queue)),
            1 if !running.is_empty() => {
                let at = draw(u32::try_from(running.len()).unwrap()) as usize;
                let batch = running.swap_remove(at);
                queue.request_ended(&batch);
                let cut = batch.frames.start + draw(u32::try_from(batch.frames.len()).unwrap() + 1);
                for frame in batch.frames.start..cut {
                    end(&mut waiting, queue.arrived(frame, &packed()));
                }
                let object = Two.frames_of(batch.object);
                let late = draw(10) == 0;
                let failed = queue.failed(cut..batch.frames.end, object, late, &error());
                end(&mut waiting, failed);
            }
            2 | 3 => {
                let first = draw(190);
                let frames: Vec<u32> = (first..first + 1 + draw(10)).collect();
                let priority =
                    [Priority::Fill, Priority::Prefetch, Priority::Demand][draw(3) as usize];
                waiting.push(next);
                let ended = queue.want(&frames, priority, Instant::now(), &Two, next);
                end(&mut waiting, ended.into_iter().collect());
                next += 1;
            }
            4 => queue.promote(draw(200), Priority::Demand),
            5 if draw(20) == 0 => {
                for frame in queue.late(Instant::now()) {
                    end(&mut waiting, queue.give_up(frame, &error()));
                }
            }
            6 => {
                queue.prefetch(draw(200), Instant::now(), &Two);
            }
            _ => {}
        }
        assert!(running.len() <= REQUESTS);
    }
    while let Some(batch) = running.pop().or_else(|| {
        let batch = ask(&mut queue);
        if let Some(batch) = &batch {
            queue.request_ended(batch);
        }
        batch
    }) {
        for frame in batch.frames {
            end(&mut waiting, queue.arrived(frame, &packed()));
        }
        queue.running = [0; 3];
    }
    assert!(waiting.is_empty(), "{waiting:?}");
    assert!(queue.wanted.is_empty() && queue.turns.is_empty() && queue.tickets.is_empty());
    let staged: usize = queue.staged.values().map(|packed| packed.len()).sum();
    assert_eq!(queue.ahead_bytes, staged);
}
