//! What the program does when nobody reads what it prints.

use std::io::PipeWriter;
use std::process::Command;

/// A pipe that nobody reads any more, as after `| head`.
fn closed() -> PipeWriter {
    std::io::pipe().expect("a pipe").1
}

#[test]
fn a_pipe_that_nobody_reads_changes_no_exit_code() {
    let state = tempfile::tempdir().expect("a folder");
    let run = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint"));
        command.args(words).arg("--state").arg(state.path()).env_remove("STILLPOINT_REPO");
        command.stdout(closed()).stderr(closed()).status().expect("it starts").code()
    };
    for json in [&[][..], &["--json"]] {
        for (words, code) in [
            (&["vm", "show", "none"][..], 3),
            (&["snapshots"], 2),
            (&["no-such-command"], 2),
            (&["vm", "list"], 0),
        ] {
            assert_eq!(run(&[words, json].concat()), Some(code), "{words:?} {json:?}");
        }
    }
    // With a warning that nobody reads.
    assert_eq!(run(&["vm", "add", "db1", "--qmp", "/no/such/socket"]), Some(0));
}
