//! The device of one vCPU.

use std::collections::VecDeque;
use std::fmt;

use super::registers::{Features, GeneralProtection, Register, Registers, Written};

/// So many tokens of a vCPU are out at most, as in KVM.
pub const IN_FLIGHT: usize = 64;

/// Bits of a token that say whose it is.
const VCPU_BITS: u32 = 12;
/// Numbers of tokens are below this, so that none is `!0`, which wakes all.
const NUMBERS: u32 = (1 << (u32::BITS - VCPU_BITS)) - 1;

/// What a guest's task sleeps on. The guest keeps all sleepers in one table, so
/// it is unique in the VM: a number, and the vCPU in the lowest 12 bits. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u32);

impl Token {
    /// What the guest is shown.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A token that is out, and since when: after the device was turned off, its
/// tickets are known to be old.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    token: Token,
    epoch: u64,
}

impl Ticket {
    /// The token.
    pub fn token(&self) -> Token {
        self.token
    }
}

/// What a vCPU is doing, at the moment in which it would be told of a missing
/// page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conditions {
    /// An exception, interrupt, NMI, SMI or triple fault is pending, or its
    /// delivery was cut short.
    pub event: bool,
    /// The instruction before holds off events (`STI`, `MOV SS`).
    pub shadow: bool,
    /// Interrupts are on (RFLAGS.IF).
    pub interrupts: bool,
    /// The privilege level.
    pub privilege: u8,
    /// Paging is on.
    pub paging: bool,
    /// It is in system-management mode.
    pub smm: bool,
    /// It runs, or may run, a guest of its own.
    pub nested: bool,
    /// Its local APIC is on, by both of its switches.
    pub local_apic: bool,
    /// The flags word of the area shared with the guest; `None` if that is
    /// missing itself.
    pub flags: Option<u32>,
}

/// Why a fault is not told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Refusal {
    /// The guest has not turned the device on.
    Disabled,
    /// [`Conditions::event`].
    Event,
    /// [`Conditions::shadow`].
    Shadow,
    /// Interrupts are off.
    InterruptsOff,
    /// In the guest's kernel, which did not ask for that.
    Kernel,
    /// Paging is off.
    PagingOff,
    /// [`Conditions::smm`].
    Smm,
    /// [`Conditions::nested`].
    Nested,
    /// The local APIC is off.
    LocalApicOff,
    /// The area shared with the guest is missing itself.
    AreaMissing,
    /// The guest has not yet taken the last fault it was told of.
    FlagsTaken,
    /// The guest has not yet woken all that slept before the device was turned
    /// on: their tokens could be the same.
    WakingAll,
    /// [`IN_FLIGHT`] are out.
    Full,
    /// This vCPU was told of this page already.
    InFlight,
    /// The policy would rather have the vCPU wait.
    Policy,
}

impl Refusal {
    /// All of them, in the order of [`Counts::refused`].
    pub const ALL: [Self; 15] = [
        Self::Disabled,
        Self::Event,
        Self::Shadow,
        Self::InterruptsOff,
        Self::Kernel,
        Self::PagingOff,
        Self::Smm,
        Self::Nested,
        Self::LocalApicOff,
        Self::AreaMissing,
        Self::FlagsTaken,
        Self::WakingAll,
        Self::Full,
        Self::InFlight,
        Self::Policy,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::Event => "event",
            Self::Shadow => "shadow",
            Self::InterruptsOff => "interrupts_off",
            Self::Kernel => "kernel",
            Self::PagingOff => "paging_off",
            Self::Smm => "smm",
            Self::Nested => "nested",
            Self::LocalApicOff => "local_apic_off",
            Self::AreaMissing => "area_missing",
            Self::FlagsTaken => "flags_taken",
            Self::WakingAll => "waking_all",
            Self::Full => "full",
            Self::InFlight => "in_flight",
            Self::Policy => "policy",
        }
    }
}

/// What a page that came meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The guest will be told.
    Queued,
    /// The guest was not told that it was missing, and need not be now.
    NotTold,
    /// The device was turned off since: ignored.
    Late,
}

/// A completion that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It was completed before.
    #[error("the page of token {0} was said to have come once before")]
    Twice(Token),
    /// This vCPU has given no such token out.
    #[error("no fault of this vCPU has the token {0}")]
    Unknown(Token),
}

/// What to put into the word for tokens, and the vector to raise then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Post {
    /// A token, or `!0`: all sleepers of this vCPU.
    pub word: u32,
    /// The interrupt.
    pub vector: u8,
}

/// What the device has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Faults the guest was told of.
    pub injected: u64,
    /// Pages the guest was told are ready.
    pub ready: u64,
    /// Times all sleepers were woken.
    pub wake_alls: u64,
    /// Completions that came after the device was turned off.
    pub late: u64,
    /// Faults the guest was not told of, by [`Refusal`], in the order of
    /// [`Refusal::ALL`]; or was told of only after the vCPU had been parked.
    pub refused: [u64; Refusal::ALL.len()],
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let mut refused = self.refused;
        refused.iter_mut().zip(other.refused).for_each(|(all, more)| *all += more);
        Self {
            injected: self.injected + other.injected,
            ready: self.ready + other.ready,
            wake_alls: self.wake_alls + other.wake_alls,
            late: self.late + other.late,
            refused,
        }
    }
}

/// A fault of which the guest is being told, or was.
#[derive(Clone, Copy, Debug)]
struct Flight {
    token: Token,
    page: u64,
    /// The guest was told.
    announced: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    All,
    Token(Token),
}

/// The device of one vCPU.
#[derive(Debug)]
pub struct AsyncPf {
    vcpu: u32,
    registers: Registers,
    /// The number of the next token, if that is free.
    next: u32,
    /// How often everything was forgotten.
    epoch: u64,
    flights: Vec<Flight>,
    ready: VecDeque<Ready>,
    /// What was posted last and is not acknowledged.
    outstanding: Option<Ready>,
    counts: Counts,
}

impl AsyncPf {
    /// For the vCPU with this number, below 4096; `None` if it is not. As after
    /// reset.
    pub fn new(vcpu: u32, features: Features) -> Option<Self> {
        (vcpu < 1 << VCPU_BITS).then(|| Self {
            vcpu,
            registers: Registers::new(features),
            next: 1,
            epoch: 0,
            flights: Vec::with_capacity(IN_FLIGHT),
            ready: VecDeque::with_capacity(IN_FLIGHT + 1),
            outstanding: None,
            counts: Counts::default(),
        })
    }

    /// The registers.
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// The vCPU's CPUID has changed, before it ran.
    pub fn set_features(&mut self, features: Features) {
        self.registers.set_features(features);
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Counts a fault that was not told for a reason of the caller's.
    pub fn refuse(&mut self, why: Refusal) {
        if let Some(count) = self.counts.refused.get_mut(why as usize) {
            *count += 1;
        }
    }

    /// Tokens that are out: not yet told to be ready.
    pub fn in_flight(&self) -> usize {
        self.flights.len() + self.ready.len() + usize::from(self.outstanding.is_some())
    }

    /// A write to a register. If it says that the guest has taken a token, the word
    /// for tokens is to be [looked at](Self::taken).
    ///
    /// # Errors
    ///
    /// [`GeneralProtection`], to be raised in the guest.
    pub fn write(
        &mut self,
        register: Register,
        value: u64,
        is_memory: impl FnOnce(u64) -> bool,
    ) -> Result<Written, GeneralProtection> {
        let written = self.registers.write(register, value, is_memory)?;
        match written {
            Written::Enabled => {
                self.forget();
                self.ready.push_back(Ready::All);
            }
            Written::Disabled => self.forget(),
            Written::Acknowledged | Written::Nothing => {}
        }
        Ok(written)
    }

    /// The guest has acknowledged a token, and this is in the word for tokens now.
    /// What is still there was not meant: in a guest that was restored, it can be
    /// that another was, from before.
    pub fn taken(&mut self, word: Option<u32>) {
        if word == Some(0) {
            self.outstanding = None;
        }
    }

    /// INIT, or a reset: the registers are zero, and nothing is out.
    pub fn reset(&mut self) {
        self.registers = self.registers.after_reset();
        self.forget();
    }

    /// Nothing is out any more; what completes from now on is late.
    fn forget(&mut self) {
        self.epoch += 1;
        self.flights.clear();
        self.ready.clear();
        self.outstanding = None;
    }

    /// Decides about a fault on a page (any number that tells pages apart), which
    /// the guest may be told of. It is to be told at once; say then
    /// [whether it was](Self::announced).
    ///
    /// # Errors
    ///
    /// [`Refusal`]: the vCPU waits. It was counted.
    pub fn admit(&mut self, page: u64, vcpu: &Conditions) -> Result<Ticket, Refusal> {
        let token = self.token();
        match self.refusal(page, vcpu) {
            Some(why) => {
                self.refuse(why);
                Err(why)
            }
            None => {
                self.next = token.number() % (NUMBERS - 1) + 1;
                self.flights.push(Flight { token, page, announced: false });
                Ok(Ticket { token, epoch: self.epoch })
            }
        }
    }

    /// Whether a fault would be told now. Nothing is counted.
    pub fn admits(&self, page: u64, vcpu: &Conditions) -> bool {
        self.refusal(page, vcpu).is_none()
    }

    fn refusal(&self, page: u64, vcpu: &Conditions) -> Option<Refusal> {
        let waking = self.outstanding.iter().chain(&self.ready).any(|ready| *ready == Ready::All);
        let kernel = vcpu.privilege != 3 && !self.registers.sends_always();
        [
            (!self.registers.is_enabled(), Refusal::Disabled),
            (vcpu.event, Refusal::Event),
            (vcpu.shadow, Refusal::Shadow),
            (!vcpu.interrupts, Refusal::InterruptsOff),
            (kernel, Refusal::Kernel),
            (!vcpu.paging, Refusal::PagingOff),
            (vcpu.smm, Refusal::Smm),
            (vcpu.nested, Refusal::Nested),
            (!vcpu.local_apic, Refusal::LocalApicOff),
            (vcpu.flags.is_none(), Refusal::AreaMissing),
            (vcpu.flags.is_some_and(|flags| flags != 0), Refusal::FlagsTaken),
            (waking, Refusal::WakingAll),
            (self.flights.iter().any(|flight| flight.page == page), Refusal::InFlight),
            (self.in_flight() >= IN_FLIGHT, Refusal::Full),
        ]
        .into_iter()
        .find_map(|(refuses, why)| refuses.then_some(why))
    }

    /// Whether this vCPU's guest was told that this page is missing, and not yet
    /// that it came.
    pub fn awaits(&self, page: u64) -> bool {
        self.flights.iter().any(|flight| flight.page == page)
    }

    /// The next token: one that nobody can be sleeping on.
    fn token(&self) -> Token {
        let taken = |token: Token| {
            let ready = self.ready.iter().chain(&self.outstanding);
            self.flights.iter().any(|flight| flight.token == token)
                || ready.into_iter().any(|ready| *ready == Ready::Token(token))
        };
        let mut number = self.next;
        // There are far more numbers than tokens out.
        while taken(Token(number << VCPU_BITS | self.vcpu)) {
            number = number % (NUMBERS - 1) + 1;
        }
        Token(number << VCPU_BITS | self.vcpu)
    }

    /// Whether the guest was told of a fault that was just admitted. If not, it is
    /// as if it had not been.
    pub fn announced(&mut self, ticket: Ticket, was_told: bool) {
        if ticket.epoch != self.epoch {
            return;
        }
        if !was_told {
            self.flights.retain(|flight| flight.token != ticket.token);
        } else if let Some(flight) = self.flights.iter_mut().find(|f| f.token == ticket.token) {
            flight.announced = true;
            self.counts.injected += 1;
        }
    }

    /// The page of a ticket has come.
    ///
    /// # Errors
    ///
    /// [`TokenError`]: it came before, or nobody waits for it. Nothing has changed.
    pub fn arrived(&mut self, ticket: Ticket) -> Result<Arrival, TokenError> {
        let token = ticket.token;
        if token.vcpu() != self.vcpu || ticket.epoch > self.epoch {
            return Err(TokenError::Unknown(token));
        }
        if ticket.epoch < self.epoch {
            self.counts.late += 1;
            return Ok(Arrival::Late);
        }
        let Some(at) = self.flights.iter().position(|flight| flight.token == token) else {
            return Err(TokenError::Twice(token));
        };
        if !self.flights.swap_remove(at).announced {
            return Ok(Arrival::NotTold);
        }
        self.ready.push_back(Ready::Token(token));
        Ok(Arrival::Queued)
    }

    /// Whether there is something to post, now or once the guest has taken the
    /// last.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether the guest has yet to acknowledge what was posted last: nothing is posted
    /// before.
    pub fn is_unacknowledged(&self) -> bool {
        self.outstanding.is_some()
    }

    /// What to post now, if anything. `word` is what is in the word for tokens,
    /// `None` if that cannot be told; `local_apic` says whether the local APIC is
    /// on by both of its switches. It is to be posted at once.
    pub fn post(&mut self, word: Option<u32>, local_apic: bool) -> Option<Post> {
        if self.outstanding.is_some() || word != Some(0) || !local_apic {
            return None;
        }
        let ready = self.ready.pop_front()?;
        self.outstanding = Some(ready);
        let word = match ready {
            Ready::All => {
                self.counts.wake_alls += 1;
                u32::MAX
            }
            Ready::Token(token) => {
                self.counts.ready += 1;
                token.get()
            }
        };
        Some(Post { word, vector: self.registers.vector() })
    }
}

impl Token {
    fn number(self) -> u32 {
        self.0 >> VCPU_BITS
    }

    fn vcpu(self) -> u32 {
        self.0 & ((1 << VCPU_BITS) - 1)
    }
}
