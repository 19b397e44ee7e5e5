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
    Lost,
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
    /// Guests or machines that stood still or were gone, with nothing wrong.
    lost: Vec<String>,
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
    lost: Vec<String>,
    /// What was lost, and was not when its tests were run again.
    unstable: Vec<String>,
    /// Tests that neither passed nor failed, by name.
    unknown: Vec<String>,
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
            lost: Vec::new(),
        }
    }

    /// A line of the kernel's console.
    pub(super) fn console(&mut self, line: &str) {
        if TROUBLE.iter().any(|word| line.contains(word)) {
            let during = self.current.map_or("no test", |at| &self.cases[at].name);
            self.lost.push(format!("the lab's kernel, during {during}: {line}"));
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
            "lost" => Outcome::Lost,
            "skipped" => Outcome::Skipped,
            _ => Outcome::Failed,
        };
        let text = match outcome {
            Outcome::Passed => "ok",
            Outcome::Failed => "FAILED",
            Outcome::Lost => "LOST",
            Outcome::Skipped => "skipped",
        };
        match self.current.take().filter(|&at| self.cases[at].name == name) {
            Some(at) if self.outcomes[at].is_none() => {
                match outcome {
                    Outcome::Failed => self.failures.push(format!("{name} failed")),
                    Outcome::Lost => self.lost.push(format!("{name} lost a guest, or hung")),
                    Outcome::Passed | Outcome::Skipped => {}
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
        self.lost.push(format!("the lab was stopped during {during}: {why}"));
        self.over = true; // said already
    }

    /// The run is over: what is missing?
    pub(super) fn end(mut self) -> Tally {
        let count = |wanted: &Outcome| {
            self.outcomes.iter().filter(|outcome| outcome.as_ref() == Some(wanted)).count()
        };
        let passed = count(&Outcome::Passed);
        let failed = count(&Outcome::Failed) + count(&Outcome::Lost);
        let skipped = count(&Outcome::Skipped);
        if !self.over {
            self.lost.push("the lab ended before its tests did".into());
        }
        if self.announced != Some(self.cases.len()) {
            let announced = self.announced.map_or("nothing".into(), |n| format!("{n} tests"));
            let asked = self.cases.len();
            self.lost.push(format!("the lab announced {announced}, asked for were {asked}"));
        }
        for (case, outcome) in self.cases.iter().zip(&self.outcomes) {
            if outcome.is_none() {
                self.lost.push(format!("{} did not run to its end", case.name));
            }
        }
        let missing = self.outcomes.iter().filter(|outcome| outcome.is_none()).count();
        let outcomes = self.cases.iter().zip(&self.outcomes);
        let unknown = outcomes
            .filter(|(_, outcome)| matches!(outcome, None | Some(Outcome::Lost)))
            .map(|(case, _)| case.name.clone())
            .collect();
        let (failures, lost, unstable) = (self.failures, self.lost, Vec::new());
        Tally { runs: 1, passed, failed, skipped, missing, failures, lost, unstable, unknown }
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
        self.lost.extend(run.lost);
        self.unstable.extend(run.unstable);
        self.unknown.extend(run.unknown);
    }

    /// The tests to run again: those of which nothing is known or, if it is the
    /// machine that was lost, all of them.
    pub(super) fn again(&self, cases: &[Case]) -> Vec<Case> {
        if self.lost.is_empty() {
            return Vec::new();
        }
        let wanted = |case: &&Case| self.unknown.is_empty() || self.unknown.contains(&case.name);
        cases.iter().filter(wanted).cloned().collect()
    }

    /// The tests of [`again`](Self::again) were run again, and count as they
    /// ended there.
    pub(super) fn replaced(&mut self, by: Self) {
        if self.unknown.is_empty() {
            (self.passed, self.failed, self.skipped) = (0, 0, 0); // all were
        } else {
            self.failed = self.failures.len();
        }
        self.unstable.append(&mut self.lost);
        self.runs += by.runs;
        self.passed += by.passed;
        self.failed += by.failed;
        self.skipped += by.skipped;
        self.missing = by.missing;
        self.failures.extend(by.failures);
        (self.lost, self.unknown) = (by.lost, by.unknown);
    }

    /// What was lost, and not again.
    pub(super) fn unstable(&self) -> &[String] {
        &self.unstable
    }

    /// Everything that is wrong; nothing else makes the lab a success.
    pub(super) fn failures(&self) -> Vec<&String> {
        self.failures.iter().chain(&self.lost).collect()
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
        write!(f, "{skipped} skipped, {missing} did not run, {} unstable", self.unstable.len())
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
        run.end().failures().into_iter().cloned().collect()
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
    fn a_test_that_failed_is_not_run_again() {
        let mut lines = GOOD;
        lines[2] = "end one failed 5";
        assert!(tally(&lines).again(&cases()).is_empty());
        assert!(tally(&GOOD).again(&cases()).is_empty());
    }

    #[test]
    fn what_was_lost_counts_as_it_ends_when_run_again() {
        let mut lines = GOOD;
        lines[2] = "end one lost 5";
        let mut first = tally(&lines);
        assert_eq!(first.failures(), ["one lost a guest, or hung"]);
        let names: Vec<String> = first.again(&cases()).into_iter().map(|case| case.name).collect();
        assert_eq!(names, ["one"]);
        let one = &cases()[..1];
        first.replaced(tally_of(one, &["plan 1", "begin one", "end one passed 5", "over"]));
        assert!(first.failures().is_empty());
        assert_eq!(first.unstable(), ["one lost a guest, or hung"]);
        assert_eq!((first.passed, first.failed, first.runs), (2, 0, 2));

        for end in ["end one lost 5", "end one failed 5"] {
            let mut first = tally(&lines);
            first.replaced(tally_of(one, &["plan 1", "begin one", end, "over"]));
            assert_eq!((first.passed, first.failed, first.failures().len()), (1, 1, 1), "{end}");
            assert_eq!(first.again(&cases()).is_empty(), end.contains("failed"));
        }
    }

    #[test]
    fn a_failure_stays_one_whatever_is_run_again() {
        let lines = ["plan 2", "begin one", "end one failed 5", "begin two", "end two lost 5"];
        let mut first = tally(&lines);
        let two = &cases()[1..];
        assert_eq!(first.again(&cases()).len(), 1);
        first.replaced(tally_of(two, &["plan 1", "begin two", "end two passed 5", "over"]));
        assert_eq!(first.failures(), ["one failed"]);
        assert_eq!((first.passed, first.failed), (1, 1));
    }

    #[test]
    fn all_tests_are_run_again_if_the_machine_was_lost() {
        let cases = cases();
        let mut run = Run::new(&cases);
        run.console("Kernel panic - not syncing");
        for line in GOOD {
            run.protocol(line);
        }
        let mut first = run.end();
        assert_eq!(first.again(&cases).len(), 2);
        first.replaced(tally(&GOOD));
        assert_eq!((first.passed, first.failures().len(), first.unstable().len()), (2, 0, 1));
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
