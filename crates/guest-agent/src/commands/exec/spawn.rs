//! Starting a program exactly as asked.

use crate::commands::search;
use guest_protocol::arguments::exec::{Capture, Exec};
use rustix::fd::OwnedFd;
use std::ffi::{CString, c_char};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// A program that runs, and our ends of its pipes.
#[derive(Debug)]
pub(super) struct Spawned {
    pub(super) child: Child,
    pub(super) input: Option<OwnedFd>,
    pub(super) out: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
}

/// Starts it in a process group of its own.
pub(super) fn spawn(exec: &Exec) -> io::Result<Spawned> {
    if exec.path.contains('\0') {
        return Err(invalid());
    }
    // Of several, getenv(3) finds the first.
    let path = exec.env.iter().flatten().find_map(|entry| entry.strip_prefix("PATH="));
    let program = search::find(&exec.path, path)?;
    let argv = std::iter::once(exec.path.as_bytes()).chain(exec.arg.iter().map(String::as_bytes));
    match spawn_image(exec, Image::new(program.as_os_str().as_bytes(), argv, exec.env.as_deref())?) {
        // A script without its interpreter's name is the shell's, as for execvp(3).
        Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => {
            let script = [b"/bin/sh", program.as_os_str().as_bytes()];
            let argv = script.into_iter().chain(exec.arg.iter().map(String::as_bytes));
            spawn_image(exec, Image::new(b"/bin/sh", argv, exec.env.as_deref())?)
        }
        spawned => spawned,
    }
}

fn spawn_image(exec: &Exec, image: Image) -> io::Result<Spawned> {
    // The name is of no use: the image is executed before the library would do it.
    let mut command = Command::new("guest-exec");
    let piped = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
    command.stdin(piped(exec.input.is_some()));
    command.stdout(piped(matches!(exec.capture, Capture::Stdout | Capture::Separated)));
    command.stderr(piped(matches!(exec.capture, Capture::Stderr | Capture::Separated)));
    let mut merged = None;
    if exec.capture == Capture::Merged {
        let (reader, writer) = io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer);
        merged = Some(OwnedFd::from(reader));
    }
    // A signal meant for the agent's group, or one that the program sends to its own, stays where it belongs.
    command.process_group(0);
    // SAFETY: it makes plain system calls only, which are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            crate::children::be_like_others();
            Err(image.execute())
        });
    }
    let mut child = command.spawn()?;
    // With `command` the writing ends of a merged pipe are dropped, so that its end will be seen.
    drop(command);
    Ok(Spawned {
        input: child.stdin.take().map(OwnedFd::from),
        out: merged.or(child.stdout.take().map(OwnedFd::from)),
        err: child.stderr.take().map(OwnedFd::from),
        child,
    })
}

/// What execve(2) takes, made before the fork. Words and environment go through in their order and with whatever is twice
/// or odd, which `Command` would tidy up.
struct Image {
    program: CString,
    argv: Pointers,
    env: Option<Pointers>,
}

impl Image {
    fn new<'a>(
        program: &[u8],
        argv: impl Iterator<Item = &'a [u8]>,
        env: Option<&'a [String]>,
    ) -> io::Result<Image> {
        Ok(Image {
            program: CString::new(program).map_err(|_| invalid())?,
            argv: Pointers::new(argv)?,
            env: env.map(|env| Pointers::new(env.iter().map(String::as_bytes))).transpose()?,
        })
    }

    /// Returns only to say why it did not work. Async-signal-safe.
    fn execute(&self) -> io::Error {
        // SAFETY: the strings live as long as we do, and each list ends with a null pointer.
        unsafe {
            match &self.env {
                Some(env) => libc::execve(self.program.as_ptr(), self.argv.list.as_ptr(), env.list.as_ptr()),
                None => libc::execv(self.program.as_ptr(), self.argv.list.as_ptr()),
            };
        }
        io::Error::last_os_error()
    }
}

/// C strings, and pointers to them.
struct Pointers {
    /// Owns what the list points to.
    _strings: Vec<CString>,
    list: Vec<*const c_char>,
}

// SAFETY: the pointers are to strings of this same value, which nobody changes.
unsafe impl Send for Pointers {}
// SAFETY: as above.
unsafe impl Sync for Pointers {}

impl Pointers {
    fn new<'a>(strings: impl Iterator<Item = &'a [u8]>) -> io::Result<Pointers> {
        let strings = strings.map(CString::new).collect::<Result<Vec<_>, _>>().map_err(|_| invalid())?;
        let pointers = strings.iter().map(|string| string.as_ptr());
        let list = pointers.chain(std::iter::once(std::ptr::null())).collect();
        Ok(Pointers { _strings: strings, list })
    }
}

/// A zero byte ends no word.
fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}
