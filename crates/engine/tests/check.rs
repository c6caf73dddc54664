//! A rehearsal without a guest that could answer it.

use engine::check::rehearse;
use engine::register::{Register, VmEntry};
use snapshot::Level;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn a_paused_vm_is_not_asked_and_can_be_crash_consistent_at_best() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let mut vm = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-S", "-accel", "tcg", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let entry = VmEntry { name: "db1".to_owned(), qmp: socket, agent: Some(folder.path().join("nobody")) };
    let register = Register::open(folder.path()).unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    let rehearsal = loop {
        match rehearse(&register, &entry) {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(50)),
            other => break other,
        }
    };
    vm.kill().unwrap();
    vm.wait().unwrap();
    let rehearsal = rehearsal.unwrap();
    assert_eq!(rehearsal.level, Level::Crash);
    let codes: Vec<&str> = rehearsal.reasons.iter().map(|reason| reason.code.as_ref()).collect();
    assert_eq!(codes, ["vm_paused"], "{rehearsal:?}");
}
