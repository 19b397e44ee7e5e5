//! VMs whose memory is a mapping of the clean pages.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmpager_core::PageSize;
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::Features;

use crate::clean::{Answer, CleanPages};
use crate::handshake::Handshake;
use crate::served::Served;

/// Gives a peer the clean pages it asks for.
///
/// # Errors
///
/// If there are none, or the peer does not listen.
pub(super) fn answer(peer: BorrowedFd<'_>, clean: Option<&Arc<CleanPages>>) -> Result<(), String> {
    let clean = clean.ok_or("it asks for clean pages; start the pager with --share-clean")?;
    let answer = Answer { clean_pages: clean.len() };
    let mut answer = serde_json::to_vec(&answer).map_err(|error| error.to_string())?;
    answer.push(b'\n');
    match send_with_fds(peer, &answer, &[clean.lent()]) {
        Ok(sent) if sent == answer.len() => Ok(()),
        Ok(sent) => Err(format!("of the answer with the clean pages it took {sent} bytes")),
        Err(error) => Err(format!("giving it the clean pages: {error}")),
    }
}

/// Has a memory served from clean pages, if its handshake says that it is made of them.
///
/// # Errors
///
/// If it cannot be.
pub(super) fn adapt(
    served: Served,
    handshake: &Handshake,
    clean: Option<&Arc<CleanPages>>,
) -> Result<Served, (Box<Served>, String)> {
    if !handshake.clean_pages {
        return Ok(served);
    }
    let needed = Features::EVENT_REMOVE.union(Features::MINOR_SHMEM);
    let problem = match clean {
        None => "it has memory of clean pages; start the pager with --share-clean".to_owned(),
        Some(_) if handshake.slots.iter().any(|slot| slot.page_size != PageSize::Size4K) => {
            "clean_pages goes with pages of 4096 bytes".to_owned()
        }
        Some(_) if !handshake.memfds.is_empty() => {
            "memory of clean pages is its VM's alone: memfd does not go with clean_pages".to_owned()
        }
        Some(_) if !served.features().contains(needed) => {
            "memory of clean pages needs a userfaultfd with UFFD_FEATURE_EVENT_REMOVE and \
             UFFD_FEATURE_MINOR_SHMEM"
                .to_owned()
        }
        Some(clean) => match clean.id() {
            Ok(id) => return Ok(served.of_clean_pages(clean.clone(), id)),
            Err(error) => format!("the clean pages: {error}"),
        },
    };
    Err((Box::new(served), problem))
}

/// What a memory that is taken over is made of: the clean pages of that name, if it has one.
///
/// # Errors
///
/// If they are not those that there are.
pub(super) fn of_memory(
    id: u64,
    clean: Option<&Arc<CleanPages>>,
) -> Result<Option<(Arc<CleanPages>, u64)>, String> {
    if id == 0 {
        return Ok(None);
    }
    match clean {
        Some(clean) if clean.id().is_ok_and(|has| has == id) => Ok(Some((clean.clone(), id))),
        _ => Err("it is made of clean pages that this daemon does not have".into()),
    }
}
