//! Style as a test: rules about the source that neither rustfmt nor clippy
//! checks, each reported with file and line.

mod rooms;
mod rules;
mod rust_source;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use rust_source::RustSource;

/// One thing that is not tidy.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    path: String,
    line: usize,
    what: String,
}

impl Finding {
    fn new(path: &str, line: usize, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, what: what.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.what)
    }
}

/// Checks the workspace at `root`.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let files = read_all(root)?;
    let (findings, notes) = check(&files);
    for note in &notes {
        println!("note: {note}");
    }
    for finding in &findings {
        eprintln!("{finding}");
    }
    match findings.len() {
        0 => {
            println!("tidy: {} files, nothing found", files.len());
            Ok(())
        }
        n => Err(format!("tidy: {n} findings in {} files", files.len())),
    }
}

/// All findings, and what is allowed but worth a note.
fn check(files: &[(String, String)]) -> (Vec<Finding>, Vec<Finding>) {
    let sources: Vec<(&str, RustSource<'_>)> = files
        .iter()
        .filter(|(path, _)| path.ends_with(".rs"))
        .map(|(path, text)| (path.as_str(), RustSource::new(text)))
        .collect();
    let test_modules: BTreeSet<String> =
        sources.iter().flat_map(|(path, source)| rules::test_modules(path, source)).collect();

    let (mut findings, mut notes) = (Vec::new(), Vec::new());
    for (path, text) in files {
        rules::length(path, text, &mut findings);
        rules::words(path, text, &mut findings);
    }
    for (path, source) in &sources {
        let is_test = rules::is_test_file(path, &test_modules);
        rules::unsafe_rooms(path, source, is_test, &mut findings, &mut notes);
        rules::forbids_unsafe(path, source, &mut findings);
        rules::panics(path, source, is_test, &mut findings);
    }
    for (path, text) in files {
        if let Some(name) = rooms::crate_of_manifest(path) {
            rooms::check(path, name, text, &mut findings);
        }
    }
    findings.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    (findings, notes)
}

/// Every text file git tracks or would track: (path from the root, text).
fn read_all(root: &Path) -> Result<Vec<(String, String)>, String> {
    let output = Command::new("git")
        .current_dir(root)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output();
    let paths = match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
            .split('\0')
            .filter(|path| !path.is_empty())
            .map(str::to_owned)
            .collect(),
        _ => walk(root)?, // an unpacked archive
    };
    let mut files = Vec::new();
    for path in paths.into_iter().collect::<BTreeSet<_>>() {
        // Deleted but not yet committed, or not text: neither is ours to judge.
        if let Ok(Ok(text)) = fs::read(root.join(&path)).map(String::from_utf8) {
            files.push((path, text));
        }
    }
    if files.is_empty() { Err(format!("no files in {}", root.display())) } else { Ok(files) }
}

fn walk(root: &Path) -> Result<Vec<String>, String> {
    let mut paths = Vec::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        let fail = |e: std::io::Error| format!("{}: {e}", dir.display());
        for entry in fs::read_dir(&dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let path = entry.path();
            let kind = entry.file_type().map_err(fail)?;
            let name = entry.file_name();
            if kind.is_dir() && name != "target" && name != ".git" {
                todo.push(path);
            } else if kind.is_file()
                && let Ok(path) = path.strip_prefix(root)
            {
                paths.push(path.display().to_string());
            }
        }
    }
    Ok(paths)
}
