//! The snapshot store: writer, reader, verify, delete.
