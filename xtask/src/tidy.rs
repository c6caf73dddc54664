//! Documents stay true: every path that one names in backticks exists, so does every test that a promise leans on, and
//! every reason that the code gives is explained.

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
    if lost.is_empty() {
        Ok(())
    } else {
        Err(format!("documents and code do not agree\n  {}", lost.join("\n  ")))
    }
}

/// Where a receipt's reasons are explained.
const REASONS: &str = "docs/reasons.md";

/// Codes of reasons in our sources that `docs/reasons.md` does not have.
fn unexplained(tracked: &str) -> Result<Vec<String>, String> {
    let read = |path: &str| fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"));
    let document = read(REASONS)?;
    let is_ours =
        |path: &&str| path.starts_with("crates/") && path.contains("/src/") && path.ends_with(".rs");
    let mut missing = Vec::new();
    for path in tracked.lines().filter(is_ours).filter(|path| root().join(path).exists()) {
        let source = read(path)?;
        let shipped = source.split("#[cfg(test)]").next().unwrap_or_default();
        let unknown = codes(shipped).filter(|code| !document.contains(&format!("`{code}`")));
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
