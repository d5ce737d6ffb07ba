//! KVM's memory slots: which host memory answers at which guest physical addresses without an exit.
#![expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION hands host memory to the guest"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vm_allocator::IdAllocator;

use crate::kvm_ext;

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

/// Why it is not known what the guest has written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirtyLogError {
    /// KVM has no log of the kind that is needed.
    #[error(
        "KVM does not log the guest's writes so that the log can be cleared by the piece; Linux 5.4 does"
    )]
    Unsupported(#[source] kvm_ioctls::Error),
    /// The slot has been taken away.
    #[error("the memory is not there any more")]
    NoSlot,
    /// KVM does not log.
    #[error("KVM does not log the guest's writes")]
    Kvm(#[source] kvm_ioctls::Error),
    /// KVM does not clear its log.
    #[error("KVM does not clear its log of the guest's writes")]
    Clear(#[source] io::Error),
}

/// Memory of this process that stays where it is while the value lives.
pub(crate) trait HostMemory: Send + Sync {
    /// Where it is in this process.
    fn address(&self) -> *mut u8;

    /// Its length in bytes.
    fn size(&self) -> u64;

    /// Why there is nothing any more where the guest has memory, if so. `touched` tells that this is where it ran into
    /// an error.
    fn why_missing(&self, touched: bool) -> Option<&'static str>;

    /// The guest has lost the memory for this reason.
    fn lose(&self, why: &'static str);
}

/// All memory slots of a VM.
#[derive(Debug, Clone)]
pub(crate) struct Slots {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    ids: IdAllocator,
    /// The slots that KVM has, by their numbers.
    used: BTreeMap<u32, Mapping>,
}

/// What a slot maps.
struct Mapping {
    address: u64,
    memory: Arc<dyn HostMemory>,
}

impl Slots {
    /// The slots of `vm`, of which KVM offers `limit`.
    pub(crate) fn new(vm: Arc<VmFd>, limit: usize) -> Result<Self, SlotError> {
        let last = u32::try_from(limit.saturating_sub(1)).unwrap_or(u32::MAX);
        let ids = IdAllocator::new(0, last).map_err(|_| SlotError::Exhausted)?;
        let used = BTreeMap::new();
        let state = Mutex::new(State { ids, used });
        Ok(Self {
            shared: Arc::new(Shared { vm, state }),
        })
    }

    /// Makes `memory` answer at `address` until the slot is dropped. Guest writes to a read-only slot exit to the VMM.
    pub(crate) fn add(
        &self,
        address: u64,
        memory: Arc<dyn HostMemory>,
        readonly: bool,
    ) -> Result<Slot, SlotError> {
        let size = memory.size();
        let flags = if readonly { KVM_MEM_READONLY } else { 0 };
        let mut state = self.shared.state();
        let id = state.ids.allocate_id().map_err(|_| SlotError::Exhausted)?;
        let mapping = Mapping { address, memory };
        let set = mapping.set(&self.shared.vm, id, size, flags);
        // Whether KVM took it or not, dropping the slot gives the number back.
        state.used.insert(id, mapping);
        drop(state);
        let slot = Slot {
            shared: self.shared.clone(),
            id,
        };
        set.map_err(|source| SlotError::Kvm {
            address,
            size,
            source,
        })?;
        Ok(slot)
    }

    /// Takes memory away from the guest that is not there any more, since somebody has truncated its file or a device
    /// does not answer: touching it is an error that no guest can be blamed for. `touched` is where that happened, if
    /// KVM says. Says how many slots those were; from now on the guest's accesses there exit to the VMM.
    pub(crate) fn remove_missing(&self, touched: Option<u64>) -> usize {
        let mut missing = Vec::new();
        let mut state = self.shared.state();
        state.used.retain(|&id, mapping| {
            let Some(why) = mapping.why_missing(touched) else {
                return true;
            };
            mapping.unset(&self.shared.vm, id);
            missing.push((mapping.memory.clone(), why));
            false
        });
        // Whose memory it was takes its other slots away.
        drop(state);
        for (memory, why) in &missing {
            memory.lose(why);
        }
        missing.len()
    }
}

impl Shared {
    /// Has KVM protect pages anew when it is told to, and not when the log is read: little by little, as they are sent.
    fn log_by_hand(&self) -> Result<(), DirtyLogError> {
        let mut request = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            ..Default::default()
        };
        let [flags, ..] = &mut request.args;
        *flags = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let enabled = self.vm.enable_cap(&request);
        enabled.map_err(DirtyLogError::Unsupported)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mapping {
    fn set(&self, vm: &VmFd, id: u32, size: u64, flags: u32) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: id,
            flags,
            guest_phys_addr: self.address,
            memory_size: size,
            userspace_addr: self.memory.address() as u64,
        };
        // SAFETY: `size` is 0, which removes the slot, or the length of a mapping that `self.memory` keeps alive; and
        // `self` is dropped after `unset` only.
        unsafe { vm.set_user_memory_region(region) }
    }

    fn why_missing(&self, touched: Option<u64>) -> Option<&'static str> {
        let offset = touched.and_then(|touched| touched.checked_sub(self.address));
        let is_touched = offset.is_some_and(|offset| offset < self.memory.size());
        self.memory.why_missing(is_touched)
    }

    fn unset(&self, vm: &VmFd, id: u32) {
        // Removing a slot that KVM never took fails, which is as well.
        let _ = self.set(vm, id, 0, 0);
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// A memory slot, removed on drop.
#[derive(Debug)]
pub(crate) struct Slot {
    shared: Arc<Shared>,
    id: u32,
}

impl Slot {
    /// Starts to log which pages the guest writes, or stops. At first all are logged as written.
    pub(crate) fn log_writes(&self, log: bool) -> Result<(), DirtyLogError> {
        if log {
            self.shared.log_by_hand()?;
        }
        let flags = if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let state = self.shared.state();
        let mapping = state.used.get(&self.id).ok_or(DirtyLogError::NoSlot)?;
        let set = mapping.set(&self.shared.vm, self.id, mapping.memory.size(), flags);
        set.map_err(DirtyLogError::Kvm)
    }

    /// Which pages have been written since they were last [cleared](Self::clear_written), a bit for each.
    pub(crate) fn written(&self) -> Result<Vec<u64>, DirtyLogError> {
        let size = match self.shared.state().used.get(&self.id) {
            Some(mapping) => usize::try_from(mapping.memory.size()).unwrap_or(usize::MAX),
            None => return Err(DirtyLogError::NoSlot),
        };
        let log = self.shared.vm.get_dirty_log(self.id, size);
        log.map_err(DirtyLogError::Kvm)
    }

    /// Has those of `pages` whose bit is set logged again when they are written. The first bit is that of `first_page`, a
    /// multiple of 64.
    pub(crate) fn clear_written(
        &self,
        first_page: u64,
        pages: u64,
        bits: &[u64],
    ) -> Result<(), DirtyLogError> {
        kvm_ext::clear_dirty_log(&self.shared.vm, self.id, first_page, pages, bits)
            .map_err(DirtyLogError::Clear)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(mapping) = state.used.remove(&self.id) {
            mapping.unset(&self.shared.vm, self.id);
        }
        let _ = state.ids.free_id(self.id);
    }
}
