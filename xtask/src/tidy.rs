//! Documents stay true: every path that one names in backticks exists.

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
        for (line, path) in paths(&text, &tops) {
            if !root.join(path).exists() && !root.join(folder).join(path).exists() {
                lost.push(format!("{document}:{line}: `{path}` does not exist"));
            }
        }
    }
    if lost.is_empty() {
        Ok(())
    } else {
        Err(format!("documents name what is not there\n  {}", lost.join("\n  ")))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_of_the_checkout_are_looked_for() {
        let tops = HashSet::from(["crates", "docs"]);
        let text = "See `crates/x/` and `docs/a.md:12`, not `/etc/x` or `a/b`, `crates`, `crates/*`.\n```\n`docs/no.md`\n```\n`docs/b.md`";
        assert_eq!(paths(text, &tops), [(1, "crates/x"), (1, "docs/a.md"), (5, "docs/b.md")]);
    }
}
