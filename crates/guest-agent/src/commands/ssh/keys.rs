//! The lines of an `authorized_keys` file. What is no key is kept byte for byte.

use guest_protocol::Error;

/// Refuses what would be a comment or more than one line.
pub(super) fn check(keys: &[String]) -> Result<(), Error> {
    match keys.iter().find(|key| key.starts_with('#') || key.contains(['\n', '\0'])) {
        Some(key) => Err(Error::generic(format!("invalid OpenSSH public key: '{key}'"))),
        None => Ok(()),
    }
}

/// The keys of a file, the last first, as qemu-ga tells them.
pub(super) fn shown(file: &[u8]) -> Vec<String> {
    let lines = file.split(|byte| *byte == b'\n').rev().map(<[u8]>::trim_ascii);
    let keys = lines.filter(|line| !line.is_empty() && !line.starts_with(b"#"));
    keys.map(|key| String::from_utf8_lossy(key).into_owned()).collect()
}

/// The file with these keys, each once, without a newline at its end.
pub(super) fn added(file: Option<&[u8]>, keys: &[String]) -> Vec<u8> {
    let mut lines: Vec<&[u8]> =
        file.map_or_else(Vec::new, |file| file.split(|byte| *byte == b'\n').collect());
    for key in keys {
        if !lines.contains(&key.as_bytes()) {
            lines.push(key.as_bytes());
        }
    }
    lines.join(&b'\n')
}

/// The file without these keys.
pub(super) fn removed(file: &[u8], keys: &[String]) -> Vec<u8> {
    let is_left = |line: &&[u8]| keys.iter().all(|key| key.as_bytes() != *line);
    let lines: Vec<&[u8]> = file.split(|byte| *byte == b'\n').filter(is_left).collect();
    lines.join(&b'\n')
}

#[cfg(test)]
mod tests {
    use super::{added, check, removed, shown};

    const FILE: &[u8] =
        b"algo key1 comments\nalgo key1 comments\n# a commented line\nalgo some-key another\n";

    fn list(keys: &[&str]) -> Vec<String> {
        keys.iter().map(|key| (*key).to_owned()).collect()
    }

    #[test]
    fn keys_are_added_once_and_comments_stay() {
        let (one, two) = ("algo key1 comments", "algo key2 comments");
        assert_eq!(added(None, &list(&[two])), two.as_bytes());
        assert_eq!(added(Some(two.as_bytes()), &list(&[one, two, one])), format!("{two}\n{one}").as_bytes());
        assert_eq!(added(None, &[]), b"");
        assert_eq!(added(Some(b"# \xFF\n"), &list(&[one])), b"# \xFF\n\nalgo key1 comments");
    }

    #[test]
    fn every_line_of_a_removed_key_goes_and_others_stay() {
        assert_eq!(removed(FILE, &list(&["algo key2 comments"])), FILE);
        assert_eq!(
            removed(FILE, &list(&["algo key1 comments"])),
            b"# a commented line\nalgo some-key another\n"
        );
    }

    #[test]
    fn keys_are_shown_without_comments_the_last_first() {
        assert_eq!(
            shown(b" algo key1 \r\n#no\n\n\talgo key2\n"),
            ["algo key2".to_owned(), "algo key1".to_owned()]
        );
    }

    #[test]
    fn comments_and_several_lines_are_no_keys() {
        let refused = |key: &str| check(&list(&["algo good", key])).map_err(|error| error.desc);
        assert_eq!(refused("#x"), Err("invalid OpenSSH public key: '#x'".to_owned()));
        assert_eq!(refused("a\nb"), Err("invalid OpenSSH public key: 'a\nb'".to_owned()));
        assert!(refused("a\0b").is_err());
        assert_eq!(refused("algo other"), Ok(()));
    }
}
