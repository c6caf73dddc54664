//! The agent's own program, copied into memory and sealed: guard and workers start from what runs now, whatever became of the
//! file since, and reading it while frozen needs no file system.

use rustix::fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Largest program that is copied, in bytes; a release build has a few MiB, a debug build some tens.
const PROGRAM_BYTES_MAX: u64 = 512 << 20;

/// A sealed copy of a program.
#[derive(Debug)]
pub(crate) struct Program(OwnedFd);

impl Program {
    /// Copies and seals the program at `path`.
    /// # Errors
    /// As reading it and as `memfd_create`.
    pub(crate) fn copy_of(path: &Path) -> io::Result<Self> {
        let mut source = File::open(path)?;
        if source.metadata()?.len() > PROGRAM_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "program too large to copy"));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know EXEC and refuse it; later ones may be set to ask for it (`vm.memfd_noexec`).
        let memory = memfd_create("stillpoint-agent", flags | MemfdFlags::EXEC)
            .or_else(|_| memfd_create("stillpoint-agent", flags))?;
        let mut memory = File::from(memory);
        let _bytes = io::copy(&mut source, &mut memory)?;
        // Others may run it but not read it: then the kernel makes it undumpable from its first instruction on,
        // and nobody with the same user id can attach to it before it says so itself.
        fchmod(&memory, Mode::from_raw_mode(0o511))?;
        fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self(memory.into()))
    }

    /// A path by which a forked child finds it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn nobody_can_write_to_the_copy() {
        let program = Program::copy_of(Path::new("/bin/true")).unwrap();
        let mut file = File::from(program.0.try_clone().unwrap());
        assert!(file.write_all(b"x").is_err() && file.set_len(0).is_err());
        assert!(std::process::Command::new(program.path()).status().unwrap().success());
    }
}
