//! Work on many items by some threads.

use std::sync::{Mutex, PoisonError};

use crossbeam_channel::bounded;

use super::error::ImageError;

/// Does `work` with each item on several threads, each with a state of its own,
/// and hands the results to `each`, in any order, until one of them fails.
pub(crate) fn for_each<I, S, R: Send>(
    threads: usize,
    items: impl Iterator<Item = I> + Send,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I) -> Result<R, ImageError> + Sync,
    mut each: impl FnMut(R) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let items = Mutex::new(items.fuse());
    let (sender, receiver) = bounded(2 * threads);
    std::thread::scope(|scope| {
        // Dropped when this returns, upon which the threads end.
        let receiver = receiver;
        for _ in 0..threads {
            let sender = sender.clone();
            let (items, state, work) = (&items, &state, &work);
            scope.spawn(move || {
                let mut state = state();
                let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
                while let Some(item) = next() {
                    if sender.send(work(&mut state, item)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        receiver.iter().try_for_each(|result| each(result?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_once() {
        let mut sum = 0;
        let work = |_: &mut (), item: u64| Ok(item);
        for_each(
            4,
            0..1000,
            || (),
            work,
            |item| {
                sum += item;
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(sum, 999 * 1000 / 2);
    }

    #[test]
    fn the_first_failure_ends_it() {
        let failing = |_: &mut (), item: u64| {
            if item == 5 { Err(ImageError::Interrupted) } else { Ok(item) }
        };
        let result = for_each(3, 0.., || (), failing, |_| Ok(()));
        assert!(matches!(result, Err(ImageError::Interrupted)));
        let result =
            for_each(3, 0.., || (), |(), item| Ok(item), |_: u64| Err(ImageError::Interrupted));
        assert!(matches!(result, Err(ImageError::Interrupted)));
    }
}
