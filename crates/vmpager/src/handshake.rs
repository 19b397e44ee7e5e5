//! Firecracker's handler protocol: during `PUT /snapshot/load` the VMM connects
//! and sends, once, a JSON array that describes its memory regions, together
//! with the userfaultfd they are registered with. There is no length prefix and
//! no reply. (`docs/snapshotting/handling-page-faults-on-snapshot-resume.md` in
//! Firecracker's tree; releases from 1.7 on.)
//!
//! A VMM whose memory lies in memfds may say so, for other processes to have it
//! too: each region then has `memfd`, which of the descriptors after the
//! userfaultfd it lies in, `memfd_offset`, where in it, and `gpa_start`.
//!
//! A VMM that would rather map memory that it shares with others
//! ([`clean`](crate::clean)) asks for it before, by an object (`{"clean_pages": true}`)
//! where a handshake is an array, and is answered; its regions then say so, too.
//!
//! The array may arrive in pieces and further arrays may follow, so the bytes
//! are collected in an [`Inbox`] until they make a message. All of it comes
//! from outside: sizes are limited, unknown fields are ignored, and every
//! refusal names the field and the remedy.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use vmpager_core::{Hva, PageSize, Slot};

/// The longest message accepted, in bytes: some 500 regions.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most pieces a message may come in: each costs a look at all of them.
pub const MAX_PIECES: u32 = 4096;
/// The most regions in one message.
pub const MAX_REGIONS: usize = 1024;

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The bytes are not JSON, or JSON of another shape.
    #[error(
        "the handshake is not a JSON array of memory regions: {0}; expected Firecracker's \
         [{{\"base_host_virt_addr\":…,\"size\":…,\"offset\":…,\"page_size\":…}}, …]"
    )]
    Malformed(serde_json::Error),
    /// More bytes than any message may have.
    #[error("the handshake is longer than {MAX_MESSAGE} bytes and still incomplete")]
    TooLong,
    /// More pieces than any message may come in.
    #[error("the handshake came in {MAX_PIECES} pieces and is still incomplete; send it in one")]
    TooManyPieces,
    /// More regions than any VM has.
    #[error("the handshake has {0} memory regions; at most {MAX_REGIONS} are served")]
    TooManyRegions(usize),
    /// A region has no usable page size.
    #[error(
        "region {index}: {field} is {value}; vmpager serves pages of 4096 and 2097152 bytes \
         (the field holds bytes, whatever its name says)"
    )]
    PageSize {
        /// Which region.
        index: usize,
        /// Which of its fields.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Two fields contradict each other.
    #[error(
        "region {index}: page_size is {page_size} but page_size_kib is {page_size_kib}; they must agree"
    )]
    PageSizesDiffer {
        /// Which region.
        index: usize,
        /// One field, in bytes.
        page_size: u64,
        /// The other, in bytes too.
        page_size_kib: u64,
    },
    /// Memory that userfaultfd cannot serve.
    #[error(
        "region {index}: is_guest_memfd is true; guest_memfd memory has no userfaultfd faults. \
         Restore this VM without secret-free or guest_memfd memory"
    )]
    GuestMemfd {
        /// Which region.
        index: usize,
    },
    /// A region does not say all there is to say of memory in a memfd.
    #[error(
        "region {index}: {field} is missing; regions whose memory lies in memfds have memfd and \
         gpa_start, all of them"
    )]
    Memfd {
        /// Which region.
        index: usize,
        /// The field it lacks.
        field: &'static str,
    },
    /// Some regions are of clean pages, others not.
    #[error(
        "region {index}: clean_pages differs from that of region 0; either all memory is a \
         mapping of clean pages, or none"
    )]
    CleanPages {
        /// Which region.
        index: usize,
    },
    /// An object that asks for something else.
    #[error(
        "what came is not a JSON array of memory regions, but an object that asks for nothing; \
         {{\"clean_pages\": true}} asks for clean pages"
    )]
    Question,
    /// The message came without a descriptor.
    #[error(
        "the handshake came without a descriptor; the userfaultfd must be attached to the \
         message as SCM_RIGHTS, and the memfds after it"
    )]
    NoDescriptor,
}

/// A whole handshake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handshake {
    /// The memory.
    pub slots: Vec<Slot>,
    /// Where each of them can be had by other processes; empty if none can.
    pub memfds: Vec<InMemfd>,
    /// Whether they are private mappings of the clean pages it was given.
    pub clean_pages: bool,
}

/// What a peer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It hands memory over.
    Handshake(Handshake),
    /// It asks for the clean pages.
    AsksForCleanPages,
}

/// What asks for clean pages.
#[derive(Debug, Deserialize)]
struct Question {
    clean_pages: Option<bool>,
}

impl Handshake {
    /// How many descriptors belong to it: the userfaultfd and the memfds.
    pub fn descriptors(&self) -> usize {
        self.memfds.iter().map(|at| at.memfd + 1).max().unwrap_or(0) + 1
    }
}

/// Where a region's memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InMemfd {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Which of the descriptors after the userfaultfd it lies in.
    pub memfd: usize,
    /// Where in it, in bytes.
    pub offset: u64,
}

/// A region as Firecracker describes it. Fields it does not have here are
/// ignored: newer releases add some.
#[derive(Debug, Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    /// Bytes. From 1.10 on.
    page_size: Option<u64>,
    /// Bytes too, despite its name. 1.7 to the end of 1.x.
    page_size_kib: Option<u64>,
    is_guest_memfd: Option<bool>,
    /// Guest-physical address.
    gpa_start: Option<u64>,
    memfd: Option<u8>,
    memfd_offset: Option<u64>,
    #[serde(default)]
    clean_pages: bool,
}

impl Region {
    fn page_size(&self, index: usize) -> Result<PageSize, HandshakeError> {
        if let (Some(page_size), Some(page_size_kib)) = (self.page_size, self.page_size_kib)
            && page_size != page_size_kib
        {
            return Err(HandshakeError::PageSizesDiffer { index, page_size, page_size_kib });
        }
        let (field, value) = match (self.page_size, self.page_size_kib) {
            (Some(value), _) => ("page_size", value),
            (None, Some(value)) => ("page_size_kib", value),
            // Releases up to 1.6 knew base pages only.
            (None, None) => return Ok(PageSize::Size4K),
        };
        PageSize::from_bytes(value).ok_or(HandshakeError::PageSize { index, field, value })
    }

    fn slot(&self, index: usize) -> Result<Slot, HandshakeError> {
        if self.is_guest_memfd == Some(true) {
            return Err(HandshakeError::GuestMemfd { index });
        }
        Ok(Slot {
            hva: Hva(self.base_host_virt_addr),
            len: self.size,
            source_offset: self.offset,
            page_size: self.page_size(index)?,
        })
    }

    fn in_memfd(&self, index: usize) -> Result<InMemfd, HandshakeError> {
        let missing = |field| HandshakeError::Memfd { index, field };
        let memfd = self.memfd.ok_or(missing("memfd"))?.into();
        let gpa = self.gpa_start.ok_or(missing("gpa_start"))?;
        Ok(InMemfd { gpa, memfd, offset: self.memfd_offset.unwrap_or(0) })
    }
}

/// Collects the bytes of a connection until they make messages.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    /// How often they were looked at and found incomplete.
    looks: u32,
}

impl Inbox {
    /// Adds bytes as they arrive.
    ///
    /// # Errors
    ///
    /// If they are more than any message may have.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        if self.bytes.len() + bytes.len() > MAX_MESSAGE {
            return Err(HandshakeError::TooLong);
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Whether part of a message waits for the rest.
    pub fn is_partial(&self) -> bool {
        !self.bytes.iter().all(u8::is_ascii_whitespace)
    }

    /// The next whole message; `None` if it has not arrived yet.
    ///
    /// # Errors
    ///
    /// If what arrived cannot become a valid message.
    pub fn next_message(&mut self) -> Result<Option<Said>, HandshakeError> {
        let first = self.bytes.iter().find(|byte| !byte.is_ascii_whitespace());
        if first == Some(&b'{') {
            let question: Option<Question> = self.next_value()?;
            return match question.map(|question| question.clean_pages) {
                None => Ok(None),
                Some(Some(true)) => Ok(Some(Said::AsksForCleanPages)),
                Some(_) => Err(HandshakeError::Question),
            };
        }
        let regions: Option<Vec<Region>> = self.next_value()?;
        regions.map(|regions| handshake(&regions).map(Said::Handshake)).transpose()
    }

    fn next_value<T: DeserializeOwned>(&mut self) -> Result<Option<T>, HandshakeError> {
        let mut stream = serde_json::Deserializer::from_slice(&self.bytes).into_iter();
        let value = match stream.next() {
            None => return Ok(None),
            Some(Ok(value)) => value,
            Some(Err(error)) if error.is_eof() => {
                self.looks += 1;
                let many = self.looks >= MAX_PIECES;
                return if many { Err(HandshakeError::TooManyPieces) } else { Ok(None) };
            }
            Some(Err(error)) => return Err(HandshakeError::Malformed(error)),
        };
        let used = stream.byte_offset();
        self.looks = 0;
        self.bytes.drain(..used);
        Ok(Some(value))
    }
}

fn handshake(regions: &[Region]) -> Result<Handshake, HandshakeError> {
    if regions.len() > MAX_REGIONS {
        return Err(HandshakeError::TooManyRegions(regions.len()));
    }
    let each = || regions.iter().enumerate();
    let clean_pages = regions.first().is_some_and(|region| region.clean_pages);
    if let Some((index, _)) = each().find(|(_, region)| region.clean_pages != clean_pages) {
        return Err(HandshakeError::CleanPages { index });
    }
    let slots = each().map(|(index, region)| region.slot(index)).collect::<Result<_, _>>()?;
    let memfds = match regions.iter().any(|region| region.memfd.is_some()) {
        true => each().map(|(i, region)| region.in_memfd(i)).collect::<Result<_, _>>()?,
        false => Vec::new(),
    };
    Ok(Handshake { slots, memfds, clean_pages })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Option<Handshake>, HandshakeError> {
        let mut inbox = Inbox::default();
        inbox.push(json.as_bytes())?;
        Ok(inbox.next_message()?.map(|said| match said {
            Said::Handshake(handshake) => handshake,
            Said::AsksForCleanPages => panic!("no question"),
        }))
    }

    /// Slots that only their process can map.
    fn private(slots: Vec<Slot>) -> Option<Handshake> {
        Some(Handshake { slots, ..Handshake::default() })
    }

    fn slot(hva: u64, len: u64, source_offset: u64, page_size: PageSize) -> Slot {
        Slot { hva: Hva(hva), len, source_offset, page_size }
    }

    #[test]
    fn what_each_release_sends_is_understood() {
        let base = r#""base_host_virt_addr":140429592887296,"size":3221225472,"offset":0"#;
        let expected = |size| vec![slot(140_429_592_887_296, 3_221_225_472, 0, size)];
        for (extra, size) in [
            ("", PageSize::Size4K),
            (r#","page_size_kib":4096"#, PageSize::Size4K),
            (r#","page_size_kib":2097152"#, PageSize::Size2M),
            (r#","page_size":4096,"page_size_kib":4096"#, PageSize::Size4K),
            (r#","page_size":2097152,"page_size_kib":2097152"#, PageSize::Size2M),
            (r#","page_size":2097152"#, PageSize::Size2M),
            (r#","page_size":4096,"gpa_start":0,"is_guest_memfd":false"#, PageSize::Size4K),
        ] {
            let slots = parse(&format!("[{{{base}{extra}}}]")).expect(extra);
            assert_eq!(slots, private(expected(size)), "{extra}");
        }
    }

    #[test]
    fn a_message_in_pieces_is_whole_only_at_its_end() {
        let json = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0}]"#;
        let mut inbox = Inbox::default();
        for (i, byte) in json.bytes().enumerate() {
            assert_eq!(inbox.next_message().expect("a prefix is no error"), None, "byte {i}");
            inbox.push(&[byte]).expect("short");
        }
        assert!(inbox.is_partial());
        assert!(matches!(
            inbox.next_message().expect("whole"),
            Some(Said::Handshake(it)) if it.slots.len() == 1
        ));
        assert!(!inbox.is_partial());
    }

    #[test]
    fn memory_in_memfds_says_where() {
        let region = |extra: &str| {
            format!(r#"{{"base_host_virt_addr":4096,"size":4096,"offset":0{extra}}}"#)
        };
        let first = region(r#","gpa_start":0,"memfd":1"#);
        let other = region(r#","gpa_start":4294967296,"memfd":0,"memfd_offset":8192"#);
        let handshake = parse(&format!("[{first},{other}]")).expect("valid").expect("whole");
        assert_eq!(handshake.memfds[0], InMemfd { gpa: 0, memfd: 1, offset: 0 });
        assert_eq!(handshake.memfds[1], InMemfd { gpa: 1 << 32, memfd: 0, offset: 8192 });
        assert_eq!(handshake.descriptors(), 3);
        assert_eq!(Handshake::default().descriptors(), 1);
    }

    #[test]
    fn clean_pages_are_asked_for_and_then_named_by_all_regions() {
        let region = |extra: &str| {
            format!(r#"{{"base_host_virt_addr":4096,"size":4096,"offset":0{extra}}}"#)
        };
        let (clean, other) = (region(r#","clean_pages":true"#), region(""));
        let mut inbox = Inbox::default();
        let question = br#" {"clean_pages" : true, "more": [1]}"#;
        for (i, byte) in question.iter().enumerate() {
            assert_eq!(inbox.next_message().expect("a prefix is no error"), None, "byte {i}");
            inbox.push(&[*byte]).expect("short");
        }
        inbox.push(format!("[{clean},{clean}]").as_bytes()).expect("short");
        assert_eq!(inbox.next_message().expect("whole"), Some(Said::AsksForCleanPages));
        let Some(Said::Handshake(handshake)) = inbox.next_message().expect("whole") else {
            panic!("no handshake")
        };
        assert!(handshake.clean_pages && handshake.slots.len() == 2);
        assert!(!parse(&format!("[{other}]")).expect("valid").expect("whole").clean_pages);
        let error = parse(&format!("[{other},{clean}]")).expect_err("mixed").to_string();
        assert!(error.contains("region 1: clean_pages"), "{error}");
    }

    #[test]
    fn two_messages_in_one_piece_are_two() {
        let one = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0}]"#;
        let mut inbox = Inbox::default();
        inbox.push(format!("{one}\n{one}").as_bytes()).expect("short");
        assert!(inbox.next_message().expect("first").is_some());
        assert!(inbox.next_message().expect("second").is_some());
        assert!(inbox.next_message().expect("nothing more").is_none());
    }

    #[test]
    fn refusals_name_field_value_and_remedy() {
        let region = |extra: &str| {
            format!(r#"[{{"base_host_virt_addr":4096,"size":4096,"offset":0{extra}}}]"#)
        };
        for (json, words) in [
            ("nonsense".into(), vec!["not a JSON array", "expected Firecracker's"]),
            (r#"{"a":1}"#.into(), vec!["not a JSON array"]),
            (r#"[{"size":1}]"#.into(), vec!["base_host_virt_addr"]),
            (r#"[{"base_host_virt_addr":-1,"size":1,"offset":0}]"#.into(), vec!["-1"]),
            (region(r#","page_size":12345"#), vec!["region 0", "page_size", "12345", "4096"]),
            (region(r#","page_size_kib":4"#), vec!["page_size_kib", "4", "bytes"]),
            (region(r#","page_size":4096,"page_size_kib":4"#), vec!["must agree"]),
            (region(r#","is_guest_memfd":true"#), vec!["is_guest_memfd", "Restore"]),
            (region(r#","memfd":0"#), vec!["region 0", "gpa_start is missing"]),
            (region(r#","memfd":256,"gpa_start":0"#), vec!["256"]),
            (
                r#"[{"base_host_virt_addr":0,"size":1,"offset":0,"gpa_start":0,"memfd":0},
                    {"base_host_virt_addr":0,"size":1,"offset":0}]"#
                    .into(),
                vec!["region 1", "memfd is missing"],
            ),
        ] {
            let error = parse(&json).expect_err(&json).to_string();
            for word in words {
                assert!(error.contains(word), "{json}: {error:?} does not say {word:?}");
            }
        }
    }

    #[test]
    fn length_and_number_of_regions_are_limited() {
        let mut inbox = Inbox::default();
        assert!(inbox.push(&vec![b'['; MAX_MESSAGE]).is_ok());
        assert!(matches!(inbox.push(b"["), Err(HandshakeError::TooLong)));

        let mut inbox = Inbox::default();
        inbox.push(b"[").expect("short");
        for _ in 1..MAX_PIECES {
            assert_eq!(inbox.next_message().expect("a prefix is no error"), None);
            inbox.push(b" ").expect("short");
        }
        assert!(matches!(inbox.next_message(), Err(HandshakeError::TooManyPieces)));

        let region = r#"{"base_host_virt_addr":0,"size":0,"offset":0},"#.repeat(MAX_REGIONS + 1);
        let json = format!("[{}]", region.trim_end_matches(','));
        assert!(matches!(parse(&json), Err(HandshakeError::TooManyRegions(_))));
    }
}
