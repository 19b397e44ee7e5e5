//! Which crate may know which: dependencies point down only.

use super::Finding;

/// Each crate and the crates of this workspace it may depend on.
const ROOMS: [(&str, &[&str]); 10] = [
    ("vmpager-core", &[]),
    ("vmpager-sys", &[]),
    ("vmpager-store", &["vmpager-core", "vmpager-sys"]),
    ("vmpager-kvm", &["vmpager-core", "vmpager-sys"]),
    ("vmpager", &["vmpager-core", "vmpager-sys", "vmpager-store"]),
    ("vmpager-vm", &["vmpager-core", "vmpager-kvm", "vmpager-sys", "vmpager"]),
    (
        "vmpager-cli",
        &["vmpager", "vmpager-core", "vmpager-kvm", "vmpager-store", "vmpager-sys", "vmpager-vm"],
    ),
    (
        "vmpager-lab",
        &["vmpager", "vmpager-core", "vmpager-kvm", "vmpager-store", "vmpager-sys", "vmpager-vm"],
    ),
    (TESTING, &[]),
    ("xtask", &[]),
];

/// Every crate's tests may use it, no crate's shipped code.
const TESTING: &str = "vmpager-testing";

/// The crate's directory name, if this is the manifest of one.
pub(super) fn crate_of_manifest(path: &str) -> Option<&str> {
    let dir = path.strip_suffix("/Cargo.toml")?;
    let name = dir.strip_prefix("crates/").unwrap_or(dir);
    let ours = dir == "xtask" || dir.starts_with("crates/");
    (ours && !name.contains('/')).then_some(name)
}

/// Finds dependencies that point up or sideways.
pub(super) fn check(path: &str, name: &str, manifest: &str, findings: &mut Vec<Finding>) {
    let Some((_, allowed)) = ROOMS.iter().find(|(room, _)| *room == name) else {
        let what = format!("`{name}` has no place yet: add it to ROOMS in xtask/src/tidy/rooms.rs");
        findings.push(Finding::new(path, 1, what));
        return;
    };
    for (line, dependency, is_dev) in dependencies(manifest) {
        let is_ours = ROOMS.iter().any(|(room, _)| *room == dependency);
        let may = allowed.contains(&dependency) || is_dev && dependency == TESTING;
        if is_ours && !may {
            let what = format!("`{name}` must not depend on `{dependency}`: it points up");
            findings.push(Finding::new(path, line, what));
        }
    }
}

/// (line, package, whether only for tests) of every dependency in a manifest.
fn dependencies(manifest: &str) -> Vec<(usize, &str, bool)> {
    let mut found = Vec::new();
    let mut section = "";
    for (i, line) in manifest.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_end_matches(']');
            // [dependencies.NAME], [target.'…'.dependencies.NAME]
            if let Some((table, name)) = section.rsplit_once('.')
                && table.ends_with("dependencies")
            {
                found.push((i + 1, name.trim_matches('"'), table.ends_with("dev-dependencies")));
            }
            continue;
        }
        let is_dev = section.contains("dev-dependencies");
        let Some((key, value)) = line.split_once('=') else { continue };
        if section.ends_with("dependencies") {
            let name = key.split('.').next().unwrap_or_default().trim().trim_matches('"');
            found.push((i + 1, renamed(value).unwrap_or(name), is_dev));
        } else if section.contains("dependencies.") && key.trim() == "package" {
            found.push((i + 1, value.trim().trim_matches('"'), is_dev));
        }
    }
    found
}

/// The package of `{ …, package = "NAME" }`.
fn renamed(value: &str) -> Option<&str> {
    let (_, rest) = value.split_once("package")?;
    rest.trim_start().strip_prefix('=')?.split('"').nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str, manifest: &str) -> Vec<usize> {
        let mut findings = Vec::new();
        check("Cargo.toml", name, manifest, &mut findings);
        findings.into_iter().map(|f| f.line).collect()
    }

    #[test]
    fn downward_is_fine() {
        let manifest = "[package]\nname = \"vmpager-store\"\n[dependencies]\nlibc = \"1\"\n\
                        vmpager-core.workspace = true\n[dev-dependencies]\n\
                        vmpager-testing.workspace = true\n";
        assert!(found("vmpager-store", manifest).is_empty());
    }

    #[test]
    fn upward_is_found_however_it_is_written() {
        for line in [
            "vmpager.workspace = true",
            "vmpager = { path = \"../vmpager\" }",
            "\"vmpager\" = { workspace = true } # why",
            "pager = { path = \"../vmpager\", package = \"vmpager\" }",
        ] {
            assert_eq!(found("vmpager-core", &format!("[dependencies]\n{line}")), [2], "{line}");
        }
        for table in ["dependencies.vmpager", "target.'cfg(unix)'.dev-dependencies.vmpager"] {
            let manifest = format!("[{table}]\nworkspace = true");
            assert_eq!(found("vmpager-core", &manifest), [1], "{table}");
        }
        let manifest = "[build-dependencies.p]\npackage = \"vmpager\"";
        assert_eq!(found("vmpager-sys", manifest), [2]);
        let manifest = "[target.'cfg(loom)'.dependencies]\nvmpager-sys.workspace = true";
        assert_eq!(found("vmpager-core", manifest), [2]);
    }

    #[test]
    fn test_helpers_are_for_tests() {
        let manifest = "[dependencies]\nvmpager-testing.workspace = true";
        assert_eq!(found("vmpager", manifest), [2]);
    }

    #[test]
    fn every_crate_has_its_place() {
        assert_eq!(found("vmpager-new", ""), [1]);
        assert_eq!(crate_of_manifest("crates/vmpager-new/Cargo.toml"), Some("vmpager-new"));
        assert_eq!(crate_of_manifest("xtask/Cargo.toml"), Some("xtask"));
        assert_eq!(crate_of_manifest("Cargo.toml"), None);
        assert_eq!(crate_of_manifest("fuzz/Cargo.toml"), None);
    }

    /// A cycle would mean that two rooms are one.
    #[test]
    fn the_rooms_have_a_bottom() {
        let mut built: Vec<&str> = Vec::new();
        for (name, allowed) in ROOMS {
            assert!(name == "vmpager-cli" || !allowed.contains(&"vmpager-cli"));
            assert!(allowed.iter().all(|below| built.contains(below)), "{name}");
            built.push(name);
        }
    }
}
