//! Shells towards a virtual machine: monitor, agent, NBD, twin.

pub mod accelerator;
pub mod agent;
pub mod at_rest;
pub mod disks;
pub mod image_lock;
pub mod machine;
pub mod monitor;
pub mod nbd_client;
mod nbd_received;
pub mod nbd_server;
pub mod point;
mod program;
pub mod twin;
pub mod unix;
pub mod untouched;
