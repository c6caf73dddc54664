//! The host's disks run full in the middle of a run: the snapshot breaks, the guest does not, the store stays sound.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use vm_tests::{Guest, Stillpoint};

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_full_scratch_and_a_full_repository_break_the_snapshot_and_nothing_else() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts small file systems, which takes root");
    let guest = Guest::builder().append("stillpoint.postgresql=off").start().expect("QEMU starts");
    println!("our agent after {:.1?}", guest.agent_ready(LIMIT));
    guest.booted(LIMIT);
    guest.start_writers();
    guest.writes_go_on(LIMIT);
    let stillpoint = Stillpoint::new().expect("a repository");
    stillpoint.register("db1", &guest.qmp_socket(), Some(&guest.agent_socket())).expect("registered");
    guest.exec("busybox dd if=/dev/urandom of=/var/lib/postgresql/much bs=1M count=64 conv=fsync").success();
    let before = guest.block_graph();

    println!("-- scratch runs full");
    let scratch = Small::over(&stillpoint.path("state").join("scratch"), "4m");
    // Overwritten in place: each block that the run has to keep goes to scratch first.
    guest.start(
        "until [ -e /run/enough ]; do dd if=/dev/zero of=/var/lib/postgresql/much bs=1M count=64 conv=notrunc oflag=direct; done",
    );
    let ended = stillpoint.run(&["snapshot", "db1", "--disk", "disk-data"]).expect("it ends");
    println!("{}", ended.stderr.trim_end());
    ended.assert_refused(1, "make room in the state folder");
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));
    guest.exec("touch /run/enough; busybox dmesg | busybox grep -i 'i/o error' && exit 1; true").success();
    assert_eq!(guest.block_graph(), before);
    drop(scratch);
    let well = stillpoint.must(&["snapshot", "db1", "--disk", "disk-data"]);
    assert_eq!(well["level"], "filesystem", "{well}");

    println!("-- the repository runs full");
    let aside = stillpoint.path("aside");
    let repository = stillpoint.repository();
    copy(&repository, &aside);
    let small = Small::over(&repository, "1g");
    copy(&aside, &repository);
    small.shrink_to_leave(8 << 20);
    guest.exec("dd if=/dev/urandom of=/var/lib/postgresql/much bs=1M count=40 conv=fsync").success();
    let before = guest.block_graph();
    let ended = stillpoint.run(&["snapshot", "db1", "--disk", "disk-data"]).expect("it ends");
    println!("{}", ended.stderr.trim_end());
    ended.assert_refused(1, "the store is full");
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));
    assert_eq!(guest.block_graph(), before);
    stillpoint.assert_sound(1);
    small.remount("1g");
    let well = stillpoint.must(&["snapshot", "db1", "--disk", "disk-data"]);
    assert_eq!(well["disks"][0]["method"], "bitmap", "{well}");
    stillpoint.assert_sound(2);
}

fn sh(command: &mut Command) {
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn copy(from: &Path, to: &Path) {
    sh(Command::new("cp").arg("-aT").arg(from).arg(to));
}

/// A small file system over a folder, as long as this lives.
struct Small(PathBuf);

impl Small {
    fn over(folder: &Path, size: &str) -> Self {
        let options = format!("size={size},mode=0700");
        sh(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder));
        Self(folder.to_owned())
    }

    fn remount(&self, size: &str) {
        sh(Command::new("mount").arg("-o").arg(format!("remount,size={size}")).arg(&self.0));
    }

    fn shrink_to_leave(&self, bytes: u64) {
        let facts = rustix::fs::statvfs(&self.0).expect("it is mounted");
        let used = (facts.f_blocks - facts.f_bfree) * facts.f_frsize;
        self.remount(&(used + bytes).to_string());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily, so that it goes even if a run that failed the test still holds a file in it.
        let _ended = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
