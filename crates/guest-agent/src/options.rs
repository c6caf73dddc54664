//! The command line, as qemu-ga takes it.
//!
//! What qemu-ga knows and this agent does not carry out yet is refused by name, never ignored.

use guest_protocol::stillpoint::LEASE_MS_MAX;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

/// Version that is reported to hosts, which compare it as QEMU's. It is the one whose behaviour is kept.
pub const REPORTED_VERSION: &str = "11.1.3";

/// Where hosts are listened to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// A virtio-serial port.
    #[default]
    VirtioSerial,
    /// A unix socket.
    UnixListen,
}

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `-m`
    pub method: Method,
    /// `-p`; `None` is the method's own default.
    pub path: Option<PathBuf>,
    /// `-l`; `None` is standard error.
    pub logfile: Option<PathBuf>,
    /// `-t`
    pub statedir: PathBuf,
    /// `-v`
    pub verbose: bool,
    /// `-r`
    pub retry_path: bool,
    /// `-b`
    pub blocked: Vec<String>,
    /// `-a`; if given, nothing else is allowed.
    pub allowed: Option<Vec<String>>,
    /// `--report-version`, ours.
    pub reported_version: String,
    /// `--compat-lease-ms`, ours: how long a plain `guest-fsfreeze-freeze` may hold the guest.
    pub compat_lease: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            method: Method::default(),
            path: None,
            logfile: None,
            statedir: PathBuf::from("/var/run"),
            verbose: false,
            retry_path: false,
            blocked: Vec::new(),
            allowed: None,
            reported_version: REPORTED_VERSION.to_owned(),
            compat_lease: Duration::from_millis(LEASE_MS_MAX),
        }
    }
}

/// What the program is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Serve hosts.
    Run(Box<Options>),
    /// Print the version and end.
    Version,
    /// Print the usage and end.
    Help,
    /// Print the names of all commands and end.
    Commands,
}

/// Printed by `-h`.
pub const USAGE: &str = "\
Usage: stillpoint-agent [OPTION]...
Serves the QEMU guest agent protocol inside a guest.

  -m, --method=METHOD       virtio-serial (default) or unix-listen
  -p, --path=PATH           port or socket (default: /dev/virtio-ports/org.qemu.guest_agent.0)
  -l, --logfile=PATH        log file (default: standard error)
  -t, --statedir=PATH       folder for state files, on a file system that is never frozen (default: /var/run)
  -v, --verbose             log every level, not only errors
  -r, --retry-path          open the port again every 5 seconds when it is not there or fails
  -b, --block-rpcs=A,B      refuse these commands ('help' lists all)
  -a, --allow-rpcs=A,B      refuse all but these commands
      --report-version=V    version that hosts are told (default: 11.1.3)
      --compat-lease-ms=N   how long guest-fsfreeze-freeze may hold the guest (default and most: 300000)
  -V, --version             print the version
  -h, --help                print this
";

#[derive(Clone, Copy)]
enum Takes {
    Nothing,
    Value,
    /// A value only where it is glued to the flag.
    GluedValue,
}

const FLAGS: &[(&str, char, Takes)] = &[
    ("allow-rpcs", 'a', Takes::Value),
    ("block-rpcs", 'b', Takes::Value),
    ("compat-lease-ms", 'L', Takes::Value),
    ("config", 'c', Takes::Value),
    ("daemonize", 'd', Takes::Nothing),
    ("dump-conf", 'D', Takes::Nothing),
    ("fsfreeze-hook", 'F', Takes::GluedValue),
    ("help", 'h', Takes::Nothing),
    ("logfile", 'l', Takes::Value),
    ("method", 'm', Takes::Value),
    ("path", 'p', Takes::Value),
    ("pidfile", 'f', Takes::Value),
    ("report-version", 'R', Takes::Value),
    ("retry-path", 'r', Takes::Nothing),
    ("statedir", 't', Takes::Value),
    ("verbose", 'v', Takes::Nothing),
    ("version", 'V', Takes::Nothing),
];

/// Reads the words after the program's name. Words that are no option are passed over, as qemu-ga does.
/// # Errors
/// A sentence about what is wrong.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Wish, String> {
    let mut words = words.into_iter();
    let mut options = Options::default();
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
            let (flag, takes) = find_long(&String::from_utf8_lossy(name))?;
            let value = value(flag, takes, glued, &mut words)?;
            if let Some(wish) = apply(&mut options, flag, value)? {
                return Ok(wish);
            }
        } else if let Some(cluster) = bytes.strip_prefix(b"-") {
            let mut rest = cluster;
            while let Some((&letter, after)) = rest.split_first() {
                let flag = char::from(letter);
                let (_, _, takes) = *FLAGS
                    .iter()
                    .find(|(_, known, _)| *known == flag)
                    .ok_or_else(|| format!("invalid option -- '{flag}'"))?;
                let glued = (!matches!(takes, Takes::Nothing) && !after.is_empty()).then_some(after);
                rest = if glued.is_some() { &[] } else { after };
                let value = value(flag, takes, glued, &mut words)?;
                if let Some(wish) = apply(&mut options, flag, value)? {
                    return Ok(wish);
                }
            }
        }
    }
    if options.method == Method::UnixListen && options.path.is_none() {
        return Err("must specify a path for this channel".to_owned());
    }
    Ok(Wish::Run(Box::new(options)))
}

fn find_long(name: &str) -> Result<(char, Takes), String> {
    let begins: Vec<_> = FLAGS.iter().filter(|(long, _, _)| long.starts_with(name)).collect();
    match begins.iter().find(|(long, _, _)| *long == name).or(begins.first()) {
        Some((long, flag, takes)) if *long == name || begins.len() == 1 => Ok((*flag, *takes)),
        Some(_) => Err(format!("option '--{name}' is ambiguous")),
        None => Err(format!("unrecognized option '--{name}'")),
    }
}

fn value(
    flag: char,
    takes: Takes,
    glued: Option<&[u8]>,
    words: &mut impl Iterator<Item = OsString>,
) -> Result<OsString, String> {
    let glued = glued.map(|bytes| OsString::from_vec(bytes.to_vec()));
    match (takes, glued) {
        (Takes::Nothing, Some(_)) => Err(format!("option '{flag}' doesn't allow an argument")),
        (Takes::Value, None) => {
            words.next().ok_or_else(|| format!("option requires an argument -- '{flag}'"))
        }
        (_, glued) => Ok(glued.unwrap_or_default()),
    }
}

fn apply(options: &mut Options, flag: char, value: OsString) -> Result<Option<Wish>, String> {
    match flag {
        'm' => {
            options.method = match value.to_str() {
                Some("virtio-serial") => Method::VirtioSerial,
                Some("unix-listen") => Method::UnixListen,
                _ => return Err(format!("channel method '{}' is not supported", value.display())),
            }
        }
        'p' => options.path = Some(value.into()),
        'l' => options.logfile = Some(value.into()),
        't' => options.statedir = value.into(),
        'v' => options.verbose = true,
        'r' => options.retry_path = true,
        'b' if value == "help" || value == "?" => return Ok(Some(Wish::Commands)),
        'b' => options.blocked.extend(list(&value)),
        'a' => options.allowed.get_or_insert_default().extend(list(&value)),
        'R' => options.reported_version = value.to_string_lossy().into_owned(),
        'L' => {
            let lease_ms = value.to_str().and_then(|text| text.parse().ok());
            let Some(lease_ms) = lease_ms.filter(|lease_ms| (1..=LEASE_MS_MAX).contains(lease_ms)) else {
                return Err(format!(
                    "'{}' is no number of milliseconds up to {LEASE_MS_MAX}",
                    value.display()
                ));
            };
            options.compat_lease = Duration::from_millis(lease_ms);
        }
        'V' => return Ok(Some(Wish::Version)),
        'h' => return Ok(Some(Wish::Help)),
        _ => {
            let long = FLAGS.iter().find(|(_, known, _)| *known == flag).map_or("", |(long, _, _)| long);
            return Err(format!("option '--{long}' is not supported by this version of stillpoint-agent"));
        }
    }
    Ok(None)
}

fn list(value: &OsStr) -> Vec<String> {
    value.to_string_lossy().split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::{Method, Options, Wish, parse};

    fn options(line: &str) -> Result<Options, String> {
        match parse(line.split_whitespace().map(Into::into))? {
            Wish::Run(options) => Ok(*options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn values_may_be_glued_apart_long_or_abbreviated() {
        for line in [
            "-m unix-listen -p /s -v",
            "-munix-listen -p/s -v",
            "-vmunix-listen --path=/s",
            "--meth unix-listen --pat /s --verb",
        ] {
            let options = options(line).expect(line);
            assert_eq!(options.method, Method::UnixListen, "{line}");
            assert_eq!(options.path, Some("/s".into()), "{line}");
            assert!(options.verbose, "{line}");
        }
    }

    #[test]
    fn lists_of_commands_accumulate() {
        let options = options("-b a,b -bc --allow-rpcs=d").expect("good options");
        assert_eq!(options.blocked, ["a", "b", "c"]);
        assert_eq!(options.allowed, Some(vec!["d".to_owned()]));
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (line, words) in [
            ("-m unix-listen", "must specify a path for this channel"),
            ("-m isa-serial", "channel method 'isa-serial' is not supported"),
            ("-F", "option '--fsfreeze-hook' is not supported by this version of stillpoint-agent"),
            ("-x", "invalid option -- 'x'"),
            ("--ver", "option '--ver' is ambiguous"),
            ("--nope", "unrecognized option '--nope'"),
            ("-p", "option requires an argument -- 'p'"),
            ("--compat-lease-ms=300001", "'300001' is no number of milliseconds up to 300000"),
            ("--verbose=1", "option 'v' doesn't allow an argument"),
        ] {
            assert_eq!(options(line), Err(words.to_owned()), "{line}");
        }
    }

    #[test]
    fn a_word_that_is_no_option_is_passed_over() {
        assert_eq!(options("word -v other").map(|options| options.verbose), Ok(true));
    }
}
