//! `guest-get-users`: who is logged in, as the system's records of logins have it.
//!
//! The records are read here because not every C library does. They are GNU's, whatever the agent was built with.

use guest_protocol::answers::system::User;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Where the records lie; systems without them, as Debian from 13 on, have no file.
const PLACES: [&str; 2] = ["var/run/utmp", "run/utmp"];
/// Most bytes of records that are read: ten thousand of them.
const RECORDS_BYTES_MAX: u64 = 4 << 20;

/// A record in bytes. Source: `struct utmpx` of glibc, `bits/utmp.h`: on most 64-bit machines its time is as on their
/// 32-bit sisters (`__WORDSIZE_TIME64_COMPAT32`), on those that never had one it is not.
#[cfg(not(any(target_arch = "aarch64", target_arch = "riscv64", target_arch = "loongarch64")))]
mod record {
    pub(super) const BYTES: usize = 384;
    pub(super) fn time(record: &[u8]) -> (f64, f64) {
        let number = |at: usize| record[at..at + 4].try_into().map_or(0, i32::from_ne_bytes);
        (f64::from(number(340)), f64::from(number(344)))
    }
}
#[cfg(any(target_arch = "aarch64", target_arch = "riscv64", target_arch = "loongarch64"))]
mod record {
    pub(super) const BYTES: usize = 400;
    #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 fit a double's 53 bits")]
    pub(super) fn time(record: &[u8]) -> (f64, f64) {
        let number = |at: usize| record[at..at + 8].try_into().map_or(0, i64::from_ne_bytes);
        (number(344) as f64, number(352) as f64)
    }
}

/// `ut_type` of a login that lasts.
const USER_PROCESS: i16 = 7;
const USER: std::ops::Range<usize> = 44..76;

/// Each user once, with the earliest login. `root` is `/` but in tests.
pub(super) fn users(root: &Path) -> Vec<User> {
    let mut records = Vec::new();
    for place in PLACES {
        if let Ok(file) = File::open(root.join(place))
            && file.take(RECORDS_BYTES_MAX).read_to_end(&mut records).is_ok()
        {
            break;
        }
    }
    parse(&records)
}

fn parse(records: &[u8]) -> Vec<User> {
    let mut users: Vec<User> = Vec::new();
    for record in records.chunks_exact(record::BYTES) {
        if i16::from_ne_bytes([record[0], record[1]]) != USER_PROCESS {
            continue;
        }
        let name = record[USER].split(|byte| *byte == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name);
        let (seconds, microseconds) = record::time(record);
        let login_time = seconds + microseconds / 1_000_000.0;
        match users.iter_mut().find(|user| user.user == name) {
            Some(user) => user.login_time = user.login_time.min(login_time),
            None => users.push(User { user: name.into_owned(), login_time }),
        }
    }
    users
}

#[cfg(test)]
mod tests {
    use super::{User, parse, record, users};

    /// A record as the system writes it.
    fn record(kind: i16, user: &str, seconds: i32, microseconds: i32) -> Vec<u8> {
        let mut bytes = vec![0; record::BYTES];
        bytes[..2].copy_from_slice(&kind.to_ne_bytes());
        bytes[44..44 + user.len()].copy_from_slice(user.as_bytes());
        if record::BYTES == 384 {
            bytes[340..344].copy_from_slice(&seconds.to_ne_bytes());
            bytes[344..348].copy_from_slice(&microseconds.to_ne_bytes());
        } else {
            bytes[344..352].copy_from_slice(&i64::from(seconds).to_ne_bytes());
            bytes[352..360].copy_from_slice(&i64::from(microseconds).to_ne_bytes());
        }
        bytes
    }

    fn user(name: &str, login_time: f64) -> User {
        User { user: name.to_owned(), login_time }
    }

    #[test]
    fn each_user_is_told_once_with_the_earliest_login() {
        let long = "a-name-that-fills-its-32-bytes-x";
        let records = [
            record(2, "reboot", 1, 0),
            record(7, "root", 2000, 500_000),
            record(7, "alice", 3000, 0),
            record(7, "root", 1000, 250_000),
            record(8, "gone", 1, 0),
            record(7, long, 4000, 0),
            vec![7; 100],
        ];
        assert_eq!(
            parse(&records.concat()),
            [user("root", 1000.25), user("alice", 3000.0), user(long, 4000.0)]
        );
        assert_eq!(parse(&[]), []);
    }

    #[test]
    fn a_system_without_records_has_no_users() {
        let root = tempfile::tempdir().expect("a folder");
        assert_eq!(users(root.path()), []);
        std::fs::create_dir_all(root.path().join("run")).expect("created");
        std::fs::write(root.path().join("run/utmp"), record(7, "bob", 5, 0)).expect("written");
        assert_eq!(users(root.path()), [user("bob", 5.0)]);
    }
}
