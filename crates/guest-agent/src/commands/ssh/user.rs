//! Who a user is: `/etc/passwd`, or whatever else the system asks.

use crate::commands::helper;
use guest_protocol::Error;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most of `/etc/passwd` and of `/etc/group` that is read, in bytes.
const TABLE_BYTES_MAX: u64 = 16 << 20;
/// Most groups of one user. Source: `NGROUPS_MAX` of Linux.
const GROUPS_MAX: usize = 65_536;
/// Longest that a directory service may take.
const LOOKUP_MAX: Duration = Duration::from_secs(60);

/// A user with a home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Others that it is in.
    pub(super) groups: Vec<u32>,
    pub(super) home: PathBuf,
}

impl User {
    /// Looks a user up, in `/etc/passwd` first. `root` is `/` but in tests.
    pub(super) fn find(root: &Path, name: &str) -> Result<User, Error> {
        let found = parse(&table(root, "etc/passwd"), name).or_else(|| parse(&ask(name)?, name));
        let none = || Error::generic(format!("failed to lookup user '{name}': No such user"));
        Ok(User { groups: groups(&table(root, "etc/group"), name), ..found.ok_or_else(none)? })
    }
}

/// What can be read of a table; who is not in it is not there.
fn table(root: &Path, place: &str) -> Vec<u8> {
    let mut table = Vec::new();
    let read =
        File::open(root.join(place)).and_then(|file| file.take(TABLE_BYTES_MAX).read_to_end(&mut table));
    if let Err(error) = read {
        crate::log!(Error, "cannot read /{place}: {error}");
    }
    table
}

/// Directory services are asked by the system's own program, since they come as shared libraries.
fn ask(name: &str) -> Option<Vec<u8>> {
    let is_plain = !name.is_empty() && !name.starts_with('-') && !name.contains([':', '\n', '\0']);
    let ended =
        helper::wait_for(&["getent", "passwd", is_plain.then_some(name)?], None, Some(LOOKUP_MAX)).ok()?;
    ended.status.success().then_some(ended.output)
}

fn parse(table: &[u8], name: &str) -> Option<User> {
    String::from_utf8_lossy(table).lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [found, _password, uid, gid, _description, home, _shell, ..] = fields[..] else { return None };
        // Who asks for a number gets no user of that number.
        (!name.is_empty() && found == name && home.starts_with('/')).then(|| {
            Some(User {
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
                groups: Vec::new(),
                home: home.into(),
            })
        })?
    })
}

fn groups(table: &[u8], name: &str) -> Vec<u32> {
    let text = String::from_utf8_lossy(table);
    let group = |line: &str| {
        let mut fields = line.splitn(4, ':').skip(2);
        let gid = fields.next()?.parse().ok()?;
        fields.next()?.split(',').any(|member| member.trim() == name).then_some(gid)
    };
    text.lines().filter_map(group).take(GROUPS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::{User, groups, parse};

    #[test]
    fn a_user_is_in_the_groups_that_name_it() {
        let table = b"root:x:0:\nusers:x:100:bob,alice\nbroken:x\nothers:x:7:alice2\nlast:*:9:alice\n";
        assert_eq!(groups(table, "alice"), [100, 9]);
    }

    #[test]
    fn a_user_is_found_by_name_only() {
        let table = b"root:x:0:0:root:/root:/bin/sh\nbroken:x:a:b::/:\n# x\n:x:1:1::/x:\nhomeless:x:7:7:::\nalice:x:1000:100:\xFF:/home/alice:\n";
        let alice = User { uid: 1000, gid: 100, groups: Vec::new(), home: "/home/alice".into() };
        assert_eq!(parse(table, "alice"), Some(alice));
        for nobody in ["", "0", "1000", "alic", "broken", "homeless", "root:x"] {
            assert_eq!(parse(table, nobody), None, "{nobody}");
        }
    }
}
