//! Carries runs out: snapshot, restore, boot, verify, delete.
