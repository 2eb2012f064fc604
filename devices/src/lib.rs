//! Device models of a Bulkhead VM.
//!
//! This crate knows guest memory, virtqueues and eventfds. It knows nothing of KVM, sandboxes or
//! containers: whoever builds a VM maps the [`bus::BusDevice`]s into an address space, connects
//! each interrupt's eventfd to an interrupt controller, and runs the [`event_loop::EventLoop`].
//!
//! Everything that comes from the guest (register writes, descriptors, ring indices, request
//! bytes) is hostile: device code returns errors, it never panics on it.

pub mod bus;
pub mod event_loop;
pub mod fuzzing;
pub mod legacy;
#[cfg(test)]
pub(crate) mod testing;
pub mod virtio;

/// Guest physical memory as every device sees it. The atomic wrapper lets memory be added to a
/// running VM (virtio-mem) without restarting devices.
pub type GuestMemory = vm_memory::GuestMemoryAtomic<vm_memory::GuestMemoryMmap<()>>;
