//! The real program, talked to over a unix socket. Nothing is ever frozen here: freezes have a namespace of their own.

mod activation;
mod commands;
mod configuration;
mod connections;
mod contract;
mod daemon;
mod exec;
mod files;
mod guest;
mod machine;
mod network;
mod process;
mod sandbox;
mod serial;
mod system;
mod sysv;
mod vsock;
