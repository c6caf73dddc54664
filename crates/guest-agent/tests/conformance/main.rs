//! The same bytes to our agent and to a stock qemu-ga, in one run, in one private root: the answers must be the same,
//! but for what `differences` lists and gives a reason for.
//!
//! Debian 12's qemu-ga is always there (`cargo xtask setup` installs its package and starts nothing). Later ones are
//! unpacked into the cache by `cargo xtask stock-agents`; `STILLPOINT_STOCK_AGENTS` names their folders.
//!
//! Everything runs in the private roots of the freeze tests, so that no agent, whatever it is told, can reach anything
//! of the machine: no file system of it is visible, the programs that shut down or set passwords are scripts that write
//! down how they were called, and the right to set the clock is taken away.

#![expect(clippy::unwrap_used, reason = "a step that fails ends the test, which is what it is for")]

#[path = "../native_freeze/client.rs"]
#[allow(dead_code, reason = "made for the freeze tests, which use all of it")]
mod client;
mod compare;
mod differences;
mod forms;
#[path = "../native_freeze/outside.rs"]
mod outside;
mod peer;
#[path = "../native_freeze/private_root.rs"]
#[allow(dead_code, reason = "made for the freeze tests, which use all of it")]
mod private_root;
#[path = "../native_freeze/rescue.rs"]
mod rescue;
mod scenes;
mod scripts;
mod soak;
mod stock;
mod streams;

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
