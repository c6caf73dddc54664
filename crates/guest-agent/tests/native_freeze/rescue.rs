//! The rescuer: a process outside the private root that holds a folder on every test mount and thaws it in the end.

use guest_agent::freeze::kernel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Longest time for all FITHAWs: each waits for a FIFREEZE that is still in the kernel.
const THAW_MAX: Duration = Duration::from_secs(60);

/// Waits until standard input closes or the time is up, then thaws everything, and prints how many were frozen.
pub(crate) fn main(seconds: &str, fds: &[&str]) {
    let folders: Vec<OwnedFd> = fds
        .iter()
        // SAFETY: the starter passed these descriptors, open, for this process alone.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd.parse().unwrap()) })
        .collect();
    let timeout = Timespec { tv_sec: seconds.parse().unwrap(), tv_nsec: 0 };
    let stdin = std::io::stdin();
    let mut watched = [PollFd::new(&stdin, PollFlags::IN)];
    let in_time = poll(&mut watched, Some(&timeout)).unwrap_or(0) > 0;
    let threads: Vec<_> = folders
        .into_iter()
        .map(|folder| {
            std::thread::spawn(move || {
                let mut thawed = 0;
                while kernel::thaw(folder.as_fd()).is_ok() {
                    thawed += 1;
                }
                thawed
            })
        })
        .collect();
    let until = std::time::Instant::now() + THAW_MAX;
    let mut frozen: u64 = 0;
    let mut stuck = 0;
    for thread in threads {
        while !thread.is_finished() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        if thread.is_finished() {
            frozen += thread.join().unwrap();
        } else {
            stuck += 1;
        }
    }
    println!("rescued {frozen} stuck {stuck} {}", if in_time { "told" } else { "timeout" });
    std::process::exit(0);
}
