//! JSON as a qemu-ga reads and writes it: RFC 8259, a little more on the way in, ASCII only on the way out.

mod encode;
mod lexer;
mod packed;
mod parser;
mod reader;
mod received;
mod text;
mod token;

pub use encode::{encode, written};
pub use packed::{Packed, Text};
pub use reader::{Item, Limits, Reader};
pub use received::Received;
