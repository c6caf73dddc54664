//! Real guests under real QEMU prove what only a kernel can.
