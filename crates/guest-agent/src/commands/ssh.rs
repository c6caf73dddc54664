//! `guest-ssh-get-authorized-keys`, `-add-` and `-remove-`.
//!
//! A user's home is the user's. What is done there is done with the user's own rights, by a thread that has no others,
//! and no symbolic link in it is followed: a user who points `.ssh` at another's folder gets an error, not that folder.

mod home;
mod keys;
mod user;

use guest_protocol::Error;
use guest_protocol::answers::system::AuthorizedKeys as Keys;
use guest_protocol::arguments::accounts::AuthorizedKeys;
use home::Home;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use user::User;

/// One change at a time: each reads the file and writes it anew.
static CHANGE: Mutex<()> = Mutex::new(());

/// The keys that are no comments. `root` is where `/etc/passwd` and homes are, `/` but in tests.
///
/// Call all three in a thread of their own that ends afterwards: its rights become the user's.
pub(super) fn get(root: &Path, username: &str) -> Result<Keys, Error> {
    let home = Home::enter(root, &User::find(root, username)?)?;
    Ok(Keys { keys: keys::shown(&home.read()?) })
}

/// Adds keys that are not there yet, or puts them in the place of all that are.
pub(super) fn add(root: &Path, arguments: &AuthorizedKeys) -> Result<Value, Error> {
    keys::check(&arguments.keys)?;
    let user = User::find(root, &arguments.username)?;
    let _alone = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    let home = Home::enter(root, &user)?;
    let old = if arguments.reset { None } else { home.read_if_there()? };
    home.make_folder()?;
    home.write(&keys::added(old.as_deref(), &arguments.keys))?;
    Ok(json!({}))
}

/// Removes keys; it is no error if they are not there.
pub(super) fn remove(root: &Path, arguments: &AuthorizedKeys) -> Result<Value, Error> {
    keys::check(&arguments.keys)?;
    let user = User::find(root, &arguments.username)?;
    let _alone = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    let home = Home::enter(root, &user)?;
    if let Some(old) = home.read_if_there()? {
        home.write(&keys::removed(&old, &arguments.keys))?;
    }
    Ok(json!({}))
}

#[cfg(test)]
mod tests;
