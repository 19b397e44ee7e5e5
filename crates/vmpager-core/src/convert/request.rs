//! What is asked for, and what is refused.

use std::fmt;
use std::ops::Range;

use super::PAGE_BYTES;

/// Who can reach a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The guest and the host.
    Shared,
    /// The guest alone.
    Private,
}

impl Kind {
    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Shared => Self::Private,
            Self::Private => Self::Shared,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Private => "private",
        })
    }
}

/// What becomes of the contents of pages that are converted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Contents {
    /// They are lost: the pages read as zeroes.
    #[default]
    Zero,
    /// They stay.
    Preserve,
}

/// The number of the hypercall by which a guest asks for a conversion
/// (`KVM_HC_MAP_GPA_RANGE`, `Documentation/virt/kvm/x86/hypercalls.rst`).
pub const HC_MAP_GPA_RANGE: u64 = 12;

/// Bits of the hypercall's third argument: the size of pages preferred (a hint),
/// and whether pages are to be private.
const SIZE_HINT: u64 = 0xf;
const ENCRYPTED: u64 = 1 << 4;
/// The largest size there is a hint for: 1 GiB.
const LARGEST_HINT: u64 = 2;

/// Pages, and the kind they shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The first guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// The kind they shall have.
    pub to: Kind,
}

impl Request {
    /// What a guest asks for by its hypercall's three arguments.
    ///
    /// # Errors
    ///
    /// [`Refusal`]: flags that are not known, or more pages than have addresses.
    pub fn of_hypercall(gpa: u64, pages: u64, attributes: u64) -> Result<Self, Refusal> {
        let hint = attributes & SIZE_HINT;
        if attributes & !(SIZE_HINT | ENCRYPTED) != 0 || hint > LARGEST_HINT {
            return Err(Refusal::Flags { flags: attributes });
        }
        let to = if attributes & ENCRYPTED != 0 { Kind::Private } else { Kind::Shared };
        let len = pages.checked_mul(PAGE_BYTES).ok_or(Refusal::Overflows { gpa, len: u64::MAX })?;
        Ok(Self { gpa, len, to })
    }

    /// Its pages' numbers.
    pub(super) fn pages(&self) -> Result<Range<u64>, Refusal> {
        let Self { gpa, len, .. } = *self;
        if !gpa.is_multiple_of(PAGE_BYTES) || !len.is_multiple_of(PAGE_BYTES) {
            return Err(Refusal::Misaligned { gpa, len });
        }
        if len == 0 {
            return Err(Refusal::Empty { gpa });
        }
        let end = gpa.checked_add(len).ok_or(Refusal::Overflows { gpa, len })?;
        Ok(gpa / PAGE_BYTES..end / PAGE_BYTES)
    }
}

/// Why a conversion is not begun. Nothing has changed; a guest is told EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It starts or ends within a page.
    #[error("{len:#x} bytes at gpa {gpa:#x} are no whole pages; use multiples of 4096 bytes")]
    Misaligned {
        /// The first address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// It has no pages.
    #[error("no bytes at gpa {gpa:#x}; convert one page at least")]
    Empty {
        /// The first address.
        gpa: u64,
    },
    /// It goes on beyond the last address.
    #[error("{len:#x} bytes at gpa {gpa:#x} end beyond the last address; use a shorter range")]
    Overflows {
        /// The first address.
        gpa: u64,
        /// Bytes; as many as there can be if they were more.
        len: u64,
    },
    /// Some of it is no memory that can be converted.
    #[error(
        "{len:#x} bytes at gpa {gpa:#x} are not all memory that can be private; stay within the \
         memslots that can"
    )]
    Outside {
        /// The first address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// Flags that nobody knows.
    #[error("flags {flags:#x} are not known; use bit 4 for private, and 0 to 2 as the page size")]
    Flags {
        /// All of them.
        flags: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hypercall_says_what_and_nothing_unknown() {
        let asked = |attributes| Request::of_hypercall(0x1000, 3, attributes);
        for hint in 0..=2 {
            let shared = Request { gpa: 0x1000, len: 0x3000, to: Kind::Shared };
            assert_eq!(asked(hint), Ok(shared));
            assert_eq!(asked(hint | 16), Ok(Request { to: Kind::Private, ..shared }));
        }
        for flags in [3, 15, 16 | 7, 32, 1 << 63] {
            assert_eq!(asked(flags), Err(Refusal::Flags { flags }));
        }
        let endless = Request::of_hypercall(0, 1 << 52, 0);
        assert_eq!(endless, Err(Refusal::Overflows { gpa: 0, len: u64::MAX }));
    }

    #[test]
    fn ranges_are_whole_pages_that_have_addresses() {
        let pages = |gpa, len| Request { gpa, len, to: Kind::Private }.pages();
        assert_eq!(pages(0x2000, 0x3000), Ok(2..5));
        assert_eq!(pages(0x2000, 0), Err(Refusal::Empty { gpa: 0x2000 }));
        for (gpa, len) in [(1, 4096), (0x800, 4096), (4096, 1), (4096, 4097)] {
            assert_eq!(pages(gpa, len), Err(Refusal::Misaligned { gpa, len }));
        }
        let (gpa, len) = (u64::MAX - 0xfff, 0x1000);
        assert_eq!(pages(gpa, len), Err(Refusal::Overflows { gpa, len }));
        assert_eq!(pages(gpa - 0x1000, 0x1000), Ok((gpa / 4096 - 1)..gpa / 4096));
    }
}
