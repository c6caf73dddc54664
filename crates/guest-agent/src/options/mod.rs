//! What the program is told: flags over a key file over defaults, as qemu-ga takes them.

mod dump;
mod flags;
pub mod keyfile;
mod settings;

pub use dump::dump;
pub use flags::USAGE;
pub use settings::{Method, Options, REPORTED_VERSION, VIRTIO_PORT};

use flags::Flag;
use keyfile::KeyFile;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// The key file where neither `-c` nor `QGA_CONF` names one.
const CONFIG: &str = "/etc/qemu/qemu-ga.conf";

/// What the program is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Serve hosts.
    Run(Box<Options>),
    /// Print the settings as a key file and end.
    Dump(Box<Options>),
    /// Print the version and end.
    Version,
    /// Print the usage and end.
    Help,
    /// Print the names of all commands and end.
    Commands,
}

/// Why there is nothing to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A flag that does not exist or lacks its value.
    #[error("{0}")]
    Flag(String),
    /// A key file, or the value of a flag.
    #[error("{0}")]
    Value(String),
}

/// Reads a key file, however long it claims to be.
/// # Errors
/// When it cannot be read.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    crate::freeze::gather::read_bounded(path, keyfile::BYTES_MAX)
}

/// Reads the words after the program's name, and the key file through `read`. `named` is the value of `QGA_CONF`.
/// # Errors
/// A sentence about what is wrong.
pub fn parse(
    words: impl IntoIterator<Item = OsString>,
    named: Option<OsString>,
    read: impl FnOnce(&Path) -> io::Result<Vec<u8>>,
) -> Result<Wish, Problem> {
    let flags = flags::split(words).map_err(Problem::Flag)?;
    let config = flags.iter().rev().find(|given| given.flag == Flag::Config).map(|given| given.value.clone());
    let required = config.is_some();
    let config = PathBuf::from(config.or(named).unwrap_or_else(|| CONFIG.into()));
    let mut options = Options::default();
    let loaded = match read(&config) {
        Ok(bytes) => KeyFile::parse(&bytes).and_then(|file| options.take_file(&file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !required => Ok(()),
        Err(error) => Err(error.to_string()),
    };
    loaded.map_err(|problem| {
        Problem::Value(format!("error loading configuration from path: {}, {problem}", config.display()))
    })?;
    let mut dump = false;
    for given in flags {
        match given.flag {
            Flag::Version => return Ok(Wish::Version),
            Flag::Help => return Ok(Wish::Help),
            Flag::BlockRpcs if given.value == "help" || given.value == "?" => return Ok(Wish::Commands),
            Flag::DumpConf => dump = true,
            _ => options.take_flag(given).map_err(Problem::Value)?,
        }
    }
    Ok(if dump { Wish::Dump(Box::new(options)) } else { Wish::Run(Box::new(options)) })
}

#[cfg(test)]
mod tests {
    use super::{Method, Options, Problem, Wish, dump, parse};
    use std::io;

    fn read(line: &str, file: Option<&str>) -> Result<Wish, Problem> {
        parse(line.split_whitespace().map(Into::into), None, |_| {
            file.map(|text| text.as_bytes().to_vec()).ok_or_else(|| io::ErrorKind::NotFound.into())
        })
    }

    #[track_caller]
    fn with_file(line: &str, file: &str) -> Options {
        match read(line, Some(file)) {
            Ok(Wish::Run(options)) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn options(line: &str) -> Options {
        with_file(line, "")
    }

    #[test]
    fn values_may_be_glued_apart_long_or_abbreviated() {
        for line in [
            "-m unix-listen -p /s -v",
            "-munix-listen -p/s -v",
            "-vmunix-listen --path=/s",
            "--meth unix-listen --pat /s --verb",
        ] {
            let options = options(line);
            assert_eq!(options.method, Method::UnixListen, "{line}");
            assert_eq!(options.path, Some("/s".into()), "{line}");
            assert!(options.verbose, "{line}");
        }
    }

    #[test]
    fn a_hook_must_be_glued_to_its_flag() {
        assert_eq!(options("").hook, None);
        for (line, hook) in [
            ("-F", "/etc/qemu/fsfreeze-hook"),
            ("-F /other", "/etc/qemu/fsfreeze-hook"),
            ("-vF", "/etc/qemu/fsfreeze-hook"),
            ("-F/x", "/x"),
            ("--fsfreeze-hook=/x", "/x"),
            ("--fsfreeze-hook /x", "/etc/qemu/fsfreeze-hook"),
        ] {
            assert_eq!(options(line).hook, Some(hook.into()), "{line}");
        }
    }

    #[test]
    fn lists_of_commands_add_up_and_each_comes_out_reversed() {
        let options =
            with_file("-b a,b -bc --allow-rpcs=d --blacklist e,", "[general]\nblock-rpcs=x,y\nblacklist=z\n");
        assert_eq!(options.blocked, ["y", "x", "z", "b", "a", "c", "e"]);
        assert_eq!(options.allowed, ["d"]);
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (line, words) in [
            ("-x", "invalid option -- 'x'"),
            ("-L", "invalid option -- 'L'"),
            ("--ver", "option '--ver' is ambiguous"),
            ("--nope", "unrecognized option '--nope'"),
            ("-p", "option requires an argument -- 'p'"),
            ("--path", "option '--path' requires an argument"),
            ("--verbose=1", "option '--verbose' doesn't allow an argument"),
        ] {
            assert_eq!(read(line, None), Err(Problem::Flag(words.to_owned())), "{line}");
        }
        for (line, words) in [
            ("-m carrier-pigeon", "unsupported channel method/type: carrier-pigeon"),
            ("--compat-lease-ms=300001", "'300001' is no number of milliseconds up to 300000"),
            (
                "--freeze-exclude=/a/*/b",
                "'/a/*/b' is neither mount point, '/folder/*' nor type of a file system",
            ),
        ] {
            assert_eq!(read(line, None), Err(Problem::Value(words.to_owned())), "{line}");
        }
    }

    #[test]
    fn a_word_that_is_no_option_is_passed_over() {
        assert!(options("word -v other").verbose);
        assert!(!options("-- -v").verbose);
    }

    #[test]
    fn flags_win_over_the_key_file_wherever_they_stand() {
        let file = "[general]\nmethod=isa-serial\npath=/dev/ttyS1\nverbose=1\nretry-path=true\ndaemon=false\n\
                    pidfile=/p\nstatedir=/s\nlogfile=/l\nfsfreeze-hook=/h\nunknown=x\n[other]\nmethod=x\n";
        let options = with_file("-p /dev/ttyS2 -c /named -d", file);
        assert_eq!(options.method, Method::IsaSerial);
        assert_eq!(options.path, Some("/dev/ttyS2".into()));
        assert!(options.verbose && options.retry_path && options.daemon);
        assert_eq!((options.pidfile, options.statedir), ("/p".into(), "/s".into()));
        assert_eq!((options.logfile, options.hook), (Some("/l".into()), Some("/h".into())));
    }

    #[test]
    fn only_a_key_file_that_was_named_by_a_flag_must_be_there() {
        assert!(matches!(read("-D", None), Ok(Wish::Dump(_))));
        let named = |line: &str, variable: Option<&str>| {
            let mut path = None;
            let words = line.split_whitespace().map(Into::into);
            let wish = parse(words, variable.map(Into::into), |named| {
                path = Some(named.to_owned());
                Err(io::ErrorKind::NotFound.into())
            });
            (path.expect("read"), wish.is_ok())
        };
        assert_eq!(named("", None), ("/etc/qemu/qemu-ga.conf".into(), true));
        assert_eq!(named("", Some("/v")), ("/v".into(), true));
        assert_eq!(named("-c /f", Some("/v")), ("/f".into(), false));
        assert_eq!(named("-c/e --config=/f", None), ("/f".into(), false));
        let wish = parse([], None, |_| Err(io::ErrorKind::PermissionDenied.into()));
        let words = "error loading configuration from path: /etc/qemu/qemu-ga.conf, permission denied";
        assert_eq!(wish, Err(Problem::Value(words.to_owned())));
    }

    #[test]
    fn a_key_file_that_cannot_be_understood_is_refused() {
        for file in [
            "[general]\nverbose=yes\n",
            "method=isa-serial\n",
            "[general]\nmethod=x\n",
            "[stillpoint]\nfreeze-exclud=/a\n",
            "[stillpoint]\ncompat-lease-ms=soon\n",
        ] {
            assert!(matches!(read("", Some(file)), Err(Problem::Value(_))), "{file}");
        }
    }

    #[test]
    fn a_dump_says_what_qemu_gas_says() {
        let Ok(Wish::Dump(options)) = read("-D -b a,b -b c -F -l /x", None) else { panic!("no dump") };
        let dumped = dump(&options);
        let expected = "[general]\ndaemon=false\nmethod=virtio-serial\npath=/dev/virtio-ports/org.qemu.guest_agent.0\n\
                        logfile=/x\npidfile=/var/run/qemu-ga.pid\nfsfreeze-hook=/etc/qemu/fsfreeze-hook\n\
                        statedir=/var/run\nverbose=false\nretry-path=false\nblock-rpcs=b,a,c\nallow-rpcs=\n";
        assert_eq!(dumped, expected);
        // Read again it says the same, but for the order of the list.
        let again = with_file("", &dumped);
        assert_eq!(again.blocked, ["c", "a", "b"]);
        assert_eq!(
            Options { blocked: Vec::new(), path: None, ..again },
            Options { blocked: Vec::new(), ..*options }
        );
    }

    #[test]
    fn no_flag_of_ours_is_in_the_way_of_an_abbreviation_that_qemu_ga_takes() {
        for (line, retries) in [("--re", true), ("--r", true), ("--report-v=1", false)] {
            assert_eq!(options(line).retry_path, retries, "{line}");
        }
        assert_eq!(options("--f=/x").hook, Some("/x".into()));
        assert_eq!(read("--h", None), Ok(Wish::Help));
    }

    #[test]
    fn a_dump_holds_what_is_ours_where_it_is_set() {
        let line = "-m unix-listen --compat-lease-ms=5000 --freeze-exclude=/b,vfat --freeze-exclude=/c/* \
                    --hook-limit-ms=7000 --report-hook-output";
        let set = options(line);
        let dumped = dump(&set);
        assert!(
            dumped.ends_with(
                "\n\n[stillpoint]\ncompat-lease-ms=5000\nhook-limit-ms=7000\n\
                               report-hook-output=true\nfreeze-exclude=/b,vfat,/c/*\n"
            ),
            "{dumped}"
        );
        assert!(!dumped.contains("path=/"), "there is none: {dumped}");
        assert_eq!(with_file("", &dumped), set);
    }
}
