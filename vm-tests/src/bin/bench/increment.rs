//! What an increment costs after 10,000 scattered 4 KiB writes: the way in which databases write.

use crate::cost::Cost;
use crate::data::{BLOCK, BLOCK_BYTES, Fill, Random, scattered_blocks};
use crate::idle_vm::{DISK, IdleVm, run as run_program};
use crate::ours::{MIB, allocated_bytes, ratio, repository, restore, snapshot};
use qmp::bitmap::BlockDirtyBitmapAdd;
use std::collections::BTreeSet;
use std::process::Command;

const DISK_BYTES: u64 = 4 << 30;
const WRITES: usize = 10_000;
/// Above this the bench fails: twice what was written is 78 MiB.
const STORED_BYTES_MAX: u64 = 80 << 20;
/// The granularity at which libvirt, and QEMU by default on such a disk, track changes.
const PEER_GRANULARITY_BYTES: u32 = 64 << 10;
const PEER: &str = "peer";

pub(crate) fn run() -> Result<(), String> {
    println!("== increment: {WRITES} scattered writes of 4 KiB of noise");
    println!("disk: qcow2, 4 GiB, of which 1 GiB noise and 1 GiB text; the writes hit data and holes alike");
    let mut vm = IdleVm::start(DISK_BYTES, &[Fill::Noise, Fill::Hole, Fill::Text, Fill::Hole])?;
    let stillpoint = repository(&vm)?;
    let full = snapshot(&stillpoint, &vm)?;
    println!("first, full    {}; {}", full.cost, full.sizes);

    let tracker = BlockDirtyBitmapAdd {
        node: DISK.to_owned(),
        name: PEER.to_owned(),
        granularity: Some(PEER_GRANULARITY_BYTES),
        persistent: None,
        disabled: None,
    };
    vm.ask(&tracker)?;
    let blocks = scattered_blocks(WRITES, DISK_BYTES);
    let mut random = Random(3);
    let mut block = [0; BLOCK];
    for number in &blocks {
        random.noise(&mut block);
        vm.write(number * BLOCK_BYTES, &block)?;
    }

    let ours = snapshot(&stillpoint, &vm)?;
    println!("increment      {}; {}", ours.cost, ours.sizes);
    println!(
        "               the repository grew by {:.1} MiB in all; ms: {}",
        mib(ours.grown_bytes),
        ours.phases
    );

    let image = vm.path(PEER);
    let size = DISK_BYTES.to_string();
    run_program(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(size))?;
    let ((), peer) = Cost::of(vm.pid(), || vm.incremental_backup(PEER, PEER))?;
    let peer_bytes = allocated_bytes(&image)?;
    println!("QEMU's backup  {peer}; a qcow2 of {:.1} MiB, from a bitmap of 64 KiB", mib(peer_bytes));
    let granularity = u64::from(PEER_GRANULARITY_BYTES);
    let regions: BTreeSet<u64> = blocks.iter().map(|block| block * BLOCK_BYTES / granularity).collect();
    let tracked_bytes = regions.len() as u64 * granularity;
    println!("               by the list of writes, tracking by 64 KiB ships {:.1} MiB", mib(tracked_bytes));

    let written = WRITES as u64 * BLOCK_BYTES;
    println!(
        "stored for each byte written: ours {:.2}, QEMU's backup {:.1}",
        ratio(ours.grown_bytes, written),
        ratio(peer_bytes, written)
    );
    println!("QEMU's backup stores {:.1} times as much as ours", ratio(peer_bytes, ours.grown_bytes));

    let restored = restore(&stillpoint, &vm, &ours.id)?;
    println!("restored       {restored}; every byte is as on the VM's disk");

    if ours.sizes.read != written || ours.sizes.changed != written {
        return Err(format!("{written} bytes were written, but: {}", ours.sizes));
    }
    if ours.grown_bytes > STORED_BYTES_MAX {
        return Err(format!(
            "the repository grew by {} bytes, of {STORED_BYTES_MAX} allowed",
            ours.grown_bytes
        ));
    }
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}
