//! Bytes at rest: the code half of docs/format/repository.md.
