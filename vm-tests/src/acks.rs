//! Acknowledgements as they leave the guest: what a client in it was promised, known to the host before any snapshot.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One line of the load: something numbered was done, and whoever did it was told so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// `c`: a row was committed. `w`, `x`: a `write()` without fsync returned, to ext4 or to xfs.
    pub kind: char,
    /// Counts up from 1 for each kind.
    pub number: u64,
    /// When the host read the line, so never before it was sent.
    pub at: Instant,
}

/// Collects the acknowledgements of one guest; cheap to clone.
#[derive(Clone, Default)]
pub struct Acks {
    shared: Arc<(Mutex<Vec<Ack>>, Condvar)>,
}

impl Acks {
    /// Reads the port's socket on a thread of its own, until QEMU ends.
    pub(crate) fn collect(stream: UnixStream) -> Self {
        let acks = Self::default();
        let collected = acks.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines() {
                let Ok(line) = line else { break };
                let at = Instant::now();
                let Some((kind, number)) = parse(&line) else {
                    eprintln!("not an acknowledgement: {line:?}");
                    continue;
                };
                let (list, changed) = &*collected.shared;
                list.lock().unwrap_or_else(PoisonError::into_inner).push(Ack { kind, number, at });
                changed.notify_all();
            }
        });
        acks
    }

    /// Everything acknowledged so far. Taken before the freeze is sent, it is what a snapshot has to contain.
    #[must_use]
    pub fn so_far(&self) -> Vec<Ack> {
        self.list().clone()
    }

    /// The highest number of one kind so far; 0 before the first. The load counts without gaps.
    #[must_use]
    pub fn highest(&self, kind: char) -> u64 {
        self.list().iter().filter(|ack| ack.kind == kind).map(|ack| ack.number).max().unwrap_or(0)
    }

    /// Waits until one kind has come to `number`; false if it has not within `limit`.
    #[must_use]
    pub fn wait_for(&self, kind: char, number: u64, limit: Duration) -> bool {
        let arrived = |list: &[Ack]| list.iter().rev().any(|ack| ack.kind == kind && ack.number >= number);
        let (_, changed) = &*self.shared;
        let (list, _) = changed
            .wait_timeout_while(self.list(), limit, |list| !arrived(list))
            .unwrap_or_else(PoisonError::into_inner);
        arrived(&list)
    }

    /// Begins anew: a reset takes back what no fsync made last.
    pub(crate) fn forget(&self) {
        self.list().clear();
    }

    fn list(&self) -> MutexGuard<'_, Vec<Ack>> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(line: &str) -> Option<(char, u64)> {
    let (kind, number) = line.split_once(' ')?;
    let mut letters = kind.chars();
    match (letters.next(), letters.next()) {
        (Some(kind @ 'a'..='z'), None) => Some((kind, number.parse().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn acknowledgements_are_collected_as_they_arrive() {
        let (mut guest, host) = UnixStream::pair().expect("a pair");
        let acks = Acks::collect(host);
        assert_eq!(acks.highest('c'), 0);
        guest.write_all(b"c 1\nw 1\nc 2\n").expect("the thread reads");
        assert!(acks.wait_for('c', 2, Duration::from_secs(5)));
        assert_eq!((acks.highest('c'), acks.highest('w'), acks.so_far().len()), (2, 1, 3));
        assert!(!acks.wait_for('w', 2, Duration::from_millis(10)));
    }

    #[test]
    fn other_lines_are_no_acknowledgements() {
        for line in ["", "c", "c x", "cc 1", "C 1", "c  1", "c -1"] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }
}
