//! The script for SysV init, in a view of this machine's files that ends with it: `/usr` and `/etc` have ours laid over them,
//! `/run` is empty, and there is no other process.

use std::io::{self, Write};
use std::path::Path;
use std::process::Command;

/// `sh -c … WORK PROGRAM SCRIPT`. No file system of the machine is written to: all that is new lies in `WORK`, a tmpfs.
const VIEW: &str = r#"
set -e
work=$1 program=$2 script=$3
mount -t tmpfs -o mode=755 view "$work"
for folder in usr etc; do
    mkdir -p "$work/$folder" "$work/$folder-work"
    mount -t overlay -o "lowerdir=/$folder,upperdir=$work/$folder,workdir=$work/$folder-work" view "/$folder"
done
mount -t tmpfs -o mode=755 view /run
cp "$program" /usr/bin/stillpoint-agent
mkdir -p /etc/default
printf 'TRANSPORT=unix-listen:/run/agent.sock\nDAEMON_ARGS="--block-rpcs=guest-exec -t /run"\n' >/etc/default/qemu-guest-agent
set +e
agent() { sh "$script" "$1" >/run/said 2>&1; echo "$1 $?"; }
pid() { cat /run/qemu-ga.pid; }
agent status
agent start
one=$(pid)
[ "$(readlink /proc/$one/exe)" = /usr/bin/stillpoint-agent ] && echo "it runs"
tr '\0' '\n' </proc/$one/cmdline | grep -x -e '--block-rpcs=guest-exec'
[ -S /run/agent.sock ] && echo "it listens"
agent status
agent start
[ "$(pid)" = "$one" ] && echo "it is still that one"
agent restart
two=$(pid)
[ "$two" != "$one" ] && [ ! -e /proc/$one ] && [ -e /proc/$two ] && echo "it is another one"
agent stop
[ ! -e /proc/$two ] && [ ! -e /run/qemu-ga.pid ] && echo "it has ended"
agent status
agent stop
echo 'TRANSPORT=virtio-serial:/dev/virtio-ports/nowhere' >/etc/default/qemu-guest-agent
agent start
grep -o 'there is no /dev/virtio-ports/nowhere, not starting' /run/said
agent reload
"#;

const SAID: &str = "\
status 3
start 0
it runs
--block-rpcs=guest-exec
it listens
status 0
start 0
it is still that one
restart 0
it is another one
stop 0
it has ended
status 3
stop 0
start 0
there is no /dev/virtio-ports/nowhere, not starting
reload 3
";

#[test]
fn the_sysv_script_starts_restarts_and_stops_the_agent() {
    let missing = ["/lib/lsb/init-functions", "/lib/init/vars.sh", "/sbin/start-stop-daemon"]
        .into_iter()
        .find(|path| !Path::new(path).exists());
    let not_root = (!rustix::process::geteuid().is_root()).then_some("root");
    if let Some(missing) = missing.or(not_root) {
        writeln!(io::stderr(), "SKIPPED: the script of SysV takes {missing}").expect("a standard error");
        return;
    }
    let work = tempfile::tempdir().expect("a folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/sysv/stillpoint-agent");
    let output = Command::new("unshare")
        .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["--propagation=private", "sh", "-c", VIEW, "view"])
        .arg(work.path())
        .arg(env!("CARGO_BIN_EXE_stillpoint-agent"))
        .arg(script)
        .output()
        .expect("unshare");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(said(&output.stdout), SAID, "{}", said(&output.stderr));
}
