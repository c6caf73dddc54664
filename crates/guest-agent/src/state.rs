//! `qga.state` in the state folder: the number of the next file handle, which no two handles share, not even over a
//! restart. qemu-ga reads what is written here, and the other way round.
//!
//! The file says a number that is not given out yet. It is ahead by some, so that not every handle costs a write of a file.

use crate::freeze::gather::read_bounded;
use crate::options::keyfile::{self, KeyFile};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The first handle of a guest that never gave one out.
const FIRST: i64 = 1000;
/// How many handles one write of the file is good for.
const AHEAD: i64 = 64;

/// Gives out the numbers of file handles.
#[derive(Debug)]
pub struct Handles {
    path: PathBuf,
    counter: Mutex<Counter>,
}

#[derive(Debug)]
struct Counter {
    next: i64,
    /// The file says this one: those below may be given out.
    reserved: i64,
}

impl Handles {
    /// Reads the file, or makes it.
    /// # Errors
    /// When it can be neither read nor made, or says no number.
    pub fn open(statedir: &Path) -> io::Result<Handles> {
        let path = statedir.join("qga.state");
        let next = match read_bounded(&path, keyfile::BYTES_MAX) {
            Ok(bytes) => read(&bytes).ok_or_else(|| {
                let problem = format!("{} is no state file", path.display());
                io::Error::new(io::ErrorKind::InvalidData, problem)
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                write(&path, FIRST)?;
                FIRST
            }
            Err(error) => return Err(error),
        };
        Ok(Handles { path, counter: Mutex::new(Counter { next, reserved: next }) })
    }

    /// A number that was never given out. Writes a file now and then: call it where that may be waited for.
    /// # Errors
    /// When that file cannot be written: then the number would be given out again after a restart.
    pub fn next(&self) -> io::Result<i64> {
        // A panic elsewhere leaves whole numbers behind.
        let mut counter = self.counter.lock().unwrap_or_else(PoisonError::into_inner);
        if counter.next >= counter.reserved {
            // At the end of the numbers they begin anew, as qemu-ga's do.
            let next = if counter.next > i64::MAX - AHEAD { FIRST } else { counter.next };
            write(&self.path, next + AHEAD)?;
            *counter = Counter { next, reserved: next + AHEAD };
        }
        counter.next += 1;
        Ok(counter.next - 1)
    }
}

fn read(bytes: &[u8]) -> Option<i64> {
    let text = KeyFile::parse(bytes).ok()?.string("global", "fd_counter").ok()?;
    // A file without the key is one of an agent that had not come to it.
    text.map_or(Some(FIRST), |text| text.trim_ascii_end().parse().ok().filter(|number| *number >= 0))
}

/// Whole or not at all: a reader never sees half a file.
fn write(path: &Path, next: i64) -> io::Result<()> {
    let new = path.with_extension("state.new");
    let written = std::fs::write(&new, format!("[global]\nfd_counter={next}\n"))
        .and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        // A full tmpfs: half a file would only take more of its room.
        let _removed = std::fs::remove_file(&new).is_ok();
    }
    written
}

#[cfg(test)]
mod tests {
    use super::{AHEAD, Handles};
    use std::fs;

    fn file(folder: &tempfile::TempDir) -> String {
        fs::read_to_string(folder.path().join("qga.state")).expect("a state file")
    }

    #[test]
    fn handles_begin_at_1000_and_never_repeat_over_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        let handles = Handles::open(folder.path()).expect("a new file");
        assert_eq!(file(&folder), "[global]\nfd_counter=1000\n", "as qemu-ga writes it");
        let first: Vec<i64> = (0..3).map(|_| handles.next().expect("a number")).collect();
        assert_eq!(first, [1000, 1001, 1002]);
        let again = Handles::open(folder.path()).expect("the file");
        assert!(again.next().expect("a number") > 1002);
    }

    #[test]
    fn d27_not_every_handle_rewrites_the_state_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let handles = Handles::open(folder.path()).expect("a new file");
        handles.next().expect("a number");
        let before = file(&folder);
        (1..AHEAD).for_each(|_| assert!(handles.next().is_ok()));
        assert_eq!(file(&folder), before);
        handles.next().expect("a number");
        assert_ne!(file(&folder), before);
    }

    #[test]
    fn a_number_that_could_be_given_out_twice_is_not_given_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let handles = Handles::open(folder.path()).expect("a new file");
        fs::create_dir(folder.path().join("qga.state.new")).expect("something in the way");
        assert!(handles.next().is_err());
        fs::remove_dir(folder.path().join("qga.state.new")).expect("out of the way");
        assert_eq!(handles.next().expect("a number"), 1000);
    }

    #[test]
    fn a_state_file_that_says_nothing_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        for text in ["garbage", "[global]\nfd_counter=x\n", "[global]\nfd_counter=-1\n"] {
            fs::write(folder.path().join("qga.state"), text).expect("a file");
            assert!(Handles::open(folder.path()).is_err(), "{text}");
        }
        assert!(Handles::open(&folder.path().join("nope")).is_err(), "no folder");
    }
}
