//! The thread that runs a VM's devices.
