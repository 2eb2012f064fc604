//! vhost-net: the host kernel works on the queues.

use std::sync::Arc;

use ::vhost::net::VhostNet as _;
use ::vhost::vhost_kern::net::Net as KernelNet;
use ::vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::tap::Tap;
use crate::GuestMemory;
use crate::virtio::Interrupt;

/// A kernel worker for one device.
pub(super) struct Kernel {
    net: KernelNet<GuestMemory>,
    features: u64,
    running: bool,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl Kernel {
    /// Opens /dev/vhost-net.
    pub(super) fn open(mem: GuestMemory) -> Result<Self, ::vhost::Error> {
        let net = KernelNet::new(mem)?;
        net.set_owner()?;
        let features = net.get_features()?;
        Ok(Self {
            net,
            features,
            running: false,
        })
    }

    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    /// Hands the queues to the kernel, which goes on where they are.
    pub(super) fn start(
        &mut self,
        tap: &Tap,
        mem: &GuestMemory,
        queues: &[Queue],
        events: &Arc<[EventFd]>,
        interrupt: &Interrupt,
        features: u64,
    ) -> Result<(), ::vhost::Error> {
        self.net.set_features(features & self.features)?;
        let guard = mem.memory();
        let regions: Vec<_> = guard
            .iter()
            .map(|r| VhostUserMemoryRegionInfo {
                guest_phys_addr: r.start_addr().0,
                memory_size: r.len(),
                userspace_addr: r.as_ptr() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            })
            .collect();
        self.net.set_mem_table(&regions)?;
        for (index, (queue, event)) in queues.iter().zip(events.iter()).enumerate() {
            self.net.set_vring_num(index, queue.size())?;
            self.net.set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: queue.max_size(),
                    queue_size: queue.size(),
                    flags: 0,
                    desc_table_addr: queue.desc_table(),
                    used_ring_addr: queue.used_ring(),
                    avail_ring_addr: queue.avail_ring(),
                    log_addr: None,
                },
            )?;
            self.net.set_vring_base(index, queue.next_avail())?;
            self.net.set_vring_call(index, interrupt.event())?;
            self.net.set_vring_kick(index, event)?;
        }
        // The kernel raises the line without setting the status register.
        interrupt.set_always_used(true);
        self.running = true;
        for index in 0..queues.len() {
            if let Err(e) = self.net.set_backend(index, Some(tap.file())) {
                self.detach(queues.len());
                interrupt.set_always_used(false);
                return Err(e);
            }
        }
        Ok(())
    }

    fn detach(&mut self, queues: usize) {
        for index in 0..queues {
            let _ = self.net.set_backend(index, None);
        }
        self.running = false;
    }

    /// Takes the queues back, with their positions.
    pub(super) fn stop(&mut self, mem: &GuestMemory, queues: &mut [Queue], interrupt: &Interrupt) {
        if !self.running {
            return;
        }
        self.detach(queues.len());
        interrupt.set_always_used(false);
        let guard = mem.memory();
        for (index, queue) in queues.iter_mut().enumerate() {
            if let Ok(base) = self.net.get_vring_base(index) {
                queue.set_next_avail(base as u16);
            }
            if let Ok(used) = queue.used_idx(&*guard, std::sync::atomic::Ordering::Acquire) {
                queue.set_next_used(used.0);
            }
        }
        // What the kernel used last may not have been seen by the driver.
        interrupt.trigger(crate::virtio::InterruptKind::UsedBuffer);
    }
}
