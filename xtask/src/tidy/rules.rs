//! The rules that look at one file.

use std::collections::BTreeSet;

use super::Finding;
use super::rust_source::RustSource;

const MAX_LINES: usize = 600;

/// Where `unsafe` may be: the kernel ABI, and the part of the reference VM that
/// shares memory and registers with a vCPU.
const UNSAFE_ROOMS: [&str; 2] = ["crates/vmpager-sys/src/", "crates/vmpager-vm/src/kvm/"];

/// Crates whose root need not forbid `unsafe`: those with a room for it.
const UNSAFE_CRATES: [&str; 2] = ["crates/vmpager-sys/", "crates/vmpager-vm/"];

/// Helpers of tests, in crates that no shipped code depends on.
const TEST_CRATES: [&str; 1] = ["crates/vmpager-testing/"];

/// Traces of the place where a file was written. (Split, so as not to be
/// found here.)
const FOREIGN_WORDS: [&str; 3] =
    [concat!("/wo", "rk/"), concat!("/fa", "rm/"), concat!(".lib", "rary")];

/// Files a reader can hold.
pub(super) fn length(path: &str, text: &str, findings: &mut Vec<Finding>) {
    let is_code = [".rs", ".sh", ".py"].iter().any(|end| path.ends_with(end));
    let lines = text.lines().count();
    if is_code && lines > MAX_LINES {
        let what = format!("{lines} lines; split it: {MAX_LINES} are what a reader can hold");
        findings.push(Finding::new(path, lines, what));
    }
}

/// No traces of one machine in what everybody gets.
pub(super) fn words(path: &str, text: &str, findings: &mut Vec<Finding>) {
    for (i, line) in text.lines().enumerate() {
        for word in FOREIGN_WORDS.iter().filter(|word| line.contains(**word)) {
            findings.push(Finding::new(path, i + 1, format!("`{word}` means nothing elsewhere")));
        }
    }
}

/// The files of modules declared `#[cfg(test)] mod NAME;` in `path`.
pub(super) fn test_modules(path: &str, source: &RustSource<'_>) -> Vec<String> {
    let (dir, file) = path.rsplit_once('/').unwrap_or(("", path));
    let dir = match file {
        "lib.rs" | "main.rs" | "mod.rs" => dir.to_owned(),
        _ => format!("{dir}/{}", file.trim_end_matches(".rs")),
    };
    source.test_modules().map(|name| format!("{dir}/{name}")).collect()
}

/// Whether a file is only compiled for tests, examples or benchmarks.
pub(super) fn is_test_file(path: &str, test_modules: &BTreeSet<String>) -> bool {
    let in_test_dir = path.split('/').any(|dir| ["tests", "examples", "benches"].contains(&dir));
    let in_test_module = test_modules.iter().any(|module| {
        path.strip_prefix(module.as_str())
            .is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
    });
    in_test_dir || in_test_module || TEST_CRATES.iter().any(|dir| path.starts_with(dir))
}

/// `unsafe` stays in its rooms. Tests may need it (to fault like a VMM does):
/// that is noted.
pub(super) fn unsafe_rooms(
    path: &str,
    source: &RustSource<'_>,
    is_test: bool,
    findings: &mut Vec<Finding>,
    notes: &mut Vec<Finding>,
) {
    if UNSAFE_ROOMS.iter().any(|room| path.starts_with(room)) {
        return;
    }
    let all = source.find("unsafe");
    let (in_tests, elsewhere): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|&at| is_test || source.is_test(at));
    for at in elsewhere {
        let what = format!("`unsafe` outside its rooms: {}", UNSAFE_ROOMS.join(", "));
        findings.push(Finding::new(path, source.line(at), what));
    }
    if let Some(&first) = in_tests.first() {
        let what = format!("`unsafe` {} times in tests", in_tests.len());
        notes.push(Finding::new(path, source.line(first), what));
    }
}

/// Crates without a room for `unsafe` say so.
pub(super) fn forbids_unsafe(path: &str, source: &RustSource<'_>, findings: &mut Vec<Finding>) {
    let is_root = path.ends_with("/src/lib.rs")
        || path.ends_with("/src/main.rs")
        || path.contains("/src/bin/");
    let exempt = UNSAFE_CRATES.iter().any(|dir| path.starts_with(dir));
    if is_root && !exempt && !source.code.contains("#![forbid(unsafe_code)]") {
        findings.push(Finding::new(path, 1, "the crate lacks `#![forbid(unsafe_code)]`"));
    }
}

/// What panics says why it cannot; what is unfinished is not committed.
pub(super) fn panics(
    path: &str,
    source: &RustSource<'_>,
    is_test: bool,
    findings: &mut Vec<Finding>,
) {
    let mut find = |word: &str, in_tests: bool, what: &str| {
        for at in source.find(word) {
            if in_tests || !(is_test || source.is_test(at)) {
                findings.push(Finding::new(path, source.line(at), what));
            }
        }
    };
    find("todo!", true, "`todo!` is not finished");
    find("unimplemented!", true, "`unimplemented!` is not finished");
    find("dbg!", true, "`dbg!` was left behind");
    find(".unwrap()", false, "`unwrap`: handle it, or `expect` with the reason it cannot fail");
    for at in source.find(".expect(") {
        let argument = source.text[at + ".expect(".len()..].trim_start();
        let reason = argument.strip_prefix('"').and_then(|rest| rest.split('"').next());
        let has_reason = reason.is_some_and(|reason| reason.trim().len() > 3);
        if !has_reason && !is_test && !source.is_test(at) {
            let what = "`expect` without the reason it cannot fail, in quotes";
            findings.push(Finding::new(path, source.line(at), what));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check;

    /// The findings for one file, as `line: what`, shortened.
    fn found(path: &str, text: &str) -> Vec<String> {
        let (findings, _) = check(&[(path.to_owned(), text.to_owned())]);
        findings.into_iter().map(|f| format!("{}: {:.20}", f.line, f.what)).collect()
    }

    const STORE: &str = "crates/vmpager-store/src/file.rs";

    #[test]
    fn clean_code_passes() {
        let text = "fn f() { x.expect(\"reason enough\"); x.unwrap_or(1); }\n// unsafe todo!\n";
        assert!(found(STORE, text).is_empty());
    }

    #[test]
    fn long_files_are_found() {
        assert!(found(STORE, &"\n".repeat(600)).is_empty());
        assert_eq!(found(STORE, &"\n".repeat(601)), ["601: 601 lines; split it:"]);
        assert!(found("docs/long.md", &"\n".repeat(900)).is_empty());
    }

    #[test]
    fn unsafe_is_found_outside_its_rooms() {
        let text = "fn f() {\n    unsafe { g() }\n}\n";
        assert_eq!(found(STORE, text), ["2: `unsafe` outside its"]);
        for room in ["crates/vmpager-sys/src/a.rs", "crates/vmpager-vm/src/kvm/a.rs"] {
            assert!(found(room, text).is_empty(), "{room}");
        }
        assert!(!found("crates/vmpager-vm/src/a.rs", text).is_empty());
    }

    #[test]
    fn unsafe_in_tests_is_noted() {
        let text = "unsafe fn f() {}".to_owned();
        let (findings, notes) = check(&[("crates/vmpager/tests/a.rs".to_owned(), text)]);
        assert!(findings.is_empty());
        assert_eq!(notes.len(), 1);
    }

    #[test]
    fn crates_must_forbid_unsafe() {
        assert_eq!(found("crates/vmpager/src/lib.rs", "\n"), ["1: the crate lacks `#!["]);
        assert_eq!(found("xtask/src/main.rs", "// #![forbid(unsafe_code)]\n").len(), 1);
        assert!(found("crates/vmpager/src/lib.rs", "#![forbid(unsafe_code)]\n").is_empty());
        assert!(found("crates/vmpager-sys/src/lib.rs", "\n").is_empty());
        assert!(found("crates/vmpager/src/other.rs", "\n").is_empty());
    }

    #[test]
    fn panics_need_a_reason() {
        assert_eq!(found(STORE, "\nfn f() { x.unwrap() }"), ["2: `unwrap`: handle it,"]);
        assert_eq!(found(STORE, "fn f() { x.expect(\"\") }"), ["1: `expect` without the"]);
        assert_eq!(found(STORE, "fn f() { x.expect(why) }").len(), 1);
        assert!(found(STORE, "fn f() { x.expect(\n  \"a reason\") }").is_empty());
        assert!(found(STORE, "#[cfg(test)]\nmod tests { fn f() { x.unwrap() } }").is_empty());
        assert!(found("crates/vmpager/tests/a.rs", "fn f() { x.unwrap() }").is_empty());
    }

    #[test]
    fn test_modules_in_files_of_their_own_may_unwrap() {
        let file = |path: &str, text: &str| (path.to_owned(), text.to_owned());
        let files = [
            file(STORE, "#[cfg(test)]\nmod checks;"),
            file("crates/vmpager-store/src/file/checks.rs", "fn f() { x.unwrap() }"),
            file("crates/vmpager-store/src/file/checks/deep.rs", "fn f() { x.unwrap() }"),
            file("crates/vmpager-store/src/checks.rs", "fn f() { x.unwrap() }"),
        ];
        let (findings, _) = check(&files);
        let paths: Vec<_> = findings.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(paths, ["crates/vmpager-store/src/checks.rs"]);
    }

    #[test]
    fn unfinished_code_is_found_in_tests_too() {
        for word in ["todo!()", "unimplemented!()", "dbg!(x)"] {
            let text = format!("#[cfg(test)]\nmod tests {{ fn f() {{ {word} }} }}");
            assert_eq!(found(STORE, &text).len(), 1, "{word}");
        }
    }

    #[test]
    fn foreign_words_are_found_anywhere() {
        for word in super::FOREIGN_WORDS {
            assert_eq!(found("README.md", &format!("\nsee {word}x\n")).len(), 1, "{word}");
        }
        assert!(found("README.md", "the framework/room").is_empty());
    }
}
