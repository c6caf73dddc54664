//! `guest-get-osinfo`.

use guest_protocol::answers::OsInfo;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io::Read;
use std::path::PathBuf;

/// Longest os-release that is read, in bytes; real ones are below 1 KiB.
const OS_RELEASE_BYTES_MAX: u64 = 64 << 10;

/// What `uname` and os-release say.
pub(super) fn osinfo() -> OsInfo {
    let uname = rustix::system::uname();
    let text = |field: &CStr| Some(field.to_string_lossy().into_owned());
    let mut release = parse(&os_release());
    OsInfo {
        kernel_release: text(uname.release()),
        kernel_version: text(uname.version()),
        machine: text(uname.machine()),
        id: release.remove("ID"),
        name: release.remove("NAME"),
        pretty_name: release.remove("PRETTY_NAME"),
        version: release.remove("VERSION"),
        version_id: release.remove("VERSION_ID"),
        variant: release.remove("VARIANT"),
        variant_id: release.remove("VARIANT_ID"),
    }
}

/// The environment may name another file: qemu-ga's own test suite does.
fn os_release() -> String {
    let paths = match std::env::var_os("QGA_OS_RELEASE") {
        Some(path) => vec![PathBuf::from(path)],
        None => vec!["/etc/os-release".into(), "/usr/lib/os-release".into()],
    };
    let mut bytes = Vec::new();
    for path in paths {
        if let Ok(file) = std::fs::File::open(path)
            && file.take(OS_RELEASE_BYTES_MAX).read_to_end(&mut bytes).is_ok()
        {
            break;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn parse(text: &str) -> BTreeMap<String, String> {
    let assignments = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    assignments
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.trim().to_owned(), unquote(value.trim())))
        .collect()
}

/// Undoes the shell's quoting. Source: os-release(5).
fn unquote(value: &str) -> String {
    let mut text = String::new();
    let mut quote = None;
    let mut letters = value.chars().peekable();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (None, '\'' | '"') => quote = Some(letter),
            (Some(open), _) if letter == open => quote = None,
            (None, '\\') => text.extend(letters.next()),
            // In double quotes a backslash takes only these four, and, for qemu-ga, a single quote.
            (Some('"'), '\\') => match letters.peek() {
                Some('$' | '"' | '\\' | '`' | '\'') => text.extend(letters.next()),
                _ => text.push('\\'),
            },
            // A shell would take what follows for another command.
            (None, ' ' | '\t' | ';') => break,
            _ => text.push(letter),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{parse, unquote};

    #[test]
    fn the_shells_quoting_is_undone() {
        for (quoted, plain) in [
            ("debian", "debian"),
            ("\"Debian GNU/Linux 12 (bookworm)\"", "Debian GNU/Linux 12 (bookworm)"),
            ("'a \"b\" \\c'", "a \"b\" \\c"),
            (r#""a \"b\" \$c \`d\` \\e \f""#, r#"a "b" $c `d` \e \f"#),
            (r#""Unit test \"\'\$\`\\ and \\\\ etc.""#, r#"Unit test "'$`\ and \\ etc."#),
            (r"a\ b", "a b"),
            ("a b", "a"),
            ("a;b", "a"),
            ("\"a b\"; c", "a b"),
            ("", ""),
        ] {
            assert_eq!(unquote(quoted), plain, "{quoted}");
        }
    }

    #[test]
    fn comments_and_blank_lines_are_passed_over() {
        let release = parse("# ID=no\n\nID=yes\nnonsense\n NAME=\"x\"\n");
        assert_eq!(
            release.into_iter().collect::<Vec<_>>(),
            [("ID".to_owned(), "yes".to_owned()), ("NAME".to_owned(), "x".to_owned())]
        );
    }
}
