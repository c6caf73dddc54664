//! The agent freezes, holds and thaws real file systems: ext4, xfs, btrfs, squashfs on loop devices.
//!
//! Freezing anything of the machine itself is impossible by construction. Each test runs in its own mount and process
//! namespace, pivoted into a tmpfs from which every other mount is detached, and refuses to go on when it sees
//! anything else (`private_root`). A rescuer outside holds every test mount open and thaws it when the test ends,
//! dies or takes too long (`rescue`). Needs root and loop devices; says so and skips where they are missing.

#![expect(clippy::unwrap_used, reason = "a step that fails ends the test, which is what it is for")]

mod client;
mod contract;
mod defects;
mod hooks;
mod outside;
mod private_root;
mod rescue;
mod scenes;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.get(1..) {
        Some(["--stage", name, folder]) => private_root::stage(scenes::find(name), folder.as_ref()),
        Some(["--inside", name, folder]) => private_root::inside(scenes::find(name), folder.as_ref()),
        Some(["--sleep"]) => std::thread::sleep(std::time::Duration::from_secs(300)),
        Some(["--rescue", seconds, fds @ ..]) => rescue::main(seconds, fds),
        _ => outside::main(words.get(1..).unwrap_or_default()),
    }
}
