//! Our agent's package in a Debian with systemd: it takes the place of Debian's own agent, is upgraded, goes, and gives the
//! place back, and a host at the port always finds an agent there.

use serde_json::{Value, json};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vm::agent::{Agent as Host, Kind};
use vm::monitor::Monitor;
use vm_tests::packages::{Packages, index, next_version};
use vm_tests::view::{in_view, is_possible};
use vm_tests::{Agent, Guest, Init};

const LIMIT: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(120);
/// An emulated apt on a busy machine; half a minute on one with time.
const APT_TIME_MAX: Duration = Duration::from_secs(400);
/// The name by which administrators and scripts know the agent's unit.
const THEIRS: &str = "qemu-guest-agent.service";
const OURS: &str = "stillpoint-agent.service";
/// What an administrator of the stock agent has changed: a drop-in for its unit, its configuration file, and a hook.
const OF_THE_ADMINISTRATOR: &str = "
    mkdir -p /etc/systemd/system/qemu-guest-agent.service.d
    printf '[Service]\\nEnvironment=SITE=here\\n' >/etc/systemd/system/qemu-guest-agent.service.d/site.conf
    printf '[general]\\nfsfreeze-hook=/etc/qemu/fsfreeze-hook\\n' >/etc/qemu/qemu-ga.conf
    printf '#!/bin/sh\\necho \"$1\" >>/run/hooks-called\\n' >/etc/qemu/fsfreeze-hook.d/10-site
    chmod 755 /etc/qemu/fsfreeze-hook.d/10-site";

/// A guest under systemd in which Debian's agent has the port, and apt knows one repository: both agents' packages.
struct Administered {
    guest: Guest,
    _repository: tempfile::TempDir,
}

impl Administered {
    fn boot() -> Self {
        Self::boot_with(&[])
    }

    /// The same with more files in `/run/stillpoint`.
    fn boot_with(more: &[PathBuf]) -> Self {
        let packages = Packages::get();
        let repository = tempfile::tempdir().expect("a folder");
        let at = |name: &str| repository.path().join(name);
        let next = next_version(packages.deb(), repository.path()).expect("dpkg-deb");
        std::fs::copy(packages.deb(), at("stillpoint-agent.deb")).expect("copied");
        std::fs::copy(packages.stock_deb(), at("qemu-guest-agent.deb")).expect("copied");
        let debs = vec![at("stillpoint-agent.deb"), at("qemu-guest-agent.deb"), next];
        std::fs::write(at("Packages"), index(&debs).expect("dpkg-deb")).expect("written");
        let guest = Guest::builder()
            .agent(Agent::Stock)
            .init(Init::Systemd)
            .vcpus(2)
            .memory_mib(1024)
            .append("systemd.mask=postgresql.service")
            .lifetime(Duration::from_secs(40 * 60))
            .deliver(debs)
            .deliver([at("Packages")])
            .deliver(more.iter().cloned())
            .start()
            .expect("QEMU starts");
        println!("booted after {:.1?}", guest.booted(LIMIT));
        let administered = Self { guest, _repository: repository };
        administered.succeeds(OF_THE_ADMINISTRATOR);
        // The image masks it, for tests without it.
        administered.succeeds(&format!(
            "rm -f /etc/systemd/system/{THEIRS}; systemctl daemon-reload; systemctl start {THEIRS}"
        ));
        administered.succeeds(
            "rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*; \
             echo 'deb [trusted=yes] file:/run/stillpoint ./' >/etc/apt/sources.list && apt-get update --quiet",
        );
        administered
    }

    #[track_caller]
    fn succeeds(&self, command: &str) -> String {
        self.guest.exec(command).success()
    }

    #[track_caller]
    fn apt(&self, words: &str) {
        let began = Instant::now();
        let command = format!("DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes {words} 2>&1");
        let said = self.guest.with_stock_agent(|agent| vm_tests::shell(agent, &command, APT_TIME_MAX));
        let said = said.expect("it ends in time");
        assert_eq!(said.code, 0, "apt-get {words}: {}", said.out);
        println!("-- apt-get {words}: {:.1?}\n{}", began.elapsed(), said.out);
    }

    fn property(&self, unit: &str, name: &str) -> String {
        self.succeeds(&format!("systemctl show --value --property={name} {unit}")).trim().to_owned()
    }

    /// dpkg's word for a package's state: `installed`, `config-files`, or nothing.
    fn state(&self, package: &str) -> String {
        self.guest.exec(&format!("dpkg-query -W -f '${{db:Status-Status}}' {package}")).out
    }

    /// A host that connects to the port now.
    #[track_caller]
    fn host(&self) -> Host {
        self.guest.agent_ready(LIMIT);
        Host::connect(&self.guest.agent_socket(), PATIENCE).expect("an agent answers at the port")
    }

    /// Ours has the port, under both names, as its unit says.
    #[track_caller]
    fn is_ours(&self) {
        let mut host = self.host();
        assert_eq!(host.kind(), Kind::Stillpoint, "{:?}", host.info());
        let version: Value = host.call("guest-info", None, PATIENCE).expect("an answer");
        assert!(version["version"].as_str().is_some_and(|version| version.starts_with("11.")), "{version}");
        drop(host);
        let pid = self.property(OURS, "MainPID");
        assert_eq!(self.property(THEIRS, "MainPID"), pid, "both names are one unit");
        assert_eq!(self.property(THEIRS, "ActiveState"), "active");
        assert_eq!(self.succeeds(&format!("readlink /proc/{pid}/exe")).trim(), "/usr/bin/stillpoint-agent");
        assert_eq!(self.succeeds(&format!("cat /proc/{pid}/oom_score_adj")).trim(), "-1000");
        // What the administrator said about the other's unit holds for ours.
        let site = self.succeeds(&format!("tr '\\0' '\\n' </proc/{pid}/environ | grep ^SITE="));
        assert_eq!(site.trim(), "SITE=here");
        assert!(self.succeeds("/usr/sbin/qemu-ga --version").starts_with("QEMU Guest Agent 11."));
        self.nothing_failed();
    }

    /// Debian's has the port, and its name to itself.
    #[track_caller]
    fn is_theirs(&self) {
        let host = self.host();
        assert_eq!(host.kind(), Kind::Stock, "{:?}", host.info());
        drop(host);
        assert_eq!(self.property(THEIRS, "ActiveState"), "active");
        let fragment = self.property(THEIRS, "FragmentPath");
        assert!(fragment.ends_with("/systemd/system/qemu-guest-agent.service"), "{fragment}");
        assert!(self.succeeds("/usr/sbin/qemu-ga --version").contains("QEMU Guest Agent 7.2"));
        self.nothing_failed();
    }

    #[track_caller]
    fn nothing_failed(&self) {
        let failed = self.succeeds("systemctl --failed --no-legend --plain");
        assert_eq!(
            failed.trim(),
            "",
            "{}",
            self.guest.exec(&format!("journalctl --no-pager -n 50 -u {OURS}")).out
        );
    }

    /// The host has the agent run a shell command, which prints this.
    #[track_caller]
    fn runs_for_a_host(&self, command: &str, printed: &str) {
        let mut host = self.host();
        let ran = vm_tests::shell(&mut host, command, PATIENCE).expect("it runs");
        assert_eq!(ran.success().trim(), printed);
    }

    /// Waits for a state of a unit.
    #[track_caller]
    fn becomes(&self, unit: &str, state: &str) {
        let end = Instant::now() + PATIENCE;
        while self.property(unit, "ActiveState") != state {
            assert!(
                Instant::now() < end,
                "{unit} does not become {state}: {}",
                self.succeeds(&format!("systemctl status {unit}; :"))
            );
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// A freeze and a thaw as any host asks for them, with the administrator's hook called for both.
    #[track_caller]
    fn freezes_with_its_hook(&self) {
        self.succeeds("rm -f /run/hooks-called");
        let mut host = self.host();
        let kind = host.kind();
        let cancel = std::sync::atomic::AtomicBool::new(false);
        let frozen = host.fsfreeze_freeze(PATIENCE, &cancel).expect("frozen");
        assert_eq!(host.fsfreeze_thaw(PATIENCE).expect("thawed"), frozen);
        assert_eq!(frozen, 2, "root and data");
        // The thaw is answered before its hooks have ended.
        let called = self.succeeds(
            "for try in 1 2 3 4 5 6 7 8 9 10; do grep -qs thaw /run/hooks-called && break; sleep 1; done; cat /run/hooks-called; :",
        );
        let has_hooks = self.succeeds("/usr/sbin/qemu-ga --help").contains("--hook-limit-ms");
        if kind == Kind::Stock || has_hooks {
            assert_eq!(called, "freeze\nthaw\n");
        } else {
            let _told = writeln!(io::stderr(), "NOT TESTED: this agent calls no hooks yet");
        }
    }
}

#[test]
fn the_agents_package_takes_the_place_of_debians_and_gives_it_back() {
    let guest = Administered::boot();
    guest.is_theirs();
    guest.freezes_with_its_hook();

    guest.apt("install stillpoint-agent=0.1.0");
    assert_eq!(
        (guest.state("stillpoint-agent"), guest.state("qemu-guest-agent")),
        ("installed".into(), "config-files".into())
    );
    guest.is_ours();
    guest.freezes_with_its_hook();

    println!("-- the port is unplugged, and comes back");
    let mut monitor = Monitor::connect(&guest.guest.second_qmp_socket(), LIMIT).expect("QEMU's monitor");
    monitor.run_raw("device_del", &json!({ "id": "port-agent" }), LIMIT).expect("unplugged");
    guest.becomes(OURS, "inactive");
    let port = json!({ "driver": "virtserialport", "bus": "ports.0", "chardev": "agent", "id": "port-agent", "name": "org.qemu.guest_agent.0" });
    monitor.run_raw("device_add", &port, LIMIT).expect("plugged");
    guest.becomes(OURS, "active");
    guest.is_ours();

    let before = guest.property(OURS, "MainPID");
    guest.apt("install stillpoint-agent");
    assert!(guest.succeeds("dpkg-query -W -f '${Version}' stillpoint-agent").ends_with("+next"));
    assert_ne!(guest.property(OURS, "MainPID"), before, "the new one runs");
    guest.is_ours();

    // What a removal left of the other goes without harm to ours.
    guest.succeeds("dpkg --purge qemu-guest-agent");
    guest.is_ours();
    guest.freezes_with_its_hook();

    guest.apt("install qemu-guest-agent");
    assert_eq!(
        (guest.state("stillpoint-agent"), guest.state("qemu-guest-agent")),
        ("config-files".into(), "installed".into())
    );
    // Debian's own package leaves its start to udev, and so to the next boot.
    guest.succeeds(&format!("systemctl start {THEIRS}"));
    guest.is_theirs();
    guest.freezes_with_its_hook();
    assert_eq!(guest.guest.exec("busybox pidof stillpoint-agent").out.trim(), "", "ours has ended");

    guest.apt("install stillpoint-agent");
    guest.is_ours();
    guest.succeeds("dpkg --purge qemu-guest-agent stillpoint-agent");
    assert_eq!(
        (guest.state("stillpoint-agent"), guest.state("qemu-guest-agent")),
        (String::new(), String::new())
    );
    assert_eq!(guest.property(OURS, "LoadState"), "not-found");
    assert_eq!(guest.property(THEIRS, "ActiveState"), "inactive");
    let left = guest.succeeds(
        "busybox find / -xdev -name '*stillpoint*' ! -path '/run/*' ! -path '*stillpoint-harness*' ! -path '*stillpoint-guest*' \
         ! -path '/var/lib/apt/*' ! -path '/var/cache/*'; test ! -e /usr/sbin/qemu-ga; \
         busybox find /etc/systemd /etc/rc?.d -name '*qemu-guest-agent*' ! -path '*.service.d*'",
    );
    assert_eq!(left.trim(), "", "left behind");
    guest.nothing_failed();
}

/// The manual's pages and the samples, as they lie in the package.
fn unpacked(deb: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let status = std::process::Command::new("dpkg-deb").arg("-x").arg(deb).arg(folder.path()).status();
    assert!(status.expect("dpkg-deb").success());
    folder
}

fn says(program: &str, words: &[&str]) -> String {
    let output = std::process::Command::new(program).args(words).output().expect(program);
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {words:?}: {}", said(&output.stderr));
    said(&output.stdout) + &said(&output.stderr)
}

#[test]
fn the_manual_has_every_option_and_its_pages_are_sound() {
    let tree = unpacked(Packages::get().deb());
    let agent = tree.path().join("usr/bin/stillpoint-agent").display().to_string();
    let usage = says(&agent, &["--help"]);
    let man = tree.path().join("usr/share/man");
    let page = |name: &str| {
        let path = man.join(name).display().to_string();
        let text = says("gzip", &["-dc", &path]);
        let formatted =
            says("sh", &["-c", &format!("gzip -dc {path} | groff -mdoc -ww -Tascii -P-cbou 2>&1")]);
        assert!(!formatted.contains("warning") && !formatted.contains("error:"), "{name}: {formatted}");
        (text, formatted)
    };
    let (_, main) = page("man8/stillpoint-agent.8.gz");
    let options = usage.split(|letter: char| letter.is_whitespace() || "[=,".contains(letter));
    for option in options.filter(|word| word.starts_with("--") && word.len() > 2) {
        assert!(main.contains(option), "stillpoint-agent(8) has no {option}");
    }
    page("man7/stillpoint-agent-hooks.7.gz");
    let (_, keys) = page("man5/stillpoint-agent.conf.5.gz");
    // What it would run with is a configuration file with every key.
    let dumped = std::process::Command::new(&agent).arg("--dump-conf").output().expect("it starts");
    if !dumped.status.success() {
        use std::io::Write as _;
        let _told =
            writeln!(std::io::stderr(), "NOT TESTED: this agent has no --dump-conf to compare the keys with");
        return;
    }
    for line in String::from_utf8_lossy(&dumped.stdout).lines() {
        if let Some((key, _)) = line.split_once('=') {
            assert!(keys.contains(key), "stillpoint-agent.conf(5) has no {key}");
        }
    }
}

#[test]
fn both_formats_of_the_package_say_whose_place_it_takes() {
    let packages = Packages::get();
    let deb = says("dpkg-deb", &["-f", &packages.deb().display().to_string()]);
    for line in
        ["Provides: qemu-guest-agent (= 1:11.", "Conflicts: qemu-guest-agent", "Replaces: qemu-guest-agent"]
    {
        assert!(deb.contains(line), "{deb}");
    }
    let rpm = packages.rpm().display().to_string();
    let ask = |what: &str| says("rpm", &["--query", "--package", what, &rpm]);
    assert!(ask("--provides").contains("qemu-guest-agent = 11."), "{}", ask("--provides"));
    assert!(ask("--conflicts").contains("qemu-guest-agent"));
    assert_eq!(ask("--obsoletes").trim(), "", "the change is the administrator's");
    let files = ask("--list");
    for path in
        ["/usr/bin/qemu-ga", "/usr/sbin/qemu-ga", "/usr/bin/stillpoint-agent", "/etc/qemu/fsfreeze-hook.d"]
    {
        assert!(files.lines().any(|line| line == path), "{path}: {files}");
    }
    assert!(!ask("--requires").contains(".so"), "it is static: {}", ask("--requires"));
}

/// Runs a script in a view of this machine with other packages laid over it; what the script says.
fn seen(script: &str, roots: &[&Path]) -> String {
    let work = tempfile::tempdir().expect("a folder");
    let output = in_view(script, work.path(), roots).output().expect("unshare");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (said(&output.stdout), said(&output.stderr));
    assert!(output.status.success(), "{}: {out}{err}", output.status);
    out
}

#[test]
fn the_rpm_keeps_what_the_other_agent_was_refused_and_leaves_nothing() {
    if !is_possible() {
        return;
    }
    let script = r#"
        mkdir -p /etc/sysconfig
        echo 'FILTER_RPC_ARGS="--block-rpcs=guest-exec"' >/etc/sysconfig/qemu-ga
        rpm --initdb && rpm --install --nodeps "$RPM"
        # As the other one's package takes it along.
        rm /etc/sysconfig/qemu-ga
        . /etc/sysconfig/stillpoint-agent
        echo "refused: $FILTER_RPC_ARGS"
        grep ^ExecStart=. /usr/lib/systemd/system/stillpoint-agent.service.d/10-sysconfig.conf
        readlink /etc/systemd/system/qemu-guest-agent.service
        /usr/bin/qemu-ga --version | head -n 1
        /usr/sbin/qemu-ga --version | head -n 1
        rpm --verify --nodeps stillpoint-agent && echo "as packed"
        rpm --erase stillpoint-agent
        find /usr /etc -name '*stillpoint*'
        readlink /etc/systemd/system/qemu-guest-agent.service || echo "the name is free"
    "#;
    let script = script.replace("$RPM", &Packages::get().rpm().display().to_string());
    let said = seen(&script, &[]);
    let lines: Vec<&str> = said.lines().collect();
    let version = "QEMU Guest Agent 11.";
    assert_eq!(lines[0], "refused: --block-rpcs=guest-exec", "{said}");
    assert!(
        lines[1].contains("$FILTER_RPC_ARGS") && lines[1].contains("-F${FSFREEZE_HOOK_PATHNAME}"),
        "{said}"
    );
    assert_eq!(lines[2], "/usr/lib/systemd/system/stillpoint-agent.service", "{said}");
    assert!(lines[3].starts_with(version) && lines[4].starts_with(version), "{said}");
    assert_eq!(lines[5..], ["as packed", "/etc/sysconfig/stillpoint-agent", "the name is free"], "{said}");
}

#[test]
fn the_hook_for_mariadb_holds_its_lock_until_the_thaw_and_fails_if_it_was_lost() {
    if !is_possible() {
        return;
    }
    let tree = unpacked(Packages::get().deb());
    let script = r#"
        set +e
        mkdir -p /var/lib/mysql /run/mysqld /root
        useradd --system --home /var/lib/mysql maria && chown maria /var/lib/mysql /run/mysqld
        export HOME=/run/home && mkdir -p $HOME
        printf '[client]\nsocket=/run/mysqld/socket\nuser=root\n' >$HOME/.my.cnf
        mariadb-install-db --no-defaults --user=maria --datadir=/var/lib/mysql --auth-root-authentication-method=normal \
            --skip-test-db >/run/install.log 2>&1 || { cat /run/install.log; exit 1; }
        mariadbd --no-defaults --user=maria --datadir=/var/lib/mysql --socket=/run/mysqld/socket --skip-networking \
            >/run/server.log 2>&1 &
        for try in $(seq 300); do mariadb -e 'select 1' >/run/ready 2>&1 && break; sleep 0.2; done
        grep -q 1 /run/ready || { cat /run/ready /run/server.log; exit 1; }
        mariadb -e 'create database d; create table d.t (n int) engine=innodb'
        hook() { timeout 60 "$HOOK" "$1" >/run/said 2>&1; echo "$1 $?: $(cat /run/said)"; }
        write() { timeout 2 mariadb -e 'insert into d.t values (1)' && echo "written" || echo "a write waits"; }

        echo "= as it should be"
        hook freeze; write; hook thaw; write; hook thaw
        echo "= its session is lost"
        hook freeze; mariadb -N -e "kill $(cat /run/stillpoint-hook-mariadb/session)"; sleep 1; write; hook thaw; write
        echo "= its client is lost"
        hook freeze; kill $(cat /run/stillpoint-hook-mariadb/pid); sleep 1; hook thaw; write
        echo "= a statement that holds up the lock"
        mariadb -e 'insert into d.t select sleep(30)' >/dev/null &
        sleep 2
        STILLPOINT_HOOK_WAIT=2 hook freeze; hook thaw
        echo "= nothing is left"
        ls /run | grep stillpoint || echo "nothing"
        mariadb -N -e "select count(*) from information_schema.processlist where info is null and command='Sleep'"
    "#;
    let hook = tree.path().join("usr/share/stillpoint-agent/hooks/mariadb.sample");
    let said = seen(&script.replace("$HOOK", &hook.display().to_string()), &[Packages::get().mariadb()]);
    println!("{said}");
    let part = |name: &str| {
        let (_, after) =
            said.split_once(&format!("= {name}\n")).unwrap_or_else(|| panic!("no {name}: {said}"));
        after.split("= ").next().unwrap_or_default().to_owned()
    };
    assert_eq!(
        part("as it should be"),
        "freeze 0: stillpoint: quiesced mysql /var/lib/mysql/\nstillpoint: locked\na write waits\nthaw 0: \nwritten\nthaw 0: \n"
    );
    for lost in ["its session is lost", "its client is lost"] {
        let said = part(lost);
        assert!(said.contains("freeze 0:") && said.contains("thaw 1: mariadb: session"), "{said}");
        assert!(said.ends_with("written\n"), "{said}");
    }
    let refused = part("a statement that holds up the lock");
    assert!(
        refused.contains("freeze 1: mariadb: no global read lock within 2 s") && refused.contains("thaw 0:"),
        "{refused}"
    );
    assert_eq!(part("nothing is left"), "nothing\n0\n");
}

#[test]
#[ignore = "long: a guest of its own"]
fn confined_by_systemd_or_by_apparmor_it_freezes_and_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    let archive = folder.path().join("apparmor.tar");
    let root = Packages::get().apparmor().display().to_string();
    says("tar", &["-C", &root, "--exclude=./lib", "-cf", &archive.display().to_string(), "."]);
    let hardened = vm_tests::checkout().join("packaging/examples/hardened.conf");
    let guest = Administered::boot_with(&[archive, hardened]);
    guest.apt("install stillpoint-agent=0.1.0");
    guest.is_ours();
    let attribute = |name: &str| {
        let pid = guest.property(OURS, "MainPID");
        guest.guest.exec(&format!("cat /proc/{pid}/{name}")).out
    };

    println!("-- AppArmor");
    guest.succeeds("busybox tar -x -o -C / -f /run/stillpoint/apparmor.tar");
    guest.succeeds(
        "cp /usr/share/stillpoint-agent/apparmor/stillpoint-agent /etc/apparmor.d/ && apparmor_parser -r /etc/apparmor.d/stillpoint-agent",
    );
    guest.succeeds(&format!("systemctl restart {OURS}"));
    guest.is_ours();
    assert_eq!(attribute("attr/current").trim(), "stillpoint-agent (enforce)");
    guest.freezes_with_its_hook();
    guest.runs_for_a_host(
        "mount -t tmpfs tmpfs /mnt && umount /mnt && cat /proc/self/attr/current",
        "unconfined",
    );
    let denied = guest.guest.exec("journalctl -k --no-pager | grep 'apparmor=.DENIED' | grep stillpoint").out;
    assert_eq!(denied, "", "what it does is what it may");
    guest.succeeds(
        "apparmor_parser -R /etc/apparmor.d/stillpoint-agent && rm /etc/apparmor.d/stillpoint-agent",
    );

    println!("-- systemd's own restrictions");
    guest.succeeds(&format!(
        "install -D -m 644 /run/stillpoint/hardened.conf /etc/systemd/system/{OURS}.d/hardened.conf && systemctl daemon-reload && \
         systemctl restart {OURS}"
    ));
    guest.is_ours();
    assert!(attribute("status").contains("NoNewPrivs:\t1"), "{}", attribute("status"));
    guest.freezes_with_its_hook();
    let mut host = guest.host();
    let exec = host.call::<Value>("guest-exec", Some(json!({ "path": "/bin/true" })), PATIENCE);
    assert!(exec.is_err_and(|error| error.to_string().contains("has been disabled")));
}
