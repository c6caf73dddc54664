//! The NBD protocol, both ends, as pure code.
