//! The meaning of a snapshot: request, run, level, receipt.
