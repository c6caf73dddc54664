//! libvirt 9 with our agent in the guest: every command of virsh that asks an agent does what it does with Debian's qemu-ga
//! in the same guest a minute before.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use vm_tests::Agent;
use vm_tests::libvirt::{Domain, Libvirt, Said};

const LIMIT: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(120);
const USER: &str = "tester";
/// What must be the same with both agents.
#[derive(Clone, Copy)]
enum Same {
    /// Every byte of it.
    All,
    /// All but the digits: times and sizes that go on.
    ButDigits,
    /// Whether it succeeds.
    Outcome,
}

struct Step {
    /// virsh's words, with the domain's name in place.
    words: Vec<String>,
    /// The commands of the agent without which it cannot be.
    needs: &'static [&'static str],
    same: Same,
}

fn step(words: &str, needs: &'static [&'static str], same: Same) -> Step {
    Step { words: words.split(' ').map(str::to_owned).collect(), needs, same }
}

fn ask(json: &str, needs: &'static [&'static str], same: Same) -> Step {
    Step { words: ["qemu-agent-command", "guest", json].map(str::to_owned).to_vec(), needs, same }
}

fn steps(keys: &Path) -> Vec<Step> {
    let keys = keys.display();
    let all_info = &[
        "guest-get-users",
        "guest-get-osinfo",
        "guest-get-timezone",
        "guest-get-host-name",
        "guest-get-fsinfo",
        "guest-get-disks",
        "guest-network-get-interfaces",
    ];
    vec![
        ask(r#"{"execute":"guest-ping"}"#, &[], Same::All),
        ask(r#"{"execute":"guest-no-such"}"#, &[], Same::All),
        ask(r#"{"execute":"guest-ping","arguments":{"no":1}}"#, &[], Same::All),
        step("domfsinfo guest", &["guest-get-fsinfo"], Same::All),
        step("domfsfreeze guest", &["guest-fsfreeze-freeze"], Same::All),
        ask(r#"{"execute":"guest-fsfreeze-status"}"#, &[], Same::All),
        // 7.2 and later versions differ in the words after this refusal.
        step("domfsfreeze guest", &["guest-fsfreeze-freeze"], Same::Outcome),
        step("domfsthaw guest", &["guest-fsfreeze-thaw"], Same::All),
        step("domfsthaw guest", &["guest-fsfreeze-thaw"], Same::All),
        step(
            "domfsfreeze guest --mountpoint /var/lib/postgresql",
            &["guest-fsfreeze-freeze-list"],
            Same::All,
        ),
        // libvirt thaws all of them or none.
        step("domfsthaw guest", &["guest-fsfreeze-thaw"], Same::All),
        step("domtime guest", &["guest-get-time"], Same::ButDigits),
        step("domtime guest --pretty", &["guest-get-time"], Same::ButDigits),
        step("domtime guest --now", &["guest-set-time"], Same::All),
        step("domtime guest --sync", &["guest-set-time"], Same::Outcome),
        step("domhostname guest --source agent", &["guest-get-host-name"], Same::All),
        step("guestinfo guest --os", &["guest-get-osinfo"], Same::All),
        step("guestinfo guest --filesystem", &["guest-get-fsinfo"], Same::ButDigits),
        step("guestinfo guest --timezone", &["guest-get-timezone"], Same::All),
        step("guestinfo guest --hostname", &["guest-get-host-name"], Same::All),
        step("guestinfo guest --user", &["guest-get-users"], Same::All),
        step("guestinfo guest --disk", &["guest-get-disks"], Same::ButDigits),
        step("guestinfo guest --interface", &["guest-network-get-interfaces"], Same::All),
        step("guestinfo guest", all_info, Same::ButDigits),
        step("domifaddr guest --source agent --full", &["guest-network-get-interfaces"], Same::All),
        step("guestvcpus guest", &["guest-get-vcpus"], Same::All),
        step("guestvcpus guest --cpulist 1 --disable", &["guest-get-vcpus", "guest-set-vcpus"], Same::All),
        step("guestvcpus guest", &["guest-get-vcpus"], Same::All),
        step("guestvcpus guest --cpulist 1 --enable", &["guest-get-vcpus", "guest-set-vcpus"], Same::All),
        step("setvcpus guest 1 --guest", &["guest-get-vcpus", "guest-set-vcpus"], Same::All),
        step("setvcpus guest 2 --guest", &["guest-get-vcpus", "guest-set-vcpus"], Same::All),
        step("set-user-password guest tester one-secret", &["guest-set-user-password"], Same::All),
        step("set-user-password guest no-such-user one-secret", &["guest-set-user-password"], Same::Outcome),
        step("get-user-sshkeys guest tester", &["guest-ssh-get-authorized-keys"], Same::Outcome),
        step(
            &format!("set-user-sshkeys guest tester --file {keys}"),
            &["guest-ssh-add-authorized-keys"],
            Same::All,
        ),
        step("get-user-sshkeys guest tester", &["guest-ssh-get-authorized-keys"], Same::All),
        step(
            &format!("set-user-sshkeys guest tester --file {keys} --remove"),
            &["guest-ssh-remove-authorized-keys"],
            Same::All,
        ),
        step("get-user-sshkeys guest tester", &["guest-ssh-get-authorized-keys"], Same::All),
        step("get-user-sshkeys guest no-such-user", &["guest-ssh-get-authorized-keys"], Same::Outcome),
        step("domfstrim guest", &["guest-fstrim"], Same::All),
    ]
}

impl Step {
    /// What of an answer is compared.
    fn kept(&self, said: &Said) -> Said {
        match self.same {
            Same::All => said.clone(),
            Same::ButDigits => {
                // The stock agent has serial numbers of disks from udev, which this guest does without; ours reads them itself.
                let plain = |text: &str| {
                    let lines = text.lines().filter(|line| !line.contains(".serial "));
                    lines.collect::<Vec<_>>().join("\n").replace(|letter: char| letter.is_ascii_digit(), "")
                };
                Said { code: said.code, out: plain(&said.out), err: plain(&said.err) }
            }
            Same::Outcome => Said { code: said.code, out: String::new(), err: String::new() },
        }
    }
}

#[test]
fn virsh_finds_our_agent_as_it_finds_qemu_ga() {
    if !vm_tests::view::is_possible() {
        return;
    }
    let libvirt = Libvirt::start().expect("libvirtd answers");
    let began = Instant::now();
    let guest = Domain::boot(&libvirt, LIMIT).expect("the domain boots");
    println!("booted after {:.1?}", began.elapsed());
    let keys = libvirt.folder().join("keys");
    std::fs::write(&keys, "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ one@example\n").expect("written");
    guest.exec(&format!("useradd --create-home {USER}")).success();
    let steps = steps(&keys);

    guest.run_agent(Agent::Stock);
    let theirs: Vec<Said> = taken(&guest, &steps);
    let their_changes = changes(&guest);
    snapshots(&guest, &libvirt, "stock");

    // The guest as it was.
    guest.exec(&format!("usermod --password x {USER}; rm -rf /home/{USER}/.ssh")).success();
    guest.run_agent(Agent::Ours);
    let info = guest.virsh(&["qemu-agent-command", "guest", r#"{"execute":"guest-info"}"#]).success();
    let has = |name: &&&str| info.contains(&format!("\"{name}\""));
    let ours: Vec<Said> = taken(&guest, &steps);
    let our_changes = changes(&guest);
    snapshots(&guest, &libvirt, "ours");

    let mut different = Vec::new();
    for ((step, theirs), ours) in steps.iter().zip(&theirs).zip(&ours) {
        let lacking: Vec<&&str> = step.needs.iter().filter(|name| !has(name)).collect();
        assert!(lacking.is_empty(), "our agent has no {lacking:?}");
        if step.kept(ours) != step.kept(theirs) {
            different
                .push(format!("virsh {}\n  theirs: {theirs:?}\n  ours:   {ours:?}", step.words.join(" ")));
        }
    }
    assert_eq!(our_changes, their_changes, "what the commands left in the guest");
    assert!(different.is_empty(), "{}", different.join("\n"));

    guest.virsh(&["shutdown", "guest", "--mode", "agent"]).success();
    let end = Instant::now() + PATIENCE;
    while !guest.virsh(&["list", "--name"]).success().trim().is_empty() {
        assert!(Instant::now() < end, "the guest does not shut down");
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// What virsh says at each step.
fn taken(guest: &Domain, steps: &[Step]) -> Vec<Said> {
    let words = steps.iter().map(|step| step.words.iter().map(String::as_str).collect::<Vec<_>>());
    let said = words.map(|words| {
        let said = guest.virsh(&words);
        println!("virsh {}: {} {:?} {:?}", words.join(" "), said.code, said.out.trim(), said.err.trim());
        said
    });
    said.collect()
}

/// What those steps left behind: whether the password was set, and the processors that are on.
fn changes(guest: &Domain) -> String {
    let told = guest.exec(&format!(
        "grep -q '^{USER}:\\$' /etc/shadow && echo password set; cat /sys/devices/system/cpu/online; stat -c '%U %a' /home/{USER}/.ssh"
    ));
    told.out
}

/// Three ways in which libvirt copies disks: what was copied while an agent held the guest frozen was cleanly at rest, and
/// what was copied without one was not. Whether it was, ext4 notes on the disk itself.
fn snapshots(guest: &Domain, libvirt: &Libvirt, name: &str) {
    for quiesced in [true, false] {
        let overlays =
            ["vda", "vdb"].map(|disk| libvirt.folder().join(format!("{disk}-{name}-{quiesced}.qcow2")));
        let specs =
            [0, 1].map(|n| format!("{},snapshot=external,file={}", ["vda", "vdb"][n], overlays[n].display()));
        let mut words = vec!["snapshot-create-as", "guest", "--disk-only", "--no-metadata", "--atomic"];
        words.extend(["--diskspec", &specs[0], "--diskspec", &specs[1]]);
        words.extend(quiesced.then_some("--quiesce"));
        // Something for a mounted ext4 to have in its journal.
        guest.exec("echo x >/var/tmp/written; sync").success();
        guest.virsh(&words).success();
        assert_eq!(
            was_at_rest(&guest.disks()[0], "raw"),
            quiesced,
            "{name}, snapshot with --quiesce: {quiesced}"
        );
        guest.exec("echo y >/var/tmp/written; sync").success();
        for disk in ["vda", "vdb"] {
            guest.virsh(&["blockcommit", "guest", disk, "--active", "--pivot", "--wait"]).success();
        }
    }
    let copies = ["vda", "vdb"].map(|disk| libvirt.folder().join(format!("{disk}-{name}-backup.qcow2")));
    let backup = libvirt.folder().join("backup.xml");
    let disk = |n: usize| {
        format!(
            "<disk name='{}' type='file'><target file='{}'/><driver type='qcow2'/></disk>",
            ["vda", "vdb"][n],
            copies[n].display()
        )
    };
    std::fs::write(&backup, format!("<domainbackup><disks>{}{}</disks></domainbackup>", disk(0), disk(1)))
        .expect("written");
    guest.virsh(&["domfsfreeze", "guest"]).success();
    guest.virsh(&["backup-begin", "guest", &backup.display().to_string()]).success();
    guest.virsh(&["domfsthaw", "guest"]).success();
    let end = Instant::now() + PATIENCE;
    while !guest.virsh(&["domjobinfo", "guest", "--completed", "--keep-completed"]).out.contains("Backup") {
        assert!(Instant::now() < end, "the backup does not end: {:?}", guest.virsh(&["domjobinfo", "guest"]));
        std::thread::sleep(Duration::from_millis(300));
    }
    assert!(was_at_rest(&copies[0], "qcow2"), "{name}: backup-begin between freeze and thaw");
    for copy in copies {
        std::fs::remove_file(copy).expect("removed");
    }
}

/// Whether the ext4 in an image needs no recovery: a freeze writes its journal out and says so in the superblock.
fn was_at_rest(image: &Path, format: &str) -> bool {
    let superblock = image.with_extension("superblock");
    let status = Command::new("qemu-img")
        .args(["dd", "-U", "-f", format, "-O", "raw", "bs=4096", "count=1"])
        .args([format!("if={}", image.display()), format!("of={}", superblock.display())])
        .status();
    assert!(status.expect("qemu-img").success());
    let bytes = std::fs::read(&superblock).expect("read");
    std::fs::remove_file(&superblock).expect("removed");
    assert_eq!(bytes[1024 + 0x38..1024 + 0x3a], [0x53, 0xef], "an ext4");
    // s_feature_incompat, INCOMPAT_RECOVER.
    bytes[1024 + 0x60] & 4 == 0
}
