//! Candidates against a real processor: each instruction runs twice in a vCPU's
//! ring 3 with all of its pages missing. Once the userfaultfd says which pages
//! are touched, in which order; once the view is write-only, and the first
//! candidate must be the same page, each time.

mod cases;

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
    kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{MprotectFlags, mprotect};
use vmpager_kvm::candidates::{
    Absent, CandidateFinder, GuestView, Registers, VectorRegisters, XsaveLayout,
};
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::uffd::{Features, Message, Messages, Userfaultfd};

use cases::{CASES, CODE, Case, LANDING, Needs, STACK};

const PAGE: usize = 4096;
const MEMORY: usize = 4 << 20;
/// Page tables that map all memory to itself in pages of 4 KiB, and descriptors:
/// never missing, for some hosts read them themselves.
const TABLES: usize = 0x1000;
const DESCRIPTORS: usize = 0x8000;
const RESIDENT_END: usize = 0x9000;
/// `out 0xe9, al`: the end of each case.
const DONE: [u8; 2] = [0xe6, 0xe9];

/// What a guest starts with.
struct Setup {
    regs: kvm_regs,
    sregs: kvm_sregs,
    image: Vec<u8>,
}

impl Setup {
    fn put(&mut self, gpa: u64, bytes: &[u8]) {
        let start = offset(gpa);
        self.image[start..start + bytes.len()].copy_from_slice(bytes);
    }
}

fn offset(gpa: u64) -> usize {
    usize::try_from(gpa).expect("a guest of 4 MiB")
}

/// What is installed of an image.
struct View<'a> {
    image: &'a [u8],
    present: Vec<bool>,
}

impl GuestView for View<'_> {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), Absent> {
        if gpa >= MEMORY as u64 {
            return Err(Absent::NoMemory);
        }
        if self.is_missing(gpa) {
            return Err(Absent::Missing);
        }
        bytes.copy_from_slice(&self.image[offset(gpa)..offset(gpa) + bytes.len()]);
        Ok(())
    }

    fn is_missing(&self, gpa: u64) -> bool {
        gpa < MEMORY as u64 && !self.present[offset(gpa) / PAGE]
    }
}

/// A VM whose memory is served by a userfaultfd.
struct Host {
    first_sregs: kvm_sregs,
    first_fpu: kvm_fpu,
    has_avx: bool,
    layout: XsaveLayout,
    _vm: VmFd,
    // After the VM, which uses it.
    memory: Arc<Mapping>,
    uffd: Userfaultfd,
}

impl Host {
    /// None where there is no KVM or no userfaultfd.
    fn new() -> Option<(Self, VcpuFd)> {
        let kvm = Kvm::new().ok()?;
        let uffd = Userfaultfd::open(Features::NONE).ok()?;
        let vm = kvm.create_vm().ok()?;
        let memory = Arc::new(Mapping::anonymous(MEMORY).expect("4 MiB"));
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: memory.hva(),
            ..Default::default()
        };
        // SAFETY: the mapping outlives the VM, and is only touched by the kernel.
        unsafe { vm.set_user_memory_region(region) }.expect("a memslot");
        uffd.register_missing(&GuestRange::of_mapping(&memory)).expect("anonymous memory");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
        vcpu.set_cpuid2(&cpuid).expect("what KVM offers");
        let first_sregs = vcpu.get_sregs().expect("system registers");
        let first_fpu = vcpu.get_fpu().expect("floating-point registers");
        let layout = XsaveLayout::from_cpuid(cpuid.as_slice());
        let has_avx = enable_avx(&vcpu) && std::is_x86_feature_detected!("avx2");
        Some((Self { first_sregs, first_fpu, has_avx, layout, _vm: vm, memory, uffd }, vcpu))
    }

    /// Empties the memory but for what the kernel reads itself.
    fn reset(&self, image: &[u8], readable: bool) {
        self.memory.discard(0..MEMORY).expect("anonymous memory");
        let flags = if readable { MprotectFlags::READ } else { MprotectFlags::empty() };
        let start = self.memory.hva() as *mut core::ffi::c_void;
        // SAFETY: nothing in this process reads or writes the mapping.
        unsafe { mprotect(start, MEMORY, MprotectFlags::WRITE | flags) }.expect("mprotect");
        for page in (0..RESIDENT_END).step_by(PAGE) {
            self.install(image, page as u64);
        }
    }

    fn install(&self, image: &[u8], gpa: u64) {
        let page = offset(gpa) / PAGE * PAGE;
        let source = image[page..].as_ptr() as usize;
        let installed = self.uffd.copy(self.memory.hva() + page as u64, source, PAGE as u64);
        assert_eq!(installed.stop, None, "page {page:#x}");
    }

    /// Serves the userfaultfd until told to stop, and records what for.
    fn serve(&self, image: &[u8], served: &Mutex<Vec<u64>>, stop: &AtomicBool) {
        let mut messages = Messages::new();
        let wait = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        while !stop.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(&self.uffd, PollFlags::IN)];
            poll(&mut fds, Some(&wait)).expect("poll");
            self.uffd.read(&mut messages).expect("a userfaultfd that can be read");
            for message in messages.drain() {
                let Message::Fault { address, .. } = message else { panic!("{message:?}") };
                let gpa = (address - self.memory.hva()) / PAGE as u64 * PAGE as u64;
                served.lock().expect("nobody panics with it").push(gpa);
                self.install(image, gpa);
            }
        }
    }

    /// Runs a case to its end. Returns the pages that the userfaultfd was asked
    /// for, and those installed because they were the first candidate.
    fn run(
        &self,
        vcpu: &mut VcpuFd,
        setup: &Setup,
        readable: bool,
    ) -> Result<(Vec<u64>, Vec<u64>), String> {
        self.reset(&setup.image, readable);
        vcpu.set_sregs(&setup.sregs).expect("system registers");
        vcpu.set_regs(&setup.regs).expect("registers");
        vcpu.set_fpu(&self.first_fpu).expect("floating-point registers");
        let (served, stop) = (Mutex::new(Vec::new()), AtomicBool::new(false));
        let guessed = std::thread::scope(|scope| {
            scope.spawn(|| self.serve(&setup.image, &served, &stop));
            let guessed = self.enter(vcpu, setup);
            stop.store(true, Ordering::Release);
            guessed
        })?;
        Ok((served.into_inner().expect("nobody panicked with it"), guessed))
    }

    fn enter(&self, vcpu: &mut VcpuFd, setup: &Setup) -> Result<Vec<u64>, String> {
        let mut view = View { image: &setup.image, present: vec![false; MEMORY / PAGE] };
        view.present[..RESIDENT_END / PAGE].fill(true);
        let (mut finder, mut guessed) = (CandidateFinder::new(), Vec::new());
        for _ in 0..200 {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(0xe9, _)) => {
                    complete(vcpu);
                    return Ok(guessed);
                }
                Ok(exit) => return Err(format!("{exit:?}")),
                Err(error) if is(error, io::ErrorKind::Interrupted) => {}
                Err(error) => {
                    let raw = io::Error::from(error).raw_os_error();
                    if raw != Some(rustix::io::Errno::FAULT.raw_os_error()) {
                        return Err(format!("KVM_RUN: {raw:?}"));
                    }
                    let page = self.first_candidate(vcpu, &view, &mut finder)?;
                    view.present[offset(page) / PAGE] = true;
                    self.install(&setup.image, page);
                    guessed.push(page);
                }
            }
        }
        Err(format!("no end: {guessed:x?}"))
    }

    fn first_candidate(
        &self,
        vcpu: &VcpuFd,
        view: &View<'_>,
        finder: &mut CandidateFinder,
    ) -> Result<u64, String> {
        let (regs, sregs) = (vcpu.get_regs(), vcpu.get_sregs());
        let (regs, sregs) = (regs.expect("registers"), sregs.expect("system registers"));
        let events = vcpu.get_vcpu_events().expect("events");
        let registers = Registers { regs: &regs, sregs: &sregs, events: &events, xsave_bytes: 832 };
        let vectors = || {
            let area = vcpu.get_xsave().expect("vector registers");
            let area: Vec<u8> = area.region.iter().flat_map(|word| word.to_le_bytes()).collect();
            Some(VectorRegisters::from_xsave(&area, &self.layout))
        };
        let missing = finder.missing(&registers, view, vectors);
        let first = missing.pages().first().map(|candidate| candidate.page);
        first.ok_or_else(|| format!("no candidate at rip {:#x}", regs.rip))
    }
}

/// Lets the `out` of the last exit end, and executes nothing else.
fn complete(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    let entered = vcpu.run().map(drop);
    vcpu.set_kvm_immediate_exit(0);
    assert!(entered.is_err_and(|error| is(error, io::ErrorKind::Interrupted)));
}

fn is(error: kvm_ioctls::Error, kind: io::ErrorKind) -> bool {
    io::Error::from(error).kind() == kind
}

/// Lets the guest use YMM registers, if KVM does.
fn enable_avx(vcpu: &VcpuFd) -> bool {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: 7 };
    vcpu.set_xcrs(&xcrs).is_ok()
}

/// An image with page tables and a GDT, and registers at [`CODE`] in ring 3.
fn setup(host: &Host, case: &Case) -> Setup {
    let mut image = vec![0; MEMORY];
    let mut put = |at: usize, value: usize| {
        image[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
    };
    for level in 0..3 {
        put(TABLES + level * PAGE, TABLES + (level + 1) * PAGE + 7);
    }
    put(TABLES + 2 * PAGE + 8, TABLES + 4 * PAGE + 7);
    for page in 0..MEMORY / PAGE {
        put(TABLES + 3 * PAGE + page * 8, page * PAGE + 7);
    }
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x28 | 3,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let descriptors = DESCRIPTORS as u64;
    let mut sregs = host.first_sregs;
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.cs = kvm_segment { selector: 0x30 | 3, type_: 11, db: 0, l: 1, ..data };
    sregs.tr = kvm_segment {
        base: descriptors + 0x100,
        limit: 0x67,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment { type_: 2, unusable: 1, ..Default::default() };
    (sregs.gdt.base, sregs.gdt.limit) = (descriptors, 0x4f);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 = 0x8005_0033; // PG AM WP NE ET MP PE
    sregs.cr3 = TABLES as u64;
    // OSXSAVE only where there is something to enable.
    sregs.cr4 = 0x620 | if host.has_avx { 1 << 18 } else { 0 };
    sregs.efer = 0xd00;
    let regs = kvm_regs { rip: CODE, rsp: STACK, rflags: 3 << 12 | 2, ..Default::default() };
    let mut setup = Setup { regs, sregs, image };
    setup.put(LANDING, &DONE);
    (case.set)(&mut setup);
    let rip = setup.regs.rip;
    setup.put(rip, &[case.code, &DONE].concat());
    setup
}

#[test]
fn the_first_candidate_is_what_the_kernel_says() {
    let Some((host, mut vcpu)) = Host::new() else {
        return vmpager_testing::skipped("no KVM or no userfaultfd here");
    };
    let (mut wrong, mut faults) = (Vec::new(), 0);
    for case in CASES {
        if case.needs == Needs::Avx2 && !host.has_avx {
            vmpager_testing::skipped(case.name);
            continue;
        }
        let setup = setup(&host, case);
        let truth = host.run(&mut vcpu, &setup, true);
        let found = host.run(&mut vcpu, &setup, false);
        match (&truth, &found) {
            // Nothing came but by the userfaultfd, then nothing came by it.
            (Ok((touched, none)), Ok((asked, guessed))) if none.is_empty() && asked.is_empty() => {
                faults += touched.len();
                let same = in_order(touched, case) == in_order(guessed, case);
                if !same || touched.is_empty() {
                    wrong.push(format!("{}: {touched:x?}, found {guessed:x?}", case.name));
                }
            }
            _ => wrong.push(format!("{}: {truth:x?}, found {found:x?}", case.name)),
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
    assert!(faults > 2 * CASES.len(), "only {faults} faults");
}

/// Of an operand across pages, processors may touch either page first: an EPYC's
/// `fxsave` begins with its last. Here the lower page comes first.
fn in_order(pages: &[u64], case: &Case) -> Vec<u64> {
    let mut pages = pages.to_vec();
    if case.any_order {
        pages.sort_unstable();
    }
    for i in 1..pages.len() {
        if pages[i] + PAGE as u64 == pages[i - 1] {
            pages.swap(i, i - 1);
        }
    }
    pages
}
