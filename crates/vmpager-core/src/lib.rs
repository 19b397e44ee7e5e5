//! The decisions of vmpager, **without I/O, threads or a clock**.
//!
//! A fault is an address; what must happen next depends only on what is
//! already known of the page. This crate holds that knowledge and takes those
//! decisions; carrying them out (reading sources, `UFFDIO_COPY`, waking vCPUs)
//! is for the crates above.
//!
//! | module | what it decides |
//! |---|---|
//! | [`addr`] | what an address, a page and a range are |
//! | [`convert`] | which pages are private to the guest, and how they become shared |
//! | [`queue`] | the faults of those who cannot exit and have no userfaultfd |
//! | [`slot`] | which slot and page an address belongs to |
//! | [`installer`] | what a thread that installs pages by itself asks for |
//! | [`page_map`] | what state a page is in, for every thread and process that looks |
//! | [`pages`] | what all who install share |
//! | [`present`] | what other processes read of the page map |
//! | [`huge`] | which 2 MiB to make huge pages of |
//! | [`prefetch`] | what to bring in though nobody waits for it: neighbours, strides, a profile, the fill |
//! | [`apf`] | what a guest is told of pages it waits for |
//! | [`engine`] | what to do about a fault, a removal, a finished read |
//! | [`source`] | how page contents are asked for |
#![forbid(unsafe_code)]

pub mod addr;
pub mod apf;
pub mod convert;
pub mod engine;
pub mod huge;
pub mod installer;
pub mod page_map;
pub mod pages;
pub mod prefetch;
pub mod present;
pub mod queue;
pub mod slot;
pub mod source;
mod sync;

pub use addr::{ByteRange, Hva, PageRun, PageSize};
pub use engine::{Engine, FaultPlan, FillPlan, Nearby, Piece, WholePiece};
pub use installer::{PageInstaller, Resolution, WatchedInstaller, Watcher};
pub use page_map::{Content, LoadWords, MapSlot, PageMap, Words};
pub use pages::Pages;
pub use present::{MapError, PresentBits};
pub use slot::{Slot, SlotError, SlotSet};
pub use source::{PageData, PageReader, PageSource, Priority, ReadId, ReadRequest, SourceError};
