//! Memory that a running VM is given, and gives back (virtio-mem).

use std::sync::PoisonError;

use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{GuestAddress, GuestMemory as _};

use crate::error::VmError;
use crate::vm::{Phase, Vm};

/// What Linux adds memory in, on x86 (`memory block size`).
pub(crate) const ROOM_PIECE: u64 = 128 << 20;

/// Slots below are for the memory that a VM is made with.
const FIRST_ROOM_SLOT: u32 = 8;

impl Vm {
    /// Wants the guest to have `bytes` beyond the memory it was made with, rounded up to whole blocks
    /// of 2 MiB, and no more than `room_mib` says. The guest takes them, or gives them back, in its
    /// own time: [`Self::added_memory`] says how far it is.
    ///
    /// # Errors
    /// When the VM has no room, has ended, or KVM refuses.
    pub fn request_memory(&self, bytes: u64) -> Result<(), VmError> {
        if *self.phase() == Phase::Ended {
            return Err(VmError::NotRunning(format!("VM {} has ended", self.id)));
        }
        // Linux plugs nothing of a piece that is not usable as a whole.
        let usable = bytes
            .checked_next_multiple_of(ROOM_PIECE)
            .unwrap_or(u64::MAX);
        let asked = self.devices.with_room(|room| {
            room.prepare(usable);
        });
        if asked.is_none() {
            return Err(VmError::Config {
                what: "memory",
                reason: "this VM has no room for more".into(),
            });
        }
        // Before the guest is told.
        self.map_room()?;
        self.devices.with_room(|room| room.request(bytes));
        Ok(())
    }

    /// Bytes that the guest is wanted to have beyond the memory it was made with, and that it has;
    /// `None`: it has no room.
    pub fn added_memory(&self) -> Option<(u64, u64)> {
        self.devices
            .with_room(|room| (room.requested_bytes(), room.plugged_bytes()))
    }

    /// Lets the guest's CPUs reach what its driver may plug by now, and no more: a guest that goes
    /// elsewhere finds no memory there.
    pub(crate) fn map_room(&self) -> Result<(), VmError> {
        let Some(usable) = self.devices.with_room(|room| room.usable_bytes()) else {
            return Ok(());
        };
        let Some((start, _)) = self.memory.room() else {
            return Ok(());
        };
        let mut parts = self
            .room_parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mapped = parts.last().copied().unwrap_or(0);
        if usable <= mapped {
            return Ok(());
        }
        let slot = FIRST_ROOM_SLOT + u32::try_from(parts.len()).unwrap_or(u32::MAX);
        let host = self
            .memory
            .mmap()
            .get_host_address(GuestAddress(start + mapped))
            .map_err(|e| VmError::Memory(e.to_string()))?;
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: start + mapped,
            memory_size: usable - mapped,
            userspace_addr: host as u64,
            flags: 0,
        };
        // SAFETY: the range is part of a mapping owned by `memory`, which the `Vm` keeps until after
        // the vCPUs and the VM descriptor are gone; no other slot covers it.
        unsafe { self.vm_fd.set_user_memory_region(region) }
            .map_err(VmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        parts.push(usable);
        Ok(())
    }
}
