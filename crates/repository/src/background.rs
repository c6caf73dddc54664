//! Work that has time.

use std::time::Duration;

/// The usual niceness of work in the background, which leaves it a tenth of a processor that others want. With 19 it was starved: beside
/// a busy guest and one other program a copy of 4 s took 108, and all the while its filter kept what the guest overwrote.
const NICENESS: i32 = 10;
/// Longest rest between two pieces of work.
const BREATH_MAX: Duration = Duration::from_millis(20);

/// Lets the calling thread give way to every other one on this machine from now on, such as those of its virtual machines:
/// what it does takes longer, so that nobody waits for it.
///
/// By itself no thread can take that back, and the threads that it starts do the same. Linux compares priorities within one
/// control group and one session only.
pub fn give_way() {
    // Anybody may do so. Where it is forbidden all the same, the work is as urgent as any other.
    let _given = rustix::process::getpriority_process(None)
        .and_then(|niceness| rustix::process::setpriority_process(None, niceness.max(NICENESS)))
        .is_ok();
}

/// Lets a thread that gives way rest for as long as its last piece of work in the kernel took, where no priority helps: memory and
/// disks are shared without one. Others go on at once.
pub(crate) fn breathe(worked: Duration) {
    if rustix::process::getpriority_process(None).is_ok_and(|niceness| niceness >= NICENESS) {
        std::thread::sleep(worked.min(BREATH_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_way_alone() {
        let niceness = || rustix::process::getpriority_process(None).expect("a priority");
        let before = niceness();
        let lowered = std::thread::spawn(move || {
            give_way();
            (niceness(), std::thread::spawn(niceness).join().expect("it ends"))
        });
        let given = before.max(NICENESS);
        assert_eq!(lowered.join().expect("it ends"), (given, given));
        assert_eq!(niceness(), before);
    }
}
