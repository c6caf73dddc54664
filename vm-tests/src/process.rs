//! Child processes that never outlive the test.

use rustix::process::{Signal, set_parent_process_death_signal};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

type Order = (Command, Sender<io::Result<Child>>);

/// Starts `command` so that the kernel kills it when this process ends, however it ends.
///
/// # Errors
/// As [`Command::spawn`].
pub fn spawn(mut command: Command) -> io::Result<Child> {
    // SAFETY: prctl is async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    // The death signal comes when the *thread* that forked ends, and the test harness runs each test in a thread of its
    // own: so one thread that lives as long as the process forks for all of them.
    static FORKER: OnceLock<Sender<Order>> = OnceLock::new();
    let forker = FORKER.get_or_init(|| {
        let (orders, incoming) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in incoming {
                // The asker waits below; if it is gone, so is the need for the child.
                if let Err(unwanted) = answer.send(command.spawn())
                    && let Ok(mut child) = unwanted.0
                {
                    let _killed = child.kill().and_then(|()| child.wait());
                }
            }
        });
        orders
    });
    let (answer, answered) = channel();
    forker.send((command, answer)).map_err(|_| io::Error::other("the forking thread has ended"))?;
    answered.recv().map_err(|_| io::Error::other("the forking thread has ended"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let asked = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            command.arg("60");
            spawn(command)
        });
        let mut child = asked.join().expect("no panic").expect("sleep starts");
        // The death signal would have come with the thread's end, which join waited for.
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert!(child.try_wait().expect("it is ours").is_none());
        child.kill().and_then(|()| child.wait()).expect("it is ours");
    }
}
