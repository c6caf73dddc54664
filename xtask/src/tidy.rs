//! Documents stay true: every path that one names in backticks exists, so does every test that a promise leans on, every
//! reason that the code gives is explained, every fuzz target is named where promises are, and nothing is decided by a QEMU's
//! version.

use crate::fuzz;
use crate::stage::{program, root};
use std::collections::HashSet;
use std::fs;
use std::path::Path;

/// Checks every tracked Markdown file.
pub(crate) fn tidy() -> Result<(), String> {
    let root = root();
    let tracked = program("git", &["ls-files", "--cached", "--others", "--exclude-standard"]).output()?;
    // A name counts as a path of ours if it starts with something that lies in the checkout's root.
    let tops: HashSet<&str> = tracked.lines().filter_map(|path| path.split('/').next()).collect();
    let mut lost = Vec::new();
    for document in tracked.lines().filter(|path| path.ends_with(".md")) {
        let Ok(text) = fs::read_to_string(root.join(document)) else { continue };
        let folder = Path::new(document).parent().unwrap_or(Path::new(""));
        for (line, file, name) in tests(&text) {
            if !fs::read_to_string(root.join(file)).is_ok_and(|source| has_test(&source, name)) {
                lost.push(format!("{document}:{line}: `{file}::{name}` is no test"));
            }
        }
        for (line, path) in paths(&text, &tops) {
            if !root.join(path).exists() && !root.join(folder).join(path).exists() {
                lost.push(format!("{document}:{line}: `{path}` does not exist"));
            }
        }
    }
    lost.extend(unexplained(&tracked)?);
    lost.extend(unnamed(&fuzz::targets()?, &read(SPECIFICATION)?));
    lost.extend(by_version(&tracked)?);
    if lost.is_empty() {
        Ok(())
    } else {
        Err(format!("documents and code do not agree\n  {}", lost.join("\n  ")))
    }
}

/// Where a receipt's reasons are explained.
const REASONS: &str = "docs/reasons.md";

/// Where promises stand.
const SPECIFICATION: &str = "SPECIFICATION.md";

/// A file of the checkout, as text.
fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"))
}

/// The sources in these crates that are delivered, by path, each up to its tests.
fn shipped<'t>(tracked: &'t str, crates: &[&str]) -> Result<Vec<(&'t str, String)>, String> {
    let is_ours = |path: &&str| {
        let rest = crates.iter().find_map(|folder| path.strip_prefix(folder));
        rest.is_some_and(|rest| rest.contains("/src/")) && path.ends_with(".rs")
    };
    let paths = tracked.lines().filter(is_ours).filter(|path| root().join(path).exists());
    paths
        .map(|path| {
            let mut source = read(path)?;
            source.truncate(source.find("#[cfg(test)]").unwrap_or(source.len()));
            Ok((path, source))
        })
        .collect()
}

/// Codes of reasons in our sources that `docs/reasons.md` does not have.
fn unexplained(tracked: &str) -> Result<Vec<String>, String> {
    let document = read(REASONS)?;
    let mut missing = Vec::new();
    for (path, source) in shipped(tracked, &["crates"])? {
        let unknown = codes(&source).filter(|code| !document.contains(&format!("`{code}`")));
        missing.extend(unknown.map(|code| format!("{path}: `{code}` is not in {REASONS}")));
    }
    Ok(missing)
}

/// The codes that a source gives to reasons as literals.
fn codes(source: &str) -> impl Iterator<Item = &str> {
    let calls = ["Reason::new(", "Note::new(", "Answer::failed("];
    let after = calls.into_iter().flat_map(|call| source.split(call).skip(1));
    after.filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next())
}

/// Fuzz targets that no promise leans on.
fn unnamed(targets: &[String], specification: &str) -> Vec<String> {
    let is_named = |target: &&String| specification.contains(&format!("`fuzz/fuzz_targets/{target}.rs`"));
    let missing = targets.iter().filter(|target| !is_named(target));
    missing.map(|target| format!("{SPECIFICATION} does not name `fuzz/fuzz_targets/{target}.rs`")).collect()
}

/// What speaks with QEMU. Differences between QEMUs are discovered by schema.
const SPEAK_WITH_QEMU: [&str; 3] = ["crates/qmp", "crates/vm", "crates/engine"];
/// How a QEMU's version could come to be known there.
const VERSION: [&str; 8] = [
    "qemu_version",
    "greeting().version",
    "greeting().package",
    "greeting.version",
    "greeting.package",
    "query-version",
    "QueryVersion",
    "--version",
];
/// What is done with it: it is shown to people, by another crate.
const VERSION_SHOWN: [&str; 2] =
    ["pub qemu_version: String,", "qemu_version: monitor.greeting().version.clone(),"];

/// Places that ask for a QEMU's version, and so could decide by it.
fn by_version(tracked: &str) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for (path, source) in shipped(tracked, &SPEAK_WITH_QEMU)? {
        let lines = versions(&source).into_iter();
        found.extend(
            lines.map(|line| format!("{path}:{line}: asks for QEMU's version; features are found by schema")),
        );
    }
    Ok(found)
}

/// The lines of a source that ask for the version, except to show it; what comments say is no matter.
fn versions(source: &str) -> Vec<usize> {
    let asks = |line: &str| {
        let line = line.trim_start();
        !line.starts_with("//")
            && !VERSION_SHOWN.contains(&line)
            && VERSION.iter().any(|word| line.contains(word))
    };
    source.lines().enumerate().filter(|(_, line)| asks(line)).map(|(index, _)| index + 1).collect()
}

/// The paths in backticks, with their lines; code blocks are no prose.
fn paths<'t>(text: &'t str, tops: &HashSet<&str>) -> Vec<(usize, &'t str)> {
    let mut found = Vec::new();
    let mut in_code = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
            continue;
        }
        if in_code {
            continue;
        }
        for span in line.split('`').skip(1).step_by(2) {
            // Of a name with a line number, a wildcard or an item, what lies before.
            let path = span
                .split("::")
                .next()
                .unwrap_or(span)
                .split(':')
                .next()
                .unwrap_or(span)
                .trim_end_matches('/');
            let is_plain = path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte));
            let top = path.split('/').next().unwrap_or_default();
            if is_plain && path.contains('/') && tops.contains(top) {
                found.push((index + 1, path));
            }
        }
    }
    found
}

/// The tests in backticks, written `FILE.rs::NAME`, with their lines.
fn tests(text: &str) -> impl Iterator<Item = (usize, &str, &str)> {
    text.lines().enumerate().flat_map(|(index, line)| {
        let spans = line.split('`').skip(1).step_by(2);
        let cited = spans.filter_map(|span| span.split_once("::"));
        cited.filter(|(file, _)| file.ends_with(".rs")).map(move |(file, name)| (index + 1, file, name))
    })
}

/// Whether a source has a test of this name that is run: a function under `#[test]`, or an entry of a table of scenes.
fn has_test(source: &str, name: &str) -> bool {
    let is_scene = |line: &str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(": "));
    let is_function = |line: &str| {
        let rest = line.strip_prefix("fn ").and_then(|line| line.strip_prefix(name));
        rest.is_some_and(|rest| rest.starts_with('('))
    };
    let has_scenes = source.lines().any(|line| line == "scenes! {");
    let mut attributes: Vec<&str> = Vec::new();
    for line in source.lines().map(str::trim_start) {
        if line.starts_with("#[") || line.starts_with("///") {
            attributes.push(line);
            continue;
        }
        // What takes long is run by `test-long`.
        let left_out = |one: &&&str| one.starts_with("#[ignore") && !one.starts_with("#[ignore = \"long: ");
        let is_run = attributes.contains(&"#[test]") && !attributes.iter().any(|one| left_out(&one));
        if (is_function(line) && is_run) || (has_scenes && is_scene(line)) {
            return true;
        }
        attributes.clear();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_leans_on_a_test_that_is_run() {
        let text = "| a | `crates/x/src/a.rs::it_holds`, `docs/b.md`, `std::fs` |\n`c.rs::d`";
        assert_eq!(tests(text).collect::<Vec<_>>(), [(1, "crates/x/src/a.rs", "it_holds"), (2, "c.rs", "d")]);
        let source = "    #[test]\n    #[cfg(unix)]\n    fn it_holds() {\n}\nfn helper() {}\n\
                      #[test]\n#[ignore = \"slow\"]\nfn left_out() {}\n#[test]\n#[ignore = \"long: x\"]\nfn lasts() {}\nscenes! {\n    a_scene: ext4, |inside| {}\n";
        for one in ["it_holds", "a_scene", "lasts"] {
            assert!(has_test(source, one), "{one}");
        }
        for none in ["it_hold", "helper", "left_out", "missing", ""] {
            assert!(!has_test(source, none), "{none}");
        }
        assert!(!has_test("Struct {\n    field: 1,\n}", "field"));
    }

    #[test]
    fn a_fuzz_target_that_no_promise_leans_on_is_told() {
        let targets = ["receipt".to_owned(), "journal".to_owned()];
        let text = "| 9 | limits | `fuzz/fuzz_targets/receipt.rs`, `receipt`, fuzz/fuzz_targets/journal.rs |";
        assert_eq!(
            unnamed(&targets, text),
            ["SPECIFICATION.md does not name `fuzz/fuzz_targets/journal.rs`"]
        );
        assert_eq!(unnamed(&targets[..1], text), [""; 0]);
    }

    #[test]
    fn whoever_asks_a_qemu_for_its_version_other_than_to_show_it_is_told() {
        let shows = "    /// QEMU's version, as in `query-version`.\n    pub qemu_version: String,\n\
                     \x20       qemu_version: monitor.greeting().version.clone(),\n";
        assert_eq!(versions(shows), [0; 0]);
        let decides = [
            "if monitor.greeting().version.starts_with('7') {",
            "let old = definition.qemu_version < limit;",
            "let Greeting { version, .. } = greeting; // query-version",
            "Command::new(qemu).arg(\"--version\")",
        ];
        for line in decides {
            assert_eq!(versions(&format!("fn f() {{\n    {line}\n")), [2], "{line}");
        }
    }

    #[test]
    fn codes_are_found_wherever_a_reason_is_made() {
        let source = r#"Reason::new("a", x, y); Reason::new(
            "b", "no code", z); Note::new(code, "c"); Answer::failed("d", e)"#;
        assert_eq!(codes(source).collect::<Vec<_>>(), ["a", "b", "d"]);
    }

    #[test]
    fn only_paths_of_the_checkout_are_looked_for() {
        let tops = HashSet::from(["crates", "docs"]);
        let text = "See `crates/x/` and `docs/a.md:12`, not `/etc/x` or `a/b`, `crates`, `crates/*`.\n```\n`docs/no.md`\n```\n`docs/b.md`";
        assert_eq!(paths(text, &tops), [(1, "crates/x"), (1, "docs/a.md"), (5, "docs/b.md")]);
    }
}
