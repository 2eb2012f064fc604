//! Saving a paused VM and bringing it back.
//!
//! Memory is not part of the state: it stays in its memfd, which the caller keeps (upgrade by
//! re-execution) or copies (snapshot file).

use std::fs::File;
use std::sync::Arc;

use bulkhead_devices::virtio::mmio::TransportState;
use kvm_bindings::{
    KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip,
};
use serde::{Deserialize, Serialize};

use crate::config::VmConfig;
use crate::cpu::VcpuState;
use crate::error::VmError;
use crate::memory::VmMemory;
use crate::vm::{ExitSlot, Frame, Vm};
use crate::wiring::{Devices, LegacyState};

/// Version of [`VmState`]'s layout.
pub const STATE_VERSION: u32 = 1;

/// Everything of a VM but its memory.
#[derive(Serialize, Deserialize)]
pub struct VmState {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// Size of guest memory in bytes.
    pub memory_bytes: u64,
    vcpus: Vec<VcpuState>,
    irqchips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
    devices: Vec<TransportState>,
    legacy: LegacyState,
    cmdline: String,
}

impl std::fmt::Debug for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmState")
            .field("version", &self.version)
            .field("memory_bytes", &self.memory_bytes)
            .finish_non_exhaustive()
    }
}

const IRQCHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

impl Vm {
    /// Saves the state of a paused VM; memory stays in [`Vm::memory_file`].
    ///
    /// # Errors
    /// When the VM is not paused or KVM refuses a call.
    pub fn save(&self) -> Result<VmState, VmError> {
        self.pause()?;
        let mut vcpus = Vec::new();
        for vcpu in self.vcpus().iter() {
            let list = self.msr_list.clone();
            vcpus.push(vcpu.call(move |fd| VcpuState::save(fd, &list))??);
        }
        let mut irqchips = Vec::new();
        for chip_id in IRQCHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.vm_fd
                .get_irqchip(&mut chip)
                .map_err(VmError::kvm("KVM_GET_IRQCHIP"))?;
            irqchips.push(chip);
        }
        let mut clock = self
            .vm_fd
            .get_clock()
            .map_err(VmError::kvm("KVM_GET_CLOCK"))?;
        // Only the value is taken back: host time and TSC belong to this host.
        clock.flags &= !KVM_CLOCK_TSC_STABLE;
        Ok(VmState {
            version: STATE_VERSION,
            memory_bytes: self.memory.size(),
            vcpus,
            irqchips,
            clock,
            devices: self.devices.save(),
            legacy: self.devices.save_legacy(),
            cmdline: self.cmdline.clone(),
        })
    }

    /// The memfd that is guest memory.
    pub fn memory_file(&self) -> &File {
        self.memory.file()
    }

    /// Builds a VM from saved state and its memory. It is created paused: [`Vm::start`] lets it
    /// go on. `config` must describe the same devices.
    ///
    /// # Errors
    /// When state, memory and configuration do not belong together.
    pub fn restore(config: VmConfig, state: &VmState, memory: File) -> Result<Self, VmError> {
        state.check(&config)?;
        let len = memory
            .metadata()
            .map_err(VmError::host("saved guest memory"))?
            .len();
        let room = config.room_mib << 20;
        if len < state.memory_bytes.saturating_add(room) {
            return Err(VmError::State(format!(
                "the memory has {len} bytes, the state says {}",
                state.memory_bytes
            )));
        }
        let memory = VmMemory::map_with_room(memory, state.memory_bytes, room)?;
        let frame = Frame::new(&config, Some(memory))?;
        Self::go_on(config, state, frame)
    }

    /// A VM whose memory is there already, and that takes everything else from saved state.
    pub(crate) fn go_on(
        mut config: VmConfig,
        state: &VmState,
        frame: Frame,
    ) -> Result<Self, VmError> {
        let exit = Arc::new(ExitSlot::new().map_err(VmError::host("exit event"))?);
        for (fd, saved) in frame.vcpu_fds.iter().zip(&state.vcpus) {
            saved.restore(fd)?;
        }
        for chip in &state.irqchips {
            frame
                .vm_fd
                .set_irqchip(chip)
                .map_err(VmError::kvm("KVM_SET_IRQCHIP"))?;
        }
        frame
            .vm_fd
            .set_clock(&state.clock)
            .map_err(VmError::kvm("KVM_SET_CLOCK"))?;
        let devices = Devices::new(&mut config, &frame.vm_fd, &frame.memory, &exit)?;
        devices.restore(&state.devices, &state.legacy)?;
        let vm = frame.finish(config, devices, exit, None, state.cmdline.clone())?;
        // The guest uses what it was given.
        vm.map_room()?;
        Ok(vm)
    }
}

impl VmState {
    /// Refuses a configuration of another shape.
    pub(crate) fn check(&self, config: &VmConfig) -> Result<(), VmError> {
        if self.version != STATE_VERSION {
            return Err(VmError::State(format!(
                "state of version {}, this program reads version {STATE_VERSION}",
                self.version
            )));
        }
        if self.vcpus.len() != usize::from(config.vcpus)
            || self.memory_bytes != config.memory_mib << 20
            || self.irqchips.len() != IRQCHIPS.len()
        {
            return Err(VmError::State(format!(
                "the state has {} vCPUs and {} MiB, the configuration {} and {}",
                self.vcpus.len(),
                self.memory_bytes >> 20,
                config.vcpus,
                config.memory_mib
            )));
        }
        Ok(())
    }
}
