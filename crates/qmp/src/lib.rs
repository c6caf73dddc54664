//! What Stillpoint says to QEMU's monitor, as pure code.
