//! The command line of `vmpager vm`.

use super::{text, vm};

#[test]
fn wrong_usage_exits_with_2_and_help_teaches() {
    for args in [
        &["run"][..],
        &["run", "--kernel", "k", "--guest", "builtin"],
        &["run", "--kernel", "k", "--memory", "lots"],
        &["status"],
        &["explode"],
    ] {
        assert_eq!(vm(args).status.code(), Some(2), "{args:?}");
    }
    for command in ["run", "snapshot", "restore", "pause", "resume", "status", "quit"] {
        let output = vm(&[command, "--help"]);
        let help = text(&output.stdout);
        assert!(output.status.success() && help.contains("Example"), "{command}: {help}");
        assert!(help.contains("--json"), "{command}");
    }
}
