//! A VMM's guest memory, kept by the `vm-memory` crate, restored on demand.
//!
//! ```sh
//! cargo run --release --example vm_memory -p vmpager
//! ```
//!
//! A VMM built from rust-vmm crates has a `GuestMemoryMmap`, usually of
//! several regions. To restore it from a snapshot it would read the file into
//! it and start when that is done; with a pager it starts at once, and each
//! page comes when the guest first touches it, while the rest is filled in
//! behind its back.

use std::io::Write;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmpager::store::RawFile;
use vmpager::{Pager, PagerError};

/// Two regions, as on x86-64 with a hole below 4 GiB.
const REGIONS: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 96 << 20), (GuestAddress(4 << 30), 32 << 20)];
const PAGE: u64 = 4096;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The snapshot: a file that holds the regions one after another, here each
    // page filled with words that tell where it belongs.
    let mut snapshot = tempfile::NamedTempFile::new()?;
    for (base, len) in REGIONS {
        for page in 0..len as u64 / PAGE {
            snapshot.write_all(&word(base.0 + page * PAGE).to_le_bytes().repeat(512))?;
        }
    }

    // The VMM makes its memory as it always does, and leaves it empty.
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&REGIONS)?;

    // From here on the guest may run.
    let begin = Instant::now();
    let pager = Pager::builder(RawFile::open(snapshot.path())?)
        .guest_memory(&memory)
        .background_fill(true)
        .start();
    let pager = match pager {
        Err(error @ PagerError::Userfaultfd(_)) => {
            println!("skipped: {error}");
            return Ok(());
        }
        other => other?,
    };
    let ready = begin.elapsed();

    // A device model, or a vCPU, reads whatever it likes: the page is there
    // before the read returns.
    let far = GuestAddress((4 << 30) + (17 << 20));
    let touch = Instant::now();
    let seen: u64 = memory.read_obj(far)?;
    println!("memory usable after {ready:?}; a page far away came in {:?}", touch.elapsed());
    assert_eq!(seen, word(far.0));

    // What the guest writes stays, whatever the pager brings in around it.
    memory.write_obj(0xfeed_u64, GuestAddress(5 * PAGE))?;

    // Once all of it is there the pager lets go: no fault and no cost any more.
    if !pager.wait_filled(Duration::from_secs(60)) {
        return Err(format!("not filled: {:?}", pager.stats()).into());
    }
    println!("all {} MiB in place after {:?}", 128, begin.elapsed());
    for (base, len) in REGIONS {
        for page in 0..len as u64 / PAGE {
            let at = base.0 + page * PAGE;
            let seen: u64 = memory.read_obj(GuestAddress(at))?;
            let expected = if at == 5 * PAGE { 0xfeed } else { word(at) };
            assert_eq!(seen, expected, "at {at:#x}");
        }
    }
    let stats = pager.stats();
    println!(
        "{} faults; {} pages on demand, {} with a neighbour, {} in the background",
        stats.faults, stats.pages_demand, stats.pages_neighbour, stats.pages_fill
    );
    Ok(())
}

/// What a page of the snapshot is filled with: no page is like another.
fn word(gpa: u64) -> u64 {
    gpa | 1
}
