//! What all vCPUs share: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_irqchip__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::mirror::mirror;
use super::refused;
use super::scope::StateScope;
use crate::error::VmError;

mirror!(
    /// An 8259.
    Pic of kvm_pic_state {
        last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8,
        read_reg_select: u8, poll: u8, special_mask: u8, init_state: u8, auto_eoi: u8,
        rotate_on_auto_eoi: u8, special_fully_nested_mode: u8, init4: u8, elcr: u8, elcr_mask: u8,
    }
);

mirror!(
    /// Without the host's time of its last load, which KVM sets itself.
    PitChannel of kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8,
        read_state: u8, write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8,
    }
);

/// The timer, an 8254.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(deny_unknown_fields)]
pub(crate) struct Pit {
    pub(crate) channels: [PitChannel; 3],
    pub(crate) flags: u32,
}

/// The I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(deny_unknown_fields)]
pub(crate) struct IoApic {
    pub(crate) base_address: u64,
    pub(crate) ioregsel: u32,
    pub(crate) id: u32,
    pub(crate) irr: u32,
    pub(crate) redirtbl: [u64; 24],
}

/// The interrupt controllers and the timer of a full in-kernel irqchip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(deny_unknown_fields)]
pub(crate) struct Irqchip {
    pub(crate) pic_master: Pic,
    pub(crate) pic_slave: Pic,
    pub(crate) ioapic: IoApic,
    pub(crate) pit: Pit,
}

/// What is left of a VM's state beside its vCPUs and its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineState {
    pub(crate) irqchip: Option<Irqchip>,
    /// The paravirtual clock, in nanoseconds since the VM was made. It goes on
    /// from here, however long the snapshot lay: a guest whose clock jumped would
    /// take itself for stalled.
    pub(crate) clock_ns: u64,
}

impl MachineState {
    /// Takes the state out of a VM of which no vCPU runs.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub(crate) fn save(fd: &VmFd, scope: &StateScope) -> Result<Self, VmError> {
        let irqchip = match scope.irqchip {
            true => Some(Irqchip::save(fd)?),
            false => None,
        };
        let clock_ns = fd.get_clock().map_err(refused("save its clock"))?.clock;
        Ok(Self { irqchip, clock_ns })
    }

    /// Puts the state into a VM whose vCPUs have theirs and have not run.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub(crate) fn load(&self, fd: &VmFd) -> Result<(), VmError> {
        if let Some(irqchip) = &self.irqchip {
            irqchip.load(fd)?;
        }
        // No flag: KVM_CLOCK_REALTIME would add the time since it was saved.
        let clock = kvm_clock_data { clock: self.clock_ns, ..Default::default() };
        fd.set_clock(&clock).map_err(refused("load its clock"))
    }
}

impl Irqchip {
    fn save(fd: &VmFd) -> Result<Self, VmError> {
        let pit = fd.get_pit2().map_err(refused("save the timer"))?;
        let master = chip(fd, KVM_IRQCHIP_PIC_MASTER)?;
        let slave = chip(fd, KVM_IRQCHIP_PIC_SLAVE)?;
        let ioapic = chip(fd, KVM_IRQCHIP_IOAPIC)?;
        Ok(Self {
            // SAFETY: KVM was asked for this PIC, so the union holds one; and it
            // was zeroed before, all of it.
            pic_master: unsafe { master.pic }.into(),
            // SAFETY: as above.
            pic_slave: unsafe { slave.pic }.into(),
            // SAFETY: KVM was asked for the I/O APIC, so the union holds one.
            ioapic: unsafe { ioapic.ioapic }.into(),
            pit: Pit { channels: pit.channels.map(Into::into), flags: pit.flags },
        })
    }

    fn load(&self, fd: &VmFd) -> Result<(), VmError> {
        let chips = [
            (
                KVM_IRQCHIP_PIC_MASTER,
                kvm_irqchip__bindgen_ty_1 { pic: self.pic_master.clone().into() },
            ),
            (
                KVM_IRQCHIP_PIC_SLAVE,
                kvm_irqchip__bindgen_ty_1 { pic: self.pic_slave.clone().into() },
            ),
            (KVM_IRQCHIP_IOAPIC, kvm_irqchip__bindgen_ty_1 { ioapic: (&self.ioapic).into() }),
        ];
        for (chip_id, chip) in chips {
            let irqchip = kvm_irqchip { chip_id, pad: 0, chip };
            fd.set_irqchip(&irqchip).map_err(refused("load an interrupt controller"))?;
        }
        // After the controllers its interrupts go to.
        let pit = kvm_bindings::kvm_pit_state2 {
            channels: self.pit.channels.clone().map(Into::into),
            flags: self.pit.flags,
            ..Default::default()
        };
        fd.set_pit2(&pit).map_err(refused("load the timer"))
    }
}

/// Reads one interrupt controller.
fn chip(fd: &VmFd, chip_id: u32) -> Result<kvm_irqchip__bindgen_ty_1, VmError> {
    let mut irqchip = kvm_irqchip { chip_id, ..Default::default() };
    fd.get_irqchip(&mut irqchip).map_err(refused("save an interrupt controller"))?;
    Ok(irqchip.chip)
}

impl From<kvm_ioapic_state> for IoApic {
    fn from(kvm: kvm_ioapic_state) -> Self {
        let kvm_ioapic_state { base_address, ioregsel, id, irr, redirtbl, .. } = kvm;
        // SAFETY: both views of an entry are 64 plain bits.
        let redirtbl = redirtbl.map(|entry| unsafe { entry.bits });
        Self { base_address, ioregsel, id, irr, redirtbl }
    }
}

impl From<&IoApic> for kvm_ioapic_state {
    fn from(saved: &IoApic) -> Self {
        let IoApic { base_address, ioregsel, id, irr, redirtbl } = saved.clone();
        let redirtbl = redirtbl.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits });
        Self { base_address, ioregsel, id, irr, pad: 0, redirtbl }
    }
}
