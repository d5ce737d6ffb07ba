//! KVM's memory slots: which host memory answers at which guest physical addresses without an exit.
#![expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION hands host memory to the guest"
)]

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_allocator::IdAllocator;
use vm_memory::{GuestRegionMmap, MmapRegion};

/// Why a memory slot could not be set.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// All of KVM's slots are taken.
    #[error("all of KVM's memory slots are taken")]
    Exhausted,
    /// KVM refused.
    #[error("KVM does not map {size:#x} bytes at {address:#x}")]
    Kvm {
        /// The guest physical address.
        address: u64,
        /// The length in bytes.
        size: u64,
        /// What KVM says.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Memory of this process that stays where it is while the value lives.
pub(crate) trait HostMemory: Send + Sync {
    fn mapping(&self) -> &MmapRegion;
}

impl HostMemory for MmapRegion {
    fn mapping(&self) -> &MmapRegion {
        self
    }
}

impl HostMemory for GuestRegionMmap {
    fn mapping(&self) -> &MmapRegion {
        self
    }
}

/// All memory slots of a VM.
#[derive(Debug, Clone)]
pub(crate) struct Slots {
    vm: Arc<VmFd>,
    ids: Arc<Mutex<IdAllocator>>,
}

impl Slots {
    /// The slots of `vm`, of which KVM offers `limit`.
    pub(crate) fn new(vm: Arc<VmFd>, limit: usize) -> Result<Self, SlotError> {
        let last = u32::try_from(limit.saturating_sub(1)).unwrap_or(u32::MAX);
        let ids = IdAllocator::new(0, last).map_err(|_| SlotError::Exhausted)?;
        Ok(Self {
            vm,
            ids: Arc::new(Mutex::new(ids)),
        })
    }

    /// Makes `memory` answer at `address` until the slot is dropped. Guest writes to a read-only slot exit to the VMM.
    pub(crate) fn add(
        &self,
        address: u64,
        memory: Arc<dyn HostMemory>,
        readonly: bool,
    ) -> Result<Slot, SlotError> {
        let id = self
            .ids
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .allocate_id()
            .map_err(|_| SlotError::Exhausted)?;
        // From here on dropping the slot gives the number back, whether KVM took it or not.
        let slot = Slot {
            slots: self.clone(),
            id,
            address,
            memory,
        };
        let size = slot.memory.mapping().size() as u64;
        slot.set(size, if readonly { KVM_MEM_READONLY } else { 0 })
            .map_err(|source| SlotError::Kvm {
                address,
                size,
                source,
            })?;
        Ok(slot)
    }
}

/// A memory slot, removed on drop.
pub(crate) struct Slot {
    slots: Slots,
    id: u32,
    address: u64,
    memory: Arc<dyn HostMemory>,
}

impl Slot {
    fn set(&self, size: u64, flags: u32) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: self.id,
            flags,
            guest_phys_addr: self.address,
            memory_size: size,
            userspace_addr: self.memory.mapping().as_ptr() as u64,
        };
        // SAFETY: `size` is 0, which removes the slot, or the length of a mapping that `self.memory` keeps alive; and
        // this slot is removed from KVM before that is dropped.
        unsafe { self.slots.vm.set_user_memory_region(region) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Removing a slot that KVM never took fails, which is as well.
        let _ = self.set(0, 0);
        let _ = self
            .slots
            .ids
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .free_id(self.id);
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Slot {{ id: {}, address: {:#x} }}",
            self.id, self.address
        )
    }
}
