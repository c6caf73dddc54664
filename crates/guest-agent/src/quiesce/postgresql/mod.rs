//! PostgreSQL 11 and later.
//!
//! An atomic copy needs neither lock nor backup mode: to the server it is a power failure, which its log recovery is
//! made for. So the module shortens that recovery (a CHECKPOINT in prepare, another right before the freeze),
//! makes asynchronous commits durable on the way, records how far the log reached, and proves after the thaw that
//! it was the same server all along.
//!
//! A worker connects as the owner of the data directory, through the server's own unix socket, by whatever
//! authentication gives that user a way in without a password (`peer`, `trust`). The role needs the right to
//! CHECKPOINT: superuser, or `pg_checkpoint` since 15.

mod discover;
mod evidence;
mod session;
mod unlogged;
mod wire;

use super::kinds::Kind;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The freeze budget is the common hard limit: beyond it clients and standbys of a busy server give up.
pub(super) const KIND: Kind = Kind {
    name: "postgresql",
    freeze_budget: Duration::from_secs(5),
    stalls_writers: false,
    is_it: discover::is_it,
    look: discover::look,
    session: session::open,
};

/// What a worker is told about its server.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Order {
    /// The postmaster, who must be the one that listens on the socket.
    server_pid: u32,
    /// The data directory's owner, who must be the one that the postmaster runs as.
    server_uid: u32,
    /// Roles to try, best first.
    roles: Vec<String>,
}
