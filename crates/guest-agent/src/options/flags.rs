//! The flags, and how words become flags and values: as getopt_long does it for qemu-ga.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Printed by `-h`, after a line that names the program.
pub const USAGE: &str = "\
Serves the QEMU guest agent protocol inside a guest.

  -c, --config=PATH         key file (default: $QGA_CONF, or else /etc/qemu/qemu-ga.conf, if it is there)
  -m, --method=METHOD       virtio-serial (default), isa-serial, unix-listen or vsock-listen
  -p, --path=PATH           port, socket or CID:PORT (default: /dev/virtio-ports/org.qemu.guest_agent.0 for
                            virtio-serial, /dev/ttyS0 for isa-serial)
  -l, --logfile=PATH        log file (default: standard error)
  -f, --pidfile=PATH        file for the process id, with -d only (default: /var/run/qemu-ga.pid)
  -F, --fsfreeze-hook[=PATH]
                            program to run before a freeze and after a thaw (alone: /etc/qemu/fsfreeze-hook)
  -t, --statedir=PATH       folder for state files, on a file system that is never frozen (default: /var/run)
  -v, --verbose             log every level, not only errors
  -d, --daemonize           go on in the background
  -r, --retry-path          open the port again every 5 seconds when it is not there or fails
  -b, --block-rpcs=A,B      refuse these commands ('help' lists all)
  -a, --allow-rpcs=A,B      refuse all but these commands
  -D, --dump-conf           print what key file and flags say together, as a key file
  -V, --version             print the version
  -h, --help                print this

Not known to qemu-ga:
      --report-version=V    version that hosts are told (default: 11.1.3)
      --compat-lease-ms=N   how long guest-fsfreeze-freeze may hold the guest (default and most: 300000)
      --freeze-include=A,B  freeze only these file systems: mount points, '/folder/*' for all below a folder,
                            or types such as xfs
      --freeze-exclude=A,B  freeze none of these
      --hook-limit-ms=N     how long one call of a hook may take (default: 60000)
      --report-hook-output  tell hosts what hooks write, up to 1 KiB (default: only the log)
";

/// What a flag is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flag {
    AllowRpcs,
    BlockRpcs,
    CompatLeaseMs,
    Config,
    Daemonize,
    DumpConf,
    FreezeExclude,
    FreezeInclude,
    FsfreezeHook,
    Help,
    HookLimitMs,
    Logfile,
    Method,
    Path,
    Pidfile,
    ReportHookOutput,
    ReportVersion,
    RetryPath,
    Statedir,
    Verbose,
    Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    Nothing,
    Value,
    /// A value only where it is glued to the flag.
    GluedValue,
}

const FLAGS: &[(&str, Option<u8>, Takes, Flag)] = &[
    ("allow-rpcs", Some(b'a'), Takes::Value, Flag::AllowRpcs),
    ("block-rpcs", Some(b'b'), Takes::Value, Flag::BlockRpcs),
    // The name before qemu-ga 9.1: an unknown flag would end the start, and with it the protection.
    ("blacklist", None, Takes::Value, Flag::BlockRpcs),
    ("compat-lease-ms", None, Takes::Value, Flag::CompatLeaseMs),
    ("config", Some(b'c'), Takes::Value, Flag::Config),
    ("daemonize", Some(b'd'), Takes::Nothing, Flag::Daemonize),
    ("dump-conf", Some(b'D'), Takes::Nothing, Flag::DumpConf),
    ("freeze-exclude", None, Takes::Value, Flag::FreezeExclude),
    ("freeze-include", None, Takes::Value, Flag::FreezeInclude),
    ("fsfreeze-hook", Some(b'F'), Takes::GluedValue, Flag::FsfreezeHook),
    ("help", Some(b'h'), Takes::Nothing, Flag::Help),
    ("hook-limit-ms", None, Takes::Value, Flag::HookLimitMs),
    ("logfile", Some(b'l'), Takes::Value, Flag::Logfile),
    ("method", Some(b'm'), Takes::Value, Flag::Method),
    ("path", Some(b'p'), Takes::Value, Flag::Path),
    ("pidfile", Some(b'f'), Takes::Value, Flag::Pidfile),
    ("report-hook-output", None, Takes::Nothing, Flag::ReportHookOutput),
    ("report-version", None, Takes::Value, Flag::ReportVersion),
    ("retry-path", Some(b'r'), Takes::Nothing, Flag::RetryPath),
    ("statedir", Some(b't'), Takes::Value, Flag::Statedir),
    ("verbose", Some(b'v'), Takes::Nothing, Flag::Verbose),
    ("version", Some(b'V'), Takes::Nothing, Flag::Version),
];

/// A flag as it was given; the value is empty where it has none.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) flag: Flag,
    pub(super) value: OsString,
}

/// Splits the words after the program's name. Words that are no option are passed over.
/// # Errors
/// As getopt words it.
pub(super) fn split(words: impl IntoIterator<Item = OsString>) -> Result<Vec<Given>, String> {
    let mut words = words.into_iter();
    let mut all = Vec::new();
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        if bytes == b"--" {
            break;
        }
        if let Some(long) = bytes.strip_prefix(b"--") {
            let (name, glued) = match long.iter().position(|byte| *byte == b'=') {
                Some(at) => (&long[..at], Some(&long[at + 1..])),
                None => (long, None),
            };
            let name = String::from_utf8_lossy(name);
            let (name, takes, flag) = find_long(&name)?;
            let value = match (takes, glued) {
                (Takes::Nothing, Some(_)) => {
                    return Err(format!("option '--{name}' doesn't allow an argument"));
                }
                (Takes::Value, None) => {
                    words.next().ok_or_else(|| format!("option '--{name}' requires an argument"))?
                }
                (_, glued) => glued.map(bytes_to_word).unwrap_or_default(),
            };
            all.push(Given { flag, value });
        } else if let Some(cluster) = bytes.strip_prefix(b"-") {
            let mut rest = cluster;
            while let Some((&letter, after)) = rest.split_first() {
                let known = FLAGS.iter().find(|(_, known, ..)| *known == Some(letter));
                let shown = char::from(letter);
                let (_, _, takes, flag) =
                    *known.ok_or_else(|| format!("invalid option -- '{}'", shown.escape_default()))?;
                let glued = (takes != Takes::Nothing && !after.is_empty()).then_some(after);
                rest = if glued.is_some() { &[] } else { after };
                let value = match (takes, glued) {
                    (Takes::Value, None) => {
                        words.next().ok_or_else(|| format!("option requires an argument -- '{shown}'"))?
                    }
                    (_, glued) => glued.map(bytes_to_word).unwrap_or_default(),
                };
                all.push(Given { flag, value });
            }
        }
    }
    Ok(all)
}

fn bytes_to_word(bytes: &[u8]) -> OsString {
    OsString::from_vec(bytes.to_vec())
}

/// A long name, or a beginning of it that fits no other flag. What qemu-ga takes for one of its flags is that one, whatever
/// flags of ours begin with.
fn find_long(name: &str) -> Result<(&'static str, Takes, Flag), String> {
    let mut begins: Vec<_> = FLAGS.iter().filter(|(long, ..)| long.starts_with(name)).collect();
    let is_theirs = |(long, short, ..): &&(&str, Option<u8>, Takes, Flag)| short.is_some() || *long == name;
    if begins.iter().any(is_theirs) {
        begins.retain(is_theirs);
    }
    let same = |found: &&(&str, Option<u8>, Takes, Flag)| found.3;
    match begins.iter().find(|(long, ..)| *long == name).or(begins.first()) {
        Some((long, _, takes, flag)) if *long == name || begins.iter().all(|other| same(other) == *flag) => {
            Ok((*long, *takes, *flag))
        }
        Some(_) => Err(format!("option '--{name}' is ambiguous")),
        None => Err(format!("unrecognized option '--{name}'")),
    }
}
