//! The meaning of a snapshot: what is asked for, what happened, and what it is worth.
//!
//! Nothing here reads a clock, a file or a socket. `engine` carries out what `run` decides and fills in a
//! `Receipt`; `judge` computes the level from that receipt alone.

pub mod conduct;
pub mod judge;
pub mod level;
pub mod receipt;
pub mod request;
pub mod run;

pub use guest_protocol::stillpoint::Reason;
pub use judge::{Verdict, judge, required_unmet};
pub use level::Level;
pub use receipt::Receipt;
pub use request::Request;
