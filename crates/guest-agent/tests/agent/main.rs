//! The real program, talked to over a unix socket. Nothing is ever frozen here: freezes have a namespace of their own.

mod commands;
mod connections;
mod guest;
mod process;
