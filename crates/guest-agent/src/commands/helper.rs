//! The system's own programs that some commands leave their work to: `hwclock`, `chpasswd`, `poweroff`, `systemctl` …
//!
//! A helper runs in a session of its own. It is waited for, not for whoever holds its output after it; what it says is
//! kept up to a limit, for the error that tells it.

use super::search;
use crate::errno;
use guest_protocol::Error;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};
use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Most of a helper's output that an error repeats, in bytes.
const OUTPUT_BYTES_MAX: usize = 16 << 10;
/// Where helpers are, if the agent was started with an empty environment.
const PATH_UNSET: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How often a helper's end is looked for where the kernel cannot tell it.
const LOOK: Duration = Duration::from_millis(50);

/// How a helper ended, and what it said.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    pub(super) output: Vec<u8>,
}

/// Why there is no end to tell of.
#[derive(Debug)]
pub(super) enum Failure {
    /// It could not be executed.
    Exec(io::Error),
    /// It ran for longer than allowed, and was killed.
    TooLong(Duration),
    /// The system refused a pipe or a process.
    System(io::Error),
}

/// Runs a helper for an `action` and answers in the words of qemu-ga if that fails.
pub(super) fn run(
    argv: &[&str],
    input: Option<&[u8]>,
    time_max: Option<Duration>,
    action: &str,
) -> Result<(), Error> {
    let failed = |why: &str| Err(Error::generic(format!("child process has failed to {action}: {why}")));
    let ended = match wait_for(argv, input, time_max) {
        Ok(ended) => ended,
        // In qemu-ga it is the child that says so, hence the newline.
        Err(Failure::Exec(error)) => {
            return failed(&format!("failed to exec '{}': {}\n", argv[0], errno::words(&error)));
        }
        Err(Failure::TooLong(limit)) => {
            return failed(&format!("it did not end within {} s and was killed", limit.as_secs()));
        }
        Err(Failure::System(error)) => {
            let words = errno::words(&error);
            return Err(Error::generic(format!("failed to create child process: {words}")));
        }
    };
    let said = String::from_utf8_lossy(&ended.output);
    match (ended.status.code(), said.as_ref()) {
        (Some(0), _) => Ok(()),
        (Some(code), "") => failed(&format!("exit status {code}")),
        (Some(_), said) => failed(said),
        (None, "") => Err(Error::generic("child process has terminated abnormally")),
        (None, said) => Err(Error::generic(format!("child process has terminated abnormally: {said}"))),
    }
}

/// Runs a helper to its end.
pub(super) fn wait_for(
    argv: &[&str],
    input: Option<&[u8]>,
    time_max: Option<Duration>,
) -> Result<Ended, Failure> {
    let (mut child, mut pipes) = start(argv, input)?;
    let deadline = time_max.map(|limit| Instant::now() + limit);
    // Before Linux 5.3 there is no such descriptor.
    let end = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).ok();
    let waited = pipes.serve_until_end(&child, end, deadline);
    if !matches!(waited, Ok(true)) {
        // Its session's group has its id; where it is gone already, there is nothing to end.
        let _killed = kill_process_group(Pid::from_child(&child), Signal::KILL).is_ok();
    }
    let status = child.wait().map_err(Failure::System)?;
    pipes.read_what_is_there();
    match waited {
        Ok(true) => Ok(Ended { status, output: pipes.said }),
        Ok(false) => Err(Failure::TooLong(time_max.unwrap_or_default())),
        Err(error) => Err(Failure::System(error)),
    }
}

struct Pipes<'i> {
    /// What is still to be written, and where.
    input: Option<(OwnedFd, &'i [u8])>,
    output: Option<OwnedFd>,
    said: Vec<u8>,
}

fn start<'i>(argv: &[&str], input: Option<&'i [u8]>) -> Result<(Child, Pipes<'i>), Failure> {
    let program = if argv[0].contains('/') {
        Ok(argv[0].into())
    } else {
        let path = std::env::var_os("PATH");
        search::find_in(argv[0], path.as_deref().unwrap_or(OsStr::new(PATH_UNSET)))
    };
    let mut command = Command::new(program.map_err(Failure::Exec)?);
    command.arg0(argv[0]).args(&argv[1..]);
    let (reader, writer) = io::pipe().map_err(Failure::System)?;
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(writer.try_clone().map_err(Failure::System)?).stderr(writer);
    // SAFETY: plain system calls only, which are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            crate::children::be_like_others();
            // A new child leads no group, so this cannot fail.
            let _session = libc::setsid();
            Ok(())
        });
    }
    let spawned = command.spawn();
    // With it the writing ends are dropped, so that the end of the output will be seen.
    drop(command);
    let mut child = spawned.map_err(|error| match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOMEM) => Failure::System(error),
        _ => Failure::Exec(error),
    })?;
    let output = OwnedFd::from(reader);
    let input = child.stdin.take().map(OwnedFd::from).zip(input);
    for pipe in [Some(&output), input.as_ref().map(|(pipe, _)| pipe)].into_iter().flatten() {
        // It cannot be refused for a pipe, and if it were, only a mad helper could hold us up.
        let _set = rustix::io::ioctl_fionbio(pipe, true).is_ok();
    }
    Ok((child, Pipes { input, output: Some(output), said: Vec::new() }))
}

impl Pipes<'_> {
    /// Feeds the helper and listens to it until it has ended (true) or its time is over (false).
    fn serve_until_end(
        &mut self,
        child: &Child,
        end: Option<OwnedFd>,
        deadline: Option<Instant>,
    ) -> io::Result<bool> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
            let watched = [
                end.as_ref().map(|end| PollFd::new(end, PollFlags::IN)),
                self.output.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)),
                self.input.as_ref().map(|(pipe, _)| PollFd::new(pipe, PollFlags::OUT)),
            ];
            let mut watched: Vec<PollFd<'_>> = watched.into_iter().flatten().collect();
            let at_most = if end.is_some() { left } else { Some(left.map_or(LOOK, |left| left.min(LOOK))) };
            let timeout = at_most.and_then(|at_most| Timespec::try_from(at_most).ok());
            match poll(&mut watched, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let has_ended = match &end {
                Some(_) => !watched[0].revents().is_empty(),
                None => has_ended(child),
            };
            drop(watched);
            if has_ended {
                return Ok(true);
            }
            self.write();
            self.read_what_is_there();
        }
    }

    fn write(&mut self) {
        let Some((pipe, left)) = &mut self.input else { return };
        while !left.is_empty() {
            match rustix::io::write(pipe.as_fd(), left) {
                Ok(bytes) => *left = &left[bytes..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // It does not listen; its own end will say why.
                Err(_) => break,
            }
        }
        self.input = None;
    }

    fn read_what_is_there(&mut self) {
        let mut buffer = [0; 4096];
        while let Some(pipe) = &self.output {
            match rustix::io::read(pipe, &mut buffer) {
                Ok(0) => self.output = None,
                Ok(bytes) => {
                    let room = OUTPUT_BYTES_MAX - self.said.len();
                    self.said.extend_from_slice(&buffer[..bytes.min(room)]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.output = None,
            }
        }
    }
}

/// Leaves it to be waited for.
fn has_ended(child: &Child) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    waitid(WaitId::Pid(Pid::from_child(child)), options).is_ok_and(|status| status.is_some())
}

#[cfg(test)]
mod tests {
    use super::{OUTPUT_BYTES_MAX, run, start, wait_for};
    use std::time::{Duration, Instant};

    fn shell(script: &str) -> Result<(), String> {
        run(&["/bin/sh", "-c", script], None, None, "do it").map_err(|error| error.desc)
    }

    #[test]
    fn a_failure_is_told_in_the_words_of_qemu_ga() {
        let told = |words: &str| Err(words.to_owned());
        assert_eq!(shell("exit 0"), Ok(()));
        assert_eq!(shell("exit 3"), told("child process has failed to do it: exit status 3"));
        assert_eq!(
            shell("echo out; echo err >&2; exit 1"),
            told("child process has failed to do it: out\nerr\n")
        );
        assert_eq!(shell("kill -9 $$"), told("child process has terminated abnormally"));
        assert_eq!(shell("echo x; kill -9 $$"), told("child process has terminated abnormally: x\n"));
        let missing = run(&["/nope", "-w"], None, None, "do it").map_err(|error| error.desc);
        let words = "child process has failed to do it: failed to exec '/nope': No such file or directory\n";
        assert_eq!(missing, told(words));
        let missing = run(&["a-program-that-is-nowhere"], None, None, "do it").map_err(|error| error.desc);
        assert!(missing.is_err_and(|words| words.ends_with("No such file or directory\n")));
    }

    #[test]
    fn a_helper_gets_its_input_and_one_that_does_not_read_it_holds_up_nothing() {
        let input = vec![b'x'; 1 << 20];
        let ended = wait_for(&["/bin/sh", "-c", "wc -c"], Some(&input), None).expect("it ran");
        assert_eq!(ended.output.trim_ascii(), b"1048576");
        let ended = wait_for(&["/bin/sh", "-c", "echo no; exit 2"], Some(&input), None).expect("it ran");
        assert_eq!((ended.status.code(), ended.output.as_slice()), (Some(2), b"no\n".as_slice()));
    }

    #[test]
    fn a_grandchild_that_holds_the_output_delays_nothing_and_a_flood_is_cut() {
        let begin = Instant::now();
        assert_eq!(shell("sleep 30 & exit 0"), Ok(()));
        assert!(begin.elapsed() < Duration::from_secs(20), "it waited for the grandchild");
        let flood = ["/bin/sh", "-c", "head -c 1000000 /dev/zero"];
        let ended = wait_for(&flood, None, None).expect("it ran");
        assert_eq!(ended.output.len(), OUTPUT_BYTES_MAX);
        assert!(ended.status.success());
    }

    #[test]
    fn on_an_old_kernel_the_end_is_seen_too() {
        let (mut child, mut pipes) =
            start(&["/bin/sh", "-c", "cat; sleep 30 & exit 4"], Some(b"said")).expect("it runs");
        let begin = Instant::now();
        assert!(pipes.serve_until_end(&child, None, None).expect("it is waited for"));
        assert!(begin.elapsed() < Duration::from_secs(20), "it waited for the grandchild");
        assert_eq!(child.wait().expect("it ended").code(), Some(4));
        pipes.read_what_is_there();
        assert_eq!(pipes.said, b"said");
        let (mut child, mut pipes) = start(&["/bin/sleep", "30"], None).expect("it runs");
        let deadline = Some(Instant::now() + Duration::from_millis(200));
        assert!(!pipes.serve_until_end(&child, None, deadline).expect("it is waited for"));
        child.kill().expect("it runs");
        child.wait().expect("it ended");
    }

    #[test]
    fn a_helper_that_does_not_end_is_killed_with_its_children() {
        let limit = Some(Duration::from_secs(1));
        let refused = run(&["/bin/sh", "-c", "sleep 3600; true"], None, limit, "do it");
        let words = "child process has failed to do it: it did not end within 1 s and was killed";
        assert_eq!(refused.map_err(|error| error.desc), Err(words.to_owned()));
    }
}
