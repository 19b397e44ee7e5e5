//! One look at a stopped vCPU: what is touched is reported, what is needed to go
//! on is read.

use super::registers::Registers;
use super::walk::{Paging, Walk};
use super::{Absent, Access, Candidate, Cause, GuestView, PAGE_BYTES};

/// Takes a candidate, and whether it is missing where that is known already.
pub(super) trait Report: FnMut(Candidate, Option<bool>) {}

impl<F: FnMut(Candidate, Option<bool>)> Report for F {}

/// One look.
pub(super) struct Scan<'a, V, R> {
    pub(super) registers: &'a Registers<'a>,
    view: &'a V,
    report: R,
    paging: Paging,
    ends_early: bool,
}

impl<'a, V: GuestView, R: Report> Scan<'a, V, R> {
    pub(super) fn new(registers: &'a Registers<'a>, view: &'a V, report: R) -> Self {
        Self { registers, view, report, paging: Paging::of(registers), ends_early: false }
    }

    /// Whether the track was lost at a missing page.
    pub(super) fn ends_early(&self) -> bool {
        self.ends_early
    }

    /// `bytes` from a linear address are touched.
    pub(super) fn touch(&mut self, linear: u64, bytes: u64, cause: Cause, access: Access) {
        let mut done = 0;
        while done < bytes {
            let at = linear.wrapping_add(done);
            if let Some(gpa) = self.translate(at) {
                (self.report)(candidate(gpa, cause, access), None);
            }
            done += PAGE_BYTES - at % PAGE_BYTES;
        }
    }

    /// As [`touch`](Self::touch), and returns what is there, if all of it is.
    pub(super) fn read<const N: usize>(
        &mut self,
        linear: u64,
        cause: Cause,
        access: Access,
    ) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read_into(linear, &mut bytes, cause, access)?;
        Some(bytes)
    }

    /// Instruction bytes.
    pub(super) fn read_code(&mut self, linear: u64, bytes: &mut [u8]) -> Option<()> {
        self.read_into(linear, bytes, Cause::Code, Access::Execute)
    }

    fn read_into(
        &mut self,
        linear: u64,
        bytes: &mut [u8],
        cause: Cause,
        access: Access,
    ) -> Option<()> {
        let mut all = Some(());
        let (mut at, mut rest) = (linear, bytes);
        while !rest.is_empty() {
            let in_page = usize::try_from(PAGE_BYTES - at % PAGE_BYTES).unwrap_or(usize::MAX);
            let (piece, later) = rest.split_at_mut(in_page.min(rest.len()));
            // The page after a missing one is touched next: go on.
            if self.read_in_page(at, piece, cause, access).is_none() {
                all = None;
            }
            at = at.wrapping_add(piece.len() as u64);
            rest = later;
        }
        all
    }

    fn read_in_page(
        &mut self,
        linear: u64,
        bytes: &mut [u8],
        cause: Cause,
        access: Access,
    ) -> Option<()> {
        let gpa = self.translate(linear)?;
        let result = self.view.read(gpa, bytes);
        self.note(gpa, result, cause, access);
        result.ok()
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        let (view, cr3) = (self.view, self.registers.sregs.cr3);
        let paging = self.paging;
        let walk = paging.walk(cr3, linear, view, |gpa, result| {
            self.note(gpa, result, Cause::PageTable, Access::Read);
        });
        match walk {
            Walk::Gpa(gpa) => Some(gpa),
            Walk::Stopped | Walk::Nowhere => None,
        }
    }

    /// Reports what was read, or would have been.
    fn note(&mut self, gpa: u64, result: Result<(), Absent>, cause: Cause, access: Access) {
        let is_missing = result == Err(Absent::Missing);
        self.ends_early |= is_missing;
        (self.report)(candidate(gpa, cause, access), Some(is_missing));
    }
}

fn candidate(gpa: u64, cause: Cause, access: Access) -> Candidate {
    Candidate { page: gpa & !(PAGE_BYTES - 1), cause, access }
}
