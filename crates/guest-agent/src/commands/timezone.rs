//! `guest-get-timezone`: the zone that holds in the guest now, read anew each time, since an administrator may change it.

mod rule;
mod tzif;

use guest_protocol::answers::system::Timezone;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Largest zone file that is read, in bytes; real ones are below 8 KiB.
const ZONE_BYTES_MAX: u64 = 1 << 20;

/// What a zone says about one instant.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Local {
    offset: i32,
    zone: String,
}

/// The zone that the environment's `TZ` names, or else `/etc/localtime`, or else UTC. `root` is `/` but in tests.
pub(super) fn timezone(root: &Path) -> Timezone {
    let named = std::env::var("TZ").ok();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let local = at(root, named.as_deref(), i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    Timezone { zone: Some(local.zone), offset: local.offset.into() }
}

fn at(root: &Path, named: Option<&str>, now: i64) -> Local {
    let file = |path: PathBuf| {
        let mut bytes = Vec::new();
        let file = File::open(path).ok()?;
        file.take(ZONE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        tzif::at(&bytes, now)
    };
    let found = match named.map(|name| name.strip_prefix(':').unwrap_or(name)) {
        None => file(root.join("etc/localtime")),
        Some("") => None,
        Some(name) if name.starts_with('/') => file(root.join(name.trim_start_matches('/'))),
        Some(name) => {
            file(root.join("usr/share/zoneinfo").join(name)).or_else(|| rule::Rule::parse(name)?.at(now))
        }
    };
    found.unwrap_or(Local { offset: 0, zone: "UTC".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::at;
    use std::path::Path;

    #[test]
    fn the_zone_comes_from_the_environment_or_else_from_etc_localtime_or_is_utc() {
        let root = tempfile::tempdir().expect("a folder");
        let zone = |root: &Path, named| {
            let local = at(root, named, 1_700_000_000);
            (local.zone, local.offset)
        };
        let utc = ("UTC".to_owned(), 0);
        assert_eq!(zone(root.path(), None), utc);
        let place = root.path().join("usr/share/zoneinfo/Here");
        std::fs::create_dir_all(place.join("")).expect("created");
        std::fs::create_dir_all(root.path().join("etc")).expect("created");
        let file = super::tzif::tests::version_2("EST5EDT,M3.2.0,M11.1.0");
        std::fs::write(place.join("There"), &file).expect("written");
        std::fs::write(root.path().join("etc/localtime"), &file).expect("written");
        let there = ("EST".to_owned(), -18_000);
        assert_eq!(zone(root.path(), None), there);
        assert_eq!(zone(root.path(), Some("Here/There")), there);
        assert_eq!(zone(root.path(), Some(":Here/There")), there);
        assert_eq!(zone(root.path(), Some("/usr/share/zoneinfo/Here/There")), there);
        assert_eq!(zone(root.path(), Some("CET-1CEST,M3.5.0,M10.5.0/3")), ("CET".to_owned(), 3600));
        assert_eq!(zone(root.path(), Some("")), utc);
        assert_eq!(zone(root.path(), Some("Nowhere/Nothing")), utc);
    }
}
