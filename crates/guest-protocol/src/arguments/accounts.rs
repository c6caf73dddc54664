//! Arguments of the commands about users: `guest-set-user-password` and `guest-ssh-*-authorized-keys`.

use crate::members::{self, Members};
use crate::{Error, base64};
use std::fmt;

/// Arguments of `guest-set-user-password`.
#[derive(Clone, PartialEq, Eq)]
pub struct SetUserPassword {
    /// Whose.
    pub username: String,
    /// The new one, decoded. A secret: nobody prints it.
    pub password: Vec<u8>,
    /// It is hashed already, as `/etc/shadow` has it.
    pub crypted: bool,
}

impl SetUserPassword {
    pub(crate) fn read(members: &mut Members) -> Result<Self, Error> {
        // The password is decoded last, as in qemu-ga: of two mistakes the type of an argument is told.
        let username = members.required("username", members::string)?;
        let password = members.required("password", members::text)?;
        let crypted = members.required("crypted", members::boolean)?;
        let password = base64::decode(password)?;
        Ok(Self { username, password, crypted })
    }
}

impl fmt::Debug for SetUserPassword {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("SetUserPassword")
            .field("username", &self.username)
            .field("crypted", &self.crypted)
            .finish_non_exhaustive()
    }
}

/// Arguments of `guest-ssh-add-authorized-keys` and `guest-ssh-remove-authorized-keys`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizedKeys {
    /// Whose.
    pub username: String,
    /// Keys, a line each.
    pub keys: Vec<String>,
    /// Only these remain. Not an argument of `remove`.
    pub reset: bool,
}

impl AuthorizedKeys {
    pub(crate) fn read_add(members: &mut Members) -> Result<Self, Error> {
        let mut arguments = Self::read_remove(members)?;
        arguments.reset = members.optional("reset", members::boolean)?.unwrap_or(false);
        Ok(arguments)
    }

    pub(crate) fn read_remove(members: &mut Members) -> Result<Self, Error> {
        Ok(Self {
            username: members.required("username", members::string)?,
            keys: members.required("keys", members::strings)?,
            reset: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::SetUserPassword;

    #[test]
    fn a_password_is_printed_nowhere() {
        let arguments =
            SetUserPassword { username: "alice".to_owned(), password: b"s3cret".to_vec(), crypted: false };
        assert_eq!(format!("{arguments:?}"), "SetUserPassword { username: \"alice\", crypted: false, .. }");
    }
}
