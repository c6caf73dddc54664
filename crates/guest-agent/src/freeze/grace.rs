//! Short grace periods while FIFREEZE runs.
//!
//! FIFREEZE shuts writers out in three stages, and before each the kernel waits for a grace period of RCU: ten to twenty
//! milliseconds each, with writers shut out since the first, however little there is to flush. The kernel has a switch that
//! makes it wait for each processor's answer to an interrupt instead, which takes a fraction of one. It is the whole machine's,
//! so it is on for the FIFREEZE calls only, and the undo record says so before it is touched.
//!
//! Source: `freeze_super` in Linux `fs/super.c`, `rcu_sync_enter` in `kernel/rcu/sync.c`, `rcu_expedited` in
//! `Documentation/ABI/testing/sysfs-kernel-rcu` and `kernel/ksysfs.c`.

use super::ledger::Ledger;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// The switch. Kernels for a single processor do not have it, nor do containers that may not write to it.
pub const SWITCH: &str = "/sys/kernel/rcu_expedited";

/// Grace periods are short while this lives.
#[derive(Debug)]
#[must_use = "dropping it makes grace periods as long as before"]
pub struct ShortGrace {
    switch: File,
    ledger: Arc<Ledger>,
}

impl ShortGrace {
    /// Turns the switch. `None` where that cannot be done, or was done by the machine's owner: a freeze works without.
    pub fn begin(switch: &Path, ledger: &Arc<Ledger>) -> Option<Self> {
        let mut switch = OpenOptions::new().read(true).write(true).open(switch).ok()?;
        let mut value = String::new();
        switch.read_to_string(&mut value).ok()?;
        if value.trim() != "0" {
            return None;
        }
        ledger.note_short_grace(true);
        // From here on `Drop` turns it back, also if it was not turned.
        let turned = switch.write_at(b"1", 0);
        let short = Self { switch, ledger: Arc::clone(ledger) };
        turned.ok().map(|_| short)
    }
}

impl Drop for ShortGrace {
    fn drop(&mut self) {
        if turn_back(&self.switch).is_ok() {
            self.ledger.note_short_grace(false);
        }
    }
}

/// Turns back what an agent that is gone, or hangs, has turned by its record.
pub fn undo(switch: &Path, ledger: &Ledger) {
    if ledger.has_short_grace()
        && OpenOptions::new().write(true).open(switch).and_then(|switch| turn_back(&switch)).is_ok()
    {
        ledger.note_short_grace(false);
    }
}

fn turn_back(switch: &File) -> io::Result<()> {
    switch.write_at(b"0", 0).map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::mountinfo::DeviceNumber;
    use super::*;
    use std::fs;

    struct Machine {
        folder: tempfile::TempDir,
        ledger: Arc<Ledger>,
    }

    impl Machine {
        fn with(value: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("switch"), value).unwrap();
            let devices = [DeviceNumber { major: 8, minor: 1 }];
            let ledger = Arc::new(Ledger::create(&folder.path().join("undo"), &devices, &[]).unwrap());
            Self { folder, ledger }
        }

        fn begin(&self) -> Option<ShortGrace> {
            ShortGrace::begin(&self.folder.path().join("switch"), &self.ledger)
        }

        fn value(&self) -> String {
            fs::read_to_string(self.folder.path().join("switch")).unwrap().trim().to_owned()
        }
    }

    #[test]
    fn the_switch_is_on_for_a_scope_and_the_record_says_so() {
        let machine = Machine::with("0\n");
        let short = machine.begin();
        assert_eq!((machine.value().as_str(), machine.ledger.has_short_grace()), ("1", true));
        drop(short);
        assert_eq!((machine.value().as_str(), machine.ledger.has_short_grace()), ("0", false));
    }

    #[test]
    fn what_a_dead_agent_turned_is_turned_back_by_its_record() {
        let machine = Machine::with("0\n");
        // Killed: no Drop runs.
        std::mem::forget(machine.begin());
        let found = Ledger::open(&machine.folder.path().join("undo")).unwrap();
        undo(&machine.folder.path().join("switch"), &found);
        assert_eq!((machine.value().as_str(), machine.ledger.has_short_grace()), ("0", false));
    }

    #[test]
    fn a_switch_that_the_owner_turned_is_left_alone() {
        let machine = Machine::with("1\n");
        assert!(machine.begin().is_none());
        undo(&machine.folder.path().join("switch"), &machine.ledger);
        assert_eq!(machine.value(), "1");
    }
}
