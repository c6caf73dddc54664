//! `guest-set-user-password`: by `chpasswd`, which reads the password from its input; it is in no argument list and no log.

use super::helper;
use guest_protocol::Error;
use guest_protocol::arguments::accounts::SetUserPassword;
use serde_json::{Value, json};
use std::time::Duration;

/// Longest that `chpasswd` may take; PAM's modules may ask a network.
const CHPASSWD_MAX: Duration = Duration::from_secs(120);

/// Sets a password, or refuses what would be more than one line of `chpasswd`'s input.
pub(super) fn set_user_password(arguments: &SetUserPassword) -> Result<Value, Error> {
    let line = line(arguments)?;
    let argv: &[&str] = if arguments.crypted { &["chpasswd", "-e"] } else { &["chpasswd"] };
    helper::run(argv, Some(&line), Some(CHPASSWD_MAX), "set user password")?;
    Ok(json!({}))
}

fn line(SetUserPassword { username, password, .. }: &SetUserPassword) -> Result<Vec<u8>, Error> {
    // In qemu-ga a zero byte ends the password, or the name, and the rest of it is silently not set.
    if password.iter().any(|byte| matches!(byte, b'\n' | 0)) {
        return Err(Error::generic("forbidden characters in raw password"));
    }
    if username.contains(['\n', ':', '\0']) {
        return Err(Error::generic("forbidden characters in username"));
    }
    Ok([username.as_bytes(), b":", password, b"\n"].concat())
}

#[cfg(test)]
mod tests {
    use super::line;
    use guest_protocol::arguments::accounts::SetUserPassword;

    #[test]
    fn a_name_or_password_that_is_more_than_one_line_is_refused() {
        let line = |username: &str, password: &[u8]| {
            let (username, password) = (username.to_owned(), password.to_vec());
            line(&SetUserPassword { username, password, crypted: false }).map_err(|error| error.desc)
        };
        assert_eq!(line("alice", b"p:w \xFF"), Ok(b"alice:p:w \xFF\n".to_vec()));
        assert_eq!(line("alice", b""), Ok(b"alice:\n".to_vec()));
        let password = Err("forbidden characters in raw password".to_owned());
        let name = Err("forbidden characters in username".to_owned());
        assert_eq!(line("alice", b"a\nroot:x"), password);
        assert_eq!(line("alice", b"a\0b"), password);
        assert_eq!(line("alice:x\nroot", b"a"), name);
        assert_eq!(line("alice\nroot", b"a\n"), password, "the password is looked at first");
        assert_eq!(line("al\0ice", b"a"), name);
    }
}
