//! What the tests of a run came to. A test that was not heard of has failed,
//! and so has everything when the kernel complains.

use std::fmt;
use std::time::Duration;

use super::build::Case;

/// More than the lab itself grants a test before it ends it.
const GRACE: Duration = Duration::from_secs(30);

/// What a kernel says when it is in trouble. Stalls count: they are what a lost
/// wake-up looks like from outside.
const TROUBLE: [&str; 11] = [
    "Kernel panic",
    "BUG:",
    "Oops",
    "WARNING:",
    "general protection fault",
    "detected stall",
    "self-detected stall",
    "soft lockup",
    "hung task",
    "blocked for more than",
    "Out of memory",
];

/// How one test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    Skipped,
}

/// The tests of one run, while it goes on.
pub(super) struct Run<'a> {
    cases: &'a [Case],
    outcomes: Vec<Option<Outcome>>,
    current: Option<usize>,
    announced: Option<usize>,
    over: bool,
    failures: Vec<String>,
}

/// The sum of runs.
#[derive(Debug, Default)]
pub(super) struct Tally {
    runs: usize,
    passed: usize,
    failed: usize,
    skipped: usize,
    missing: usize,
    failures: Vec<String>,
    /// Failures that did not count, for the emulator was at fault.
    void: Vec<String>,
    /// Those that did not pass, by name.
    not_passed: Vec<String>,
}

impl<'a> Run<'a> {
    pub(super) fn new(cases: &'a [Case]) -> Self {
        Self {
            cases,
            outcomes: vec![None; cases.len()],
            current: None,
            announced: None,
            over: false,
            failures: Vec::new(),
        }
    }

    /// A line of the kernel's console.
    pub(super) fn console(&mut self, line: &str) {
        if TROUBLE.iter().any(|word| line.contains(word)) {
            let during = self.current.map_or("no test", |at| &self.cases[at].name);
            self.failures.push(format!("the lab's kernel, during {during}: {line}"));
        }
    }

    /// A line of the lab's program; what to show of it.
    pub(super) fn protocol(&mut self, line: &str) -> Option<String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "plan" => self.announced = rest.parse().ok(),
            "begin" => self.begin(rest),
            "text" => return Some(format!("      {rest}")),
            "end" => return Some(self.finished(rest)),
            "over" => self.over = true,
            _ => self.failures.push(format!("the lab said what nobody understands: {line}")),
        }
        None
    }

    fn begin(&mut self, name: &str) {
        self.current = self.cases.iter().position(|case| case.name == name);
        if self.current.is_none() {
            self.failures.push(format!("{name} ran, and was not asked for"));
        }
    }

    fn finished(&mut self, rest: &str) -> String {
        let words: Vec<&str> = rest.split_whitespace().collect();
        let [name, outcome, millis] = words[..] else {
            self.failures.push(format!("the end of a test cannot be read: {rest}"));
            return format!("  ?       {rest}");
        };
        let outcome = match outcome {
            "passed" => Outcome::Passed,
            "skipped" => Outcome::Skipped,
            _ => Outcome::Failed,
        };
        let text = match outcome {
            Outcome::Passed => "ok",
            Outcome::Failed => "FAILED",
            Outcome::Skipped => "skipped",
        };
        match self.current.take().filter(|&at| self.cases[at].name == name) {
            Some(at) if self.outcomes[at].is_none() => {
                if outcome == Outcome::Failed {
                    self.failures.push(format!("{name} failed"));
                }
                self.outcomes[at] = Some(outcome);
            }
            Some(_) => self.failures.push(format!("{name} ended twice")),
            None => self.failures.push(format!("{name} ended, and had not begun")),
        }
        let seconds = Duration::from_millis(millis.parse().unwrap_or(0)).as_secs_f64();
        format!("  {text:<7} {name:<48} {seconds:6.1} s")
    }

    /// How long the lab may be silent now.
    pub(super) fn patience(&self) -> Duration {
        GRACE + self.current.map_or(Duration::ZERO, |at| self.cases[at].limit)
    }

    /// The run was ended from outside.
    pub(super) fn give_up(&mut self, why: &str) {
        let during = self.current.map_or("no test", |at| &self.cases[at].name);
        self.failures.push(format!("the lab was stopped during {during}: {why}"));
        self.over = true; // said already
    }

    /// The run is over: what is missing?
    pub(super) fn end(mut self) -> Tally {
        let count = |wanted: &Outcome| {
            self.outcomes.iter().filter(|outcome| outcome.as_ref() == Some(wanted)).count()
        };
        let (passed, failed) = (count(&Outcome::Passed), count(&Outcome::Failed));
        let skipped = count(&Outcome::Skipped);
        if !self.over {
            self.failures.push("the lab ended before its tests did".into());
        }
        if self.announced != Some(self.cases.len()) {
            let announced = self.announced.map_or("nothing".into(), |n| format!("{n} tests"));
            let asked = self.cases.len();
            self.failures.push(format!("the lab announced {announced}, asked for were {asked}"));
        }
        for (case, outcome) in self.cases.iter().zip(&self.outcomes) {
            if outcome.is_none() {
                self.failures.push(format!("{} did not run to its end", case.name));
            }
        }
        let missing = self.outcomes.iter().filter(|outcome| outcome.is_none()).count();
        let outcomes = self.cases.iter().zip(&self.outcomes);
        let not_passed = outcomes
            .filter(|(_, outcome)| outcome.as_ref() != Some(&Outcome::Passed))
            .map(|(case, _)| case.name.clone())
            .collect();
        let (failures, void) = (self.failures, Vec::new());
        Tally { runs: 1, passed, failed, skipped, missing, failures, void, not_passed }
    }
}

impl Tally {
    pub(super) fn add(&mut self, run: Self) {
        self.runs += run.runs;
        self.passed += run.passed;
        self.failed += run.failed;
        self.skipped += run.skipped;
        self.missing += run.missing;
        self.failures.extend(run.failures);
        self.void.extend(run.void);
        self.not_passed.extend(run.not_passed);
    }

    /// The tests to run again, should this run not count: those
    /// that did not pass or, if it is the machine that failed, all of them.
    pub(super) fn again(&self, cases: &[Case]) -> Vec<Case> {
        let wanted =
            |case: &&Case| self.not_passed.is_empty() || self.not_passed.contains(&case.name);
        match self.failures.is_empty() {
            true => Vec::new(),
            false => cases.iter().filter(wanted).cloned().collect(),
        }
    }

    /// The tests of [`again`](Self::again) were run again, and count as they
    /// ended there. What went wrong before is told, and no failure.
    pub(super) fn replaced(&mut self, by: Self) {
        if self.not_passed.is_empty() {
            self.passed = 0; // all were run again
        }
        self.void.append(&mut self.failures);
        self.runs += by.runs;
        self.passed += by.passed;
        (self.failed, self.skipped, self.missing) = (by.failed, by.skipped, by.missing);
        (self.failures, self.not_passed) = (by.failures, by.not_passed);
    }

    /// What went wrong, and did not count.
    pub(super) fn void(&self) -> &[String] {
        &self.void
    }

    /// Everything that is wrong; nothing else makes the lab a success.
    pub(super) fn failures(&self) -> &[String] {
        &self.failures
    }

    /// In the lab everything there is must run.
    pub(super) fn refuse_skips(&mut self) {
        if self.skipped > 0 {
            self.failures.push(format!("{} tests were skipped in the lab", self.skipped));
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { runs, passed, failed, skipped, missing, .. } = self;
        let tests = passed + failed + skipped + missing;
        write!(f, "{tests} tests in {runs} runs: {passed} passed, {failed} failed, ")?;
        write!(f, "{skipped} skipped, {missing} did not run, {} void", self.void.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cases() -> Vec<Case> {
        ["one", "two"]
            .map(|name| Case {
                boot: "host".into(),
                name: name.into(),
                limit: Duration::from_secs(1),
            })
            .to_vec()
    }

    /// The failures of a run that says this.
    fn failures(protocol: &[&str], console: &[&str]) -> Vec<String> {
        let cases = cases();
        let mut run = Run::new(&cases);
        for line in protocol {
            run.protocol(line);
        }
        for line in console {
            run.console(line);
        }
        run.end().failures
    }

    const GOOD: [&str; 6] =
        ["plan 2", "begin one", "end one passed 5", "begin two", "end two passed 5", "over"];

    #[test]
    fn a_run_in_which_all_pass_is_a_success() {
        assert!(failures(&GOOD, &["Linux version 6.12", ""]).is_empty());
    }

    #[test]
    fn a_failed_test_is_a_failure() {
        let mut lines = GOOD;
        lines[2] = "end one failed 5";
        assert_eq!(failures(&lines, &[]), ["one failed"]);
    }

    #[test]
    fn a_test_that_did_not_run_is_a_failure() {
        assert_eq!(
            failures(&["plan 2", "begin one", "end one passed 5", "over"], &[]),
            ["two did not run to its end"]
        );
        // Nor may the lab believe that there are fewer.
        assert_eq!(failures(&["plan 1", "begin one", "end one passed 5", "over"], &[]).len(), 2);
    }

    #[test]
    fn an_early_end_is_a_failure() {
        assert_eq!(failures(&GOOD[..5], &[]), ["the lab ended before its tests did"]);
        assert_eq!(failures(&[], &[]).len(), 4);
    }

    #[test]
    fn a_kernel_in_trouble_is_a_failure() {
        for line in [
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
            "Kernel panic - not syncing: Fatal exception",
            "BUG: unable to handle page fault for address: ffff",
        ] {
            assert_eq!(failures(&GOOD, &[line]).len(), 1, "{line}");
        }
    }

    #[test]
    fn what_was_not_asked_for_is_a_failure() {
        let mut lines = GOOD.to_vec();
        lines.insert(1, "begin three");
        assert_eq!(failures(&lines, &[]), ["three ran, and was not asked for"]);
        let mut lines = GOOD.to_vec();
        lines.insert(3, "end one passed 5");
        assert_eq!(failures(&lines, &[]), ["one ended, and had not begun"]);
    }

    fn tally(protocol: &[&str]) -> Tally {
        tally_of(&cases(), protocol)
    }

    fn tally_of(cases: &[Case], protocol: &[&str]) -> Tally {
        let mut run = Run::new(cases);
        for line in protocol {
            run.protocol(line);
        }
        run.end()
    }

    #[test]
    fn what_is_run_again_counts_as_it_ended_then() {
        let mut lines = GOOD;
        lines[2] = "end one failed 5";
        let mut first = tally(&lines);
        let names: Vec<String> = first.again(&cases()).into_iter().map(|case| case.name).collect();
        assert_eq!(names, ["one"]);
        let one = &cases()[..1];
        first.replaced(tally_of(one, &["plan 1", "begin one", "end one passed 5", "over"]));
        assert!(first.failures().is_empty());
        assert_eq!(first.void(), ["one failed"]);
        assert_eq!((first.passed, first.failed, first.runs), (2, 0, 2));

        let mut first = tally(&lines);
        first.replaced(tally_of(one, &["plan 1", "begin one", "end one failed 5", "over"]));
        assert_eq!(first.failures(), ["one failed"]);
        assert_eq!((first.passed, first.failed), (1, 1));
        assert_eq!(first.again(&cases()).len(), 1);
        assert!(tally(&GOOD).again(&cases()).is_empty());
    }

    #[test]
    fn all_tests_are_run_again_if_the_machine_failed() {
        let cases = cases();
        let mut run = Run::new(&cases);
        run.console("Kernel panic - not syncing");
        for line in GOOD {
            run.protocol(line);
        }
        let mut first = run.end();
        assert_eq!(first.again(&cases).len(), 2);
        first.replaced(tally(&GOOD));
        assert_eq!((first.passed, first.failures().len(), first.void().len()), (2, 0, 1));
    }

    #[test]
    fn a_skipped_test_is_no_success_in_the_lab() {
        let cases = cases();
        let mut run = Run::new(&cases);
        for line in GOOD {
            run.protocol(&line.replace("one passed", "one skipped"));
        }
        let mut tally = run.end();
        assert!(tally.failures().is_empty());
        tally.refuse_skips();
        assert_eq!(tally.failures(), ["1 tests were skipped in the lab"]);
    }
}
