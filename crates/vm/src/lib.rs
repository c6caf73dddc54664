//! Shells towards a virtual machine: monitor, agent, NBD, twin.
