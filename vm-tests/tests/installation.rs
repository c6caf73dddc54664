//! What the packages' scripts do to a system, and what they say, without a guest: each runs in a view of this machine's own
//! files, with stubs in the place of systemd's programs.

use std::path::Path;
use vm_tests::view::{in_view, is_possible};

/// A system that booted with systemd and has the port; `calls` lists what was asked of systemd.
const SYSTEM: &str = r#"
set +e
mount -t tmpfs -o mode=755 dev /dev
mknod -m 666 /dev/null c 1 3
mkdir -p /dev/virtio-ports /run/systemd/system /etc/systemd/system /etc/qemu/fsfreeze-hook.d /etc/qemu-ga/fsfreeze-hook.d
: >/dev/virtio-ports/org.qemu.guest_agent.0
rm -f /usr/sbin/policy-rc.d /etc/systemd/system/*agent.service
for name in systemctl udevadm deb-systemd-invoke; do
    printf '#!/bin/sh\necho "$(basename "$0") $*" >>/run/calls\n' >/usr/bin/$name
    chmod 755 /usr/bin/$name
done
mkdir -p /usr/share/stillpoint-agent
cp "$packaging/hooks/check-hooks" /usr/share/stillpoint-agent/
deb() { name=$1; shift; sh "$packaging/deb/stillpoint-agent/$name" "$@" 2>&1 || echo "$name failed"; }
rpm() { sh "$packaging/rpm/stillpoint-agent.$1" "$2" 2>&1 || echo "$1 failed"; }
calls() { grep '^systemctl .*agent' /run/calls; rm -f /run/calls; }
links() { for name in qemu-guest-agent stillpoint-agent; do readlink /etc/systemd/system/$name.service || echo none; done; }
mask() { ln -s /dev/null /etc/systemd/system/qemu-guest-agent.service; }
"#;

/// What a script that runs in such a system prints.
#[track_caller]
fn said(script: &str) -> String {
    let work = tempfile::tempdir().expect("a folder");
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging");
    let script = format!("packaging={}\n{SYSTEM}{script}", packaging.display());
    let output = in_view(&script, work.path(), &[]).output().expect("unshare");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}: {}", output.status, said(&output.stderr));
    assert_eq!(said(&output.stderr), "", "{}", said(&output.stdout));
    said(&output.stdout)
}

const OURS: &str = "/usr/lib/systemd/system/stillpoint-agent.service";
const IS_MASKED: &str = "stillpoint-agent: qemu-guest-agent.service is masked, so stillpoint-agent.service is now \
    masked too and does not run; to run it: systemctl unmask qemu-guest-agent.service stillpoint-agent.service && \
    systemctl enable --now stillpoint-agent.service";

#[test]
fn an_installation_takes_the_others_name_and_starts_and_a_removal_gives_it_back() {
    if !is_possible() {
        return;
    }
    let script = "deb preinst install; deb postinst configure; calls; links; deb postrm remove; links; calls >/dev/null
        rpm post 1; rpm posttrans 1; calls; links; rpm postun 0; links";
    let once = format!("systemctl restart stillpoint-agent.service\n{OURS}\nnone\nnone\nnone\n");
    assert_eq!(said(script), once.repeat(2));
}

#[test]
fn where_the_others_unit_is_masked_ours_is_too_and_the_installation_says_so() {
    if !is_possible() {
        return;
    }
    let masked = "/dev/null\n/dev/null\n";
    let gone = "/dev/null\nnone\n";
    let deb = "mask; deb preinst install; deb postinst configure; calls; links; deb postrm remove; links";
    assert_eq!(said(deb), format!("{IS_MASKED}\n{masked}{gone}"));
    let rpm = "mask; rpm post 1; rpm posttrans 1; calls; links; rpm postun 0; links";
    assert_eq!(said(rpm), format!("{IS_MASKED}\n{masked}{gone}"));
    // Who unmasked ours alone wants that, and an upgrade keeps to it.
    let started = format!("systemctl restart stillpoint-agent.service\n{gone}");
    let deb = "mask; deb preinst upgrade 0.1.0; deb postinst configure 0.1.0; calls; links";
    assert_eq!(said(deb), started);
    assert_eq!(said("mask; rpm post 2; rpm posttrans 2; calls; links"), started);
    // The mask that the other's removal left is nobody's wish.
    let deb = "mask; mkdir -p /var/lib/systemd/deb-systemd-helper-masked
        : >/var/lib/systemd/deb-systemd-helper-masked/qemu-guest-agent.service
        deb preinst install; deb postinst configure; calls; links";
    assert_eq!(said(deb), started);
}

#[test]
fn an_installation_names_the_hooks_that_the_agent_would_not_call() {
    if !is_possible() {
        return;
    }
    let hooks = "
        cd /etc/qemu/fsfreeze-hook.d
        for name in good group theirs old.sample plain; do printf '#!/bin/sh\\n' >$name; chmod 755 $name; done
        chmod 775 group; chown 1234 theirs; chmod 777 old.sample; chmod 666 plain
        mkdir -p /etc/site; printf '#!/bin/sh\\n' >/etc/site/hook; chmod 755 /etc/site/hook; chmod 777 /etc/site
        ln -s /etc/site/hook linked";
    let refused = |at: &str, hook: &str| {
        format!(
            "stillpoint-agent: no freeze will call hooks, and fails, while others than root may change {at} \
             (for /etc/qemu/fsfreeze-hook.d/{hook}); to mend it: chown root: '{at}' && chmod go-w '{at}'\n"
        )
    };
    let folder = "/etc/qemu/fsfreeze-hook.d";
    let all = refused(&format!("{folder}/group"), "group")
        + &refused("/etc/site", "linked")
        + &refused(&format!("{folder}/theirs"), "theirs");
    assert_eq!(said(&format!("{hooks}\n deb postinst configure")), all);
    assert_eq!(said(&format!("{hooks}\n rpm posttrans 1")), all);
}
