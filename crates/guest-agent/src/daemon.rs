//! Going on in the background (`-d`), and the file that says under which process id.
//!
//! The fork comes first of all, while there is one thread, and who started us waits until the agent serves: so it hears of
//! every failure, a locked pid file among them, where qemu-ga's parent has left by then.

use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_lock};
use rustix::process::{setsid, umask};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The background's way to tell who started it. Dropping it, or dying with it, tells of a failure.
#[derive(Debug)]
pub struct Starter {
    line: io::PipeWriter,
}

/// Goes on in a child with a session of its own. The parent does not return: it ends with code 0 once `started` is called,
/// else with 1. Call it before any thread is started.
/// # Errors
/// When the kernel has no room for another process.
pub fn fork_away() -> io::Result<Starter> {
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: there is one thread only, so the child's memory is whole, locks included.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reader);
            setsid()?;
            Ok(Starter { line: writer })
        }
        _ => {
            drop(writer);
            let started = matches!(reader.read(&mut [0]), Ok(1));
            std::process::exit(i32::from(!started));
        }
    }
}

impl Starter {
    /// Leaves the working folder and the starter's terminal behind, and lets the starter go.
    /// # Errors
    /// When there is no `/dev/null`.
    pub fn started(mut self) -> io::Result<()> {
        let nothing = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        umask(Mode::RWXG | Mode::RWXO);
        std::env::set_current_dir("/")?;
        rustix::stdio::dup2_stdin(&nothing)?;
        rustix::stdio::dup2_stdout(&nothing)?;
        rustix::stdio::dup2_stderr(&nothing)?;
        // Whoever started us may be gone already.
        let _told = self.line.write_all(&[1]).is_ok();
        Ok(())
    }
}

/// The file with the process id, locked as long as the agent lives and removed at its end.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    _locked: File,
}

impl PidFile {
    /// Writes it.
    /// # Errors
    /// A sentence, also where another agent has it locked.
    pub fn create(path: &Path) -> Result<PidFile, String> {
        let open = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let mut file = open.map_err(|error| format!("Cannot open pid file: {error}"))?;
        fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| format!("Cannot lock pid file: {}", io::Error::from(error)))?;
        let id = format!("{}\n", std::process::id());
        let written = file.set_len(0).and_then(|()| file.write_all(id.as_bytes()));
        written.map_err(|error| format!("Failed to write pid file: {error}"))?;
        Ok(PidFile { path: path.to_owned(), _locked: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // While it is locked still. An administrator may have removed it by hand.
        let _removed = std::fs::remove_file(&self.path).is_ok();
    }
}
