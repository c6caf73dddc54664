//! What a full snapshot and its restore cost, beside a bare copy of the same bytes by `nbdcopy`.

use crate::cost::Cost;
use crate::data::Fill;
use crate::idle_vm::{IdleVm, compare, run as run_program, words};
use crate::ours::{MIB, repository, restore, snapshot};
use std::process::Command;

const DISK_BYTES: u64 = 2 << 30;
/// Odd, so that the median is one of them.
const RUNS: usize = 3;

pub(crate) fn run() -> Result<(), String> {
    println!(
        "== full: a snapshot beside `nbdcopy --flush` of the same disk to a raw file, {RUNS} times, in turn"
    );
    println!("disk: qcow2, 2 GiB: half noise, a quarter text, a quarter holes; in the page cache");
    let mut vm = IdleVm::start(DISK_BYTES, &[Fill::Noise, Fill::Text, Fill::Noise, Fill::Hole])?;
    let [mut ours, mut ours_back, mut peer, mut peer_back] = [const { Vec::new() }; 4];
    for number in 1..=RUNS {
        println!("run {number}");
        let (there, back) = copy(&mut vm)?;
        println!("  nbdcopy            {there}\n  nbdcopy back       {back}");
        peer.push(there);
        peer_back.push(back);

        // A repository of its own: in an old one everything would be known already.
        let stillpoint = repository(&vm)?;
        let taken = snapshot(&stillpoint, &vm)?;
        println!("  stillpoint         {}; {}", taken.cost, taken.sizes);
        println!(
            "                     the repository grew by {:.1} MiB in all; ms: {}",
            taken.grown_bytes as f64 / MIB,
            taken.phases
        );
        let back = restore(&stillpoint, &vm, &taken.id)?;
        println!("  stillpoint restore {back}");
        ours.push(taken.cost);
        ours_back.push(back);
    }
    report("snapshot against nbdcopy", &ours, &peer);
    report("restore against nbdcopy back", &ours_back, &peer_back);
    Ok(())
}

/// Copies the disk out of QEMU as it is, and that copy once more: there and back.
fn copy(vm: &mut IdleVm) -> Result<(Cost, Cost), String> {
    let address = vm.export()?;
    let (copy, again) = (vm.path("copy"), vm.path("again"));
    let nbdcopy = || {
        let mut command = Command::new("nbdcopy");
        command.arg("--flush");
        command
    };
    let (_, there) = Cost::of(vm.pid(), || run_program(nbdcopy().arg(&address).arg(&copy)))?;
    vm.end_export()?;
    compare(vm, &copy)?;
    let (_, back) = Cost::of(vm.pid(), || run_program(nbdcopy().args([&copy, &again])))?;
    for file in [copy, again] {
        std::fs::remove_file(file).map_err(words)?;
    }
    Ok((there, back))
}

fn report(name: &str, ours: &[Cost], peer: &[Cost]) {
    let (ours, peer) = (Cost::median(ours), Cost::median(peer));
    let by =
        |figure: fn(Cost) -> std::time::Duration| figure(ours).as_secs_f64() / figure(peer).as_secs_f64();
    println!(
        "{name}: {:.2} times the wall time, {:.2} times the CPU (medians)",
        by(|c| c.wall),
        by(Cost::cpu)
    );
    println!("  ours    {ours}\n  nbdcopy {peer}");
}
