//! JSON as a qemu-ga reads and writes it: RFC 8259, a little more on the way in, ASCII only on the way out.

mod encode;
mod lexer;
mod parser;
mod reader;
mod text;

pub use encode::encode;
pub use reader::{Item, Limits, Reader};
